"""/v1/responses: the chat's bytes in the newer form."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Answer, Client, serving
from serve.scripted import scripted

needs_guide = pytest.mark.skipif(find_spec("llguidance") is None, reason="the extra guide is not installed")

PATH = "/v1/responses"
HELLO: dict[str, Any] = {"input": "Hello", "instructions": "Be brief", "seed": 3, "max_output_tokens": 12}
MESSAGES = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}]


DAY = {"type": "object", "properties": {"day": {"enum": [1, 2]}}, "required": ["day"], "additionalProperties": False}
WEATHER = {"type": "function", "name": "weather", "description": "Tomorrow", "parameters": DAY, "strict": True}
CALLED = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"day": 1}'}


def events(answer: Answer) -> list[Any]:
    out = answer.named_events
    assert [one["sequence_number"] for one in out] == list(range(len(out)))
    return out


def test_whole_and_streamed_answers_are_those_of_the_chat(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        chat = await client.post("/v1/chat/completions", {"messages": MESSAGES, "seed": 3, "max_tokens": 12})
        wanted = chat.json["choices"][0]["message"]["content"]
        whole = (await client.post(PATH, {**HELLO, "metadata": {"a": "b"}})).json
        assert whole["output"][0]["content"][0]["text"] == wanted
        assert whole["status"] == "incomplete" and whole["incomplete_details"] == {"reason": "max_output_tokens"}
        assert whole["usage"]["output_tokens"] == 12 and whole["metadata"] == {"a": "b"}
        items = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}]
        assert (await client.post(PATH, {**HELLO, "input": items})).json["output"][0]["content"][0]["text"] == wanted
        streamed = events(await client.post(PATH, {**HELLO, "stream": True}))
        assert "".join(one["delta"] for one in streamed if one["type"] == "response.output_text.delta") == wanted
        kinds = [one["type"] for one in streamed if one["type"] != "response.output_text.delta"]
        assert kinds == [
            "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
            "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
        ]  # fmt: skip
        assert streamed[-1]["response"]["output"][0]["content"] == whole["output"][0]["content"]
        counted = (await client.post(f"{PATH}/input_tokens", HELLO)).json
        assert counted == {"object": "response.input_tokens", "input_tokens": whole["usage"]["input_tokens"]}
        again = [*items, whole["output"][0], *items]  # an answer goes back as it came
        assert (await client.post(PATH, {**HELLO, "input": again})).status == 200

    serving(chat_model, test)


def test_what_is_wrong_is_refused_by_its_name(chat_model: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": 1}, "store"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
        ({"input": [{"type": "item_reference"}]}, "input[0].id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].function"),
        ({"tools": [WEATHER]}, "tool_choice"),  # this model's template does not show them
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.mode"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
            "tool_choice.tools",
        ),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "required",
                    "tools": [{"type": "function", "name": "f"}],
                },
            },
            "tool_choice.tools[0].name",
        ),
        (
            {"tools": [WEATHER], "tool_choice": "required", "structured_outputs": {"json_object": True}},
            "tool_choice",
        ),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{**CALLED, "arguments": "{"}]}, "input[0].arguments"),
        ({"input": [CALLED, {"type": "function_call_output", "call_id": "c1", "output": 5}]}, "input[1].output"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"type": 5}]}, "input[0].type"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"metadata": {"a": 5}}, "metadata.a"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"grammar": 5}, "grammar"),
        ({"nonsense": 1}, "nonsense"),
    ]

    async def test(client: Client) -> None:
        for fields, param in wrong:
            answer = await client.post(PATH, {**HELLO, **fields})
            assert (answer.status, answer.error["param"]) == (400, param), answer.body
        neutral = {"store": False, "tools": [], "truncation": "disabled", "text": {"format": {"type": "text"}}}
        assert (await client.post(PATH, {**HELLO, **neutral})).status == 200

    serving(chat_model, test)


# -------------------------------------------------------------------- tools


def rebuilt(streamed: list[Any]) -> list[Any]:
    """The output as its events build it; checks that each stands where the protocol wants it."""
    items: list[Any] = []
    is_open = False
    for one in streamed:
        kind = one["type"].removeprefix("response.")
        if kind in ("created", "in_progress", "completed", "incomplete"):
            assert not is_open
            continue
        if kind == "output_item.added":
            assert not is_open and one["output_index"] == len(items)
            items.append(one["item"])
            assert one["item"]["status"] == "in_progress"
            is_open = True
            continue
        item = items[-1]
        assert is_open and one["output_index"] == len(items) - 1
        if kind == "output_item.done":
            assert one["item"]["id"] == item["id"]
            if item["type"] == "message":
                assert one["item"]["content"] == item["content"]
            else:
                assert one["item"] == {**item, "status": one["item"]["status"]}
            items[-1], is_open = one["item"], False
            continue
        assert one["item_id"] == item["id"]
        if kind == "content_part.added":
            item["content"].append(one["part"])
        elif kind == "output_text.delta":
            item["content"][one["content_index"]]["text"] += one["delta"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += one["delta"]
        elif kind == "function_call_arguments.done":
            assert (one["arguments"], one["name"]) == (item["arguments"], item["name"])
        elif kind == "content_part.done":
            assert one["part"] == item["content"][0]
        else:
            assert kind == "output_text.done" and one["text"] == item["content"][0]["text"]
    assert not is_open
    return items


def said(items: list[Any]) -> list[Any]:
    """Items without their ids: the text of a message, the name and the arguments of a call, and the status."""
    assert len({item["id"] for item in items}) == len(items)
    return [
        (item["content"][0]["text"] if item["type"] == "message" else (item["name"], item["arguments"]), item["status"])
        for item in items
    ]


ONE = '<tool_call>\n{"name": "weather", "arguments": {"day": 1}}\n</tool_call>'
CALL_1, DONE = (("weather", '{"day": 1}'), "completed"), "completed"
# what the model writes, what its answer is
WRITTEN: list[tuple[str, list[Any]]] = [
    (ONE, [CALL_1]),
    (f"Let me see. {ONE}\n{ONE}", [("Let me see.", DONE), CALL_1, CALL_1]),
    (f"{ONE} And: {ONE} So.", [CALL_1, (" And:", DONE), CALL_1, (" So.", DONE)]),
    ("It rains.", [("It rains.", DONE)]),
    ("", [("", DONE)]),
    (ONE.replace("1}}", "1, b"), [(("weather", '{"day": 1, '), "incomplete"), ("b\n</tool_call>", DONE)]),
]


@pytest.mark.parametrize(("text", "wanted"), WRITTEN)
def test_calls_are_items_of_the_output(
    tool_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, text: str, wanted: list[Any]
) -> None:
    scripted(monkeypatch, text)
    body = {**HELLO, "tools": [WEATHER], "max_output_tokens": 300}

    async def test(client: Client) -> None:
        whole = (await client.post(PATH, body)).json
        assert said(whole["output"]) == wanted and whole["status"] == "completed"
        assert (whole["tools"], whole["tool_choice"], whole["parallel_tool_calls"]) == ([WEATHER], "auto", True)
        streamed = events(await client.post(PATH, {**body, "stream": True}))
        built = rebuilt(streamed)
        assert said(built) == wanted and built == streamed[-1]["response"]["output"]
        n_calls = sum(item["type"] == "function_call" for item in whole["output"])
        if n_calls > 1:
            one = (await client.post(PATH, {**body, "parallel_tool_calls": False})).json
            assert sum(item["type"] == "function_call" for item in one["output"]) == 1
        half = whole["usage"]["output_tokens"] // 2
        if half:
            cut = (await client.post(PATH, {**body, "max_output_tokens": half})).json
            last = cut["output"][-1]
            assert cut["status"] == "incomplete"
            assert last["status"] == "incomplete" or last.get("arguments") == '{"day": 1}'

    serving(tool_model("qwen", ()), test)


def test_a_whole_call_of_an_answer_that_is_cut_is_complete(
    tool_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, ONE)
    body = {**HELLO, "tools": [WEATHER]}

    async def test(client: Client) -> None:
        whole = (await client.post(PATH, {**body, "max_output_tokens": 300})).json
        n_tokens, told = whole["usage"]["output_tokens"], set()
        for limit in range(1, n_tokens):
            cut = (await client.post(PATH, {**body, "max_output_tokens": limit})).json
            streamed = events(await client.post(PATH, {**body, "max_output_tokens": limit, "stream": True}))
            assert cut["status"] == "incomplete" and said(rebuilt(streamed)) == said(cut["output"])
            for item in cut["output"]:
                if item["type"] == "function_call":
                    is_whole = item["arguments"] == '{"day": 1}'
                    assert item["status"] == ("completed" if is_whole else "incomplete")
                    told.add(is_whole)
        assert told == {True, False}

    serving(tool_model("qwen", ()), test)


def test_calls_and_their_results_are_the_messages_of_a_chat(
    tool_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same prompt: the template sees what it sees in a chat."""
    result = {"type": "function_call_output", "call_id": "c1", "output": "wet"}
    second = {**CALLED, "call_id": "c2", "id": "fc_2", "status": "completed"}
    items = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Wait."}, CALLED, second,
        result, {**result, "call_id": "c2", "output": [{"type": "input_text", "text": "dry"}]},
        {**CALLED, "call_id": "c3"}, {**result, "call_id": "c3"},
    ]  # fmt: skip
    function = {"name": "weather", "arguments": '{"day": 1}'}
    call = {"type": "function", "function": function}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Wait.", "tool_calls": [{"id": "c1", **call}, {"id": "c2", **call}]},
        {"role": "tool", "tool_call_id": "c1", "content": "wet"},
        {"role": "tool", "tool_call_id": "c2", "content": "dry"},
        {"role": "assistant", "tool_calls": [{"id": "c3", **call}]},
        {"role": "tool", "tool_call_id": "c3", "content": "wet"},
    ]

    async def test(client: Client) -> None:
        answer = await client.post(PATH, {"input": items, "max_output_tokens": 8, "seed": 1})
        chat = await client.post("/v1/chat/completions", {"messages": messages, "max_tokens": 8, "seed": 1})
        assert (answer.status, chat.status) == (200, 200), answer.body + chat.body
        assert answer.json["output"][0]["content"][0]["text"] == chat.json["choices"][0]["message"]["content"]
        assert answer.json["usage"]["input_tokens"] == chat.json["usage"]["prompt_tokens"]

    serving(tool_model("qwen", ()), test)


BAD = {"type": "object", "properties": {"a": {"type": "y"}}}


@needs_guide
def test_a_schema_that_is_not_understood_is_refused_by_its_place(tool_model: Callable[..., Path]) -> None:
    """Whether it is held to alone, or with others in one grammar."""
    other = {"type": "function", "name": "other", "parameters": BAD}
    right = {"type": "json_schema", "name": "x", "schema": DAY}
    flat: list[tuple[dict[str, Any], str]] = [
        ({"tools": [WEATHER, other], "tool_choice": "required"}, "tools[1].parameters"),
        ({"tools": [other, WEATHER], "tool_choice": {"type": "function", "name": "other"}}, "tools[0].parameters"),
        ({"tools": [WEATHER, other], "text": {"format": right}}, "tools[1].parameters"),
        ({"tools": [WEATHER], "text": {"format": {**right, "schema": BAD}}}, "text.format.schema"),
        ({"text": {"format": {**right, "schema": BAD}}}, "text.format.schema"),
    ]
    nested = [
        {"type": "function", "function": {key: tool[key] for key in ("name", "parameters")}}
        for tool in (WEATHER, other)
    ]
    messages = [{"role": "user", "content": "Hi"}]

    async def test(client: Client) -> None:
        for fields, param in flat:
            answer = await client.post(PATH, {**HELLO, **fields})
            assert (answer.status, answer.error["param"]) == (400, param), answer.body
            assert answer.error["message"].startswith(f"{param}: ")
        answer = await client.post(
            "/v1/chat/completions", {"messages": messages, "tools": nested, "tool_choice": "required"}
        )
        assert (answer.status, answer.error["param"]) == (400, "tools[1].function.parameters"), answer.body
        unforced = {**HELLO, "tools": [WEATHER, other]}  # arguments of calls that the model likes are held to no schema
        assert (await client.post(PATH, unforced)).status == 200

    serving(tool_model("qwen", ()), test)


@needs_guide
@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}], ids=["required", "named"])
def test_a_forced_call_is_the_output_and_goes_back_with_its_result(chat_model: Path, choice: Any) -> None:
    body = {**HELLO, "max_output_tokens": 100, "temperature": 1, "tools": [WEATHER], "tool_choice": choice}

    async def test(client: Client) -> None:
        whole = (await client.post(PATH, body)).json
        (call,) = whole["output"]
        assert json.loads(call["arguments"])["day"] in (1, 2) and whole["tool_choice"] == choice
        streamed = events(await client.post(PATH, {**body, "stream": True}))
        assert said(rebuilt(streamed)) == said([call])
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "wet"}
        again = {**body, "input": [{"role": "user", "content": "Hi"}, call, result], "tool_choice": "none"}
        assert (await client.post(PATH, again)).json["output"][0]["type"] == "message"

    serving(chat_model, test)
