"""Runs that are ended from outside: signals, a closed terminal, kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

import pyengine_training
from pyengine_training import checkpoint as checkpoints
from training.command import arguments, steps_of


def spawn(run: Path, data: Path, extra: str) -> subprocess.Popen[str]:
    root = str(Path(pyengine_training.__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "pyengine_training", *arguments(run, data, extra)],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:  # pytest's timeout is the limit
        if (run / "metrics.jsonl").exists() and f'"step": {step},' in (run / "metrics.jsonl").read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"never reached step {step}: {process.communicate()[1]}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_checkpoint_and_exit_honestly(stories: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    with spawn(run, stories, "--steps 100000 --eval-every 0 --checkpoint-every 0") as process:
        wait_for_step(run, 5, process)
        process.send_signal(number)
        _, err = process.communicate()
    assert process.returncode == 128 + number
    assert "checkpoint is written" in err
    last = checkpoints.checkpoints(run)[-1]
    assert checkpoints.read_state(last)["step"] == steps_of(run)[-1][0]


def test_a_closed_terminal_checkpoints(stories: Path, tmp_path: Path) -> None:
    """Nothing can be told any more: what is printed on the way to the checkpoint, and after it, is lost and does no harm."""
    run = tmp_path / "run"
    words = arguments(run, stories, "--steps 100000 --eval-every 0 --checkpoint-every 0")
    take = "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    take += "signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # whoever runs the tests may have ignored it
    take += "os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-c", take, sys.executable, "-m", "pyengine_training", *words]
    path = os.pathsep.join([str(Path(pyengine_training.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    ours, theirs = os.openpty()
    ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True, **ends) as process:
        os.close(theirs)
        said = b""
        while b"step 3/100000" not in said:
            said += os.read(ours, 4096)  # an end without that step is an OSError
        os.close(ours)
    assert process.returncode == 128 + signal.SIGHUP
    last = checkpoints.checkpoints(run)[-1]
    assert checkpoints.read_state(last)["step"] == steps_of(run)[-1][0] >= 3


@pytest.mark.parametrize(("before", "received"), [("SIG_DFL", [signal.SIGHUP]), ("SIG_IGN", [])])
def test_a_hangup_that_is_ignored_stays_so(before: str, received: list[int]) -> None:
    """As nohup has it. Of those that are not the second one does no harm."""
    code = (
        "import os, signal; from pyengine_training.signals import signals; received = [];"
        f"signal.signal(signal.SIGHUP, signal.{before});\n"
        "with signals(received): [os.kill(os.getpid(), signal.SIGHUP) for _ in range(2)]\n"
        f"assert signal.getsignal(signal.SIGHUP) is signal.{before}; print([int(n) for n in received])"
    )
    home = Path(pyengine_training.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str([int(n) for n in received])), done.stderr


def test_kill_9_loses_nothing_older_than_the_last_checkpoint(stories: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with spawn(run, stories, "--steps 100000 --eval-every 0 --checkpoint-every 3") as process:
        wait_for_step(run, 10, process)
        process.kill()
        process.communicate()
    found = checkpoints.checkpoints(run)
    assert found
    for folder in found:  # whole ones only
        checkpoints.load_model(folder)
        assert checkpoints.read_state(folder)["step"] == int(folder.name[5:])
    assert checkpoints.read_state(found[-1])["step"] >= 9
