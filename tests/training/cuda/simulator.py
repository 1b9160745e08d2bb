"""CUDA threads as greenlets: kernels run on the CPU, deterministically, under a schedule that the test chooses.

A kernel compiled by ``numba.cuda.jit`` keeps its Python function. :class:`Simulator` runs that function once for each
thread, with ``cuda`` replaced by a simulated module, device functions by their Python functions, and the instructions
of ``ops/cuda/_intrinsics.py`` by the twins in :mod:`simulated_intrinsics`. No environment variable, no driver.

What it checks:

- Threads of a block run one after the other up to the next barrier, in the order of the schedule ("forward",
  "reverse" or "random" with a seed), blocks likewise. A kernel whose results differ between schedules lacks a barrier.
- Shared and local arrays start as NaN (or -77), so a value read before it was written shows.
- A barrier that some threads of the block miss, or meet at another line, is an error: divergent barrier.
- Warp operations honour their mask. Calling one with a mask that does not name the caller, waiting for a lane that has
  left the kernel, mixing two operations, and reading from a lane outside of the mask are errors.
- ``load`` and ``store`` refuse indices outside of the array.

Warps are 32 threads; time and memory consistency are not modelled.
"""

from __future__ import annotations

import contextvars
import math
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import greenlet
import numpy as np
from numba.cuda.dispatcher import CUDADispatcher
from numba.cuda.extending import intrinsic

SCHEDULES = ("forward", "reverse", "random")
_Intrinsic = type(intrinsic(lambda _context: None))


class SimulationError(RuntimeError):
    """The kernel did what real hardware punishes with a hang or with garbage."""


class _Dim:
    __slots__ = ("x", "y", "z")

    def __init__(self, x: int, y: int = 1, z: int = 1) -> None:
        self.x, self.y, self.z = x, y, z


class _Thread:
    __slots__ = ("block", "dim", "greenlet", "index", "waiting")

    def __init__(self, index: int, block: _Block) -> None:
        self.index, self.block = index, block
        self.dim = _Dim(index, 0, 0)
        self.waiting: Any = None  # None: can run; _Barrier or _Exchange: parked there
        self.greenlet: Any = None

    def park(self, reason: Any) -> None:
        """Give the processor back until the scheduler clears ``waiting``."""
        self.waiting = reason
        self.greenlet.parent.switch()


class _Exchange:
    """A warp operation that its lanes meet at."""

    def __init__(self, kind: str, mask: int) -> None:
        self.kind, self.mask = kind, mask
        self.values: dict[Any, Any] = {}

    @property
    def complete(self) -> bool:
        return len(self.values) == bin(self.mask).count("1")


class _Block:
    """One block: its threads, shared arrays and pending warp operations."""

    def __init__(self, simulator: Simulator, index: int, block_dim: int) -> None:
        self.simulator, self.index, self.dim = simulator, index, block_dim
        self.shared: dict[Any, Any] = {}
        self.exchanges: dict[tuple[int, int], _Exchange] = {}
        self.threads = [_Thread(i, self) for i in range(block_dim)]
        self.dims = _Dim(index, 0, 0), _Dim(block_dim)

    def run_apart(self, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """Threads that never wait for each other: one after the other, without greenlets."""
        for thread in self.simulator.ordered(self.threads):
            self.simulator.thread = thread
            function(*arguments)

    def run(self, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """Threads that may wait: each runs to its next barrier, then the next one."""
        scheduler = greenlet.getcurrent()
        for thread in self.threads:
            thread.greenlet = greenlet.greenlet(function, scheduler)
            thread.greenlet.gr_context = contextvars.copy_context()  # where NumPy's error state lives
        live = list(self.threads)
        while live:
            ready = [t for t in live if t.waiting is None]
            if not ready:
                raise SimulationError(self._deadlock(live))
            for thread in self.simulator.ordered(ready):
                self.simulator.thread = thread
                if thread.greenlet:
                    thread.greenlet.switch()
                else:
                    thread.greenlet.switch(*arguments)
            live = [t for t in live if not t.greenlet.dead]
            self._release(live)

    def _release(self, live: list[_Thread]) -> None:
        """Open the barrier when every thread of the block stands at it."""
        at = [t for t in live if isinstance(t.waiting, tuple)]
        if not at or len(at) < len(live):
            return
        if len(at) < self.dim:
            gone = self.dim - len(at)
            raise SimulationError(f"divergent barrier: {gone} of {self.dim} threads have left")
        places = {t.waiting for t in at}
        if len(places) > 1:
            lines = ", ".join(f"{code.co_name}:{line}" for code, line in sorted(places, key=str))
            raise SimulationError(f"divergent barrier: threads stand at different ones: {lines}")
        for thread in at:
            thread.waiting = None

    def _deadlock(self, live: list[_Thread]) -> str:
        barrier = sum(isinstance(t.waiting, tuple) for t in live)
        missing = []
        for (warp, mask), exchange in self.exchanges.items():
            lanes = [i for i in range(32) if mask >> i & 1 and i not in exchange.values]
            missing.append(f"warp {warp} {exchange.kind} still waits for lanes {lanes}")
        return f"divergent barrier or warp operation: {barrier} threads at a barrier; {missing}"


class _Space:
    """cuda.shared or cuda.local."""

    def __init__(self, simulator: Simulator, is_shared: bool) -> None:
        self.simulator, self.is_shared = simulator, is_shared

    def array(self, shape: Any, dtype: Any) -> Any:
        def new() -> Any:
            made = np.empty(shape, np.dtype(str(dtype)))
            made.fill(np.nan if made.dtype.kind == "f" else 77)
            return made

        if not self.is_shared:
            return new()
        frame = sys._getframe(1)  # an array belongs to its line, like a static variable
        key = (frame.f_code, frame.f_lineno)
        shared = self.simulator.thread.block.shared
        if key not in shared:
            shared[key] = new()
        return shared[key]


class _Cuda:
    """The part of ``numba.cuda`` that kernels here use."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self.shared = _Space(simulator, True)
        self.local = _Space(simulator, False)

    @property
    def threadIdx(self) -> _Dim:
        dim: _Dim = self._simulator.thread.dim
        return dim

    @property
    def blockIdx(self) -> _Dim:
        dim: _Dim = self._simulator.thread.block.dims[0]
        return dim

    @property
    def blockDim(self) -> _Dim:
        dim: _Dim = self._simulator.thread.block.dims[1]
        return dim

    @property
    def gridDim(self) -> _Dim:
        return _Dim(self._simulator.grid)

    def grid(self, _ndim: int) -> int:
        thread = self._simulator.thread
        return thread.block.index * thread.block.dim + thread.index

    def syncthreads(self) -> None:
        frame = sys._getframe(1)
        self._simulator.thread.park((frame.f_code, frame.f_lineno))

    # ---- warp operations -----------------------------------------------------------------------------------------

    def syncwarp(self, mask: int = 0xFFFFFFFF) -> None:
        self._simulator.exchange("syncwarp", mask, None)

    def _shuffle(self, kind: str, mask: int, value: Any, source: Callable[[int], int]) -> Any:
        lane = self._simulator.thread.index % 32
        values = self._simulator.exchange(kind, mask, value)
        wanted = source(lane)
        if not 0 <= wanted < 32:
            return value  # as the hardware does at the edge of the warp
        if wanted not in values:
            raise SimulationError(f"{kind}: lane {lane} reads inactive lane {wanted}")
        return values[wanted]

    def shfl_sync(self, mask: int, value: Any, source: int) -> Any:
        return self._shuffle("shfl_sync", mask, value, lambda _lane: int(source) % 32)

    def shfl_xor_sync(self, mask: int, value: Any, distance: int) -> Any:
        return self._shuffle("shfl_xor_sync", mask, value, lambda lane: lane ^ int(distance))

    def shfl_down_sync(self, mask: int, value: Any, delta: int) -> Any:
        return self._shuffle("shfl_down_sync", mask, value, lambda lane: lane + int(delta))

    def shfl_up_sync(self, mask: int, value: Any, delta: int) -> Any:
        return self._shuffle("shfl_up_sync", mask, value, lambda lane: lane - int(delta))

    def ballot_sync(self, mask: int, predicate: Any) -> int:
        values = self._simulator.exchange("ballot_sync", mask, bool(predicate))
        return sum(1 << lane for lane, value in values.items() if value)

    def any_sync(self, mask: int, predicate: Any) -> bool:
        return any(self._simulator.exchange("any_sync", mask, bool(predicate)).values())

    def all_sync(self, mask: int, predicate: Any) -> bool:
        return all(self._simulator.exchange("all_sync", mask, bool(predicate)).values())


class _Math:
    """math, in the type of its argument: float32 in, float32 out."""

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        real = getattr(math, name)

        def typed(x: Any) -> Any:
            return np.float32(real(x)) if isinstance(x, np.float32) else real(x)

        return typed


class Simulator:
    """Runs kernels under one schedule."""

    def __init__(self, schedule: str = "forward", seed: int = 0) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule {schedule!r}; choose from {SCHEDULES}")
        self.schedule = schedule
        self.random = random.Random(seed)
        self.cuda, self.math = _Cuda(self), _Math()
        self.thread: Any = None  # the running one
        self.grid = 0
        self._translated: dict[Any, Any] = {}
        self._waits: set[Any] = set()  # translated functions that hold a barrier or warp operation

    def ordered(self, items: list[Any]) -> list[Any]:
        """The items in the schedule's order."""
        if self.schedule == "reverse":
            return items[::-1]
        if self.schedule == "random":
            return self.random.sample(items, len(items))
        return items

    def launch(self, kernel: Any, grid: int, block: int, arguments: tuple[Any, ...]) -> None:
        """Run ``kernel[grid, block](*arguments)``; arrays are NumPy's and are written in place."""
        if not 1 <= block <= 1024:
            raise SimulationError(f"a block has 1 to 1024 threads, not {block}")
        if not 1 <= grid < 2**31:
            raise SimulationError(f"a grid has 1 to 2^31 - 1 blocks, not {grid}")
        function = self.translate(kernel)
        self.grid = grid
        with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
            for index in self.ordered(list(range(grid))):
                made = _Block(self, index, block)
                (made.run if function in self._waits else made.run_apart)(function, arguments)

    def exchange(self, kind: str, mask: int, value: Any) -> dict[Any, Any]:
        """Meet the lanes of ``mask``; returns lane -> value."""
        thread, mask = self.thread, int(mask) & 0xFFFFFFFF
        warp, lane = divmod(thread.index, 32)
        if not mask >> lane & 1:
            raise SimulationError(f"{kind}: lane {lane} is not in its own mask {mask:#x}")
        pending = thread.block.exchanges
        exchange = pending.setdefault((warp, mask), _Exchange(kind, mask))
        if exchange.kind != kind:
            raise SimulationError(f"{kind} in lane {lane} meets {exchange.kind} in others")
        exchange.values[lane] = value
        if exchange.complete:
            del pending[(warp, mask)]
            for other in thread.block.threads:
                if other.waiting is exchange:
                    other.waiting = None
        else:
            thread.park(exchange)
        return exchange.values

    def translate(self, kernel: Any) -> Callable[..., Any]:
        """The Python function of a kernel or device function, with its globals simulated."""
        if kernel in self._translated:
            found: Callable[..., Any] = self._translated[kernel]
            return found
        source = kernel.py_func
        names: dict[str, Any] = dict(source.__globals__)
        used = {name: self._simulated(names[name]) for name in source.__code__.co_names if name in names}
        cells = tuple(types.CellType(self._simulated(cell.cell_contents)) for cell in source.__closure__ or ())
        made = types.FunctionType(
            source.__code__, {**names, **used}, source.__name__, source.__defaults__, cells or None
        )
        called = [*used.values(), *(cell.cell_contents for cell in cells)]
        waits = any(isinstance(x, types.FunctionType) and x in self._waits for x in called)
        if waits or any(name == "mma_bf16" or "sync" in name for name in source.__code__.co_names):
            self._waits.add(made)
        self._translated[kernel] = made
        return made

    def _simulated(self, value: Any) -> Any:
        from simulated_intrinsics import twin

        if isinstance(value, CUDADispatcher):
            return self.translate(value)
        if isinstance(value, _Intrinsic):
            return twin(self, value._name)
        if isinstance(value, types.ModuleType):
            return {"numba.cuda": self.cuda, "math": self.math}.get(value.__name__, value)
        return value
