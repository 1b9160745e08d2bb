"""RMSNorm over the last axis.  x, y, dy, dx, residual (N, dim); w, dw (dim,); inv_rms (N,) kept for the backward.

forward   inv_rms = 1 / sqrt(mean(x^2) + eps);  y = x * inv_rms * w                      written with =
backward  dx += inv_rms * (dy*w - x * inv_rms^2 * mean(dy*w*x))                         accumulated: dx carries
          dw += sum over rows of dy * x * inv_rms                                       the residual stream's gradient
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..needs import Need, Needs
from ._jit import Array, f4, kernel


def rmsnorm_state(n: int, wide: Any) -> Needs:
    """Kept for the backward; wide: type of statistics."""
    return {"inv_rms": Need((n,), wide)}


def rmsnorm_scratch(dim: int) -> Needs:
    """None: the weight's gradient is summed in place."""
    return {}


@kernel
def rmsnorm_forward(y: Array, inv_rms: Array, x: Array, w: Array, eps: float) -> None:
    """Normalize rows."""
    n_rows, dim = x.shape
    for i in range(n_rows):
        total = f4(0)
        for c in range(dim):
            total += x[i, c] * x[i, c]
        r = f4(1) / np.sqrt(total / f4(dim) + eps)
        inv_rms[i] = r
        for c in range(dim):
            y[i, c] = x[i, c] * r * w[c]


@kernel
def rmsnorm_residual_forward(y: Array, inv_rms: Array, x: Array, residual: Array, w: Array, eps: float) -> None:
    """x += residual, then normalize x: the residual addition costs no pass of its own."""
    n_rows, dim = x.shape
    for i in range(n_rows):
        total = f4(0)
        for c in range(dim):
            value = x[i, c] + residual[i, c]
            x[i, c] = value
            total += value * value
        r = f4(1) / np.sqrt(total / f4(dim) + eps)
        inv_rms[i] = r
        for c in range(dim):
            y[i, c] = x[i, c] * r * w[c]


@kernel
def _rmsnorm_backward(dx: Array, dw: Array, dy: Array, x: Array, w: Array, inv_rms: Array) -> None:
    n_rows, dim = x.shape
    for i in range(n_rows):
        r = inv_rms[i]
        total = f4(0)
        for c in range(dim):
            total += dy[i, c] * w[c] * x[i, c]
        shift = total * r * r * r / f4(dim)
        for c in range(dim):
            dx[i, c] += dy[i, c] * w[c] * r - x[i, c] * shift
            dw[c] += dy[i, c] * x[i, c] * r


def rmsnorm_backward(
    dx: Array, dw: Array, dy: Array, x: Array, w: Array, inv_rms: Array, scratch: dict[str, Array]
) -> None:
    """Gradients of input (+=) and weight (+=)."""
    _rmsnorm_backward(dx, dw, dy, x, w, inv_rms)
