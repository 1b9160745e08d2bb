"""Token embedding.  x, dx (N, dim); table, dtable (vocab_size, dim); tokens (N,) int64.

forward   x[i] = table[tokens[i]]                         written with =
backward  dtable[tokens[i]] += dx[i], rows ascending      accumulated (a tied table also gets the output layer's share)
"""

from __future__ import annotations

import numpy as np

from ..needs import Needs
from ._jit import Array, kernel


def embedding_scratch(n: int, vocab_size: int) -> Needs:
    """None: rows are added one after another."""
    return {}


def embedding_forward(x: Array, table: Array, tokens: Array) -> None:
    """Gather one row per token; tokens must lie in [0, vocab_size), as `Split.document` sees to."""
    np.take(table, tokens, axis=0, out=x, mode="clip")  # mode="raise" would buffer the output


@kernel
def _embedding_backward(dtable: Array, dx: Array, tokens: Array) -> None:
    n_rows, dim = dx.shape
    for i in range(n_rows):
        token = tokens[i]
        for c in range(dim):
            dtable[token, c] += dx[i, c]


def embedding_backward(dtable: Array, dx: Array, tokens: Array, scratch: dict[str, Array]) -> None:
    """Scatter-add, in row order: the same bits every time."""
    _embedding_backward(dtable, dx, tokens)
