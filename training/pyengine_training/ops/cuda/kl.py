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

from numba import float32

from ._intrinsics import load, store
from ._jit import Array, cuda, f4, i8, kernel, launch_rows
from ._reduce import block_max, block_sum
from ._runtime import flat, number
from ._vectors import WIDTH, aligned, pieces, read, write
from .cross_entropy import THREADS, row_statistics


@kernel
def cross_entropy_kl_kernel(
    loss: Any, logits: Any, teacher: Any, targets: Any, inv: Any, alpha: Any, tau: Any, vocab: int, whole: bool
) -> None:
    """Mixed loss of one row and its gradient over the logits."""
    row = i8(cuda.blockIdx.x)
    target = load(targets, row)
    base = row * vocab
    inv_tau = f4(1) / tau
    own_top, own_z1 = row_statistics(logits, base, vocab, f4(1), whole)
    _, own_zt = row_statistics(logits, base, vocab, inv_tau, whole)
    own_top_q, own_zq = row_statistics(teacher, base, vocab, inv_tau, whole)
    target_logit = load(logits, base + max(target, i8(0)))
    top = block_max(own_top)
    top_q = block_max(own_top_q)
    z1 = block_sum(own_z1 * math.exp(own_top - top))
    log_zt = math.log(block_sum(own_zt * math.exp((own_top - top) * inv_tau)))
    log_zq = math.log(block_sum(own_zq * math.exp((own_top_q - top_q) * inv_tau)))
    unit = load(inv, 0)
    divergence = f4(0)
    x = cuda.local.array(WIDTH, float32)
    y = cuda.local.array(WIDTH, float32)
    v = i8(cuda.threadIdx.x) * WIDTH
    while v < vocab:
        read(x, logits, base + v, base + vocab, whole)
        read(y, teacher, base + v, base + vocab, whole)
        for e in range(WIDTH):
            shifted = x[e] - top
            log_q = (y[e] - top_q) * inv_tau - log_zq
            log_p = shifted * inv_tau - log_zt
            q = math.exp(log_q)
            if v + e < vocab:
                divergence += q * (log_q - log_p)
            hard = math.exp(shifted) / z1
            if v + e == target:
                hard -= f4(1)
            soft = math.exp(log_p) - q
            x[e] = unit * ((f4(1) - alpha) * hard + alpha * tau * soft)
            if target < 0:
                x[e] = f4(0)
        write(logits, base + v, base + vocab, x, whole)
        v += cuda.blockDim.x * WIDTH
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
    whole = aligned(logits, teacher, width=vocab)
    constants = number(inv), f4(alpha), f4(tau)
    launch_rows(cross_entropy_kl_kernel, n, pieces(vocab), *arrays, *constants, vocab, whole, most=THREADS // 2)
