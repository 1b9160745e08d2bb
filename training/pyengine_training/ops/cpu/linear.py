"""Linear layer without bias.  x, dx (N, n_in); w, dw (n_out, n_in); y, dy (N, n_out).  Weights are stored (out, in).

forward          y  = x @ w^T     written with =
backward_input   dx = dy @ w      written with =
backward_weight  dw = dy^T @ x    written with =  (one call per weight, step and shard; shards are summed later)

All three are one BLAS call on views: NumPy hands transposed operands to the library without copying.
"""

from __future__ import annotations

import numpy as np

from ._jit import Array


def linear_forward(y: Array, x: Array, w: Array) -> None:
    """y = x @ w^T."""
    np.matmul(x, w.T, out=y)


def linear_backward_input(dx: Array, dy: Array, w: Array) -> None:
    """dx = dy @ w."""
    np.matmul(dy, w, out=dx)


def linear_backward_weight(dw: Array, dy: Array, x: Array) -> None:
    """dw = dy^T @ x."""
    np.matmul(dy.T, x, out=dw)
