"""RMSNorm of each query and key head before RoPE (QK-norm, as in Qwen3): one weight for all q heads, one for all k heads.

qkv, dqkv (B, T, n_heads + 2 n_kv_heads, head_dim): all q heads, then all k heads, then all v heads, which stay as they are
raw (B, T, n_heads + n_kv_heads, head_dim), inv_rms (B, T, n_heads + n_kv_heads) float32: kept for the backward
q_norm, k_norm, dq_norm, dk_norm (head_dim,)

forward   raw = x;  inv_rms = 1 / sqrt(mean(x^2) + eps);  x = x * inv_rms * w            in place in qkv
backward  dw += sum over rows and heads of dy * x * inv_rms
          dy  = inv_rms * (dy*w - x * inv_rms^2 * mean(dy*w*x))                          in place in dqkv

One block for each head of a token. The weights' gradients are summed before dqkv changes, in the two steps of
:mod:`.rmsnorm`: PARTS blocks of tokens into a scratch array, then its rows in ascending order.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..cpu.qk_norm import qk_norm_state
from ..needs import Need, Needs
from ._intrinsics import load, store
from ._jit import Array, cuda, f4, i8, kernel, launch_elements, launch_rows
from ._reduce import block_sum
from ._runtime import flat, runtime
from .rmsnorm import COLUMNS, PARTS, add_parts_kernel


def qk_norm_scratch(head_dim: int) -> Needs:
    """Partial sums of one weight's gradient."""
    return {"head_norm_parts": Need((PARTS * head_dim,), np.float32)}


@kernel
def qk_norm_forward_kernel(
    qkv: Any, raw: Any, inv_rms: Any, q_norm: Any, k_norm: Any, eps: Any,
    heads: int, n_heads: int, n_all: int, dim: int,
) -> None:  # fmt: skip
    """One head of one token."""
    row = i8(cuda.blockIdx.x)
    head = row % heads
    base = row * dim
    fused = (row // heads * n_all + head) * dim
    total = f4(0)
    d = i8(cuda.threadIdx.x)
    while d < dim:
        value = load(qkv, fused + d)
        store(raw, base + d, value)
        total += value * value
        d += cuda.blockDim.x
    total = block_sum(total)
    r = f4(1) / math.sqrt(total / f4(dim) + eps)
    if cuda.threadIdx.x == 0:
        store(inv_rms, row, r)
    d = i8(cuda.threadIdx.x)
    while d < dim:
        w = load(q_norm, d)
        if head >= n_heads:
            w = load(k_norm, d)
        store(qkv, fused + d, load(raw, base + d) * r * w)
        d += cuda.blockDim.x


@kernel
def qk_norm_backward_kernel(
    dqkv: Any, raw: Any, inv_rms: Any, q_norm: Any, k_norm: Any, heads: int, n_heads: int, n_all: int, dim: int
) -> None:
    """One head of one token: its gradient, in place."""
    row = i8(cuda.blockIdx.x)
    head = row % heads
    base = row * dim
    fused = (row // heads * n_all + head) * dim
    r = load(inv_rms, row)
    total = f4(0)
    d = i8(cuda.threadIdx.x)
    while d < dim:
        w = load(q_norm, d)
        if head >= n_heads:
            w = load(k_norm, d)
        total += load(dqkv, fused + d) * w * load(raw, base + d)
        d += cuda.blockDim.x
    shift = block_sum(total) * r * r * r / f4(dim)
    d = i8(cuda.threadIdx.x)
    while d < dim:
        w = load(q_norm, d)
        if head >= n_heads:
            w = load(k_norm, d)
        store(dqkv, fused + d, load(dqkv, fused + d) * w * r - load(raw, base + d) * shift)
        d += cuda.blockDim.x


@kernel
def head_weight_parts_kernel(
    parts: Any, dqkv: Any, raw: Any, inv_rms: Any,
    n_tokens: int, first: int, last: int, heads: int, n_all: int, dim: int, tokens_per_part: int,
) -> None:  # fmt: skip
    """parts[part, d] = sum of dy * x * inv_rms over the part's tokens and the heads first to last (not included)."""
    blocks = (dim + cuda.blockDim.x - 1) // cuda.blockDim.x
    part = i8(cuda.blockIdx.x) // blocks
    d = i8(cuda.blockIdx.x) % blocks * cuda.blockDim.x + cuda.threadIdx.x
    if d < dim:
        end = min(i8(n_tokens), (part + i8(1)) * tokens_per_part)
        total = f4(0)
        token = part * tokens_per_part
        while token < end:
            head = i8(first)
            while head < last:
                row = token * heads + head
                dy = load(dqkv, (token * n_all + head) * dim + d)
                total += dy * load(raw, row * dim + d) * load(inv_rms, row)
                head += i8(1)
            token += i8(1)
        store(parts, part * dim + d, total)


def _sizes(qkv: Array, raw: Array) -> tuple[int, int, int, int, int]:
    """Tokens, normalized heads of a token, q heads of them, all heads of a token, head_dim."""
    batch, seq, n_all, dim = qkv.shape
    heads = raw.shape[2]
    return batch * seq, heads, 2 * heads - n_all, n_all, dim


def qk_norm_forward(qkv: Array, raw: Array, inv_rms: Array, q_norm: Array, k_norm: Array, eps: float) -> None:
    """Normalize the q and k heads of qkv."""
    n_tokens, heads, n_heads, n_all, dim = _sizes(qkv, raw)
    arrays = map(flat, (qkv, raw, inv_rms, q_norm, k_norm))
    launch_rows(qk_norm_forward_kernel, n_tokens * heads, dim, *arrays, f4(eps), heads, n_heads, n_all, dim)


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
    n_tokens, heads, n_heads, n_all, dim = _sizes(dqkv, raw)
    tokens_per_part = -(-n_tokens // min(PARTS, n_tokens))
    n_parts = -(-n_tokens // tokens_per_part)
    parts = scratch["head_norm_parts"]
    rows = flat(dqkv), flat(raw), flat(inv_rms)
    for dw, first, last in ((dq_norm, 0, n_heads), (dk_norm, n_heads, heads)):
        arguments = parts, *rows, n_tokens, first, last, heads, n_all, dim, tokens_per_part
        runtime().launch(head_weight_parts_kernel, n_parts * -(-dim // COLUMNS), COLUMNS, arguments)
        launch_elements(add_parts_kernel, dim, flat(dw), parts, n_parts, dim)
    weights = flat(q_norm), flat(k_norm)
    launch_rows(qk_norm_backward_kernel, n_tokens * heads, dim, *rows, *weights, heads, n_heads, n_all, dim)


__all__ = ["qk_norm_backward", "qk_norm_forward", "qk_norm_scratch", "qk_norm_state"]
