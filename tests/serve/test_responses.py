"""/v1/responses: the chat's bytes in the newer form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Answer, Client, serving

PATH = "/v1/responses"
HELLO: dict[str, Any] = {"input": "Hello", "instructions": "Be brief", "seed": 3, "max_output_tokens": 12}
MESSAGES = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}]


def events(answer: Answer) -> list[Any]:
    out = []
    for block in answer.body.decode().strip().split("\n\n"):
        name, data = block.split("\n")
        out.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {out[-1]['type']}"
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
        ({"store": True}, "store"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"metadata": {"a": 5}}, "metadata.a"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"nonsense": 1}, "nonsense"),
    ]

    async def test(client: Client) -> None:
        for fields, param in wrong:
            answer = await client.post(PATH, {**HELLO, **fields})
            assert (answer.status, answer.error["param"]) == (400, param), answer.body
        neutral = {"store": False, "tools": [], "truncation": "disabled", "text": {"format": {"type": "text"}}}
        assert (await client.post(PATH, {**HELLO, **neutral})).status == 200

    serving(chat_model, test)
