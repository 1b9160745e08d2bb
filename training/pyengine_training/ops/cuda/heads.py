"""Between the attention's head order and the rows of the output projection.

o, do (B, n_kv_heads, T, n_rep, head_dim);  rows, drows (B, T, n_heads, head_dim), query head = g * n_rep + r
A permutation: the backward is the inverse copy. Written with =.  One thread for WIDTH elements of a head.
"""

from __future__ import annotations

from typing import Any

from numba import float32

from ._jit import Array, cuda, device, i8, kernel, launch_elements, u4, unsigned
from ._runtime import flat
from ._vectors import WIDTH, aligned, pieces, read, write


@device
def head_start(i: int, seq: int, n_heads: int, n_kv: int, n_rep: int, head_dim: int) -> Any:
    """Where head i of rows (B, T, n_heads, head_dim) begins in o (B, n_kv_heads, T, n_rep, head_dim)."""
    head = i % n_heads
    t = i // n_heads % seq
    b = i // u4(n_heads * seq)
    g = b * n_kv + head // n_rep
    return i8(((g * seq + t) * n_rep + head % n_rep) * head_dim)


@kernel
def merge_heads_kernel(
    rows: Any, o: Any, whole: bool, n: int, seq: int, n_heads: int, n_kv: int, n_rep: int, head_dim: int, parts: int
) -> None:
    """Part i of the rows' heads from o."""
    i = u4(cuda.grid(1))
    if i >= n:
        return
    head = u4(i // parts)
    d = i8(i % parts) * WIDTH
    source = head_start(head, seq, n_heads, n_kv, n_rep, head_dim)
    target = i8(head * head_dim)
    x = cuda.local.array(WIDTH, float32)
    read(x, o, source + d, source + i8(head_dim), whole)
    write(rows, target + d, target + i8(head_dim), x, whole)


@kernel
def split_heads_kernel(
    do: Any, drows: Any, whole: bool, n: int, seq: int, n_heads: int, n_kv: int, n_rep: int, head_dim: int, parts: int
) -> None:
    """Part i of the rows' heads into do."""
    i = u4(cuda.grid(1))
    if i >= n:
        return
    head = u4(i // parts)
    d = i8(i % parts) * WIDTH
    source = i8(head * head_dim)
    target = head_start(head, seq, n_heads, n_kv, n_rep, head_dim)
    x = cuda.local.array(WIDTH, float32)
    read(x, drows, source + d, source + i8(head_dim), whole)
    write(do, target + d, target + i8(head_dim), x, whole)


def _launch(function: Any, o: Array, arrays: tuple[Array, Array]) -> None:
    _, n_kv, seq, n_rep, head_dim = o.shape
    parts = pieces(head_dim)
    n = o.size // head_dim * parts
    sizes = unsigned(n, seq, n_kv * n_rep, n_kv, n_rep, head_dim, parts, addressed=o.size)
    launch_elements(function, n, *map(flat, arrays), aligned(*arrays, width=head_dim), *sizes)


def merge_heads(rows: Array, o: Array) -> None:
    """rows[b, t, g * n_rep + r] = o[b, g, t, r]."""
    _launch(merge_heads_kernel, o, (rows, o))


def split_heads(do: Array, drows: Array) -> None:
    """do[b, g, t, r] = drows[b, t, g * n_rep + r]: the backward of merge_heads."""
    _launch(split_heads_kernel, do, (do, drows))
