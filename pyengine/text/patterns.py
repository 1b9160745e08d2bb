"""Which regular expressions of a tokenizer.json may run: those whose time is linear in the text.

The library matches by backtracking, and nothing can end it: a pattern like `(a+)+b` in a model file is a program that does not
come back. `check_pattern` parses the subset of Oniguruma's syntax that tokenizers use and refuses what could take longer:

  - repetition without a bound is of single characters only: no quantifier around a quantifier;
  - in a branch, at most one such repetition lies before something that can fail, and a second one may be that something: after
    `X*` the match of `Y+` or `(?!Z)` gives up one character of X at a time, once;
  - such a branch, which may read far and then fail, is followed by a branch that keeps what was read (`X*Y+ | ... | X+`):
    otherwise the same characters would be read from each of their beginnings;
  - no back references, no look-behind, no recursion.

All patterns of the common models pass: GPT-2, Llama 3, Qwen, GPT-4o, DeepSeek, Falcon, StarCoder.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from pyengine.errors import UnsupportedModelError

MAX_PATTERN = 8192  # characters
MAX_WAYS = 1024  # in which the bounded parts of a branch may match: a?a?a?... has 2^n
MANY = 64  # a bound above this counts as none
# DeepSeek LLM: squares the length of a run of white space, which whoever encodes a text limits.
QUADRATIC_PATTERN = r"\s+$"

_QUANTIFIER = re.compile(r"[?*+]|\{(\d*)(,?)(\d*)\}")
_FLAGS = re.compile(r"\(\?[im]*(?:-[im]+)?([:)])")
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?[A-Za-z_ ]+\}|u[0-9A-Fa-f]{4}|x\{[0-9A-Fa-f]+\}|x[0-9A-Fa-f]{2}|[sSdDwWhHrntfvae]|[^A-Za-z0-9])"
)
_ANCHOR = re.compile(r"[\^$]|\\[bBAzZ]")


class _Item(NamedTuple):
    """A part of a branch.

    text       the atom as it is written
    low, high  how often it comes
    width      characters of one atom, at least
    ways       in which it can match, without those of unbounded repetition
    is_test    whether it takes nothing and can fail: an anchor, a look-ahead
    """

    text: str
    low: int = 1
    high: float = 1
    width: int = 1
    ways: int = 1
    is_test: bool = False

    @property
    def is_unbounded(self) -> bool:
        return self.high > MANY

    @property
    def can_fail(self) -> bool:
        return self.low > 0 or self.is_test


_Branch = list[_Item]


def check_pattern(pattern: str) -> int:
    """The fewest characters that the pattern matches. Raises UnsupportedModelError for one that is not known to be linear."""
    if len(pattern) > MAX_PATTERN:
        raise UnsupportedModelError(f"a pattern of the tokenizer has {len(pattern)} characters, at most {MAX_PATTERN}")
    branches = _Parser(pattern).whole()
    if pattern != QUADRATIC_PATTERN:
        for number, branch in enumerate(branches):
            _check_branch(pattern, branch, branches[number + 1 :])
    return min(sum(item.low * item.width for item in branch) for branch in branches)


def _refuse(pattern: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the tokenizer's pattern {pattern[:80]!r} is not supported: {reason}")


def _check_branch(pattern: str, branch: _Branch, later: list[_Branch]) -> None:
    if math.prod(item.ways for item in branch) > MAX_WAYS:
        raise _refuse(pattern, "too many optional parts in a row")
    end = max((index for index, item in enumerate(branch) if item.can_fail), default=-1)
    far = [index for index, item in enumerate(branch[: end + 1]) if item.is_unbounded]
    if not far or far == [end]:
        return  # nothing can fail after the first repetition
    if len(far) > 2 or (len(far) == 2 and far[1] != end):
        raise _refuse(pattern, "too many repetitions before something that can fail")
    if not any(_keeps(other, branch[far[0]].text) for other in later):
        raise _refuse(pattern, f"it may read all of {branch[far[0]].text!r} and then fail")


def _keeps(branch: _Branch, atom: str) -> bool:
    """Whether the branch matches wherever `atom` does, and as many of them as there are."""
    for index, item in enumerate(branch):
        if item.text == atom and item.is_unbounded and item.low <= 1:
            return not any(rest.can_fail for rest in branch[index + 1 :])
        if item.can_fail:
            return False
    return False


class _Parser:
    """Recursive descent over one pattern."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0

    def whole(self) -> list[_Branch]:
        branches = self._alternatives(depth=0)
        if self._at < len(self._pattern):
            raise self._refuse("an unbalanced parenthesis")
        return branches

    def _refuse(self, reason: str) -> UnsupportedModelError:
        return _refuse(self._pattern, f"{reason} at {self._at}")

    def _alternatives(self, depth: int) -> list[_Branch]:
        if depth > 8:
            raise self._refuse("groups too deep")
        branches: list[_Branch] = [[]]
        while self._at < len(self._pattern) and self._pattern[self._at] != ")":
            if self._pattern[self._at] == "|":
                self._at += 1
                branches.append([])
            else:
                branches[-1] += self._item(depth)
        return branches

    def _item(self, depth: int) -> _Branch:
        """The next atom with its quantifier; nothing for flags like (?i)."""
        begin, character = self._at, self._pattern[self._at]
        if anchor := _ANCHOR.match(self._pattern, begin):
            self._at = anchor.end()
            return [self._quantified(_test(anchor[0]), is_character=False)]
        if character == "(":
            group = self._group(depth)
            return [] if group is None else [self._quantified(group, is_character=False)]
        if character == "[":
            self._class(0)
        elif character == "\\":
            self._escape()
        elif character in "?*+{":
            raise self._refuse("a quantifier of nothing")
        else:
            self._at += 1
        return [self._quantified(_Item(self._pattern[begin : self._at]), is_character=True)]

    def _escape(self) -> None:
        escape = _ESCAPE.match(self._pattern, self._at)
        if escape is None:
            raise self._refuse(f"the escape {self._pattern[self._at : self._at + 2]!r}")
        self._at = escape.end()

    def _class(self, depth: int) -> None:
        """[...], with classes inside, && and [:name:]."""
        if depth > 8:
            raise self._refuse("classes too deep")
        self._at += 1
        if self._pattern.startswith("^", self._at):
            self._at += 1
        if self._pattern.startswith("]", self._at):
            raise self._refuse("an empty class")
        while self._at < len(self._pattern):
            character = self._pattern[self._at]
            if character == "]":
                self._at += 1
                return
            if character == "[":
                self._class(depth + 1)
            elif character == "\\":
                self._escape()
            else:
                self._at += 1
        raise self._refuse("a class without end")

    def _group(self, depth: int) -> _Item | None:
        """(...), (?:...), (?i:...), (?>...), (?=...) and (?!...) as one item; None for (?i)."""
        begin = self._at
        ahead = self._pattern.startswith(("(?=", "(?!"), begin)
        if ahead or self._pattern.startswith("(?>", begin):
            self._at += 3
        elif self._pattern.startswith("(?", begin):
            flags = _FLAGS.match(self._pattern, begin)
            if flags is None or (flags[1] == ")" and begin > 0):  # later, it would enclose what follows
                raise self._refuse(f"the group {self._pattern[begin : begin + 4]!r}")
            self._at = flags.end()
            if flags[1] == ")":
                return None
        else:
            self._at += 1
        branches = self._alternatives(depth + 1)
        if not self._pattern.startswith(")", self._at):
            raise self._refuse("an unbalanced parenthesis")
        self._at += 1
        if any(item.is_unbounded for branch in branches for item in branch):
            raise self._refuse("a repetition without a bound inside a group")
        if ahead:
            return _test(self._pattern[begin : self._at])
        width = min(sum(item.low * item.width for item in branch) for branch in branches)
        ways = sum(math.prod(item.ways for item in branch) for branch in branches)
        return _Item(self._pattern[begin : self._at], width=width, ways=ways)

    def _quantified(self, item: _Item, *, is_character: bool) -> _Item:
        """`item` with the quantifier that follows it, if one does."""
        quantifier = _QUANTIFIER.match(self._pattern, self._at)
        if quantifier is None or quantifier[0] in ("{}", "{,}"):
            return item
        self._at = quantifier.end()
        low, high = _bounds(quantifier)
        if not is_character and (high > MANY or (high > 1 and item.ways > 1) or item.width == 0):
            raise self._refuse("a quantifier of more than a character")
        text = item.text
        if quantifier[0] in ("?", "*", "+") and self._pattern[self._at : self._at + 1] in ("?", "+"):
            text += f" {self._pattern[self._at]}"  # lazy, possessive: not the same as without
            self._at += 1
        if _QUANTIFIER.match(self._pattern, self._at):
            raise self._refuse("a quantifier of a quantifier")
        ways = item.ways if high > MANY else item.ways + int(high) - low
        return item._replace(text=text, low=low, high=high, ways=ways)


def _test(text: str) -> _Item:
    return _Item(text, low=0, high=0, width=0, is_test=True)


def _bounds(quantifier: re.Match[str]) -> tuple[int, float]:
    simple = {"?": (0, 1.0), "*": (0, float("inf")), "+": (1, float("inf"))}.get(quantifier[0])
    if simple is not None:
        return simple
    low = int(quantifier[1][:9] or 0)
    if not quantifier[2]:
        return low, low
    return low, int(quantifier[3][:9]) if quantifier[3] else float("inf")
