"""AdamW with decoupled weight decay, on flat arrays.  p, g, m, v (n,); all updated in place but g.

g' = g * grad_scale;  m = b1 m + (1 - b1) g';  v = b2 v + (1 - b2) g'^2
p -= lr * ( (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * p )

What changes from step to step lies in a device array of KNOBS float32, so that a recorded step reads it anew:
[norm, grad_scale, lr, 1 / (1 - b1^t), 1 / (1 - b2^t), Muon's lr, 1 / targets counted].
A negative grad_scale means that the norm is not finite: nothing is changed. p, m and v are float32; g float32 or bfloat16.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import float32

from ._intrinsics import load
from ._jit import Array, cuda, f4, i8, kernel
from ._runtime import flat, kept, runtime
from ._vectors import WIDTH, aligned, launch_vectors, read, write

NORM, GRAD_SCALE, LR, CORRECTION1, CORRECTION2, MUON_LR, INV = range(7)
KNOBS = 7


@kernel
def adamw_kernel(
    p: Any, g: Any, m: Any, v: Any, knobs: Any, n: int, whole: bool,
    beta1: Any, beta2: Any, eps: Any, weight_decay: Any,
) -> None:  # fmt: skip
    """WIDTH elements."""
    i = i8(cuda.grid(1)) * WIDTH
    grad_scale = load(knobs, GRAD_SCALE)
    if i < n and grad_scale >= f4(0):
        lr = load(knobs, LR)
        correction1 = load(knobs, CORRECTION1)
        correction2 = load(knobs, CORRECTION2)
        value = cuda.local.array(WIDTH, float32)
        x = cuda.local.array(WIDTH, float32)
        mean = cuda.local.array(WIDTH, float32)
        square = cuda.local.array(WIDTH, float32)
        read(value, p, i, n, whole)
        read(x, g, i, n, whole)
        read(mean, m, i, n, whole)
        read(square, v, i, n, whole)
        for e in range(WIDTH):
            x[e] *= grad_scale
            mean[e] = beta1 * mean[e] + (f4(1) - beta1) * x[e]
            square[e] = beta2 * square[e] + (f4(1) - beta2) * x[e] * x[e]
            step = mean[e] * correction1 / (math.sqrt(square[e] * correction2) + eps)
            value[e] -= lr * (step + weight_decay * value[e])
        write(m, i, n, mean, whole)
        write(v, i, n, square, whole)
        write(p, i, n, value, whole)


def adamw_update_by_knobs(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    knobs: Array,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One update; what changes between steps is read from ``knobs``."""
    constants = f4(beta1), f4(beta2), f4(eps), f4(weight_decay)
    arrays = p, g, m, v
    launch_vectors(adamw_kernel, p.size, *map(flat, arrays), knobs, p.size, aligned(*arrays), *constants)


def host_knobs(
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    grad_scale: float = 1.0,
    muon_lr: float = 0.0,
    inv: float = 1.0,
) -> Any:
    """The KNOBS of a step (counted from 1), on the host."""
    knobs = np.zeros(KNOBS, np.float32)
    knobs[GRAD_SCALE], knobs[LR], knobs[MUON_LR], knobs[INV] = grad_scale, lr, muon_lr, inv
    knobs[CORRECTION1], knobs[CORRECTION2] = 1 / (1 - beta1**step), 1 / (1 - beta2**step)
    return knobs


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
    """One update; step counts from 1."""
    host = host_knobs(step=step, lr=lr, beta1=beta1, beta2=beta2, grad_scale=grad_scale)
    knobs = runtime().upload(host, kept("knobs", KNOBS, np.float32))
    options = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    adamw_update_by_knobs(p, g, m, v, knobs, **options)
