"""Between the attention's head order and the rows of the output projection.

o, do (B, n_kv_heads, T, n_rep, head_dim);  rows, drows (B, T, n_heads, head_dim), query head = g * n_rep + r
A permutation: the backward is the inverse copy. Written with =.  One thread for each element of ``rows``.
"""

from __future__ import annotations

from typing import Any

from ._intrinsics import load, store
from ._jit import Array, cuda, device, kernel, launch_elements, u4, unsigned
from ._runtime import flat


@device
def head_index(i: int, seq: int, n_heads: int, n_kv: int, n_rep: int, head_dim: int) -> Any:
    """Where element i of rows (B, T, n_heads, head_dim) lies in o (B, n_kv_heads, T, n_rep, head_dim)."""
    d = i % head_dim
    head = i // head_dim % n_heads
    t = i // u4(head_dim * n_heads) % seq
    b = i // u4(head_dim * n_heads * seq)
    g = b * n_kv + head // n_rep
    return ((g * seq + t) * n_rep + head % n_rep) * head_dim + d


@kernel
def merge_heads_kernel(rows: Any, o: Any, n: int, seq: int, n_heads: int, n_kv: int, n_rep: int, head_dim: int) -> None:
    """rows[i] = o[head_index(i)]."""
    i = u4(cuda.grid(1))
    if i < n:
        store(rows, i, load(o, head_index(i, seq, n_heads, n_kv, n_rep, head_dim)))


@kernel
def split_heads_kernel(
    do: Any, drows: Any, n: int, seq: int, n_heads: int, n_kv: int, n_rep: int, head_dim: int
) -> None:
    """do[head_index(i)] = drows[i]."""
    i = u4(cuda.grid(1))
    if i < n:
        store(do, head_index(i, seq, n_heads, n_kv, n_rep, head_dim), load(drows, i))


def merge_heads(rows: Array, o: Array) -> None:
    """rows[b, t, g * n_rep + r] = o[b, g, t, r]."""
    _, n_kv, seq, n_rep, head_dim = o.shape
    sizes = unsigned(o.size, seq, n_kv * n_rep, n_kv, n_rep, head_dim, addressed=o.size)
    launch_elements(merge_heads_kernel, o.size, flat(rows), flat(o), *sizes)


def split_heads(do: Array, drows: Array) -> None:
    """do[b, g, t, r] = drows[b, t, g * n_rep + r]: the backward of merge_heads."""
    _, n_kv, seq, n_rep, head_dim = do.shape
    sizes = unsigned(do.size, seq, n_kv * n_rep, n_kv, n_rep, head_dim, addressed=do.size)
    launch_elements(split_heads_kernel, do.size, flat(do), flat(drows), *sizes)
