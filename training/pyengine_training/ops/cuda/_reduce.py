"""Sums and maxima over a warp and over a block. Every thread gets the result; the order is fixed.

Every thread of the block must call them (they hold barriers), and a block is made of whole warps.
"""

from __future__ import annotations

from typing import Any

from numba import float32

from ._jit import FULL, cuda, device, f4

LOWEST = f4(-1e30)  # stands for minus infinity, which relaxed arithmetic may not represent


@device
def warp_sum(value: Any) -> Any:
    """The warp's sum, by halves."""
    value += cuda.shfl_xor_sync(FULL, value, 16)
    value += cuda.shfl_xor_sync(FULL, value, 8)
    value += cuda.shfl_xor_sync(FULL, value, 4)
    value += cuda.shfl_xor_sync(FULL, value, 2)
    value += cuda.shfl_xor_sync(FULL, value, 1)
    return value


@device
def warp_max(value: Any) -> Any:
    """The warp's maximum, by halves."""
    value = max(value, cuda.shfl_xor_sync(FULL, value, 16))
    value = max(value, cuda.shfl_xor_sync(FULL, value, 8))
    value = max(value, cuda.shfl_xor_sync(FULL, value, 4))
    value = max(value, cuda.shfl_xor_sync(FULL, value, 2))
    value = max(value, cuda.shfl_xor_sync(FULL, value, 1))
    return value


@device
def block_sum(value: Any) -> Any:
    """The block's sum: warps first, then every warp adds up the warps' sums for itself."""
    sums = cuda.shared.array(32, float32)
    lane = cuda.threadIdx.x % 32
    warp = cuda.threadIdx.x // 32
    value = warp_sum(value)
    if lane == 0:
        sums[warp] = value
    cuda.syncthreads()
    total = f4(0)
    if lane < cuda.blockDim.x // 32:
        total = sums[lane]
    total = warp_sum(total)
    cuda.syncthreads()  # the next call writes the sums again
    return total


@device
def block_max(value: Any) -> Any:
    """The block's maximum."""
    tops = cuda.shared.array(32, float32)
    lane = cuda.threadIdx.x % 32
    warp = cuda.threadIdx.x // 32
    value = warp_max(value)
    if lane == 0:
        tops[warp] = value
    cuda.syncthreads()
    top = LOWEST
    if lane < cuda.blockDim.x // 32:
        top = tops[lane]
    top = warp_max(top)
    cuda.syncthreads()
    return top
