"""One JSON object, followed character by character: where it ends, and where it stops being JSON."""

from __future__ import annotations

import re

MAX_DEPTH = 64
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_LITERALS = ("true", "false", "null")
_WHITESPACE = " \t\n\r"


class ObjectScanner:
    """`push` each character from the first brace on. `depth`: of open objects and lists; 0 once the object is complete."""

    def __init__(self) -> None:
        self.depth = 0
        self._closers: list[str] = []
        self._state = self._begin
        self._word = ""  # of the number or literal that is being read
        self._is_key = False  # of the string that is being read

    def push(self, char: str) -> bool:
        """Whether the characters so far are the beginning of an object (or all of it)."""
        is_right = self._state(char)
        self.depth = len(self._closers)
        return is_right

    @property
    def is_in_string(self) -> bool:
        """Whether the next character belongs to a string."""
        return self._state in (self._string, self._escape, self._hex)

    # Each state takes a character, chooses the next state and says whether the character may stand here.

    def _begin(self, char: str) -> bool:
        return char == "{" and self._value(char)

    def _end(self, char: str) -> bool:
        return False

    def _value(self, char: str) -> bool:
        if char in _WHITESPACE:
            return True
        if char == '"':
            self._is_key, self._state = False, self._string
        elif char in "{[":
            if len(self._closers) == MAX_DEPTH:
                return False
            self._closers.append("}" if char == "{" else "]")
            self._state = self._first_key if char == "{" else self._first_item
        elif char in "-0123456789tfn":
            self._word, self._state = char, self._in_word
        else:
            return False
        return True

    def _first_key(self, char: str) -> bool:
        return self._close(char) if char == "}" else self._key(char)

    def _first_item(self, char: str) -> bool:
        if char == "]":
            return self._close(char)
        if char in _WHITESPACE:
            return True
        return self._value(char)

    def _key(self, char: str) -> bool:
        if char == '"':
            self._is_key, self._state = True, self._string
            return True
        return char in _WHITESPACE

    def _colon(self, char: str) -> bool:
        if char == ":":
            self._state = self._value
            return True
        return char in _WHITESPACE

    def _after_value(self, char: str) -> bool:
        if char == ",":
            self._state = self._key if self._closers[-1] == "}" else self._value
            return True
        return char in _WHITESPACE or self._close(char)

    def _close(self, char: str) -> bool:
        if char != self._closers[-1]:
            return False
        self._closers.pop()
        self._state = self._after_value if self._closers else self._end
        return True

    def _string(self, char: str) -> bool:
        if char == '"':
            self._state = self._colon if self._is_key else self._after_value
        elif char == "\\":
            self._state = self._escape
        return char >= " "

    def _escape(self, char: str) -> bool:
        if char == "u":
            self._word, self._state = "", self._hex
            return True
        self._state = self._string
        return char in '"\\/bfnrt'

    def _hex(self, char: str) -> bool:
        self._word += char
        if len(self._word) == 4:
            self._state = self._string
        return char in "0123456789abcdefABCDEF"

    def _in_word(self, char: str) -> bool:
        if char.isascii() and (char.isalnum() or char in "+-."):
            self._word += char
            return self._word[0] not in "tfn" or any(literal.startswith(self._word) for literal in _LITERALS)
        if self._word not in _LITERALS and not _NUMBER.fullmatch(self._word):
            return False
        self._state = self._after_value
        return self._after_value(char)
