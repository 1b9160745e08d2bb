"""Stop strings, found in a text that arrives in pieces.

`StopStrings` is an Aho-Corasick automaton over characters, built once a request and shared by all its outputs; `StopMatcher` is
where one output stands in it. A character costs the same however many strings there are.
"""

from __future__ import annotations

from collections.abc import Iterable

from pyengine.errors import InvalidArgumentError


class StopStrings:
    """The automaton. State 0 is its root; the state after some text stands for the longest end of the text with which a stop
    string begins, and `depth` is that end's length: what has to be held back.

    depth   per state
    found   per state, the longest stop string that ends there, or None
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self.depth = [0]
        self.found: list[str | None] = [None]
        self._next: list[dict[str, int]] = [{}]
        for string in strings:
            self._insert(string)
        self._fail = [0] * len(self.depth)
        self._link()

    def __bool__(self) -> bool:
        return len(self.depth) > 1

    def _insert(self, string: str) -> None:
        if not string:
            raise InvalidArgumentError("a stop string must not be empty")
        state = 0
        for character in string:
            child = self._next[state].get(character)
            if child is None:
                child = self._next[state][character] = len(self._next)
                self._next.append({})
                self.depth.append(self.depth[state] + 1)
                self.found.append(None)
            state = child
        self.found[state] = string

    def _link(self) -> None:
        """Failure links, breadth first: each state's longest proper suffix that is also a state."""
        queue = list(self._next[0].values())
        for state in queue:
            for character, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], character)
                if self.found[child] is None:
                    self.found[child] = self.found[self._fail[child]]
                queue.append(child)

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while state and character not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(character, 0)


class StopMatcher:
    """Keeps every part of a stop string out of the text that is shown.

    The stop string that ends first wins, of those that end together the longest; how the text was cut into pieces does not
    matter. `push` returns text that can no longer belong to a stop string; `matched` is the string found, or None.

    Hidden text (special tokens that the output leaves out) is looked at but not shown, so a stop string may spell it.
    """

    def __init__(self, stops: StopStrings, *, include_stop_str: bool = False) -> None:
        self.matched: str | None = None
        self._stops = stops
        self._include = include_stop_str
        self._state = 0
        self._held = ""  # what may yet become a stop string
        self._hidden = b""  # 1 for each of its characters that is hidden

    def push(self, text: str, *, hidden: bool = False) -> str:
        """Text that may be shown now. After a match: nothing more."""
        if self.matched is not None or not text:
            return ""
        if not self._stops:
            return "" if hidden else text
        held = self._held + text
        marks = self._hidden + (b"\1" if hidden else b"\0") * len(text)
        step, found, state = self._stops.step, self._stops.found, self._state
        for end, character in enumerate(text, len(self._held) + 1):
            state = step(state, character)
            if found[state] is not None:
                self.matched = found[state]
                return self._end(held, marks, end)
        certain = len(held) - self._stops.depth[state]
        self._state, self._held, self._hidden = state, held[certain:], marks[certain:]
        return _visible(held[:certain], marks)

    def finish(self) -> str:
        """The end of the text, once it is clear that no stop string completes it."""
        rest = _visible(self._held, self._hidden)
        self._state, self._held, self._hidden = 0, "", b""
        return rest

    def _end(self, held: str, marks: bytes, end: int) -> str:
        """What to show of a text whose stop string ends at `end`."""
        assert self.matched is not None
        self._held, self._hidden = "", b""
        begin = end - len(self.matched)
        return _visible(held[:begin], marks) + (self.matched if self._include else "")


def _visible(text: str, marks: bytes) -> str:
    """The characters of `text` that no mark hides."""
    if 1 not in marks[: len(text)]:
        return text
    return "".join(character for character, mark in zip(text, marks, strict=False) if not mark)
