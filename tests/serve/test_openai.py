"""/v1/chat/completions and /v1/completions: the engine's bytes, by the protocol's rules."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from pyengine import Engine

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Answer, Client, serving

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "seed": 3, "max_tokens": 12}


def joined(answer: Answer, index: int = 0) -> str:
    parts = [c for e in answer.events for c in e["choices"] if c["index"] == index]
    return "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in parts)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.8, "n": 3}, {"stop": ["e", "a"]}])
def test_streamed_and_whole_answers_are_the_engine_s(chat_model: Path, options: dict[str, Any]) -> None:
    with Engine(chat_model) as engine:
        wanted: Any = engine.chat(HELLO["messages"], seed=3, max_tokens=12, **options)
        wanted = wanted if isinstance(wanted, list) else [wanted]

    async def test(client: Client) -> None:
        body = {**HELLO, **options}
        whole = await client.post(CHAT, body)
        assert whole.status == 200
        choices = whole.json["choices"]
        assert [choice["message"]["content"] for choice in choices] == [one.text for one in wanted]
        assert [choice["finish_reason"] for choice in choices] == [one.finish_reason for one in wanted]
        usage = whole.json["usage"]
        assert usage["completion_tokens"] == sum(len(one.tokens) for one in wanted)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert whole.json["timings"]["predicted_n"] == len(wanted[0].tokens) and whole.json["seed"] == 3
        streamed = await client.post(CHAT, {**body, "stream": True})
        assert [joined(streamed, i) for i in range(len(wanted))] == [one.text for one in wanted]

    serving(chat_model, test)


def test_every_int64_is_a_seed_and_minus_one_draws_one(chat_model: Path) -> None:
    """Of every dialect: a negative seed is its two's complement, and the answer says which it was."""
    body = {"temperature": 1.0, "max_tokens": 12}
    with Engine(chat_model) as engine:
        wanted: Any = engine.chat(HELLO["messages"], seed=2**64 - 7, **body)

    async def test(client: Client) -> None:
        answer = (await client.post(CHAT, {**HELLO, **body, "seed": -7})).json
        assert answer["choices"][0]["message"]["content"] == wanted.text and answer["seed"] == 2**64 - 7
        options = {"temperature": 1.0, "num_predict": 12, "seed": -7}
        said = await client.post("/api/chat", {"messages": HELLO["messages"], "options": options, "stream": False})
        assert said.json["message"]["content"] == wanted.text
        drawn = [(await client.post(CHAT, {**HELLO, **body, "seed": -1})).json["seed"] for _ in range(3)]
        assert len(set(drawn)) == 3 and max(drawn) < 2**53

    serving(chat_model, test)


def test_a_stream_has_one_finish_reason_a_choice_and_usage_at_its_end(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        body = {**HELLO, "n": 2, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        answer = await client.post(CHAT, body)
        events = answer.events
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 24
        assert all(event["usage"] is None for event in events[:-1])
        assert len({event["id"] for event in events}) == 1
        for index in range(2):
            reasons = [c["finish_reason"] for e in events for c in e["choices"] if c["index"] == index]
            assert reasons[-1] == "length" and set(reasons[:-1]) == {None}
            assert next(c["delta"] for e in events for c in e["choices"] if c["index"] == index)["role"] == "assistant"
        options = {"include_usage": True, "continuous_usage_stats": True}
        *chunks, last = (await client.post(CHAT, {**body, "stream_options": options})).events
        counts = [event["usage"]["completion_tokens"] for event in chunks]
        assert counts == sorted(counts) and counts[0] == 0
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        assert chunks[-1]["usage"] == {name: last["usage"][name] for name in names}
        without = await client.post(CHAT, {**HELLO, "stream": True})
        assert all("usage" not in event for event in without.events)

    serving(chat_model, test)


def test_logprobs_of_chats_and_completions(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        whole = await client.post(CHAT, {**HELLO, "logprobs": True, "top_logprobs": 2})
        entries = whole.json["choices"][0]["logprobs"]["content"]
        assert len(entries) == whole.json["usage"]["completion_tokens"] == 12
        assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] <= 0 for entry in entries)
        assert all(bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"] for entry in entries)
        streamed = await client.post(CHAT, {**HELLO, "logprobs": True, "top_logprobs": 2, "stream": True})
        again = [x for e in streamed.events for c in e["choices"] if c["logprobs"] for x in c["logprobs"]["content"]]
        assert again == entries
        body = {"prompt": "Hello there", "max_tokens": 3, "logprobs": 1, "echo": True, "seed": 3}
        text = (await client.post("/v1/completions", body)).json["choices"][0]
        logprobs = text["logprobs"]
        assert logprobs["token_logprobs"][0] is None and len({len(values) for values in logprobs.values()}) == 1
        assert text["text"].startswith("Hello there")
        with Engine(chat_model) as engine:
            score = engine.score("Hello there")
        assert logprobs["token_logprobs"][: len(score.tokens)] == score.logprobs
        only = (await client.post("/v1/completions", {**body, "max_tokens": 0})).json
        assert only["choices"][0]["text"] == "Hello there" and only["usage"]["completion_tokens"] == 0
        assert only["choices"][0]["logprobs"]["token_logprobs"] == score.logprobs
        parts = (await client.post("/v1/completions", {**body, "stream": True})).events
        assert "".join(c["text"] for e in parts for c in e["choices"]) == text["text"]
        assert [
            x for e in parts for c in e["choices"] if c["logprobs"] for x in c["logprobs"]["token_logprobs"]
        ] == logprobs["token_logprobs"]

    serving(chat_model, test)


def test_an_event_is_one_line_for_whoever_splits_at_unicode_s_line_ends(chat_model: Path) -> None:
    ends = "a\r\n\v\f\x1c\x1d\x1e\x85\u2028\u2029b"

    async def test(client: Client) -> None:
        body = {"prompt": ends, "echo": True, "stream": True, "max_tokens": 1}
        lines = (await client.post("/v1/completions", body)).body.decode().splitlines()
        data = [line.removeprefix("data: ") for line in lines if line]
        assert json.loads(data[0])["choices"][0]["text"] == ends

    serving(chat_model, test)


def test_many_prompts_and_samples_of_completions(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        with Engine(chat_model) as engine:
            ids = engine.tokenize("dog")
            wanted: Any = engine.generate(["cat", "dog"], n=2, seed=1, temperature=1, max_tokens=6)
        for prompts in (["cat", "dog"], ["cat", ids]):
            body = {"prompt": prompts, "n": 2, "seed": 1, "temperature": 1, "max_tokens": 6}
            answer = await client.post("/v1/completions", body)
            assert [choice["text"] for choice in answer.json["choices"]] == [one.text for one in wanted]
            assert [choice["index"] for choice in answer.json["choices"]] == [0, 1, 2, 3]

    serving(chat_model, test)


def test_requests_beside_each_other_have_the_answers_that_they_have_alone(chat_model: Path) -> None:
    bodies = [
        {"messages": [{"role": "user", "content": "x" * (7 * i)}], "seed": i, "temperature": 1, "max_tokens": 5 + i}
        for i in range(12)
    ]

    async def test(client: Client) -> None:
        alone = [(await client.post(CHAT, body)).json["choices"] for body in bodies]
        together = await asyncio.gather(*(client.post(CHAT, body) for body in bodies))
        assert [answer.json["choices"] for answer in together] == alone
        streams = await asyncio.gather(*(client.post(CHAT, {**body, "stream": True}) for body in bodies))
        assert [joined(answer) for answer in streams] == [choices[0]["message"]["content"] for choices in alone]

    serving(chat_model, test)


def test_a_model_without_a_template_goes_on_with_what_is_said(tiny_model: Path) -> None:
    async def test(client: Client) -> None:
        with Engine(tiny_model) as engine:
            wanted: Any = engine.generate("Once\nupon", max_tokens=8, seed=1)
        messages = [{"role": "user", "content": "Once"}, {"role": "user", "content": "upon"}]
        answer = await client.post(CHAT, {"messages": messages, "max_tokens": 8, "seed": 1})
        assert answer.json["choices"][0]["message"]["content"] == wanted.text
        assert (await client.get("/props")).json["has_chat_template"] is False

    serving(tiny_model, test)


def test_a_last_message_goes_on(chat_model: Path) -> None:
    """The prompt ends inside the assistant's message, and the answer is what comes after it."""
    messages = [*HELLO["messages"], {"role": "assistant", "content": "Well, "}]
    with Engine(chat_model) as engine:
        ids = engine.tokenize("[user]Hello\n[assistant]Well, ")
        assert engine.chat_ids(messages, continue_final_message=True) == ids
        wanted: Any = engine.generate(ids, seed=3, max_tokens=12)
        assert engine.chat(messages, continue_final_message=True, seed=3, max_tokens=12).text == wanted.text
        pieces = engine.chat(messages, continue_final_message=True, stream=True, seed=3, max_tokens=12)
        assert "".join(piece.text for piece in pieces) == wanted.text

    async def test(client: Client) -> None:
        body = {**HELLO, "messages": messages, "continue_final_message": True}
        for more in ({}, {"add_generation_prompt": False}):
            answer = await client.post(CHAT, {**body, **more})
            assert answer.json["choices"][0]["message"]["content"] == wanted.text
            assert answer.json["usage"]["prompt_tokens"] == len(ids)
        assert joined(await client.post(CHAT, {**body, "stream": True})) == wanted.text
        tokens = await client.post("/tokenize", {"messages": messages, "continue_final_message": True})
        assert tokens.json["tokens"] == ids
        model = client.app.models.get(None).asynchronous
        assert (await model.chat(messages, continue_final_message=True, seed=3, max_tokens=12)).text == wanted.text
        parts = [
            piece.text
            async for piece in model.chat_stream(messages, continue_final_message=True, seed=3, max_tokens=12)
        ]
        assert "".join(parts) == wanted.text
        call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        wrong: list[dict[str, Any]] = [
            {"add_generation_prompt": True},
            {"messages": HELLO["messages"]},
            {"messages": [*HELLO["messages"], {"role": "assistant", "content": "a", "tool_calls": [call]}]},
        ]
        for fields in wrong:
            for path in (CHAT, "/tokenize"):
                given = {**body, **fields}
                if path == "/tokenize":
                    given = {name: value for name, value in given.items() if name not in ("seed", "max_tokens")}
                answer = await client.post(path, given)
                assert (answer.status, answer.error["param"]) == (400, "continue_final_message"), answer.body
        for name in ("continue_final_message", "n_ctx"):
            answer = await client.post(CHAT, {**body, "chat_template_kwargs": {name: True}})
            assert (answer.status, answer.error["param"]) == (400, f"chat_template_kwargs.{name}")

    serving(chat_model, test)


def test_parts_of_text_are_joined(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
        answer = await client.post(CHAT, {**HELLO, "messages": [{"role": "user", "content": parts}]})
        assert answer.json["choices"] == (await client.post(CHAT, HELLO)).json["choices"]

    serving(chat_model, test)


def test_a_silent_stream_gives_signs_of_life(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        held = asyncio.Event()
        loop = asyncio.get_running_loop()
        model = client.app.models.get(None)
        step = model.engine.scheduler.step

        def slow_step() -> bool:
            asyncio.run_coroutine_threadsafe(held.wait(), loop).result()
            return step()

        model.engine.scheduler.step = slow_step  # type: ignore[method-assign]
        call = client.begin("POST", CHAT, {**HELLO, "stream": True})
        await call.until(lambda answer: sum(write.startswith(b":") for write in answer.writes) >= 2)
        assert (await client.get("/health")).status == 200  # answers while the engine is at work
        held.set()
        await call.task
        assert joined(call.answer)

    serving(chat_model, test, comment_interval=0.01)


REFUSED_OUTPUTS: list[tuple[dict[str, Any], str]] = [
    ({"grammar": "root ::= other"}, "grammar"),
    ({"grammar": "start: other"}, "grammar"),
    ({"json_schema": {"type": "y"}}, "json_schema"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"grammar": 'root ::= "a"', "json_schema": {}}, "json_schema"),  # or the other way round: one is too many
]


def test_structured_outputs(chat_model: Path) -> None:
    pytest.importorskip("llguidance", reason="the extra guide is not installed")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    body = {**HELLO, "temperature": 1, "max_tokens": 50}

    async def test(client: Client) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
        for wanted in (
            {"response_format": form},
            {"response_format": {"type": "json_object", "schema": schema}},  # as llama.cpp's server has it
            {"structured_outputs": {"json": schema}},
            {"json_schema": schema},  # llama.cpp's, too
            {"grammar": 'root ::= "{\\"a\\": " ("1" | "2") "}"'},
        ):
            answer = await client.post(CHAT, {**body, **wanted})
            assert json.loads(answer.json["choices"][0]["message"]["content"]) in ({"a": 1}, {"a": 2})
            streamed = await client.post(CHAT, {**body, **wanted, "stream": True})
            assert joined(streamed) == answer.json["choices"][0]["message"]["content"]
        chosen = await client.post("/v1/completions", {"prompt": "a", "structured_outputs": {"choice": ["yes", "no"]}})
        assert chosen.json["choices"][0]["text"] in ("yes", "no")
        free = await client.post(CHAT, {**body, "response_format": {"type": "json_object"}})
        assert free.json["choices"][0]["message"]["content"].startswith("{")
        for fields, param in REFUSED_OUTPUTS:
            answer = await client.post(CHAT, {**body, **fields})
            assert (answer.status, answer.error["param"]) == (400, param), answer.body
            assert answer.error["message"].startswith(param)
        unasked = {"grammar": "", "json_schema": None}  # as llama.cpp's clients say it
        assert (await client.post(CHAT, {**HELLO, **unasked})).status == 200
        wrong: list[tuple[Any, str]] = [
            ({"type": "xml"}, "response_format.type"),
            ({}, "response_format.type"),
            ({"type": "json_schema"}, "response_format.json_schema"),
            ({"type": "json_schema", "schema": schema}, "response_format.schema"),
            ({"type": "json_object", "schema": 5}, "response_format.schema"),
            ({"type": "json_schema", "json_schema": {"schema": schema}}, "response_format.json_schema.name"),
            ({"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}, "response_format.json_schema.schema"),
            (
                {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "y"}}},
                "response_format.json_schema.schema",
            ),
            ({"type": "json_object", "schema": {"type": "y"}}, "response_format.schema"),
        ]
        for value, param in wrong:
            answer = await client.post(CHAT, {**body, "response_format": value})
            assert (answer.status, answer.error["param"]) == (400, param), answer.body

    serving(chat_model, test)
