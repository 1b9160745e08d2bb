"""Input that is wrong in each of the ways in which it comes: a clear error, and the answer beside it is what it is alone."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Answer, Client, serving
from serve.conftest import TURNS, make_chat_model

from pyengine.serve.errors import HTTPError
from pyengine.serve.fields import parse_json
from pyengine.serve.openapi import BODIES

CHAT, TEXT, RESPONSES, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"
USER = {"role": "user", "content": "Hello"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
PROMPT = {
    CHAT: {"messages": [USER]},
    TEXT: {"prompt": "Hello"},
    RESPONSES: {"input": "Hello"},
    EMBEDDINGS: {"input": "Hello"},
}
N_CTX = 512
# As Llama 2's and Mistral's: it refuses an order that it does not know.
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% endfor %}"
)


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def with_field(path: str, text: bytes) -> bytes:
    """A body that is right but for one field more, as it is written."""
    return json.dumps(PROMPT[path]).encode()[:-1] + b", " + text + b"}"


# of every path: a body, and the words of its error
OF_ALL: list[tuple[str, Any, str]] = [
    (path, body, words)
    for path in PROMPT
    for body, words in [
        (with_field(path, b'"model": "a", "model": "b"'), "the key 'model' twice"),
        (with_field(path, b'"metadata": {"a": "1", "a": "2"}'), "the key 'a' twice"),
        (with_field(path, b'"metadata": ' + nested(65)), "nested more than 64 levels"),
        (with_field(path, b'"metadata": ' + nested(100_000)), "nested too deeply"),
        (with_field(path, b'"user": "\xff"'), "not UTF-8: invalid start byte at byte"),
        (with_field(path, b'"user": "\xed\xa0\x80"'), "not UTF-8"),
        (with_field(path, b'"user": "\x00"'), "not JSON"),
        (b"1e999", "the body is not a finite number"),
        (with_field(path, b'"no_such": 1'), "unknown field 'no_such'"),
    ]
]
STOPS = [f"stop {i}" for i in range(10_000)]
# a path, what is wrong, its param, words of the error
WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    *((path, {"stop": STOPS}, "stop", "stop holds 10000 strings, at most 1024") for path in (CHAT, TEXT, RESPONSES)),
    *((path, {"temperature": -0.5}, "temperature", "[0, ") for path in (CHAT, TEXT, RESPONSES)),
    *((path, {"top_p": 7}, "top_p", "(0, 1]") for path in (CHAT, TEXT, RESPONSES)),
    (CHAT, {"max_tokens": -5}, "max_tokens", "-5"),
    (TEXT, {"max_tokens": 10**12}, "max_tokens", "at most"),
    (RESPONSES, {"max_output_tokens": -1}, "max_output_tokens", "-1"),
    (TEXT, {"n": 10**9}, "n", "1000000000"),
    (EMBEDDINGS, {"dimensions": 0}, "dimensions", "at least 1"),
    (CHAT, {"messages": []}, "messages", "empty"),
    (CHAT, {"messages": [{}]}, "messages[0].role", "must provide"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content", "must provide"),
    (RESPONSES, {"input": []}, "input", "empty"),
    (TEXT, {"prompt": []}, "prompt", "empty"),
    (EMBEDDINGS, {"input": []}, "input", "empty"),
    (CHAT, {"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}, USER]}, "messages[0].tool_call_id", "no earlier"),
    (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type", "'image_url'"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "input_audio"}]}]},
        "messages[0].content[1].type",
        "'input_audio'",
    ),
    (
        RESPONSES,
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0].type",
        "'input_image'",
    ),
]  # fmt: skip


# as they are written, and what they are: numbers that are none, and those that a double does not hold
NOT_FINITE = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"9" * 400 + b".0")


def beside_a_stream(model: Path, test: Any) -> None:
    """test(client) beside an answer that is being written, which must be that of the request alone."""

    async def both(client: Client) -> None:
        body = {"prompt": "Beside", "max_tokens": 200, "ignore_eos": True, "seed": 1, "temperature": 1}
        alone = (await client.post(TEXT, body)).json["choices"][0]["text"]
        running = client.begin("POST", TEXT, {**body, "stream": True})
        await running.until(lambda answer: len(answer.writes) > 1)
        await test(client)
        await running.task
        assert "".join(event["choices"][0]["text"] for event in running.answer.events if event["choices"]) == alone

    serving(model, both)


def check(answer: Answer, words: str, status: int = 400, kind: str = "invalid_request_error") -> None:
    assert answer.status == status, answer.body
    assert words in answer.error["message"] and answer.error["type"] == kind, answer.body
    assert len(answer.body) < 2000


def test_what_is_no_body_of_ours(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        for path, body, words in OF_ALL:
            check(await client.post(path, body), words)

    beside_a_stream(chat_model, test)


def test_a_number_that_is_not_finite_is_refused_by_its_place(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        for path, table in BODIES.items():
            for name in table:
                for number in NOT_FINITE:
                    answer = await client.post(path, b'{"%b": %b}' % (name.encode(), number))
                    error = answer.json if path.startswith("/api/") else answer.json["error"]
                    assert (answer.status, error["param"]) == (400, name), answer.body
                    assert error.get("message", error.get("error")) == f"{name} is not a finite number"
        tools = b'{"messages": [], "tools": [{"a": 1e308}, {"function": {"parameters": {"enum": [1, "x", 1e309]}}}]}'
        answer = await client.post(CHAT, tools)
        assert answer.error["param"] == "tools[1].function.parameters.enum[2]"
        largest = {**PROMPT[TEXT], "max_tokens": 1, "logit_bias": {"5": 3.4e38, "6": -3.4e38}}
        assert (await client.post(TEXT, largest)).status == 200

    beside_a_stream(chat_model, test)


def test_the_place_of_a_number_takes_no_more_memory_than_the_body() -> None:
    name, n = "k" * 20_000, 2_000
    body = b'{"a": [{"%b": [%b1e999]}]}' % (name.encode(), b"0," * n)
    tracemalloc.start()
    try:
        with pytest.raises(HTTPError) as caught:
            parse_json(body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.param is not None and f"a[0].{name}[{n}]".startswith(caught.value.param.removesuffix("…"))
    assert peak < 1 << 20  # a path for each number would take 40 MB


def test_what_is_wrong_in_a_field(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        for path, fields, param, words in WRONG:
            answer = await client.post(path, {**PROMPT[path], **fields})
            check(answer, words)
            assert answer.error["param"] == param, answer.body
        many = await client.post(TEXT, {"prompt": "a", "stop": STOPS[:1024], "max_tokens": 1})
        assert many.status == 200

    beside_a_stream(chat_model, test)


def test_a_prompt_over_the_context_and_an_unknown_model(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        for path, field in ((CHAT, "messages"), (TEXT, "prompt"), (RESPONSES, "input"), (EMBEDDINGS, "input")):
            text = "x" * 600
            body: dict[str, Any] = {field: [{"role": "user", "content": text}] if path == CHAT else text}
            for stream in ({}, {"stream": True}) if path != EMBEDDINGS else ({},):
                answer = await client.post(path, {**body, **stream})
                check(answer, f"the context holds {N_CTX}")
                assert (answer.error["param"], answer.error["code"]) == (field, "context_length_exceeded")
                assert max(map(int, re.findall(r"\d+", answer.error["message"]))) > N_CTX
            unknown = await client.post(path, {**PROMPT[path], "model": "gpt-5"})
            check(unknown, "there is no model 'gpt-5'; there is: tiny", 404, "not_found_error")
            assert (unknown.error["param"], unknown.error["code"]) == ("model", "model_not_found")

    beside_a_stream(chat_model, test)


def test_roles_in_an_order_that_the_template_refuses(tmp_path: Path) -> None:
    model = make_chat_model(tmp_path, STRICT + TURNS, n_ctx=N_CTX)
    said = {"role": "assistant", "content": "Hi"}

    async def test(client: Client) -> None:
        for messages in ([said], [USER, USER], [USER, {"role": "system", "content": "x"}, said, said], [said, USER]):
            for path, field in ((CHAT, "messages"), (RESPONSES, "input")):
                answer = await client.post(path, {field: messages})
                check(answer, "Conversation roles must alternate")
                assert answer.error["param"] == field
        assert (await client.post(CHAT, {"messages": [USER, said, USER], "max_tokens": 1})).status == 200

    beside_a_stream(model, test)
