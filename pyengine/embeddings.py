"""Embeddings: one vector of a text, pooled from the final hidden states of its tokens (after the last norm).

The engine's hidden states are the same in any batch and any chunking, and they are pooled in the order of their
positions; so a text's vector is the same, too, whatever is computed beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyengine.arguments import shown
from pyengine.errors import InvalidArgumentError, ModelFormatError

if TYPE_CHECKING:
    import numpy.typing as npt

POOLINGS = ("mean", "last")


def chosen_pooling(pooling: object, extra: Mapping[str, Any]) -> str:
    """How to pool: as the caller says, else the model's file (`extra` of its config.json), else by the last token, the one that
    has seen all others. Raises InvalidArgumentError."""
    if pooling is None:
        known = extra.get("pooling")
        return known if isinstance(known, str) and known in POOLINGS else "last"
    if not isinstance(pooling, str) or pooling not in POOLINGS:
        raise InvalidArgumentError(f"pooling is 'mean' or 'last', not {shown(pooling)}")
    return pooling


def known_prompts(extra: Mapping[str, Any]) -> Mapping[str, str]:
    """The prompts in the model's file (`extra` of its config.json), by name. Raises ModelFormatError."""
    prompts = extra.get("prompts", {})
    if not isinstance(prompts, Mapping) or not all(isinstance(text, str) for text in prompts.values()):
        raise ModelFormatError(f"config: extra.prompts must be an object of texts, not {shown(prompts)}")
    return prompts


def chosen_prompt(name: object, extra: Mapping[str, Any]) -> str:
    """What is put before a text: the prompt of that name in the model's file (`extra` of its config.json); None = its default
    prompt, mostly nothing; "" = nothing. Raises InvalidArgumentError, with the names that there are, ModelFormatError."""
    prompts = known_prompts(extra)
    if name is None:
        default = extra.get("default_prompt")
        return prompts.get(default, "") if isinstance(default, str) else ""
    if name == "":
        return ""
    if not isinstance(name, str) or name not in prompts:
        known = ", ".join(map(shown, prompts)) or "none"
        raise InvalidArgumentError(f"the model's file has no prompt {shown(name)}; its prompts are: {known}")
    return prompts[name]


class Pooled:
    """A text's vector in the making.

    tokens     of the text
    positions  whose hidden states are wanted, ascending
    n_unread   first tokens that are no part of a mean (as long as any is left)
    """

    def __init__(self, tokens: list[int], pooling: str, dim: int, n_unread: int = 0) -> None:
        self.tokens = tokens
        last = len(tokens) - 1
        self.positions = list(range(min(n_unread, last), len(tokens))) if pooling == "mean" else [last]
        # The sum of the first so many positions' states. Replaced in one operation: a row may come again after an exception.
        self._summed: tuple[int, npt.NDArray[np.float64]] = (0, np.zeros(dim, np.float64))

    def take(self, position: int, hidden: memoryview) -> None:
        """The hidden state (dim) at one of the positions."""
        n, total = self._summed
        if position == self.positions[n]:
            self._summed = (n + 1, total + np.asarray(hidden))

    def vector(self) -> npt.NDArray[np.float64]:
        """(dim), once every position's state has been taken."""
        n, total = self._summed
        return total / n


def vectors(pooled: Sequence[Pooled], *, normalize: bool, dimensions: int | None = None) -> npt.NDArray[np.float32]:
    """(len(pooled), dim), or of the first `dimensions` values only; `normalize`: of length 1, but for a vector of zeros."""
    rows = np.stack([one.vector() for one in pooled])[:, :dimensions]
    if normalize:
        lengths = np.sqrt(np.sum(rows * rows, axis=1, keepdims=True))
        rows = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    return rows.astype(np.float32)
