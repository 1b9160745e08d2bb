"""Between the attention's head order and the rows of the output projection.

o, do (B, n_kv_heads, T, n_rep, head_dim);  rows, drows (B, T, n_heads, head_dim), query head = g * n_rep + r
A permutation: the backward is the inverse copy. Written with =.
"""

from __future__ import annotations

from ._jit import Array, kernel


@kernel
def merge_heads(rows: Array, o: Array) -> None:
    """rows[b, t, g * n_rep + r] = o[b, g, t, r]."""
    batch, n_kv, seq, n_rep, head_dim = o.shape
    for b in range(batch):
        for t in range(seq):
            for g in range(n_kv):
                for r in range(n_rep):
                    for d in range(head_dim):
                        rows[b, t, g * n_rep + r, d] = o[b, g, t, r, d]


@kernel
def split_heads(do: Array, drows: Array) -> None:
    """do[b, g, t, r] = drows[b, t, g * n_rep + r]: the backward of merge_heads."""
    batch, n_kv, seq, n_rep, head_dim = do.shape
    for b in range(batch):
        for t in range(seq):
            for g in range(n_kv):
                for r in range(n_rep):
                    for d in range(head_dim):
                        do[b, g, t, r, d] = drows[b, t, g * n_rep + r, d]
