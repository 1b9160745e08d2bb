"""The start: the tokenizer that loads beside the weights, and what is not loaded at all."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from engine import cli_tools

import pyengine
from pyengine import tokenizer as tokenizer_module
from pyengine.background import Background
from pyengine.errors import InvalidArgumentError, ModelFormatError
from pyengine.frozen import FrozenFile

PROMPT = "hello"


def start_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pyengine-start"]


def slow_down(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    load = tokenizer_module._load

    def slow(data: bytes) -> object:
        time.sleep(seconds)
        return load(data)

    monkeypatch.setattr(tokenizer_module, "_load", slow)


# -------------------------------------------------------------------- one call beside the caller


def test_background_returns_what_the_work_does() -> None:
    main = threading.get_ident()
    work = Background(threading.get_ident)
    assert work.result() != main
    assert work.result() == work.result()
    assert Background(lambda: None).result() is None


def test_background_raises_what_the_work_does() -> None:
    def fail() -> None:
        raise ValueError("no")

    work = Background(fail)
    work.wait()
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            work.result()


def test_background_without_a_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    work = Background(threading.get_ident)
    work.wait()
    assert work.result() == threading.get_ident()


# -------------------------------------------------------------------- the engine


def test_preloaded_tokenizer_gives_the_same(tiny_model: Path) -> None:
    with pyengine.Engine(tiny_model) as late, pyengine.Engine(tiny_model, preload_tokenizer=True) as early:
        expected = late.generate(PROMPT, max_tokens=8).text
        assert early.generate(PROMPT, max_tokens=8).text == expected
    assert not start_threads()


def test_no_thread_for_callers_without_text(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(tokenizer_module, "_load", refuse)
    monkeypatch.setattr("pyengine.engine.Background", refuse)
    with pyengine.Engine(tiny_model) as engine:
        assert len(engine.score([1, 2, 3]).logprobs) == 3


@pytest.mark.parametrize("n_ctx", [0, -1])
def test_nothing_runs_on_after_a_refusal_or_a_close(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, n_ctx: int
) -> None:
    slow_down(monkeypatch, 0.3)
    if n_ctx:
        with pytest.raises(InvalidArgumentError, match="n_ctx"):
            pyengine.Engine(tiny_model, n_ctx=n_ctx, preload_tokenizer=True)
    else:
        engine = pyengine.Engine(tiny_model, preload_tokenizer=True)
        assert start_threads()  # opening did not wait for it
        engine.close()
    assert not start_threads()


def test_a_bad_tokenizer_is_told_where_it_is_needed(tiny_model: Path, tmp_path: Path) -> None:
    data = bytearray(tiny_model.read_bytes())
    with FrozenFile.open(tiny_model) as frozen:
        begin, size = frozen.tensors["tokenizer.json"]
    data[begin : begin + size] = b"[]".ljust(size)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(data)
    with pyengine.Engine(damaged, preload_tokenizer=True) as engine:
        assert len(engine.score([1, 2, 3]).logprobs) == 3
        for _ in range(2):
            with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
                engine.generate(PROMPT)


SCENE = """
import os, signal, sys, threading, time
import pyengine
from pyengine import tokenizer
load = tokenizer._load
def slow(data):
    time.sleep(0.5)
    return load(data)
tokenizer._load = slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start us with the signal ignored
def names():
    return [thread.name for thread in threading.enumerate()]
"""


def scene(model: Path, code: str, directory: Path) -> str:
    """Run the code in an interpreter of its own; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", SCENE + textwrap.dedent(code), str(model)],
        capture_output=True, text=True, timeout=60, cwd=directory, env=cli_tools.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_ctrl_c_while_the_tokenizer_loads(tiny_model: Path, tmp_path: Path) -> None:
    scene(
        tiny_model,
        """
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        started = time.monotonic()
        engine = None
        try:
            with pyengine.Engine(sys.argv[1], preload_tokenizer=True) as engine:
                engine.tokenize("hello")
        except KeyboardInterrupt:
            assert time.monotonic() - started < 5
        else:
            raise SystemExit("the signal was lost")
        assert "pyengine-start" not in names(), names()
        """,
        tmp_path,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_while_the_tokenizer_loads(tiny_model: Path, tmp_path: Path) -> None:
    """The child has the parent's tokenizer: a fork waits for it."""
    scene(
        tiny_model,
        """
        engine = pyengine.Engine(sys.argv[1], preload_tokenizer=True)
        assert "pyengine-start" in names()
        child = os.fork()
        text = engine.generate("hello", max_tokens=4, temperature=0).text
        with pyengine.Engine(sys.argv[1]) as other:
            good = text == other.generate("hello", max_tokens=4, temperature=0).text
        if child == 0:
            os._exit(0 if good else 1)
        assert good and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """,
        tmp_path,
    )
