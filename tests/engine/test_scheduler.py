"""The scheduler: who gets which tokens when, and that nobody can tell from the output."""

from __future__ import annotations

import gc
import random
import zlib
from pathlib import Path
from typing import Any

import pytest
from engine.scheduler_tools import SAMPLED, Recorder, record, text

import pyengine
from pyengine import Engine, SamplingParams, _core
from pyengine.format.kv import KvLayout
from pyengine.run import output
from pyengine.run import scheduler as scheduling
from pyengine.run.pages import max_pages
from pyengine.run.request import Caller, RowsRequest

PAGE = 256


# ------------------------------------------------------------------ one rule


def test_a_prompt_is_one_step_and_every_token_another(engine: Engine) -> None:
    recorder = record(engine)
    engine.generate(text(1, 100), max_tokens=5, **SAMPLED)
    assert recorder.steps == [(100, 1), (1, 1), (1, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize("options", [{}, {"stop": "never said"}])
def test_text_that_nobody_needs_is_read_at_its_end(engine: Engine, options: dict[str, Any]) -> None:
    """A stop string needs it, token by token."""
    params, caller = SamplingParams(max_tokens=5, **options, **SAMPLED), Caller()
    expected = engine.generate(text(1, 8), params)
    (request,) = engine.requests(caller, [text(1, 8)], engine.resolve(params))
    engine.scheduler.add([request])
    for n in range(1, 5):
        engine.exclusively(lambda _: engine.scheduler.step())
        assert request.sampler.outputs == expected.tokens[:n]
        assert len(request.output.pieces) == (n if options else 0) and not request.is_done
    engine.exclusively(lambda _: engine.scheduler.step())
    assert (request.result.text, request.result.tokens) == (expected.text, expected.tokens)
    assert "".join(piece.text for piece in request.output.pieces) == expected.text and len(request.output.pieces) == 5


def test_the_end_of_a_long_text_is_no_long_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads a stream beside it would wait for all of its text to be read."""
    monkeypatch.setattr(output, "READ_AT_ONCE", 4)
    params, caller = SamplingParams(max_tokens=11, **SAMPLED), Caller()
    expected = engine.generate(text(1, 8), params)
    (request,) = engine.requests(caller, [text(1, 8)], engine.resolve(params))
    engine.scheduler.add([request])
    for n in range(1, 11):
        engine.exclusively(lambda _: engine.scheduler.step())
        assert len(request.output.pieces) == n // 4 * 4
    engine.exclusively(lambda _: engine.scheduler.step())
    assert (request.result.text, request.result.tokens) == (expected.text, expected.tokens)


def test_all_logits_of_a_forward_are_one_buffer(engine: Engine) -> None:
    def check(context: _core.Context) -> None:
        with pytest.raises(BufferError, match="a later forward replaced it"):
            memoryview(context.logits())
        for n in (1, 3):
            sequence = context.sequence_new()
            context.forward(text(2, n), [sequence] * n, b"\1" * n)
            with memoryview(context.logits()) as view:
                assert view.shape == (n, engine.vocab_size) and view.readonly
                assert view.tobytes() == b"".join(bytes(context.logits(row)) for row in range(n))
                with pytest.raises(BufferError, match="still held"):
                    context.forward([3], [sequence], b"\1")
            if n > 1:  # there is a gap between two rows
                with pytest.raises(BufferError, match="not contiguous"):
                    zlib.crc32(context.logits())
            for row in (-1, n):
                with pytest.raises(IndexError):
                    context.logits(row)

    engine.exclusively(check)


def test_prompts_of_one_call_share_their_steps(engine: Engine) -> None:
    recorder = record(engine)
    engine.generate([text(i, 30) for i in range(5)], max_tokens=4, **SAMPLED)
    assert recorder.steps == [(150, 5), (5, 5), (5, 5), (5, 5)]


def test_a_step_with_a_prompt_is_none_of_decodes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though what is left of the budget is one token for the last prompt: what steps cost is learned of decodes alone."""
    noted: list[int] = []
    monkeypatch.setattr(scheduling, "BUDGET", 9)
    monkeypatch.setattr(engine.scheduler.speculation, "note_step", lambda n_rows, _: noted.append(n_rows))
    recorder = record(engine)
    engine.generate([text(1, 8), text(2, 5)], max_tokens=2, **SAMPLED)
    assert recorder.steps == [(9, 2), (5, 2), (1, 1)] and noted == [0, 0, 1]


def test_a_long_prompt_comes_in_pieces_beside_a_stream(engine: Engine) -> None:
    """Between two tokens of somebody who reads along lies at most one budget of somebody's prompt."""
    stream = engine.stream(text(1, 8), max_tokens=60, **SAMPLED)
    next(stream)
    recorder = record(engine)
    engine.generate(text(2, 500), max_tokens=1, **SAMPLED)
    budget = scheduling.BUDGET_BESIDE_STREAMS
    assert all(n_tokens <= budget + 1 and n_sequences == 2 for n_tokens, n_sequences in recorder.steps)
    assert sum(n_tokens - 1 for n_tokens, _ in recorder.steps) == 500
    assert len(stream.request.output.pieces) == 1 + len(recorder.steps)  # it went on all the while
    list(stream)


def test_score_and_logits_let_streams_go_on_too(engine: Engine) -> None:
    stream = engine.stream(text(1, 8), max_tokens=60, **SAMPLED)
    next(stream)
    recorder = record(engine)
    alone = engine.score(text(2, 400))
    assert max(n_tokens for n_tokens, _ in recorder.steps) <= scheduling.BUDGET_BESIDE_STREAMS + 1
    assert len(stream.request.output.pieces) == 1 + len(recorder.steps)
    stream.close()
    assert engine.score(text(2, 400)) == alone


def test_a_stream_that_nobody_reads_pauses(engine: Engine) -> None:
    stream = engine.stream(text(1, 8), max_tokens=400, **SAMPLED)
    next(stream)
    engine.generate(text(2, 8), max_tokens=200, **SAMPLED)
    assert len(stream.request.output.pieces) < 50
    rest = [piece.token for piece in stream]
    assert len(rest) == 399


def test_a_stream_that_nobody_holds_is_not_computed(engine: Engine) -> None:
    stream = engine.stream(text(1, 8), max_tokens=400, **SAMPLED)
    next(stream)
    request = stream.request
    del stream
    gc.collect()
    n_pieces = len(request.output.pieces)
    engine.generate(text(2, 8), max_tokens=20, **SAMPLED)
    assert len(request.output.pieces) == n_pieces and request.sequence is None


# ------------------------------------------------------------------ shared beginnings


def test_prompts_of_one_call_compute_their_common_beginning_once(engine: Engine) -> None:
    beginning = text(1, 300)
    prompts = [beginning + text(i, 20) for i in range(2, 10)]
    recorder = record(engine)
    together = engine.generate(prompts, max_tokens=4, **SAMPLED)
    computed = sum(n_tokens for n_tokens, _ in recorder.steps)
    assert computed <= 300 + 8 * (20 + 4)
    assert [result.timings.cached_tokens for result in together[1:]] == [300] * 7
    engine.clear_cache()
    assert [result.tokens for result in together] == [
        engine.generate(prompt, max_tokens=4, **SAMPLED).tokens for prompt in prompts
    ]


def test_samples_of_one_prompt_compute_it_once(engine: Engine) -> None:
    recorder = record(engine)
    engine.generate(text(1, 200), n=6, max_tokens=3, **SAMPLED)
    assert sum(n_tokens for n_tokens, _ in recorder.steps) <= 200 + 6 * 3


def test_another_salt_shares_nothing(engine: Engine) -> None:
    prompt = text(1, 300)
    first = engine.generate(prompt, max_tokens=3, cache_salt="a", **SAMPLED)
    assert engine.generate(prompt, max_tokens=3, cache_salt="a", **SAMPLED).timings.cached_tokens == 299
    for salt in ("b", None):
        other = engine.generate(prompt, max_tokens=3, cache_salt=salt, **SAMPLED)
        assert other.timings.cached_tokens == 0 and other.tokens == first.tokens
    assert engine.stream(prompt, cache_salt="a", **SAMPLED).request.salt != bytes(16)
    with pytest.raises(pyengine.InvalidArgumentError, match="cache_salt"):
        engine.generate(prompt, cache_salt="", **SAMPLED)


def test_a_conversation_that_goes_on_is_found_and_the_old_one_stays(engine: Engine) -> None:
    first = engine.generate(text(1, 280), max_tokens=10, **SAMPLED)
    both = text(1, 280) + first.tokens
    regenerated = engine.generate(text(1, 290), max_tokens=3, **SAMPLED)  # another text from position 280 on
    assert regenerated.timings.cached_tokens >= 280
    continued = engine.generate(both + text(5, 9), max_tokens=3, **SAMPLED)
    assert continued.timings.cached_tokens == 289


@pytest.mark.parametrize("n_requests", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_requests_over_shared_beginnings(tiny_model: Path, n_requests: int) -> None:
    """Batches, streams left half way, scores, two salts, and a cache so small that pages are evicted all the time:
    every answer is the one of an engine that never saw anything else."""
    rng = random.Random(7)
    beginnings = [text(i, 300) for i in range(3)]
    beginnings.append(beginnings[0][:256] + text(9, 200))
    prompts = [
        rng.choice(beginnings)[: rng.choice((1, 20, 255, 256, 257, 300))] + text(100 + i, rng.choice((1, 3, 40)))
        for i in range(40)
    ]
    with Engine(tiny_model, n_threads=1) as cold:
        expected = []
        for prompt in prompts:
            cold.clear_cache()
            expected.append(cold.generate(prompt, max_tokens=4, **SAMPLED).tokens)
    page_bytes = cold_page_bytes(tiny_model)
    with Engine(tiny_model, n_threads=1, max_kv_bytes=6 * page_bytes, max_sequences=3) as engine:
        done = 0
        while done < n_requests:
            chosen = [rng.randrange(len(prompts)) for _ in range(rng.choice((1, 1, 2, 5)))]
            salt = rng.choice((None, None, "other"))
            if rng.random() < 0.2:
                stream = engine.stream(prompts[chosen[0]], max_tokens=4, cache_salt=salt, **SAMPLED)
                read = [next(stream).token for _ in range(rng.randrange(1, 4))]
                assert read == expected[chosen[0]][: len(read)]
                if rng.random() < 0.5:
                    stream.close()
            results = engine.generate([prompts[i] for i in chosen], max_tokens=4, cache_salt=salt, **SAMPLED)
            assert [result.tokens for result in results] == [expected[i] for i in chosen]
            done += len(chosen)
            if done % 50 < len(chosen):
                stats = engine.check_integrity()
                assert stats["n_pages"] <= 6
        assert stats["n_evicted"] > n_requests / 20


def cold_page_bytes(path: Path) -> int:
    with Engine(path) as engine:
        return engine.cache_stats()["page_bytes"]


# ------------------------------------------------------------------ limits


def test_more_sequences_than_allowed_wait(tiny_model: Path) -> None:
    prompts = [text(i, 10) for i in range(9)]
    with Engine(tiny_model, max_sequences=2) as engine:
        recorder = record(engine)
        results = engine.generate(prompts, max_tokens=3, **SAMPLED)
        assert max(n_sequences for _, n_sequences in recorder.steps) == 2
    with Engine(tiny_model) as engine:
        assert [r.tokens for r in results] == [r.tokens for r in engine.generate(prompts, max_tokens=3, **SAMPLED)]


def test_requests_that_do_not_fit_the_pages_wait_or_are_computed_again(tiny_model: Path) -> None:
    """Four texts of two pages each, and room for three pages: each grows over its first page while others run."""
    prompts = [text(i, 240) for i in range(4)]
    with Engine(tiny_model) as engine:
        expected = [result.tokens for result in engine.generate(prompts, max_tokens=40, **SAMPLED)]
    with Engine(tiny_model, max_kv_bytes=1) as engine:  # less than one context: one context is granted
        per_context = -(-engine.n_ctx // PAGE)
        assert engine.cache_stats()["max_pages"] == per_context + 1 == 3
        recorder = record(engine)
        results = engine.generate(prompts, max_tokens=40, **SAMPLED)
        assert [result.tokens for result in results] == expected
        assert max(n_sequences for _, n_sequences in recorder.steps) > 1
        assert engine.check_integrity()["n_pages"] <= 3


def test_a_paused_stream_gives_way_and_goes_on(tiny_model: Path) -> None:
    with Engine(tiny_model, max_sequences=1) as engine:
        expected = [piece.token for piece in engine.stream(text(1, 8), max_tokens=120, **SAMPLED)]
        stream = engine.stream(text(1, 8), max_tokens=120, **SAMPLED)
        got = [next(stream).token]
        assert engine.generate(text(2, 8), max_tokens=90, **SAMPLED).finish_reason == "length"
        assert got + [piece.token for piece in stream] == expected


def test_default_pages() -> None:
    sizes = {"layout": KvLayout(1 << 20, 0, 0), "n_ctx": 8192, "n_step": 1024, "max_sequences": 16}
    assert max_pages(None, **sizes) == 4 * 32
    assert max_pages(None, **{**sizes, "n_ctx": 256}) == 2 * 16
    assert max_pages(50 << 20, **sizes) == 50
    assert max_pages(1, **sizes) == 33
    assert max_pages(None, **{**sizes, "layout": KvLayout(1 << 60, 0, 0)}) == 33


# ------------------------------------------------------------------ rows that fail, and rows of a text


def test_a_bad_row_ends_its_own_request(tiny_model: Path) -> None:
    """The core says which rows failed; here it is told to say so of one sequence."""
    prompts = [text(i, 12) for i in range(3)]
    with Engine(tiny_model) as engine:
        expected = engine.generate(prompts[0], max_tokens=5, **SAMPLED).tokens
        context = engine._scheduler.context

        class Failing(Recorder):
            def forward(self, tokens: list[int], sequences: list[Any], wants: bytes, **options: Any) -> bytes:
                super().forward(tokens, sequences, wants, **options)
                bad = [sequence.tokens()[0] == prompts[1][0] for sequence in sequences]
                return bytes(bad) if any(bad) else b""

        engine._scheduler.context = Failing(context)  # type: ignore[assignment]
        assert prompts[0][0] != prompts[1][0]
        good = engine.stream(prompts[0], max_tokens=5, **SAMPLED)
        got = [next(good).token]
        with pytest.raises(pyengine.NotFiniteError):
            engine.generate(prompts[1], max_tokens=5, **SAMPLED)
        assert got + [piece.token for piece in good] == expected
        assert engine.check_integrity()["n_sequences"] == 0


def test_rows_are_taken_once_though_their_sequence_had_to_make_room(tiny_model: Path) -> None:
    """What is computed again is computed for its keys and values only."""
    tokens, positions = text(3, 400), [*range(0, 400, 3), 399]

    def run(interrupted: bool) -> list[tuple[int, bytes]]:
        taken: list[tuple[int, bytes]] = []
        with Engine(tiny_model, n_threads=1) as engine:
            scheduler, caller = engine.scheduler, Caller()
            request = RowsRequest(
                caller, tokens, positions, lambda position, row: taken.append((position, bytes(row))), max_rows=40, salt=bytes(16)
            )
            scheduler.add([request])
            while not request.is_done:
                engine.exclusively(lambda _: scheduler.step())
                if interrupted and request.n_taken in (40, 80):
                    request.sequence = None  # as _make_room does; its pages are not kept
            assert request.error is None
        return taken

    whole = run(False)
    assert [position for position, _ in whole] == positions
    assert run(True) == whole
