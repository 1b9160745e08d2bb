"""Token healing: the end of a prompt is taken back and said again.

A text that is cut anywhere ends in tokens that a tokenizer, had it seen the rest, might not have chosen: behind the token ":" a
model has rarely seen "//", since "://" is one token, and so "http:" goes on badly. So the last tokens are taken from the prompt,
as many as a longer token begins with, and the output begins with tokens that spell them again and may go beyond. Its text begins
behind what was taken.

All is done in bytes: a token may begin or end inside a character.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from pyengine import fork

if TYPE_CHECKING:
    from pyengine.text.infill import Infill
    from pyengine.text.tokenizer import Tokenizer

MAX_TAKEN = 128  # bytes; the longest tokens are runs of spaces and dashes


class Cut(NamedTuple):
    """A prompt without the end that is said again.

    ids      its token ids
    taken    the bytes of what was taken
    can_end  [n]: whether tokens can say taken[n:], the last of which may go beyond
    """

    ids: list[int]
    taken: bytes = b""
    can_end: Sequence[bool] = (True,)


class Healer:
    """Of one model; any thread may use it. It keeps the vocabulary in the order of its bytes, 4 bytes a token; the bytes
    themselves are kept by the tokenizer.

    tokenizer, vocab_size  the model's
    infill                 how it fills holes, None if it does not
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, infill: Infill | None) -> None:
        with fork.importing:
            import numpy  # noqa: F401  # for `mask`, during which everybody waits

        self._bytes = tokenizer.token_bytes
        self._vocab_size = vocab_size
        self._infill = infill
        self._never = tokenizer.special_ids.union(tokenizer.eos_ids, () if infill is None else infill.end_ids)
        known = range(min(vocab_size, tokenizer.vocab_size))
        self._order = array("i", sorted((id_ for id_ in known if self._bytes(id_) and id_ not in self._never), key=self._bytes))

    def cut(self, ids: list[int]) -> Cut:
        """The prompt to compute in place of `ids`: without the longest end, of whole tokens, that a longer token begins with; as
        it is if there is none. Of a prompt around a hole it is the end of what stands in front of the hole. The first token
        stays."""
        end = len(ids) if self._infill is None else self._infill.prefix_end(ids)
        taken, best = b"", (end, b"")
        for begin in range(end - 1, 0, -1):
            if ids[begin] in self._never or not self._bytes(ids[begin]):
                break
            taken = self._bytes(ids[begin]) + taken
            if len(taken) > MAX_TAKEN:
                break
            first, last = self._beginning_with(taken)
            if last - first > len(self._equal(taken)):
                best = begin, taken
        begin, taken = best
        return Cut([*ids[:begin], *ids[end:]], taken, self._can_end(taken)) if taken else Cut(ids)

    def mask(self, left: bytes, can_end: Sequence[bool]) -> array[int]:
        """Which tokens may come where `left` is still to be said, as of a grammar (`run/guide.py`): those that begin with it, and
        those that it begins with where others can say the rest. can_end: of `left`, as in a Cut."""
        import numpy as np

        first, last = self._beginning_with(left)
        flags = np.zeros((self._vocab_size + 31) // 32 * 32, dtype=bool)
        flags[np.frombuffer(self._order, dtype=np.int32)[first:last]] = True
        for n in range(1, len(left)):
            if can_end[n]:
                flags[self._equal(left[:n])] = True
        words = np.packbits(flags, bitorder="little").view("<u4").astype(np.uint32)
        return array("I", words.tobytes())

    def said(self, token: int) -> int:
        """How many bytes a token says."""
        return len(self._bytes(token))

    def _can_end(self, taken: bytes) -> list[bool]:
        out = [True] * (len(taken) + 1)
        for n in range(len(taken) - 1, -1, -1):
            rest = taken[n:]
            first, last = self._beginning_with(rest)
            out[n] = last > first or any(out[n + k] and self._equal(rest[:k]) for k in range(1, len(rest)))
        return out

    def _beginning_with(self, text: bytes) -> tuple[int, int]:
        """Where the tokens stand in the order whose bytes begin with a text."""
        first = bisect_left(self._order, text, key=self._bytes)
        beyond = text.rstrip(b"\xff")
        if not beyond:
            return first, len(self._order)
        beyond = beyond[:-1] + bytes((beyond[-1] + 1,))  # the first text behind all that begin with this one
        return first, bisect_left(self._order, beyond, lo=first, key=self._bytes)

    def _equal(self, text: bytes) -> array[int]:
        """The tokens of just these bytes: there may be several."""
        first = bisect_left(self._order, text, key=self._bytes)
        return self._order[first : bisect_right(self._order, text, lo=first, key=self._bytes)]


class Healing:
    """Of one output that is to say again what was taken from its prompt, n_bytes. Everything here follows from the outputs."""

    def __init__(self, healer: Healer, cut: Cut) -> None:
        self._healer = healer
        self._cut = cut
        self.n_bytes = len(cut.taken)
        self._is_over = not cut.taken

    def is_over(self, outputs: Sequence[int]) -> bool:
        """Whether `outputs` have said it all."""
        self._is_over = self._is_over or self._n_said(outputs) >= self.n_bytes
        return self._is_over

    def mask(self, outputs: Sequence[int]) -> array[int] | None:
        """Which tokens may follow `outputs`; None = all."""
        if self.is_over(outputs):
            return None
        n = self._n_said(outputs)
        return self._healer.mask(self._cut.taken[n:], self._cut.can_end[n:])

    def _n_said(self, outputs: Sequence[int]) -> int:
        return sum(map(self._healer.said, outputs))
