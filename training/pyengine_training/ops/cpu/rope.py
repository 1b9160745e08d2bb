"""Cutting the fused q|k|v rows into heads, with rotary position embedding on q and k.

qkv, dqkv (B, T, n_heads + 2 n_kv_heads, head_dim): all q heads, then all k heads, then all v heads
q, dq     (B, n_kv_heads, T, n_rep, head_dim): the n_rep query heads that share a key lie beside each other, so that
          attention is one matrix product per kv head; query head = g * n_rep + r
k, v, dk, dv (B, n_kv_heads, T, head_dim);  cos, sin (>= T, head_dim / 2)

Pairs are (i, i + h), h = head_dim / 2, as in Hugging Face checkpoints; position t is the row's index.

forward   y[i]     = x[i] * cos - x[i+h] * sin         backward  dx[i]     = dy[i] * cos + dy[i+h] * sin
          y[i + h] = x[i+h] * cos + x[i] * sin                   dx[i + h] = dy[i+h] * cos - dy[i] * sin
Everything is written with =.
"""

from __future__ import annotations

import numpy as np

from ._jit import Array, kernel


def rope_tables(max_seq_len: int, head_dim: int, theta: float) -> tuple[Array, Array]:
    """cos and sin, float32 (max_seq_len, head_dim / 2), rounded the way the engine does it.

    inv_freq and the angle are float32 (the power itself is taken in double); cos and sin of that
    angle are taken in double and rounded once.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = (np.float64(theta) ** exponent.astype(np.float64)).astype(np.float32)
    inv_freq = np.float32(1) / powers
    angle = np.arange(max_seq_len, dtype=np.float32)[:, None] * inv_freq[None]
    wide = angle.astype(np.float64)
    return np.cos(wide).astype(np.float32), np.sin(wide).astype(np.float32)


@kernel
def qkv_rope_forward(q: Array, k: Array, v: Array, qkv: Array, cos: Array, sin: Array) -> None:
    """Split into heads and rotate q and k."""
    batch, n_kv, seq, n_rep, head_dim = q.shape
    half = head_dim // 2
    n_heads = n_kv * n_rep
    for b in range(batch):
        for g in range(n_kv):
            for t in range(seq):
                for r in range(n_rep):
                    for d in range(half):
                        x0 = qkv[b, t, g * n_rep + r, d]
                        x1 = qkv[b, t, g * n_rep + r, d + half]
                        q[b, g, t, r, d] = x0 * cos[t, d] - x1 * sin[t, d]
                        q[b, g, t, r, d + half] = x1 * cos[t, d] + x0 * sin[t, d]
                for d in range(half):
                    x0 = qkv[b, t, n_heads + g, d]
                    x1 = qkv[b, t, n_heads + g, d + half]
                    k[b, g, t, d] = x0 * cos[t, d] - x1 * sin[t, d]
                    k[b, g, t, d + half] = x1 * cos[t, d] + x0 * sin[t, d]
                for d in range(head_dim):
                    v[b, g, t, d] = qkv[b, t, n_heads + n_kv + g, d]


@kernel
def qkv_rope_backward(dqkv: Array, dq: Array, dk: Array, dv: Array, cos: Array, sin: Array) -> None:
    """Rotate back and put the heads' gradients into the fused rows."""
    batch, n_kv, seq, n_rep, head_dim = dq.shape
    half = head_dim // 2
    n_heads = n_kv * n_rep
    for b in range(batch):
        for g in range(n_kv):
            for t in range(seq):
                for r in range(n_rep):
                    for d in range(half):
                        y0 = dq[b, g, t, r, d]
                        y1 = dq[b, g, t, r, d + half]
                        dqkv[b, t, g * n_rep + r, d] = y0 * cos[t, d] + y1 * sin[t, d]
                        dqkv[b, t, g * n_rep + r, d + half] = y1 * cos[t, d] - y0 * sin[t, d]
                for d in range(half):
                    y0 = dk[b, g, t, d]
                    y1 = dk[b, g, t, d + half]
                    dqkv[b, t, n_heads + g, d] = y0 * cos[t, d] + y1 * sin[t, d]
                    dqkv[b, t, n_heads + g, d + half] = y1 * cos[t, d] - y0 * sin[t, d]
                for d in range(head_dim):
                    dqkv[b, t, n_heads + n_kv + g, d] = dv[b, g, t, d]
