"""The start: the tokenizer that loads beside the weights, and what is not loaded at all."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from engine import cli_tools

import pyengine
from pyengine.background import Background
from pyengine.errors import ModelFormatError
from pyengine.format.reader import FrozenFile
from pyengine.text import tokenizer as tokenizer_module

PROMPT = "hello"


def start_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pyengine-start"]


def test_a_checkout_that_is_not_built_says_so(tmp_path: Path) -> None:
    """Python started in a checkout finds its sources before the installed package."""
    sources = Path(pyengine.__file__).parent
    shutil.copytree(sources, tmp_path / "pyengine", ignore=shutil.ignore_patterns("*.so", "*.pyd", "models", "__pycache__"))
    for code in ("import pyengine; pyengine.Engine()", "from pyengine import Engine"):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=cli_tools.environment(), capture_output=True, text=True, timeout=60)
        last = done.stderr.splitlines()[-1]
        assert last.startswith("pyengine.errors.NotBuiltError: ") and "start it in another directory" in last
    done = cli_tools.run_process(tmp_path, "info")
    assert (done.returncode, done.stdout) == (1, "") and "start it in another directory" in done.stderr
    assert done.stderr.startswith("pyengine: error: ") and done.stderr.count("\n") == 1
    # What is not compiled works there, too: the trainer reads chat templates with it.
    code = "import pyengine, pyengine.text.chat; pyengine.SamplingParams(); print(pyengine.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=cli_tools.environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == (f"{pyengine.__version__}\n", "")


# -------------------------------------------------------------------- one call beside the caller


def test_background_returns_what_the_work_does() -> None:
    main = threading.get_ident()
    work = Background(threading.get_ident)
    work.start()
    assert work.result() != main
    assert work.result() == work.result()
    nothing = Background(lambda: None)
    nothing.start()
    assert nothing.result() is None


def test_background_raises_what_the_work_does() -> None:
    def fail() -> None:
        raise ValueError("no")

    work = Background(fail)
    work.start()
    work.wait()
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            work.result()


@pytest.mark.parametrize("begins", [False, True])
def test_an_interrupt_when_the_thread_starts_leaves_nothing_to_wait_for(
    monkeypatch: pytest.MonkeyPatch, begins: bool
) -> None:
    """There may be a thread or not: nobody waits for one that has not begun, and it does not begin any more."""
    start, threads, done = threading.Thread.start, [], []

    def interrupted(thread: threading.Thread) -> None:
        threads.append(thread)
        if begins:
            start(thread)
            thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    work = Background(lambda: done.append(threading.get_ident()))
    with pytest.raises(KeyboardInterrupt):
        work.start()
    work.wait()
    monkeypatch.undo()
    if not begins:
        start(threads[0])
        threads[0].join()
    assert len(done) == begins
    work.result()
    assert len(done) == 1


def test_background_without_a_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    work = Background(threading.get_ident)
    work.start()
    work.wait()
    assert work.result() == threading.get_ident()


# -------------------------------------------------------------------- the engine


def damaged(model: Path, directory: Path, tensor: str, content: bytes) -> Path:
    """A copy of the model whose tensor begins with `content` and goes on with spaces."""
    data = bytearray(model.read_bytes())
    with FrozenFile.open(model) as frozen:
        begin, size = frozen.tensors[tensor]
    data[begin : begin + size] = content.ljust(size)
    path = directory / "damaged.safetensors"
    path.write_bytes(data)
    return path


def test_preloaded_tokenizer_gives_the_same(tiny_model: Path) -> None:
    with pyengine.Engine(tiny_model) as late, pyengine.Engine(tiny_model, preload_tokenizer=True) as early:
        assert not start_threads()
        assert early.generate(PROMPT, max_tokens=8).text == late.generate(PROMPT, max_tokens=8).text


def test_nothing_is_loaded_for_callers_without_text(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(tokenizer_module, "_load", refuse)
    monkeypatch.setattr("pyengine.engine_base.Background", refuse)
    with pyengine.Engine(tiny_model) as engine:
        assert len(engine.score([1, 2, 3]).logprobs) == 3


def test_a_refusal_of_the_weights_comes_out_of_the_thread(tiny_model: Path, tmp_path: Path) -> None:
    model = damaged(tiny_model, tmp_path, "layers.1.wo.codes", b"\x80")
    for preload in (False, True):
        with pytest.raises(ModelFormatError, match=r"layers\.1\.wo"):
            pyengine.Engine(model, preload_tokenizer=preload)
    assert not start_threads()


def test_a_bad_tokenizer_is_told_when_it_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    model = damaged(tiny_model, tmp_path, "tokenizer.json", b"[]")
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        pyengine.Engine(model, preload_tokenizer=True)
    assert not start_threads()
    with pyengine.Engine(model) as engine:
        assert len(engine.score([1, 2, 3]).logprobs) == 3
        with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
            engine.generate(PROMPT)


# What loads does not end before the signal has come.
SCENE = """
import os, signal, sys, threading
import pyengine
from pyengine import _core
from pyengine.text import tokenizer

begun, sent = threading.Event(), threading.Event()

def slowly(function):
    def slow(*arguments):
        begun.set()
        sent.wait()
        return function(*arguments)
    return slow

def interrupt():
    begun.wait()
    os.kill(os.getpid(), signal.SIGINT)
    sent.set()

{slow}
threading.Thread(target=interrupt).start()
try:
    pyengine.Engine(sys.argv[1], preload_tokenizer=True)
except KeyboardInterrupt:
    assert "pyengine-start" not in [thread.name for thread in threading.enumerate()]
else:
    raise SystemExit("the signal was lost")
"""


@pytest.mark.parametrize("slow", ["_core.Model = slowly(_core.Model)", "tokenizer._load = slowly(tokenizer._load)"])
def test_ctrl_c_while_an_engine_opens(tiny_model: Path, tmp_path: Path, slow: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCENE.replace("{slow}", slow), str(tiny_model)],
        capture_output=True, text=True, timeout=250, cwd=tmp_path, env=cli_tools.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
