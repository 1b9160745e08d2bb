"""RMSNorm of each query and key head before RoPE (QK-norm, as in Qwen3): one weight for all q heads, one for all k heads.

qkv, dqkv (B, T, n_heads + 2 n_kv_heads, head_dim): all q heads, then all k heads, then all v heads, which stay as they are
raw (B, T, n_heads + n_kv_heads, head_dim), inv_rms (B, T, n_heads + n_kv_heads): kept for the backward
q_norm, k_norm, dq_norm, dk_norm (head_dim,)

forward   raw = x;  inv_rms = 1 / sqrt(mean(x^2) + eps);  x = x * inv_rms * w            in place in qkv
backward  dw += sum over rows and heads of dy * x * inv_rms
          dy  = inv_rms * (dy*w - x * inv_rms^2 * mean(dy*w*x))                          in place in dqkv
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..needs import Need, Needs
from ._jit import Array, f4, kernel


def qk_norm_state(qkv_shape: tuple[int, ...], n_kv_heads: int, dtype: Any, wide: Any) -> Needs:
    """Kept for the backward; dtype: type of activations, wide: of statistics."""
    batch, seq, n_all, head_dim = qkv_shape
    heads = n_all - n_kv_heads
    return {"raw": Need((batch, seq, heads, head_dim), dtype), "inv_rms": Need((batch, seq, heads), wide)}


def qk_norm_scratch(head_dim: int) -> Needs:
    """None: the weights' gradients are summed in place."""
    return {}


@kernel
def qk_norm_forward(qkv: Array, raw: Array, inv_rms: Array, q_norm: Array, k_norm: Array, eps: float) -> None:
    """Normalize the q and k heads of qkv."""
    batch, seq, heads, head_dim = raw.shape
    n_heads = 2 * heads - qkv.shape[2]
    for b in range(batch):
        for t in range(seq):
            for h in range(heads):
                w = q_norm if h < n_heads else k_norm
                total = f4(0)
                for d in range(head_dim):
                    x = qkv[b, t, h, d]
                    raw[b, t, h, d] = x
                    total += x * x
                r = f4(1) / np.sqrt(total / f4(head_dim) + eps)
                inv_rms[b, t, h] = r
                for d in range(head_dim):
                    qkv[b, t, h, d] = qkv[b, t, h, d] * r * w[d]


@kernel
def _qk_norm_backward(
    dqkv: Array, dq_norm: Array, dk_norm: Array, raw: Array, inv_rms: Array, q_norm: Array, k_norm: Array
) -> None:
    batch, seq, heads, head_dim = raw.shape
    n_heads = 2 * heads - dqkv.shape[2]
    for b in range(batch):
        for t in range(seq):
            for h in range(heads):
                w, dw = (q_norm, dq_norm) if h < n_heads else (k_norm, dk_norm)
                r = inv_rms[b, t, h]
                total = f4(0)
                for d in range(head_dim):
                    total += dqkv[b, t, h, d] * w[d] * raw[b, t, h, d]
                shift = total * r * r * r / f4(head_dim)
                for d in range(head_dim):
                    dy, x = dqkv[b, t, h, d], raw[b, t, h, d]
                    dw[d] += dy * x * r
                    dqkv[b, t, h, d] = dy * w[d] * r - x * shift


def qk_norm_backward(
    dqkv: Array,
    dq_norm: Array,
    dk_norm: Array,
    raw: Array,
    inv_rms: Array,
    q_norm: Array,
    k_norm: Array,
    scratch: dict[str, Array],
) -> None:
    """Gradients of the heads as they were before (in place) and of the weights (+=)."""
    _qk_norm_backward(dqkv, dq_norm, dk_norm, raw, inv_rms, q_norm, k_norm)
