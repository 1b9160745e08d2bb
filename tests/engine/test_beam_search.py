"""Beam search: the algorithm against transformers' over the same log-probabilities and against a search of everything, the
engine's against the algorithm over the engine's own logits."""

from __future__ import annotations

import gc
import inspect
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine.freeze_models import freeze_fixture
from engine.speculation_tools import assert_nothing_is_held

from pyengine import BeamHypothesis, ContextFullError, Engine, InvalidArgumentError, PyEngineError, SamplingParams
from pyengine._sampler import logprobs
from pyengine.run import scheduler as scheduling
from pyengine.run.beam_search import Beam, BeamRequest, Rules, Said
from pyengine.run.request import Caller
from pyengine.sampling_options import BeamOptions

DATA = Path(__file__).parents[1] / "reference" / "data" / "beam" / "transformers.npz"
WORDS: Any = None  # what these beams say does not matter


# ------------------------------------------------------------------ the algorithm


def search(rules: Rules, row: Callable[[Sequence[int]], Any], end_ids: Sequence[int]) -> list[Beam]:
    """The finished beams of a search whose logits are row(tokens)."""

    def read(_: Said, token: int, n_tokens: int) -> Said:
        at_end = n_tokens == rules.max_tokens
        return Said("", WORDS, "stop" if token in end_ids else "length" if at_end else None)

    beams, finished = [Beam((), 0.0, Said("", WORDS))], []
    while beams:
        logits = [row(beam.tokens) for beam in beams]
        rows = [logprobs(one, 0, min(rules.width + len(end_ids), len(one)))[1] for one in logits]
        beams, finished = rules.step(beams, finished, rows, read)
    return finished


def fixture() -> tuple[Any, list[dict[str, Any]]]:
    with np.load(DATA, allow_pickle=False) as file:
        return file["logits"], json.loads(str(file["cases"]))


def test_it_finds_what_transformers_finds() -> None:
    """The same outputs in the same order. transformers' scores are sums of float32. Its log-softmax of logits in [-8, 8] rounds
    two numbers below 16 to half of 2**-20 each, every sum rounds a number no larger than the last one, and so do the power and
    the quotient."""
    table, cases = fixture()
    assert len(cases) > 100 and np.abs(table).max() < 8
    for case in cases:
        rules = Rules(case["width"], case["max_tokens"], case["length_penalty"], case["early_stopping"])
        found = search(rules, lambda tokens, p=case["prompt"]: table[tuple([*p, *tokens][-2:])], case["end_ids"])
        assert [list(beam.tokens) for beam in found] == [tokens for tokens, _ in case["outputs"]], case
        for beam, (tokens, score) in zip(found, case["outputs"], strict=True):
            n, total = len(tokens), abs(beam.logprob)
            rounding = n * (2 * 2.0**-21 + total * 2.0**-24) + 2 * total * 2.0**-24
            assert abs(rules.score_of(beam) - score) <= rounding / n ** case["length_penalty"]


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.7, 2.0])
def test_a_beam_as_wide_as_everything_finds_the_best_of_everything(length_penalty: float) -> None:
    """Four tokens, five places: all outputs, one by one, against a search that drops no beam."""
    table = np.random.default_rng(3).normal(0, 1.0, (4, 4, 4)).astype(np.float32)
    most, end, prompt = 5, 0, (1, 2)

    def row(tokens: Sequence[int]) -> Any:
        return table[tuple([*prompt, *tokens][-2:])]

    every = {}
    for n in range(1, most + 1):
        for tokens in itertools.product((1, 2, 3), repeat=n - 1):
            for last in (0, 1, 2, 3) if n == most else (end,):
                output = (*tokens, last)
                total = 0.0
                for i, token in enumerate(output):
                    total += logprobs(row(output[:i]), token)[0]
                every[output] = total / n**length_penalty
    rules = Rules(len(every), most, length_penalty, "never")
    found = {beam.tokens: rules.score_of(beam) for beam in search(rules, row, [end])}
    assert found == every and list(found.values()) == sorted(every.values(), reverse=True)


def test_candidates_that_tie_are_ordered_by_beam_and_token() -> None:
    """Every logit is the same: the first beams, with the least tokens, go on."""
    rules = Rules(3, 2, 1.0, False)
    found = search(rules, lambda _: np.zeros(5, np.float32), [])
    assert [beam.tokens for beam in found] == [(0, 0), (0, 1), (0, 2)]
    assert len({beam.logprob for beam in found}) == 1


def test_there_are_fewer_outputs_than_beams_if_there_are_no_more() -> None:
    found = search(Rules(4, 1, 1.0, False), lambda _: np.zeros(2, np.float32), [])
    assert [beam.tokens for beam in found] == [(0,), (1,)]


# ------------------------------------------------------------------ the engine


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[Engine]:
    with Engine(tiny_model) as engine:
        yield engine
        assert_nothing_is_held(engine.check_integrity())


def prompt_of(n: int, seed: int = 7) -> list[int]:
    return [3 + (seed * i + i * i) % 50 for i in range(n)]


def expected(engine: Engine, prompt: list[int], width: int, max_tokens: int) -> list[BeamHypothesis]:
    """By the algorithm, over logits of whole texts."""
    rules = Rules(width, max_tokens, 1.0, False)
    ids = engine.eos_token_ids
    found = search(rules, lambda tokens: engine.logits([*prompt, *tokens], [len(prompt) + len(tokens) - 1])[0], ids)
    return [
        BeamHypothesis(
            engine.detokenize(beam.tokens),
            list(beam.tokens),
            "stop" if beam.tokens[-1] in ids else "length",
            None,
            beam.logprob,
            rules.score_of(beam),
        )
        for beam in found
    ]


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("n", [1, 9, 250, 256, 300])
def test_beams_are_those_of_whole_texts(tiny_model: Path, n: int, n_threads: int) -> None:
    """To the last bit, where they share pages, copy and cross them."""
    prompt = prompt_of(n)
    with Engine(tiny_model, n_threads=n_threads) as engine:
        found = engine.beam_search(prompt, beam_width=3, n=3, max_tokens=9)
        assert_nothing_is_held(engine.check_integrity())
        assert found == expected(engine, prompt, 3, 9)
        assert len(found) == 3


def test_a_prompt_is_computed_once_and_every_beam_by_a_token(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int]] = []
    forward = engine.context.forward

    class Context:
        def forward(self, tokens: list[int], sequences: list[Any], wants: bytes, **options: Any) -> bytes:
            steps.append((len(tokens), len({id(sequence) for sequence in sequences})))
            return forward(tokens, sequences, wants, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(context, name)

    context = engine.context
    monkeypatch.setattr(engine.scheduler, "context", Context())
    engine.beam_search(prompt_of(400), beam_width=5, max_tokens=12, ignore_eos=True)
    assert steps == [(400, 1)] + [(5, 5)] * 11
    stats = engine.cache_stats()
    assert stats["n_cached"] == 2 == stats["n_pages"] - stats["n_free"]  # of the prompt alone


def test_one_beam_is_greedy(engine: Engine) -> None:
    for seed in range(4):
        greedy = engine.generate(prompt_of(20, seed), max_tokens=10, temperature=0)
        (beam,) = engine.beam_search(prompt_of(20, seed), beam_width=1, max_tokens=10)
        assert (beam.text, beam.tokens, beam.finish_reason) == (greedy.text, greedy.tokens, greedy.finish_reason)


def test_score_says_the_same(engine: Engine) -> None:
    for beam in engine.beam_search(prompt_of(30), n=4, max_tokens=6, length_penalty=0.5):
        total = 0.0
        for value in engine.score(prompt_of(30) + beam.tokens, start=30).logprobs[30:]:
            assert value is not None
            total += value
        assert beam.cumulative_logprob == total
        assert beam.score == total / len(beam.tokens) ** 0.5


def test_nobody_beside_it_can_tell(engine: Engine) -> None:
    """Searches and outputs that run together, each as it is alone."""
    calls: list[Callable[[], object]] = [
        lambda: engine.beam_search(prompt_of(40), beam_width=4, n=4, max_tokens=12),
        lambda: engine.beam_search(prompt_of(40), beam_width=2, n=2, max_tokens=15, early_stopping="never"),
        lambda: engine.beam_search(prompt_of(300, 3), beam_width=6, n=6, max_tokens=8, length_penalty=-1),
        lambda: engine.generate(prompt_of(260, 5), max_tokens=15, temperature=1.0, seed=4).tokens,
    ]
    alone = [call() for call in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        for _ in range(2):
            engine.clear_cache()
            assert [future.result() for future in [pool.submit(call) for call in calls]] == alone


@pytest.mark.parametrize("make_room", [False, True])
def test_beams_fork_what_a_window_holds(tmp_path: Path, make_room: bool) -> None:
    """A layer of three sees everything, the others 40 positions, whose pages have slid out behind them; a beam that made room for
    others begins again where a window is gone."""
    path, prompt, caller = freeze_fixture("gemma3", tmp_path, 1024), prompt_of(500), Caller()
    with Engine(path) as engine:
        search, requests = engine.beam_requests(caller, prompt, beam_width=3, n=3, max_tokens=16)
        engine.scheduler.add(requests)
        for request in itertools.cycle(requests):
            engine.scheduler.step()
            if search.is_done:
                break
            if make_room:
                request.sequence = None
        assert search.results == expected(engine, prompt, 3, 16)
        engine.scheduler.abort(requests)
        assert_nothing_is_held(engine.check_integrity())


@pytest.mark.parametrize("max_sequences", [5, 7, 64])
def test_beams_that_do_not_fit_take_turns(tiny_model: Path, max_sequences: int) -> None:
    """Memory for one context: some make room and are computed again. Or sequences for one search and a part of another."""
    options: dict[str, Any] = {"beam_width": 5, "n": 5, "max_tokens": 10}
    prompts = [prompt_of(250), prompt_of(260, 3)]
    with Engine(tiny_model) as engine:
        page, n_pages = engine.cache_stats()["page_bytes"], -(-engine.n_ctx // 256)
        wide = [engine.beam_search(prompt, **options) for prompt in prompts]
    with Engine(tiny_model, max_sequences=max_sequences, max_kv_bytes=page * n_pages) as engine:
        assert [engine.beam_search(prompt, **options) for prompt in prompts] == wide
        with ThreadPoolExecutor(2) as pool:
            together = [pool.submit(engine.beam_search, prompt, **options) for prompt in prompts]
            assert [future.result() for future in together] == wide
        assert_nothing_is_held(engine.check_integrity())


@pytest.mark.parametrize("max_sequences", [5, 7, 9, 64])
def test_beams_of_a_search_run_together_or_wait(tiny_model: Path, max_sequences: int) -> None:
    """Whatever else runs: nothing is computed twice. What comes later does not come before a search that waits."""
    tokens: list[int] = []
    with Engine(tiny_model, max_sequences=max_sequences) as engine:
        caller, forward = Caller(), engine.context.forward
        greedy = engine.resolve(SamplingParams(max_tokens=6, ignore_eos=True, speculative="off"))
        searches, requests = [], []
        for seed in range(3):
            search, lanes = engine.beam_requests(caller, prompt_of(20, seed), beam_width=5, max_tokens=8, ignore_eos=True)
            searches.append(search)
            requests += [*lanes, *engine.requests(caller, [prompt_of(9, seed + 4)], greedy)]

        class Context:
            def forward(self, given: list[int], *rest: Any, **options: Any) -> bytes:
                tokens.append(len(given))
                return forward(given, *rest, **options)

            def __getattr__(self, name: str) -> Any:
                return getattr(context, name)

        context = engine.context
        engine.scheduler.context = Context()  # type: ignore[assignment]
        engine.scheduler.add(requests)
        for _ in range(100):
            engine.scheduler.step()
        engine.scheduler.context = context
        assert all(request.is_done and request.error is None for request in requests)
        assert sum(tokens) == 3 * (20 + 5 * 7) + 3 * (9 + 5)
        for seed, search in enumerate(searches):
            alone = engine.beam_search(prompt_of(20, seed), beam_width=5, max_tokens=8, ignore_eos=True)
            assert search.results == alone


def test_a_search_that_runs_goes_on_before_a_stream_that_made_room(tiny_model: Path) -> None:
    """The stream was first, made room while nobody read it, and is read again: it waits for a place, and the search, which has
    all of them, for nobody."""
    with Engine(tiny_model, max_sequences=4, speculative="off") as engine:
        caller, scheduler = Caller(), engine.scheduler
        stream = engine.stream(prompt_of(5), max_tokens=200, ignore_eos=True)
        next(stream)
        while not stream.request.is_paused:
            scheduler.step()
        search, lanes = engine.beam_requests(caller, prompt_of(9), beam_width=4, max_tokens=8, ignore_eos=True)
        scheduler.add(lanes)
        for _ in range(4):
            scheduler.step()
        assert stream.request.sequence is None and not search.is_done
        next(stream)
        assert not stream.request.is_paused
        for _ in range(4):
            scheduler.step()
        assert search.is_done
        stream.close()


def test_a_search_that_could_only_take_turns_is_refused(tiny_model: Path) -> None:
    with Engine(tiny_model, max_sequences=3) as engine:
        assert len(engine.beam_search(prompt_of(5), beam_width=3, n=3, max_tokens=2)) == 3
        with pytest.raises(InvalidArgumentError, match=r"beam_width is 4, .* max_sequences=4"):
            engine.beam_search(prompt_of(5), max_tokens=2)


def test_a_search_goes_with_its_call(engine: Engine) -> None:
    """Its requests refer to it, not it to them: what they hold (an adapter, and so a model) waits for no garbage collector."""

    def alive() -> int:
        return sum(type(one) is BeamRequest for one in gc.get_objects())

    gc.collect()
    before = alive()
    gc.disable()
    try:
        engine.beam_search(prompt_of(20), max_tokens=4)
        assert alive() == before
    finally:
        gc.enable()


def test_stop_strings_and_tokens_end_beams(engine: Engine) -> None:
    """As they end outputs: the text ends before a stop string, the tokens do not."""
    prompt = prompt_of(25)
    plain = engine.beam_search(prompt, beam_width=4, n=4, max_tokens=8, ignore_eos=True)
    token = plain[0].tokens[2]
    for beam in engine.beam_search(prompt, n=4, max_tokens=8, ignore_eos=True, stop_token_ids=[token]):
        assert (token in beam.tokens) == (beam.finish_reason == "stop") == (beam.tokens[-1] == token)
        assert beam.stop_reason == (token if beam.finish_reason == "stop" else None)
    stop = plain[0].text[2:4]
    assert len(stop) == 2
    for include in (False, True):
        beams = engine.beam_search(
            prompt, n=4, max_tokens=8, ignore_eos=True, stop=[stop], include_stop_str_in_output=include
        )
        assert any(beam.finish_reason == "stop" for beam in beams)
        for beam in beams:
            assert (beam.finish_reason == "stop") == (stop in engine.detokenize(beam.tokens))
            assert beam.stop_reason == (stop if beam.finish_reason == "stop" else None)
            assert beam.text.endswith(stop) if include and beam.finish_reason == "stop" else stop not in beam.text


def test_a_search_ends_with_the_context(tiny_model: Path) -> None:
    with Engine(tiny_model, n_ctx=40) as engine:
        beams = engine.beam_search(prompt_of(35), n=4, ignore_eos=True)
        assert {(len(beam.tokens), beam.finish_reason) for beam in beams} == {(5, "length")}
        (full,) = engine.beam_search(prompt_of(40), ignore_eos=True)
        assert full.tokens == engine.generate(prompt_of(40), temperature=0, ignore_eos=True).tokens
        with pytest.raises(ContextFullError):
            engine.beam_search(prompt_of(41))


@pytest.mark.parametrize("n_steps", [0, 1, 4])
def test_a_search_that_runs_out_of_time_ends_where_it_is(engine: Engine, n_steps: int) -> None:
    """The deadline passes after so many steps: beams are outputs as far as they go, beside those that are finished."""

    def read(_: Said, token: int, __: int) -> Said:
        return Said("", WORDS, "stop" if token in engine.eos_token_ids else None)

    rules = Rules(4, 30, 1.0, False)
    beams, finished = [Beam((), 0.0, Said("", WORDS))], []
    for _ in range(n_steps):
        logits = [engine.logits([*prompt_of(20), *beam.tokens], [19 + len(beam.tokens)])[0] for beam in beams]
        rows = [logprobs(one, 0, rules.width + len(engine.eos_token_ids))[1] for one in logits]
        beams, finished = rules.step(beams, finished, rows, read)
    found, caller, scheduler = rules.best([*finished, *beams]), Caller(), engine.scheduler
    search, requests = engine.beam_requests(caller, prompt_of(20), n=3, max_tokens=30, timeout=1e9)
    scheduler.add(requests)
    for _ in range(n_steps):
        scheduler.step()
    for request in requests:
        request.deadline = time.monotonic()
    scheduler.step()
    assert search.is_done and all(request.is_done for request in requests)
    assert [(beam.tokens, beam.cumulative_logprob) for beam in search.results] == [
        (list(beam.tokens), beam.logprob) for beam in found[:3]
    ]
    for beam in search.results:
        assert beam.finish_reason == ("stop" if beam.tokens and beam.tokens[-1] in engine.eos_token_ids else "timeout")
        assert beam.text == engine.detokenize(beam.tokens)
    scheduler.abort(requests)
    (nothing,) = engine.beam_search(prompt_of(20), timeout=1e-9)
    assert nothing == BeamHypothesis("", [], "timeout", None, 0.0, 0.0)


def test_the_beams_of_a_search_run_out_of_time_together(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the deadline passes while its requests are looked through: none is left of a search that has ended."""
    with Engine(tiny_model) as engine:
        caller, scheduler, clock = Caller(), engine.scheduler, itertools.count()
        search, requests = engine.beam_requests(caller, prompt_of(20), max_tokens=30)
        scheduler.add(requests)
        scheduler.step()
        for request in requests:
            request.deadline = 1.0
        monkeypatch.setattr(scheduling, "time", SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter))
        while not search.is_done:
            assert len(scheduler._requests) == len(requests)
            scheduler.sweep()
        assert not scheduler._requests


def test_editors_know_every_option() -> None:
    """`BeamOptions` spells the options that `beam_requests` takes."""
    parameters = inspect.signature(Engine.beam_requests).parameters
    assert {*BeamOptions.__annotations__} == {*parameters} - {"self", "caller", "prompt", "shown_special"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beam_width": 0}, "beam_width"),
        ({"beam_width": 33}, "beam_width"),
        ({"beam_width": 4.0}, "beam_width"),
        ({"n": 5}, "n must be"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"length_penalty": "1"}, "length_penalty"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"length_penalty": -11}, "length_penalty"),
        ({"early_stopping": "always"}, "early_stopping"),
        ({"early_stopping": 1}, "early_stopping"),
        ({"timeout": 0}, "timeout"),
        ({"stop": ""}, "stop"),
        ({"stop_token_ids": range(100)}, "100 tokens end a text"),
        ({"adapter": "none"}, "none"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(engine: Engine, options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named):
        engine.beam_search(**{"prompt": prompt_of(5), "max_tokens": 2, **options})


def test_a_closed_engine_searches_nothing(tiny_model: Path) -> None:
    engine = Engine(tiny_model)
    engine.close()
    with pytest.raises(PyEngineError, match="closed"):
        engine.beam_search(prompt_of(5))


def test_an_exception_while_text_is_read_is_its_callers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing stays behind."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    alone = engine.beam_search(prompt_of(20), max_tokens=6)
    with monkeypatch.context() as patch:
        patch.setattr("pyengine.run.beam_search.Reader.read", broken)
        with pytest.raises(ZeroDivisionError):
            engine.beam_search(prompt_of(20), max_tokens=6)
    assert_nothing_is_held(engine.check_integrity())
    assert engine.beam_search(prompt_of(20), max_tokens=6) == alone
