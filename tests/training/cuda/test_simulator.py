"""The simulator itself: it agrees with the meaning of CUDA, and it catches the mistakes that it is there to catch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")
pytest.importorskip("numba_cuda", reason="the CUDA kernels need numba-cuda: extra [cuda]")

from numba import cuda, float32
from pyengine_training.ops import cuda as ops
from pyengine_training.ops.cuda._runtime import DeviceError, use_runtime
from simulated_runtime import SimulatedRuntime
from simulator import SCHEDULES, SimulationError, Simulator

Array = np.ndarray[Any, Any]
FULL = 0xFFFFFFFF


@cuda.jit
def sum_kernel(out: Any, x: Any) -> None:
    """out[block] = sum of the block's slice, through shared memory."""
    s = cuda.shared.array(64, float32)
    i = cuda.threadIdx.x
    s[i] = x[cuda.grid(1)]
    cuda.syncthreads()
    step = 32
    while step > 0:
        if i < step:
            s[i] += s[i + step]
        cuda.syncthreads()
        step //= 2
    if i == 0:
        out[cuda.blockIdx.x] = s[0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_block_sum_under_every_schedule(schedule: str) -> None:
    x = np.arange(192, dtype=np.float32)
    out = np.full(3, np.nan, np.float32)
    Simulator(schedule, seed=5).launch(sum_kernel, 3, 64, (out, x))
    np.testing.assert_array_equal(out, x.reshape(3, 64).sum(1))


@cuda.jit
def missing_barrier_kernel(out: Any, x: Any) -> None:
    s = cuda.shared.array(64, float32)
    i = cuda.threadIdx.x
    s[i] = x[i]
    out[i] = s[63 - i]


def test_a_missing_barrier_shows_between_schedules() -> None:
    x = np.arange(64, dtype=np.float32)
    results = []
    for schedule in SCHEDULES:
        out = np.zeros(64, np.float32)
        Simulator(schedule).launch(missing_barrier_kernel, 1, 64, (out, x))
        results.append(out)
    assert not np.array_equal(results[0], results[1], equal_nan=True)
    assert all(np.isnan(r).any() for r in results)  # shared memory starts as NaN


@cuda.jit
def block_order_kernel(out: Any) -> None:
    out[0] = cuda.blockIdx.x


def test_blocks_follow_the_schedule_too() -> None:
    ends = []
    for schedule in ("forward", "reverse"):
        out = np.zeros(1, np.float32)
        Simulator(schedule).launch(block_order_kernel, 4, 1, (out,))
        ends.append(out[0])
    assert ends == [3, 0]


@cuda.jit
def exited_kernel(x: Any) -> None:
    if cuda.threadIdx.x < x.size:
        cuda.syncthreads()


@cuda.jit
def two_barriers_kernel(x: Any) -> None:
    if cuda.threadIdx.x < x.size:
        cuda.syncthreads()
    else:
        cuda.syncthreads()


@pytest.mark.parametrize("kernel", [exited_kernel, two_barriers_kernel])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_divergent_barrier_is_an_error(kernel: Any, schedule: str) -> None:
    with pytest.raises(SimulationError, match="divergent"):
        Simulator(schedule).launch(kernel, 1, 64, (np.zeros(40, np.float32),))
    Simulator(schedule).launch(kernel, 1, 32, (np.zeros(40, np.float32),))


@cuda.jit
def shuffle_kernel(out: Any, x: Any) -> None:
    i = cuda.threadIdx.x
    v = x[i]
    out[0, i] = cuda.shfl_xor_sync(FULL, v, 5)
    out[1, i] = cuda.shfl_down_sync(FULL, v, 3)
    out[2, i] = cuda.shfl_up_sync(FULL, v, 3)
    out[3, i] = cuda.shfl_sync(FULL, v, 7)
    out[4, i] = cuda.ballot_sync(FULL, i % 32 < 3)
    out[5, i] = cuda.any_sync(FULL, i == 40) + 2 * cuda.all_sync(FULL, i < 32)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warp_operations(schedule: str) -> None:
    x = np.arange(64, dtype=np.float32)
    out = np.zeros((6, 64))
    Simulator(schedule).launch(shuffle_kernel, 1, 64, (out, x))
    lane = np.arange(64) % 32
    base = np.arange(64) - lane
    np.testing.assert_array_equal(out[0], base + (lane ^ 5))
    np.testing.assert_array_equal(out[1], np.where(lane + 3 < 32, x + 3, x))
    np.testing.assert_array_equal(out[2], np.where(lane >= 3, x - 3, x))
    np.testing.assert_array_equal(out[3], base + 7)
    assert (out[4] == 7).all()
    np.testing.assert_array_equal(out[5], np.where(np.arange(64) < 32, 2, 1))


@cuda.jit
def half_warp_kernel(out: Any, x: Any, reach: int) -> None:
    """Each half of a warp sums in its own mask."""
    i = cuda.threadIdx.x
    mask = 0xFFFF if i < 16 else 0xFFFF0000
    v = x[i]
    step = reach
    while step > 0:
        v += cuda.shfl_xor_sync(mask, v, step)
        step //= 2
    out[i] = v


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_masks_are_honoured(schedule: str) -> None:
    x = np.arange(32, dtype=np.float32)
    out = np.zeros(32, np.float32)
    Simulator(schedule).launch(half_warp_kernel, 1, 32, (out, x, 8))
    np.testing.assert_array_equal(out, np.repeat(x.reshape(2, 16).sum(1), 16))
    with pytest.raises(SimulationError, match="reads inactive lane"):
        Simulator(schedule).launch(half_warp_kernel, 1, 32, (out, x, 16))


@cuda.jit
def left_lane_kernel(out: Any) -> None:
    if cuda.threadIdx.x < 20:
        out[cuda.threadIdx.x] = cuda.shfl_xor_sync(FULL, out[cuda.threadIdx.x], 1)


@cuda.jit
def foreign_mask_kernel(out: Any) -> None:
    cuda.syncwarp(0x0000FFFF)
    out[0] = 1


@cuda.jit
def mixed_kernel(out: Any) -> None:
    if cuda.threadIdx.x < 16:
        cuda.syncwarp()
    else:
        out[0] = cuda.shfl_xor_sync(FULL, out[0], 1)


@pytest.mark.parametrize(
    "kernel, message",
    [
        (left_lane_kernel, "still waits for lanes"),
        (foreign_mask_kernel, "not in its own mask"),
        (mixed_kernel, "meets"),
    ],
)
def test_wrong_warp_operations_are_errors(kernel: Any, message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        Simulator().launch(kernel, 1, 32, (np.zeros(32, np.float32),))


def test_impossible_launches_are_errors() -> None:
    for grid, block in ((0, 32), (1, 0), (1, 1025)):
        with pytest.raises(SimulationError, match="has 1 to"):
            Simulator().launch(block_order_kernel, grid, block, (np.zeros(1),))


# ---- recorded steps ----------------------------------------------------------------------------------------------


def test_starting_a_graph_runs_no_line_of_what_was_recorded() -> None:
    """It adds what lay there in the numbers that it had, however these have changed."""
    x, ran, value = np.ones(40, np.float32), list[int](), [2.0]
    with use_runtime(SimulatedRuntime()) as device:
        y = device.empty((40,), np.float32)

        def step() -> None:
            ran.append(1)
            device.fill(y, value[0])
            ops.add(y, x)

        start = device.record(step)
        value[0] = 100.0
        assert np.isnan(y).all()  # nothing is done while it is recorded
        for _ in range(2):
            x += 1
            start()
            np.testing.assert_array_equal(y, 2 + x)
    assert ran == [1]


def test_a_graph_keeps_no_memory_and_takes_none() -> None:
    x = np.ones(8, np.float32)
    with use_runtime(SimulatedRuntime()) as device:
        held = [device.empty((8,), np.float32)]
        start = device.record(lambda: ops.add(held[0][:4], x[:4]))
        start()
        held.clear()
        with pytest.raises(DeviceError, match="memory that has been given back"):
            start()
        for what in (lambda: device.empty((1,), np.float32), lambda: device.upload(x), device.synchronize):
            with pytest.raises(DeviceError, match="inside a graph"):
                device.record(what)
        assert not device.capturing
