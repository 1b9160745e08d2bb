"""Muon: momentum whose matrices are orthogonalized before they are applied.  p, g, m (rows, cols), in place but g.

m = mu m + (1 - mu) g';  u = (1 - mu) g' + mu m  (Nesterov);  o = orthogonalize(u)
p -= lr * (sqrt(max(1, rows / cols)) * o + weight_decay * p)

Matrices of one shape that lie at equal distances in the flat arenas are updated together: a batch of products and one launch
a step for all of them, each with its own arithmetic, so the bits are those of one after another.

orthogonalize runs five Newton-Schulz steps X <- (a I + b A + c A A) X, A = X X^T, on u / ||u||, as the CPU's does; a tall
matrix uses A = X^T X from the other side instead of being transposed. Step sizes come from the knobs of adamw.py.

The working memory's type is that of the products: bfloat16 in a bfloat16 run, as Muon is commonly run: what comes out has
singular values from 0.7 to 1.2, so rounding by 0.4 % is little, and momentum and parameters stay float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import float32

from ..cpu.muon import COEFFICIENTS, STEPS
from ..needs import Need, Needs
from ._intrinsics import load, store
from ._jit import (
    WARP,
    Array,
    cuda,
    f4,
    i8,
    kernel,
    launch_elements,
    launch_warps,
    row_threads,
    u4,
    unsigned,
    warp_index,
)
from ._reduce import block_sum, warp_sum
from ._runtime import Product, flat, kept, runtime
from ._vectors import WIDTH, aligned, launch_vectors, pieces, read, write
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
    """Working memory for one matrix: two of its size, two of its short side squared, partial sums; dtype: of products."""
    return batch_scratch(Matrices(rows, cols), dtype)


def batch_scratch(matrices: Matrices, dtype: Any) -> Needs:
    """The same for several."""
    n, side = matrices.n, min(matrices.rows, matrices.cols)
    sizes = {"direction": n, "product": n, "gram": side * side, "polynomial": side * side}
    needs = {name: Need((size * matrices.count,), dtype) for name, size in sizes.items()}
    sums = {"squares": SQUARES, "inverse_norms": 1}
    return needs | {name: Need((size * matrices.count,), np.float32) for name, size in sums.items()}


@kernel
def momentum_kernel(
    u: Any, m: Any, g: Any, knobs: Any, n: int, count: int, parts: int, first: int, stride: int, momentum: Any, whole: bool
) -> None:
    """m and the Nesterov directions u, which both lie behind one another: part i of all, WIDTH elements of one matrix."""
    i = u4(cuda.grid(1))
    scale = load(knobs, GRAD_SCALE)
    if i < count * parts and scale >= f4(0):
        matrix = i8(i // parts)
        c = i8(i % parts) * WIDTH
        place = first + matrix * stride
        own = matrix * n
        fresh = cuda.local.array(WIDTH, float32)
        mean = cuda.local.array(WIDTH, float32)
        read(fresh, g, place + c, place + n, whole)
        read(mean, m, own + c, own + n, whole)
        for e in range(WIDTH):
            fresh[e] *= scale * (f4(1) - momentum)
            mean[e] = mean[e] * momentum + fresh[e]
            fresh[e] += momentum * mean[e]
        write(m, own + c, own + n, mean, whole)
        write(u, own + c, own + n, fresh, whole)


@kernel
def squares_kernel(squares: Any, u: Any, n: int, parts: int, block: int, whole: bool) -> None:
    """squares[b] = the sum of u^2 over a part of ``block`` elements of one matrix, which has ``parts``."""
    b = i8(cuda.blockIdx.x)
    i = b // parts * n + b % parts * block
    end = min((b // parts + i8(1)) * n, i + block)
    i += cuda.threadIdx.x * WIDTH
    total = f4(0)
    values = cuda.local.array(WIDTH, float32)
    while i < end:
        read(values, u, i, end, whole)
        for e in range(WIDTH):
            total += values[e] * values[e]
        i += cuda.blockDim.x * WIDTH
    total = block_sum(total)
    if cuda.threadIdx.x == 0:
        store(squares, b, total)


@kernel
def inverse_norms_kernel(inverse_norms: Any, squares: Any, count: int, parts: int) -> None:
    """1 / norm of each matrix from its partial sums, by one warp."""
    matrix = warp_index()
    if matrix >= count:
        return
    total = f4(0)
    j = i8(cuda.threadIdx.x % WARP)
    while j < parts:
        total += load(squares, matrix * parts + j)
        j += WARP
    total = warp_sum(total)
    if cuda.threadIdx.x % WARP == 0:
        store(inverse_norms, matrix, f4(1) / (math.sqrt(total) + f4(1e-7)))


@kernel
def normalize_kernel(u: Any, inverse_norms: Any, n: int, count: int, parts: int, whole: bool) -> None:
    """Each u /= its norm: part i of all, WIDTH elements of one matrix."""
    i = u4(cuda.grid(1))
    if i < count * parts:
        matrix = i8(i // parts)
        c = matrix * n + i8(i % parts) * WIDTH
        past = (matrix + i8(1)) * n
        factor = load(inverse_norms, matrix)
        values = cuda.local.array(WIDTH, float32)
        read(values, u, c, past, whole)
        for e in range(WIDTH):
            values[e] *= factor
        write(u, c, past, values, whole)


@kernel
def polynomial_kernel(y: Any, x: Any, a: Any, b: Any, c: Any, n: int, side: int, whole: bool) -> None:
    """y = a I + b x + c y for matrices (side, side) behind one another, n elements in all; WIDTH elements."""
    i = i8(cuda.grid(1)) * WIDTH
    if i < n:
        values = cuda.local.array(WIDTH, float32)
        more = cuda.local.array(WIDTH, float32)
        read(values, y, i, n, whole)
        read(more, x, i, n, whole)
        for e in range(WIDTH):
            values[e] = c * values[e] + b * more[e]
            if u4(i + e) % u4(side * side) % u4(side + u4(1)) == 0:
                values[e] += a
        write(y, i, n, values, whole)


@kernel
def apply_kernel(
    p: Any, o: Any, knobs: Any, n: int, count: int, parts: int, first: int, stride: int,
    weight_decay: Any, scale: Any, whole: bool,
) -> None:  # fmt: skip
    """p -= lr (scale o + weight_decay p): part i of all, WIDTH elements of one matrix."""
    i = u4(cuda.grid(1))
    if i < count * parts and load(knobs, GRAD_SCALE) >= f4(0):
        matrix = i8(i // parts)
        c = i8(i % parts) * WIDTH
        place = first + matrix * stride
        lr = load(knobs, MUON_LR)
        values = cuda.local.array(WIDTH, float32)
        update = cuda.local.array(WIDTH, float32)
        read(values, p, place + c, place + n, whole)
        read(update, o, matrix * n + c, (matrix + i8(1)) * n, whole)
        for e in range(WIDTH):
            values[e] = values[e] * (f4(1) - lr * weight_decay) - lr * scale * update[e]
        write(p, place + c, place + n, values, whole)


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
    squares, inverse_norms = scratch["squares"], scratch["inverse_norms"]
    gram, polynomial, other = scratch["gram"], scratch["polynomial"], scratch["product"][:size]
    whole = aligned(u, width=n)
    block = max(1024, pieces(-(-n // SQUARES)) * WIDTH)
    parts = -(-n // block)
    threads = row_threads(pieces(min(block, n)))
    runtime().launch(squares_kernel, parts * count, threads, (squares, u, n, parts, block, whole))
    launch_warps(inverse_norms_kernel, count, inverse_norms, squares, count, parts)
    launch_elements(normalize_kernel, count * pieces(n), u, inverse_norms, *_parts(matrices), whole)
    a, b, c = (f4(value) for value in COEFFICIENTS)
    tall, grams = rows > cols, side * side * count
    for _ in range(STEPS):
        sides = {"trans_a": True} if tall else {"trans_b": True}
        _product(gram, u, u, (side, side, max(rows, cols)), count, **sides)
        _product(polynomial, gram, gram, (side, side, side), count)
        sizes = *unsigned(grams, side, addressed=grams), aligned(polynomial, gram)
        launch_vectors(polynomial_kernel, grams, polynomial, gram, a, b, c, *sizes)
        left, right = (u, polynomial) if tall else (polynomial, u)
        _product(other, left, right, (rows, cols, side), count)
        u, other = other, u
    return u


def _parts(matrices: Matrices) -> tuple[Any, ...]:
    """Elements of a matrix, matrices, and vectors of each."""
    n, count = matrices.n, matrices.count
    return n, *unsigned(count, pieces(n), addressed=n * count)


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
    """One update of some matrices of flat p and g, whose m (count * n,) lie behind one another; learning rate and gradient scale
    are read from ``knobs``."""
    place = *_parts(matrices), matrices.first, matrices.stride
    n = matrices.count * pieces(matrices.n)
    u = scratch["direction"][: matrices.n * matrices.count]
    width = math.gcd(matrices.n, matrices.first, matrices.stride)
    whole = aligned(p, g, m, u, width=width)
    launch_elements(momentum_kernel, n, u, m, g, knobs, *place, f4(momentum), whole)
    update = _orthogonalize(u, matrices, scratch)
    scale = f4(max(1.0, matrices.rows / matrices.cols) ** 0.5)
    whole = aligned(p, update, width=width)
    launch_elements(apply_kernel, n, p, update, knobs, *place, f4(weight_decay), scale, whole)


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
