"""In which tokens strings may come: judged by looking at every token of a vocabulary."""

from __future__ import annotations

import pytest
from reference.small_tokenizers import byte_level, metaspace, sentencepiece_bpe, unigram

from pyengine.text.sequences import Breakers, Tokens, bad_sequences
from pyengine.text.tokenizer import Tokenizer

LIBRARIES = {"byte_level": byte_level(), "sentencepiece_bpe": sentencepiece_bpe(), "metaspace": metaspace(), "unigram": unigram()}
LOADED = {kind: Tokenizer(library.to_str().encode(), {"bos_token": "<s>"}) for kind, library in LIBRARIES.items()}
STRINGS = ("\n", "e", "é", "th", "the ", "quick brown", " a", "zz|")


def by_looking(tokenizer: Tokenizer, string: str) -> set[Tokens]:
    """Every token that holds the string, and every other one that ends with its beginning, with the tokens of its rest."""
    found: set[Tokens] = set()
    for id_ in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(id_)
        if string.encode() in data:
            found.add((id_,))
            continue
        for n in range(1, len(string)):
            if data.endswith(string[:n].encode()):
                found.add((id_, *tokenizer.encode_inside(string[n:], goes_on=True)))
    return found


@pytest.mark.parametrize("kind", LOADED)
def test_breakers_are_what_looking_at_every_token_finds(kind: str) -> None:
    tokenizer = LOADED[kind]
    breakers = Breakers(tokenizer)
    for string in STRINGS:
        found = breakers.of((string,))
        assert len(found) == len(set(found)) and set(found) == by_looking(tokenizer, string), string
    together = breakers.of(STRINGS)
    assert len(together) == len(set(together)) and set(together) == set().union(*(by_looking(tokenizer, one) for one in STRINGS))
    assert breakers.of(STRINGS) is together and breakers.of(()) == []
    for i in range(20):  # lists are kept, but not without an end
        breakers.of((str(i),))
    assert breakers.of(STRINGS) == together


@pytest.mark.parametrize("kind", LOADED)
def test_bad_words_are_the_words_at_a_beginning_and_behind_a_space(kind: str) -> None:
    tokenizer, library = LOADED[kind], LIBRARIES[kind]
    for word in ("the", " quick", "zebra", "é"):
        plain, spaced = (tuple(library.encode(space + word.strip(), add_special_tokens=False).ids) for space in ("", " "))
        expected = {plain, spaced} if len(plain) == len(spaced) and plain[0] != spaced[0] else {plain}
        assert set(bad_sequences(tokenizer, [word])) == expected
    assert bad_sequences(tokenizer, []) == []
