"""GPUs of several ranks: NCCL's C interface, the same bits on any number of ranks, and ranks that fail.

There is no GPU here and no NCCL: the library is fake_nccl.c, built for the test, whose device memory is the process's own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")
pytest.importorskip("numba_cuda", reason="the CUDA kernels need numba-cuda: extra [cuda]")

import pyengine_training
from pyengine_training.arena import Arena, layout_only, parameter_shapes
from pyengine_training.backend import cuda_ranks
from pyengine_training.backend.cuda import MESSAGE
from pyengine_training.backend.cuda_optimizer import cut_units
from pyengine_training.backend.cuda_ranks import NcclComm, refuse_shared_gpus
from pyengine_training.config import TrainConfig
from pyengine_training.errors import ConfigError
from pyengine_training.gpu_check.ranks import PipeComm, on_processes
from pyengine_training.gpu_check.sections import LARGE
from pyengine_training.ops.cuda._nccl import Nccl, load_nccl
from pyengine_training.ops.cuda._runtime import DeviceError, use_runtime
from pyengine_training.ranks import cut, owners
from rank_processes import RUNS
from simulated_runtime import SimulatedRuntime

Array = np.ndarray[Any, Any]
HERE = Path(__file__).parent
LIMIT = 1800.0  # seconds: ends what hangs, and is far from what processes of a busy machine take


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("the stand-in for NCCL is C: no compiler")
    path = tmp_path_factory.mktemp("nccl") / "libnccl.so.2"
    flags = ["-Wall", "-Wextra", "-Werror", "-Wno-format-truncation", "-O1", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(path), str(HERE / "fake_nccl.c")], check=True)
    return path


@pytest.fixture
def loaded(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Nccl]:
    """Makes an Nccl of the library; patience in seconds."""
    monkeypatch.setenv("FAKE_NCCL_DIR", str(tmp_path))
    monkeypatch.setenv("PYENGINE_NCCL", str(library))
    return lambda patience=300.0: Nccl(load_nccl(), patience)


def part(rank: int, array: Array) -> tuple[int, int, int]:
    return rank, int(array.ctypes.data), array.nbytes


# ---- the C interface ---------------------------------------------------------------------------------------------


@pytest.fixture
def pair(loaded: Callable[..., Nccl], tmp_path: Path) -> tuple[Nccl, Nccl]:
    """Two ranks in this process that have met: each finds the other's mark, whoever comes first."""
    first, second = loaded(), loaded(0.0)
    unique_id = first.unique_id()
    mark = tmp_path / f"{unique_id.rstrip(bytes(1)).decode()}.rank1"
    mark.touch()
    first.connect(2, 0, unique_id, 0)
    mark.unlink()
    second.connect(2, 1, unique_id, 0)
    return first, second


def test_messages_arrive_in_the_order_in_which_they_were_sent(pair: tuple[Nccl, Nccl]) -> None:
    first, second = pair
    sent = [np.arange(5, dtype=np.float32), np.arange(7, dtype=np.float32) * 2]
    first.exchange([part(1, array) for array in sent], [])
    received = [np.zeros(5, np.float32), np.zeros(7, np.float32)]
    second.exchange([], [part(0, array) for array in received])
    for wanted, got in zip(sent, received, strict=True):
        np.testing.assert_array_equal(got, wanted)
    second.check()
    first.exchange([], [])


def test_a_message_that_does_not_come_is_an_error(pair: tuple[Nccl, Nccl]) -> None:
    with pytest.raises(DeviceError, match=r"NCCL: messages: not done after 0 s; NCCL_DEBUG=INFO.*--comm mpi"):
        pair[1].exchange([], [part(0, np.zeros(3, np.float32))])


def test_what_the_library_refuses_is_an_error_with_its_words(pair: tuple[Nccl, Nccl]) -> None:
    first, second = pair
    first.exchange([part(1, np.zeros(3, np.float32))], [])
    with pytest.raises(DeviceError, match=r"messages: invalid argument \(status 4\)"):
        second.exchange([], [part(0, np.zeros(4, np.float32))])
    with pytest.raises(DeviceError, match=r"a message of 4 bytes, rank 0: invalid argument"):
        first.exchange([part(0, np.zeros(1, np.float32))], [])


def test_a_network_that_fails_is_told_when_it_is_asked(
    pair: tuple[Nccl, Nccl], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NCCL_FAULT", "0:1:error")
    first = pair[0]
    first.exchange([part(1, np.zeros(3, np.float32))], [])
    first.check()
    with pytest.raises(DeviceError, match="network error"):
        first.exchange([part(1, np.zeros(3, np.float32))], [])
    first.check()  # so that the other ranks can be told


def test_a_rank_that_does_not_come_is_not_waited_for_without_end(loaded: Callable[..., Nccl]) -> None:
    alone = loaded(0.0)
    with pytest.raises(DeviceError, match="connecting 2 ranks: not done after 0 s"):
        alone.connect(2, 0, alone.unique_id(), 0)


def test_an_old_library_is_named(loaded: Callable[..., Nccl], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NCCL_VERSION", "2804")
    with pytest.raises(DeviceError, match=r"version code 2804, 21400 \(2\.14\) or newer is needed; or --comm mpi"):
        loaded()


def test_a_missing_library_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYENGINE_NCCL", str(tmp_path / "none.so"))
    with pytest.raises(DeviceError, match=r"not found where PYENGINE_NCCL says, .*none\.so.*pip install.*--comm mpi"):
        load_nccl()
    monkeypatch.delenv("PYENGINE_NCCL")
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    with pytest.raises(DeviceError, match=r"NCCL was not found \(ModuleNotFoundError\): pip install"):
        load_nccl()


# ---- ranks -------------------------------------------------------------------------------------------------------


class Control:
    """MPI's part for one rank of two that says what it is told the other says."""

    rank, size, threads, local_rank = 0, 2, None, 0

    def __init__(self, other: Callable[[Any], Any]) -> None:
        self.other = other

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other(value)]


def test_ranks_that_share_a_gpu_are_named(loaded: Callable[..., Nccl]) -> None:
    refuse_shared_gpus([("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")])
    with pytest.raises(ConfigError, match="ranks 1 and 3 have one GPU between them, 1 on a") as raised:
        refuse_shared_gpus([("a", "0"), ("a", "1"), ("b", "0"), ("a", "1")])
    assert raised.value.on_all_ranks
    with use_runtime(SimulatedRuntime()), pytest.raises(ConfigError, match="--comm mpi"):
        NcclComm(Control(lambda value: value), loaded())  # type: ignore[arg-type]


def test_other_gpus_and_other_libraries_are_named(loaded: Callable[..., Nccl]) -> None:
    with use_runtime(SimulatedRuntime()):
        with pytest.raises(ConfigError, match="rank 1: its GPU is H100, that of rank 0 is simulated"):
            cuda_ranks.connect(Control(lambda value: {"GPU": "H100"}), None)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="rank 1: its NCCL is 1, that of rank 0 is 22703"):
            NcclComm(Control(lambda value: {"NCCL": 1}), loaded())  # type: ignore[arg-type]


def test_a_missing_library_is_told_by_one_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All ranks of a run start from the same packages."""
    monkeypatch.setenv("PYENGINE_NCCL", str(tmp_path / "none.so"))
    with use_runtime(SimulatedRuntime()), pytest.raises(DeviceError, match="NCCL was not found") as raised:
        cuda_ranks.connect(Control(lambda value: value), None)  # type: ignore[arg-type]
    assert raised.value.on_all_ranks


def environment(tmp_path: Path, library: Path, **extra: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(pyengine_training.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    here = {"FAKE_NCCL_DIR": str(tmp_path), "PYENGINE_NCCL": str(library), "PYTHONPATH": path}
    return {**os.environ, **here, **extra}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_gpus_share_the_moments_of_a_model_of_124_million_parameters(optimizer: str) -> None:
    """Together they keep what one keeps alone; none more than its share and what is updated at once."""
    shapes = parameter_shapes(LARGE)
    arena, config = Arena(shapes, zeros=layout_only), TrainConfig(optimizer=optimizer)
    whole = sum(unit.state for unit in cut_units(arena, LARGE, config, None))
    assert whole == sum(piece.state for piece in cut(arena, LARGE, config))  # as on CPUs
    units = cut_units(arena, LARGE, config, MESSAGE)
    ranks = owners(units, 4)
    kept = [sum(unit.state for unit, owner in zip(units, ranks, strict=True) if owner == rank) for rank in range(4)]
    assert sum(kept) == whole and max(kept) <= whole / 4 + max(unit.state for unit in units)


def test_a_rank_that_fails_ends_those_that_wait_for_it_in_a_library() -> None:
    """NCCL between GPUs of one machine does not notice: the waiting one is killed, also where it was begun first."""

    def work(comm: PipeComm) -> None:
        if comm.rank == 1:
            os._exit(3)
        time.sleep(60)  # seconds: in the place of a wait without end

    with pytest.raises(RuntimeError, match=re.escape("[-9, 3, -9, -9]")):
        on_processes(4, work)


def rank_processes(library: Path, tmp_path: Path, *words: str) -> tuple[list[Any], str]:
    """The lines of rank_processes.py, which has to end well, and its errors."""
    done = subprocess.run(
        [sys.executable, str(HERE / "rank_processes.py"), *words],
        capture_output=True, text=True, check=False, timeout=LIMIT, env=environment(tmp_path, library),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.timeout(LIMIT + 60)
def test_any_number_of_ranks_gives_the_same_bits(library: Path, tmp_path: Path) -> None:
    """Losses, norms, checkpoint and validation, through the int8 decay: of GPUs, from one to another and through the host, and
    of the CPU's arrays by the same messages, with a sharded optimizer too."""
    lines, errors = rank_processes(library, tmp_path)
    assert len(lines) == len(RUNS), errors
    for run, line in zip(RUNS, lines, strict=True):
        assert (line["ranks"], line["by"], line["sharded"]) == (run.ranks, run.by, run.shard_optimizer)
        assert line["ok"] and len(line["losses"]) == 2, line
    assert not list(tmp_path.glob("*-*.*-*"))  # every message was received


@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.slow
def test_the_check_for_gpus_has_a_section_of_ranks(library: Path, tmp_path: Path) -> None:
    lines, _ = rank_processes(library, tmp_path, "section")
    assert lines[0] == {"gpus": 2}
    assert [(line["by"], line["sharded"]) for line in lines[2:]] == [
        ("host", False), ("host", True), ("nccl", False), ("nccl", True),
    ]  # fmt: skip
    assert all(line["ok"] for line in lines[1:])


SIZES = "--vocab-size 300 --dim 16 --n-layers 1 --n-heads 2 --n-kv-heads 1 --head-dim 8 --hidden-dim 16"
KNOBS = "--seq-len 8 --batch-size 2 --shards 2 --steps 3 --eval-documents 1 --sample-every 0 --quantize never"


@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize(
    "fault, message",
    [
        ("1:0:kill", r"error: rank 1 on \S+ was killed by SIGKILL"),
        ("1:0:error", r"error: rank 1: NCCL: messages: remote process exited or there was a network error"),
    ],
)
def test_a_gpu_rank_that_fails_ends_all_and_is_named(
    library: Path, stories: Path, tmp_path: Path, fault: str, message: str
) -> None:
    pytest.importorskip("mpi4py", reason="several ranks need mpi4py: extra [mpi]")
    where = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    mpiexec = shutil.which("mpiexec", path=where)
    if mpiexec is None:
        pytest.skip("several ranks need mpiexec: extra [mpi]")
    words = ["train", "--run-dir", str(tmp_path / "run"), "--data", str(stories), "--device", "cuda"]
    done = subprocess.run(
        [mpiexec, "-n", "2", sys.executable, str(HERE / "simulated_train.py"), *words, *SIZES.split(), *KNOBS.split()],
        capture_output=True, text=True, check=False, timeout=LIMIT,
        env=environment(tmp_path, library, FAKE_NCCL_FAULT=fault),
    )  # fmt: skip
    assert done.returncode != 0
    assert len(re.findall("error: rank", done.stderr)) == 1 and re.search(message, done.stderr), done.stderr
    assert (tmp_path / "run" / "run.json").exists()
