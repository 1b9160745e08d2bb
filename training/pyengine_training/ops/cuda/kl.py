"""Distillation loss: cross-entropy mixed with the KL divergence to a teacher, at temperature tau.

logits, teacher (N, vocab_size); targets (N,) int64, negative = ignored; loss (N,)
p = softmax(logits), p_t = softmax(logits / tau), q_t = softmax(teacher / tau)

forward   loss[i] = (1 - alpha) * CE(logits, target) + alpha * tau^2 * sum q_t (log q_t - log p_t)
backward  dlogits = ((1 - alpha) * (p - onehot) + alpha * tau * (p_t - q_t)) * inv        written over logits

One block for each row; ``inv`` as in cross_entropy.
"""

from __future__ import annotations

import math
from typing import Any

from ._intrinsics import load, store
from ._jit import Array, cuda, f4, i8, kernel, launch_rows
from ._reduce import block_max, block_sum
from ._runtime import flat, number
from .cross_entropy import row_exp_sum, row_max


@kernel
def cross_entropy_kl_kernel(
    loss: Any, logits: Any, teacher: Any, targets: Any, inv: Any, alpha: Any, tau: Any, vocab: int
) -> None:
    """Mixed loss of one row and its gradient over the logits."""
    row = i8(cuda.blockIdx.x)
    target = load(targets, row)
    base = row * vocab
    inv_tau = f4(1) / tau
    top = block_max(row_max(logits, base, vocab))
    top_q = block_max(row_max(teacher, base, vocab))
    target_logit = load(logits, base + max(target, i8(0)))
    z1 = block_sum(row_exp_sum(logits, base, vocab, top, f4(1)))
    log_zt = math.log(block_sum(row_exp_sum(logits, base, vocab, top, inv_tau)))
    log_zq = math.log(block_sum(row_exp_sum(teacher, base, vocab, top_q, inv_tau)))
    unit = load(inv, 0)
    divergence = f4(0)
    v = i8(cuda.threadIdx.x)
    while v < vocab:
        shifted = load(logits, base + v) - top
        log_q = (load(teacher, base + v) - top_q) * inv_tau - log_zq
        log_p = shifted * inv_tau - log_zt
        q = math.exp(log_q)
        divergence += q * (log_q - log_p)
        hard = math.exp(shifted) / z1
        if v == target:
            hard -= f4(1)
        soft = math.exp(log_p) - q
        gradient = unit * ((f4(1) - alpha) * hard + alpha * tau * soft)
        if target < 0:
            gradient = f4(0)
        store(logits, base + v, gradient)
        v += cuda.blockDim.x
    divergence = block_sum(divergence)
    if cuda.threadIdx.x == 0:
        value = (f4(1) - alpha) * (math.log(z1) - (target_logit - top))
        value += alpha * tau * tau * divergence
        if target < 0:
            value = f4(0)
        store(loss, row, value)


def cross_entropy_kl_forward_backward(
    loss: Array,
    logits: Array,
    teacher: Array,
    targets: Array,
    alpha: float,
    tau: float,
    inv: Any,
) -> None:
    """Mixed loss per row, and the gradient written over the logits; the teacher's logits are left alone."""
    n, vocab = logits.shape
    arrays = map(flat, (loss, logits, teacher, targets))
    launch_rows(cross_entropy_kl_kernel, n, vocab, *arrays, number(inv), f4(alpha), f4(tau), vocab)
