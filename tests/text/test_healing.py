"""Token healing: what is taken from a prompt, and which tokens may say it again, against the definitions by brute force."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pyengine.format.reader import FrozenFile
from pyengine.opening import DEFAULT_MODEL
from pyengine.text.healing import MAX_TAKEN, Healer, Healing
from pyengine.text.tokenizer import Tokenizer


class Vocabulary:
    """Only what a healer asks of a tokenizer."""

    def __init__(self, tokens: list[bytes], special: frozenset[int], ends: tuple[int, ...]) -> None:
        self.tokens, self.special_ids, self.eos_ids, self.vocab_size = tokens, special, ends, len(tokens)

    def token_bytes(self, token: int) -> bytes:
        return self.tokens[token]


def healer_of(*tokens: bytes, special: frozenset[int] = frozenset(), ends: tuple[int, ...] = ()) -> Healer:
    vocabulary: Any = Vocabulary(list(tokens), special, ends)
    return Healer(vocabulary, len(tokens) + 5, None)  # a model may have more ids than its tokenizer


def allowed(mask: Any) -> set[int]:
    return {32 * i + bit for i, word in enumerate(mask) for bit in range(32) if word >> bit & 1}


def can_say(tokens: list[bytes], text: bytes) -> bool:
    return not text or any(
        token.startswith(text) or (text.startswith(token) and can_say(tokens, text[len(token) :])) for token in tokens
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    with FrozenFile.open(DEFAULT_MODEL) as file:
        return Tokenizer(file.attachment("tokenizer.json") or b"")


def test_of_a_real_vocabulary(tokenizer: Tokenizer) -> None:
    """Every break of a text: inside words, numbers and characters of several bytes."""
    healer = Healer(tokenizer, tokenizer.vocab_size, None)
    known = [id_ for id_ in range(tokenizer.vocab_size) if id_ not in tokenizer.special_ids]
    tokens = [tokenizer.token_bytes(id_) for id_ in known]
    text = 'Once upon a time, there were 12,345 rabbits in "the  house": caf\u00e9 \U0001f600\n\n    return'
    for end in range(1, len(text) + 1):
        ids = tokenizer.encode(text[:end], add_bos=False)
        ends = [b"".join(map(tokenizer.token_bytes, ids[begin:])) for begin in range(1, len(ids))]
        wanted = next((one for one in ends if any(token != one and token.startswith(one) for token in tokens)), b"")
        cut = healer.cut(ids)
        assert cut.taken == wanted
        assert b"".join(map(tokenizer.token_bytes, cut.ids)) + wanted == text[:end].encode()
        if wanted:
            assert allowed(Healing(healer, cut).mask([])) == {
                id_
                for id_, token in zip(known, tokens, strict=True)
                if token.startswith(wanted) or (wanted.startswith(token) and can_say(tokens, wanted[len(token) :]))
            }


def test_of_random_vocabularies() -> None:
    """Small ones, which lack bytes: whatever is allowed, the text can be said to its end."""
    rng = random.Random(3)
    for _ in range(300):
        tokens = [bytes(rng.choices(b"ab\xff", k=rng.randint(1, 4))) for _ in range(rng.randint(2, 8))]
        healer = healer_of(*tokens)
        cut = healer.cut(ids := [rng.randrange(len(tokens)) for _ in range(6)])
        ends = [b"".join(tokens[id_] for id_ in ids[begin:]) for begin in range(1, 6)]
        assert cut.taken == next((one for one in ends if any(token != one and token.startswith(one) for token in tokens)), b"")
        healing, said = Healing(healer, cut), []
        while (mask := healing.mask(said)) is not None:
            left = cut.taken[len(b"".join(tokens[id_] for id_ in said)) :]
            choices = allowed(mask)
            assert choices == {
                id_
                for id_, token in enumerate(tokens)
                if token.startswith(left) or (left.startswith(token) and can_say(tokens, left[len(token) :]))
            }
            said.append(rng.choice(sorted(choices)))
        assert b"".join(tokens[id_] for id_ in said).startswith(cut.taken)


def test_what_is_not_taken() -> None:
    healer = healer_of(b"a", b"ab", b"<a>", b"<", b"", special=frozenset((2,)))
    assert healer.cut([1, 0])[:2] == ([1], b"a")
    assert healer.cut([0])[:2] == ([0], b"")  # the first token
    assert healer.cut([0, 2])[:2] == ([0, 2], b"")  # a special one,
    assert healer.cut([0, 2, 0])[:2] == ([0, 2], b"a")  # nor anything beyond it
    assert healer.cut([0, 3])[:2] == ([0, 3], b"")  # and none is said: "<" is no beginning of "<a>"
    assert healer.cut([0, 4, 0])[:2] == ([0, 4], b"a")
    ending = healer_of(b"a", b"<", b"</s>", b"</b>", ends=(2,))  # an end of text that its tokenizer does not call special
    assert allowed(Healing(ending, ending.cut([0, 1])).mask([])) == {1, 3}
    assert ending.cut([0, 2])[:2] == ([0, 2], b"")
    long = healer_of(b"a", b"a" * MAX_TAKEN, b"a" * (2 * MAX_TAKEN))
    assert long.cut([0] * (3 * MAX_TAKEN))[:2] == ([0] * (2 * MAX_TAKEN), b"a" * MAX_TAKEN)
    assert long.cut([0, 2])[:2] == ([0, 2], b"")
