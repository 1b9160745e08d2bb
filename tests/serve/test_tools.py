"""Forced tool calls: arguments of the tool's schema, whole and streamed alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
pytest.importorskip("llguidance", reason="the extra guide is not installed")

from serve.client import Client, serving

from pyengine.serve.tools import CallReader

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


def test_calls_and_their_results_go_back_into_the_conversation(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        answer = await client.post(CHAT, {**BODY, "tool_choice": "required", "seed": 1})
        message = answer.json["choices"][0]["message"]
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"}
        messages = [*BODY["messages"], message, result]
        again = await client.post(CHAT, {**BODY, "messages": messages, "tool_choice": "none", "max_tokens": 5})
        assert again.status == 200, again.body

    serving(chat_model, test)


def test_a_call_that_is_cut_says_so(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        for cut in ({"max_tokens": 30}, {"stop": "arg"}):
            choice = (await client.post(CHAT, {**BODY, **cut, "tool_choice": "required"})).json["choices"][0]
            assert choice["finish_reason"] == ("stop" if "stop" in cut else "length"), choice

    serving(chat_model, test)


def test_what_is_wrong_with_tools_is_refused_by_its_name(chat_model: Path) -> None:
    bad_schema = [{"type": "function", "function": {"name": "f", "parameters": {"type": "no such"}}}]
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
        ({"tools": bad_schema, "tool_choice": "required"}, "structured_outputs"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ]

    async def test(client: Client) -> None:
        for fields, param in wrong:
            answer = await client.post(CHAT, {**BODY, **fields})
            assert (answer.status, answer.error["param"]) == (400, param), answer.body

    serving(chat_model, test)


def test_a_call_is_read_alike_however_it_is_cut() -> None:
    text = '{"name": "f", "arguments": {"a": "}"}}'
    for size in range(1, len(text) + 1):
        reader, said = CallReader(), []
        for begin in range(0, len(text), size):
            is_last = begin + size >= len(text)
            said += reader.push(text[begin : begin + size], is_last=is_last, is_complete=is_last)
        assert "".join(call["function"]["arguments"] for call in said) == '{"a": "}"}'
        assert said[0]["function"]["name"] == "f" and "id" in said[0]
    cut = CallReader().push(text[:-4], is_last=True, is_complete=False)
    assert cut[0]["function"]["arguments"] == text[27:-4]
