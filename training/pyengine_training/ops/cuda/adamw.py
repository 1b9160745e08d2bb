"""AdamW with decoupled weight decay, on flat arrays.  p, g, m, v (n,); all updated in place but g.

g' = g * grad_scale;  m = b1 m + (1 - b1) g';  v = b2 v + (1 - b2) g'^2
p -= lr * ( (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * p )

What changes from step to step lies in a device array of KNOBS float32, so that a recorded step reads it anew:
[norm, grad_scale, lr, 1 / (1 - b1^t), 1 / (1 - b2^t), Muon's lr, 1 / targets counted, seed bits].
A negative grad_scale means that the norm is not finite: nothing is changed. p, m and v are float32; g float32 or bfloat16.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ._intrinsics import bits_of_float, float_of_bits, load, store
from ._jit import Array, cuda, device, f4, i8, kernel, launch_elements
from ._runtime import flat, kept, runtime

NORM, GRAD_SCALE, LR, CORRECTION1, CORRECTION2, MUON_LR, INV, SEED = range(8)
KNOBS = 8
u4 = np.uint32


@kernel
def adamw_kernel(
    p: Any, g: Any, m: Any, v: Any, knobs: Any, n: int,
    beta1: Any, beta2: Any, eps: Any, weight_decay: Any,
) -> None:  # fmt: skip
    """One element."""
    i = i8(cuda.grid(1))
    if i < n and load(knobs, GRAD_SCALE) >= f4(0):
        x = load(g, i) * load(knobs, GRAD_SCALE)
        mean = beta1 * load(m, i) + (f4(1) - beta1) * x
        square = beta2 * load(v, i) + (f4(1) - beta2) * x * x
        store(m, i, mean)
        store(v, i, square)
        root = math.sqrt(square * load(knobs, CORRECTION2))
        step = mean * load(knobs, CORRECTION1) / (root + eps)
        value = load(p, i)
        store(p, i, value - load(knobs, LR) * (step + weight_decay * value))


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
    launch_elements(adamw_kernel, p.size, *map(flat, (p, g, m, v)), knobs, p.size, *constants)


def host_knobs(
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    grad_scale: float = 1.0,
    muon_lr: float = 0.0,
    inv: float = 1.0,
    seed: int = 0,
) -> Any:
    """The KNOBS of a step (counted from 1), on the host."""
    knobs = np.zeros(KNOBS, np.float32)
    knobs[GRAD_SCALE], knobs[LR], knobs[MUON_LR], knobs[INV] = grad_scale, lr, muon_lr, inv
    knobs[CORRECTION1], knobs[CORRECTION2] = 1 / (1 - beta1**step), 1 / (1 - beta2**step)
    knobs.view(u4)[SEED] = seed & 0x3FFFFFFF  # below 2.0's bits: no infinity or NaN
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


@device
def hash32(index: int, seed: Any) -> Any:
    """32 well mixed bits of (index, seed): the finalizer of MurmurHash3 over a golden-ratio walk."""
    h = u4(u4(index & 0xFFFFFFFF) * u4(0x9E3779B9)) ^ seed
    h = u4((h ^ (h >> u4(16))) * u4(0x85EBCA6B))
    h = u4((h ^ (h >> u4(13))) * u4(0xC2B2AE35))
    return u4(h ^ (h >> u4(16)))


@kernel
def round_stochastic_kernel(y: Any, x: Any, knobs: Any, n: int) -> None:
    """y[i] = x[i] rounded to bfloat16 up or down, with probabilities that keep the mean."""
    i = i8(cuda.grid(1))
    if i < n:
        noise = u4(hash32(i, u4(bits_of_float(load(knobs, SEED)))) & u4(0xFFFF))
        bits = u4(u4(u4(bits_of_float(load(x, i))) + noise) & u4(0xFFFF0000))
        store(y, i, float_of_bits(np.int32(bits)))


def round_stochastic(y: Array, x: Array, knobs: Array) -> None:
    """y (bfloat16 as uint16) = x (float32, finite), stochastically rounded with the seed in ``knobs``.

    The noise is a function of (seed, index): the same step gives the same bits.
    """
    launch_elements(round_stochastic_kernel, y.size, flat(y), flat(x), knobs, y.size)
