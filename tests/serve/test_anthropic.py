"""/v1/messages: the chat's bytes in Anthropic's form."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Answer, Client, serving
from serve.scripted import scripted
from serve.test_server import server

from pyengine.serve.anthropic_fields import COUNT, FIELDS

needs_guide = pytest.mark.skipif(find_spec("llguidance") is None, reason="the extra guide is not installed")
needs_package = pytest.mark.skipif(find_spec("anthropic") is None, reason="the package anthropic is not installed")

PATH, CHAT = "/v1/messages", "/v1/chat/completions"
USER = [{"role": "user", "content": "Hello"}]
HELLO: dict[str, Any] = {"messages": USER, "seed": 3, "max_tokens": 12}
DAY = {"type": "object", "properties": {"day": {"enum": [1, 2]}}, "required": ["day"], "additionalProperties": False}
WEATHER = {"name": "weather", "description": "Tomorrow", "input_schema": DAY}
BAD = {"type": "object", "properties": {"a": {"type": "y"}}}


def rebuilt(streamed: list[Any]) -> dict[str, Any]:
    """The message as its events build it; checks that each stands where the protocol wants it."""
    first, *inner, end, last = streamed
    assert (first["type"], end["type"], last["type"]) == ("message_start", "message_delta", "message_stop")
    message = first["message"]
    assert message["content"] == [] and message["stop_reason"] is None and message["usage"]["output_tokens"] == 0
    parts: list[str] | None = None
    for one in inner:
        if one["type"] == "content_block_start":
            assert parts is None and one["index"] == len(message["content"])
            message["content"].append(one["content_block"])
            parts = []
            continue
        assert parts is not None and one["index"] == len(message["content"]) - 1
        block = message["content"][-1]
        if one["type"] == "content_block_delta":
            kind = "text_delta" if block["type"] == "text" else "input_json_delta"
            assert one["delta"]["type"] == kind
            parts.append(one["delta"]["text" if kind == "text_delta" else "partial_json"])
            continue
        assert one["type"] == "content_block_stop"
        text, parts = "".join(parts), None
        if block["type"] == "text":
            block["text"] = text
        else:
            try:
                block["input"] = json.loads(text)
            except ValueError:
                block["input"] = {"INVALID_JSON": text}
    assert parts is None
    return {**message, **end["delta"], "usage": end["usage"]}


def said(message: dict[str, Any]) -> list[Any]:
    """Its blocks without ids, and why it ended."""
    blocks = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return [blocks, message["stop_reason"], message["stop_sequence"]]


def error_of(answer: Answer) -> dict[str, Any]:
    assert set(answer.json) == {"type", "error", "request_id"} and answer.json["type"] == "error"
    assert answer.json["request_id"] == answer.headers["x-request-id"]
    error: dict[str, Any] = answer.json["error"]
    return error


# -------------------------------------------------------------------- answers


def test_whole_and_streamed_answers_are_those_of_the_chat(chat_model: Path) -> None:
    system = [
        {"type": "text", "text": "Be "},
        {"type": "text", "text": "brief", "cache_control": {"type": "ephemeral"}},
    ]

    async def test(client: Client) -> None:
        messages = [{"role": "system", "content": "Be brief"}, *USER]
        chat = (await client.post(CHAT, {**HELLO, "messages": messages})).json
        whole = (await client.post(PATH, {**HELLO, "system": system, "metadata": {"user_id": "u"}})).json
        assert whole["content"] == [{"type": "text", "text": chat["choices"][0]["message"]["content"]}]
        assert (whole["type"], whole["role"], whole["model"]) == ("message", "assistant", "tiny")
        assert (whole["stop_reason"], whole["stop_sequence"]) == ("max_tokens", None)
        usage = whole["usage"]
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
        assert usage["output_tokens"] == 12
        parts = {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}
        streamed = (await client.post(PATH, {**HELLO, "messages": [parts], "system": "Be brief", "stream": True})).named_events
        assert said(rebuilt(streamed)) == said(whole)
        counted = await client.post(f"{PATH}/count_tokens", {"messages": USER, "system": "Be brief"})
        assert counted.json == {"input_tokens": chat["usage"]["prompt_tokens"]}
        first = streamed[0]["message"]["usage"]
        assert first["input_tokens"] == chat["usage"]["prompt_tokens"]

    serving(chat_model, test)


def test_a_stop_sequence_is_told(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        text = (await client.post(PATH, HELLO)).json["content"][0]["text"]
        for body in (HELLO, {**HELLO, "stream": True}):
            answer = await client.post(PATH, {**body, "stop_sequences": [text[3:5]]})
            message = rebuilt(answer.named_events) if "stream" in body else answer.json
            at = text.index(text[3:5])
            wanted = [[{"type": "text", "text": text[:at]}] if at else [], "stop_sequence", text[3:5]]
            assert said(message) == wanted

    serving(chat_model, test)


def test_an_answer_goes_on_with_a_last_message_of_the_assistant_s(chat_model: Path) -> None:
    messages = [*USER, {"role": "assistant", "content": "Well, "}]

    async def test(client: Client) -> None:
        chat = await client.post(CHAT, {**HELLO, "messages": messages, "continue_final_message": True})
        answer = await client.post(PATH, {**HELLO, "messages": messages})
        assert answer.json["content"][0]["text"] == chat.json["choices"][0]["message"]["content"]
        counted = await client.post(f"{PATH}/count_tokens", {"messages": messages})
        assert counted.json["input_tokens"] == chat.json["usage"]["prompt_tokens"]

    serving(chat_model, test)


# -------------------------------------------------------------------- tools

ONE = '<tool_call>\n{"name": "weather", "arguments": {"day": 1}}\n</tool_call>'
CALL: dict[str, Any] = {"type": "tool_use", "name": "weather", "input": {"day": 1}}
WRITTEN: list[tuple[str, list[Any], str]] = [
    (ONE, [CALL], "tool_use"),
    (f"Let me see. {ONE}\n{ONE}", [{"type": "text", "text": "Let me see."}, CALL, CALL], "tool_use"),
    ("It rains.", [{"type": "text", "text": "It rains."}], "end_turn"),
    ("", [], "end_turn"),
]


@pytest.mark.parametrize(("text", "blocks", "reason"), WRITTEN)
def test_calls_are_blocks(
    tool_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, text: str, blocks: list[Any], reason: str
) -> None:
    scripted(monkeypatch, text)
    body = {**HELLO, "tools": [WEATHER], "max_tokens": 300}

    async def test(client: Client) -> None:
        whole = (await client.post(PATH, body)).json
        assert said(whole) == [blocks, reason, None]
        assert said(rebuilt((await client.post(PATH, {**body, "stream": True})).named_events)) == said(whole)
        alone = {**body, "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
        one = (await client.post(PATH, alone)).json["content"]
        assert sum(block["type"] == "tool_use" for block in one) == min(1, blocks.count(CALL))

    serving(tool_model("qwen", ()), test)


def test_arguments_that_are_cut_are_told_as_they_are(
    tool_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, ONE)

    async def test(client: Client) -> None:
        told = set()
        for limit in range(1, 100):
            body = {**HELLO, "tools": [WEATHER], "max_tokens": limit}
            whole = (await client.post(PATH, body)).json
            assert said(rebuilt((await client.post(PATH, {**body, "stream": True})).named_events)) == said(whole)
            for block in whole["content"]:
                assert block["type"] == "tool_use" or whole["stop_reason"] == "max_tokens"
                if block["type"] == "tool_use" and block["input"] != CALL["input"]:
                    assert '{"day": 1}'.startswith(block["input"]["INVALID_JSON"])
                    assert whole["stop_reason"] == "max_tokens"
                    told.add(block["input"]["INVALID_JSON"])
            if whole["stop_reason"] == "tool_use":
                break
        assert told and whole["stop_reason"] == "tool_use"

    serving(tool_model("qwen", ()), test)


def test_calls_and_their_results_are_the_messages_of_a_chat(tool_model: Callable[..., Path]) -> None:
    """The same prompt: the template sees what it sees in a chat."""
    use = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"day": 1}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "wet", "is_error": False}
    messages = [
        *USER,
        {"role": "assistant", "content": [{"type": "text", "text": "Wait."}, use, {**use, "id": "c2"}]},
        {"role": "user", "content": [
            result, {**result, "tool_use_id": "c2", "content": [{"type": "text", "text": "dry"}]},
            {"type": "text", "text": "So?"},
        ]},
    ]  # fmt: skip
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"day": 1}'}}
    chat_messages = [
        *USER,
        {"role": "assistant", "content": "Wait.", "tool_calls": [{"id": "c1", **call}, {"id": "c2", **call}]},
        {"role": "tool", "tool_call_id": "c1", "content": "wet"},
        {"role": "tool", "tool_call_id": "c2", "content": "dry"},
        {"role": "user", "content": "So?"},
    ]
    tool = {"type": "function", "function": {**{k: WEATHER[k] for k in ("name", "description")}, "parameters": DAY}}

    async def test(client: Client) -> None:
        answer = (await client.post(PATH, {**HELLO, "messages": messages, "tools": [WEATHER]})).json
        chat = (await client.post(CHAT, {**HELLO, "messages": chat_messages, "tools": [tool]})).json
        assert answer["content"][0]["text"] == chat["choices"][0]["message"]["content"]
        counted = await client.post(f"{PATH}/count_tokens", {"messages": messages, "tools": [WEATHER]})
        assert counted.json["input_tokens"] == chat["usage"]["prompt_tokens"]

    serving(tool_model("qwen", ()), test)


@needs_guide
def test_forced_calls_and_formats_are_held_to_their_schemas(chat_model: Path) -> None:
    body = {**HELLO, "max_tokens": 100, "temperature": 1}

    async def test(client: Client) -> None:
        for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
            whole = (await client.post(PATH, {**body, "tools": [WEATHER], "tool_choice": choice})).json
            assert whole["stop_reason"] == "tool_use" and whole["content"][0]["input"]["day"] in (1, 2)
            again = await client.post(PATH, {**body, "tools": [WEATHER], "tool_choice": choice, "stream": True})
            assert said(rebuilt(again.named_events)) == said(whole)
        formatted = {**body, "output_config": {"format": {"type": "json_schema", "schema": DAY}}}
        assert json.loads((await client.post(PATH, formatted)).json["content"][0]["text"])["day"] in (1, 2)
        for fields, param in (
            (
                {"tools": [WEATHER, {"name": "b", "input_schema": BAD}], "tool_choice": {"type": "any"}},
                "tools[1].input_schema",
            ),
            ({"output_config": {"format": {"type": "json_schema", "schema": BAD}}}, "output_config.format.schema"),
        ):
            answer = await client.post(PATH, {**body, **fields})
            assert (answer.status, error_of(answer)["param"]) == (400, param), answer.body

    serving(chat_model, test)


# -------------------------------------------------------------------- errors

USE = {"type": "tool_use", "id": "c1", "name": "f", "input": {}}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": []}]}, "messages"),
    ({"messages": [5]}, "messages[0]"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [USE]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "assistant", "content": [{**USE, "input": "{}"}]}]}, "messages[0].content[0].input"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
        "messages[0].content[0].tool_use_id",
    ),
    ({"system": 5}, "system"),
    ({"system": [{"type": "image"}]}, "system[0].type"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"n": 2}, "n"),
    ({"stop": ["x"]}, "stop"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking.type"),
    ({"thinking": {"type": "adaptive", "budget_tokens": 2000}}, "thinking.budget_tokens"),
    ({"thinking": {}}, "thinking.type"),
    ({"output_config": {"effort": "high"}}, "output_config.effort"),  # this model's template knows no effort
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [{"name": "f g", "input_schema": {}}]}, "tools[0].name"),
    ({"tools": [WEATHER]}, "tool_choice"),  # this model's template does not show them
    ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
    ({"tools": [WEATHER], "tool_choice": {"type": "none", "name": "g"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
    ({"nonsense": 1}, "nonsense"),
]
TAKEN: dict[str, Any] = {
    "service_tier": "auto", "thinking": {"type": "adaptive"}, "tools": [], "tool_choice": {"type": "none"},
    "cache_control": {"type": "ephemeral"}, "context_management": {"edits": []}, "output_config": {}, "metadata": {},
    "temperature": 0.5, "top_k": 5, "top_p": 0.9, "stop_sequences": [], "model": "tiny", "stream": False,
}  # fmt: skip


def test_what_is_wrong_is_refused_by_its_name(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        for fields, param in WRONG:
            answer = await client.post(PATH, {**HELLO, **fields})
            assert (answer.status, error_of(answer)["param"]) == (400, param), answer.body
            assert error_of(answer)["type"] == "invalid_request_error" and error_of(answer)["message"]
        for name, value in TAKEN.items():
            answer = await client.post(PATH, {**HELLO, name: value})
            assert answer.status == 200, answer.body

    serving(chat_model, test)


def test_errors_have_anthropic_s_form(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        key = {"x-api-key": "one"}
        for path in (PATH, "/messages", f"{PATH}/count_tokens"):
            cases = [
                (await client.post(path, HELLO), 401, "authentication_error"),
                (await client.post(path, HELLO, headers={"x-api-key": "two"}), 401, "authentication_error"),
                (await client.post(path, {"messages": USER, "model": "x"}, headers=key), 404, "not_found_error"),
                (await client.post(path, b"{", headers=key), 400, "invalid_request_error"),
                (await client.post(path, b" " * 5000, headers=key), 413, "request_too_large"),
                (await client.get(path, headers=key), 405, "invalid_request_error"),
            ]
            for answer, status, kind in cases:
                assert (answer.status, error_of(answer)["type"]) == (status, kind)
            assert (await client.post(path, {"messages": USER}, headers=key)).status == 200
        assert error_of(await client.get(f"{PATH}/batches", headers=key))["type"] == "not_found_error"
        model = client.app.models.get(None)
        step = model.engine.scheduler.step

        def failing_step() -> bool:
            for job in client.app.queue.jobs():
                if len(job.requests[0].output.pieces) >= 5:  # type: ignore[attr-defined]
                    job.requests[0].error = RuntimeError("a secret of the inside")
            return step()

        model.engine.scheduler.step = failing_step  # type: ignore[method-assign]
        failed = await client.post(PATH, {**HELLO, "max_tokens": 30, "ignore_eos": True, "stream": True}, headers=key)
        *_, last = failed.named_events
        assert (last["type"], last["error"]["type"]) == ("error", "api_error") and "secret" not in failed.body.decode()

    serving(chat_model, test, api_keys=("one",), max_body_bytes=4000)


# -------------------------------------------------------------------- by the package of Anthropic


@needs_package
def test_the_tables_have_every_field_of_the_package() -> None:
    from anthropic.types import message_count_tokens_params, message_create_params

    assert set(typing.get_type_hints(message_create_params.MessageCreateParamsBase)) <= set(FIELDS)
    assert set(typing.get_type_hints(message_count_tokens_params.MessageCountTokensParams)) <= set(COUNT)


@needs_package
def test_the_anthropic_package_talks_and_calls(chat_model: Path) -> None:
    import anthropic

    options: dict[str, Any] = {"model": "mine", "max_tokens": 100, "messages": USER, "extra_body": {"seed": 3}}
    forced: dict[str, Any] = {**options, "tools": [WEATHER], "tool_choice": {"type": "any"}}
    with (
        server("-m", f"mine={chat_model}", "--log-format", "none", PYENGINE_API_KEY="secret") as (_, port),
        anthropic.Anthropic(base_url=f"http://127.0.0.1:{port}", api_key="secret") as client,
    ):
        whole = client.messages.create(**options)
        with client.messages.stream(**options) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert whole.content[0].text == text == final.content[0].text and final.stop_reason == whole.stop_reason
        assert final.usage.output_tokens == whole.usage.output_tokens
        counted = client.messages.count_tokens(model="mine", messages=USER)
        assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
        if find_spec("llguidance") is not None:
            with client.messages.stream(**forced) as stream:
                (call,) = stream.get_final_message().content
            assert call.type == "tool_use" and call.input in ({"day": 1}, {"day": 2})
            results = [{"type": "tool_result", "tool_use_id": call.id, "content": "wet"}]
            turn = [*USER, {"role": "assistant", "content": [call]}, {"role": "user", "content": results}]
            assert client.messages.create(**{**options, "messages": turn}).content
        with pytest.raises(anthropic.NotFoundError, match="there is no model"):
            client.messages.create(**{**options, "model": "other"})
        with pytest.raises(anthropic.AuthenticationError):
            client.with_options(api_key="wrong").messages.create(**options)
