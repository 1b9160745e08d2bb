"""A draft head changes no byte, whatever it guesses, and it never costs an answer."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.draft_heads import STEP, bigram_model, with_random_head
from engine.frozen_parts import FrozenParts
from engine.speculation_tools import always_guess, assert_nothing_is_held, in_company, plain_engine
from engine.test_speculation import PARAMETERS, PROMPT, said

from pyengine import Engine, SamplingParams, _core
from pyengine._draft import MAX_ROWS
from pyengine.errors import ModelFormatError, OutOfMemoryError
from pyengine.run.draft_head import DraftHead, HeadState
from pyengine.run.draft_model import DraftModel
from pyengine.run.request import HIDDEN, LOGITS, Caller
from pyengine.run.stream import run_all


@pytest.fixture(autouse=True)
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step goes by without a look for guesses, however long that takes beside a step of so small a model."""
    monkeypatch.setattr("pyengine.run.speculation.MAX_SKIP", 0)


@pytest.fixture(scope="module")
def headed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a head that guesses anything."""
    return with_random_head(tiny_model, tmp_path_factory.mktemp("headed") / "headed.safetensors")


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head that knows what it will say."""
    return bigram_model(tmp_path_factory.mktemp("knowing"))


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Iterator[Engine]:
    with plain_engine(tiny_model) as engine:
        yield engine


def always(engine: Engine, n: int) -> DraftHead:
    """Its head guesses n tokens whenever it may, whatever that costs."""
    head = always_guess(engine.scheduler.speculation, n)
    assert isinstance(head, DraftHead)
    return head


def check(engine: Engine) -> None:
    assert_nothing_is_held(engine.check_integrity())


# ------------------------------------------------------------------ no byte


@pytest.mark.parametrize("name", PARAMETERS)
def test_its_guesses_change_no_byte(headed: Path, plain: Engine, name: str) -> None:
    options = {"max_tokens": 40, "ignore_eos": True, "seed": 5, **PARAMETERS[name]}
    expected = plain.generate([PROMPT], **options)
    with Engine(headed) as engine:
        always(engine, 5)
        for _ in range(2):  # the second time from the cache
            results = engine.generate([PROMPT], speculative={"store": False}, **options)
            assert [said(result) for result in results] == [said(result) for result in expected]
            check(engine)
        assert [piece.token for piece in engine.stream(PROMPT, **{**options, "n": 1}) if piece.token is not None] == (
            expected[0].tokens
        )
        check(engine)
        if name in ("sampled", "filters"):
            assert results[0].timings.drafted_tokens > 0


@pytest.mark.parametrize("isa", _core.available_isas())
@pytest.mark.parametrize("n_threads", [1, 2])
def test_every_instruction_set_and_thread_count(headed: Path, plain: Engine, isa: str, n_threads: int) -> None:
    options: dict[str, Any] = {"temperature": 0.8, "seed": 9, "max_tokens": 60, "ignore_eos": True, "logprobs": 0}
    expected = plain.generate(PROMPT, **options)
    _core.select_isa(isa)
    try:
        with Engine(headed, n_threads=n_threads) as engine:
            always(engine, 3)
            result = engine.generate(PROMPT, **options)
            assert said(result) == said(expected) and result.timings.drafted_tokens > 0
    finally:
        _core.select_isa(None)


def test_in_company_left_half_way_and_with_few_pages(headed: Path, plain: Engine) -> None:
    in_company(plain, lambda n_bytes: Engine(headed, max_kv_bytes=n_bytes, max_sequences=3), 4, check)


def test_rows_of_all_kinds_in_one_step(headed: Path, plain: Engine) -> None:
    """Logits and hidden states that others want are found among those that the head wants."""
    options: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True, "temperature": 1.0, "seed": 4}
    texts = [[3 + i * k % 50 for i in range(20 + k)] for k in (3, 7, 11)]

    def run(engine: Engine) -> tuple[list[list[int]], dict[tuple[int, int], bytes]]:
        caller, rows = Caller(), dict[tuple[int, int], bytes]()
        says = engine.requests(caller, texts, engine.resolve(SamplingParams(**options)))
        wanted = []
        for kind in (LOGITS, HIDDEN):

            def take(at: int, row: memoryview, kind: int = kind) -> None:
                rows[kind, at] = row.tobytes()

            wanted += engine.rows_requests(caller, texts[kind], [4, 9, 15], take, row_kind=kind)
        run_all(engine.scheduler, [says[0], wanted[0], says[1], wanted[1], says[2]])
        return [request.result.tokens for request in says], rows

    expected = run(plain)
    assert len(expected[1]) == 6
    with Engine(headed) as engine:
        always(engine, 3)
        assert run(engine) == expected
        check(engine)


# ------------------------------------------------------------------ what it knows


def test_it_goes_on_from_the_hidden_state_that_gave_the_newest_token(knowing: Path) -> None:
    with Engine(knowing) as engine:
        always(engine, 4)
        states: list[tuple[list[int], bytes]] = []
        stream = engine.stream(PROMPT, max_tokens=25, ignore_eos=True, temperature=1.0, seed=1)
        for _ in range(12):
            next(stream)
            request = stream.request
            n, state = request.n_tokens, request.draft_state
            assert isinstance(state, HeadState) and state.known[0] == n
            states.append((list(request.tokens(0, n - 1)), state.known[1].tobytes()))
        assert request.output.accepted_tokens > 0
        stream.close()
        for text, state in states:
            caller, found = Caller(), list[bytes]()
            rows = engine.rows_requests(
                caller, text, [len(text) - 1], lambda _, row, found=found: found.append(row.tobytes()), row_kind=HIDDEN
            )
            run_all(engine.scheduler, rows)
            assert found == [state]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_head_that_knows_the_model_is_right(knowing: Path, temperature: float) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "temperature": temperature, "seed": 3}
    with Engine(knowing) as engine:
        plain = engine.generate([5], speculative="off", **options)
        assert plain.timings.drafted_tokens == 0
        always(engine, 4)
        result = engine.generate([5], speculative={"store": False}, **options)
        assert result.tokens == plain.tokens
        timings = result.timings
        if temperature == 0:
            assert result.tokens == [5 + STEP * (i + 1) for i in range(40)]
            assert timings.accepted_tokens == timings.drafted_tokens >= 28
        else:  # of tokens with a chance of about 0.6, four at a time: 0.6 + 0.36 + ... = 1.3 of 4
            assert timings.accepted_tokens >= 0.2 * timings.drafted_tokens > 0
        check(engine)


def test_many_texts_are_guessed_together(knowing: Path) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True, "temperature": 0}
    prompts = [[10 * k + 1] for k in range(9)]
    with Engine(knowing) as engine:
        head = always(engine, 3)
        results = engine.generate(prompts, speculative={"store": False}, **options)
        for prompt, result in zip(prompts, results, strict=True):
            assert result.tokens == [prompt[0] + STEP * (i + 1) for i in range(20)]
            assert result.timings.accepted_tokens == result.timings.drafted_tokens >= 10
        engine.scheduler.speculation.max_asked = len(prompts) - 1  # texts that never repeat themselves: n-grams know nothing
        others = [[10 * k + 2] for k in range(9)]
        noted: list[Any] = []
        head.note_state = lambda request, state: noted.append(request)  # type: ignore[method-assign]
        results = engine.generate(others, speculative={"store": False}, max_tokens=4, ignore_eos=True, temperature=0)
        assert all(result.timings.drafted_tokens == 0 for result in results)
        assert len(noted) <= len(others)  # of four tokens each: once they are known to be so many, nobody copies their states
        noted.clear()  # so many texts that no step has room for a guess, after steps of few
        options = {"max_tokens": 3, "ignore_eos": True, "temperature": 0}
        assert engine.generate([1], **options) and len(noted) == 2
        many = engine.generate([[k] for k in range(MAX_ROWS)], **options)
        assert all(len(result.tokens) == 3 for result in many) and len(noted) == 2


def test_a_guess_that_ends_the_text_is_the_last_one(knowing: Path) -> None:
    """And what a mask forbids is not guessed."""
    with Engine(knowing) as engine:
        end = engine.eos_token_ids[0]
        always(engine, 8)
        for options in ({}, {"bad_token_ids": [end]}):
            plain = engine.generate([end - 3 * STEP], speculative="off", max_tokens=12, temperature=0, **options)
            guessed = engine.generate([end - 3 * STEP], speculative={"store": False}, max_tokens=12, temperature=0, **options)
            assert (guessed.tokens, guessed.finish_reason) == (plain.tokens, plain.finish_reason)
            assert guessed.timings.accepted_tokens == guessed.timings.drafted_tokens > 0


# ------------------------------------------------------------------ what goes wrong costs no answer


def test_what_fails_in_it_costs_no_answer(headed: Path, plain: Engine) -> None:
    options: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "temperature": 1.0, "seed": 2}
    expected = plain.generate(PROMPT, **options)
    with Engine(headed) as engine:
        proposer = always(engine, 4)
        calls: list[str] = []

        class Failing:
            def __init__(self, whole: _core.DraftHead) -> None:
                self.model = whole.model

            def step(self, tokens: list[int], states: array[float]) -> bytes:
                calls.append("step")
                raise OutOfMemoryError("no memory")

        whole = proposer.head
        proposer.head = Failing(whole)  # type: ignore[assignment]
        assert engine.generate(PROMPT, speculative={"store": False}, **options).tokens == expected.tokens
        proposer.head = whole
        assert len(calls) == 1  # then it rests
        check(engine)


def guesses_of(head: DraftHead) -> list[tuple[int, float] | None]:
    """All that it will guess."""
    guesses: list[tuple[int, float] | None] = []
    guess = head._guess

    def noted(*arguments: Any) -> list[tuple[int, float] | None]:
        found = guess(*arguments)
        guesses.extend(found)
        return found

    head._guess = noted  # type: ignore[method-assign]
    return guesses


def test_what_it_does_not_know_it_does_not_guess(headed: Path, plain: Engine) -> None:
    with Engine(headed) as engine:
        file = engine._file
        offset, _ = file.tensors["extra.draft.vocab"]
        assert file.config.draft_head is not None
        known = np.frombuffer(file.buffer, "<i4", file.config.draft_head.vocab_size, offset).tolist()
        others = sorted(set(range(engine.vocab_size)) - set(known) - {0, 1, 2})
        options: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True, "allowed_token_ids": others, "seed": 6}
        guesses = guesses_of(always(engine, 4))
        result = engine.generate(PROMPT, speculative={"store": False}, **options)
        assert result.tokens == plain.generate(PROMPT, **options).tokens
        assert guesses and not any(guesses)


@pytest.mark.parametrize("tensor", ["state_norm", "output_norm"])
def test_infinities_are_no_guesses(headed: Path, plain: Engine, tmp_path: Path, tensor: str) -> None:
    parts = FrozenParts(headed.read_bytes())
    name = f"extra.draft.{tensor}"
    path = tmp_path / "m.safetensors"
    path.write_bytes(parts.build({name: np.full(len(parts.parts[name]) // 4, 3e38, "<f4").tobytes()}))
    options: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True, "temperature": 1.0, "seed": 2}
    expected = plain.generate(PROMPT, **options)
    with Engine(path) as engine:
        guesses = guesses_of(always(engine, 4))
        result = engine.generate(PROMPT, speculative={"store": False}, **options)
        assert result.tokens == expected.tokens and guesses and not any(guesses)
        check(engine)


def test_a_damaged_head_is_refused(headed: Path, tmp_path: Path) -> None:
    parts = FrozenParts(headed.read_bytes())
    path = tmp_path / "m.safetensors"
    path.write_bytes(parts.build({"extra.draft.vocab": bytes(len(parts.parts["extra.draft.vocab"]))}))
    with pytest.raises(ModelFormatError, match=r"extra\.draft\.vocab does not hold ascending ids"):
        Engine(path)


# ------------------------------------------------------------------ who guesses


def test_it_is_used_unless_something_else_is_asked_for(headed: Path, tiny_model: Path) -> None:
    with Engine(headed) as engine, Engine(tiny_model) as without, Engine(headed, draft_model=tiny_model) as by_model:
        assert isinstance(engine.scheduler.speculation.proposer, DraftHead)
        assert without.scheduler.speculation.proposer is None
        assert isinstance(by_model.scheduler.speculation.proposer, DraftModel)
        always(engine, 2)
        assert engine.generate(PROMPT, max_tokens=9, ignore_eos=True).timings.drafted_tokens > 0
        stream = engine.stream(PROMPT, max_tokens=9, ignore_eos=True, speculative="off")
        next(stream)
        assert stream.request.row_kind == LOGITS and stream.request.draft_state is None
        with pickle.loads(pickle.dumps(engine)) as again:
            assert isinstance(again.scheduler.speculation.proposer, DraftHead)
        memory = engine.memory()["draft"]
        with Engine(headed, speculative="off") as off:
            assert off.generate(PROMPT, max_tokens=9).timings.drafted_tokens == 0
            assert 0 < off.memory()["draft"] < memory  # no rows so far
        assert without.memory()["draft"] == 0
