"""Muon: momentum whose matrices are orthogonalized before they are applied.  p, g, m (rows, cols), in place but g.

m = mu m + (1 - mu) g';  u = (1 - mu) g' + mu m  (Nesterov);  o = orthogonalize(u)
p -= lr * (sqrt(max(1, rows / cols)) * o + weight_decay * p)

orthogonalize runs five Newton-Schulz steps X <- a X + (b A + c A A) X, A = X X^T, on u / ||u||, which drive every
singular value near 1 (published coefficients of the quintic; Jordan et al. 2024). X lies on its short side first.
"""

from __future__ import annotations

import numpy as np

from ._jit import Array

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalize(u: Array) -> Array:
    """The nearest semi-orthogonal matrix to u, roughly: singular values come out between about 0.7 and 1.2."""
    tall = u.shape[0] > u.shape[1]
    x = np.ascontiguousarray(u.T) if tall else u.copy()
    dtype = x.dtype.type
    a, b, c = (dtype(value) for value in COEFFICIENTS)
    x *= dtype(1 / (float(np.sqrt(np.dot(x.ravel(), x.ravel()))) + 1e-7))
    for _ in range(STEPS):
        gram = x @ x.T
        polynomial = gram @ gram
        polynomial *= c
        gram *= b
        polynomial += gram
        step = polynomial @ x
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
) -> None:
    """One update of one matrix."""
    dtype = p.dtype.type
    fresh = g * dtype(grad_scale * (1 - momentum))
    m *= dtype(momentum)
    m += fresh
    fresh += dtype(momentum) * m
    update = orthogonalize(fresh)
    scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
    p *= dtype(1 - lr * weight_decay)
    p -= dtype(lr * scale) * update
