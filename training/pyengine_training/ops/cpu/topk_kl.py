"""Distillation loss from a cached teacher: cross-entropy mixed with the KL divergence over the teacher's k likeliest tokens
and the rest of the vocabulary taken together, at temperature tau.

logits (N, vocab_size); ids (N, k): the teacher's k tokens; probs (N, k + 1): their probabilities and the rest's, as stored
(normalized here); targets (N,) int64, negative = ignored; loss (N,)
p = softmax(logits), p_t = softmax(logits / tau), q = probs / sum(probs), p_t(rest) = sum of p_t over tokens not in ids

forward   KL = sum over ids of q (log q - log p_t) + q(rest) (log q(rest) - log p_t(rest))
          loss[i] = (1 - alpha) * CE(logits, target) + alpha * tau^2 * KL
backward  dlogits = ((1 - alpha) * (p - onehot) + alpha * tau * d) * inv                   written over logits
          d = p_t - q for a token of ids, p_t - p_t * q(rest) / p_t(rest) for another one

With k = vocab_size it is the loss of :mod:`.kl`; with less it never exceeds that: tokens taken together tell less apart.
"""

from __future__ import annotations

import numpy as np

from ._jit import Array, exp, f4, kernel

TINY = f4(1e-30)


@kernel
def cross_entropy_topk_forward_backward(
    loss: Array, logits: Array, ids: Array, probs: Array, targets: Array, alpha: float, tau: float, inv: float
) -> None:
    """Mixed loss per row, and the gradient written over the logits."""
    n_rows, vocab = logits.shape
    k = ids.shape[1]
    outside = np.ones(vocab, logits.dtype)  # 1 for the tokens that are taken together
    for i in range(n_rows):
        if targets[i] < 0:
            loss[i] = f4(0)
            for v in range(vocab):
                logits[i, v] = f4(0)
            continue
        mass = f4(0)
        for j in range(k):
            outside[ids[i, j]] = f4(0)
            mass += probs[i, j]
        mass += probs[i, k]
        top = logits[i, 0]
        for v in range(vocab):
            top = max(top, logits[i, v])
        z1 = f4(0)  # softmax sums: at 1, at tau, at tau outside
        zt = f4(0)
        zr = f4(0)
        for v in range(vocab):
            e = exp((logits[i, v] - top) / tau)
            z1 += exp(logits[i, v] - top)
            zt += e
            zr += e * outside[v]
        log_zt = np.log(zt)
        target_loss = np.log(z1) - (logits[i, targets[i]] - top)
        rest = probs[i, k] / mass
        divergence = f4(0)
        if rest > f4(0):
            divergence = rest * (np.log(rest) - np.log(max(zr, TINY)) + log_zt)
        for j in range(k):
            q = probs[i, j] / mass
            if q > f4(0):
                divergence += q * (np.log(q) - (logits[i, ids[i, j]] - top) / tau + log_zt)
        share = f4(1) - rest * zt / max(zr, TINY)  # of p_t, outside
        loss[i] = (f4(1) - alpha) * target_loss + alpha * tau * tau * divergence
        soft, hard = alpha * tau * inv, (f4(1) - alpha) * inv
        for v in range(vocab):
            shifted = logits[i, v] - top
            p = exp(shifted / tau) / zt
            keep = f4(1) + outside[v] * (share - f4(1))
            logits[i, v] = hard * exp(shifted) / z1 + soft * p * keep
        for j in range(k):
            logits[i, ids[i, j]] -= soft * probs[i, j] / mass
            outside[ids[i, j]] = f4(1)
        logits[i, targets[i]] -= hard
