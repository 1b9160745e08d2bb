"""A draft model changes no byte either, whatever it guesses, and it never costs an answer."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine.speculation_tools import always_guess, assert_nothing_is_held, in_company
from engine.test_speculation import PARAMETERS, PROMPT, said

import pyengine
from pyengine import Engine
from pyengine.errors import OutOfMemoryError
from pyengine.freeze import freeze
from pyengine.run.draft_model import DraftModel


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without its second layer: sometimes it agrees."""
    return smaller(tmp_path_factory.mktemp("draft"))


def smaller(directory: Path, **config: Any) -> Path:
    from reference import fixtures

    whole = fixtures.load("llama_tied")
    weights = {name: weight for name, weight in whole.hf_weights.items() if ".layers.1." not in name}
    values = {**whole.hf_config, "num_hidden_layers": 1, "max_position_embeddings": 512, **config}
    part = dataclasses.replace(whole, hf_config=values, hf_weights=weights)
    freeze(fixtures.write_hf_dir(part, directory / "hf"), directory / "draft.safetensors")
    return directory / "draft.safetensors"


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Iterator[Engine]:
    with Engine(tiny_model, speculative="off") as engine:
        yield engine


def always(engine: Engine, n: int) -> DraftModel:
    """Its draft model guesses n tokens whenever it may, whatever that costs."""
    model = always_guess(engine.scheduler.speculation, n)
    assert isinstance(model, DraftModel)
    return model


def check(engine: Engine) -> None:
    assert_nothing_is_held(engine.check_integrity())
    assert engine.scheduler.speculation.proposer is not None
    assert_nothing_is_held(engine.scheduler.speculation.proposer.context.cache_stats())


@pytest.mark.parametrize("draft", ["itself", "one layer"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_its_guesses_change_no_byte(tiny_model: Path, one_layer: Path, plain: Engine, name: str, draft: str) -> None:
    options = {"max_tokens": 40, "ignore_eos": True, "seed": 5, **PARAMETERS[name]}
    expected = plain.generate([PROMPT], speculative="off", **options)
    with Engine(tiny_model, draft_model=tiny_model if draft == "itself" else one_layer) as engine:
        always(engine, 5)
        for _ in range(2):
            results = engine.generate([PROMPT], speculative={"store": False}, **options)
            assert [said(result) for result in results] == [said(result) for result in expected]
            check(engine)
        assert [piece.token for piece in engine.stream(PROMPT, **{**options, "n": 1}) if piece.token is not None] == (
            expected[0].tokens
        )
        check(engine)
        timings = results[0].timings
        if name in ("sampled", "filters"):  # each of its guesses is drawn with the number of its position
            assert timings.drafted_tokens > 0
            assert draft != "itself" or timings.accepted_tokens == timings.drafted_tokens


def test_in_company_left_half_way_and_with_few_pages(tiny_model: Path, one_layer: Path, plain: Engine) -> None:
    def engine_of(n_bytes: int | None) -> Engine:
        return Engine(tiny_model, draft_model=one_layer, max_kv_bytes=n_bytes, max_sequences=3)

    in_company(plain, engine_of, 4, check)


def test_a_long_prompt_is_caught_up_with_in_pieces(tiny_model: Path, plain: Engine) -> None:
    prompt = [3 + random.Random(i).randrange(50) for i in range(450)]
    expected = plain.generate(prompt, max_tokens=30, ignore_eos=True, temperature=1.0, seed=1)
    with Engine(tiny_model, draft_model=tiny_model) as engine:
        always(engine, 5)
        result = engine.generate(prompt, max_tokens=30, ignore_eos=True, temperature=1.0, seed=1)
        assert result.tokens == expected.tokens
        assert 0 < result.timings.accepted_tokens == result.timings.drafted_tokens
        check(engine)


def test_it_stops_where_its_own_context_ends(tiny_model: Path, tmp_path: Path, plain: Engine) -> None:
    draft = smaller(tmp_path, max_position_embeddings=48)
    options: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "temperature": 1.0, "seed": 2}
    expected = plain.generate(PROMPT, **options)
    with Engine(tiny_model, draft_model=draft) as engine:
        always(engine, 24)
        assert engine.generate(PROMPT, **options).tokens == expected.tokens
        check(engine)


def test_what_fails_in_it_costs_no_answer(
    tiny_model: Path, one_layer: Path, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "temperature": 1.0, "seed": 2}
    expected = plain.generate(PROMPT, **options)
    with Engine(tiny_model, draft_model=one_layer) as engine:
        model = always(engine, 4)
        n_failed = 0

        class Failing:
            def forward(self, *_: Any) -> bytes:
                nonlocal n_failed
                n_failed += 1
                raise OutOfMemoryError("no memory")

            def __getattr__(self, name: str) -> Any:
                return getattr(whole, name)

        whole, model.context = model.context, Failing()  # type: ignore[assignment]
        result = engine.generate(PROMPT, speculative={"store": False}, **options)
        model.context = whole
        assert result.tokens == expected.tokens
        assert n_failed == 1  # then it rests
        check(engine)


def test_what_cannot_guess_is_refused(tiny_model: Path, one_layer: Path, tmp_path: Path) -> None:
    with pytest.raises(pyengine.InvalidArgumentError, match="another vocabulary"):
        Engine(tiny_model, draft_model=pyengine.opening.DEFAULT_MODEL)
    with pytest.raises(pyengine.InvalidArgumentError, match="is larger than"):
        Engine(one_layer, draft_model=tiny_model)
    with pytest.raises(FileNotFoundError, match="there is no model at"):
        Engine(tiny_model, draft_model=tmp_path / "none.safetensors")


def test_memory_and_pickle_know_it(tiny_model: Path, one_layer: Path) -> None:
    import pickle

    with Engine(tiny_model, draft_model=one_layer) as engine, Engine(tiny_model) as other:
        always(engine, 2)
        engine.generate(PROMPT, max_tokens=8, ignore_eos=True)
        assert engine.memory()["draft"] > engine.memory()["kv"] // 2 > 0 == other.memory()["draft"]
        with pickle.loads(pickle.dumps(engine)) as again:
            assert again.scheduler.speculation.proposer is not None
