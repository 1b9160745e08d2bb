"""In which tokens strings may come: judged by looking at every token of a vocabulary."""

from __future__ import annotations

import pytest
from reference.small_tokenizers import byte_level, metaspace, sentencepiece_bpe, unigram

from pyengine.errors import InvalidArgumentError
from pyengine.text import sequences
from pyengine.text.sequences import Breakers, Tokens, bad_sequences
from pyengine.text.tokenizer import Tokenizer

LIBRARIES = {"byte_level": byte_level(), "sentencepiece_bpe": sentencepiece_bpe(), "metaspace": metaspace(), "unigram": unigram()}
LOADED = {kind: Tokenizer(library.to_str().encode(), {"bos_token": "<s>"}) for kind, library in LIBRARIES.items()}
STRINGS = ("\n", "e", "é", "th", "the ", "quick brown", " a", "zz|", "\U0001f642", "\u65e5\u672c:")


def by_looking(tokenizer: Tokenizer, string: str) -> set[Tokens]:
    """Every token that holds the string, and every other one that ends with its beginning, with the tokens of its rest; and the
    string as it stands at a beginning and behind a space, cut where it begins."""
    found: set[Tokens] = set()
    for id_ in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(id_)
        if string.encode() in data:
            found.add((id_,))
            continue
        for n in range(1, len(string)):
            if data.endswith(string[:n].encode()):
                found.add((id_, *tokenizer.encode_inside(string[n:], goes_on=True)))
    for before in ("", " "):
        ids = tokenizer.encode_inside(before + string, goes_on=True)
        rests = [ids[k:] for k in range(len(ids)) if string.encode() in b"".join(map(tokenizer.token_bytes, ids[k:]))]
        found.add(tuple(rests[-1]))
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
def test_a_breaker_whose_characters_are_several_tokens(kind: str) -> None:
    """As an emoji is, and most of a script that a vocabulary was not made of."""
    tokenizer = LOADED[kind]
    for string in ("\U0001f642", "\u65e5\u672c:"):
        found = Breakers(tokenizer).of((string,))
        for text in (string, "the " + string, "the" + string):
            ids = tuple(tokenizer.encode(text, add_bos=False))
            assert any(ids[-len(one) :] == one for one in found), (text, ids, found)


def test_breakers_that_may_come_in_too_many_ways_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """And single tokens are never too many: a vocabulary has an end."""
    breakers = Breakers(LOADED["byte_level"])
    n_ids = sum(len(one) for one in breakers.of(("quick brown",)) if len(one) > 1)
    n_single = len(breakers.of(("e",)))
    assert n_ids > 0 and n_single > 9
    for most in (n_ids, n_ids - 1, 0):
        monkeypatch.setattr(sequences, "MAX_BREAKER_IDS", most)
        other = Breakers(LOADED["byte_level"])
        assert len(other.of(("e",))) == n_single
        if most == n_ids:
            assert other.of(("quick brown", "quick brown")) == breakers.of(("quick brown",))  # doubles count once
            continue
        for _ in range(2):
            with pytest.raises(InvalidArgumentError, match=r"^dry_sequence_breakers may come in too many ways"):
                other.of(("quick brown",))


@pytest.mark.parametrize("kind", LOADED)
def test_bad_words_are_the_words_at_a_beginning_and_behind_a_space(kind: str) -> None:
    tokenizer, library = LOADED[kind], LIBRARIES[kind]
    for word in ("the", " quick", "zebra", "é"):
        plain, spaced = (tuple(library.encode(space + word.strip(), add_special_tokens=False).ids) for space in ("", " "))
        expected = {plain, spaced} if len(plain) == len(spaced) and plain[0] != spaced[0] else {plain}
        assert set(bad_sequences(tokenizer, [word])) == expected
    assert bad_sequences(tokenizer, []) == []
