"""A draft model changes no byte either, whatever it guesses, and it never costs an answer."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine.test_speculation import PARAMETERS, PROMPT, said

import pyengine
from pyengine import Engine
from pyengine.errors import OutOfMemoryError
from pyengine.freeze import freeze
from pyengine.run.draft_model import DraftModel
from pyengine.run.proposer import REST


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
    model = engine.scheduler.speculation.proposer
    assert isinstance(model, DraftModel)
    model._best_length = lambda requests, n_rows, most: min(n, most)  # type: ignore[method-assign]
    return model


def check(engine: Engine) -> None:
    stats = engine.check_integrity()
    assert stats["n_sequences"] == 0 and stats["n_pages"] == stats["n_cached"] + stats["n_free"]
    assert engine.scheduler.speculation.proposer is not None
    stats = engine.scheduler.speculation.proposer.context.cache_stats()
    assert stats["n_sequences"] == 0 and stats["n_pages"] == stats["n_cached"] + stats["n_free"]


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
    rng = random.Random(8)
    jobs: list[tuple[list[int], dict[str, Any], list[Any]]] = []
    for i in range(12):
        prompt = [3 + rng.randrange(50) for _ in range(rng.choice((1, 2, 40, 300, 450)))]
        options = {"max_tokens": rng.choice((1, 2, 30)), "ignore_eos": True, "seed": i, "temperature": rng.choice((0, 1))}
        jobs.append((prompt, options, plain.generate(prompt, speculative="off", **options).tokens))
    for n_pages in (0, 7):
        page_bytes = plain.cache_stats()["page_bytes"]
        with Engine(
            tiny_model, draft_model=one_layer, max_kv_bytes=n_pages * page_bytes or None, max_sequences=3
        ) as engine:
            always(engine, 4)
            for _ in range(12):
                prompt, options, tokens = rng.choice(jobs)
                stream = engine.stream(prompt, **options)
                assert next(stream).token == tokens[0]
                some = [rng.choice(jobs) for _ in range(3)]
                for prompt, options, tokens in some:
                    assert engine.generate(prompt, **options).tokens == tokens
                assert engine.generate([prompt for prompt, _, _ in some], max_tokens=3, ignore_eos=True)
                del stream
                check(engine)


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
        assert 1 <= n_failed <= 60 // REST + 1  # it rests in between
        check(engine)


class Costs:
    """Steps of the large model that take 1 s, and so much more for each further row."""

    def __init__(self, row: float) -> None:
        self.row = row

    def seconds(self, n_rows: int) -> float:
        return 1.0 + self.row * (n_rows - 1)


def test_it_runs_ahead_as_far_as_pays(tiny_model: Path) -> None:
    with Engine(tiny_model, draft_model=tiny_model) as engine:
        model = engine.scheduler.speculation.proposer
        assert model is not None
        stream = engine.stream(PROMPT, max_tokens=20, ignore_eos=True, temperature=1.0, seed=1)
        next(stream), next(stream)
        request = stream.request
        assert request.reading is not None
        lengths = []
        for row, guess, chance in ((0.0, 0.0, 0.9), (0.05, 0.1, 0.9), (0.05, 0.1, 0.6), (0.05, 0.1, 0.1), (0.9, 0.1, 0.9)):
            model.experience = Costs(row)  # type: ignore[assignment]
            model._seconds, request.reading.chance = guess, chance
            lengths.append(model._best_length([request], 1, 24))
        assert lengths[0] == 24 and lengths[0] > lengths[1] > lengths[2] > 0 == lengths[3] == lengths[4]
        stream.close()


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
