"""How kernels are compiled and launched.

``kernel`` compiles with relaxed float semantics (approximate division, reordered sums); ``exact_kernel`` keeps IEEE
arithmetic and is what the quantizers use: their rounding is part of the file format.

House rules of every kernel here: arrays are one-dimensional; elements go through ``load`` and ``store``, which widen
and round bfloat16 (held as uint16); sums are float32; constants are float32 (``f4(0.5)``), because one float64
literal turns the arithmetic around it into float64; barriers stand outside of data-dependent branches; no atomics
on floats, so that results have the same bits every time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numba_cuda  # noqa: F401 - without this package numba.cuda is an older module of numba's own
import numpy as np
from numba import cuda as _cuda

from ._runtime import Array, DeviceError, runtime

cuda: Any = _cuda  # numba's stubs do not know threadIdx and its like
f4 = np.float32
i8 = np.int64
u4 = np.uint32  # indices that are divided: 64-bit division is slow; the compiler narrows products of these back
THREADS = 256  # of an elementwise kernel, and the most that a row gets
WARP = 32
WARPS = THREADS // WARP  # of a block whose warps have a row each
# Compiled kernels are kept on disk only where someone says so (gpu_check, in a folder of its own): the cache does not notice
# that a device function in another file has changed.
CACHE = os.environ.get("PYENGINE_CUDA_CACHE") == "1"
FULL = 0xFFFFFFFF  # every lane of a warp


def kernel(function: Callable[..., None]) -> Any:
    """Compile for the device at the first launch, with relaxed float semantics."""
    return cuda.jit(fastmath=True, cache=CACHE)(function)


def exact_kernel(function: Callable[..., None]) -> Any:
    """Compile for the device at the first launch: every operation rounded as IEEE 754 says."""
    return cuda.jit(fastmath=False, cache=CACHE)(function)


def device(function: Callable[..., Any]) -> Any:
    """A function that kernels call; it takes on their float semantics once inlined."""
    return cuda.jit(device=True, forceinline=True, fastmath=True)(function)


def exact_device(function: Callable[..., Any]) -> Any:
    """A function for exact kernels."""
    return cuda.jit(device=True, forceinline=True, fastmath=False)(function)


def launch_elements(function: Any, n: int, *arguments: Any) -> None:
    """One thread for each of n elements; the kernel guards with ``i < n`` itself."""
    if n:
        runtime().launch(function, -(-n // THREADS), THREADS, arguments)


def launch_rows(function: Any, n_rows: int, width: int, *arguments: Any, most: int = THREADS) -> None:
    """One block for each row, with as many threads (whole warps, at most ``most``) as ``width`` pieces of a row feed."""
    if n_rows:
        runtime().launch(function, n_rows, row_threads(width, most), arguments)


def launch_warps(function: Any, n: int, *arguments: Any) -> None:
    """One warp for each of n rows; the kernel asks :func:`warp_index` and guards with ``< n`` itself."""
    if n:
        runtime().launch(function, -(-n // WARPS), THREADS, arguments)


@device
def warp_index() -> Any:
    """Which warp of the grid this thread is in."""
    return i8(cuda.blockIdx.x) * WARPS + cuda.threadIdx.x // WARP


def unsigned(*sizes: int, addressed: int) -> tuple[Any, ...]:
    """Sizes as uint32 arguments, which kernels must not mix with signed numbers.

    addressed: elements of the largest array that is indexed with them. Raises DeviceError where they do not fit.
    """
    largest = max(*sizes, addressed)
    if largest >= 1 << 32:
        raise DeviceError(f"{largest:,} elements are more than a kernel indexes in 32 bits: use more --shards")
    return tuple(map(u4, sizes))


def row_threads(width: int, most: int = THREADS) -> int:
    """Threads for a row: whole warps, at most so many."""
    return min(most, -(-width // WARP) * WARP)


__all__ = [
    "FULL",
    "THREADS",
    "WARP",
    "WARPS",
    "Array",
    "cuda",
    "device",
    "exact_device",
    "exact_kernel",
    "f4",
    "i8",
    "kernel",
    "launch_elements",
    "launch_rows",
    "launch_warps",
    "row_threads",
    "u4",
    "unsigned",
    "warp_index",
]
