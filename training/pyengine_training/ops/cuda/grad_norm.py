"""Global gradient norm and clipping.

norm = sqrt(sum of squares over every gradient);  coefficient = min(1, max_norm / (norm + 1e-6))
Sums run in float32 trees over fixed blocks of the flat arena; the blocks' sums are added in a fixed order too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..cpu.grad_norm import BLOCK, clip_coefficient
from ._intrinsics import bits_of_float, load, store
from ._jit import Array, cuda, f4, i8, kernel, row_threads
from ._reduce import block_sum
from ._runtime import flat, runtime


@kernel
def sum_of_squares_kernel(partial: Any, g: Any, n: int, block: int) -> None:
    """partial[b] = sum of g^2 over elements [b * block, (b + 1) * block)."""
    b = i8(cuda.blockIdx.x)
    end = min(i8(n), (b + i8(1)) * block)
    total = f4(0)
    i = b * block + cuda.threadIdx.x
    while i < end:
        value = load(g, i)
        total += value * value
        i += cuda.blockDim.x
    total = block_sum(total)
    if cuda.threadIdx.x == 0:
        store(partial, b, total)


def sum_of_squares(partial: Array, g: Array, block: int) -> None:
    """partial[b] = sum of g^2 over block b of the flat array g; partial (ceil(len(g) / block),) float32."""
    arguments = flat(partial), flat(g), g.size, block
    runtime().launch(sum_of_squares_kernel, partial.size, row_threads(min(block, g.size)), arguments)


@kernel
def clip_kernel(norm_and_clip: Any, partial: Any, n: int, max_norm: Any) -> None:
    """norm_and_clip[0] = sqrt(sum of partial), [1] = the clip coefficient, -1 if the norm is not finite; one block."""
    total = f4(0)
    i = i8(cuda.threadIdx.x)
    while i < n:
        total += load(partial, i)
        i += cuda.blockDim.x
    norm = math.sqrt(block_sum(total))
    if cuda.threadIdx.x == 0:
        store(norm_and_clip, 0, norm)
        coefficient = f4(1)
        if max_norm > f4(0):
            coefficient = min(f4(1), max_norm / (norm + f4(1e-6)))
        if bits_of_float(norm) & np.int32(0x7FFFFFFF) >= np.int32(0x7F800000):
            coefficient = f4(-1)  # the updates see it and leave everything as it is
        store(norm_and_clip, 1, coefficient)


def norm_and_clip(out: Array, partial: Array, max_norm: float) -> None:
    """out (2,) float32: the norm and the factor that clips it, without leaving the device."""
    arguments = flat(out), flat(partial), partial.size, f4(max_norm)
    runtime().launch(clip_kernel, 1, row_threads(partial.size), arguments)


__all__ = ["BLOCK", "clip_coefficient", "norm_and_clip", "sum_of_squares"]
