"""Causal attention on tensor cores that never writes the scores: bfloat16, head_dim a multiple of 16 up to 64.

Shapes, formulas and names as in attention.py. One block for ROWS query rows (positions with their n_rep heads) of one
(row, kv head), one warp for 16 of them; keys (or queries) come in tiles through shared memory.

forward   per tile: S = q k^T * scale, masked;  m' = max(m, rowmax S);  P = exp(S - m')
                    l = l * exp(m - m') + rowsum P;  acc = acc * exp(m - m') + P v;  m = m'
          o = acc / l;  lse = m + log l
backward  P = exp(S - lse);  dP = do v^T;  delta = rowsum(P * dP) = rowsum(do * o);  dS = P * (dP - delta) * scale
          one kernel for delta, one walks the keys for dq, one walks the queries for dk = dS^T q and dv = P^T do

Tiles of keys before the first document that a block's rows belong to are skipped, and tiles of queries behind the last one that
sees a block's keys.

Fragments are those of ``mma_bf16``: lane 4 g + t of a warp holds rows g and g + 8, columns 2t and 2t + 1 of every 8. A
product's result has the layout of the next one's left operand, so P and dS go from one to the other in registers, rounded
to bfloat16. Right operands are read from shared memory as pairs along the summed dimension: matrices that are summed over
their rows lie there transposed. Rows of shared arrays are 4 words longer than needed, so that a warp's reads hit all banks.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import float32, uint32

from ..needs import Need, Needs
from ._intrinsics import load, load_pair, mma_bf16, pack_bf16, store
from ._jit import FULL, Array, cuda, device, f4, i8, kernel, launch_elements
from ._reduce import LOWEST
from ._runtime import flat, runtime

ROWS = 64
KEYS = 32  # keys of a tile in forward and dq
QUERIES = 16  # queries of a tile in dk and dv, which need the registers for two outputs
THREADS = 128  # four warps of 16 rows
u4 = np.uint32


@device
def pair_or_zero(x: Any, base: int, row: int, n_rows: int, width: int, column: int) -> Any:
    """x[row, column:column + 2] of a matrix at ``base``, zero past its end."""
    bits = u4(0)
    if row < n_rows:
        bits = load_pair(x, base + row * width + column)
    return bits


@device
def quad_sum(x: Any) -> Any:
    """Sum over the four lanes that share a row."""
    x += cuda.shfl_xor_sync(FULL, x, 1)
    x += cuda.shfl_xor_sync(FULL, x, 2)
    return x


@device
def quad_max(x: Any) -> Any:
    """Maximum over the four lanes that share a row."""
    x = max(x, cuda.shfl_xor_sync(FULL, x, 1))
    x = max(x, cuda.shfl_xor_sync(FULL, x, 2))
    return x


@kernel
def delta_kernel(delta: Any, do: Any, att: Any, n: int, seq: int, n_kv: int, n_rep: int, head_dim: int) -> None:
    """delta[i] of query row i of do, whose output lies in att (B, T, n_heads, head_dim)."""
    i = i8(cuda.grid(1))
    if i >= n:
        return
    r = i % n_rep
    t = i // n_rep % seq
    head = i // n_rep // seq
    at = (((head // n_kv * seq + t) * n_kv + head % n_kv) * n_rep + r) * head_dim
    total = f4(0)
    for d in range(head_dim):
        total += load(do, i * head_dim + d) * load(att, at + d)
    store(delta, i, total)


@functools.cache
def kernels(head_dim: int, keys: int) -> SimpleNamespace:
    """The kernels for a head_dim and so many rows in a shared tile, which size registers and shared arrays."""
    steps = head_dim // 16  # instructions that sum over a head
    columns = head_dim // 8  # column tiles of an output
    row_words = head_dim // 2 + 4
    column_words = keys // 2 + 4
    tiles_of_keys = keys // 8  # column tiles of a block of scores
    left_size, out_size, score_size = 4 * steps, 4 * columns, keys // 2  # local arrays' sizes have to be plain names

    @device
    def stage(target: Any, x: Any, base: int, first: int, n_rows: int, width: int) -> None:
        """target[r, c] = the pair x[first + r, 2c:2c + 2] for keys rows, by the whole block."""
        words = width // 2
        i = cuda.threadIdx.x
        while i < keys * words:
            target[i // words, i % words] = pair_or_zero(x, base, first + i // words, n_rows, width, i % words * 2)
            i += THREADS

    @device
    def stage_transposed(target: Any, x: Any, base: int, first: int, n_rows: int, width: int) -> None:
        """target[c, r] = the pair (x[first + 2r, c], x[first + 2r + 1, c]), by the whole block."""
        i = cuda.threadIdx.x
        while i < keys // 2 * (width // 2):
            r = i // (width // 2)
            c = i % (width // 2) * 2
            upper = pair_or_zero(x, base, first + 2 * r, n_rows, width, c)
            lower = pair_or_zero(x, base, first + 2 * r + 1, n_rows, width, c)
            target[c, r] = u4((upper & u4(0xFFFF)) | u4(u4(lower & u4(0xFFFF)) << u4(16)))
            target[c + 1, r] = u4(u4(upper >> u4(16)) | (lower & u4(0xFFFF0000)))
            i += THREADS

    @device
    def load_rows(fragments: Any, x: Any, base: int, row: int, n_rows: int, t: int) -> None:
        """This lane's left-operand fragments of rows row and row + 8."""
        for s in range(steps):
            c = s * 16 + 2 * t
            fragments[4 * s] = pair_or_zero(x, base, row, n_rows, head_dim, c)
            fragments[4 * s + 1] = pair_or_zero(x, base, row + 8, n_rows, head_dim, c)
            fragments[4 * s + 2] = pair_or_zero(x, base, row, n_rows, head_dim, c + 8)
            fragments[4 * s + 3] = pair_or_zero(x, base, row + 8, n_rows, head_dim, c + 8)

    @device
    def multiply_rows(out: Any, left: Any, right: Any, g: int, t: int) -> None:
        """out (16, keys) = left (16, head_dim) right^T, right (keys, head_dim) staged."""
        for j in range(tiles_of_keys):
            c0, c1, c2, c3 = f4(0), f4(0), f4(0), f4(0)
            for s in range(steps):
                c0, c1, c2, c3 = mma_bf16(
                    left[4 * s], left[4 * s + 1], left[4 * s + 2], left[4 * s + 3],
                    right[j * 8 + g, s * 8 + t], right[j * 8 + g, s * 8 + t + 4],
                    c0, c1, c2, c3,
                )  # fmt: skip
            out[4 * j], out[4 * j + 1], out[4 * j + 2], out[4 * j + 3] = c0, c1, c2, c3

    @device
    def accumulate(out: Any, p: Any, right: Any, g: int, t: int) -> None:
        """out (16, head_dim) += p (16, keys) right, right (keys, head_dim) staged transposed; p becomes bfloat16."""
        for s in range(keys // 16):
            a0 = pack_bf16(p[8 * s], p[8 * s + 1])
            a1 = pack_bf16(p[8 * s + 2], p[8 * s + 3])
            a2 = pack_bf16(p[8 * s + 4], p[8 * s + 5])
            a3 = pack_bf16(p[8 * s + 6], p[8 * s + 7])
            for j in range(columns):
                d = mma_bf16(
                    a0, a1, a2, a3, right[j * 8 + g, s * 8 + t], right[j * 8 + g, s * 8 + t + 4],
                    out[4 * j], out[4 * j + 1], out[4 * j + 2], out[4 * j + 3],
                )  # fmt: skip
                out[4 * j], out[4 * j + 1], out[4 * j + 2], out[4 * j + 3] = d[0], d[1], d[2], d[3]

    @device
    def store_rows(x: Any, base: int, row: int, n_rows: int, t: int, values: Any, scale0: Any, scale1: Any) -> None:
        """Rows row and row + 8 of a matrix from accumulators, scaled."""
        for j in range(columns):
            if row < n_rows:
                at = base + row * head_dim + j * 8 + 2 * t
                store(x, at, values[4 * j] * scale0)
                store(x, at + 1, values[4 * j + 1] * scale0)
            if row + 8 < n_rows:
                at = base + (row + 8) * head_dim + j * 8 + 2 * t
                store(x, at, values[4 * j + 2] * scale1)
                store(x, at + 1, values[4 * j + 3] * scale1)

    @kernel
    def flash_forward_kernel(
        o: Any, lse: Any, q: Any, k: Any, v: Any, starts: Any, seq: int, n_kv: int, n_rep: int, scale: Any
    ) -> None:
        """ROWS query rows of one (row, kv head)."""
        k_tile = cuda.shared.array((keys, row_words), uint32)
        v_tile = cuda.shared.array((head_dim, column_words), uint32)
        q_rows = cuda.local.array(left_size, uint32)
        s = cuda.local.array(score_size, float32)
        acc = cuda.local.array(out_size, float32)
        n_rows = seq * n_rep
        tiles = (n_rows + ROWS - 1) // ROWS
        head = i8(cuda.blockIdx.x) // tiles
        first = i8(cuda.blockIdx.x) % tiles * ROWS
        lane = cuda.threadIdx.x % 32
        g = lane // 4
        t = lane % 4
        row = first + cuda.threadIdx.x // 32 * 16 + g
        see0 = row // n_rep  # the last position that each of the two rows sees
        see1 = (row + 8) // n_rep
        base = head // n_kv * seq
        from0 = load(starts, base + min(see0, seq - 1))  # and the first one
        from1 = load(starts, base + min(see1, seq - 1))
        load_rows(q_rows, q, head * n_rows * head_dim, row, n_rows, t)
        for j in range(out_size):
            acc[j] = f4(0)
        m0, m1, l0, l1 = LOWEST, LOWEST, f4(0), f4(0)
        end = min(seq, (first + ROWS - 1) // n_rep + 1)
        start = load(starts, base + first // n_rep) // keys * keys
        while start < end:
            cuda.syncthreads()  # the tile before is used up
            stage(k_tile, k, head * seq * head_dim, start, seq, head_dim)
            stage_transposed(v_tile, v, head * seq * head_dim, start, seq, head_dim)
            cuda.syncthreads()
            multiply_rows(s, q_rows, k_tile, g, t)
            top0, top1 = m0, m1
            for j in range(tiles_of_keys):
                column = start + j * 8 + 2 * t
                s[4 * j] = s[4 * j] * scale if from0 <= column and column <= see0 else LOWEST
                s[4 * j + 1] = s[4 * j + 1] * scale if from0 <= column + 1 and column + 1 <= see0 else LOWEST
                s[4 * j + 2] = s[4 * j + 2] * scale if from1 <= column and column <= see1 else LOWEST
                s[4 * j + 3] = s[4 * j + 3] * scale if from1 <= column + 1 and column + 1 <= see1 else LOWEST
                top0 = max(top0, max(s[4 * j], s[4 * j + 1]))
                top1 = max(top1, max(s[4 * j + 2], s[4 * j + 3]))
            top0 = quad_max(top0)
            top1 = quad_max(top1)
            keep0 = math.exp(m0 - top0)
            keep1 = math.exp(m1 - top1)
            m0, m1 = top0, top1  # of a row that has seen nothing yet LOWEST: what it adds up is multiplied by zero later
            sum0, sum1 = f4(0), f4(0)
            for j in range(tiles_of_keys):
                s[4 * j] = math.exp(s[4 * j] - m0)
                s[4 * j + 1] = math.exp(s[4 * j + 1] - m0)
                s[4 * j + 2] = math.exp(s[4 * j + 2] - m1)
                s[4 * j + 3] = math.exp(s[4 * j + 3] - m1)
                sum0 += s[4 * j] + s[4 * j + 1]
                sum1 += s[4 * j + 2] + s[4 * j + 3]
            l0 = l0 * keep0 + quad_sum(sum0)
            l1 = l1 * keep1 + quad_sum(sum1)
            for j in range(columns):
                acc[4 * j] *= keep0
                acc[4 * j + 1] *= keep0
                acc[4 * j + 2] *= keep1
                acc[4 * j + 3] *= keep1
            accumulate(acc, s, v_tile, g, t)
            start += keys
        store_rows(o, head * n_rows * head_dim, row, n_rows, t, acc, f4(1) / l0, f4(1) / l1)
        if t == 0:
            if row < n_rows:
                store(lse, head * n_rows + row, m0 + math.log(l0))
            if row + 8 < n_rows:
                store(lse, head * n_rows + row + 8, m1 + math.log(l1))

    @device
    def probabilities(
        s: Any, start: Any, from0: Any, see0: Any, from1: Any, see1: Any, shift0: Any, shift1: Any, scale: Any, t: int
    ) -> None:
        """Raw scores of two rows to probabilities with the known log-sum-exp, zero outside the keys that they see."""
        for j in range(tiles_of_keys):
            column = start + j * 8 + 2 * t
            s[4 * j] = math.exp(s[4 * j] * scale - shift0) if from0 <= column and column <= see0 else f4(0)
            s[4 * j + 2] = math.exp(s[4 * j + 2] * scale - shift1) if from1 <= column and column <= see1 else f4(0)
            column += 1
            s[4 * j + 1] = math.exp(s[4 * j + 1] * scale - shift0) if from0 <= column and column <= see0 else f4(0)
            s[4 * j + 3] = math.exp(s[4 * j + 3] * scale - shift1) if from1 <= column and column <= see1 else f4(0)

    @kernel
    def flash_dq_kernel(
        dq: Any, delta: Any, do: Any, q: Any, k: Any, v: Any, lse: Any, starts: Any,
        seq: int, n_kv: int, n_rep: int, scale: Any,
    ) -> None:  # fmt: skip
        """dq of ROWS query rows."""
        k_tile = cuda.shared.array((keys, row_words), uint32)
        v_tile = cuda.shared.array((keys, row_words), uint32)
        k_columns = cuda.shared.array((head_dim, column_words), uint32)
        q_rows = cuda.local.array(left_size, uint32)
        do_rows = cuda.local.array(left_size, uint32)
        s = cuda.local.array(score_size, float32)
        dp = cuda.local.array(score_size, float32)
        acc = cuda.local.array(out_size, float32)
        n_rows = seq * n_rep
        tiles = (n_rows + ROWS - 1) // ROWS
        head = i8(cuda.blockIdx.x) // tiles
        first = i8(cuda.blockIdx.x) % tiles * ROWS
        lane = cuda.threadIdx.x % 32
        g = lane // 4
        t = lane % 4
        row = first + cuda.threadIdx.x // 32 * 16 + g
        see0 = row // n_rep
        see1 = (row + 8) // n_rep
        base = head // n_kv * seq
        from0 = load(starts, base + min(see0, seq - 1))
        from1 = load(starts, base + min(see1, seq - 1))
        load_rows(q_rows, q, head * n_rows * head_dim, row, n_rows, t)
        load_rows(do_rows, do, head * n_rows * head_dim, row, n_rows, t)
        shift0 = load(lse, head * n_rows + min(row, n_rows - 1))
        shift1 = load(lse, head * n_rows + min(row + 8, n_rows - 1))
        delta0 = load(delta, head * n_rows + min(row, n_rows - 1))
        delta1 = load(delta, head * n_rows + min(row + 8, n_rows - 1))
        for j in range(out_size):
            acc[j] = f4(0)
        end = min(seq, (first + ROWS - 1) // n_rep + 1)
        start = load(starts, base + first // n_rep) // keys * keys
        while start < end:
            cuda.syncthreads()  # the tile before is used up
            stage(k_tile, k, head * seq * head_dim, start, seq, head_dim)
            stage(v_tile, v, head * seq * head_dim, start, seq, head_dim)
            stage_transposed(k_columns, k, head * seq * head_dim, start, seq, head_dim)
            cuda.syncthreads()
            multiply_rows(s, q_rows, k_tile, g, t)
            probabilities(s, start, from0, see0, from1, see1, shift0, shift1, scale, t)
            multiply_rows(dp, do_rows, v_tile, g, t)
            for j in range(tiles_of_keys):
                s[4 * j] *= (dp[4 * j] - delta0) * scale
                s[4 * j + 1] *= (dp[4 * j + 1] - delta0) * scale
                s[4 * j + 2] *= (dp[4 * j + 2] - delta1) * scale
                s[4 * j + 3] *= (dp[4 * j + 3] - delta1) * scale
            accumulate(acc, s, k_columns, g, t)
            start += keys
        store_rows(dq, head * n_rows * head_dim, row, n_rows, t, acc, f4(1), f4(1))

    @kernel
    def flash_dkv_kernel(
        dk: Any, dv: Any, delta: Any, do: Any, q: Any, k: Any, v: Any, lse: Any, starts: Any,
        seq: int, n_kv: int, n_rep: int, scale: Any,
    ) -> None:  # fmt: skip
        """dk and dv of ROWS keys, over the query rows that see them; scores lie transposed, keys by queries."""
        q_tile = cuda.shared.array((keys, row_words), uint32)
        do_tile = cuda.shared.array((keys, row_words), uint32)
        q_columns = cuda.shared.array((head_dim, column_words), uint32)
        do_columns = cuda.shared.array((head_dim, column_words), uint32)
        k_rows = cuda.local.array(left_size, uint32)
        v_rows = cuda.local.array(left_size, uint32)
        s = cuda.local.array(score_size, float32)
        dp = cuda.local.array(score_size, float32)
        dk_acc = cuda.local.array(out_size, float32)
        dv_acc = cuda.local.array(out_size, float32)
        n_rows = seq * n_rep
        tiles = (seq + ROWS - 1) // ROWS
        head = i8(cuda.blockIdx.x) // tiles
        first = i8(cuda.blockIdx.x) % tiles * ROWS
        lane = cuda.threadIdx.x % 32
        g = lane // 4
        t = lane % 4
        row = first + cuda.threadIdx.x // 32 * 16 + g
        load_rows(k_rows, k, head * seq * head_dim, row, seq, t)
        load_rows(v_rows, v, head * seq * head_dim, row, seq, t)
        for j in range(out_size):
            dk_acc[j] = f4(0)
            dv_acc[j] = f4(0)
        base = head // n_kv * seq
        start = first * n_rep // keys * keys
        while start < n_rows and load(starts, base + start // n_rep) < first + ROWS:
            cuda.syncthreads()  # the tile before is used up
            stage(q_tile, q, head * n_rows * head_dim, start, n_rows, head_dim)
            stage(do_tile, do, head * n_rows * head_dim, start, n_rows, head_dim)
            stage_transposed(q_columns, q, head * n_rows * head_dim, start, n_rows, head_dim)
            stage_transposed(do_columns, do, head * n_rows * head_dim, start, n_rows, head_dim)
            cuda.syncthreads()
            multiply_rows(s, k_rows, q_tile, g, t)
            multiply_rows(dp, v_rows, do_tile, g, t)
            for j in range(tiles_of_keys):
                for c in range(2):
                    query = start + j * 8 + 2 * t + c
                    at = head * n_rows + min(query, n_rows - 1)
                    shift = load(lse, at)
                    middle = load(delta, at)
                    sees = query // n_rep if query < n_rows else i8(-1)
                    begins = load(starts, base + min(query // n_rep, seq - 1))
                    p0 = math.exp(s[4 * j + c] * scale - shift) if begins <= row and row <= sees else f4(0)
                    p1 = math.exp(s[4 * j + c + 2] * scale - shift) if begins <= row + 8 and row + 8 <= sees else f4(0)
                    s[4 * j + c] = p0
                    s[4 * j + c + 2] = p1
                    dp[4 * j + c] = p0 * (dp[4 * j + c] - middle) * scale
                    dp[4 * j + c + 2] = p1 * (dp[4 * j + c + 2] - middle) * scale
            accumulate(dv_acc, s, do_columns, g, t)
            accumulate(dk_acc, dp, q_columns, g, t)
            start += keys
        store_rows(dk, head * seq * head_dim, row, seq, t, dk_acc, f4(1), f4(1))
        store_rows(dv, head * seq * head_dim, row, seq, t, dv_acc, f4(1), f4(1))

    return SimpleNamespace(forward=flash_forward_kernel, dq=flash_dq_kernel, dkv=flash_dkv_kernel)


def supported(head_dim: int, dtype: Any) -> bool:
    """Whether these kernels can do it: bfloat16, and heads that fit into the registers."""
    return bool(np.dtype(dtype) == np.uint16 and head_dim % 16 == 0 and head_dim <= 64)


def flash_attention_scratch(q_shape: tuple[int, ...]) -> Needs:
    """rowsum(dO * O) of every query."""
    batch, n_kv, seq, n_rep, _ = q_shape
    return {"delta": Need((batch * n_kv * seq * n_rep,), np.float32)}


def flash_attention_forward(
    o: Array, lse: Array, q: Array, k: Array, v: Array, starts: Array, scale: float, scratch: dict[str, Array]
) -> None:
    """o and lse from q, k, v; see attention.attention_forward."""
    batch, n_kv, seq, n_rep, head_dim = q.shape
    grid = batch * n_kv * -(-seq * n_rep // ROWS)
    arrays = map(flat, (o, lse, q, k, v, starts))
    runtime().launch(kernels(head_dim, KEYS).forward, grid, THREADS, (*arrays, seq, n_kv, n_rep, f4(scale)))


def flash_attention_backward(
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
    """Gradients of q, k, v; see attention.attention_backward."""
    batch, n_kv, seq, n_rep, head_dim = q.shape
    heads, n_rows = batch * n_kv, seq * n_rep
    delta = scratch["delta"][: heads * n_rows]
    sizes = heads * n_rows, seq, n_kv, n_rep, head_dim
    launch_elements(delta_kernel, heads * n_rows, delta, flat(do), flat(att), *sizes)
    inputs = *map(flat, (do, q, k, v, lse, starts)), seq, n_kv, n_rep, f4(scale)
    dq_kernel, dkv_kernel = kernels(head_dim, KEYS).dq, kernels(head_dim, QUERIES).dkv
    runtime().launch(dq_kernel, heads * -(-n_rows // ROWS), THREADS, (flat(dq), delta, *inputs))
    runtime().launch(dkv_kernel, heads * -(-seq // ROWS), THREADS, (flat(dk), flat(dv), delta, *inputs))
