"""Adapters are routes by their own names: listed beside the model that they change, and answered for with the engine's bytes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.fixtures import write_lora_dir

from pyengine import Engine, InvalidArgumentError

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Client, serving

from pyengine.serve.models import Models, ServedModel

PROMPT = "Once upon a time"
MESSAGES = [{"role": "user", "content": "Hi"}]
OPTIONS: dict[str, Any] = {"max_tokens": 10, "temperature": 0}
GREEDY = {**OPTIONS, "ignore_eos": True}


@pytest.fixture(scope="module")
def adapter(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """q and v of every layer, rank 3."""
    with Engine(chat_model) as engine:
        config = engine.config
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(config["n_layers"]):
        for module, heads in (("q_proj", config["n_heads"]), ("v_proj", config["n_kv_heads"])):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{prefix}.lora_A.weight"] = rng.standard_normal((3, config["dim"])).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = rng.standard_normal((heads * config["head_dim"], 3)).astype(np.float32)
    document = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]}
    return write_lora_dir(tmp_path_factory.mktemp("lora") / "adapter", json.dumps(document), tensors)


def test_every_endpoint(chat_model: Path, adapter: Path) -> None:
    with Engine(chat_model) as engine:
        engine.load_adapter(adapter, name="poems")
        texts = {name: engine.generate(PROMPT, adapter=name, **GREEDY).text for name in (None, "poems")}
        chats = {name: engine.chat(MESSAGES, adapter=name, **GREEDY).text for name in (None, "poems")}
        vector = engine.embed(PROMPT, adapter="poems")[0]
        scores = engine.score(PROMPT, adapter="poems").logprobs
    assert texts[None] != texts["poems"] and chats[None] != chats["poems"]

    async def test(client: Client) -> None:
        cards = (await client.get("/v1/models")).json["data"]
        assert [(card["id"], card.get("parent")) for card in cards] == [("tiny", None), ("poems", "tiny")]
        assert (await client.get("/v1/models/poems")).json["root"] == "poems"
        for _ in range(2):  # computed, then from the cache
            calls = [("tiny", None), ("poems", "poems"), (None, None)]
            answers = await asyncio.gather(
                *(client.post("/v1/completions", {"model": route, "prompt": PROMPT, **GREEDY}) for route, _ in calls)
            )
            for answer, (route, name) in zip(answers, calls, strict=True):
                assert answer.json["model"] == (route or "tiny") and answer.json["choices"][0]["text"] == texts[name]
        body = {"model": "poems", "messages": MESSAGES, **GREEDY}
        assert (await client.post("/v1/chat/completions", body)).json["choices"][0]["message"]["content"] == chats["poems"]
        streamed = (await client.post("/v1/chat/completions", {**body, "stream": True})).events
        assert "".join(event["choices"][0]["delta"].get("content") or "" for event in streamed) == chats["poems"]
        data = (await client.post("/v1/embeddings", {"model": "poems", "input": PROMPT})).json["data"]
        assert np.array_equal(np.array(data[0]["embedding"], np.float32), vector)
        echo = {"model": "poems", "prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0}
        logprobs = (await client.post("/v1/completions", echo)).json["choices"][0]["logprobs"]["token_logprobs"]
        assert np.allclose(logprobs[1:], scores[1:], atol=1e-6)
        error = (await client.post("/v1/completions", {"model": "prose", "prompt": PROMPT})).error
        assert error["param"] == "model" and "tiny, poems" in error["message"]
        text = (await client.get("/metrics")).body.decode()
        assert 'vllm:generation_tokens_total{model_name="poems"}' in text and 'pyengine:kv_bytes{model_name="poems"}' not in text

    serving(chat_model, test, adapters={"poems": adapter})


def test_a_name_is_of_one_route(chat_model: Path, adapter: Path) -> None:
    with Engine(chat_model) as engine:
        engine.load_adapter(adapter, name="tiny")
        with pytest.raises(InvalidArgumentError, match="there is a model called 'tiny'"):
            Models([ServedModel("tiny", engine)])
