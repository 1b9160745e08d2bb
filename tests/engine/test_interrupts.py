"""No exception, wherever it falls, changes a later byte or loses a sequence.

Two harnesses: one raises KeyboardInterrupt at every bytecode of a call, one sends real signals at random times. After each,
the engine's counts must be right (check_integrity), and whatever is asked next must be what a fresh engine says.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine.draft_heads import with_random_head
from engine.scripted_drafts import drafts_of, script
from engine.speculation_tools import always_guess

import pyengine
from pyengine import Engine, _core, fork
from pyengine.format.reader import FrozenFile

PROMPT = [3 + i * 7 % 50 for i in range(40)]
OPTIONS: dict[str, Any] = {"temperature": 1.0, "seed": 11, "max_tokens": 3, "ignore_eos": True, "logprobs": 1}
PACKAGE = os.path.dirname(pyengine.__file__)


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[Engine]:
    with Engine(tiny_model, n_threads=1) as engine:
        yield engine


def say(engine: Engine, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Tokens, and their log-probabilities to the last bit: wrong keys would show there first."""
    result = engine.generate(prompt, **OPTIONS)
    assert result.logprobs is not None
    return result.tokens, [entry.logprob for entry in result.logprobs]


# ------------------------------------------------------------------ an exception at every bytecode


def interrupt_at(number: int, call: Callable[[], object]) -> tuple[bool, int]:
    """Run call() and raise KeyboardInterrupt before its `number`-th bytecode inside the package (negative: never). Returns
    whether that happened, and how many there were."""
    count = 0

    def trace(frame: types.FrameType, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            count += 1
            if count == number + 1:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True, count
    finally:
        sys.settrace(None)
        # No signal falls between the end of a with block and its exit, but this exception does. The engine's locks go with the
        # engine; this one is the process's, and other threads would wait for it for ever.
        while fork.importing._is_owned():  # type: ignore[attr-defined]
            fork.importing.release()
    return False, count


def read_stream(engine: Engine) -> None:
    for _ in engine.stream(PROMPT, **OPTIONS):
        pass


def leave_a_stream(engine: Engine) -> None:
    stream = engine.stream(PROMPT, **OPTIONS)
    next(stream)
    stream.close()


def search(engine: Engine) -> None:
    """Two beams, which begin and fork."""
    beams = engine.beam_search(PROMPT, beam_width=2, n=2, max_tokens=3)
    assert [beam.cumulative_logprob for beam in beams] == beams_of(engine.path)


@functools.cache
def beams_of(path: Path) -> list[float]:
    with Engine(path, n_threads=1) as fresh:
        return [beam.cumulative_logprob for beam in fresh.beam_search(PROMPT, beam_width=2, n=2, max_tokens=3)]


GUIDED: dict[str, Any] = {"beam_width": 2, "n": 2, "max_tokens": 3, "structured_outputs": {"regex": "[ab]c|[ab]d+"}}


def search_guided(engine: Engine) -> None:
    """Two beams, each along a grammar of its own text."""
    pytest.importorskip("llguidance", reason="the extra guide is not installed")
    beams = engine.beam_search(PROMPT, **GUIDED)
    assert {(beam.text, beam.finish_reason) for beam in beams} == guided_beams_of(engine.path)


@functools.cache
def guided_beams_of(path: Path) -> set[tuple[str, str]]:
    with Engine(path, n_threads=1) as fresh:
        return {(beam.text, beam.finish_reason) for beam in fresh.beam_search(PROMPT, **GUIDED)}


GUESSED = {**OPTIONS, "max_tokens": 8}


@functools.cache
def text_without_guesses(path: Path) -> list[int]:
    with Engine(path, n_threads=1, speculative="off") as fresh:
        return fresh.generate(PROMPT, **GUESSED).tokens


def guess(engine: Engine) -> None:
    """Drafts that are right for a while, then wrong."""
    texts = {(tuple(PROMPT), 0): text_without_guesses(engine.path)}
    script(engine, texts, drafts_of("mixed", seed=2, vocab_size=50))
    assert engine.generate(PROMPT, **GUESSED).tokens == texts[tuple(PROMPT), 0]


def guess_by_model(engine: Engine) -> None:
    """A draft model (the model itself) that runs ahead whenever it may."""
    speculation = engine.scheduler.speculation
    if speculation.proposer is None:
        speculation.add_model(_core.Context(engine._model, n_threads=1), engine.n_ctx)
        always_guess(speculation, 4)
    assert engine.generate(PROMPT, **GUESSED).tokens == text_without_guesses(engine.path)


@functools.cache
def headed(path: Path) -> FrozenFile:
    """The model with a draft head, whose file stays open."""
    return FrozenFile.open(with_random_head(path, path.with_name("headed.safetensors"), overwrite=True))


def guess_by_head(engine: Engine) -> None:
    """A draft head that runs ahead whenever it may."""
    speculation = engine.scheduler.speculation
    if speculation.proposer is None:
        file = headed(engine.path)
        model = _core.Model(file.config, file.buffer, file.weights, 1)
        assert file.config.draft_head is not None
        speculation.add_head(_core.DraftHead(model, file.config.draft_head, file.draft_weights, 1))
        always_guess(speculation, 4)
    assert engine.generate(PROMPT, **GUESSED).tokens == text_without_guesses(engine.path)


CALLS: dict[str, Callable[[Engine], object]] = {
    "generate": lambda engine: engine.generate(PROMPT, **OPTIONS),
    "beams": search,
    "guided beams": search_guided,
    "two samples": lambda engine: engine.generate([PROMPT, PROMPT[:30]], n=2, **OPTIONS),
    "stream": read_stream,
    "closed stream": leave_a_stream,
    "drafts": guess,
    "draft model": guess_by_model,
    "draft head": guess_by_head,
    "score": lambda engine: engine.score(PROMPT),
}


# An exception that falls into __del__ is printed, and no more.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", CALLS)
def test_an_exception_at_any_bytecode_changes_nothing(
    tiny_model: Path, engine: Engine, name: str, request: pytest.FixtureRequest
) -> None:
    """Some four hundred bytecodes, or with --run-slow every one."""
    with Engine(tiny_model, n_threads=1) as fresh:
        expected = say(fresh, PROMPT), say(fresh, [*PROMPT, 9, 8, 7])
    CALLS[name](engine)  # the first call imports
    interrupted, n_bytecodes = interrupt_at(-1, lambda: CALLS[name](engine))
    assert not interrupted and n_bytecodes > 300
    strides = (n for n in itertools.count(5, 2) if n % 3)  # the cache, too, is cleared at other places each time
    stride = 1 if request.config.getoption("--run-slow") else next(n for n in strides if n_bytecodes < 400 * n)
    n_interrupted = 0
    for number in range(0, n_bytecodes, stride):
        if number % 3 == 0:
            engine.clear_cache()
        interrupted, _ = interrupt_at(number, lambda: CALLS[name](engine))
        n_interrupted += interrupted
        stats = engine.check_integrity()
        assert stats["n_sequences"] == 0, f"a sequence is lost at bytecode {number}"
        assert stats["n_pages"] == stats["n_cached"] + stats["n_free"], f"a page is lost at bytecode {number}"
        assert (say(engine, PROMPT), say(engine, [*PROMPT, 9, 8, 7])) == expected, f"bytecode {number}"
    assert n_interrupted > 0.7 * n_bytecodes / stride  # a call with other pages cached has fewer


def test_an_exception_in_one_call_leaves_another_stream_whole(tiny_model: Path, engine: Engine) -> None:
    """The interrupted caller leads a step that computes for a stream beside it."""
    options = {**OPTIONS, "max_tokens": 12}
    with Engine(tiny_model, n_threads=1) as fresh:
        expected = [piece.token for piece in fresh.stream(PROMPT[:20], **options)]
    engine.generate(PROMPT, **OPTIONS)
    _, n_bytecodes = interrupt_at(-1, lambda: engine.generate(PROMPT, **OPTIONS))
    rng = random.Random(5)
    for _ in range(40):
        beside = engine.stream(PROMPT[:20], **options)
        tokens = [next(beside).token]
        for _ in range(3):
            interrupt_at(rng.randrange(n_bytecodes), lambda: engine.generate(PROMPT, **OPTIONS))
            engine.check_integrity()
            tokens.append(next(beside).token)
        assert tokens + [piece.token for piece in beside] == expected
        assert engine.check_integrity()["n_sequences"] == 0


# ------------------------------------------------------------------ real signals

SIGNALS = """
    import random, signal, sys, time
    from pyengine import Engine, _core, fork

    prompt = [3 + i * 7 % 50 for i in range(400)]
    options = dict(temperature=1.0, seed=11, max_tokens=12, ignore_eos=True, logprobs=0)
    say = lambda engine, ids: [(e.token, e.logprob) for e in engine.generate(ids, **options).logprobs]

    def until_interrupted(engine, seconds, *, stream):
        signal.setitimer(signal.ITIMER_REAL, seconds)
        for piece in engine.stream(prompt, **options) if stream else [engine.generate(prompt, **options)]:
            pass
        signal.setitimer(signal.ITIMER_REAL, 0)

    rng = random.Random(1)
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # what Ctrl-C does
    with Engine(sys.argv[1], n_threads=int(sys.argv[2])) as engine, Engine(sys.argv[1], n_threads=1) as fresh:
        expected = say(fresh, prompt)
        continued = say(fresh, prompt + [token for token, _ in expected][:5] + [9, 8])
        # how long a call takes, so that the signals fall into it; where they fall is by chance, and any place must do
        began = time.perf_counter(); fresh.clear_cache(); fresh.generate(prompt, **options); took = time.perf_counter() - began
        n_interrupted = 0
        for trial in range(int(sys.argv[3])):
            if trial % 2:
                engine.clear_cache()  # then most signals fall into the prefill, otherwise into the decode
            try:
                until_interrupted(engine, rng.uniform(1e-5, took), stream=trial % 3 == 0)
            except KeyboardInterrupt:
                n_interrupted += 1
            while True:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    break
                except KeyboardInterrupt:
                    pass
            stats = engine.check_integrity()
            assert stats["n_sequences"] == 0 and stats["n_pages"] == stats["n_cached"] + stats["n_free"], stats
            assert say(engine, prompt) == expected, trial
            assert say(engine, prompt + [token for token, _ in expected][:5] + [9, 8]) == continued, trial
        print("interrupted", n_interrupted)
"""


@pytest.mark.parametrize("n_threads", [1, 2])
def test_real_signals(tiny_model: Path, n_threads: int) -> None:
    """500 of them each. A process of its own: whatever the test runner does with signals stays out of it."""
    command = [sys.executable, "-I", "-c", textwrap.dedent(SIGNALS), str(tiny_model), str(n_threads), "500"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) > 0


def test_a_signal_handler_cannot_use_the_engine_it_interrupts(engine: Engine) -> None:
    """It runs in the middle of a step: using the engine there is an error, not a deadlock."""
    context = engine._scheduler.context
    seen: list[str] = []

    class Signalling:
        def forward(self, *args: Any, **options: Any) -> bytes:
            signal.raise_signal(signal.SIGUSR1)
            return context.forward(*args, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(context, name)

    def handler(*_: object) -> None:
        with pytest.raises(pyengine.PyEngineError, match="signal handler"):
            engine.generate(PROMPT, max_tokens=1)
        seen.append("refused")

    expected = engine.generate(PROMPT, **OPTIONS).tokens
    before = signal.signal(signal.SIGUSR1, handler)
    engine._scheduler.context = Signalling()  # type: ignore[assignment]
    try:
        assert engine.generate(PROMPT, speculative="off", **OPTIONS).tokens == expected
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == ["refused"] * 3
    assert engine.check_integrity()["n_sequences"] == 0


def test_a_signal_handler_may_use_an_engine_for_which_its_thread_waits(engine: Engine) -> None:
    """The thread holds nothing yet: whoever computes goes on first, then the handler computes, then the thread has its turn."""
    main, is_handling = threading.get_ident(), threading.Event()
    context, lock = engine._scheduler.context, engine._scheduler.step_lock
    expected = engine.generate(PROMPT, **OPTIONS).tokens
    seen: list[list[int]] = []

    class Signalling:
        def forward(self, *args: Any, **options: Any) -> bytes:
            if not is_handling.is_set():
                while not lock.is_wanted:
                    time.sleep(0.001)
                while not is_handling.is_set():  # what comes an instant before the thread sleeps does not wake it
                    signal.pthread_kill(main, signal.SIGUSR1)
                    is_handling.wait(0.1)
            return context.forward(*args, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(context, name)

    def handler(*_: object) -> None:
        if not is_handling.is_set():
            is_handling.set()
            seen.append(engine.generate(PROMPT, **OPTIONS).tokens)

    def other() -> None:
        seen.append(engine.generate(PROMPT, **OPTIONS).tokens)

    before = signal.signal(signal.SIGUSR1, handler)
    engine._scheduler.context = Signalling()  # type: ignore[assignment]
    thread = threading.Thread(target=other)
    try:
        thread.start()
        while not engine._scheduler._running:
            time.sleep(0.001)
        engine.exclusively(lambda _: seen.append([]))
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert sorted(seen) == [[], expected, expected]
