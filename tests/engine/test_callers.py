"""Many callers of one engine, each in its own thread: who steps, who waits, what becomes of what one of them gives up."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import pytest
from engine.scheduler_tools import SAMPLED, Recorder, record, text

import pyengine
from pyengine import Engine, SamplingParams
from pyengine.run.request import Caller
from pyengine.run.stream import run_all


def test_threads_share_their_steps(engine: Engine) -> None:
    """Eight callers of eight threads are a batch of eight, from the first step on in which all are there."""
    expected = [engine.generate(text(i, 10), max_tokens=30, **SAMPLED).tokens for i in range(8)]
    recorder = record(engine)
    got: dict[int, list[int]] = {}

    def forward(*args: Any, **options: Any) -> bytes:
        while not recorder.steps and len(engine._scheduler._requests) < 8:
            time.sleep(0.001)
        return Recorder.forward(recorder, *args, **options)

    recorder.forward = forward  # type: ignore[method-assign]

    def work(i: int) -> None:
        got[i] = engine.generate(text(i, 10), max_tokens=30, **SAMPLED).tokens

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(8)] == expected
    # one prompt or some, then the other prompts beside them, then tokens; the first to begin may end a step earlier
    assert len(recorder.steps) <= 32 and max(n for _, n in recorder.steps) == 8


def test_aborting_from_another_thread_ends_the_forward(engine: Engine) -> None:
    """A stream closed by one thread while another one waits inside of its prefill."""
    blocked = threading.Event()
    go_on = threading.Event()
    context = engine._scheduler.context

    class Slow(Recorder):
        def forward(self, *args: Any, **options: Any) -> bytes:
            blocked.set()
            go_on.wait(60)
            return context.forward(*args, **options)

    engine._scheduler.context = Slow(context)  # type: ignore[assignment]
    stream = engine.stream(text(1, 300), max_tokens=3, **SAMPLED)
    seen: list[object] = []

    def read() -> None:
        seen.extend(piece.token for piece in stream)

    thread = threading.Thread(target=read)
    thread.start()
    assert blocked.wait(60)
    stream.close()
    go_on.set()
    thread.join(60)
    assert not thread.is_alive() and seen == []


@pytest.mark.parametrize("when", ["wants", "tokens"])
def test_a_prompt_aborted_just_before_its_forward_is_not_computed(engine: Engine, when: str) -> None:
    """When it has been granted, or when the batch is put together."""
    cancelled: list[bool] = []

    class Noting(Recorder):
        def forward(self, *args: Any, **options: Any) -> bytes:
            try:
                return super().forward(*args, **options)
            except pyengine.CancelledError:
                cancelled.append(True)
                raise

    engine._scheduler.context = recorder = Noting(engine._scheduler.context)  # type: ignore[assignment]
    stream = engine.stream(text(1, 300), max_tokens=3, **SAMPLED)
    ask = getattr(stream.request, when)

    def close_and_ask(begin: int, end: int) -> Any:
        if stream.request.sequence is not None:  # it has started
            stream.close()
        return ask(begin, end)

    setattr(stream.request, when, close_and_ask)
    with pytest.raises(StopIteration):
        next(stream)
    assert len(recorder.steps) == len(cancelled)
    assert engine.check_integrity()["n_cached"] == 0


def test_whoever_waits_looks_again_when_a_request_is_aborted(engine: Engine) -> None:
    """At once, not when whoever leads has something to tell."""
    recorder, scheduler = record(engine), engine._scheduler
    stream = engine.stream(text(1, 8))
    looks, is_over, alive = threading.Semaphore(0), threading.Event(), []

    def ready() -> bool:
        is_ready = is_over.is_set()
        looks.release()
        return is_ready

    waiting = threading.Thread(target=scheduler.wait, args=(ready,))

    def forward(*args: Any, **options: Any) -> bytes:
        if not recorder.steps:
            waiting.start()
            looks.acquire()
            is_over.set()
            scheduler.abort([stream.request])
            waiting.join(60)
            alive.append(waiting.is_alive())
        return Recorder.forward(recorder, *args, **options)

    recorder.forward = forward  # type: ignore[method-assign]
    engine.generate(text(1, 8), max_tokens=3, **SAMPLED)
    waiting.join()
    assert alive == [False]


def test_an_abort_while_another_is_swept_is_swept_too(engine: Engine) -> None:
    first, second = (engine.stream(text(i, 8), max_tokens=30, **SAMPLED) for i in range(2))
    next(first), next(second)
    let_go = second.request.let_go

    def and_the_first() -> None:
        first.close()
        let_go()

    second.request.let_go = and_the_first  # type: ignore[method-assign]
    second.close()
    assert first.request.sequence is None and second.request.sequence is None


def test_an_abort_beside_a_call_that_fails_is_swept(engine: Engine) -> None:
    stream = engine.stream(text(1, 8), max_tokens=30, **SAMPLED)
    next(stream)

    def fail(_: object) -> None:
        stream.close()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.exclusively(fail)
    assert stream.request.sequence is None


def test_the_garbage_collector_may_abort_in_the_middle_of_a_sweep(engine: Engine) -> None:
    """It runs where something is allocated: here a stream of a cycle ends at each of these places in turn."""
    scheduler, threshold = engine._scheduler, gc.get_threshold()
    others = [engine.stream(text(i, 4)) for i in range(40)]
    scheduler.add([stream.request for stream in others])
    gc.collect()
    gc.freeze()  # a collection looks at what is made from here on, not at all that the tests before have left
    try:
        for n in range(100):
            gc.collect()
            gc.disable()
            lost = engine.stream(text(50, 4))
            lost._is_added = True
            scheduler.add([lost.request])
            cycle: list[object] = [lost]
            cycle.append(cycle)
            del lost, cycle
            gc.set_threshold(gc.get_count()[0] + n)
            gc.enable()
            engine.exclusively(lambda _: scheduler.sweep())
    finally:
        gc.unfreeze()
        gc.set_threshold(*threshold)
        gc.enable()
        scheduler.abort([stream.request for stream in others])


@pytest.mark.parametrize("wants", ["a look at the books", "a fork"])
def test_the_lock_is_given_to_others_between_two_steps(engine: Engine, wants: str) -> None:
    """A thread that generates computes step after step: who needs the lock for something else waits for one of them."""
    recorder, lock = record(engine), engine._scheduler.step_lock
    seen: list[int] = []

    def other() -> None:
        if wants == "a fork":
            lock.acquire()
            seen.append(len(recorder.steps))
            lock.release()
        else:
            engine.exclusively(lambda _: seen.append(len(recorder.steps)))

    thread = threading.Thread(target=other)

    def forward(*args: Any, **options: Any) -> bytes:
        if len(recorder.steps) == 2:
            thread.start()
            while not lock.is_wanted:
                time.sleep(0.001)
        return Recorder.forward(recorder, *args, **options)

    recorder.forward = forward  # type: ignore[method-assign]
    engine.generate(text(1, 8), max_tokens=9, **SAMPLED)
    thread.join()
    assert seen == [3] and len(recorder.steps) == 9


def test_what_runs_under_the_lock_cannot_ask_for_it_again(engine: Engine) -> None:
    """A signal handler that ran in the middle of a step would find it half done."""
    with pytest.raises(pyengine.PyEngineError, match="in this very thread"):
        engine.exclusively(lambda _: engine.cache_stats())


def test_a_request_whose_caller_nobody_holds_ends_with_an_error(engine: Engine) -> None:
    """It is not computed, and whoever waits for it does not wait for ever."""
    params = engine.resolve(SamplingParams(max_tokens=3, **SAMPLED))
    with pytest.raises(pyengine.PyEngineError, match="nobody holds this request's caller"):
        run_all(engine.scheduler, engine.requests(Caller(), [text(1, 8)], params))
    search, lanes = engine.beam_requests(Caller(), text(1, 8), beam_width=2)
    with pytest.raises(pyengine.PyEngineError, match="nobody holds this request's caller"):
        run_all(engine.scheduler, lanes)
    assert search.is_done


def test_a_stream_is_read_by_one_thread_at_a_time(engine: Engine) -> None:
    """The others are told so, and the one that reads goes on."""
    expected = engine.generate(text(1, 8), max_tokens=5, **SAMPLED).tokens
    recorder, stream = record(engine), engine.stream(text(1, 8), max_tokens=5, **SAMPLED)
    refused: list[str] = []

    def read() -> None:
        try:
            next(stream)
        except pyengine.PyEngineError as error:
            refused.append(str(error))

    def forward(*args: Any, **options: Any) -> bytes:
        other = threading.Thread(target=read)  # while this thread waits for the piece of this step
        other.start()
        other.join()
        return Recorder.forward(recorder, *args, **options)

    recorder.forward = forward  # type: ignore[method-assign]
    assert [piece.token for piece in stream] == expected
    assert len(refused) == 5 and all("another thread" in one for one in refused)


def test_a_stream_may_be_read_by_one_thread_after_the_other(engine: Engine) -> None:
    expected = engine.generate(text(1, 8), max_tokens=5, **SAMPLED).tokens
    stream, got = engine.stream(text(1, 8), max_tokens=5, **SAMPLED), list[int]()
    for _ in range(5):
        thread = threading.Thread(target=lambda: got.append(next(stream).token))
        thread.start()
        thread.join()
    assert got == expected
