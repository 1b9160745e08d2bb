"""Direct preference optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7).

A row has a chosen answer and behind it a rejected one, each after its own copy of the prompt and blind to the other.
nll (rows, T): -log p of each target, 0 where none counts;  targets, starts (rows, T) int64: starts is 0 in the chosen half
reference (rows, 2) float64: the answers' log-probabilities by the model before, chosen and rejected
loss (rows,);  weights (rows, T): what the gradient of each target's nll is multiplied with

forward   w = sum of log p over the chosen answer, l = over the rejected one
          z = beta * ((w - reference_w) - (l - reference_l));  loss = -log sigmoid(z) = log(1 + exp(-z))
backward  dloss / dw = -beta * sigmoid(-z), dloss / dl = +beta * sigmoid(-z); so a target of the chosen answer is learnt with
          the weight beta * sigmoid(-z), one of the rejected answer with its negative                        written with =
"""

from __future__ import annotations

import numpy as np

from ._jit import Array


def dpo_margins(nll: Array, targets: Array, starts: Array, reference: Array) -> Array:
    """(rows,) float64: (w - reference_w) - (l - reference_l)."""
    counted, rejected = targets >= 0, starts > 0
    chosen_sum = -np.where(counted & ~rejected, nll, 0).sum(axis=1, dtype=np.float64)
    rejected_sum = -np.where(counted & rejected, nll, 0).sum(axis=1, dtype=np.float64)
    margins: Array = (chosen_sum - reference[:, 0]) - (rejected_sum - reference[:, 1])
    return margins


def dpo_forward_backward(
    loss: Array, weights: Array, nll: Array, targets: Array, starts: Array, reference: Array, beta: float
) -> None:
    """Loss of each row, and the weight of each target's gradient."""
    z = beta * dpo_margins(nll, targets, starts, reference)
    loss[...] = np.logaddexp(0, -z)
    pull = beta * np.exp(-np.logaddexp(0, z))  # beta * sigmoid(-z)
    weights[...] = np.where(targets >= 0, np.where(starts > 0, -pull[:, None], pull[:, None]), 0)
