"""Muon: momentum whose matrices are orthogonalized before they are applied.  p, g, m (rows, cols), in place but g.

m = mu m + (1 - mu) g';  u = (1 - mu) g' + mu m  (Nesterov);  o = orthogonalize(u)
p -= lr * (sqrt(max(1, rows / cols)) * o + weight_decay * p)

orthogonalize runs five Newton-Schulz steps X <- a X + (b A + c A A) X, A = X X^T, on u / ||u||, as the CPU's does; a tall
matrix uses A = X^T X from the other side instead of being transposed. Step sizes come from the knobs of adamw.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..cpu.muon import COEFFICIENTS, STEPS
from ..needs import Need, Needs
from ._intrinsics import load, store
from ._jit import Array, cuda, f4, i8, kernel, launch_elements
from ._runtime import Product, flat, kept, runtime
from .adamw import GRAD_SCALE, KNOBS, MUON_LR, host_knobs

SQUARES = 64  # blocks that add up ||u||^2


def muon_scratch(rows: int, cols: int, dtype: Any) -> Needs:
    """Working memory for one matrix: two of its size, two of its short side squared, partial sums."""
    n, side = rows * cols, min(rows, cols)
    sizes = {"direction": n, "product": n, "gram": side * side, "polynomial": side * side, "squares": SQUARES}
    return {name: Need((size,), dtype) for name, size in sizes.items()}


@kernel
def momentum_kernel(u: Any, m: Any, g: Any, knobs: Any, n: int, momentum: Any) -> None:
    """m and the Nesterov direction u."""
    i = i8(cuda.grid(1))
    if i < n and load(knobs, GRAD_SCALE) >= f4(0):
        fresh = load(g, i) * load(knobs, GRAD_SCALE) * (f4(1) - momentum)
        mean = load(m, i) * momentum + fresh
        store(m, i, mean)
        store(u, i, fresh + momentum * mean)


@kernel
def normalize_kernel(u: Any, squares: Any, n: int, n_squares: int) -> None:
    """u /= its norm; every thread adds up the few partial sums for itself, in the same order."""
    i = i8(cuda.grid(1))
    if i < n:
        total = f4(0)
        for j in range(n_squares):
            total += load(squares, j)
        store(u, i, load(u, i) * (f4(1) / (math.sqrt(total) + f4(1e-7))))


@kernel
def combine_kernel(y: Any, x: Any, a: Any, b: Any, n: int) -> None:
    """y = a y + b x."""
    i = i8(cuda.grid(1))
    if i < n:
        store(y, i, a * load(y, i) + b * load(x, i))


@kernel
def apply_kernel(p: Any, o: Any, knobs: Any, n: int, weight_decay: Any, scale: Any) -> None:
    """p -= lr (scale o + weight_decay p)."""
    i = i8(cuda.grid(1))
    if i < n and load(knobs, GRAD_SCALE) >= f4(0):
        value = load(p, i)
        lr = load(knobs, MUON_LR)
        store(p, i, value * (f4(1) - lr * weight_decay) - lr * scale * load(o, i))


def _product(c: Array, a: Array, b: Array, m: int, n: int, k: int, **options: Any) -> None:
    """c (m, n) = op(a) op(b), all stored without gaps."""
    length_a = m if options.get("trans_a") else k
    length_b = k if options.get("trans_b") else n
    sizes, ends = (m, n, k), ((c, 0, n, 0), (a, 0, length_a, 0), (b, 0, length_b, 0))
    runtime().gemm(Product(*ends, sizes, **options))


def _orthogonalize(u: Array, rows: int, cols: int, scratch: dict[str, Array]) -> Array:
    """u (rows * cols,), overwritten: the nearest semi-orthogonal matrix, roughly; returned in one of two buffers."""
    from .grad_norm import sum_of_squares

    n, side = rows * cols, min(rows, cols)
    squares, gram, polynomial = scratch["squares"], scratch["gram"], scratch["polynomial"]
    other = scratch["product"][:n]
    block = max(1024, -(-n // SQUARES))
    count = -(-n // block)
    sum_of_squares(squares[:count], u, block)
    launch_elements(normalize_kernel, n, u, squares, n, count)
    a, b, c = (f4(value) for value in COEFFICIENTS)
    tall = rows > cols
    for _ in range(STEPS):
        sides = {"trans_a": True} if tall else {"trans_b": True}
        _product(gram, u, u, side, side, max(rows, cols), **sides)
        _product(polynomial, gram, gram, side, side, side)
        launch_elements(combine_kernel, side * side, polynomial, gram, c, b, side * side)
        if tall:
            _product(other, u, polynomial, rows, cols, cols)
        else:
            _product(other, polynomial, u, rows, cols, rows)
        launch_elements(combine_kernel, n, other, u, f4(1), a, n)
        u, other = other, u
    return u


def muon_update_by_knobs(
    p: Array,
    g: Array,
    m: Array,
    knobs: Array,
    *,
    momentum: float,
    weight_decay: float,
    scratch: dict[str, Array],
) -> None:
    """One update of one matrix; learning rate and gradient scale are read from ``knobs``."""
    rows, cols = p.shape
    n = rows * cols
    u = scratch["direction"][:n]
    launch_elements(momentum_kernel, n, u, flat(m), flat(g), knobs, n, f4(momentum))
    update = _orthogonalize(u, rows, cols, scratch)
    scale = f4(max(1.0, rows / cols) ** 0.5)
    launch_elements(apply_kernel, n, flat(p), update, knobs, n, f4(weight_decay), scale)


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
    host = host_knobs(step=1, lr=0.0, beta1=0.0, beta2=0.0, muon_lr=lr, grad_scale=grad_scale)
    knobs = runtime().upload(host, kept("knobs", KNOBS, np.float32))
    muon_update_by_knobs(p, g, m, knobs, momentum=momentum, weight_decay=weight_decay, scratch=scratch)
