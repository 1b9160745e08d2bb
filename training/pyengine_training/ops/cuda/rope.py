"""Cutting the fused q|k|v rows into heads, with rotary position embedding on q and k.

qkv, dqkv (B, T, n_heads + 2 n_kv_heads, head_dim): all q heads, then all k heads, then all v heads
q, dq     (B, n_kv_heads, T, n_rep, head_dim): the n_rep query heads that share a key lie beside each other, so that
          attention is one matrix product per kv head; query head = g * n_rep + r
k, v, dk, dv (B, n_kv_heads, T, head_dim);  cos, sin (>= T, head_dim / 2) float32

Pairs are (i, i + h), h = head_dim / 2; position t is the row's index.

forward   y[i]     = x[i] * cos - x[i+h] * sin         backward  dx[i]     = dy[i] * cos + dy[i+h] * sin
          y[i + h] = x[i+h] * cos + x[i] * sin                   dx[i + h] = dy[i+h] * cos - dy[i] * sin
Everything is written with =.  One thread for each pair of the fused rows.
"""

from __future__ import annotations

from typing import Any

from ..cpu.rope import rope_tables
from ._intrinsics import load, store
from ._jit import Array, cuda, device, kernel, launch_elements, u4, unsigned
from ._runtime import flat


@device
def head_base(b: int, t: int, head: int, seq: int, n_heads: int, n_kv: int, n_rep: int, head_dim: int) -> Any:
    """First element of a fused row's head in q, k or v: whichever of the three the head belongs to."""
    if head < n_heads:
        g = b * n_kv + head // n_rep
        return ((g * seq + t) * n_rep + head % n_rep) * head_dim
    g = b * n_kv + (head - n_heads) % n_kv
    return (g * seq + t) * head_dim


@kernel
def qkv_rope_forward_kernel(
    q: Any, k: Any, v: Any, qkv: Any, cos: Any, sin: Any,
    n_pairs: int, seq: int, n_all: int, n_heads: int, v_start: int, n_kv: int, n_rep: int, head_dim: int, half: int,
) -> None:  # fmt: skip
    """Pair i of the fused rows into q, k or v."""
    i = u4(cuda.grid(1))
    if i >= n_pairs:
        return
    d = i % half
    head = i // half % n_all
    t = i // u4(half * n_all) % seq
    b = i // u4(half * n_all * seq)
    source = i // half * head_dim + d
    x0 = load(qkv, source)
    x1 = load(qkv, source + half)
    target = head_base(b, t, head, seq, n_heads, n_kv, n_rep, head_dim) + d
    if head >= v_start:
        store(v, target, x0)
        store(v, target + half, x1)
        return
    c = load(cos, t * half + d)
    s = load(sin, t * half + d)
    if head < n_heads:
        store(q, target, x0 * c - x1 * s)
        store(q, target + half, x1 * c + x0 * s)
    else:
        store(k, target, x0 * c - x1 * s)
        store(k, target + half, x1 * c + x0 * s)


@kernel
def qkv_rope_backward_kernel(
    dqkv: Any, dq: Any, dk: Any, dv: Any, cos: Any, sin: Any,
    n_pairs: int, seq: int, n_all: int, n_heads: int, v_start: int, n_kv: int, n_rep: int, head_dim: int, half: int,
) -> None:  # fmt: skip
    """Pair i of the fused rows from dq, dk or dv."""
    i = u4(cuda.grid(1))
    if i >= n_pairs:
        return
    d = i % half
    head = i // half % n_all
    t = i // u4(half * n_all) % seq
    b = i // u4(half * n_all * seq)
    target = i // half * head_dim + d
    source = head_base(b, t, head, seq, n_heads, n_kv, n_rep, head_dim) + d
    if head >= v_start:
        store(dqkv, target, load(dv, source))
        store(dqkv, target + half, load(dv, source + half))
        return
    c = load(cos, t * half + d)
    s = load(sin, t * half + d)
    if head < n_heads:
        y0 = load(dq, source)
        y1 = load(dq, source + half)
    else:
        y0 = load(dk, source)
        y1 = load(dk, source + half)
    store(dqkv, target, y0 * c + y1 * s)
    store(dqkv, target + half, y1 * c - y0 * s)


def _sizes(q: Array) -> tuple[Any, ...]:
    """The kernels' sizes; all heads of a row are n_heads of q, n_kv of k, and from v_start on n_kv of v."""
    batch, n_kv, seq, n_rep, head_dim = q.shape
    n_all, n_heads, half = n_kv * (n_rep + 2), n_kv * n_rep, head_dim // 2
    n_pairs = batch * seq * n_all * half
    return unsigned(n_pairs, seq, n_all, n_heads, n_heads + n_kv, n_kv, n_rep, head_dim, half, addressed=2 * n_pairs)


def qkv_rope_forward(q: Array, k: Array, v: Array, qkv: Array, cos: Array, sin: Array) -> None:
    """Split into heads and rotate q and k."""
    sizes, arrays = _sizes(q), map(flat, (q, k, v, qkv, cos, sin))
    launch_elements(qkv_rope_forward_kernel, int(sizes[0]), *arrays, *sizes)


def qkv_rope_backward(dqkv: Array, dq: Array, dk: Array, dv: Array, cos: Array, sin: Array) -> None:
    """Rotate back and put the heads' gradients into the fused rows."""
    sizes, arrays = _sizes(dq), map(flat, (dqkv, dq, dk, dv, cos, sin))
    launch_elements(qkv_rope_backward_kernel, int(sizes[0]), *arrays, *sizes)


__all__ = ["qkv_rope_backward", "qkv_rope_forward", "rope_tables"]
