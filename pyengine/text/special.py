"""The spellings of a vocabulary's special tokens, and where a text holds them."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import groupby

from pyengine.errors import UnsupportedModelError

MAX_NESTED = 64  # spellings of which each begins the next


class Spellings:
    """Finds strings in a text, at each place the longest as the library does. The time is linear in the text, however many there
    are: they are matched as one tree of their characters, built when a text first holds a character that begins one."""

    def __init__(self, strings: Iterable[str]) -> None:
        self._sorted = sorted(set(strings) - {""})
        self._firsts = sorted({string[0] for string in self._sorted})
        self._longest = max(map(len, self._sorted), default=0)
        self._pattern: re.Pattern[str] | None = None

    def _any(self) -> re.Pattern[str]:
        if self._pattern is None:
            self._pattern = re.compile(_tree(self._sorted, 0, 0))
        return self._pattern

    def _may_occur(self, text: str) -> bool:
        return any(first in text for first in self._firsts)

    def occur_in(self, text: str) -> bool:
        """Whether `text` holds any of them."""
        return self._may_occur(text) and self._any().search(text) is not None

    def replace(self, text: str, change: Callable[[str], str]) -> str:
        """`text` with every occurrence changed, from left to right."""
        return self._any().sub(lambda match: change(match[0]), text) if self._may_occur(text) else text

    def break_up(self, text: str, mark: str) -> str:
        """`text` with `mark` after the first character of every occurrence, those that overlap too: none is left whole."""
        if not self._may_occur(text):
            return text
        return re.sub(f"(?=({self._any().pattern}))(?s:.)", lambda match: match[0] + mark, text)

    def open_tails(self, text: str) -> list[int]:
        """Where beginnings of spellings stand at the end of `text`, spaces aside: more text might complete them."""
        end = len(text.rstrip())
        return [begin for begin in range(max(0, end - self._longest + 1), end) if self._begins(text[begin:end])]

    def _begins(self, text: str) -> bool:
        """Whether a spelling begins with `text` and is longer."""
        at = bisect_left(self._sorted, text)
        if at < len(self._sorted) and self._sorted[at] == text:
            at += 1
        return at < len(self._sorted) and self._sorted[at].startswith(text)

    def __contains__(self, text: object) -> bool:
        return text in self._sorted


def _tree(strings: list[str], depth: int, nested: int) -> str:
    """A pattern for what follows the first `depth` characters, which all `strings` share; they are sorted, the longest wins."""
    if nested > MAX_NESTED:
        raise UnsupportedModelError(f"special tokens begin each other more than {MAX_NESTED} deep")
    first, last, end = strings[0], strings[-1], depth
    while end < min(len(first), len(last)) and first[end] == last[end]:
        end += 1
    common, is_whole = re.escape(first[depth:end]), len(first) == end
    longer = strings[is_whole:]
    if not longer:
        return common
    groups = groupby(longer, key=lambda string: string[end])
    branches = "|".join(_tree(list(group), end, nested + 1) for _, group in groups)
    return f"{common}(?:{branches}){'?' if is_whole else ''}"
