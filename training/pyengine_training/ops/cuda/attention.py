"""Causal attention with grouped queries, in tiles of query positions, recomputed in the backward.

q, o, dq, do (B, n_kv_heads, T, n_rep, head_dim);  k, v, dk, dv (B, n_kv_heads, T, head_dim)
lse (B, n_kv_heads, T * n_rep) float32: log-sum-exp of each query's scaled scores, kept for the backward
starts (B, T) int64: first position that each position sees, its document's or 0;  scale = 1 / sqrt(head_dim)

forward   S = q k^T * scale, keys after the query and before its start masked;  P = softmax(S);  o = P v   written with =
backward  P  = exp(S - lse);  dv = P^T do;  dP = do v^T
          dS = P * (dP - rowsum(dP * P)) * scale;  dq = dS k;  dk = dS^T q                          written with =

A tile holds TILE positions with their n_rep query heads against all keys up to the tile's end: one batched matrix
product over as many (row, kv head) pairs as fit into SCORES elements, then one warp for each row of scores. The
backward walks the tiles from the last, whose keys are all, so that dk and dv are written first and then added to.
Scores live in the inputs' type; softmax is taken in float32.

``quantize`` rounds P in o = P v as ops/cpu/fake_quant.py says, one warp for each row of scores, a lane for each key of a group of
32; v is rounded already, and all is float32. The backward has P as it was.

``flash.py`` keeps the scores on the chip instead. It is used where it can be and PYENGINE_CUDA_ATTENTION=flash is set:
its kernels took 42 ms of a step that takes 41 as a whole with stored scores (docs/cuda.md, on an H200).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import float32

from ..cpu.fake_quant import PROBABILITY_GROUP, TINY
from ..needs import Need, Needs
from . import flash
from ._intrinsics import div_rn, load, mul_rn, rint, store
from ._jit import (
    WARP,
    Array,
    cuda,
    device,
    exact_kernel,
    f4,
    i8,
    kernel,
    launch_elements,
    launch_warps,
    u4,
    unsigned,
    warp_index,
)
from ._reduce import LOWEST, warp_max, warp_sum
from ._runtime import Product, flat, runtime
from ._vectors import WIDTH, aligned, read, write

TILE = 256  # query positions
SCORES = 1 << 26  # elements of one scratch array of scores
use_flash = os.environ.get("PYENGINE_CUDA_ATTENTION") == "flash"


@device
def first_visible(starts: Any, head: int, position: int, n_kv: int, seq: int) -> Any:
    """First key that a position of one head sees."""
    return load(starts, i8(u4(head) // n_kv) * i8(seq) + position)


@device
def hide(x: Any, j: int, begin: int, end: int, value: Any) -> None:
    """x[:] = value where keys j, j + 1, ... lie outside of [begin, end)."""
    if j < begin or j + WIDTH > end:
        for e in range(WIDTH):
            if j + e < begin or j + e >= end:
                x[e] = value


@kernel
def softmax_kernel(
    s: Any, lse: Any, starts: Any, rows: int, n_rows: int, n_keys: int, n_rep: int, head: int, n_kv: int, seq: int,
    first: int, lse_start: int, lse_stride: int, scale: Any, aligned: bool,
) -> None:  # fmt: skip
    """One row of raw scores to probabilities, in place, by one warp; row i of a head is position first + i // n_rep.

    The row is read twice, the second time from the cache: each lane keeps the maximum and the sum of its own keys first.
    """
    row = warp_index()
    if row >= rows:
        return
    i = i8(u4(row) % n_rows)
    member = i8(u4(row) // n_rows)
    end = first + i8(u4(i) // n_rep) + i8(1)
    begin = first_visible(starts, member + i8(head), end - i8(1), n_kv, seq)
    base = row * i8(n_keys)
    past = base + i8(n_keys)
    lane = i8(cuda.threadIdx.x % WARP)
    x = cuda.local.array(WIDTH, float32)
    top = LOWEST
    total = f4(0)
    j = begin // WIDTH * WIDTH + lane * WIDTH
    while j < end:
        read(x, s, base + j, past, aligned)
        hide(x, j, begin, end, LOWEST)
        before = top
        for e in range(WIDTH):
            top = max(top, x[e])
        total *= math.exp((before - top) * scale)
        for e in range(WIDTH):
            total += math.exp((x[e] - top) * scale)
        j += WARP * WIDTH
    highest = warp_max(top)
    total = warp_sum(total * math.exp((top - highest) * scale))
    if lane == 0:
        store(lse, lse_start + member * lse_stride + i, highest * scale + math.log(total))
    inv = f4(1) / total
    j = lane * WIDTH
    while j < n_keys:
        for e in range(WIDTH):
            x[e] = f4(0)
        if j < end and j + WIDTH > begin:
            read(x, s, base + j, past, aligned)
            for e in range(WIDTH):
                x[e] = math.exp((x[e] - highest) * scale) * inv
            hide(x, j, begin, end, f4(0))
        write(s, base + j, past, x, aligned)
        j += WARP * WIDTH


@kernel
def softmax_backward_kernel(
    s: Any, dp: Any, lse: Any, starts: Any,
    rows: int, n_rows: int, n_keys: int, n_rep: int, head: int, n_kv: int, seq: int,
    first: int, lse_start: int, lse_stride: int, scale: Any, aligned: bool,
) -> None:  # fmt: skip
    """One row by one warp: raw scores s become probabilities, and their gradient dp that of the raw scores, in place."""
    row = warp_index()
    if row >= rows:
        return
    i = i8(u4(row) % n_rows)
    member = i8(u4(row) // n_rows)
    end = first + i8(u4(i) // n_rep) + i8(1)
    begin = first_visible(starts, member + i8(head), end - i8(1), n_kv, seq)
    shift = load(lse, lse_start + member * lse_stride + i)
    base = row * i8(n_keys)
    past = base + i8(n_keys)
    lane = i8(cuda.threadIdx.x % WARP)
    p = cuda.local.array(WIDTH, float32)
    g = cuda.local.array(WIDTH, float32)
    total = f4(0)
    j = begin // WIDTH * WIDTH + lane * WIDTH
    while j < end:
        read(p, s, base + j, past, aligned)
        read(g, dp, base + j, past, aligned)
        hide(p, j, begin, end, LOWEST)
        hide(g, j, begin, end, f4(0))
        for e in range(WIDTH):
            total += math.exp(p[e] * scale - shift) * g[e]
        j += WARP * WIDTH
    total = warp_sum(total)
    j = lane * WIDTH
    while j < n_keys:
        for e in range(WIDTH):
            p[e] = f4(0)
            g[e] = f4(0)
        if j < end and j + WIDTH > begin:
            read(p, s, base + j, past, aligned)
            read(g, dp, base + j, past, aligned)
            for e in range(WIDTH):
                p[e] = math.exp(p[e] * scale - shift)
                g[e] = p[e] * (g[e] - total) * scale
            hide(p, j, begin, end, f4(0))
            hide(g, j, begin, end, f4(0))
        write(s, base + j, past, p, aligned)
        write(dp, base + j, past, g, aligned)
        j += WARP * WIDTH


@exact_kernel
def value_scales_kernel(scales: Any, v: Any, n: int, dim: int) -> None:
    """scales[i] = what the codes of value head i, v (n, dim), are multiplied by."""
    i = i8(cuda.grid(1))
    if i >= n:
        return
    top = f4(0)
    for d in range(dim):
        top = max(top, abs(load(v, i * dim + d)))
    store(scales, i, div_rn(top, f4(127)))


@exact_kernel
def round_probabilities_kernel(
    s: Any, scales: Any, starts: Any, rows: int, n_rows: int, n_keys: int, n_rep: int, head: int, n_kv: int, seq: int, first: int
) -> None:
    """One row of probabilities, in place, by one warp; rows as in softmax_kernel, scales (heads, seq) of the values."""
    row = warp_index()
    if row >= rows:
        return
    i = i8(u4(row) % n_rows)
    member = i8(u4(row) // n_rows) + i8(head)
    end = first + i8(u4(i) // n_rep) + i8(1)
    group = first_visible(starts, member, end - i8(1), n_kv, seq)
    while group < end:
        j = group + i8(cuda.threadIdx.x % WARP)
        scale = f4(0)
        weight = f4(0)
        if j < end:
            scale = load(scales, member * i8(seq) + j)
            weight = mul_rn(load(s, row * i8(n_keys) + j), scale)
        top = warp_max(weight)
        code = f4(0)
        if top >= TINY:
            code = rint(mul_rn(weight, div_rn(f4(127), top)))
        if code > f4(0):
            code = div_rn(mul_rn(code, div_rn(top, f4(127))), scale)
        if j < end:
            store(s, row * i8(n_keys) + j, code)
        group += PROBABILITY_GROUP


def attention_state(q_shape: tuple[int, ...], wide: Any) -> Needs:
    """Kept for the backward; q_shape (B, n_kv_heads, T, n_rep, head_dim); wide: type of statistics."""
    batch, n_kv, seq, n_rep, _ = q_shape
    return {"lse": Need((batch, n_kv, seq * n_rep), wide)}


def attention_scratch(q_shape: tuple[int, ...], dtype: Any, training: bool) -> Needs:
    """Scores of one tile of as many heads as run at once, the values' scales, and for the backward the scores' gradient."""
    batch, n_kv, seq, n_rep, head_dim = q_shape
    if use_flash and flash.supported(head_dim, dtype):
        return flash.flash_attention_scratch(q_shape) if training else {}
    size = min(TILE, seq) * n_rep * seq
    scores = Need((size * min(batch * n_kv, max(1, SCORES // size)),), dtype)
    needs = {"scores": scores, "value_scales": Need((batch * n_kv * seq,), np.float32)}
    return needs | {"score_gradients": scores} if training else needs


class _Tile:
    """One tile of some heads: where its pieces lie, for products and kernels."""

    def __init__(self, shape: tuple[int, ...], head: int, heads: int, first: int) -> None:
        _, self.n_kv, self.seq, self.n_rep, self.dim = shape
        self.head, self.heads, self.first = head, heads, first
        self.end = min(self.seq, first + TILE)
        self.rows = (self.end - first) * self.n_rep

    def queries(self, x: Array) -> tuple[Array, int, int, int]:
        """The tile's rows of q, o, dq or do."""
        stride = self.seq * self.n_rep * self.dim
        return flat(x), self.head * stride + self.first * self.n_rep * self.dim, self.dim, stride

    def keys(self, x: Array) -> tuple[Array, int, int, int]:
        """The keys or values up to the tile's end."""
        stride = self.seq * self.dim
        return flat(x), self.head * stride, self.dim, stride

    def scores(self, x: Array) -> tuple[Array, int, int, int]:
        return x, 0, self.end, self.rows * self.end

    def launch(self, function: Any, arrays: tuple[Array, ...], lse: Array, starts: Array, scale: float) -> None:
        """A kernel on the rows of scores, one warp for each."""
        rows, stride = self.heads * self.rows, self.seq * self.n_rep
        sizes = unsigned(
            self.rows, self.end, self.n_rep, self.head, self.n_kv, self.seq, addressed=self.heads * self.rows
        )
        place = self.first, self.head * stride + self.first * self.n_rep, stride
        whole = aligned(*arrays, width=self.end)
        launch_warps(function, rows, *arrays, flat(lse), flat(starts), rows, *sizes, *place, f4(scale), whole)

    def round_probabilities(self, s: Array, scales: Array, starts: Array) -> None:
        rows = self.heads * self.rows
        sizes = unsigned(self.rows, self.end, self.n_rep, self.head, self.n_kv, self.seq, addressed=rows)
        launch_warps(round_probabilities_kernel, rows, s, scales, flat(starts), rows, *sizes, self.first)

    def product(self, c: Any, a: Any, b: Any, m: int, n: int, k: int, **options: Any) -> None:
        runtime().gemm(Product(c, a, b, (m, n, k), batch=self.heads, **options))


def _tiles(shape: tuple[int, ...]) -> Iterator[_Tile]:
    """All tiles, last positions first."""
    batch, n_kv, seq, n_rep, _ = shape
    at_once = max(1, SCORES // (min(TILE, seq) * n_rep * seq))
    for head in range(0, batch * n_kv, at_once):
        heads = min(at_once, batch * n_kv - head)
        for first in reversed(range(0, seq, TILE)):
            yield _Tile(shape, head, heads, first)


def attention_forward(
    o: Array,
    lse: Array,
    q: Array,
    k: Array,
    v: Array,
    starts: Array,
    scale: float,
    scratch: dict[str, Array],
    quantize: bool = False,
) -> None:
    """o and lse from q, k, v."""
    if use_flash and flash.supported(q.shape[-1], q.dtype):
        flash.flash_attention_forward(o, lse, q, k, v, starts, scale, scratch)
        return
    s = scratch["scores"]
    if quantize:
        n_heads = v.shape[0] * v.shape[1] * v.shape[2]
        launch_elements(value_scales_kernel, n_heads, scratch["value_scales"], flat(v), n_heads, v.shape[3])
    for tile in _tiles(q.shape):
        m, n, d = tile.rows, tile.end, tile.dim
        tile.product(tile.scores(s), tile.queries(q), tile.keys(k), m, n, d, trans_b=True)
        tile.launch(softmax_kernel, (s,), lse, starts, scale)
        if quantize:
            tile.round_probabilities(s, scratch["value_scales"], starts)
        tile.product(tile.queries(o), tile.scores(s), tile.keys(v), m, d, n)


def attention_backward(
    dq: Array,
    dk: Array,
    dv: Array,
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    att: Array,
    lse: Array,
    starts: Array,
    scale: float,
    scratch: dict[str, Array],
) -> None:
    """Gradients of q, k, v. att: the forward's o as merge_heads gives it, which flash.py needs."""
    if use_flash and flash.supported(q.shape[-1], q.dtype):
        flash.flash_attention_backward(dq, dk, dv, do, q, k, v, att, lse, starts, scale, scratch)
        return
    p, dp = scratch["scores"], scratch["score_gradients"]
    for tile in _tiles(q.shape):
        m, n, d = tile.rows, tile.end, tile.dim
        beta = 0.0 if n == tile.seq else 1.0
        tile.product(tile.scores(p), tile.queries(q), tile.keys(k), m, n, d, trans_b=True)
        tile.product(tile.scores(dp), tile.queries(do), tile.keys(v), m, n, d, trans_b=True)
        tile.launch(softmax_backward_kernel, (p, dp), lse, starts, scale)
        tile.product(tile.keys(dv), tile.scores(p), tile.queries(do), n, d, m, trans_a=True, beta=beta)
        tile.product(tile.queries(dq), tile.scores(dp), tile.keys(k), m, d, n)
        tile.product(tile.keys(dk), tile.scores(dp), tile.queries(q), n, d, m, trans_a=True, beta=beta)
