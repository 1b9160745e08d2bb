"""/v1/rerank and its other names: the engine's scores, by the protocol's rules; input_type of /v1/embeddings."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import rerankers
from reference.fixtures import write_lora_dir
from reference.rerankers import DOCUMENTS, PROMPTS, QUERY

from pyengine import Engine
from pyengine.freeze import freeze
from pyengine.text.rerank import Reranker

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Client, serving

PATH = "/v1/rerank"
ASKED = {"query": QUERY, "documents": DOCUMENTS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reranker")
    hf = rerankers.write_model(directory / "hf")
    (hf / "config_sentence_transformers.json").write_text(json.dumps({"prompts": PROMPTS}))
    return Path(freeze(hf, directory / "model.safetensors"))


def test_every_form_has_the_engine_s_scores(model: Path) -> None:
    with Engine(model, n_threads=1) as engine:
        wanted = engine.rerank(QUERY, DOCUMENTS)
        cut = engine.rerank(QUERY, DOCUMENTS, max_tokens_per_doc=3, instruction="Find poems")
        n_tokens = sum(len(engine.reranker.ids(QUERY, one, None, n_ctx=engine.n_ctx)) for one in DOCUMENTS)
    results = [{"index": one.index, "relevance_score": one.score} for one in wanted]

    async def test(client: Client) -> None:
        first = (await client.post(PATH, {**ASKED, "model": "tiny", "user": "me", "top_n": 0})).json
        assert first["results"] == results and first["model"] == "tiny"
        assert first["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        assert first["timings"]["cache_n"] + first["timings"]["prompt_n"] == n_tokens and first["timings"]["cache_n"] > 0
        mixed = [DOCUMENTS[0], *({"text": text} for text in DOCUMENTS[1:])]
        paths = ("/rerank", "/v2/rerank", "/reranking", "/v1/reranking")
        answers = await asyncio.gather(*(client.post(path, {"query": QUERY, "documents": mixed, "top_n": 2}) for path in paths))
        assert all(answer.json["results"] == results[:2] for answer in answers)
        told = (await client.post(PATH, {**ASKED, "return_documents": True})).json["results"]
        assert [one["document"] for one in told] == [{"text": one.document} for one in wanted]
        body = {**ASKED, "max_tokens_per_doc": 3, "instruction": "Find poems", "truncate": True}
        assert [one["relevance_score"] for one in (await client.post(PATH, body)).json["results"]] == [one.score for one in cut]
        long = {"query": QUERY, "documents": ["red " * 999]}
        assert (await client.post(PATH, {**long, "truncation": True})).status == 200
        refused = (await client.post(PATH, long)).error
        assert (refused["param"], refused["code"]) == ("documents", "context_length_exceeded")
        text = (await client.get("/metrics")).body.decode()
        assert all(path in text for path in (PATH, "/v1/reranking", "/v2/rerank"))

    serving(model, test)


def test_what_is_wrong_is_refused_by_its_name(model: Path, chat_model: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"documents": ["a"]}, "query"),
        ({"query": "a"}, "documents"),
        ({"query": "a", "documents": []}, "documents"),
        ({"query": "a", "documents": "b"}, "documents"),
        ({"query": "a", "documents": ["b", 5]}, "documents[1]"),
        ({"query": "a", "documents": [{"title": "b"}]}, "documents[0].title"),
        ({"query": "a", "documents": ["b"] * 2049}, "documents"),
        ({**ASKED, "top_n": -1}, "top_n"),
        ({**ASKED, "max_tokens_per_doc": 0}, "max_tokens_per_doc"),
        ({**ASKED, "rank_fields": ["title"]}, "rank_fields"),
        ({**ASKED, "texts": ["b"]}, "texts"),
    ]

    async def test(client: Client) -> None:
        for body, param in wrong:
            answer = await client.post(PATH, body)
            assert (answer.status, answer.error["param"]) == (400, param), body

    async def unasked(client: Client) -> None:
        error = (await client.post(PATH, ASKED)).error
        assert error["param"] == "model" and "no single token for 'yes'" in error["message"]

    serving(model, test)
    serving(chat_model, unasked)


def test_long_queries_and_many_documents_hold_nobody_up(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are tokenized where others are not waiting, and not at all if that would be more than any body can hold."""
    threads, ids = [], Reranker.ids

    def noted(*args: Any, **options: Any) -> list[int]:
        threads.append(threading.current_thread().name)
        return ids(*args, **options)

    async def test(client: Client) -> None:
        monkeypatch.setattr(Reranker, "ids", noted)
        monkeypatch.setattr("pyengine.serve.work.LONG", 900)
        many = {"query": "a" * 50, "documents": ["b"] * 20}
        assert (await client.post(PATH, many)).status == 200
        assert set(threads) == {"pyengine-aside"}
        answer = await client.post(PATH, {"query": "a" * 50, "documents": ["b"] * 100})
        assert (answer.status, answer.error["param"]) == (400, "documents")
        assert "5,100 characters of 100 prompts, at most 4,000" in answer.error["message"]

    serving(model, test, max_body_bytes=4000)


def test_callers_with_other_keys_share_no_beginning(model: Path) -> None:
    async def test(client: Client) -> None:
        async def is_known(key: str, **more: Any) -> bool:
            """Whether anything of the only prompt was in the cache."""
            body = {**ASKED, "documents": DOCUMENTS[:1], **more}
            answer = (await client.post(PATH, body, headers={"authorization": f"Bearer {key}"})).json
            scores.add(answer["results"][0]["relevance_score"])
            return answer["timings"]["cache_n"] > 0

        scores: set[float] = set()
        assert [await is_known(key) for key in ("one", "one", "two", "two")] == [False, True, False, True]
        assert [await is_known("one", cache_salt="a"), await is_known("two", cache_salt="a")] == [False, False]
        assert len(scores) == 1

    serving(model, test, api_keys=("one", "two"))


def test_an_adapter_ranks_by_its_own_name(model: Path, tmp_path: Path) -> None:
    with Engine(model, n_threads=1) as engine:
        config = engine.config
        rng, tensors = np.random.default_rng(0), {}
        for layer in range(config["n_layers"]):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.v_proj"
            tensors[f"{prefix}.lora_A.weight"] = rng.standard_normal((2, config["dim"])).astype(np.float32)
            shape = (config["n_kv_heads"] * config["head_dim"], 2)
            tensors[f"{prefix}.lora_B.weight"] = rng.standard_normal(shape).astype(np.float32)
        document = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["v_proj"]}
        adapter = write_lora_dir(tmp_path / "adapter", json.dumps(document), tensors)
        engine.load_adapter(adapter, name="poems")
        ids = [engine.reranker.ids(QUERY, one, None, n_ctx=engine.n_ctx) for one in DOCUMENTS]
        wanted = {}
        for name in (None, "poems"):
            scores = {one.index: one.score for one in engine.rerank(QUERY, DOCUMENTS, adapter=name)}
            for index, tokens in enumerate(ids):
                logits = engine.logits(tokens, [len(tokens) - 1], adapter=name)[0].astype(np.float64)
                odds = logits[engine.reranker.true_id] - logits[engine.reranker.false_id]
                assert scores[index] == pytest.approx(1 / (1 + math.exp(-odds)), rel=1e-14)
            wanted[name or "tiny"] = scores
        assert wanted["tiny"] != wanted["poems"]

    async def test(client: Client) -> None:
        for _ in range(2):  # computed, then from the cache
            bodies = [{**ASKED, "model": name} for name in wanted]
            for name, answer in zip(wanted, await asyncio.gather(*(client.post(PATH, body) for body in bodies)), strict=True):
                assert answer.json["model"] == name
                assert {one["index"]: one["relevance_score"] for one in answer.json["results"]} == wanted[name]

    serving(model, test, adapters={"poems": adapter})


def test_embeddings_take_the_prompts_of_the_model(model: Path, chat_model: Path) -> None:
    with Engine(model, n_threads=1) as engine:
        query, document = (engine.embed(QUERY, prompt_name=name)[0] for name in ("query", "document"))
    path = "/v1/embeddings"

    async def test(client: Client) -> None:
        for options, wanted in (
            ({"input_type": "search_query"}, query),
            ({"input_type": "query"}, query),
            ({"prompt_name": "query"}, query),
            ({"input_type": "passage"}, document),
            ({}, document),
        ):
            vector = (await client.post(path, {"input": QUERY, **options})).json["data"][0]["embedding"]
            assert np.array_equal(np.array(vector, np.float32), wanted), options
        for options, what in (
            ({"input_type": "clustering"}, "its prompts are: query, document"),
            ({"prompt_name": "clustering"}, "its prompts are: 'query', 'document'"),
            ({"input_type": "query", "prompt_name": "query"}, "give one"),
        ):
            answer = await client.post(path, {"input": QUERY, **options})
            assert answer.status == 400 and what in answer.error["message"]

    async def without(client: Client) -> None:
        assert "none; leave it out" in (await client.post(path, {"input": "a", "input_type": "query"})).error["message"]

    serving(model, test)
    serving(chat_model, without)
