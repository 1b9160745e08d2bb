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


def with_random_head(model: Path, output: Path, *, overwrite: bool = False, **options: Any) -> Path:
    """`model` once more, with a random head."""
    with FrozenFile.open(model) as frozen:
        dim, vocab_size = frozen.config.dim, frozen.config.vocab_size
    options = {"n_tokens": max(1, vocab_size * 3 // 4), **options}
    return attach_draft(model, output, random_head(dim, vocab_size, **options), overwrite=overwrite)


STEP = 7  # what a bigram model's likeliest token is after token w: w + STEP


def bigram_model(directory: Path) -> Path:
    """A model whose next token depends on the last one alone, w -> w + STEP with a chance of about 0.6, and a head that knows
    it: its state is always the last token's normed embedding, as the model's hidden state is."""
    from engine.freeze_models import LLAMA, VOCAB, random_tensors, write_hf

    from pyengine.freeze import freeze

    tensors = random_tensors(LLAMA, seed=1)
    dim = LLAMA["hidden_size"]
    for name, values in tensors.items():
        if "norm" in name:
            values[:] = 1
        elif "o_proj" in name or "down_proj" in name:
            values[:] = 0
    tensors["lm_head.weight"] = np.roll(tensors["model.embed_tokens.weight"], STEP, axis=0) * np.float32(0.1)
    head = random_head(dim, VOCAB, n_tokens=VOCAB)
    head |= {name: np.ones(dim, np.float32) for name in head if name.endswith("_norm")}
    head["draft.w_in"] = np.concatenate([np.eye(dim), -np.eye(dim)], axis=1).astype(np.float32)
    head["draft.w_down"][:] = 0
    head["draft.output"] = tensors["lm_head.weight"]
    plain = freeze(write_hf(directory / "hf", LLAMA, tensors), directory / "plain.safetensors")
    return attach_draft(plain, directory / "headed.safetensors", head)
