"""Token embedding.  x, dx (N, dim); table, dtable (vocab_size, dim); tokens (N,) int64.

forward   x[i] = table[tokens[i]]                         written with =
backward  dtable[tokens[i]] += dx[i], rows ascending      accumulated (a tied table also gets the output layer's share)

The backward uses no atomics: rows of one token form a chain in ascending order, and the block of the chain's first row
adds the whole chain, so the sums have the order of the CPU's loop. To find where a row's token comes again, each chunk of
CHUNK rows marks the tokens that it has: a row reads the rest of its own chunk, then one mark of each later chunk until one
has the token, then that chunk: 2 CHUNK + N / CHUNK reads at most, not N.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..needs import Need, Needs
from ._intrinsics import load, store
from ._jit import Array, cuda, i8, kernel, launch_elements, launch_rows
from ._runtime import flat, runtime

END = i8(-1)
CHUNK = 1024  # rows


def embedding_scratch(n: int, vocab_size: int) -> Needs:
    """The chains of equal tokens among n rows, and which tokens each chunk of rows has."""
    chains = {name: Need((n,), np.int64) for name in ("following", "starts")}
    return chains | {"present": Need((-(-n // CHUNK) * vocab_size,), np.int8)}


@kernel
def embedding_forward_kernel(x: Any, table: Any, tokens: Any, dim: int, vocab_size: int) -> None:
    """One block for each row. Tokens are clipped to the table, as on the CPU."""
    row = i8(cuda.blockIdx.x)
    token = min(max(load(tokens, row), i8(0)), i8(vocab_size) - i8(1))
    c = i8(cuda.threadIdx.x)
    while c < dim:
        store(x, row * dim + c, load(table, token * dim + c))
        c += cuda.blockDim.x


def embedding_forward(x: Array, table: Array, tokens: Array) -> None:
    """Gather one row per token."""
    n, dim = x.shape
    arguments = flat(x), flat(table), flat(tokens), dim, table.shape[0]
    launch_rows(embedding_forward_kernel, n, dim, *arguments)


@kernel
def present_kernel(present: Any, tokens: Any, n: int, chunk: int, vocab_size: int) -> None:
    """present[c, token] = 1 for every token of chunk c; the array was filled with zeros. All write the same value."""
    i = i8(cuda.grid(1))
    if i < n:
        store(present, i // chunk * vocab_size + load(tokens, i), np.int8(1))


@kernel
def chain_kernel(following: Any, present: Any, tokens: Any, n: int, chunk: int, vocab_size: int) -> None:
    """following[i] = next row with the token of row i, or END."""
    i = i8(cuda.grid(1))
    if i < n:
        token = load(tokens, i)
        c = i // chunk + i8(1)
        end = min(i8(n), c * chunk)
        j = i + i8(1)
        while j < end and load(tokens, j) != token:
            j += i8(1)
        if j == end:
            while c * chunk < n and load(present, c * vocab_size + token) == np.int8(0):
                c += i8(1)
            j = min(i8(n), c * chunk)
            while j < n and load(tokens, j) != token:
                j += i8(1)
        store(following, i, j if j < n else END)


@kernel
def chain_start_kernel(starts: Any, following: Any, n: int) -> None:
    """starts[j] = 0 for every row that follows another; the array was filled with ones."""
    i = cuda.grid(1)
    if i < n:
        j = load(following, i)
        if j != END:
            store(starts, j, i8(0))


@kernel
def embedding_backward_kernel(dtable: Any, dx: Any, tokens: Any, following: Any, starts: Any, dim: int) -> None:
    """One block for each row; those that start a chain add it up, each thread its columns."""
    first = i8(cuda.blockIdx.x)
    if load(starts, first) == i8(0):
        return
    base = load(tokens, first) * dim
    c = i8(cuda.threadIdx.x)
    while c < dim:
        total = load(dtable, base + c)
        row = first
        while row != END:
            total += load(dx, row * dim + c)
            row = load(following, row)
        store(dtable, base + c, total)
        c += cuda.blockDim.x


def embedding_backward(dtable: Array, dx: Array, tokens: Array, scratch: dict[str, Array]) -> None:
    """Scatter-add, in row order: the same bits every time."""
    n, dim = dx.shape
    following, starts = scratch["following"][:n], scratch["starts"][:n]
    runtime().fill(starts, 1)
    vocab_size = dtable.shape[0]
    present = scratch["present"][: -(-n // CHUNK) * vocab_size]
    runtime().fill(present, 0)
    launch_elements(present_kernel, n, present, flat(tokens), n, CHUNK, vocab_size)
    launch_elements(chain_kernel, n, following, present, flat(tokens), n, CHUNK, vocab_size)
    launch_elements(chain_start_kernel, n, starts, following, n)
    arguments = flat(dtable), flat(dx), flat(tokens), following, starts, dim
    launch_rows(embedding_backward_kernel, n, dim, *arguments)
