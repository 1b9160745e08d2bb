"""Stop strings, found in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from pyengine.errors import InvalidArgumentError


class StopMatcher:
    """Finds stop strings in a text that arrives in pieces and keeps every part of them out of the stream.

    The stop string that ends first wins, of those that end together the longest; how the text was cut into pieces does not
    matter. `push` returns text that can no longer belong to a stop string; `matched` is the string found, or None.
    (An Aho-Corasick automaton over characters: its depth is the length of what must be held back.)
    """

    def __init__(self, stop: Sequence[str], *, include_stop_str: bool = False) -> None:
        if any(not string for string in stop):
            raise InvalidArgumentError("a stop string must not be empty")
        self.matched: str | None = None
        self._include = include_stop_str
        self._held = ""
        self._state = 0
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._found: list[str | None] = [None]
        self._fail = [0]
        for string in stop:
            self._insert(string)
        self._link()

    def _insert(self, string: str) -> None:
        state = 0
        for character in string:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._found.append(None)
                self._fail.append(0)
            state = self._next[state][character]
        self._found[state] = string

    def _link(self) -> None:
        """Failure links, breadth first: each state's longest proper suffix that is also a state."""
        queue = list(self._next[0].values())
        for state in queue:
            for character, child in self._next[state].items():
                self._fail[child] = self._step(self._fail[state], character)
                if self._found[child] is None:
                    self._found[child] = self._found[self._fail[child]]
                queue.append(child)

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(character, 0)

    def push(self, text: str) -> str:
        """Text that may be shown now. After a match: nothing more."""
        if self.matched is not None:
            return ""
        held = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            self._state = self._step(self._state, character)
            found = self._found[self._state]
            if found is not None:
                self.matched, self._held = found, ""
                return held[:end] if self._include else held[: end - len(found)]
        certain = len(held) - self._depth[self._state]
        self._held = held[certain:]
        return held[:certain]

    def finish(self) -> str:
        """The end of the text, once it is clear that no stop string completes it."""
        rest, self._held, self._state = self._held, "", 0
        return rest
