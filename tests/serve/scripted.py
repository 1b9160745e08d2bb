"""A model that says what a test wants: the engine computes and samples as ever, among one token at a time."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import pytest

from pyengine import Engine


class Script:
    """A guide (run/guide.py) that allows the next token of a text, and its end after the last."""

    def __init__(self, tokens: Sequence[int], end_id: int, vocab_size: int) -> None:
        self._tokens = [*tokens, end_id]
        self._mask = array("I", bytes(4 * ((vocab_size + 31) // 32)))

    def mask(self, outputs: Sequence[int]) -> array[int]:
        token = self._tokens[min(len(outputs), len(self._tokens) - 1)]
        for i in range(len(self._mask)):
            self._mask[i] = 0
        self._mask[token // 32] = 1 << token % 32
        return self._mask


def scripted(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Every answer is `text`, whose special tokens are such."""
    plain = Engine.requests

    def requests(self: Engine, *args: Any, **options: Any) -> Any:
        out = plain(self, *args, **options)
        tokens = self.tokenize(text, add_bos=False, parse_special=True)
        for request in out:
            request.guide = Script(tokens, self.eos_token_ids[0], self.vocab_size)  # type: ignore[assignment]
            request.may_draft = False
        return out

    monkeypatch.setattr(Engine, "requests", requests)
