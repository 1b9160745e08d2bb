"""The last finished sequences and their tokens, so that a prompt that continues one of them is not computed again.

A hit changes no byte of the output: keys and values do not depend on how they were computed (csrc/FORMAT.md section 9).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

CAPACITY = 8
# Sharing less than this is not worth the copy of a page that a fork makes at its first token.
MIN_SHARED = 16


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading ids that a and b share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


class PrefixCache:
    """Owns the sequences that are put into it. Used under the engine's lock."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._entries: list[tuple[list[int], int]] = []  # (tokens in the KV cache, sequence), oldest first

    def take(self, prompt: Sequence[int]) -> tuple[int, int]:
        """A sequence that already holds the first n tokens of `prompt`, and n < len(prompt): the last one must be computed,
        for its logits. The caller owns the sequence."""
        best, n_shared = -1, 0
        for index, (tokens, _) in enumerate(self._entries):
            n = common_prefix(tokens, prompt[:-1])
            if n > n_shared:
                best, n_shared = index, n
        if best < 0:
            return self._context.sequence_new(), 0
        tokens, sequence = self._entries[best]
        if n_shared == len(tokens):  # a continuation, such as the next turn of a chat
            del self._entries[best]
            return sequence, n_shared
        if n_shared < MIN_SHARED:
            return self._context.sequence_new(), 0
        return self._context.sequence_fork(sequence, n_shared), n_shared

    def put(self, tokens: list[int], sequence: int) -> None:
        """Hand over a sequence that holds `tokens`; the oldest one makes room."""
        if not tokens:
            self._context.sequence_drop(sequence)
            return
        self._entries.append((tokens, sequence))
        if len(self._entries) > CAPACITY:
            _, oldest = self._entries.pop(0)
            self._context.sequence_drop(oldest)

    def clear(self) -> bool:
        """Drop everything; whether there was anything."""
        had_entries = bool(self._entries)
        for _, sequence in self._entries:
            self._context.sequence_drop(sequence)
        self._entries.clear()
        return had_entries
