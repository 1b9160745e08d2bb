"""Tool calls: forced ones, whose arguments are of the tool's schema, and those that the model makes; whole and streamed alike."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Client, serving
from serve.scripted import scripted

from pyengine.serve import work
from pyengine.serve.calls import CallReader

needs_guide = pytest.mark.skipif(find_spec("llguidance") is None, reason="the extra guide is not installed")

CHAT = "/v1/chat/completions"
DAY = {"type": "object", "properties": {"day": {"enum": [1, 2, 3]}}, "required": ["day"], "additionalProperties": False}
NOTE = {"type": "object", "properties": {"note": {"type": "string", "maxLength": 5}}, "required": ["note"]}
NOTE["additionalProperties"] = False
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tomorrow", "parameters": DAY}},
    {"type": "function", "function": {"name": "write", "parameters": NOTE, "strict": True}},
]
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, "temperature": 1, "max_tokens": 200,
}  # fmt: skip
NAMED = {"type": "function", "function": {"name": "weather"}}


@needs_guide
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("seed", range(4))
def test_a_forced_call_is_of_the_schema_and_streams_the_same(chat_model: Path, choice: Any, seed: int) -> None:
    async def test(client: Client) -> None:
        body = {**BODY, "tool_choice": choice, "seed": seed, "n": 2}
        choices = (await client.post(CHAT, body)).json["choices"]
        streamed = (await client.post(CHAT, {**body, "stream": True})).events
        for index, one in enumerate(choices):
            assert one["finish_reason"] == "tool_calls" and one["message"]["content"] is None
            (call,) = one["message"]["tool_calls"]
            arguments = json.loads(call["function"]["arguments"])
            if call["function"]["name"] == "weather":
                assert arguments["day"] in (1, 2, 3)
            else:
                assert choice == "required" and len(arguments["note"]) <= 5
            parts = [c for e in streamed for c in e["choices"] if c["index"] == index]
            deltas = [d for c in parts for d in c["delta"].get("tool_calls", [])]
            assert all(delta["index"] == 0 for delta in deltas)
            assert [d["function"]["name"] for d in deltas if "name" in d["function"]] == [call["function"]["name"]]
            assert "".join(d["function"]["arguments"] for d in deltas) == call["function"]["arguments"]
            assert parts[-1]["finish_reason"] == "tool_calls"
            assert not any(c["delta"].get("content") for c in parts)

    serving(chat_model, test)


@needs_guide
def test_calls_and_their_results_go_back_into_the_conversation(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        answer = await client.post(CHAT, {**BODY, "tool_choice": "required", "seed": 1})
        message = answer.json["choices"][0]["message"]
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"}
        messages = [*BODY["messages"], message, result]
        again = await client.post(CHAT, {**BODY, "messages": messages, "tool_choice": "none", "max_tokens": 5})
        assert again.status == 200, again.body

    serving(chat_model, test)


@needs_guide
def test_a_call_that_is_cut_says_so(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        for cut in ({"max_tokens": 30}, {"stop": "arg"}):
            choice = (await client.post(CHAT, {**BODY, **cut, "tool_choice": "required"})).json["choices"][0]
            assert choice["finish_reason"] == ("stop" if "stop" in cut else "length"), choice

    serving(chat_model, test)


def test_what_is_wrong_with_tools_is_refused_by_its_name(chat_model: Path) -> None:
    bad_type = [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tool_choice": "auto"}, "tool_choice"),
        ({}, "tool_choice"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice.function.name"),
        ({"tools": [5], "tool_choice": "required"}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 5}}]}, "tools[0].function.parameters"),
        ({"tools": [TOOLS[0], TOOLS[0]], "tool_choice": "required"}, "tools"),
        ({"tools": bad_type}, "tools[0].function.parameters.type"),
        ({"tool_choice": "required", "structured_outputs": {"json_object": True}}, "tool_choice"),
    ]

    async def test(client: Client) -> None:
        for fields, param in wrong:
            answer = await client.post(CHAT, {**BODY, **fields})
            assert (answer.status, answer.error["param"]) == (400, param), answer.body

    serving(chat_model, test)


@needs_guide
def test_a_schema_that_is_none_is_refused(chat_model: Path) -> None:
    bad = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "no such"}}}}}]

    async def test(client: Client) -> None:
        answer = await client.post(CHAT, {**BODY, "tools": bad, "tool_choice": "required"})
        assert (answer.status, answer.error["param"]) == (400, "tools[0].function.parameters"), answer.body

    serving(chat_model, test)


# -------------------------------------------------------------------- calls that the model makes

DAY_1 = '{"name": "weather", "arguments": {"day": 1}}'
LLAMA_1 = DAY_1.replace("arguments", "parameters")
NAMED_1 = '[TOOL_CALLS]weather[ARGS]{"day": 1}'
CODER_1 = "<tool_call>\n<function=weather>\n<parameter=day>\n1\n</parameter>\n</function>\n</tool_call>"
HERMES_TEXT = f"Let me see.\n<tool_call>\n{DAY_1}\n</tool_call>\n<tool_call>\n{DAY_1.replace('1', '2')}\n</tool_call>"
# template, special tokens, what the model writes, its content, days that are asked for
AUTO = [
    pytest.param("qwen", (), HERMES_TEXT, "Let me see.", [1, 2], id="hermes"),
    pytest.param("mistral", ("[TOOL_CALLS]",), f"[TOOL_CALLS] [{DAY_1}]", None, [1], id="mistral"),
    pytest.param("llama", ("<|python_tag|>",), "<|python_tag|>" + LLAMA_1, None, [1], id="llama"),
    pytest.param("llama", (), LLAMA_1, None, [1], id="llama_bare"),
    pytest.param(
        "mistral_named", ("[TOOL_CALLS]", "[ARGS]"), NAMED_1 + NAMED_1.replace("1", "2"), None, [1, 2], id="mistral_named"
    ),
    pytest.param("qwen_coder", (), f"Let me see.\n\n{CODER_1}\n{CODER_1}", "Let me see.", [1, 1], id="qwen_coder"),
    pytest.param("qwen", (), "It rains. <tool_call>no</tool_call>", "It rains. <tool_call>no</tool_call>", [], id="none"),
    pytest.param("mistral", ("[TOOL_CALLS]",), "[TOOL_CALLS]no", "[TOOL_CALLS]no", [], id="none_special"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "special", "text", "content", "days"), AUTO)
def test_the_model_s_own_calls(
    tool_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, template: str, special: tuple[str, ...],
    text: str, content: str | None, days: list[int],
) -> None:  # fmt: skip
    scripted(monkeypatch, text)

    async def test(client: Client) -> None:
        for more in ({}, {"tool_choice": "auto", "n": 2, "skip_special_tokens": False}):
            body = {**BODY, **more, "max_tokens": 400}
            whole = await client.post(CHAT, body)
            assert whole.status == 200, whole.body
            streamed = (await client.post(CHAT, {**body, "stream": True})).events
            for choice in whole.json["choices"]:
                message, calls = choice["message"], choice["message"].get("tool_calls", [])
                assert message["content"] == content
                assert choice["finish_reason"] == ("tool_calls" if days else "stop")
                assert [json.loads(call["function"]["arguments"])["day"] for call in calls] == days
                parts = [c for e in streamed for c in e["choices"] if c["index"] == choice["index"]]
                assert "".join(c["delta"].get("content") or "" for c in parts) == (content or "")
                assert parts[-1]["finish_reason"] == choice["finish_reason"]
                arguments = [""] * len(days)
                for part in (part for c in parts for part in c["delta"].get("tool_calls", [])):
                    arguments[part["index"]] += part["function"]["arguments"]
                assert arguments == [call["function"]["arguments"] for call in calls]

    serving(tool_model(template, special), test)


def test_a_long_answer_is_read_in_a_thread(tool_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other request waits for what the event loop does."""
    threads = []

    def read(self: CallReader, text: str) -> Any:
        threads.append(threading.get_ident())
        return push(self, text)

    push = CallReader.push
    monkeypatch.setattr(CallReader, "push", read)
    scripted(monkeypatch, "<tool_call>" + "no call " * 400)

    async def test(client: Client) -> None:
        for path, fields in (
            (CHAT, BODY),
            ("/v1/responses", {"input": "Hi", "tools": [{"type": "function", "name": "f"}]}),
        ):
            for limit in (work.LONG, work.LONG + 1):
                name = "max_tokens" if path == CHAT else "max_output_tokens"
                assert (await client.post(path, {**fields, name: limit})).status == 200
        assert [thread == threading.get_ident() for thread in threads] == [True, False] * 2

    serving(tool_model("qwen", ()), test)


# template, what the model writes: two calls; the arguments of the first as far as before "day"
BACK = [("qwen", HERMES_TEXT, '{"'), ("mistral_named", NAMED_1 * 2, '{"'), ("qwen_coder", CODER_1 * 2, "{")]


@pytest.mark.parametrize(("template", "text", "begun"), BACK)
def test_calls_go_back_into_a_template_that_shows_them(
    tool_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, template: str, text: str, begun: str
) -> None:
    scripted(monkeypatch, text)

    async def test(client: Client) -> None:
        message = (await client.post(CHAT, {**BODY, "max_tokens": 400})).json["choices"][0]["message"]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "wet"} for call in message["tool_calls"]]
        answer = await client.post(CHAT, {**BODY, "messages": [*BODY["messages"], message, *results]})
        assert answer.status == 200, answer.body
        one = (await client.post(CHAT, {**BODY, "max_tokens": 400, "parallel_tool_calls": False})).json["choices"][0]
        assert len(one["message"]["tool_calls"]) == 1 and one["finish_reason"] == "tool_calls"
        cut = (await client.post(CHAT, {**BODY, "max_tokens": 400, "stop": "day"})).json["choices"][0]
        assert cut["finish_reason"] == "stop"
        assert cut["message"]["tool_calls"][0]["function"]["arguments"] == begun

    serving(tool_model(template, ()), test)


@needs_guide
@pytest.mark.parametrize("template", ["mistral_named", "qwen_coder"])
def test_a_call_is_forced_whatever_the_format(tool_model: Callable[..., Path], template: str) -> None:
    async def test(client: Client) -> None:
        answer = await client.post(CHAT, {**BODY, "tool_choice": NAMED, "seed": 1})
        (call,) = answer.json["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"])["day"] in (1, 2, 3)

    serving(tool_model(template, ()), test)


@pytest.mark.parametrize("template", ["without_tools", "xml"])
def test_a_model_whose_calls_cannot_be_read_is_not_left_the_choice(
    tool_model: Callable[..., Path], template: str
) -> None:
    async def test(client: Client) -> None:
        for choice in ({}, {"tool_choice": "auto"}):
            answer = await client.post(CHAT, {**BODY, **choice})
            assert (answer.status, answer.error["param"]) == (400, "tool_choice"), answer.body
        assert (await client.post(CHAT, {**BODY, "tool_choice": "none"})).status == 200

    serving(tool_model(template, ()), test)
