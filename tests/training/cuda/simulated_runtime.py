"""A device whose arrays are NumPy's, whose kernels run in the simulator and whose matrix products are NumPy's."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from pyengine_training.ops.cuda._runtime import DeviceError, Product
from simulated_intrinsics import from_bf16, to_bf16
from simulator import Simulator

Array = Any


class Place:
    """Where an array lies, as a graph knows it: an address, which keeps no memory alive."""

    def __init__(self, array: Array) -> None:
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        self.owner = weakref.ref(owner)
        self.offset = array.ctypes.data - owner.ctypes.data
        self.shape, self.dtype, self.strides = array.shape, array.dtype, array.strides

    def array(self) -> Array:
        """Raises DeviceError where the memory has been given back."""
        owner = self.owner()
        if owner is None:
            raise DeviceError("a graph uses memory that has been given back")
        return np.ndarray(self.shape, self.dtype, owner, self.offset, self.strides)


class SimulatedRuntime:
    """The runtime of ``ops.cuda`` on a simulator. Fresh memory is NaN (floats) or 77 (integers).

    What is recorded is what a graph holds: launches, products and fills, with the numbers and addresses that they had. Starting
    it runs no line of the function that was recorded.
    """

    kind = "simulated"
    stream_address = 0

    def __init__(self, schedule: str = "forward", seed: int = 0) -> None:
        self.check: Callable[[], None] = lambda: None
        self.simulator = Simulator(schedule, seed)
        self.capturing = False
        self._graph: list[Callable[[], None]] = []
        self.launches: list[str] = []
        self.recorded = 0
        self.allowed = False  # TF32
        self.products: list[bool] = []  # of float32: whether TF32 was allowed

    @property
    def place(self) -> str:
        """Forked processes have GPUs of their own."""
        return f"process {os.getpid()}"

    def _do(self, work: Callable[..., None], *arguments: Any) -> None:
        """Now, or whenever the graph starts that is being recorded."""
        if not self.capturing:
            work(*arguments)
            return
        places = [Place(x) if isinstance(x, np.ndarray) else x for x in arguments]
        self._graph.append(lambda: work(*(x.array() if isinstance(x, Place) else x for x in places)))

    def _refuse(self, what: str) -> None:
        if self.capturing:
            raise DeviceError(f"{what} inside a graph")

    def launch(self, kernel: Any, grid: int, block: int, arguments: tuple[Any, ...]) -> None:
        def start(*arguments: Any) -> None:
            self.launches.append(kernel.py_func.__name__)
            self.simulator.launch(kernel, grid, block, arguments)

        self._do(start, *arguments)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        self._refuse("an allocation")
        made = np.empty(shape, dtype)
        made.fill(np.nan if made.dtype.kind == "f" else 77)
        return made

    def upload(self, host: Any, out: Any = None) -> Array:
        self._refuse("an upload")
        if out is None:
            return np.array(host)
        out[...] = host
        return out

    def download(self, array: Array) -> Any:
        self._refuse("a download")
        self.synchronize()
        return array.copy()

    def fill(self, array: Array, value: float) -> None:
        self._do(lambda x: x.fill(value), array)

    @contextlib.contextmanager
    def tensor_floats(self, allowed: bool) -> Iterator[None]:
        """Only remembered: products are float32 here."""
        before, self.allowed = self.allowed, allowed
        yield
        self.allowed = before

    def watch(self, check: Callable[[], None]) -> None:
        self.check = check

    def synchronize(self) -> None:
        self._refuse("waiting")
        self.check()

    def memory(self) -> tuple[int, int]:
        return 1 << 30, 1 << 30

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        graph, self._graph, self.capturing = list[Callable[[], None]](), [], True
        try:
            function()
        finally:
            graph, self._graph, self.capturing = self._graph, graph, False

        def start() -> None:
            for work in graph:
                work()

        return start

    def gemm(self, product: Any) -> None:
        """Inputs widened to float32, one rounding of the result."""
        p, allowed = product, self.allowed
        sizes, more = (p.m, p.n, p.k), {"trans_a": p.trans_a, "trans_b": p.trans_b, "beta": p.beta, "batch": p.batch}

        def multiply(*arrays: Array) -> None:
            ends = [(array, *part[1:]) for array, part in zip(arrays, (p.c, p.a, p.b), strict=True)]
            self._multiply(Product(*ends, sizes, **more), allowed)

        self._do(multiply, p.c[0], p.a[0], p.b[0])

    def _multiply(self, p: Any, allowed: bool) -> None:
        if p.a[0].dtype == np.float32:
            self.products.append(allowed)

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
