"""Where a text holds special tokens: equal to the definition, in linear time."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.errors import UnsupportedModelError
from pyengine.text.special import MAX_NESTED, Spellings

texts = st.text("ab<|>", max_size=30)
sets = st.lists(st.text("ab<|>", max_size=5), max_size=8)


def longest_first(strings: list[str]) -> re.Pattern[str]:
    """As the library looks for them."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, strings), key=len, reverse=True))) or "(?!)")


@settings(max_examples=500, deadline=None)
@given(strings=sets, text=texts)
def test_the_longest_at_each_place(strings, text):
    spellings, pattern = Spellings(strings), longest_first(strings)
    assert spellings.occur_in(text) == (pattern.search(text) is not None)
    assert spellings.replace(text, lambda string: f"[{string}]") == pattern.sub(lambda match: f"[{match[0]}]", text)


@settings(max_examples=500, deadline=None)
@given(strings=st.lists(st.text("ab<|>", min_size=2, max_size=5), max_size=8), text=texts)
def test_what_is_broken_up_holds_none_and_loses_nothing(strings, text):
    broken = Spellings(strings).break_up(text, "·")
    assert broken.replace("·", "") == text
    assert longest_first(strings).search(broken) is None
    if longest_first(strings).search(text) is None:
        assert broken == text


@settings(max_examples=500, deadline=None)
@given(strings=sets, text=texts, spaces=st.sampled_from(["", " ", "\n "]))
def test_beginnings_at_the_end(strings, text, spaces):
    expected = [
        begin
        for begin in range(len(text))
        if any(len(text) - begin < len(string) and string.startswith(text[begin:]) for string in strings)
    ]
    assert Spellings(strings).open_tails(text + spaces) == expected


def test_thousands_of_special_tokens():
    """Gemma has 6,242 of them, all with the same first character: a list of alternatives would try each at each of these."""
    spellings = Spellings([f"<unused{number}>" for number in range(6242)])
    assert not spellings.occur_in("<" * 200_000) and not spellings.occur_in("<unused" * 50_000)
    assert spellings.occur_in("<" * 200_000 + "<unused6241>")


def test_nothing_is_built_for_texts_that_cannot_hold_any():
    spellings = Spellings(["<s>", "</s>"])
    assert (
        not spellings.occur_in("plain") and spellings.break_up("plain", "·") == "plain" and spellings._pattern is None
    )


def test_nesting_is_bounded():
    with pytest.raises(UnsupportedModelError, match="deep"):
        Spellings(["a" * n for n in range(1, MAX_NESTED + 10)]).occur_in("a")
