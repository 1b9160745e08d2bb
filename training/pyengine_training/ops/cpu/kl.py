"""Distillation loss: cross-entropy mixed with the KL divergence to a teacher, at temperature tau.

logits, teacher (N, vocab_size); targets (N,) int64, negative = ignored; loss (N,)
p = softmax(logits), p_t = softmax(logits / tau), q_t = softmax(teacher / tau)

forward   loss[i] = (1 - alpha) * CE(logits, target) + alpha * tau^2 * sum q_t (log q_t - log p_t)
backward  dlogits = ((1 - alpha) * (p - onehot) + alpha * tau * (p_t - q_t)) * inv        written over logits
"""

from __future__ import annotations

import numpy as np

from ._jit import Array, exp, f4, kernel


@kernel
def cross_entropy_kl_forward_backward(
    loss: Array,
    logits: Array,
    teacher: Array,
    targets: Array,
    alpha: float,
    tau: float,
    inv: float,
) -> None:
    """Mixed loss per row, and the gradient written over the logits; the teacher's logits are left alone."""
    n_rows, vocab = logits.shape
    for i in range(n_rows):
        if targets[i] < 0:
            loss[i] = f4(0)
            for v in range(vocab):
                logits[i, v] = f4(0)
            continue
        top = logits[i, 0]
        top_q = teacher[i, 0]
        for v in range(vocab):
            top = max(top, logits[i, v])
            top_q = max(top_q, teacher[i, v])
        z1 = f4(0)  # softmax sums: student at 1, student at tau, teacher at tau
        zt = f4(0)
        zq = f4(0)
        for v in range(vocab):
            z1 += exp(logits[i, v] - top)
            zt += exp((logits[i, v] - top) / tau)
            zq += exp((teacher[i, v] - top_q) / tau)
        log_zt = np.log(zt)
        log_zq = np.log(zq)
        target_loss = np.log(z1) - (logits[i, targets[i]] - top)
        divergence = f4(0)
        for v in range(vocab):
            shifted = logits[i, v] - top
            log_q = (teacher[i, v] - top_q) / tau - log_zq
            log_p = shifted / tau - log_zt
            q = exp(log_q)
            divergence += q * (log_q - log_p)
            hard = exp(shifted) / z1
            soft = exp(log_p) - q
            logits[i, v] = inv * ((f4(1) - alpha) * hard + alpha * tau * soft)
        logits[i, targets[i]] -= inv * (f4(1) - alpha)
        loss[i] = (f4(1) - alpha) * target_loss + alpha * tau * tau * divergence
