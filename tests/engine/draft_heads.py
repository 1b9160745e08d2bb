"""Draft heads for tests: tensors as `attach_draft` takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.format.draft_head import attach_draft
from pyengine.format.reader import FrozenFile

Tensors = dict[str, npt.NDArray[Any]]


def random_head(dim: int, vocab_size: int, *, hidden_dim: int = 24, n_tokens: int = 40, seed: int = 0) -> Tensors:
    """A head that knows n_tokens of vocab_size tokens and guesses anything."""
    rng = np.random.default_rng(seed)

    def matrix(*shape: int) -> npt.NDArray[np.float32]:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    norms = {f"draft.{name}_norm": rng.uniform(0.5, 1.5, dim).astype(np.float32) for name in ("token", "state", "mlp", "output")}
    return norms | {
        "draft.w_in": matrix(dim, 2 * dim),
        "draft.w_gate": matrix(hidden_dim, dim),
        "draft.w_up": matrix(hidden_dim, dim),
        "draft.w_down": matrix(dim, hidden_dim),
        "draft.output": matrix(n_tokens, dim) * np.float32(4),
        "draft.vocab": np.sort(rng.permutation(vocab_size)[:n_tokens]).astype(np.int32),
    }


def with_random_head(model: Path, output: Path, **options: Any) -> Path:
    """`model` once more, with a random head."""
    with FrozenFile.open(model) as frozen:
        dim, vocab_size = frozen.config.dim, frozen.config.vocab_size
    options = {"n_tokens": max(1, vocab_size * 3 // 4), **options}
    return attach_draft(model, output, random_head(dim, vocab_size, **options))
