"""RMSNorm over the last axis.  x, y, dy, dx, residual (N, dim); w, dw (dim,); inv_rms (N,) kept for the backward.

forward   inv_rms = 1 / sqrt(mean(x^2) + eps);  y = x * inv_rms * w                      written with =
backward  dx += inv_rms * (dy*w - x * inv_rms^2 * mean(dy*w*x))                         accumulated: dx carries
          dw += sum over rows of dy * x * inv_rms                                       the residual stream's gradient

One block for each row. The weight's gradient is summed in two steps without atomics: PARTS blocks of rows into a
scratch array, then its rows in ascending order, so the same input gives the same bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..needs import Need, Needs
from ._intrinsics import load, store
from ._jit import Array, cuda, f4, i8, kernel, launch_elements, launch_rows
from ._reduce import block_sum
from ._runtime import flat, runtime

PARTS = 128  # at most so many partial sums of the weight's gradient
COLUMNS = 64  # threads of a block that sums columns


def rmsnorm_state(n: int, wide: Any) -> Needs:
    """Kept for the backward; wide: type of statistics."""
    return {"inv_rms": Need((n,), wide)}


def rmsnorm_scratch(dim: int) -> Needs:
    """Partial sums of the weight's gradient."""
    return {"norm_parts": Need((PARTS * dim,), np.float32)}


@kernel
def rmsnorm_kernel(y: Any, inv_rms: Any, x: Any, w: Any, eps: Any, dim: int) -> None:
    """y and inv_rms of one row."""
    row = i8(cuda.blockIdx.x)
    base = row * dim
    total = f4(0)
    c = i8(cuda.threadIdx.x)
    while c < dim:
        value = load(x, base + c)
        total += value * value
        c += cuda.blockDim.x
    total = block_sum(total)
    r = f4(1) / math.sqrt(total / f4(dim) + eps)
    if cuda.threadIdx.x == 0:
        store(inv_rms, row, r)
    c = i8(cuda.threadIdx.x)
    while c < dim:
        store(y, base + c, load(x, base + c) * r * load(w, c))
        c += cuda.blockDim.x


@kernel
def rmsnorm_residual_kernel(y: Any, inv_rms: Any, x: Any, residual: Any, w: Any, eps: Any, dim: int) -> None:
    """x += residual, then as above; each thread reads back only what it wrote."""
    row = i8(cuda.blockIdx.x)
    base = row * dim
    total = f4(0)
    c = i8(cuda.threadIdx.x)
    while c < dim:
        store(x, base + c, load(x, base + c) + load(residual, base + c))
        value = load(x, base + c)  # what was stored: rounded where x is bfloat16
        total += value * value
        c += cuda.blockDim.x
    total = block_sum(total)
    r = f4(1) / math.sqrt(total / f4(dim) + eps)
    if cuda.threadIdx.x == 0:
        store(inv_rms, row, r)
    c = i8(cuda.threadIdx.x)
    while c < dim:
        store(y, base + c, load(x, base + c) * r * load(w, c))
        c += cuda.blockDim.x


def rmsnorm_forward(y: Array, inv_rms: Array, x: Array, w: Array, eps: float) -> None:
    """Normalize rows."""
    n, dim = x.shape
    arguments = flat(y), flat(inv_rms), flat(x), flat(w), f4(eps), dim
    launch_rows(rmsnorm_kernel, n, dim, *arguments)


def rmsnorm_residual_forward(y: Array, inv_rms: Array, x: Array, residual: Array, w: Array, eps: float) -> None:
    """x += residual, then normalize x: the residual addition costs no pass of its own."""
    n, dim = x.shape
    arguments = flat(y), flat(inv_rms), flat(x), flat(residual), flat(w), f4(eps), dim
    launch_rows(rmsnorm_residual_kernel, n, dim, *arguments)


@kernel
def rmsnorm_backward_kernel(dx: Any, dy: Any, x: Any, w: Any, inv_rms: Any, dim: int) -> None:
    """dx of one row (+=)."""
    row = i8(cuda.blockIdx.x)
    base = row * dim
    r = load(inv_rms, row)
    total = f4(0)
    c = i8(cuda.threadIdx.x)
    while c < dim:
        total += load(dy, base + c) * load(w, c) * load(x, base + c)
        c += cuda.blockDim.x
    shift = block_sum(total) * r * r * r / f4(dim)
    c = i8(cuda.threadIdx.x)
    while c < dim:
        value = load(dy, base + c) * load(w, c) * r - load(x, base + c) * shift
        store(dx, base + c, load(dx, base + c) + value)
        c += cuda.blockDim.x


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
    launch_rows(rmsnorm_backward_kernel, n, dim, *map(flat, (dx, dy, x, w, inv_rms)), dim)
    rows_per_part = -(-n // min(PARTS, n))
    n_parts = -(-n // rows_per_part)
    parts = scratch["norm_parts"]
    grid = n_parts * -(-dim // COLUMNS)
    arguments = parts, flat(dy), flat(x), flat(inv_rms), n, dim, rows_per_part
    runtime().launch(rmsnorm_weight_parts_kernel, grid, COLUMNS, arguments)
    launch_elements(add_parts_kernel, dim, flat(dw), parts, n_parts, dim)
