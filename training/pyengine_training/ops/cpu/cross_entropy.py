"""Cross-entropy over the vocabulary.  logits (N, vocab_size); targets (N,) int64, negative = ignored; loss (N,).

forward   loss[i] = logsumexp(logits[i]) - logits[i, targets[i]]           (0 where ignored)
backward  dlogits[i] = (softmax(logits[i]) - onehot(targets[i])) * inv     written over logits; inv = 1 / tokens counted
"""

from __future__ import annotations

import numpy as np

from ._jit import Array, exp, f4, kernel


@kernel
def cross_entropy_forward(loss: Array, logits: Array, targets: Array) -> None:
    """Loss per row; logits are left alone."""
    n_rows, vocab = logits.shape
    for i in range(n_rows):
        if targets[i] < 0:
            loss[i] = f4(0)
            continue
        top = logits[i, 0]
        for v in range(vocab):
            top = max(top, logits[i, v])
        total = f4(0)
        for v in range(vocab):
            total += exp(logits[i, v] - top)
        loss[i] = np.log(total) - (logits[i, targets[i]] - top)


@kernel
def cross_entropy_forward_backward(loss: Array, logits: Array, targets: Array, inv: float) -> None:
    """Loss per row, and the gradient written over the logits."""
    n_rows, vocab = logits.shape
    for i in range(n_rows):
        if targets[i] < 0:
            loss[i] = f4(0)
            for v in range(vocab):
                logits[i, v] = f4(0)
            continue
        top = logits[i, 0]
        for v in range(vocab):
            top = max(top, logits[i, v])
        target_logit = logits[i, targets[i]] - top  # read before the row is overwritten
        total = f4(0)
        for v in range(vocab):
            e = exp(logits[i, v] - top)
            logits[i, v] = e
            total += e
        loss[i] = np.log(total) - target_logit
        factor = inv / total
        for v in range(vocab):
            logits[i, v] *= factor
        logits[i, targets[i]] -= inv
