"""Cross-entropy over the vocabulary.  logits (N, vocab_size); targets (N,) int64, negative = ignored; loss (N,).

forward   loss[i] = logsumexp(logits[i]) - logits[i, targets[i]]           (0 where ignored)
backward  dlogits[i] = (softmax(logits[i]) - onehot(targets[i])) * inv     written over logits; inv = 1 / tokens counted

One block for each row. ``inv`` may be a number or a device array of one float32, which a recorded graph reads anew.
"""

from __future__ import annotations

import math
from typing import Any

from ._intrinsics import load, store
from ._jit import Array, cuda, device, f4, i8, kernel, launch_rows
from ._reduce import LOWEST, block_max, block_sum
from ._runtime import flat, number


@device
def row_max(logits: Any, base: int, vocab: int) -> Any:
    """Maximum of this thread's share of a row; the kernel calls block_max on it.

    A device function that used shared memory and were reached on two ways would be linked twice, and fail to.
    """
    top = LOWEST
    v = i8(cuda.threadIdx.x)
    while v < vocab:
        top = max(top, load(logits, base + v))
        v += cuda.blockDim.x
    return top


@device
def row_exp_sum(logits: Any, base: int, vocab: int, top: Any, inv_tau: Any) -> Any:
    """Sum of exp((logits - top) * inv_tau) over this thread's share of a row."""
    total = f4(0)
    v = i8(cuda.threadIdx.x)
    while v < vocab:
        total += math.exp((load(logits, base + v) - top) * inv_tau)
        v += cuda.blockDim.x
    return total


@kernel
def cross_entropy_kernel(loss: Any, logits: Any, targets: Any, inv: Any, vocab: int, backward: bool) -> None:
    """Loss of one row; with ``backward`` its gradient over the logits.

    The sums end in barriers, so every logit is read before any is overwritten.
    """
    row = i8(cuda.blockIdx.x)
    target = load(targets, row)
    base = row * vocab
    top = block_max(row_max(logits, base, vocab))
    target_logit = load(logits, base + max(target, i8(0)))
    total = block_sum(row_exp_sum(logits, base, vocab, top, f4(1)))
    if cuda.threadIdx.x == 0:
        value = math.log(total) - (target_logit - top)
        if target < 0:
            value = f4(0)
        store(loss, row, value)
    if backward:
        unit = load(inv, 0)
        factor = unit / total
        v = i8(cuda.threadIdx.x)
        while v < vocab:
            gradient = math.exp(load(logits, base + v) - top) * factor
            if v == target:
                gradient -= unit
            if target < 0:
                gradient = f4(0)
            store(logits, base + v, gradient)
            v += cuda.blockDim.x


def cross_entropy_forward(loss: Array, logits: Array, targets: Array) -> None:
    """Loss per row; logits are left alone."""
    n, vocab = logits.shape
    arguments = flat(loss), flat(logits), flat(targets), number(1.0), vocab, False
    launch_rows(cross_entropy_kernel, n, vocab, *arguments)


def cross_entropy_forward_backward(loss: Array, logits: Array, targets: Array, inv: Any) -> None:
    """Loss per row, and the gradient written over the logits."""
    n, vocab = logits.shape
    arguments = flat(loss), flat(logits), flat(targets), number(inv), vocab, True
    launch_rows(cross_entropy_kernel, n, vocab, *arguments)
