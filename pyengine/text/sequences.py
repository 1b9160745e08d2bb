"""Strings that sampling is told of, as the sequences of tokens that they may be in a text."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from pyengine.errors import InvalidArgumentError
from pyengine.text.tokenizer import Tokenizer

Tokens = tuple[int, ...]
MAX_KEPT = 8  # lists of breakers
MAX_BREAKER_IDS = 1 << 18  # of a list, in sequences of several tokens: some 15 MB, a second of work
_BETWEEN = "\u0100"  # two tokens; bytes are the characters below


def bad_sequences(tokenizer: Tokenizer, words: Sequence[str]) -> list[Tokens]:
    """Each word as the tokenizer writes it at the beginning of a text and, where that is as many tokens with another one first,
    behind a space: vLLM's rule, by which the second begins with a token of its own and not with a space before the first."""
    found: dict[Tokens, None] = {}
    for word in words:
        plain, spaced = (tuple(tokenizer.encode(space + word.lstrip(), add_bos=False)) for space in ("", " "))
        if plain:  # a tokenizer may drop what it does not know
            found[plain] = None
        if plain and len(spaced) == len(plain) and spaced[0] != plain[0]:
            found[spaced] = None
    return list(found)


class Breakers:
    """The sequences in which strings may come: a token that holds all of one; a token that ends with its first characters and
    then the tokens of the others, as the tokenizer writes them; and the whole as it writes it at a beginning and behind a space:
    a character may be several tokens. May be asked from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        texts = [tokenizer.token_bytes(id_).decode("latin-1") for id_ in range(tokenizer.vocab_size)]
        self._vocabulary = _BETWEEN + _BETWEEN.join(texts) + _BETWEEN
        self._starts = list(accumulate((len(text) + 1 for text in texts), initial=1))  # of each token, and behind the last
        self._known: dict[tuple[str, ...], list[Tokens]] = {}

    def of(self, strings: tuple[str, ...]) -> list[Tokens]:
        """Without doubles. Raises InvalidArgumentError if they are too many."""
        found = self._known.get(strings)
        if found is None:
            found = self._of_all(strings)
            if len(self._known) >= MAX_KEPT:
                self._known = {}
            self._known[strings] = found
        return found

    def _of_all(self, strings: tuple[str, ...]) -> list[Tokens]:
        found: dict[Tokens, None] = {}
        n_left = MAX_BREAKER_IDS
        for sequence in (one for string in strings for one in self._of_string(string)):
            if sequence not in found and len(sequence) > 1:
                n_left -= len(sequence)
            if n_left < 0:
                raise InvalidArgumentError(
                    f"dry_sequence_breakers may come in too many ways: sequences of more than {MAX_BREAKER_IDS} tokens in all"
                )
            found[sequence] = None
        return list(found)

    def _of_string(self, string: str) -> Iterator[Tokens]:
        alone = set(self._ids_with(string))
        yield from ((id_,) for id_ in sorted(alone))
        for n in range(1, len(string)):
            heads = [id_ for id_ in self._ids_with(string[:n], _BETWEEN) if id_ not in alone]
            rest = self._tokenizer.encode_inside(string[n:], goes_on=True) if heads else ()
            yield from ((id_, *rest) for id_ in heads)
        yield from filter(None, (self._written_behind(before, string) for before in ("", " ")))

    def _written_behind(self, before: str, string: str) -> Tokens:
        """What the tokenizer writes behind `before`, from the token on in which `string` begins; nothing of another text."""
        ids = self._tokenizer.encode_inside(before + string, goes_on=True)
        parts = [self._tokenizer.token_bytes(id_) for id_ in ids]
        if b"".join(parts) != (before + string).encode("utf-8", "surrogatepass"):
            return ()
        ends = accumulate(map(len, parts))  # `before` is one byte, or none
        return tuple(id_ for id_, end in zip(ids, ends, strict=True) if end > len(before))

    def _ids_with(self, text: str, end: str = "") -> Iterator[int]:
        """Tokens that hold a text; with end=_BETWEEN those that end with it."""
        part = text.encode("utf-8", "surrogatepass").decode("latin-1") + end
        at = self._vocabulary.find(part)
        while at >= 0:
            id_ = bisect_right(self._starts, at) - 1
            yield id_
            at = self._vocabulary.find(part, self._starts[id_ + 1] - 1)
