"""AdamW with decoupled weight decay, on flat arrays.  p, g, m, v (n,); all updated in place but g.

g' = g * grad_scale;  m = b1 m + (1 - b1) g';  v = b2 v + (1 - b2) g'^2
p -= lr * ( (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * p )
"""

from __future__ import annotations

import numpy as np

from ._jit import Array, f4, kernel


@kernel
def _adamw(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    lr: float,
    beta1: float,
    beta2: float,
    correction1: float,
    correction2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
) -> None:
    for i in range(p.size):
        x = g[i] * grad_scale
        mean = beta1 * m[i] + (f4(1) - beta1) * x
        square = beta2 * v[i] + (f4(1) - beta2) * x * x
        m[i] = mean
        v[i] = square
        step = mean * correction1 / (np.sqrt(square * correction2) + eps)
        p[i] -= lr * (step + weight_decay * p[i])


def adamw_update(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
) -> None:
    """One update; step counts from 1. Scalars are rounded to the parameters' type once, here."""
    t = p.dtype.type
    _adamw(
        p,
        g,
        m,
        v,
        t(lr),
        t(beta1),
        t(beta2),
        t(1 / (1 - beta1**step)),
        t(1 / (1 - beta2**step)),
        t(eps),
        t(weight_decay),
        t(grad_scale),
    )
