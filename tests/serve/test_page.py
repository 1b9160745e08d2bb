"""The page in a real Chromium: PYENGINE_SCREENSHOTS=DIR keeps pictures."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from serve.browser import CHROMIUM, Browser
from serve.test_server import post, server

PAGE = Path(__file__).parents[2] / "pyengine" / "serve" / "page.html"

LAST = "[...document.querySelectorAll('article.assistant')].at(-1)"
DONE = f"document.querySelector('#send').textContent === 'Send' && {LAST}?.querySelector('button') !== null"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium on the path")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def keep(browser: Browser, name: str) -> None:
    if directory := os.environ.get("PYENGINE_SCREENSHOTS"):
        browser.screenshot(Path(directory) / name)


def test_the_page_asks_nothing_of_other_addresses_and_writes_no_markup() -> None:
    text = PAGE.read_text()
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(| on[a-z]+=\"| style=\"", text)


def test_a_conversation(browser: Browser, chat_model: Path) -> None:
    with server("-m", f"small={chat_model}") as (_, port):
        browser.open(f"http://127.0.0.1:{port}/")
        browser.until("document.querySelector('#model').textContent === 'small'")
        browser.run("$('seed').value = 5; $('max_tokens').value = 20; $('temperature').value = 1; $('input').focus()")
        browser.type("Hello <b>there</b>")
        browser.until(DONE)
        said = browser.run(f"{LAST}.querySelector('.text').textContent")
        messages = [{"role": "user", "content": "Hello <b>there</b>"}]
        body = {"messages": messages, "seed": 5, "max_tokens": 20, "temperature": 1}
        assert said == post(port, "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]
        assert "tokens/s" in browser.run(f"{LAST}.querySelector('footer').textContent")
        assert "%" in browser.run(f"{LAST}.querySelector('.text span').title")
        assert browser.run("document.querySelector('article.user .text').innerHTML") == "Hello &lt;b&gt;there&lt;/b&gt;"
        browser.run("$('input').focus()")
        browser.type("And then?")
        browser.until(f"document.querySelectorAll('article.assistant').length === 2 && {DONE}")
        keep(browser, "conversation.png")
        browser.run(f"{LAST}.querySelector('footer button').click()")  # regenerate: the same seed, the same answer
        before = browser.until(f"{DONE} && {LAST}.querySelector('.text').textContent")
        assert browser.run("document.querySelectorAll('article').length") == 4 and before
        browser.run("document.querySelector('article.user footer button').click()")  # edit the first message
        assert browser.run("document.querySelectorAll('article').length") == 0
        assert browser.run("$('input').value") == "Hello <b>there</b>"
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        browser.run("$('theme').click()")
        keep(browser, "theme.png")
        browser.call("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=1, mobile=True)
        browser.key("Enter", 13, "\r")
        browser.until(f"document.querySelectorAll('article.assistant').length === 1 && {DONE}")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        browser.run("$('open-settings').click()")
        keep(browser, "phone.png")


# An answer that never ends by itself: one piece, and then nothing until it is given up.
ENDLESS = """window.fetch = async (path, {signal}) => new Response(new ReadableStream({
  start(stream) {
    stream.enqueue(new TextEncoder().encode('data: {"choices": [{"index": 0, "delta": {"content": "Once"}}]}\\n\\n'));
    signal.addEventListener("abort", () => stream.error(new DOMException("given up", "AbortError")));
  }}), {headers: {"content-type": "text/event-stream"}}); $('input').focus()"""


def test_stop_in_the_middle(browser: Browser, chat_model: Path) -> None:
    """What has come stays, and says that it was stopped. (That the server stops too: test_disconnects.py.)"""
    with server("-m", str(chat_model)) as (_, port):
        browser.open(f"http://127.0.0.1:{port}/")
        browser.until("document.querySelector('#model').textContent !== ''")
        browser.run(ENDLESS)
        browser.type("Hello")
        browser.until(f"{LAST}?.querySelector('.text').textContent === 'Once'")
        assert browser.run("document.querySelector('#send').textContent") == "Stop"
        browser.run("document.querySelector('#send').click(); 1")
        browser.until(DONE)
        assert "stopped" in browser.run(f"{LAST}.querySelector('footer').textContent")
        assert browser.run(f"{LAST}.querySelector('.text').textContent") == "Once"


def test_what_is_written_while_an_answer_comes_waits_for_it(browser: Browser, chat_model: Path) -> None:
    with server("-m", str(chat_model)) as (_, port):
        browser.open(f"http://127.0.0.1:{port}/")
        browser.until("document.querySelector('#model').textContent !== ''")
        browser.run(ENDLESS)
        browser.type("Hello")
        browser.until(f"{LAST}?.querySelector('.text').textContent === 'Once'")
        browser.type("And")  # and Enter
        assert browser.run("document.querySelector('#send').textContent") == "Stop"
        assert browser.run("$('input').value") == "And"
        browser.key("Escape", 27)
        browser.until(DONE)
        assert "stopped" in browser.run(f"{LAST}.querySelector('footer').textContent")


def test_a_reload_loses_neither_conversation_nor_settings(browser: Browser, chat_model: Path) -> None:
    with server("-m", str(chat_model)) as (_, port):
        address = f"http://127.0.0.1:{port}/"
        browser.open(address)
        browser.run(
            "$('seed').value = 5; $('max_tokens').value = 8; $('system').value = 'Be brief'; $('theme').click()"
        )
        browser.run("$('seed').dispatchEvent(new Event('change', {bubbles: true})); $('input').focus()")
        browser.type("Hello")
        browser.until(DONE)
        seen = (
            "JSON.stringify([[...document.querySelectorAll('article .text')].map((text) => text.textContent),"
            "[...document.querySelectorAll('dialog input, dialog textarea')].map((one) => one.value),"
            "document.documentElement.className])"
        )
        before = browser.run(seen)
        browser.open(address)
        assert browser.run(seen) == before and '"Be brief"' in before
        browser.run("$('new').click()")
        browser.open(address)
        assert browser.run("document.querySelectorAll('article').length") == 0


def test_code_between_fences_is_shown_as_code(browser: Browser, chat_model: Path) -> None:
    """However its text is cut into pieces, and with no character more or less."""
    text = "Look:\n```python\nx = `1`\n```\nand ``` is\n```\nopen"
    with server("-m", str(chat_model)) as (_, port):
        browser.open(f"http://127.0.0.1:{port}/")
        for size in (1, 2, 5, 100):
            pieces = [[text[i : i + size], ""] for i in range(0, len(text), size)]
            turn = json.dumps({"role": "assistant", "content": text, "pieces": pieces})
            spans = f"(draw({turn}), [...{LAST}.querySelectorAll('.text span')])"
            told = f"JSON.stringify({spans}.map((one) => [one.textContent, one.className === 'code']))"
            shown = json.loads(browser.run(told))
            assert "".join(part for part, _ in shown) == text
            code = "".join(part for part, is_code in shown if is_code)
            assert code == "```python\nx = `1`\n``````\nopen"


def test_an_answer_full_of_html_is_text(browser: Browser, chat_model: Path) -> None:
    evil = "<img src=x onerror='window.pwned = 1'><script>window.pwned = 1</" + "script><b>bold</b>"
    choice = {"index": 0, "delta": {"content": evil}, "logprobs": None, "finish_reason": None}
    events = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    with server("-m", str(chat_model)) as (_, port):
        browser.open(f"http://127.0.0.1:{port}/")
        headers = [{"name": "content-type", "value": "text/event-stream"}]
        browser.fulfil = {
            "responseCode": 200, "responseHeaders": headers, "body": base64.b64encode(events.encode()).decode(),
        }  # fmt: skip
        browser.call("Fetch.enable", patterns=[{"urlPattern": "*/v1/chat/completions"}])
        browser.run("$('input').focus()")
        browser.type("Hello")
        browser.until(DONE)
        assert browser.run(f"{LAST}.querySelector('.text').textContent") == evil
        assert browser.run(f"{LAST}.querySelectorAll('.text img, .text script, .text b').length") == 0
        assert browser.run("window.pwned === undefined")


def test_a_server_that_goes_and_comes_back(browser: Browser, chat_model: Path) -> None:
    with server("-m", str(chat_model)) as (_, port):
        browser.open(f"http://127.0.0.1:{port}/")
        browser.run("$('max_tokens').value = 5; $('input').focus()")
    browser.type("Hello")
    browser.until(f"{DONE} && {LAST}.querySelector('.error')?.textContent.includes('cannot be reached')")
    browser.until("$('note').textContent.includes('trying again')")
    with server("-m", str(chat_model), "--port", str(port)):
        browser.until("$('note').textContent === ''")
        browser.run(f"{LAST}.querySelector('footer button').click()")
        browser.until(f"{DONE} && {LAST}.querySelector('.error') === null && {LAST}.textContent.includes('tokens/s')")
