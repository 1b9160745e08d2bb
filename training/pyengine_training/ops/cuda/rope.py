"""Cutting the fused q|k|v rows into heads, with rotary position embedding on q and k.

qkv, dqkv (B, T, n_heads + 2 n_kv_heads, head_dim): all q heads, then all k heads, then all v heads
q, dq     (B, n_kv_heads, T, n_rep, head_dim): the n_rep query heads that share a key lie beside each other, so that
          attention is one matrix product per kv head; query head = g * n_rep + r
k, v, dk, dv (B, n_kv_heads, T, head_dim);  cos, sin (>= T, head_dim / 2) float32

Pairs are (i, i + h), h = head_dim / 2; position t is the row's index.

forward   y[i]     = x[i] * cos - x[i+h] * sin         backward  dx[i]     = dy[i] * cos + dy[i+h] * sin
          y[i + h] = x[i+h] * cos + x[i] * sin                   dx[i + h] = dy[i+h] * cos - dy[i] * sin
Everything is written with =.  One thread for WIDTH pairs of a head.
"""

from __future__ import annotations

from typing import Any

from numba import float32

from ..cpu.rope import rope_tables
from ._jit import Array, cuda, device, f4, i8, kernel, launch_elements, u4, unsigned
from ._runtime import flat
from ._vectors import WIDTH, aligned, pieces, read, write


@device
def head_base(b: int, t: int, head: int, seq: int, n_heads: int, n_kv: int, n_rep: int, head_dim: int) -> Any:
    """First element of a fused row's head in q, k or v: whichever of the three the head belongs to."""
    if head < n_heads:
        g = b * n_kv + head // n_rep
        return ((g * seq + t) * n_rep + head % n_rep) * head_dim
    g = b * n_kv + (head - n_heads) % n_kv
    return (g * seq + t) * head_dim


@device
def rotate(x: Any, y: Any, cos: Any, sin: Any, at: int, end: int, sign: Any, whole: bool) -> None:
    """Pairs (x, y) in place, by the angles from table element ``at`` on; sign -1 turns them back."""
    c = cuda.local.array(WIDTH, float32)
    s = cuda.local.array(WIDTH, float32)
    read(c, cos, at, end, whole)
    read(s, sin, at, end, whole)
    for e in range(WIDTH):
        x0 = x[e]
        x[e] = x0 * c[e] - y[e] * s[e] * sign
        y[e] = y[e] * c[e] + x0 * s[e] * sign


@kernel
def qkv_rope_forward_kernel(
    q: Any, k: Any, v: Any, qkv: Any, cos: Any, sin: Any, whole: bool,
    n: int, seq: int, n_all: int, n_heads: int, v_start: int, n_kv: int, n_rep: int, head_dim: int, half: int, parts: int,
) -> None:  # fmt: skip
    """Part i of the fused rows' heads, WIDTH pairs, into q, k or v."""
    i = u4(cuda.grid(1))
    if i >= n:
        return
    d = i8(i % parts) * WIDTH
    head = i // parts % n_all
    t = i // u4(parts * n_all) % seq
    b = i // u4(parts * n_all * seq)
    source = i8(i // parts * head_dim)
    target = i8(head_base(b, t, head, seq, n_heads, n_kv, n_rep, head_dim))
    middle = i8(half)
    x = cuda.local.array(WIDTH, float32)
    y = cuda.local.array(WIDTH, float32)
    read(x, qkv, source + d, source + middle, whole)
    read(y, qkv, source + middle + d, source + i8(head_dim), whole)
    if head < v_start:
        row = i8(t) * middle
        rotate(x, y, cos, sin, row + d, row + middle, f4(1), whole)
    if head < n_heads:
        write(q, target + d, target + middle, x, whole)
        write(q, target + middle + d, target + i8(head_dim), y, whole)
    elif head < v_start:
        write(k, target + d, target + middle, x, whole)
        write(k, target + middle + d, target + i8(head_dim), y, whole)
    else:
        write(v, target + d, target + middle, x, whole)
        write(v, target + middle + d, target + i8(head_dim), y, whole)


@kernel
def qkv_rope_backward_kernel(
    dqkv: Any, dq: Any, dk: Any, dv: Any, cos: Any, sin: Any, whole: bool,
    n: int, seq: int, n_all: int, n_heads: int, v_start: int, n_kv: int, n_rep: int, head_dim: int, half: int, parts: int,
) -> None:  # fmt: skip
    """Part i of the fused rows' heads, WIDTH pairs, from dq, dk or dv."""
    i = u4(cuda.grid(1))
    if i >= n:
        return
    d = i8(i % parts) * WIDTH
    head = i // parts % n_all
    t = i // u4(parts * n_all) % seq
    b = i // u4(parts * n_all * seq)
    target = i8(i // parts * head_dim)
    source = i8(head_base(b, t, head, seq, n_heads, n_kv, n_rep, head_dim))
    middle = i8(half)
    x = cuda.local.array(WIDTH, float32)
    y = cuda.local.array(WIDTH, float32)
    if head < n_heads:
        read(x, dq, source + d, source + middle, whole)
        read(y, dq, source + middle + d, source + i8(head_dim), whole)
    elif head < v_start:
        read(x, dk, source + d, source + middle, whole)
        read(y, dk, source + middle + d, source + i8(head_dim), whole)
    else:
        read(x, dv, source + d, source + middle, whole)
        read(y, dv, source + middle + d, source + i8(head_dim), whole)
    if head < v_start:
        row = i8(t) * middle
        rotate(x, y, cos, sin, row + d, row + middle, f4(-1), whole)
    write(dqkv, target + d, target + middle, x, whole)
    write(dqkv, target + middle + d, target + i8(head_dim), y, whole)


def _launch(function: Any, q: Array, arrays: tuple[Array, ...]) -> None:
    """One thread for each part; all heads of a row are n_heads of q, n_kv of k, and from v_start on n_kv of v."""
    batch, n_kv, seq, n_rep, head_dim = q.shape
    n_all, n_heads, half = n_kv * (n_rep + 2), n_kv * n_rep, head_dim // 2
    parts, rows = pieces(half), batch * seq * n_all
    sizes = unsigned(
        rows * parts, seq, n_all, n_heads, n_heads + n_kv, n_kv, n_rep, head_dim, half, parts, addressed=rows * head_dim
    )
    launch_elements(function, rows * parts, *map(flat, arrays), aligned(*arrays, width=half), *sizes)


def qkv_rope_forward(q: Array, k: Array, v: Array, qkv: Array, cos: Array, sin: Array) -> None:
    """Split into heads and rotate q and k."""
    _launch(qkv_rope_forward_kernel, q, (q, k, v, qkv, cos, sin))


def qkv_rope_backward(dqkv: Array, dq: Array, dk: Array, dv: Array, cos: Array, sin: Array) -> None:
    """Rotate back and put the heads' gradients into the fused rows."""
    _launch(qkv_rope_backward_kernel, dq, (dqkv, dq, dk, dv, cos, sin))


__all__ = ["qkv_rope_backward", "qkv_rope_forward", "rope_tables"]
