"""csrc/FORMAT.md section 10 in float32 NumPy, by the functions of spec_ops.py: what a step's bits are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .spec_f32 import Spec
from .spec_ops import F32, Matrix, matmul, quantize_transformed, rmsnorm, swiglu


class DraftHead:
    """weights: float arrays by the names of section 10 without "extra.", w_gate and w_up apart; matrices are quantized here."""

    def __init__(self, model: Spec, weights: Mapping[str, NDArray[Any]]) -> None:
        self.model = model
        self.eps = model.config["norm_eps"]
        self.matrices = {name: Matrix.quantize(w) for name, w in weights.items() if w.ndim == 2}
        self.vectors = {name: w for name, w in weights.items() if w.ndim == 1}

    def _norm(self, name: str, x: F32) -> F32:
        return rmsnorm(x, self.vectors[f"draft.{name}"].astype(np.float32), self.eps)

    def _linear(self, name: str, x: F32) -> F32:
        return matmul(*quantize_transformed(x), self.matrices[f"draft.{name}"])

    def step(self, states: F32, tokens: ArrayLike) -> tuple[F32, F32]:
        """states (n, dim), tokens (n) -> the next states (n, dim), logits (n, the head's vocab_size)."""
        inputs = [self._norm("token_norm", self.model.embed(tokens)), self._norm("state_norm", states)]
        u = states + self._linear("w_in", np.concatenate(inputs, axis=-1))
        normed = self._norm("mlp_norm", u)
        y = u + self._linear("w_down", swiglu(self._linear("w_gate", normed), self._linear("w_up", normed)))
        return y, self._linear("output", self._norm("output_norm", y))
