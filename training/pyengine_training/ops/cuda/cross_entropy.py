"""Cross-entropy over the vocabulary.  logits (N, vocab_size); targets (N,) int64, negative = ignored; loss (N,).

forward   loss[i] = logsumexp(logits[i]) - logits[i, targets[i]]           (0 where ignored)
backward  dlogits[i] = (softmax(logits[i]) - onehot(targets[i])) * inv     written over logits; inv = 1 / tokens counted

One block for each row. ``inv`` may be a number or a device array of one float32, which a recorded graph reads anew.
"""

from __future__ import annotations

import math
from typing import Any

from numba import float32

from ._intrinsics import load, store
from ._jit import Array, cuda, device, f4, i8, kernel, launch_rows
from ._reduce import LOWEST, block_max, block_sum
from ._runtime import flat, number
from ._vectors import WIDTH, aligned, pieces, read, write

THREADS = 1024  # of a row: rows are long, and the fewer are worked on at once, the surer the second read finds the cache


@device
def row_statistics(logits: Any, base: int, vocab: int, inv_tau: Any, whole: bool) -> Any:
    """Of this thread's share of a row: its maximum, and the sum of exp((logit - maximum) * inv_tau).

    The kernel merges the block's: a device function that used shared memory and were reached on two ways would be linked
    twice, and fail to.
    """
    x = cuda.local.array(WIDTH, float32)
    top = LOWEST
    total = f4(0)
    v = i8(cuda.threadIdx.x) * WIDTH
    while v < vocab:
        read(x, logits, base + v, base + vocab, whole)
        if v + WIDTH > vocab:
            for e in range(WIDTH):
                if v + e >= vocab:
                    x[e] = LOWEST
        before = top
        for e in range(WIDTH):
            top = max(top, x[e])
        total *= math.exp((before - top) * inv_tau)
        for e in range(WIDTH):
            total += math.exp((x[e] - top) * inv_tau)
        v += cuda.blockDim.x * WIDTH
    return top, total


@kernel
def cross_entropy_kernel(
    loss: Any, logits: Any, targets: Any, inv: Any, vocab: int, backward: bool, whole: bool
) -> None:
    """Loss of one row; with ``backward`` its gradient over the logits.

    The sums end in barriers, so every logit is read before any is overwritten.
    """
    row = i8(cuda.blockIdx.x)
    target = load(targets, row)
    base = row * vocab
    own_top, own_total = row_statistics(logits, base, vocab, f4(1), whole)
    target_logit = load(logits, base + max(target, i8(0)))
    top = block_max(own_top)
    total = block_sum(own_total * math.exp(own_top - top))
    if cuda.threadIdx.x == 0:
        value = math.log(total) - (target_logit - top)
        if target < 0:
            value = f4(0)
        store(loss, row, value)
    if backward:
        unit = load(inv, 0)
        factor = unit / total
        x = cuda.local.array(WIDTH, float32)
        v = i8(cuda.threadIdx.x) * WIDTH
        while v < vocab:
            read(x, logits, base + v, base + vocab, whole)
            for e in range(WIDTH):
                x[e] = math.exp(x[e] - top) * factor
            if v <= target and target < v + WIDTH:
                for e in range(WIDTH):
                    if v + e == target:
                        x[e] -= unit
            if target < 0:
                for e in range(WIDTH):
                    x[e] = f4(0)
            write(logits, base + v, base + vocab, x, whole)
            v += cuda.blockDim.x * WIDTH


def _launch(loss: Array, logits: Array, targets: Array, inv: Any, backward: bool) -> None:
    n, vocab = logits.shape
    arguments = flat(loss), flat(logits), flat(targets), number(inv), vocab, backward, aligned(logits, width=vocab)
    launch_rows(cross_entropy_kernel, n, pieces(vocab), *arguments, most=THREADS)


def cross_entropy_forward(loss: Array, logits: Array, targets: Array) -> None:
    """Loss per row; logits are left alone."""
    _launch(loss, logits, targets, 1.0, False)


def cross_entropy_forward_backward(loss: Array, logits: Array, targets: Array, inv: Any) -> None:
    """Loss per row, and the gradient written over the logits."""
    _launch(loss, logits, targets, inv, True)
