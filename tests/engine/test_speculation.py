"""Drafts change no byte. Whatever is guessed, right, wrong or anything, the output is the one of plain decoding: with every
parameter, in any company, on every instruction set, and when calls are left half way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.scripted_drafts import drafts_of, script
from engine.speculation_tools import assert_nothing_is_held, costs, plain_engine

import pyengine
from pyengine import Engine, _core, _draft, _sampler
from pyengine.results import Generation
from pyengine.run.speculation import until_end
from pyengine.sampling import Drafting, SamplingParams

KINDS = ["right", "wrong", "random", "mixed"]
PROMPT = [3 + i * 7 % 50 for i in range(30)]


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Iterator[Engine]:
    with plain_engine(tiny_model) as engine:
        yield engine


def said(result: Generation) -> tuple[Any, ...]:
    """All of a result but its timings, log-probabilities to the last bit."""
    return result.text, result.tokens, result.finish_reason, result.stop_reason, result.seed, result.logprobs


def without(plain: Engine, prompt: list[int], **options: Any) -> list[Generation]:
    plain.clear_cache()
    results = plain.generate([prompt], speculative="off", **options)
    assert all(result.timings.drafted_tokens == 0 for result in results)
    return results


def texts_of(prompt: list[int], results: list[Generation]) -> dict[tuple[tuple[int, ...], int], list[int]]:
    return {(tuple(prompt), i): result.tokens for i, result in enumerate(results)}


def check(engine: Engine) -> None:
    assert_nothing_is_held(engine.check_integrity())


# ------------------------------------------------------------------ every parameter


PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0},
    "filters": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    "greedy penalties": {"temperature": 0, "frequency_penalty": 1.5},
    "logprobs": {"temperature": 0.9, "logprobs": 3},
    "end of text": {"temperature": 1.5, "ignore_eos": False, "max_tokens": 300},
    "stop tokens": {"temperature": 1.2, "stop_token_ids": list(range(3, 60, 9)), "min_tokens": 6},
    "stop strings": {"temperature": 1.2, "stop": ["e", "ab", "th"], "include_stop_str_in_output": True},
    "repeats": {"temperature": 0.8, "dry_multiplier": 2.0, "dry_allowed_length": 1, "no_repeat_ngram_size": 4,
                "bad_words": ["e", "th"], "frequency_penalty": 0.5, "repeat_last_n": 9},
    "spread": {"temperature": 1.2, "xtc_probability": 0.5, "xtc_threshold": 0.02, "top_n_sigma": 2.0, "dynatemp_range": 0.7},
    "all at once": {"temperature": 1.1, "top_k": 30, "top_p": 0.95, "min_p": 0.001, "typical_p": 0.97, "top_n_sigma": 3.0,
                    "dynatemp_range": 0.7, "xtc_probability": 0.5, "xtc_threshold": 0.02, "repetition_penalty": 1.2,
                    "presence_penalty": 0.1, "repeat_last_n": 9, "dry_multiplier": 2.0, "dry_sequence_breakers": ["e"],
                    "no_repeat_ngram_size": 3, "bad_words": ["th"], "allowed_token_ids": list(range(5, 120)), "logprobs": 2,
                    "n": 2},
    "lists": {"temperature": 1.0, "bad_token_ids": [4, 5], "logit_bias": {7: 3.0, 9: -2.0}},
    "samples": {"temperature": 1.0, "n": 3},
    "one token": {"temperature": 0, "max_tokens": 1},
    "to the end of the context": {"temperature": 1.0, "max_tokens": None},
}


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_change_no_byte(tiny_model: Path, plain: Engine, kind: str, name: str) -> None:
    options = {"max_tokens": 40, "ignore_eos": True, "seed": 5, **PARAMETERS[name]}
    expected = without(plain, PROMPT, **options)
    with Engine(tiny_model) as engine:
        script(engine, texts_of(PROMPT, expected), drafts_of(kind, seed=1, vocab_size=engine.vocab_size))
        for _ in range(2):  # the second time from the cache
            results = engine.generate([PROMPT], **options)
            assert [said(result) for result in results] == [said(result) for result in expected]
            check(engine)
        streamed = list(engine.stream(PROMPT, **{**options, "n": 1}))
        assert [piece.token for piece in streamed if piece.token is not None] == expected[0].tokens
        assert "".join(piece.text for piece in streamed) == expected[0].text
        timings = results[0].timings
        assert 0 <= timings.accepted_tokens <= timings.drafted_tokens
        if name == "greedy" and kind in ("right", "wrong"):
            assert timings.drafted_tokens > 0
            assert timings.accepted_tokens == (timings.drafted_tokens if kind == "right" else 0)


@pytest.mark.parametrize("isa", _core.available_isas())
@pytest.mark.parametrize("n_threads", [1, 2])
def test_every_instruction_set_and_thread_count(tiny_model: Path, plain: Engine, isa: str, n_threads: int) -> None:
    options: dict[str, Any] = {"temperature": 0.8, "seed": 9, "max_tokens": 280, "ignore_eos": True, "logprobs": 0}
    expected = without(plain, PROMPT, **options)
    _core.select_isa(isa)
    try:
        with Engine(tiny_model, n_threads=n_threads) as engine:
            script(engine, texts_of(PROMPT, expected), drafts_of("mixed", seed=3, vocab_size=engine.vocab_size))
            assert [said(result) for result in engine.generate([PROMPT], **options)] == [said(r) for r in expected]
            check(engine)
    finally:
        _core.select_isa(None)


@pytest.mark.parametrize("n_rounds", [25, pytest.param(1500, marks=pytest.mark.slow)])
def test_random_schedules(tiny_model: Path, plain: Engine, n_rounds: int) -> None:
    """Batches of random requests, streams left half way, prefix hits, two salts, pages so few that some are evicted and
    requests make room: each answer is the one of plain decoding."""
    rng = random.Random(4)
    beginnings = [[3 + random.Random(i * 100 + k).randrange(50) for k in range(300)] for i in range(3)]
    jobs: list[tuple[list[int], dict[str, Any], list[Generation]]] = []
    texts: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for i in range(24):
        prompt = rng.choice(beginnings)[: rng.choice((5, 120, 250, 256, 300))]
        prompt = [*prompt, 5 + i, 7]
        options = {"max_tokens": rng.choice((3, 20, 60)), "ignore_eos": True, "seed": i}
        options |= PARAMETERS[rng.choice(("greedy", "penalties", "repeats", "logprobs", "samples", "stop strings"))]
        jobs.append((prompt, options, without(plain, prompt, **options)))
        texts |= texts_of(prompt, jobs[-1][2])
    for n_pages, draft in ((0, drafts_of("mixed", seed=6, vocab_size=50)), (6, drafts_of("right", seed=0, vocab_size=50))):
        page_bytes = plain.cache_stats()["page_bytes"]
        with Engine(tiny_model, max_kv_bytes=n_pages * page_bytes or None, max_sequences=4) as engine:
            script(engine, texts, draft)
            for _ in range(n_rounds):
                left = None
                if rng.random() < 0.3:
                    prompt, options, expected = rng.choice(jobs)
                    left = engine.stream(prompt, **{**options, "n": 1})
                    assert next(left).token == expected[0].tokens[0]
                prompt, options, expected = rng.choice(jobs)
                salt = rng.choice((None, "other"))
                results = engine.generate([prompt], cache_salt=salt, **options)
                assert [said(result) for result in results] == [said(result) for result in expected]
                many = [job for job in jobs if job[1] is options or job[1] == options]
                together = engine.generate([job[0] for job in many], **options)
                assert [said(r) for r in together] == [said(r) for job in many for r in job[2]]
                if left is not None and rng.random() < 0.5:
                    left.close()
                del left
                check(engine)


# ------------------------------------------------------------------ what a draft saves, and what it must not cost


class Counter:
    """A context that counts forwards and their rows."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.rows: list[int] = []

    def forward(self, tokens: list[int], sequences: list[Any], wants: bytes, **options: Any) -> bytes:
        self.rows.append(len(tokens))
        failed: bytes = self._context.forward(tokens, sequences, wants, **options)
        return failed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def test_right_drafts_save_steps_and_wrong_ones_cost_none(tiny_model: Path, plain: Engine) -> None:
    options: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 17}
    expected = without(plain, PROMPT, **options)
    for kind, rows in (("right", [30, 8, 8]), ("wrong", [30, *[8] * 9, 7, 6, 5, 4, 3, 2, 1])):
        with Engine(tiny_model) as engine:
            script(engine, texts_of(PROMPT, expected), drafts_of(kind, seed=1, vocab_size=engine.vocab_size))
            engine._scheduler.context = counter = Counter(engine.context)  # type: ignore[assignment]
            assert engine.generate(PROMPT, **options).tokens == expected[0].tokens
            assert counter.rows == rows


def test_wrong_drafts_are_found_by_no_later_prompt(tiny_model: Path, plain: Engine) -> None:
    """Also where one filled a page and began another."""
    prompt = [3 + i % 50 for i in range(250)]
    options: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 4}
    expected = without(plain, prompt, **options)
    guesses = list(range(10, 34))
    with Engine(tiny_model) as engine:
        script(engine, texts_of(prompt, expected), lambda truth, most: [truth[0], *guesses][:most])
        engine.generate(prompt, **options)
        engine._scheduler.speculation.plan = lambda requests, n_rows: {one.number: tuple(guesses) for one in requests}  # type: ignore[method-assign]
        engine.generate(prompt, **options)
        found = engine.context.match_length([*prompt, *guesses])
        assert found == 250 + (expected[0].tokens[0] == guesses[0])
        assert engine.context.match_length(prompt + expected[0].tokens) >= 252
        assert engine.cache_stats()["n_cached"] == 2  # one for each call: no page of guesses alone is kept
        check(engine)


def test_guesses_give_way_when_pages_run_out(tiny_model: Path, plain: Engine) -> None:
    """Two requests in all the pages there are; a draft that wants one more must not make the other start anew."""
    prompts = [[3 + i * k % 50 for i in range(250)] for k in (3, 7)]
    options: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 5, "seed": 0}
    expected = [without(plain, prompt, **options)[0] for prompt in prompts]
    texts = {(tuple(prompt), 0): result.tokens for prompt, result in zip(prompts, expected, strict=True)}
    with Engine(tiny_model, speculative="off") as engine:
        engine.context.set_max_pages(2)
        script(engine, texts, lambda truth, most: [9] * 20)
        engine._scheduler.speculation.plan = lambda requests, n_rows: {one.number: (9,) * 20 for one in requests}  # type: ignore[method-assign]
        engine._scheduler.context = counter = Counter(engine.context)  # type: ignore[assignment]
        assert [said(r) for r in engine.generate(prompts, **options)] == [said(r) for r in expected]
        # the prompts, one try with guesses that cannot be had, and then a token each
        assert counter.rows == [500, 42, 2, 2, 2, 2]


def test_a_guess_that_overflows_fails_nobody(tiny_model: Path, plain: Engine) -> None:
    """The core says that rows of the request failed; without its guesses they do not."""
    options: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 9, "seed": 0}
    expected = without(plain, PROMPT, **options)

    class Failing(Counter):
        def forward(self, tokens: list[int], sequences: list[Any], wants: bytes, **options: Any) -> bytes:
            if not any(options["drafted"]):
                return super().forward(tokens, sequences, wants, **options)
            self.rows.append(len(tokens))
            return b"\1" * len(tokens)  # and nothing has changed

    with Engine(tiny_model) as engine:
        script(engine, texts_of(PROMPT, expected), drafts_of("right", seed=1, vocab_size=engine.vocab_size))
        engine._scheduler.context = counter = Failing(engine.context)  # type: ignore[assignment]
        assert said(engine.generate(PROMPT, **options)) == said(expected[0])
        assert counter.rows == [30, 8] + [1] * 8
        check(engine)


# ------------------------------------------------------------------ the core's part


def test_drafted_rows_have_the_bits_of_others_and_leave_nothing(plain: Engine) -> None:
    def run(context: _core.Context) -> None:
        tokens, guesses = PROMPT, [11, 12, 13, 14]
        straight, drafted = context.sequence_new(), context.sequence_new()
        context.forward(tokens + guesses, [straight] * 34, b"\1" * 34)
        rows = [bytes(memoryview(context.logits(i))) for i in range(34)]
        flags = bytes(30) + b"\1" * 4
        context.forward(tokens + guesses, [drafted] * 34, b"\1" * 34, drafted=flags)
        assert [bytes(memoryview(context.logits(i))) for i in range(34)] == rows
        assert drafted.length == 30 and list(drafted.tokens()) == tokens
        context.check()
        assert drafted.accept([11, 12, 99]) == 2
        assert drafted.length == 32 and drafted.accept([13]) == 0  # the others are forgotten
        context.forward([13], [drafted], b"\1")
        assert bytes(memoryview(context.logits(0))) == rows[32]
        context.forward([50, 51], [drafted] * 2, b"\0\0", drafted=b"\1\1")
        context.forward([14], [drafted], b"\1")  # forgets what was drafted
        assert bytes(memoryview(context.logits(0))) == rows[33] and drafted.length == 34
        context.forward([50, 51], [drafted] * 2, b"\0\0", drafted=b"\1\1")
        fork = drafted.fork(34)
        with pytest.raises(pyengine.InvalidArgumentError, match="cannot fork 35"):
            drafted.fork(35)
        drafted.truncate(34)
        assert drafted.accept([50]) == 0 and fork.length == 34
        with pytest.raises(pyengine.InvalidArgumentError, match="before others"):
            context.forward([1, 2, 3], [fork, drafted, fork], bytes(3), drafted=b"\1\0\0")
        with pytest.raises(ValueError, match="drafted"):
            context.forward([1], [fork], b"\0", drafted=b"")
        context.check()

    plain.exclusively(run)


def test_a_chain_of_rows_is_sampled_like_single_ones() -> None:
    """Same tokens, same log-probabilities, same history; it ends after the first surprise."""
    rng = np.random.default_rng(3)
    p = SamplingParams(temperature=1.0, frequency_penalty=1.0, repetition_penalty=1.2, logprobs=2, seed=3).resolve()
    rows = rng.normal(0, 2, (8, 90)).astype(np.float32)
    single = _sampler.Sampler(p, 90)
    for i, row in enumerate(rows):
        _sampler.sample_many(row[None], [0], [single], [i])
    for n_right in range(8):
        for n_threads in (1, 2):
            draft = [*single.outputs[:n_right], *[(token + 1) % 90 for token in single.outputs[n_right:7]]]
            chained, beside = _sampler.Sampler(p, 90), _sampler.Sampler(p, 90, sample_index=1)
            errors = _sampler.sample_many(
                rows, [0, 0], [beside, chained], [0, 0], drafts=[(), draft], n_threads=n_threads
            )
            assert errors == [None, None] and len(beside.outputs) == 1
            assert chained.outputs == single.outputs[: n_right + 1]
            assert chained.logprobs is not None and chained.logprobs == (single.logprobs or [])[: n_right + 1]
    rows[2][5] = np.nan
    chained = _sampler.Sampler(p, 90)
    errors = _sampler.sample_many(rows, [0], [chained], [0], drafts=[single.outputs[:7]])
    assert isinstance(errors[0], pyengine.NotFiniteError) and chained.outputs == single.outputs[:2]
    for drafts, message in (([single.outputs], "rows 0 to 8 of 8"), ([(1, 2)] * 2, "differ in length")):
        with pytest.raises(ValueError, match=message):
            _sampler.sample_many(rows, [0], [chained], [0], drafts=drafts)


# ------------------------------------------------------------------ what is guessed, and how much


def proposed(drafter: _draft.Drafter, most: int = 24) -> list[int]:
    return [token for token, _ in drafter.propose(most)]


def test_a_text_that_repeats_is_guessed(plain: Engine) -> None:
    period = list(range(100, 120))
    drafter = _draft.Drafter(_draft.DraftStats(), [*period, *period, *period[:5]])
    assert proposed(drafter, 10) == period[5:15]
    drafter.read([1, 2, *period[5:8]])
    assert proposed(drafter, 4) == period[8:12]
    assert proposed(_draft.Drafter(_draft.DraftStats(), [1, 2, 3])) == []
    assert proposed(drafter, 0) == []


def test_the_longest_context_decides() -> None:
    prompt = [1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 8, 3, 4, 70, 7, 4, 80, 1, 2, 3, 4]
    assert proposed(_draft.Drafter(_draft.DraftStats(), prompt), 1) == [60]  # after 2, 3, 4 last time


def test_other_texts_teach_and_other_salts_do_not() -> None:
    stats, store = _draft.DraftStats(), _draft.Ngrams(1000)
    words = list(range(200, 230))
    first = _draft.Drafter(stats, [1], store)
    first.read(words)
    assert proposed(_draft.Drafter(stats, words[:4], store), 5) == words[4:9]
    assert proposed(_draft.Drafter(stats, words[:4], _draft.Ngrams(1000)), 5) == []
    assert proposed(_draft.Drafter(stats, words[:4]), 5) == []
    prompt_only = _draft.Drafter(stats, words, store := _draft.Ngrams(1000))
    assert proposed(prompt_only, 3) == [] and proposed(_draft.Drafter(stats, words[:4], store), 5) == []


def test_tables_forget_and_do_not_grow() -> None:
    """A hundred thousand tokens in room for a few: the newest are known."""
    rng = random.Random(1)
    drafter = _draft.Drafter(_draft.DraftStats(), [rng.randrange(50_000) for _ in range(100_000)], n_tokens=1)
    tail = list(range(300, 340))
    drafter.read(tail + tail[:10])
    assert proposed(drafter, 8) == tail[10:18]


def test_drafts_are_as_long_as_pays() -> None:
    period = list(range(100, 120))
    cheap, dear = costs(dict.fromkeys(range(1, 65), 1.0)), costs({rows: float(rows) for rows in range(1, 65)})
    for stats, least, most in ((cheap, 20, 24), (_draft.DraftStats(), 4, 24), (dear, 0, 0)):
        drafter = _draft.Drafter(stats, period * 8)
        (draft,) = _draft.plan(stats, [drafter], [24], 1)
        assert least <= len(draft) <= most and list(draft) == (period * 2)[: len(draft)]
    assert _draft.plan(cheap, [_draft.Drafter(cheap, period * 8)], [3], 1) == [tuple(period[:3])]
    assert _draft.plan(cheap, [_draft.Drafter(cheap, period * 8)], [24], 64) == [()]
    assert _draft.plan(cheap, [], [], 1) == []


def test_guesses_that_fail_stop_and_come_back_when_they_would_be_right() -> None:
    """No step is spent on trying: every token says what a draft would have been worth."""
    stats = _draft.DraftStats()
    rng = random.Random(2)
    drafter = _draft.Drafter(stats, [7, 8] * 40)
    outputs: list[int] = []
    for _ in range(150):  # after 7 comes 8, says the prompt; it never does
        outputs += [7, rng.randrange(1000, 2000)]
        drafter.read(outputs)
    drafter.read([*outputs, 7])
    assert _draft.plan(stats, [drafter], [24], 1) == [()]
    outputs = [*outputs, 7, *list(range(100, 120)) * 6]
    drafter.read(outputs)
    assert len(_draft.plan(stats, [drafter], [24], 1)[0]) > 3


def test_what_steps_cost_is_learnt_whatever_slows_all_of_them() -> None:
    rng = random.Random(3)
    stats = _draft.DraftStats()
    for i in range(4000):
        rows = rng.choice((1, 1, 2, 8, 16))
        load = 1.0 if i % 400 < 300 else 2.5  # now and then somebody else wants the machine
        stats.note_step(rows, load * (1.0 + 0.3 * (rows - 1)) * rng.uniform(0.95, 1.05))
        if i % 50 == 0:  # a prompt, and a step that finds cold memory
            stats.note_step(0, 100.0)
            stats.note_step(1, 30.0)
    learnt = stats.step_costs()
    for rows in (2, 8, 16):
        assert learnt[rows - 1] / learnt[0] == pytest.approx(1.0 + 0.3 * (rows - 1), rel=0.25)
    for seconds in (0.0, -1.0, float("nan")):
        stats.note_step(1, seconds)
    stats.note_step(65, 1.0)
    assert stats.step_costs() == learnt


def test_nothing_is_drafted_beyond_an_end() -> None:
    assert until_end((1, 2, 3), frozenset({3})) == (1, 2)
    assert until_end((3, 2), frozenset({3})) == ()
    assert until_end((1, 2), frozenset()) == (1, 2)


# ------------------------------------------------------------------ the engine's own drafts


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 0.8, "n": 4}, {"temperature": 0, "frequency_penalty": 0.5}]
)
def test_what_the_engine_drafts_changes_no_byte(tiny_model: Path, plain: Engine, options: dict[str, Any]) -> None:
    prompt = list(range(5, 25)) * 5
    options = {"seed": 1, "ignore_eos": True, "max_tokens": 200, **options}
    expected = without(plain, prompt, **options)
    with Engine(tiny_model) as engine:
        # as if rows were free, so that something is drafted whatever the machine does
        stats = costs(dict.fromkeys(range(1, 65), 1.0))
        engine._scheduler.speculation.stats = stats
        engine._scheduler.speculation.note_step = lambda n_rows, seconds: None  # type: ignore[method-assign]
        for _ in range(2):
            results = engine.generate([prompt], **options)
            assert [said(result) for result in results] == [said(result) for result in expected]
        assert sum(result.timings.drafted_tokens for result in results) > 0
        assert sum(result.timings.accepted_tokens for result in results) > 0  # it said all this before
        shown = results[0].to_dict()["timings"]
        assert shown["drafted_tokens"] == results[0].timings.drafted_tokens
        off = engine.generate([prompt], speculative="off", **options)
        assert all(result.timings.drafted_tokens == 0 for result in off)
        check(engine)


def test_options(tiny_model: Path) -> None:
    assert SamplingParams(speculative="off").resolve().speculative == Drafting(0)
    assert SamplingParams(speculative={"max_draft": 3, "store": False}).resolve().speculative == Drafting(3, False)
    assert SamplingParams().resolve(speculative=Drafting(2)).speculative == Drafting(2)
    assert SamplingParams(speculative=Drafting(5)).speculative == Drafting(5)
    for wrong in ("on", None, {"max_draft": 99}, 3):
        with pytest.raises(pyengine.InvalidArgumentError, match="speculative"):
            Engine(tiny_model, speculative=wrong)  # type: ignore[arg-type]
    with Engine(tiny_model, speculative={"max_draft": 2}) as engine:
        assert engine.stream(PROMPT).request.params.speculative == Drafting(2)
        assert engine.stream(PROMPT, speculative="off").request.params.speculative == Drafting(0)
