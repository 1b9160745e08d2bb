"""What an engine refuses and when, how it pickles, and what is left of it when it is closed."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyengine
from pyengine import Engine

SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 11, "ignore_eos": True}
TOKENS = [5, 11, 3, 40, 8]


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[Engine]:
    with Engine(tiny_model) as engine:
        yield engine


def test_a_stream_refuses_at_the_call(engine: Engine) -> None:
    with pytest.raises(pyengine.ContextFullError):
        engine.stream([5] * 600)
    with pytest.raises(pyengine.InvalidArgumentError, match="logit_bias"):
        engine.stream([5], logit_bias={10**6: 1.0})


def test_a_finished_stream_stays_finished(engine: Engine) -> None:
    stream = engine.stream(TOKENS, max_tokens=2, **SAMPLED)
    assert len(list(stream)) == 2
    with pytest.raises(StopIteration):
        next(stream)
    stream.close()


BAD_OPTIONS: list[dict[str, Any]] = [
    {"n_ctx": 1.5}, {"n_ctx": True}, {"max_sequences": 0}, {"max_kv_bytes": -1}, {"mmap": [1, 2]}, {"mmap": 1},
    {"preload_tokenizer": "yes"},
]  # fmt: skip


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_engine_options_are_of_their_kind(tiny_model: Path, options: dict[str, Any]) -> None:
    with pytest.raises(pyengine.InvalidArgumentError, match=next(iter(options))):
        Engine(tiny_model, **options)


def test_an_engine_pickles_as_its_path_and_options(tiny_model: Path) -> None:
    with Engine(tiny_model, n_ctx=100, n_threads=1, seed=3, max_sequences=5) as engine:
        expected = engine.generate(TOKENS, max_tokens=3, temperature=1.0)
        copy = pickle.loads(pickle.dumps(engine))
    with copy:
        assert (copy.n_ctx, copy.n_threads, copy.seed) == (100, 1, 3)
        assert copy.generate(TOKENS, max_tokens=3, temperature=1.0).tokens == expected.tokens
    with pytest.raises(pyengine.PyEngineError, match="closed"):
        pickle.dumps(copy)


def test_after_close_everything_says_so(tiny_model: Path) -> None:
    engine = Engine(tiny_model)
    unread = engine.stream(TOKENS, **SAMPLED)
    engine.close()
    calls: list[Any] = [
        lambda: engine.generate([5]),
        lambda: engine.stream([5]),
        lambda: engine.score([5, 6]),
        lambda: engine.logits([5, 6]),
        lambda: engine.tokenize("a"),
        lambda: engine.chat([{"role": "user", "content": "a"}]),
        lambda: engine.memory(),
        lambda: engine.isa,
        lambda: engine.context,
        lambda: next(unread),
    ]
    for call in calls:
        with pytest.raises(pyengine.PyEngineError, match="this engine is closed"):
            call()


# ------------------------------------------------------------------ while it closes


def test_a_call_that_comes_while_the_engine_closes_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the steps have ended, and before all else has."""
    engine, refused = Engine(tiny_model), []

    def call() -> None:
        for one in (engine.cache_stats, lambda: engine.isa):
            with pytest.raises(pyengine.PyEngineError, match="this engine is closed"):
                one()
            refused.append(True)

    monkeypatch.setattr(engine._scheduler, "_sweep_after", call)
    engine.close()
    assert len(refused) == 2


@pytest.mark.parametrize(
    "where", ["_scheduler.speculation.close", "_scheduler._sweep_after", "_attachments.close", "_file.close"]
)
def test_a_close_that_is_interrupted_can_be_done_again(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    engine = Engine(tiny_model)

    def interrupt() -> None:
        raise KeyboardInterrupt

    *path, name = where.split(".")
    owner: Any = engine
    for part in path:
        owner = getattr(owner, part)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, interrupt)
        engine.close()
    with pytest.raises(pyengine.PyEngineError, match="this engine is closed"):
        engine.generate([5])
    engine.close()
    assert not hasattr(engine, "_model") and not hasattr(engine._scheduler, "context")
    assert engine._closed


def test_what_has_the_steps_may_load_a_part_while_another_thread_closes(tiny_model: Path) -> None:
    engine = Engine(tiny_model)
    lock, closing = engine._scheduler.step_lock, threading.Thread(target=engine.close)

    def work(_: object) -> list[int]:
        closing.start()
        while not lock.is_wanted:
            time.sleep(0.001)
        return engine.tokenize("hello")  # loads the tokenizer

    assert engine.exclusively(work)
    closing.join()
