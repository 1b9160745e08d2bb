"""A model that says what a test wants: the engine computes and samples as ever, among one token at a time."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import pytest

from pyengine import Engine


class Script:
    """A guide (run/guide.py) that allows the tokens of a text, one after the other, and its end after the last."""

    def __init__(self, tokens: Sequence[int], end_id: int, vocab_size: int) -> None:
        self._tokens = [*tokens, end_id]
        self._n_words = (vocab_size + 31) // 32

    def _next(self, n_outputs: int) -> int:
        return self._tokens[min(n_outputs, len(self._tokens) - 1)]

    def masks(self, outputs: Sequence[int], draft: Sequence[int] = ()) -> list[array[int]]:
        masks = [array("I", bytes(4 * self._n_words)) for _ in range(1 + len(draft))]
        for i, mask in enumerate(masks):
            token = self._next(len(outputs) + i)
            mask[token // 32] = 1 << token % 32
        return masks

    def forced(self, outputs: Sequence[int]) -> tuple[int, ...]:
        return ()

    def allowed(self, outputs: Sequence[int], draft: Sequence[int]) -> tuple[int, ...]:
        n = 0
        while n < len(draft) and draft[n] == self._next(len(outputs) + n):
            n += 1
        return tuple(draft[:n])


def scripted(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Every answer is `text`, whose special tokens are such."""
    plain = Engine.requests

    def requests(self: Engine, *args: Any, **options: Any) -> Any:
        out = plain(self, *args, **options)
        tokens = self.tokenize(text, add_bos=False, parse_special=True)
        for request in out:
            request.guide = Script(tokens, self.eos_token_ids[0], self.vocab_size)  # type: ignore[assignment]
        return out

    monkeypatch.setattr(Engine, "requests", requests)
