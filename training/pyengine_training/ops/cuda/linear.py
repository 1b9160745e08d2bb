"""Linear layer without bias.  x, dx (N, n_in); w, dw (n_out, n_in); y, dy (N, n_out).  Weights are stored (out, in).

forward         y  = x @ w^T           written with =
backward_input  dx = dy @ w            written with =
backward_weight dw = dy^T @ x          written with =

Each is one matrix product of the runtime (cuBLAS): inputs float32 or bfloat16, sums in float32.
"""

from __future__ import annotations

from ._runtime import Array, Product, flat, runtime


def _matrix(x: Array) -> tuple[Array, int, int, int]:
    return flat(x), 0, x.shape[1], 0


def linear_forward(y: Array, x: Array, w: Array) -> None:
    """y = x @ w^T."""
    sizes = (x.shape[0], w.shape[0], x.shape[1])
    runtime().gemm(Product(_matrix(y), _matrix(x), _matrix(w), sizes, trans_b=True))


def linear_backward_input(dx: Array, dy: Array, w: Array) -> None:
    """dx = dy @ w."""
    sizes = (dy.shape[0], w.shape[1], dy.shape[1])
    runtime().gemm(Product(_matrix(dx), _matrix(dy), _matrix(w), sizes))


def linear_backward_weight(dw: Array, dy: Array, x: Array) -> None:
    """dw = dy^T @ x."""
    sizes = (dy.shape[1], x.shape[1], dy.shape[0])
    runtime().gemm(Product(_matrix(dw), _matrix(dy), _matrix(x), sizes, trans_a=True))
