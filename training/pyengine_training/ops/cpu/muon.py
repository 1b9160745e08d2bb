"""Muon: momentum whose matrices are orthogonalized before they are applied.  p, g, m (rows, cols), in place but g.

m = mu m + (1 - mu) g';  u = (1 - mu) g' + mu m  (Nesterov);  o = orthogonalize(u)
p -= lr * (sqrt(max(1, rows / cols)) * o + weight_decay * p)

orthogonalize runs five Newton-Schulz steps X <- a X + (b A + c A A) X, A = X X^T, on u / ||u||, which drive every
singular value near 1 (published coefficients of the quintic; Jordan et al. 2024). X lies on its short side first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..needs import Need, Needs
from ._jit import Array

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def muon_scratch(rows: int, cols: int, dtype: Any) -> Needs:
    """Working memory for one matrix: three of its size, two of its short side squared."""
    n, side = rows * cols, min(rows, cols)
    sizes = {"direction": n, "iterate": n, "product": n, "gram": side * side, "polynomial": side * side}
    return {name: Need((size,), dtype) for name, size in sizes.items()}


def orthogonalize(u: Array, scratch: dict[str, Array]) -> Array:
    """The nearest semi-orthogonal matrix to u, roughly: singular values come out between about 0.7 and 1.2.

    The result is a view into scratch.
    """
    tall = u.shape[0] > u.shape[1]
    shape = u.shape[::-1] if tall else u.shape
    side = shape[0]
    x = scratch["iterate"][: u.size].reshape(shape)
    step = scratch["product"][: u.size].reshape(shape)
    gram, polynomial = (scratch[name][: side * side].reshape(side, side) for name in ("gram", "polynomial"))
    x[...] = u.T if tall else u
    a, b, c = (x.dtype.type(value) for value in COEFFICIENTS)
    x *= x.dtype.type(1 / (float(np.sqrt(np.dot(x.ravel(), x.ravel()))) + 1e-7))
    for _ in range(STEPS):
        np.matmul(x, x.T, out=gram)
        np.matmul(gram, gram, out=polynomial)
        polynomial *= c
        gram *= b
        polynomial += gram
        np.matmul(polynomial, x, out=step)
        x *= a
        x += step
    return x.T if tall else x


def muon_update(
    p: Array,
    g: Array,
    m: Array,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    grad_scale: float,
    scratch: dict[str, Array],
) -> None:
    """One update of one matrix."""
    dtype = p.dtype.type
    fresh, product = (scratch[name][: p.size].reshape(p.shape) for name in ("direction", "product"))
    np.multiply(g, dtype(grad_scale * (1 - momentum)), out=fresh)
    m *= dtype(momentum)
    m += fresh
    np.multiply(m, dtype(momentum), out=product)
    fresh += product
    update = orthogonalize(fresh, scratch)
    scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
    p *= dtype(1 - lr * weight_decay)
    update *= dtype(lr * scale)
    p -= update
