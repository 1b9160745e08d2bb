"""Plain storage: made, filled, added to, summed. Names as in ``ops.cpu.buffers``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float32

from ._intrinsics import load, store
from ._jit import THREADS, Array, cuda, f4, i8, kernel, row_threads
from ._reduce import block_sum
from ._runtime import flat, kept, runtime
from ._vectors import WIDTH, aligned, launch_vectors, read, write

SUM_BLOCKS = 64
LOGITS = 1 << 29


def wide_dtype(dtype: Any) -> Any:
    """The type of statistics and sums beside activations of this type: float32 beside bfloat16 (uint16)."""
    return np.float32 if np.dtype(dtype) == np.uint16 else dtype


def upload(host: Any) -> Array:
    """A device array with the host array's values."""
    return runtime().upload(host)


def loss_rows(vocab_size: int) -> int:
    """Rows of logits to hold at a time: enough to keep the device busy, at most LOGITS elements."""
    return max(512, LOGITS // vocab_size)


def counted_rows(targets: Array) -> None:
    """All of them: how many count is known on the host only, and a recorded graph has the same shapes in every step."""


def empty(shape: tuple[int, ...], dtype: Any) -> Array:
    """An uninitialized device array."""
    return runtime().empty(tuple(shape), dtype)


def zeros(shape: Any, dtype: Any) -> Array:
    """A zeroed device array; shape may be an int."""
    made = empty(shape if isinstance(shape, tuple) else (int(shape),), dtype)
    runtime().fill(made, 0)
    return made


def fill(x: Array, value: float) -> None:
    """Every element = value (of a bfloat16 array: 0 only, whose bits are 0 too)."""
    runtime().fill(x, value)


@kernel
def add_kernel(y: Any, x: Any, n: int, whole: bool) -> None:
    """y += x, WIDTH elements."""
    i = i8(cuda.grid(1)) * WIDTH
    if i < n:
        a = cuda.local.array(WIDTH, float32)
        b = cuda.local.array(WIDTH, float32)
        read(a, y, i, n, whole)
        read(b, x, i, n, whole)
        for e in range(WIDTH):
            a[e] += b[e]
        write(y, i, n, a, whole)


def add(y: Array, x: Array) -> None:
    """y += x, element by element."""
    launch_vectors(add_kernel, y.size, flat(y), flat(x), y.size, aligned(y, x))


@kernel
def copy_kernel(y: Any, x: Any, n: int, whole: bool) -> None:
    """y = x, WIDTH elements, rounding or widening where the types differ."""
    i = i8(cuda.grid(1)) * WIDTH
    if i < n:
        values = cuda.local.array(WIDTH, float32)
        read(values, x, i, n, whole)
        write(y, i, n, values, whole)


def copy(y: Array, x: Array) -> None:
    """y = x of float32 or bfloat16, which are rounded or widened into each other."""
    launch_vectors(copy_kernel, y.size, flat(y), flat(x), y.size, aligned(y, x))


@kernel
def partial_sum_kernel(partial: Any, x: Any, n: int) -> None:
    """partial[block] = sum of the elements block, block + blocks, ... of rows of blockDim."""
    total = f4(0)
    i = cuda.grid(1)
    stride = cuda.blockDim.x * cuda.gridDim.x
    while i < n:
        total += load(x, i)
        i += stride
    total = block_sum(total)
    if cuda.threadIdx.x == 0:
        store(partial, cuda.blockIdx.x, total)


def partial_sums(x: Array) -> Array:
    """(SUM_BLOCKS,) float32 whose sum is that of x: a device array, valid until the next call."""
    partial = kept("partial_sums", SUM_BLOCKS, np.float32)
    blocks = min(SUM_BLOCKS, -(-x.size // THREADS))
    if blocks < SUM_BLOCKS:
        fill(partial, 0)
    runtime().launch(partial_sum_kernel, blocks, row_threads(x.size), (partial, flat(x), x.size))
    return partial


def total(x: Array) -> float:
    """The sum of all elements; waits for the device."""
    return float(np.asarray(runtime().download(partial_sums(x)), np.float64).sum())
