"""Causal attention with grouped queries, in tiles of query positions, recomputed in the backward.

q, o, dq, do (B, n_kv_heads, T, n_rep, head_dim);  k, v, dk, dv (B, n_kv_heads, T, head_dim)
lse (B, n_kv_heads, T * n_rep): log-sum-exp of each query's scaled scores, kept for the backward
starts (B, T) int64: first position that each position sees, its document's or 0, ascending;  scale = 1 / sqrt(head_dim)

forward   S = q k^T * scale, keys after the query and before its start masked;  P = softmax(S);  o = P v   written with =
backward  P  = exp(S - lse);  dv = P^T do;  dP = do v^T
          dS = P * (dP - rowsum(dP * P)) * scale;  dq = dS k;  dk = dS^T q                          written with =

A tile holds TILE positions with their n_rep query heads (n_rep * TILE rows) against the keys from its first position's start
to its end, so most masked products are skipped and the scores stay in cache. Probabilities are never stored.

``quantize`` rounds P in o = P v as fake_quant.py says; v is rounded already. The backward has P as it was.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..needs import Need, Needs
from ._jit import Array, exp, f4, kernel
from .fake_quant import fake_quant_probabilities, value_scales

TILE = 64


@kernel
def _softmax(s: Array, lse: Array, starts: Array, n_rep: int, first: int, key: int, scale: float) -> None:
    """Rows of raw scores (n, n_keys) to probabilities, in place; row i is position first + i // n_rep, column 0 is key."""
    n, n_keys = s.shape
    for i in range(n):
        position = first + i // n_rep
        begin, end = starts[position] - key, position + 1 - key
        for j in range(begin):
            s[i, j] = f4(0)
        top = s[i, begin]
        for j in range(begin, end):
            top = max(top, s[i, j])
        total = f4(0)
        for j in range(begin, end):
            e = exp((s[i, j] - top) * scale)
            s[i, j] = e
            total += e
        lse[i] = top * scale + np.log(total)
        inv = f4(1) / total
        for j in range(begin, end):
            s[i, j] *= inv
        for j in range(end, n_keys):
            s[i, j] = f4(0)


@kernel
def _probabilities(s: Array, lse: Array, starts: Array, n_rep: int, first: int, key: int, scale: float) -> None:
    """Raw scores to probabilities with the known log-sum-exp, in place."""
    n, n_keys = s.shape
    for i in range(n):
        position = first + i // n_rep
        begin, end = starts[position] - key, position + 1 - key
        for j in range(begin):
            s[i, j] = f4(0)
        shift = lse[i]
        for j in range(begin, end):
            s[i, j] = exp(s[i, j] * scale - shift)
        for j in range(end, n_keys):
            s[i, j] = f4(0)


@kernel
def _softmax_backward(dp: Array, p: Array, starts: Array, n_rep: int, first: int, key: int, scale: float) -> None:
    """dp (n, n_keys) becomes the gradient of the raw scores, in place."""
    n, n_keys = p.shape
    for i in range(n):
        position = first + i // n_rep
        begin, end = starts[position] - key, position + 1 - key
        for j in range(begin):
            dp[i, j] = f4(0)
        total = f4(0)
        for j in range(begin, end):
            total += dp[i, j] * p[i, j]
        for j in range(begin, end):
            dp[i, j] = p[i, j] * (dp[i, j] - total) * scale
        for j in range(end, n_keys):
            dp[i, j] = f4(0)


def attention_state(q_shape: tuple[int, ...], wide: Any) -> Needs:
    """Kept for the backward; q_shape (B, n_kv_heads, T, n_rep, head_dim); wide: type of statistics."""
    batch, n_kv, seq, n_rep, _ = q_shape
    return {"lse": Need((batch, n_kv, seq * n_rep), wide)}


def attention_scratch(q_shape: tuple[int, ...], dtype: Any, training: bool) -> Needs:
    """One tile's scores; for the backward their gradient and a product in the keys' shape too."""
    _, _, seq, n_rep, head_dim = q_shape
    scores = Need((min(TILE, seq) * n_rep * seq,), dtype)
    if not training:
        return {"scores": scores}
    return {"scores": scores, "score_gradients": scores, "key_product": Need((seq * head_dim,), dtype)}


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
    batch, n_kv, seq, n_rep, head_dim = q.shape
    for b in range(batch):
        for g in range(n_kv):
            queries = q[b, g].reshape(seq * n_rep, head_dim)
            outputs = o[b, g].reshape(seq * n_rep, head_dim)
            for first in range(0, seq, TILE):
                end = min(seq, first + TILE)
                rows = slice(first * n_rep, end * n_rep)
                n_rows, key = (end - first) * n_rep, int(starts[b, first])
                s = scratch["scores"][: n_rows * (end - key)].reshape(n_rows, end - key)
                np.matmul(queries[rows], k[b, g, key:end].T, out=s)
                _softmax(s, lse[b, g, rows], starts[b], n_rep, first, key, scale)
                if quantize:
                    fake_quant_probabilities(s, value_scales(v[b, g, key:end]), starts[b], n_rep, first, key)
                np.matmul(s, v[b, g, key:end], out=outputs[rows])


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
    """Gradients of q, k, v. att: the forward's o as merge_heads gives it, which this one does not need."""
    batch, n_kv, seq, n_rep, head_dim = q.shape
    dk.fill(0)
    dv.fill(0)
    for b in range(batch):
        for g in range(n_kv):
            queries = q[b, g].reshape(seq * n_rep, head_dim)
            d_out = do[b, g].reshape(seq * n_rep, head_dim)
            d_queries = dq[b, g].reshape(seq * n_rep, head_dim)
            for first in range(0, seq, TILE):
                end = min(seq, first + TILE)
                rows = slice(first * n_rep, end * n_rep)
                n_rows, key = (end - first) * n_rep, int(starts[b, first])
                n_keys = end - key
                p = scratch["scores"][: n_rows * n_keys].reshape(n_rows, n_keys)
                dp = scratch["score_gradients"][: n_rows * n_keys].reshape(n_rows, n_keys)
                product = scratch["key_product"][: n_keys * head_dim].reshape(n_keys, head_dim)
                np.matmul(queries[rows], k[b, g, key:end].T, out=p)
                _probabilities(p, lse[b, g, rows], starts[b], n_rep, first, key, scale)
                np.matmul(p.T, d_out[rows], out=product)
                dv[b, g, key:end] += product
                np.matmul(d_out[rows], v[b, g, key:end].T, out=dp)
                _softmax_backward(dp, p, starts[b], n_rep, first, key, scale)
                np.matmul(dp, k[b, g, key:end], out=d_queries[rows])
                np.matmul(dp.T, queries[rows], out=product)
                dk[b, g, key:end] += product
