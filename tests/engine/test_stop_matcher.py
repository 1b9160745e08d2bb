"""Stop strings: never a part of one in the stream, and the same text however it was cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.errors import InvalidArgumentError
from pyengine.text.stops import StopMatcher

stops = st.lists(st.text("abc😀", min_size=1, max_size=4), min_size=0, max_size=4)


def run(stop: list[str], pieces: list[str], include: bool = False) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stop, include_stop_str=include)
    shown = []
    for piece in pieces:
        shown.append(matcher.push(piece))
        if matcher.matched is not None:
            break
    return [*shown, matcher.finish()], matcher.matched


def expected(stop: list[str], text: str, include: bool) -> tuple[str, str | None]:
    """The definition by brute force: the first end at which any stop string ends, the longest of those."""
    for end in range(1, len(text) + 1):
        ending = [string for string in stop if text[:end].endswith(string)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@settings(max_examples=500, deadline=None)
@given(stop=stops, pieces=st.lists(st.text("abc😀", max_size=4), max_size=10), include=st.booleans())
def test_the_stream_equals_the_definition_and_leaks_nothing(stop, pieces, include):
    shown, matched = run(stop, pieces, include)
    text, found = expected(stop, "".join(pieces), include)
    assert "".join(shown) == text and matched == found
    # What has been shown before a piece arrives can never be taken back, nor be part of a stop string to come.
    matcher, seen = StopMatcher(stop, include_stop_str=include), ""
    for piece in pieces:
        seen += matcher.push(piece)
        assert text.startswith(seen)


@settings(max_examples=200, deadline=None)
@given(stop=stops, text=st.text("abc😀", max_size=20))
def test_no_more_is_held_back_than_could_be_a_stop_string(stop, text):
    matcher = StopMatcher(stop)
    seen = matcher.push(text)
    if matcher.matched is None:
        held = text[len(seen) :]
        assert text.startswith(seen)
        assert held == "" or any(string.startswith(held) for string in stop)


def test_examples():
    assert run(["</s>"], ["a<", "/", "s", ">b"]) == (["a", "", "", "", ""], "</s>")
    assert run(["</s>"], ["a<", "/", "x"]) == (["a", "", "</x", ""], None)
    assert run(["\n\n"], ["a\n", "b\n"]) == (["a", "\nb", "\n"], None)
    assert run(["bcd", "c"], ["abcd"]) == (["ab", ""], "c")
    assert run(["END"], ["the END is"], include=True) == (["the END", ""], "END")
    assert run([], ["abc"]) == (["abc", ""], None)


def test_after_a_match_nothing_comes():
    matcher = StopMatcher(["x"])
    assert matcher.push("axb") == "a" and matcher.push("more") == "" and matcher.finish() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InvalidArgumentError):
        StopMatcher([""])
