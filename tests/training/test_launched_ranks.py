"""Runs on ranks that mpiexec starts: the same checkpoints, and what happens when one is lost or interrupted."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

import pyengine_training
from pyengine_training import supervise
from pyengine_training.checkpoint import checkpoints, read_state
from pyengine_training.files import read_json, write_json

SIZES = "--vocab-size 300 --dim 64 --n-layers 2 --n-heads 4 --n-kv-heads 2 --head-dim 16 --hidden-dim 96"
LIMIT = 1800.0  # seconds: ends what hangs, and is far from what ranks of a busy machine take
pytestmark = pytest.mark.timeout(5 * LIMIT)
KNOBS = "--seq-len 32 --batch-size 16 --shards 8 --eval-documents 4 --sample-tokens 4 --sample-every 0 --steps 6"


def mpiexec() -> str:
    """The launcher beside this Python, or on the path."""
    pytest.importorskip("mpi4py", reason="several ranks need mpi4py: extra [mpi]")
    where = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("mpiexec", path=where)
    if found is None:
        pytest.skip("several ranks need mpiexec: extra [mpi]")
    return found


def command(ranks: int) -> list[str]:
    """`pyengine train` on so many ranks, without its options."""
    return [mpiexec(), "-n", str(ranks), sys.executable, "-m", "pyengine_training", "train"]


def environment(**extra: str) -> dict[str, str]:
    """Where ranks find the package, as this process did."""
    path = os.pathsep.join([str(Path(pyengine_training.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **extra}


def launch(ranks: int, *words: object) -> subprocess.CompletedProcess[str]:
    """A run from beginning to end."""
    given = [part for word in words for part in (str(word).split() if isinstance(word, str) else [str(word)])]
    return subprocess.run(
        [*command(ranks), *given], capture_output=True, text=True, env=environment(), check=False, timeout=LIMIT
    )


def checkpoint_digest(run: Path, step: int) -> str:
    folder = run / "checkpoints" / f"step_{step:08d}"
    names = ("model.safetensors", "optimizer.safetensors", "config.json", "tokenizer.json")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def test_checkpoints_of_1_2_4_and_8_ranks_are_equal_and_go_on_across(stories: Path, tmp_path: Path) -> None:
    knobs = f"{SIZES} {KNOBS} --checkpoint-every 3 --keep-checkpoints 0"
    runs = {
        "one": launch(1, "--run-dir", tmp_path / "one", "--data", stories, knobs, "--threads 2"),
        "two": launch(2, "--run-dir", tmp_path / "two", "--data", stories, knobs),
        "four": launch(4, "--run-dir", tmp_path / "four", "--data", stories, knobs, "--shard-optimizer --threads 1"),
        "eight": launch(8, "--run-dir", tmp_path / "eight", "--data", stories, knobs, "--threads 1"),
    }
    shutil.copytree(tmp_path / "four", tmp_path / "across")
    for name in ("checkpoints/step_00000006", "final"):
        shutil.rmtree(tmp_path / "across" / name)
    runs["across"] = launch(2, "--run-dir", tmp_path / "across", "--resume --shard-optimizer")
    for name, done in runs.items():
        assert done.returncode == 0, (name, done.stderr)
        assert done.stderr.count("done in") == 1, (name, done.stderr)  # one rank speaks
    for step in (3, 6):
        assert len({checkpoint_digest(tmp_path / name, step) for name in runs}) == 1, step
    assert (
        read_state(tmp_path / "eight" / "trunk")["position"] == 32 * 16 * read_state(tmp_path / "one" / "trunk")["step"]
    )


@pytest.mark.parametrize(
    "ranks, words, message",
    [
        (3, "", "3 ranks: it must be a power of two"),
        (4, "--shards 2", "4 ranks and 2 shards: give --shards 4"),
        (2, "--seq-len 100000", "fewer than one sequence"),
        (2, "--lr nan", "lr is nan"),
    ],
)
def test_what_ranks_cannot_do_is_said_once_and_leaves_no_folder(
    stories: Path, tmp_path: Path, ranks: int, words: str, message: str
) -> None:
    done = launch(ranks, "--run-dir", tmp_path / "run", "--data", stories, SIZES, KNOBS, words)
    assert done.returncode == 1
    assert done.stderr.count(message) == done.stderr.count("error:") == 1, done.stderr
    assert not (tmp_path / "run").exists()


# ---- ranks that fail ---------------------------------------------------------------------------------------------


class Launched:
    """A run on two ranks that has begun, and its processes."""

    def __init__(self, run: Path, stories: Path, *words: str) -> None:
        knobs = f"{SIZES} {KNOBS} --checkpoint-every 2 --eval-every 0".replace("--steps 6", "--steps 1000000").split()
        self.run = run
        self.process = subprocess.Popen(
            [*command(2), "--run-dir", str(run), "--data", str(stories), *knobs, *words],
            env=environment(PYENGINE_RANK_PATIENCE="8"),
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []

    def wait_for_checkpoint(self) -> None:
        while not checkpoints(self.run):
            if self.process.poll() is not None:
                raise AssertionError(self.end())
            time.sleep(0.05)

    def pid(self, rank: int) -> int:
        log = (self.run / "log.txt").read_text()
        found = re.search(rf"rank {rank}: process (\d+) on", log)
        assert found, log
        return int(found.group(1))

    def end(self) -> str:
        """What it said; bounded by the test's own time limit."""
        return self.process.communicate()[1]


@pytest.fixture
def launched(stories: Path, tmp_path: Path) -> Iterator[Launched]:
    made = Launched(tmp_path / "run", stories)
    try:
        made.wait_for_checkpoint()
        yield made
    finally:
        made.process.kill()
        if made.process.stderr and not made.process.stderr.closed:
            made.end()


def test_a_sign_of_an_earlier_run_counts_only_when_all_ranks_have_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its handlers
    (tmp_path / "signs").mkdir()
    (tmp_path / "signs" / "1").write_text("4711 1")
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    watcher = supervise._Parent(0, 2, os.getpid(), read_end, tmp_path / "signs", patience=8.0)
    assert not watcher._somebody_is_silent(1.0) and not watcher._somebody_is_silent(100.0)  # perhaps a killed run's
    os.write(write_end, b"b")
    assert not watcher._somebody_is_silent(101.0)
    assert watcher._somebody_is_silent(110.0)  # lost before its second sign
    os.close(read_end)
    os.close(write_end)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in Linux's /proc")
@pytest.mark.parametrize(
    "number, whole, message",
    [
        (signal.SIGKILL, False, r"rank 1 on \S+ was killed by SIGKILL \(out of memory\?\)"),
        (signal.SIGSTOP, False, r"rank 1 on \S+ has been stopped for 8 s"),
        (signal.SIGSTOP, True, r"rank 1 has not been heard of for 8 s"),
    ],
    ids=["killed", "stopped", "stopped with its parent"],
)
def test_a_lost_rank_ends_all_and_is_named(
    launched: Launched, stories: Path, number: signal.Signals, whole: bool, message: str
) -> None:
    victim = launched.pid(1)
    mapped = re.findall(r"/dev/shm/mpich_shm_\w+$", Path(f"/proc/{victim}/maps").read_text(), re.MULTILINE)
    assert not mapped  # "(deleted)" follows: nothing stays in memory when nobody is left to remove it
    if whole:
        os.kill(parent_of(victim), number)
    os.kill(victim, number)
    said = launched.end()
    assert launched.process.returncode != 0
    assert len(re.findall(r"error: rank", said)) == 1 and re.search(message, said), said
    step = read_state(checkpoints(launched.run)[-1])["step"]
    assert step >= 2
    values = read_json(launched.run / "run.json")  # a shorter run, so that going on ends
    write_json(launched.run / "run.json", {**values, "train": {**values["train"], "steps": step + 1}})
    done = launch(2, "--run-dir", launched.run, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"(step {step})" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_writes_a_checkpoint(launched: Launched, number: signal.Signals) -> None:
    launched.process.send_signal(number)
    said = launched.end()
    assert launched.process.returncode == 128 + number, said
    assert said.count("a checkpoint is written") == 1, said
    for folder in checkpoints(launched.run):  # whole ones only
        assert read_state(folder)["step"] == int(folder.name[5:])
