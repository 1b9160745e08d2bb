"""Stop strings: never a part of one in the stream, and the same text however it was cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyengine
from pyengine.errors import InvalidArgumentError
from pyengine.text.stops import StopMatcher, StopStrings

stops = st.lists(st.text("abc😀", min_size=1, max_size=4), min_size=0, max_size=4)


def run(stop: list[str], pieces: list[str], include: bool = False) -> tuple[list[str], str | None]:
    matcher = StopMatcher(StopStrings(stop), include_stop_str=include)
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
    matcher, seen = StopMatcher(StopStrings(stop), include_stop_str=include), ""
    for piece in pieces:
        seen += matcher.push(piece)
        assert text.startswith(seen)


@settings(max_examples=200, deadline=None)
@given(stop=stops, text=st.text("abc😀", max_size=20))
def test_no_more_is_held_back_than_could_be_a_stop_string(stop, text):
    matcher = StopMatcher(StopStrings(stop))
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
    matcher = StopMatcher(StopStrings(["x"]))
    assert matcher.push("axb") == "a" and matcher.push("more") == "" and matcher.finish() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InvalidArgumentError):
        StopStrings(["a", ""])


# ---------------------------------------------------------------- text that is not shown


@settings(max_examples=500, deadline=None)
@given(
    stop=stops,
    pieces=st.lists(st.tuples(st.text("abc", max_size=4), st.booleans()), max_size=10),
    include=st.booleans(),
)
def test_hidden_text_can_stop_but_is_not_shown(stop, pieces, include):
    matcher, shown = StopMatcher(StopStrings(stop), include_stop_str=include), ""
    for piece, hidden in pieces:
        shown += matcher.push(piece, hidden=hidden)
    shown += matcher.finish()
    whole, hidden = "".join(piece for piece, _ in pieces), [flag for piece, flag in pieces for _ in piece]
    text, found = expected(stop, whole, include=False)
    visible = "".join(character for character, flag in zip(text, hidden, strict=False) if not flag)
    assert matcher.matched == found
    assert shown == visible + (found if include and found is not None else "")


# ---------------------------------------------------------------- cost


class CountingList(list):
    """Counts how often it is asked for an item."""

    n = 0

    def __getitem__(self, index):
        self.n += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("n_strings", [1, 10_000])
def test_a_character_costs_the_same_however_many_strings_there_are(n_strings):
    automaton = StopStrings([f"{number:06}!" for number in range(n_strings)])
    automaton._next = CountingList(automaton._next)
    matcher = StopMatcher(automaton)
    text = "0123456789" * 1000
    assert matcher.push(text) + matcher.finish() == text
    assert automaton._next.n <= 4 * len(text)  # each character takes one step down and, over the text, at most one back


def test_one_automaton_serves_all_outputs_of_a_request(tiny_model, monkeypatch):
    built = []

    def counting(strings):
        built.append(strings)
        return StopStrings(strings)

    monkeypatch.setattr("pyengine.engine_base.StopStrings", counting)
    with pyengine.Engine(tiny_model, n_threads=1) as engine:
        engine.generate(["a", "b"], n=3, temperature=1, max_tokens=2, stop=["x", "y"])
    assert built == [("x", "y")]


# ---------------------------------------------------------------- special tokens


def test_a_stop_string_may_be_a_special_token(tiny_model):
    """Whether the text shows special tokens or not; the token comes by force."""
    with pyengine.Engine(tiny_model, n_threads=1) as engine:
        text, id_ = next(iter(engine.tokenizer.special_tokens.items()))
        for skip in (True, False):
            options = {"logit_bias": {id_: 1e9}, "max_tokens": 5, "skip_special_tokens": skip, "ignore_eos": True}
            free = engine.generate("a", **options)
            assert free.tokens == [id_] * 5 and free.text == ("" if skip else text * 5)
            stopped = engine.generate("a", **options, stop=[text])
            assert (stopped.tokens, stopped.text, stopped.stop_reason) == ([id_], "", text)
            kept = engine.generate("a", **options, stop=[text + text[:1]], include_stop_str_in_output=True)
            assert (len(kept.tokens), kept.text, kept.finish_reason) == (2, text + text[:1], "stop")
