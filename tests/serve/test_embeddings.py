"""/v1/embeddings: the engine's vectors, by the protocol's rules."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyengine import Engine

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Client, serving

PATH = "/v1/embeddings"
TEXTS = ["Once upon a time", "there was a cat", "a"]


def test_vectors_are_the_engine_s_in_every_form(chat_model: Path) -> None:
    with Engine(chat_model) as engine:
        wanted = {pooling: engine.embed(TEXTS, pooling=pooling) for pooling in (None, "mean", "last")}
        raw = engine.embed(TEXTS, pooling="mean", normalize=False).astype(np.float64)[:, :8]
        ids = [engine.prompt_ids(text) for text in TEXTS]

    async def test(client: Client) -> None:
        for pooling, vectors in wanted.items():
            answer = await client.post(PATH, {"input": TEXTS, "pooling": pooling, "model": "tiny", "user": "me"})
            assert answer.status == 200 and answer.json["object"] == "list" and answer.json["model"] == "tiny"
            data = answer.json["data"]
            assert [(one["object"], one["index"]) for one in data] == [("embedding", i) for i in range(3)]
            assert np.array_equal(np.array([one["embedding"] for one in data], np.float32), vectors)
            n = sum(map(len, ids))
            assert answer.json["usage"] == {"prompt_tokens": n, "total_tokens": n}
            assert list(answer.json["timings"].items())[:2] == [("cache_n", 0), ("prompt_n", n)]
        for one_input, rows in (
            (TEXTS[0], slice(1)),
            (ids[1], slice(1, 2)),
            (ids, slice(3)),
            ([TEXTS[0], ids[1]], slice(2)),
        ):
            data = (await client.post(PATH, {"input": one_input, "encoding_format": "base64"})).json["data"]
            got = np.stack([np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in data])
            assert np.array_equal(got, wanted[None][rows])
        short = (await client.post(PATH, {"input": TEXTS, "pooling": "mean", "dimensions": 8})).json["data"]
        unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
        # two roundings to float32 here, one there
        assert np.allclose([one["embedding"] for one in short], unit, rtol=2.0**-22, atol=0)

    serving(chat_model, test)


def test_metrics_count_the_tokens_that_usage_has(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        ids = [5 + i % 40 for i in range(300)]
        await client.post("/v1/completions", {"prompt": ids[:290], "max_tokens": 1})
        answers = [await client.post(PATH, {"input": one}) for one in (TEXTS, ids)]
        theirs = await client.post("/api/embed", {"model": "tiny", "input": TEXTS[0]})
        usages = [answer.json["usage"]["prompt_tokens"] for answer in answers]
        n_tokens = 290 + sum(usages) + theirs.json["prompt_eval_count"]
        text = (await client.get("/metrics")).body.decode()
        for line in (
            f'vllm:prompt_tokens_total{{model_name="tiny"}} {n_tokens}.0',
            f'vllm:prefix_cache_queries_total{{model_name="tiny"}} {n_tokens}.0',
            'vllm:prefix_cache_hits_total{model_name="tiny"} 290.0',
            'vllm:generation_tokens_total{model_name="tiny"} 1.0',
        ):
            assert line in text, line

    serving(chat_model, test)


def test_timings_tell_what_was_computed_and_what_the_cache_knew(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        ids = [5 + i % 40 for i in range(300)]
        alone = (await client.post(PATH, {"input": ids})).json["timings"]
        await client.post("/v1/completions", {"prompt": ids[:290], "max_tokens": 1})
        again = (await client.post(PATH, {"input": [ids, ids[:4]]})).json["timings"]
        assert (alone["cache_n"], alone["prompt_n"]) == (0, 300)
        assert (again["cache_n"], again["prompt_n"]) == (290, 14)
        for one in (alone, again):
            assert one["prompt_ms"] > 0 and not {name for name in one if name.startswith("predicted")}
            assert one["prompt_per_token_ms"] == pytest.approx(one["prompt_ms"] / one["prompt_n"], abs=1e-3)  # both rounded
        vectors = (await client.post("/api/embed", {"input": "a"})).json
        assert vectors["total_duration"] > 0 and vectors["load_duration"] == 0

    serving(chat_model, test)


def test_many_requests_beside_a_chat_have_the_vectors_that_they_have_alone(chat_model: Path) -> None:
    with Engine(chat_model) as engine:
        wanted = engine.embed(TEXTS)

    async def test(client: Client) -> None:
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 40, "ignore_eos": True}
        calls = [client.post(PATH, {"input": text}) for text in TEXTS * 4]
        answers = await asyncio.gather(client.post("/v1/chat/completions", chat), *calls)
        for answer, vector in zip(answers[1:], [*wanted] * 4, strict=True):
            assert np.array_equal(np.array(answer.json["data"][0]["embedding"], np.float32), vector)

    serving(chat_model, test)


def test_what_is_wrong_is_refused_by_its_name(chat_model: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [[1, "a"]]}, "input[0][1]"),
        ({"input": ["a", 5]}, "input[1]"),
        ({"input": [[10**9]]}, "input[0][0]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 10**6}, "dimensions"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "stream": True}, "stream"),
    ]

    async def test(client: Client) -> None:
        for body, param in wrong:
            answer = await client.post(PATH, body)
            assert (answer.status, answer.error["param"]) == (400, param), answer.body
        answer = await client.post(PATH, {"input": ["a", "word " * 1000]})
        assert (answer.error["param"], answer.error["code"]) == ("input", "context_length_exceeded")

    serving(chat_model, test)
