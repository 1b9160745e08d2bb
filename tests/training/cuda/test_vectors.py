"""Eight elements a thread: tails, views that begin in the middle of an array, and rows longer than a warp's first vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")
pytest.importorskip("numba_cuda", reason="the CUDA kernels need numba-cuda: extra [cuda]")

from numba import cuda, float32
from pyengine_training.gpu_check.cases import attention
from pyengine_training.gpu_check.judge import check, to_bf16
from pyengine_training.ops import cuda as ops
from pyengine_training.ops.cuda import attention as attention_module
from pyengine_training.ops.cuda._runtime import use_runtime
from pyengine_training.ops.cuda._vectors import WIDTH, address, aligned, read, write
from simulated_runtime import SimulatedRuntime
from simulator import Simulator

Array = Any


@cuda.jit
def move_kernel(y: Any, x: Any, y_at: int, x_at: int, end: int, whole: bool) -> None:
    values = cuda.local.array(WIDTH, float32)
    read(values, x, x_at, x_at + end, whole)
    write(y, y_at, y_at + end, values, whole)


def fresh(n: int, dtype: Any) -> Array:
    """n distinct elements whose first lies at a multiple of 64 bytes, as a GPU's allocations do."""
    room = np.zeros(n + 64, dtype)
    start = -address(room) % 64 // room.itemsize
    made = room[start : start + n]
    values = np.arange(1, n + 1, dtype=np.float32)
    made[...] = to_bf16(values) if dtype is np.uint16 else values
    return made


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
@pytest.mark.parametrize("count", [1, 7, 8, 20])
def test_a_vector_and_its_tail(dtype: Any, count: int) -> None:
    for whole in (False, True):
        x, y = fresh(32, dtype), np.zeros(32, dtype)
        out = fresh(32, dtype)
        out[...] = y
        Simulator().launch(move_kernel, 1, 1, (out, x, 16, 8, count, whole))
        y[16 : 16 + min(count, WIDTH)] = x[8 : 8 + min(count, WIDTH)]
        np.testing.assert_array_equal(out, y)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_a_misaligned_vector_is_refused_as_on_hardware(dtype: Any) -> None:
    x, y = fresh(32, dtype), fresh(32, dtype)
    for arguments in ((y, x, 8, 1), (y, x, 1, 8), (y[1:], x, 8, 8)):
        with pytest.raises(IndexError, match="misaligned address"):
            Simulator().launch(move_kernel, 1, 1, (*arguments, 8, True))


def test_what_is_aligned() -> None:
    for dtype in (np.float32, np.uint16):
        x = fresh(64, dtype)
        assert aligned(x) and aligned(x, x[8:], width=16)
        assert not aligned(x, x[1:])
        assert not aligned(x, width=12)
    assert aligned(fresh(64, np.float32)[4:]) and not aligned(fresh(64, np.uint16)[4:])


@pytest.mark.parametrize("offset", [0, 1, 4, 8])
def test_views_into_the_middle_of_an_array(offset: int) -> None:
    """Slices of arenas begin anywhere; the simulator refuses a vector that does not lie right."""
    for dtype in (np.float32, np.uint16):
        a, b = fresh(91, dtype), fresh(91, dtype)
        wanted = a[offset : offset + 83].copy()
        with use_runtime(SimulatedRuntime()):
            ops.copy(b[3 : 3 + 83], a[offset : offset + 83])
            np.testing.assert_array_equal(b[3:86], wanted)
            ops.fill(b, 0)
            ops.add(b[offset : offset + 83], a[offset : offset + 83])
        np.testing.assert_array_equal(b[offset : offset + 83], wanted)
        assert not b[:offset].any() and not b[offset + 83 :].any()


@pytest.mark.parametrize("bf16", [False, True])
def test_rows_of_scores_longer_than_a_warp_reads_at_once(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """264 keys: the warp's second round has one vector, and a tile's zeros to the right are written in both."""
    monkeypatch.setattr(attention_module, "TILE", 132)
    for case in attention(1, 1, 264, 1, 8):
        with use_runtime(SimulatedRuntime()):
            assert check(case, ops, bf16=bf16).ok, case.name
