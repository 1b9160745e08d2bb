"""A device whose arrays are NumPy's, whose kernels run in the simulator and whose matrix products are NumPy's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from simulated_intrinsics import from_bf16, to_bf16
from simulator import Simulator

Array = Any


class SimulatedRuntime:
    """The runtime of ``ops.cuda`` on a simulator. Fresh memory is NaN (floats) or 77 (integers)."""

    capturing = False
    kind = "simulated"
    stream_address = 0

    def __init__(self, schedule: str = "forward", seed: int = 0) -> None:
        self.check: Callable[[], None] = lambda: None
        self.simulator = Simulator(schedule, seed)
        self.launches: list[str] = []
        self.recorded = 0
        self.allowed = False  # TF32
        self.products: list[bool] = []  # of float32: whether TF32 was allowed

    @property
    def place(self) -> str:
        """Forked processes have GPUs of their own."""
        return f"process {os.getpid()}"

    def launch(self, kernel: Any, grid: int, block: int, arguments: tuple[Any, ...]) -> None:
        self.launches.append(kernel.py_func.__name__)
        self.simulator.launch(kernel, grid, block, arguments)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        made = np.empty(shape, dtype)
        made.fill(np.nan if made.dtype.kind == "f" else 77)
        return made

    def upload(self, host: Any, out: Any = None) -> Array:
        if out is None:
            return np.array(host)
        out[...] = host
        return out

    def download(self, array: Array) -> Any:
        self.synchronize()
        return array.copy()

    def fill(self, array: Array, value: float) -> None:
        array.fill(value)

    @contextlib.contextmanager
    def tensor_floats(self, allowed: bool) -> Iterator[None]:
        """Only remembered: products are float32 here."""
        before, self.allowed = self.allowed, allowed
        yield
        self.allowed = before

    def watch(self, check: Callable[[], None]) -> None:
        self.check = check

    def synchronize(self) -> None:
        self.check()

    def memory(self) -> tuple[int, int]:
        return 1 << 30, 1 << 30

    def record(self, function: Any) -> Any:
        self.recorded += 1
        return function

    def gemm(self, product: Any) -> None:
        """Inputs widened to float32, one rounding of the result."""
        p = product
        if p.a[0].dtype == np.float32:
            self.products.append(self.allowed)

        def view(part: Any, rows: int, cols: int) -> Array:
            array, start, length, stride = part
            last = start + (p.batch - 1) * stride + (rows - 1) * length + cols
            assert last <= array.size, "a product reaches past its array"
            steps = (stride * array.itemsize, length * array.itemsize, array.itemsize)
            return as_strided(array[start:], (p.batch, rows, cols), steps)

        def wide(x: Array) -> Array:
            return from_bf16(x) if x.dtype == np.uint16 else x

        a = wide(view(p.a, *((p.k, p.m) if p.trans_a else (p.m, p.k))))
        b = wide(view(p.b, *((p.n, p.k) if p.trans_b else (p.k, p.n))))
        c = view(p.c, p.m, p.n)
        with np.errstate(invalid="ignore", over="ignore"):  # as the hardware: infinities and NaN go on
            result = self._product(p, a, b, wide(c) if p.beta else None)
        c[...] = to_bf16(result) if c.dtype == np.uint16 else result

    @staticmethod
    def _product(p: Any, a: Array, b: Array, c: Array | None) -> Array:
        result = np.matmul(a.swapaxes(1, 2) if p.trans_a else a, b.swapaxes(1, 2) if p.trans_b else b)
        return result if c is None else result + np.float32(p.beta) * c
