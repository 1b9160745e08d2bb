"""Causal attention with grouped queries, in tiles of query positions, recomputed in the backward.

q, o, dq, do (B, n_kv_heads, T, n_rep, head_dim);  k, v, dk, dv (B, n_kv_heads, T, head_dim)
lse (B, n_kv_heads, T * n_rep) float32: log-sum-exp of each query's scaled scores, kept for the backward
starts (B, T) int64: first position that each position sees, its document's or 0;  scale = 1 / sqrt(head_dim)

forward   S = q k^T * scale, keys after the query and before its start masked;  P = softmax(S);  o = P v   written with =
backward  P  = exp(S - lse);  dv = P^T do;  dP = do v^T
          dS = P * (dP - rowsum(dP * P)) * scale;  dq = dS k;  dk = dS^T q                          written with =

A tile holds TILE positions with their n_rep query heads against all keys up to the tile's end: one batched matrix
product over as many (row, kv head) pairs as fit into SCORES elements, then one block for each row of scores. The
backward walks the tiles from the last, whose keys are all, so that dk and dv are written first and then added to.
Scores live in the inputs' type; softmax is taken in float32.

``flash.py`` keeps the scores on the chip instead. It is used where it can be and PYENGINE_CUDA_ATTENTION=flash is set:
its tensor core fragments are proven in the simulator only, so far.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

from ..needs import Need, Needs
from . import flash
from ._intrinsics import load, store
from ._jit import Array, cuda, f4, i8, kernel, launch_rows
from ._reduce import LOWEST, block_max, block_sum
from ._runtime import Product, flat, runtime

TILE = 256  # query positions
SCORES = 1 << 26  # elements of one scratch array of scores
use_flash = os.environ.get("PYENGINE_CUDA_ATTENTION") == "flash"


@kernel
def softmax_kernel(
    s: Any, lse: Any, n_rows: int, n_keys: int, n_rep: int, first: int,
    lse_start: int, lse_stride: int, scale: Any, starts: Any, head: int, n_kv: int, seq: int,
) -> None:  # fmt: skip
    """One row of raw scores to probabilities, in place; row i of a head is position first + i // n_rep."""
    row = i8(cuda.blockIdx.x)
    i = row % n_rows
    end = first + i // n_rep + 1
    begin = load(starts, (head + row // n_rows) // n_kv * seq + end - 1)
    base = row * n_keys
    top = LOWEST
    j = begin + cuda.threadIdx.x
    while j < end:
        top = max(top, load(s, base + j))
        j += cuda.blockDim.x
    top = block_max(top)
    total = f4(0)
    j = begin + cuda.threadIdx.x
    while j < end:
        total += math.exp((load(s, base + j) - top) * scale)
        j += cuda.blockDim.x
    total = block_sum(total)
    if cuda.threadIdx.x == 0:
        store(lse, lse_start + row // n_rows * lse_stride + i, top * scale + math.log(total))
    inv = f4(1) / total
    j = i8(cuda.threadIdx.x)
    while j < n_keys:
        p = f4(0)
        if begin <= j and j < end:
            p = math.exp((load(s, base + j) - top) * scale) * inv
        store(s, base + j, p)
        j += cuda.blockDim.x


@kernel
def softmax_backward_kernel(
    dp: Any, s: Any, lse: Any, n_rows: int, n_keys: int, n_rep: int, first: int,
    lse_start: int, lse_stride: int, scale: Any, starts: Any, head: int, n_kv: int, seq: int,
) -> None:  # fmt: skip
    """One row: dp becomes the gradient of the raw scores, given the probabilities in s."""
    row = i8(cuda.blockIdx.x)
    i = row % n_rows
    end = first + i // n_rep + 1
    begin = load(starts, (head + row // n_rows) // n_kv * seq + end - 1)
    base = row * n_keys
    total = f4(0)
    j = begin + cuda.threadIdx.x
    while j < end:
        total += load(dp, base + j) * load(s, base + j)
        j += cuda.blockDim.x
    total = block_sum(total)
    j = i8(cuda.threadIdx.x)
    while j < n_keys:
        ds = f4(0)
        if begin <= j and j < end:
            ds = load(s, base + j) * (load(dp, base + j) - total) * scale
        store(dp, base + j, ds)
        j += cuda.blockDim.x


@kernel
def probabilities_kernel(
    s: Any, lse: Any, n_rows: int, n_keys: int, n_rep: int, first: int,
    lse_start: int, lse_stride: int, scale: Any, starts: Any, head: int, n_kv: int, seq: int,
) -> None:  # fmt: skip
    """One row of raw scores to probabilities with the known log-sum-exp, in place."""
    row = i8(cuda.blockIdx.x)
    i = row % n_rows
    end = first + i // n_rep + 1
    begin = load(starts, (head + row // n_rows) // n_kv * seq + end - 1)
    base = row * n_keys
    shift = load(lse, lse_start + row // n_rows * lse_stride + i)
    j = i8(cuda.threadIdx.x)
    while j < n_keys:
        p = f4(0)
        if begin <= j and j < end:
            p = math.exp(load(s, base + j) * scale - shift)
        store(s, base + j, p)
        j += cuda.blockDim.x


def attention_state(q_shape: tuple[int, ...], wide: Any) -> Needs:
    """Kept for the backward; q_shape (B, n_kv_heads, T, n_rep, head_dim); wide: type of statistics."""
    batch, n_kv, seq, n_rep, _ = q_shape
    return {"lse": Need((batch, n_kv, seq * n_rep), wide)}


def attention_scratch(q_shape: tuple[int, ...], dtype: Any, training: bool) -> Needs:
    """Scores of one tile of as many heads as run at once, and for the backward their gradient."""
    batch, n_kv, seq, n_rep, head_dim = q_shape
    if use_flash and flash.supported(head_dim, dtype):
        return flash.flash_attention_scratch(q_shape) if training else {}
    size = min(TILE, seq) * n_rep * seq
    scores = Need((size * min(batch * n_kv, max(1, SCORES // size)),), dtype)
    return {"scores": scores, "score_gradients": scores} if training else {"scores": scores}


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

    def row_arguments(self, scale: float) -> tuple[Any, ...]:
        stride = self.seq * self.n_rep
        start = self.head * stride + self.first * self.n_rep
        return self.rows, self.end, self.n_rep, self.first, start, stride, f4(scale)

    def mask_arguments(self, starts: Array) -> tuple[Any, ...]:
        """Where a row's document starts."""
        return flat(starts), self.head, self.n_kv, self.seq

    def launch(self, function: Any, *arguments: Any) -> None:
        launch_rows(function, self.heads * self.rows, self.end, *arguments)

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
    o: Array, lse: Array, q: Array, k: Array, v: Array, starts: Array, scale: float, scratch: dict[str, Array]
) -> None:
    """o and lse from q, k, v."""
    if use_flash and flash.supported(q.shape[-1], q.dtype):
        flash.flash_attention_forward(o, lse, q, k, v, starts, scale, scratch)
        return
    s = scratch["scores"]
    for tile in _tiles(q.shape):
        m, n, d = tile.rows, tile.end, tile.dim
        tile.product(tile.scores(s), tile.queries(q), tile.keys(k), m, n, d, trans_b=True)
        tile.launch(softmax_kernel, s, flat(lse), *tile.row_arguments(scale), *tile.mask_arguments(starts))
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
        arguments = *tile.row_arguments(scale), *tile.mask_arguments(starts)
        tile.product(tile.scores(p), tile.queries(q), tile.keys(k), m, n, d, trans_b=True)
        tile.launch(probabilities_kernel, p, flat(lse), *arguments)
        tile.product(tile.keys(dv), tile.scores(p), tile.queries(do), n, d, m, trans_a=True, beta=beta)
        tile.product(tile.scores(dp), tile.queries(do), tile.keys(v), m, n, d, trans_b=True)
        tile.launch(softmax_backward_kernel, dp, p, flat(lse), *arguments)
        tile.product(tile.queries(dq), tile.scores(dp), tile.keys(k), m, d, n)
        tile.product(tile.keys(dk), tile.scores(dp), tile.queries(q), n, d, m, trans_a=True, beta=beta)
