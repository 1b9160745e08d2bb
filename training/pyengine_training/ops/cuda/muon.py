"""Muon: momentum whose matrices are orthogonalized before they are applied.  p, g, m (rows, cols), in place but g.

m = mu m + (1 - mu) g';  u = (1 - mu) g' + mu m  (Nesterov);  o = orthogonalize(u)
p -= lr * (sqrt(max(1, rows / cols)) * o + weight_decay * p)

Matrices of one shape that lie at equal distances in the flat arenas are updated together: a batch of products and one launch
a step for all of them, each with its own arithmetic, so the bits are those of one after another.

orthogonalize runs five Newton-Schulz steps X <- a X + (b A + c A A) X, A = X X^T, on u / ||u||, as the CPU's does; a tall
matrix uses A = X^T X from the other side instead of being transposed. Step sizes come from the knobs of adamw.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cpu.muon import COEFFICIENTS, STEPS
from ..needs import Need, Needs
from ._intrinsics import load, store
from ._jit import Array, cuda, f4, i8, kernel, launch_elements, row_threads
from ._reduce import block_sum
from ._runtime import Product, flat, kept, runtime
from .adamw import GRAD_SCALE, KNOBS, MUON_LR, host_knobs

SQUARES = 64  # blocks that add up ||u||^2


@dataclass(frozen=True)
class Matrices:
    """``count`` matrices (rows, cols) of a flat arena: the first begins at ``first``, each next one ``stride`` elements on."""

    rows: int
    cols: int
    first: int = 0
    stride: int = 0
    count: int = 1

    @property
    def n(self) -> int:
        """Elements of one."""
        return self.rows * self.cols


def muon_scratch(rows: int, cols: int, dtype: Any) -> Needs:
    """Working memory for one matrix: two of its size, two of its short side squared, partial sums."""
    return batch_scratch(Matrices(rows, cols), dtype)


def batch_scratch(matrices: Matrices, dtype: Any) -> Needs:
    """The same for several."""
    n, side = matrices.n, min(matrices.rows, matrices.cols)
    sizes = {"direction": n, "product": n, "gram": side * side, "polynomial": side * side, "squares": SQUARES}
    return {name: Need((size * matrices.count,), dtype) for name, size in sizes.items()}


@kernel
def momentum_kernel(
    u: Any, m: Any, g: Any, knobs: Any, n: int, count: int, first: int, stride: int, momentum: Any
) -> None:
    """m and the Nesterov directions u, which lie behind one another."""
    i = i8(cuda.grid(1))
    if i < i8(n) * count and load(knobs, GRAD_SCALE) >= f4(0):
        at = first + i // n * stride + i % n
        fresh = load(g, at) * load(knobs, GRAD_SCALE) * (f4(1) - momentum)
        mean = load(m, at) * momentum + fresh
        store(m, at, mean)
        store(u, i, fresh + momentum * mean)


@kernel
def squares_kernel(squares: Any, u: Any, n: int, parts: int, block: int) -> None:
    """squares[b] = the sum of u^2 over a part of ``block`` elements of one matrix, which has ``parts``."""
    b = i8(cuda.blockIdx.x)
    i = b // parts * n + b % parts * block
    end = min((b // parts + i8(1)) * n, i + block)
    i += cuda.threadIdx.x
    total = f4(0)
    while i < end:
        value = load(u, i)
        total += value * value
        i += cuda.blockDim.x
    total = block_sum(total)
    if cuda.threadIdx.x == 0:
        store(squares, b, total)


@kernel
def normalize_kernel(u: Any, squares: Any, n: int, count: int, parts: int) -> None:
    """Each u /= its norm; every thread adds up the few partial sums for itself, in the same order."""
    i = i8(cuda.grid(1))
    if i < i8(n) * count:
        total = f4(0)
        for j in range(parts):
            total += load(squares, i // n * parts + j)
        store(u, i, load(u, i) * (f4(1) / (math.sqrt(total) + f4(1e-7))))


@kernel
def combine_kernel(y: Any, x: Any, a: Any, b: Any, n: int) -> None:
    """y = a y + b x."""
    i = i8(cuda.grid(1))
    if i < n:
        store(y, i, a * load(y, i) + b * load(x, i))


@kernel
def apply_kernel(
    p: Any, o: Any, knobs: Any, n: int, count: int, first: int, stride: int, weight_decay: Any, scale: Any
) -> None:
    """p -= lr (scale o + weight_decay p)."""
    i = i8(cuda.grid(1))
    if i < i8(n) * count and load(knobs, GRAD_SCALE) >= f4(0):
        at = first + i // n * stride + i % n
        value = load(p, at)
        lr = load(knobs, MUON_LR)
        store(p, at, value * (f4(1) - lr * weight_decay) - lr * scale * load(o, i))


def _product(c: Array, a: Array, b: Array, sizes: tuple[int, int, int], count: int, **options: Any) -> None:
    """count products c (m, n) = op(a) op(b), all stored without gaps."""
    m, n, k = sizes
    length_a = m if options.get("trans_a") else k
    length_b = k if options.get("trans_b") else n
    runtime().gemm(
        Product((c, 0, n, m * n), (a, 0, length_a, m * k), (b, 0, length_b, k * n), sizes, batch=count, **options)
    )


def _orthogonalize(u: Array, matrices: Matrices, scratch: dict[str, Array]) -> Array:
    """u (count * n,), overwritten: the nearest semi-orthogonal matrices, roughly; returned in one of two buffers."""
    rows, cols, n, count = matrices.rows, matrices.cols, matrices.n, matrices.count
    side, size = min(rows, cols), n * count
    squares, gram, polynomial = scratch["squares"], scratch["gram"], scratch["polynomial"]
    other = scratch["product"][:size]
    block = max(1024, -(-n // SQUARES))
    parts = -(-n // block)
    runtime().launch(squares_kernel, parts * count, row_threads(min(block, n)), (squares, u, n, parts, block))
    launch_elements(normalize_kernel, size, u, squares, n, count, parts)
    a, b, c = (f4(value) for value in COEFFICIENTS)
    tall = rows > cols
    for _ in range(STEPS):
        sides = {"trans_a": True} if tall else {"trans_b": True}
        _product(gram, u, u, (side, side, max(rows, cols)), count, **sides)
        _product(polynomial, gram, gram, (side, side, side), count)
        grams = side * side * count
        launch_elements(combine_kernel, grams, polynomial, gram, c, b, grams)
        left, right = (u, polynomial) if tall else (polynomial, u)
        _product(other, left, right, (rows, cols, side), count)
        launch_elements(combine_kernel, size, other, u, f4(1), a, size)
        u, other = other, u
    return u


def muon_update_by_knobs(
    p: Array,
    g: Array,
    m: Array,
    knobs: Array,
    matrices: Matrices,
    *,
    momentum: float,
    weight_decay: float,
    scratch: dict[str, Array],
) -> None:
    """One update of some matrices of flat p, g and m; learning rate and gradient scale are read from ``knobs``."""
    place = matrices.n, matrices.count, matrices.first, matrices.stride
    size = matrices.n * matrices.count
    u = scratch["direction"][:size]
    launch_elements(momentum_kernel, size, u, m, g, knobs, *place, f4(momentum))
    update = _orthogonalize(u, matrices, scratch)
    scale = f4(max(1.0, matrices.rows / matrices.cols) ** 0.5)
    launch_elements(apply_kernel, size, p, update, knobs, *place, f4(weight_decay), scale)


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
    options: dict[str, Any] = {"momentum": momentum, "weight_decay": weight_decay, "scratch": scratch}
    muon_update_by_knobs(*map(flat, (p, g, m)), knobs, Matrices(*p.shape), **options)
