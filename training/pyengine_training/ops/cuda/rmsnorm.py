"""RMSNorm over the last axis.  x, y, dy, dx, residual (N, dim); w, dw (dim,); inv_rms (N,) kept for the backward.

forward   inv_rms = 1 / sqrt(mean(x^2) + eps);  y = x * inv_rms * w                      written with =
backward  dx += inv_rms * (dy*w - x * inv_rms^2 * mean(dy*w*x))                         accumulated: dx carries
          dw += sum over rows of dy * x * inv_rms                                       the residual stream's gradient

One warp for each row. The weight's gradient is summed in two steps without atomics: PARTS blocks of rows into a
scratch array, then its rows in ascending order, so the same input gives the same bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import float32

from ..needs import Need, Needs
from ._intrinsics import load, store
from ._jit import WARP, Array, cuda, device, f4, i8, kernel, launch_elements, launch_warps, warp_index
from ._reduce import warp_sum
from ._runtime import flat, runtime
from ._vectors import WIDTH, aligned, read, write

PARTS = 128  # at most so many partial sums of the weight's gradient
COLUMNS = 64  # threads of a block that sums columns


def rmsnorm_state(n: int, wide: Any) -> Needs:
    """Kept for the backward; wide: type of statistics."""
    return {"inv_rms": Need((n,), wide)}


def rmsnorm_scratch(dim: int) -> Needs:
    """Partial sums of the weight's gradient."""
    return {"norm_parts": Need((PARTS * dim,), np.float32)}


@device
def normalize_row(y: Any, x: Any, w: Any, r: Any, base: int, dim: int, whole: bool) -> None:
    """y = x * r * w for the row that begins at ``base``, by one warp."""
    values = cuda.local.array(WIDTH, float32)
    weight = cuda.local.array(WIDTH, float32)
    c = i8(cuda.threadIdx.x % WARP) * WIDTH
    while c < dim:
        read(values, x, base + c, base + dim, whole)
        read(weight, w, c, dim, whole)
        for e in range(WIDTH):
            values[e] *= r * weight[e]
        write(y, base + c, base + dim, values, whole)
        c += WARP * WIDTH


@kernel
def rmsnorm_kernel(
    y: Any, inv_rms: Any, x: Any, w: Any, eps: Any, n: int, dim: int, whole: bool
) -> None:
    """y and inv_rms of one row."""
    row = warp_index()
    if row >= n:
        return
    base = row * dim
    total = f4(0)
    values = cuda.local.array(WIDTH, float32)
    c = i8(cuda.threadIdx.x % WARP) * WIDTH
    while c < dim:
        read(values, x, base + c, base + dim, whole)
        for e in range(WIDTH):
            total += values[e] * values[e]
        c += WARP * WIDTH
    total = warp_sum(total)
    r = f4(1) / math.sqrt(total / f4(dim) + eps)
    if cuda.threadIdx.x % WARP == 0:
        store(inv_rms, row, r)
    normalize_row(y, x, w, r, base, dim, whole)


@kernel
def rmsnorm_residual_kernel(
    y: Any, inv_rms: Any, x: Any, residual: Any, w: Any, eps: Any, n: int, dim: int, whole: bool
) -> None:
    """x += residual, then as above; each thread reads back only what it wrote."""
    row = warp_index()
    if row >= n:
        return
    base = row * dim
    total = f4(0)
    values = cuda.local.array(WIDTH, float32)
    more = cuda.local.array(WIDTH, float32)
    c = i8(cuda.threadIdx.x % WARP) * WIDTH
    while c < dim:
        read(values, x, base + c, base + dim, whole)
        read(more, residual, base + c, base + dim, whole)
        for e in range(WIDTH):
            values[e] += more[e]
        write(x, base + c, base + dim, values, whole)
        read(values, x, base + c, base + dim, whole)  # what was stored: rounded where x is bfloat16
        for e in range(WIDTH):
            total += values[e] * values[e]
        c += WARP * WIDTH
    total = warp_sum(total)
    r = f4(1) / math.sqrt(total / f4(dim) + eps)
    if cuda.threadIdx.x % WARP == 0:
        store(inv_rms, row, r)
    normalize_row(y, x, w, r, base, dim, whole)


def rmsnorm_forward(y: Array, inv_rms: Array, x: Array, w: Array, eps: float) -> None:
    """Normalize rows."""
    n, dim = x.shape
    arrays = flat(y), flat(inv_rms), flat(x), flat(w)
    launch_warps(rmsnorm_kernel, n, *arrays, f4(eps), n, dim, aligned(y, x, w, width=dim))


def rmsnorm_residual_forward(y: Array, inv_rms: Array, x: Array, residual: Array, w: Array, eps: float) -> None:
    """x += residual, then normalize x: the residual addition costs no pass of its own."""
    n, dim = x.shape
    arrays = flat(y), flat(inv_rms), flat(x), flat(residual), flat(w)
    whole = aligned(y, x, residual, w, width=dim)
    launch_warps(rmsnorm_residual_kernel, n, *arrays, f4(eps), n, dim, whole)


@kernel
def rmsnorm_backward_kernel(
    dx: Any, dy: Any, x: Any, w: Any, inv_rms: Any, n: int, dim: int, whole: bool
) -> None:
    """dx of one row (+=)."""
    row = warp_index()
    if row >= n:
        return
    base = row * dim
    past = base + dim
    r = load(inv_rms, row)
    gradient = cuda.local.array(WIDTH, float32)
    weight = cuda.local.array(WIDTH, float32)
    values = cuda.local.array(WIDTH, float32)
    out = cuda.local.array(WIDTH, float32)
    total = f4(0)
    c = i8(cuda.threadIdx.x % WARP) * WIDTH
    while c < dim:
        read(gradient, dy, base + c, past, whole)
        read(weight, w, c, dim, whole)
        read(values, x, base + c, past, whole)
        for e in range(WIDTH):
            total += gradient[e] * weight[e] * values[e]
        c += WARP * WIDTH
    shift = warp_sum(total) * r * r * r / f4(dim)
    c = i8(cuda.threadIdx.x % WARP) * WIDTH
    while c < dim:
        read(gradient, dy, base + c, past, whole)
        read(weight, w, c, dim, whole)
        read(values, x, base + c, past, whole)
        read(out, dx, base + c, past, whole)
        for e in range(WIDTH):
            out[e] += gradient[e] * weight[e] * r - values[e] * shift
        write(dx, base + c, past, out, whole)
        c += WARP * WIDTH


@kernel
def rmsnorm_weight_parts_kernel(
    parts: Any, dy: Any, x: Any, inv_rms: Any, n_rows: int, dim: int, rows_per_part: int
) -> None:
    """parts[part, c] = sum of dy * x * inv_rms over the part's rows; one thread for each column of a part."""
    blocks = (dim + cuda.blockDim.x - 1) // cuda.blockDim.x
    part = i8(cuda.blockIdx.x) // blocks
    c = i8(cuda.blockIdx.x) % blocks * cuda.blockDim.x + cuda.threadIdx.x
    if c < dim:
        end = min(i8(n_rows), (part + i8(1)) * rows_per_part)
        total = f4(0)
        row = part * rows_per_part
        while row < end:
            total += load(dy, row * dim + c) * load(x, row * dim + c) * load(inv_rms, row)
            row += i8(1)
        store(parts, part * dim + c, total)


@kernel
def add_parts_kernel(dw: Any, parts: Any, n_parts: int, dim: int) -> None:
    """dw[c] += the parts of column c, ascending."""
    c = i8(cuda.grid(1))
    if c < dim:
        total = load(dw, c)
        part = i8(0)
        while part < n_parts:
            total += load(parts, part * dim + c)
            part += i8(1)
        store(dw, c, total)


def rmsnorm_backward(
    dx: Array, dw: Array, dy: Array, x: Array, w: Array, inv_rms: Array, scratch: dict[str, Array]
) -> None:
    """Gradients of input (+=) and weight (+=)."""
    n, dim = x.shape
    whole = aligned(dx, dy, x, w, width=dim)
    launch_warps(rmsnorm_backward_kernel, n, *map(flat, (dx, dy, x, w, inv_rms)), n, dim, whole)
    rows_per_part = -(-n // min(PARTS, n))
    n_parts = -(-n // rows_per_part)
    parts = scratch["norm_parts"]
    grid = n_parts * -(-dim // COLUMNS)
    arguments = parts, flat(dy), flat(x), flat(inv_rms), n, dim, rows_per_part
    runtime().launch(rmsnorm_weight_parts_kernel, grid, COLUMNS, arguments)
    launch_elements(add_parts_kernel, dim, flat(dw), parts, n_parts, dim)
