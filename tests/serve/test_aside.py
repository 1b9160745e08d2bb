"""Requests that last long by what they are given: they wait for each other, and nobody else for them."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Client, serving

from pyengine import Engine
from pyengine.run import in_time
from pyengine.run.guide import Guide
from pyengine.serve.aside import Aside
from pyengine.serve.models import ServedModel
from pyengine.serve.work import LONG_AT_ONCE
from pyengine.text import sequences
from pyengine.text.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "Hello"}]
TEXT: dict[str, Any] = {"prompt": "Hello", "max_tokens": 3, "seed": 1}
# What is asked, and what of it lasts.
LONG: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "tokenize": ("/tokenize", {"content": "Hello"}, Engine, "tokenize"),
    "detokenize": ("/detokenize", {"tokens": [5]}, Engine, "detokenize"),
    "count_tokens": ("/v1/messages/count_tokens", {"messages": MESSAGES}, ServedModel, "chat_ids"),
    "a grammar": ("/v1/completions", {**TEXT, "structured_outputs": {"regex": "a+"}}, Guide, "check"),
    "breakers": ("/v1/completions", {**TEXT, "dry_multiplier": 1.0, "dry_sequence_breakers": ["a"]}, sequences.Breakers, "of"),
    "bad words": ("/v1/completions", {**TEXT, "bad_words": ["a" * 99, "bc"]}, sequences, "bad_sequences"),
    "many prompts": ("/v1/completions", {**TEXT, "prompt": ["Hello", "a" * 99]}, Tokenizer, "encode"),
    "many inputs": ("/v1/embeddings", {"input": ["Hello", "a" * 99]}, Tokenizer, "encode"),
}
MORE = 40  # than there are threads of an event loop on any machine: at most 32


@pytest.mark.parametrize("name", LONG)
def test_others_are_answered_meanwhile(chat_model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, body, owner, method = LONG[name]
    if name == "a grammar":
        pytest.importorskip("llguidance", reason="the extra guide is not installed")
    go_on, work = threading.Event(), getattr(owner, method)

    def slowly(*args: Any, **options: Any) -> Any:
        go_on.wait()
        return work(*args, **options)

    async def test(client: Client) -> None:
        ids = {**TEXT, "prompt": [5, 6, 7]}
        before = await client.post("/v1/completions", ids)
        with monkeypatch.context() as patched:
            patched.setattr(owner, method, slowly)
            patched.setattr("pyengine.serve.work.LONG", 100)
            calls = [asyncio.ensure_future(client.post(path, body)) for _ in range(MORE)]
            for _ in range(50):  # they all have come as far as they come
                await asyncio.sleep(0)
            assert (await client.post("/v1/completions", ids)).json["choices"] == before.json["choices"]
            assert (await client.get("/metrics")).status == 200
            assert not any(call.done() for call in calls)
            go_on.set()
            assert [answer.status for answer in await asyncio.gather(*calls)] == [200] * MORE

    serving(chat_model, test)


@pytest.mark.parametrize("name", LONG)
def test_at_the_servers_end_nobody_waits(chat_model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, body, owner, method = LONG[name]
    if name == "a grammar":
        pytest.importorskip("llguidance", reason="the extra guide is not installed")
    go_on, begun, work = threading.Event(), threading.Event(), getattr(owner, method)

    def slowly(*args: Any, **options: Any) -> Any:
        begun.set()
        go_on.wait()
        return work(*args, **options)

    async def test(client: Client) -> None:
        monkeypatch.setattr(owner, method, slowly)
        calls = [asyncio.ensure_future(client.post(path, body)) for _ in range(LONG_AT_ONCE + 1)]
        while not begun.is_set() or len(client.app.queue._unready) < len(calls):
            await asyncio.sleep(0)
        client.app.drain()
        client.app.abort_all()
        for answer in await asyncio.gather(*calls):
            assert answer.status == 503 and "the server is shutting down" in answer.body.decode()
        go_on.set()

    serving(chat_model, test)


def test_what_takes_too_long_is_not_tried_again(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To tell which field is to blame every demand is tried alone, but not for another twenty seconds."""
    pytest.importorskip("llguidance", reason="the extra guide is not installed")
    go_on, n_begun, check = threading.Event(), itertools.count(), Guide.check

    def slowly(guide: Guide) -> None:
        next(n_begun)
        go_on.wait()
        check(guide)

    async def test(client: Client) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(Guide, "check", slowly)
            patched.setattr("pyengine.run.guide.COMPILE_SECONDS", 0.001)
            answer = await client.post("/v1/completions", {**TEXT, "structured_outputs": {"regex": "a+"}})
            left = list(in_time._left)
            go_on.set()
            for one in left:
                one.wait()
        assert (answer.status, answer.error["param"]) == (400, "structured_outputs")
        assert "it takes longer" in answer.error["message"]
        assert next(n_begun) == len(left) == 1

    serving(chat_model, test)


def test_while_others_take_too_long_a_grammar_may_come_again(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not the one that is too costly."""
    pytest.importorskip("llguidance", reason="the extra guide is not installed")
    at_work = [threading.Event() for _ in range(in_time.MOST_AT_ONCE)]
    monkeypatch.setattr(in_time, "_left", set(at_work))

    async def test(client: Client) -> None:
        body = {**TEXT, "structured_outputs": {"regex": "a+"}}
        answer = await client.post("/v1/completions", body)
        assert (answer.status, answer.error["code"]) == (503, "overloaded") and int(answer.headers["retry-after"]) > 0
        at_work[0].set()
        assert (await client.post("/v1/completions", body)).status == 200

    serving(chat_model, test)


def test_calls_wait_in_turn_and_their_threads_end() -> None:
    aside, go_on, both, n = Aside(2), threading.Event(), threading.Event(), 0
    most, lock, order = 0, threading.Lock(), []

    def call(i: int) -> int:
        nonlocal n, most
        with lock:
            n += 1
            most = max(most, n)
            order.append(i)
            if n == 2:
                both.set()
        go_on.wait()
        with lock:
            n -= 1
        if i == 3:
            raise KeyError(i)
        return i

    calls = [aside.submit(call, i) for i in range(6)]
    both.wait()
    assert calls[5].cancel()
    go_on.set()
    assert [one.result() for one in calls if one not in (calls[3], calls[5])] == [0, 1, 2, 4]
    with pytest.raises(KeyError):
        calls[3].result()
    assert most == 2 and sorted(order) == [0, 1, 2, 3, 4]
    while aside._n_threads:
        pass
    assert aside.submit(call, 7).result() == 7  # by a new one


def test_no_exit_waits_for_a_call() -> None:
    code = """if True:
        import threading
        from pyengine.serve.aside import Aside
        begun = threading.Event()
        Aside(1).submit(lambda: (begun.set(), threading.Event().wait()))
        begun.wait()
        print("ends")
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "ends\n"
