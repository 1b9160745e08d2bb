"""Beam search on the server: the engine's beams by vLLM's fields, and everything else refused by its name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyengine import Engine

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Client, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
BEAMS: dict[str, Any] = {"use_beam_search": True, "n": 3, "max_tokens": 8}
PROMPTS = ["Hello there", [5, 6, 7, 8]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length_penalty": 0.5, "ignore_eos": True},
        {"length_penalty": -1, "early_stopping": True},
        {"early_stopping": "never", "stop": ["e", "a"], "include_stop_str_in_output": True},
        {"stop_token_ids": [9, 40, 70], "skip_special_tokens": False},
    ],
)
def test_answers_are_the_engine_s_beams(chat_model: Path, options: dict[str, Any]) -> None:
    with Engine(chat_model) as engine:
        prompts: list[Any] = [engine.chat_ids(MESSAGES), *PROMPTS]
        chat, *texts = [engine.beam_search(one, beam_width=3, n=3, max_tokens=8, **options) for one in prompts]

    async def test(client: Client) -> None:
        calls = client.post(CHAT, {"messages": MESSAGES, **BEAMS, **options})
        both = client.post(TEXT, {"prompt": PROMPTS[:1], "echo": True, **BEAMS, **options})
        several = client.post(TEXT, {"prompt": PROMPTS[1:], **BEAMS, **options})
        answers = [one.json for one in await asyncio.gather(calls, both, several)]
        for answer, beams in zip(answers, (chat, *texts), strict=True):
            assert len(answer["choices"]) == len(beams) == 3 and "seed" not in answer
            for index, (choice, beam) in enumerate(zip(answer["choices"], beams, strict=True)):
                echo = "Hello there" if beams is texts[0] else ""
                assert choice.get("text", choice.get("message", {}).get("content")) == echo + beam.text
                assert (choice["index"], choice["logprobs"]) == (index, None)
                assert choice["finish_reason"] == beam.finish_reason and choice["stop_reason"] == beam.stop_reason
                assert (choice["score"], choice["cumulative_logprob"]) == (beam.score, beam.cumulative_logprob)
            n_tokens = sum(len(beam.tokens) for beam in beams)
            assert answer["usage"]["completion_tokens"] == answer["timings"]["predicted_n"] == n_tokens
        assert answers[0]["usage"]["prompt_tokens"] == len(prompts[0])

    serving(chat_model, test)


def test_several_prompts_are_several_searches(chat_model: Path) -> None:
    """Beside sampled outputs; a second time their beginnings are cached."""
    prompts = [[5 + i % 60 for i in range(n)] for n in (300, 20)]
    with Engine(chat_model) as engine:
        wanted = [beam.text for one in prompts for beam in engine.beam_search(one, beam_width=3, n=3, max_tokens=8)]

    async def test(client: Client) -> None:
        body = {"prompt": prompts, **BEAMS}
        sampled = {"prompt": "Hello", "temperature": 1.0, "n": 3, "max_tokens": 20, "seed": 1}
        before = await client.post(TEXT, sampled)
        for cached in (0, 256):
            answer, beside = await asyncio.gather(client.post(TEXT, body), client.post(TEXT, sampled))
            assert [choice["text"] for choice in answer.json["choices"]] == wanted
            assert [choice["index"] for choice in answer.json["choices"]] == list(range(6))
            usage = answer.json["usage"]
            assert usage["prompt_tokens"] == 320 and usage["prompt_tokens_details"]["cached_tokens"] >= cached
            assert beside.json["choices"] == before.json["choices"]

    serving(chat_model, test)


def test_one_beam_is_greedy_and_a_search_is_one_output_of_the_metrics(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        greedy = await client.post(TEXT, {"prompt": "Hello", "temperature": 0, "max_tokens": 9})
        beam = await client.post(TEXT, {"prompt": "Hello", "use_beam_search": True, "max_tokens": 9})
        (one,), (other,) = greedy.json["choices"], beam.json["choices"]
        assert one.items() <= other.items()
        text = client.app.metrics.text().decode()
        assert 'vllm:request_success_total{finished_reason="length",model_name="tiny"} 2.0' in text

    serving(chat_model, test)


def test_a_search_is_one_of_the_requests_that_run(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        model = client.app.models.get("tiny")
        options: dict[str, Any] = {"beam_width": 4, "n": 4, "max_tokens": 200, "ignore_eos": True}
        job = await client.app.queue.submit(model, lambda job: model.engine.beam_requests(job, "Hello", **options)[1])
        assert len(job.requests) == 4
        while (counts := client.app.queue.counts()["tiny"]) == (1, 0):
            await asyncio.sleep(0)
        assert counts in ((0, 1), (0, 0))  # the latter when it is done already
        job.close()

    serving(chat_model, test)


UNASKED: dict[str, Any] = {
    "stream": False, "temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "typical_p": 1, "repetition_penalty": 1.0,
    "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "bad_token_ids": [], "min_tokens": 0, "seed": 5,
    "bad_words": [], "no_repeat_ngram_size": 0, "top_n_sigma": -1, "dynatemp_range": 0, "xtc_probability": 0, "dry_multiplier": 0,
    "dry_base": 1.75, "xtc_threshold": 0.1, "repeat_last_n": 64,
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "stream": True, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.1,
    "repeat_penalty": 1.1, "frequency_penalty": 1, "presence_penalty": 1, "logit_bias": {"5": 1}, "allowed_token_ids": [5],
    "bad_token_ids": [5], "bad_words": "a", "no_repeat_ngram_size": 3, "top_n_sigma": 1, "dynatemp_range": 0.5,
    "xtc_probability": 0.5, "dry_multiplier": 0.8, "min_tokens": 2,
    "length_penalty": 11, "early_stopping": "always", "n": 33, "timeout": 0,
}  # fmt: skip


def test_what_beams_cannot_do_is_refused_by_name(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        own: dict[str, Any]
        for path, own in (
            (CHAT, {"messages": MESSAGES, "logprobs": True, "max_tokens": 3}),
            (TEXT, {"prompt": "Hi", "logprobs": 1, "max_tokens": 3}),
        ):
            plain = {name: value for name, value in own.items() if name != "logprobs"}
            answers = [await client.post(path, plain | {"use_beam_search": True} | more) for more in ({}, UNASKED)]
            assert answers[0].status == answers[1].status == 200
            assert answers[0].json["choices"] == answers[1].json["choices"]
            for name, value in (REFUSED | {"logprobs": own["logprobs"]}).items():
                answer = await client.post(path, plain | {"use_beam_search": True, name: value})
                assert (answer.status, answer.error["param"]) == (400, name), answer.body
            for name, value in (("length_penalty", 2.0), ("early_stopping", True)):
                answer = await client.post(path, plain | {name: value})
                assert answer.status == 400 and answer.error["param"] == name
                assert "use_beam_search" in answer.error["message"]
            assert (await client.post(path, plain | {"use_beam_search": False, "length_penalty": 1})).status == 200
        answer = await client.post(TEXT, {"prompt": "Hi", "echo": True, "max_tokens": 0, "use_beam_search": True})
        assert answer.error["param"] == "use_beam_search"
        answer = await client.post(TEXT, {"prompt": "Hi", "logprobs": 0, "use_beam_search": True})  # which is not false
        assert answer.error["param"] == "logprobs"

    serving(chat_model, test)


PERSON = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99, "minimum": 10}}, "required": ["age"]}
FUNCTION = {"type": "function", "function": {"name": "born", "parameters": PERSON | {"additionalProperties": False}}}


def test_beams_are_held_to_what_is_asked_for(
    chat_model: Path, tool_model: Callable[[str, tuple[str, ...]], Path]
) -> None:
    pytest.importorskip("llguidance", reason="the extra guide is not installed")
    schema = PERSON | {"additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    beams = {**BEAMS, "max_tokens": 60}

    async def test(client: Client) -> None:
        chat = await client.post(CHAT, {"messages": MESSAGES, "response_format": wanted, **beams})
        text = await client.post(TEXT, {"prompt": "Hi", "structured_outputs": {"json": schema}, **beams})
        said = [choice["message"]["content"] for choice in chat.json["choices"]]
        for answer in (*said, *(choice["text"] for choice in text.json["choices"])):
            assert 10 <= json.loads(answer)["age"] <= 99
        assert len(set(said)) == 3 and {choice["finish_reason"] for choice in text.json["choices"]} == {"stop"}
        plain = await client.post(CHAT, {"messages": MESSAGES, "response_format": {"type": "text"}, **beams})
        assert plain.status == 200
        refused = {"structured_outputs": {"regex": "("}, "grammar": "start: x y", "json_schema": {"type": "nothing"}}
        for name, value in refused.items():
            answer = await client.post(TEXT, {"prompt": "Hi", name: value, **beams})
            assert answer.status == 400 and answer.error["param"] == name, answer.body

    serving(chat_model, test)

    async def call(client: Client) -> None:
        body = {"messages": MESSAGES, "tools": [FUNCTION], "tool_choice": "required", "parallel_tool_calls": False}
        answer = await client.post(CHAT, {**body, **beams})
        assert len(answer.json["choices"]) == 3
        for choice in answer.json["choices"]:
            ((one,), reason) = choice["message"]["tool_calls"], choice["finish_reason"]
            assert (one["function"]["name"], reason) == ("born", "tool_calls")
            assert 10 <= json.loads(one["function"]["arguments"])["age"] <= 99

    serving(tool_model("qwen", ("<tool_call>", "</tool_call>")), call)


def test_beams_are_no_more_than_the_engine_computes_together(chat_model: Path) -> None:
    """Eight here. And prompts with all their beams are no more outputs than those of any request."""

    async def test(client: Client) -> None:
        body = {"prompt": "Hi", "use_beam_search": True, "max_tokens": 2}
        assert len((await client.post(TEXT, {**body, "n": 8})).json["choices"]) == 8
        answer = await client.post(TEXT, {**body, "n": 9})
        assert (answer.status, answer.error["param"]) == (400, "n") and "at most 8" in answer.error["message"]
        answer = await client.post(TEXT, {**body, "n": 8, "prompt": ["Hi"] * 129})
        assert (answer.status, answer.error["param"]) == (400, "prompt")

    serving(chat_model, test)


def test_the_queue_counts_the_prompt_of_a_search_once_and_until_its_first_token(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        model = client.app.models.get(None)
        engine, queue = model.engine, client.app.queue
        job = await model.asynchronous.prepare(lambda job: engine.beam_requests(job, [5] * 40, beam_width=4)[1])
        assert sum(request.waiting_tokens for request in job.requests) == 40
        engine.scheduler.add(job.requests)
        engine.scheduler.step()
        assert sum(request.waiting_tokens for request in job.requests) == 0 and not job.is_done
        job.close()
        assert queue.waiting_tokens() == 0

    serving(chat_model, test)


def test_a_search_ends_with_its_time_and_with_its_client(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        late = await client.post(TEXT, {"prompt": "Hello", "timeout": 1e-9, **BEAMS})
        (choice,) = late.json["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "length", "timeout")
        assert choice["score"] == choice["cumulative_logprob"] == 0
        call = client.begin("POST", TEXT, {"prompt": "Hello", "use_beam_search": True, "n": 8, "ignore_eos": True})
        call.hang_up()
        await call.task  # `serving` sees that nothing is left

    serving(chat_model, test)
