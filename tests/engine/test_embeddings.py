"""Embeddings: the hidden states of the specification, the same bytes in any company."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import fixtures, frozen_reader
from reference.spec_f32 import Spec
from reference.spec_ops import rmsnorm

from pyengine import AsyncEngine, Engine
from pyengine.embeddings import Pooled, chosen_pooling, vectors
from pyengine.errors import ContextFullError, InvalidArgumentError
from pyengine.freeze import freeze
from pyengine.run import scheduler

TEXTS = [
    "Once upon a time",
    "No",
    "a",
    "Once upon a time, there was a cat. " * 8,
    "\N{GRINNING FACE} \u00e9",
    "The end.",
]
POOLINGS: Any = pytest.mark.parametrize("pooling", ["mean", "last"])


def normed(state: Any, weights: Any, eps: float) -> Any:
    """The last layer's output (n, dim), after the model's norm, in float64."""
    state = state.astype(np.float64)
    return state / np.sqrt(np.mean(state * state, axis=1, keepdims=True) + eps) * weights


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "qwen3"])
def test_vectors_are_the_specification_s_hidden_states(name: str, tmp_path: Path) -> None:
    """Bit for bit; and the float32 states of transformers are nearer to them than those of any other text."""
    fixture = fixtures.load(name)
    path = freeze(fixtures.write_hf_dir(fixture, tmp_path / "hf"), tmp_path / "model.safetensors")
    config, weights = frozen_reader.read(path)
    ids = [int(token) for token in fixture.token_ids]
    states = Spec(config, weights).hidden_states(ids)[-1]
    wanted = rmsnorm(states, weights["norm"], np.float32(config["norm_eps"]))
    prefixes = [ids[: row + 1] for row in fixture.rows]
    with Engine(path) as engine:
        last = engine.embed(prefixes, pooling="last", normalize=False)
        mean = engine.embed(prefixes, pooling="mean", normalize=False)
        unit = engine.embed(prefixes, pooling="last")
    assert last.dtype == mean.dtype == np.float32 and last.shape == (len(prefixes), config["dim"])
    assert np.array_equal(last, wanted[fixture.rows])
    sums = [np.add.reduce(wanted[: row + 1].astype(np.float64), axis=0) for row in fixture.rows]
    assert np.array_equal(mean, [(s / (row + 1)).astype(np.float32) for s, row in zip(sums, fixture.rows, strict=True)])
    theirs = normed(fixture.hidden[-1], fixtures.canonical_weights(fixture)["norm"], config["norm_eps"])
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    assert np.array_equal((theirs @ unit.T).argmax(axis=1), np.arange(len(prefixes)))


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 64}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_cls_token": True}, "last"),  # not of our ways: as if it said nothing
    ],
)
def test_a_directory_says_how_to_pool(tmp_path: Path, settings: dict[str, Any], pooling: Any) -> None:
    source = fixtures.write_hf_dir(fixtures.load("llama_tied"), tmp_path / "hf")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    with Engine(freeze(source, tmp_path / "model")) as engine:
        assert np.array_equal(engine.embed(TEXTS), engine.embed(TEXTS, pooling=pooling))
        assert not np.array_equal(engine.embed(TEXTS), engine.embed(TEXTS, pooling="mean" if pooling == "last" else "last"))


@POOLINGS
def test_a_vector_is_the_same_in_any_company(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, pooling: Any) -> None:
    with Engine(tiny_model, n_threads=1) as engine:
        alone = np.concatenate([engine.embed(text, pooling=pooling) for text in TEXTS])
        assert np.allclose(np.linalg.norm(alone, axis=1), 1, atol=2.0**-22)
    with Engine(tiny_model, n_threads=2, max_sequences=3) as engine:
        assert np.array_equal(engine.embed(TEXTS, pooling=pooling), alone)
        assert np.array_equal(engine.embed(TEXTS[::-1], pooling=pooling), alone[::-1])
        engine.generate(TEXTS[3], max_tokens=3)  # its beginning is known now
        assert np.array_equal(engine.embed(TEXTS, pooling=pooling), alone)
        monkeypatch.setattr(scheduler, "BUDGET", 7)
        stream = engine.stream(TEXTS[0], max_tokens=30, ignore_eos=True)
        next(stream)
        assert np.array_equal(engine.embed(TEXTS, pooling=pooling), alone)
        stream.close()
        ids = [engine.prompt_ids(text) for text in TEXTS]
        assert np.array_equal(engine.embed(ids, pooling=pooling), alone)
        assert np.array_equal(asyncio.run(_embed(engine, TEXTS, pooling)), alone)
        assert engine.check_integrity()["n_sequences"] == 0


async def _embed(engine: Engine, texts: Sequence[str], pooling: Any) -> Any:
    first, second = await asyncio.gather(*(AsyncEngine(engine).embed(texts, pooling=pooling) for _ in range(2)))
    assert np.array_equal(first, second)
    return first


def test_logits_and_hidden_states_of_one_step_are_not_mixed_up(tiny_model: Path) -> None:
    """A step that computes both, for different callers."""
    with Engine(tiny_model) as engine:
        score, vector = engine.score(TEXTS[3]), engine.embed(TEXTS[3], pooling="mean")

        async def both() -> Any:
            beside = AsyncEngine(engine)
            jobs = (beside.score(TEXTS[3]), beside.embed(TEXTS[3], pooling="mean"), beside.generate("a", max_tokens=9))
            return await asyncio.gather(*jobs)

        got_score, got_vector, generation = asyncio.run(both())
        assert got_score == score and np.array_equal(got_vector, vector)
        assert generation.text == engine.generate("a", max_tokens=9, seed=generation.seed).text


def test_a_row_that_comes_again_is_not_counted_twice() -> None:
    """As after an exception between taking a row and noting that it was taken."""
    pooled = Pooled([5, 6], "mean", 2)
    rows = [np.array([1, 2], np.float32), np.array([3, 6], np.float32)]
    pooled.take(0, memoryview(rows[0]))
    pooled.take(0, memoryview(rows[0]))
    pooled.take(1, memoryview(rows[1]))
    assert vectors([pooled], normalize=False).tolist() == [[2, 4]]
    assert vectors([pooled], normalize=True, dimensions=1).tolist() == [[1]]
    zeros = Pooled([5], "last", 2)
    zeros.take(0, memoryview(np.zeros(2, np.float32)))
    assert vectors([zeros], normalize=True).tolist() == [[0, 0]]


def test_a_text_ends_as_the_model_s_tokenizer_ends_it(tmp_path: Path) -> None:
    hf = Path(fixtures.write_hf_dir(fixtures.load("llama_tied"), tmp_path / "hf"))
    document = json.loads((hf / "tokenizer.json").read_text())
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    }
    (hf / "tokenizer.json").write_text(json.dumps(document))
    with Engine(freeze(hf, tmp_path / "model.safetensors"), n_ctx=8) as engine:
        ids = engine.tokenize("a cat")
        assert ids[-1] != 1 and np.array_equal(engine.embed("a cat"), engine.embed([[*ids, 1]]))
        assert not np.array_equal(engine.embed("a cat"), engine.embed([ids]))
        assert len(engine.tokenize("a cat go")) == 8
        with pytest.raises(ContextFullError):
            engine.embed("a cat go")


def test_how_a_model_pools_stands_in_its_file() -> None:
    assert chosen_pooling(None, {}) == "last"
    assert chosen_pooling(None, {"pooling": "mean"}) == "mean"
    assert chosen_pooling("last", {"pooling": "mean"}) == "last"
    for nonsense in ("max", 3, None, ["mean"]):  # what a reader does not know there, it ignores
        assert chosen_pooling(None, {"pooling": nonsense}) == "last"


def test_what_cannot_be_embedded_is_refused(tiny_model: Path) -> None:
    with Engine(tiny_model, n_ctx=32) as engine:
        wrong: list[tuple[Any, dict[str, Any], type[Exception]]] = [
            ("a", {"pooling": "max"}, InvalidArgumentError),
            ("a", {"pooling": 1}, InvalidArgumentError),
            (["a" * 100], {}, ContextFullError),
            ([], {}, InvalidArgumentError),
            ([[1, -1]], {}, InvalidArgumentError),
            (3, {}, InvalidArgumentError),
            ("a", {"cache_salt": ""}, InvalidArgumentError),
        ]
        for texts, options, error in wrong:
            with pytest.raises(error):
                engine.embed(texts, **options)
