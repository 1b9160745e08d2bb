"""One call as a model writes it, followed character by character: an object, a name before an object, or tags.

A form is pushed the characters of what may be a call. Until it is one, they are `pending`; from then on it gives the call's
arguments, as JSON, as they come.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pyengine.serve.errors import HTTPError
from pyengine.serve.fields import parse_json
from pyengine.serve.json_scan import ObjectScanner

WHITESPACE = " \t\n\r"
MAX_GAP = 256  # whitespace around calls and in them, which is left out; more of it is content
MAX_NAME = 256  # characters between "<parameter=" and ">"


class Form(ABC):
    """tools: {name: schema of the arguments} of those that may be called.

    name      of the tool, once these characters are certain to call it
    pending   characters that are no part of the call yet
    is_whole  the arguments are complete
    is_over   and so is what stands around them
    """

    special: ClassVar[tuple[str, ...]] = ()  # what may be special tokens of the model's vocabulary

    def __init__(self, tools: Mapping[str, Any]) -> None:
        self.name = ""
        self.pending: list[str] = []
        self.is_whole = self.is_over = False
        self._tools = tools

    @abstractmethod
    def push(self, char: str) -> str | None:
        """The next characters of the arguments; None if `char` cannot stand here, and then it was not taken."""


class WordForm(Form):
    """A form that is written in words and marks between them. Its states take a character as `push` does."""

    def __init__(self, tools: Mapping[str, Any]) -> None:
        super().__init__(tools)
        self._state: Callable[[str], str | None] = self._begin
        self._read = ""  # of the word or mark at hand

    def push(self, char: str) -> str | None:
        return self._state(char)

    @abstractmethod
    def _begin(self, char: str) -> str | None:
        """The first state."""

    def _hold(self, char: str) -> str:
        self.pending.append(char)
        self._read += char
        return ""

    def _mark(self, char: str, *marks: str) -> str | None:
        """The one of `marks` that is complete with this character, "" while it may become one, None if it becomes none.
        Whitespace may stand before it."""
        text = self._read + char
        if text in WHITESPACE and len(self.pending) < MAX_GAP:
            self.pending.append(char)
            return ""
        if not any(mark.startswith(text) for mark in marks):
            return None
        self._hold(char)
        if text in marks:
            self._read = ""
            return text
        return ""


# -------------------------------------------------------------------- {"name": "f", "arguments": {...}}

# The first key of an object that may be a call, and the text up to its arguments if it is spelled as models are taught to.
_FIRST_KEY = re.compile(r'\{\s*"(name|arguments|parameters|type|id)"\s*:')
_STRING = r'"[^"\\]*"'
_BEGINNING = re.compile(
    rf'\{{\s*(?:"(?:type|id)"\s*:\s*{_STRING}\s*,\s*)*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*\{{'
)


class ObjectForm(Form):
    """{"name": "f", "arguments": {...}}, in any order of the keys: spelled otherwise it is judged when it is whole."""

    def __init__(self, tools: Mapping[str, Any]) -> None:
        super().__init__(tools)
        self._scanner = ObjectScanner()
        self._has_key = False  # the object has one, and it is one of a call's
        self._is_spelled_otherwise = False

    def push(self, char: str) -> str | None:
        if not self._scanner.push(char):
            return None
        self.is_over = self._scanner.depth == 0
        if self.is_whole:  # between the arguments and the end of their object
            return ""
        if self.name:
            self.is_whole = self._scanner.depth == 1
            return char
        said = self._begin(char)
        if said == "":
            self.pending.append(char)
        return said

    def _begin(self, char: str) -> str | None:
        scanner, text = self._scanner, self.pending
        if scanner.depth == 0:
            self.name, arguments = _called("".join(text) + char)
            self.is_whole = self.name in self._tools
            return arguments if self.is_whole else None
        if self._is_spelled_otherwise or scanner.is_in_string:
            return ""
        if char == ":" and not self._has_key:
            self._has_key = True
            return "" if _FIRST_KEY.fullmatch("".join(text) + char) else None
        if char == "{" and scanner.depth == 2:
            begun = _BEGINNING.fullmatch("".join(text) + char)
            if begun is not None and begun[1] in self._tools:
                self.name = begun[1]
                return char
            self._is_spelled_otherwise = True
        return ""


def _called(text: str) -> tuple[str, str]:
    """(name, arguments as JSON) of an object that is a call; the name is empty if it is none."""
    try:
        call = parse_json(text.encode("utf-8", "replace"))
        arguments = call.get("arguments", call.get("parameters"))
        if isinstance(arguments, str):  # some models write JSON in a string
            arguments = parse_json(arguments.encode("utf-8", "replace"))
    except HTTPError:
        return "", ""
    if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
        return "", ""
    return call["name"], json.dumps(arguments, ensure_ascii=False)


# -------------------------------------------------------------------- f[ARGS]{...}

_ARGS, _CALL_ID = "[ARGS]", "[CALL_ID]"


class NamedForm(WordForm):
    """f[ARGS]{...}, or f[CALL_ID]id[ARGS]{...}."""

    special = (_ARGS, _CALL_ID)

    def __init__(self, tools: Mapping[str, Any]) -> None:
        super().__init__(tools)
        self._tool = ""
        self._scanner = ObjectScanner()

    def _begin(self, char: str) -> str | None:
        if char != "[":
            return self._hold(char) if any(name.startswith(self._read + char) for name in self._tools) else None
        self._tool, self._read, self._state = self._read, "", self._after_name
        return self._after_name(char) if self._tool in self._tools else None

    def _after_name(self, char: str) -> str | None:
        mark = self._mark(char, _ARGS, _CALL_ID)
        if mark:
            self._state = self._object if mark == _ARGS else self._id
        return None if mark is None else ""

    def _id(self, char: str) -> str | None:
        if char == "[":
            self._read, self._state = "", self._after_name
            return self._after_name(char)
        return self._hold(char) if char.isalnum() and len(self._read) < MAX_NAME else None

    def _object(self, char: str) -> str | None:
        if char in WHITESPACE and not self.name and len(self.pending) < MAX_GAP:
            return self._hold(char)
        if not self._scanner.push(char):
            return None
        self.name = self._tool
        self.is_whole = self.is_over = self._scanner.depth == 0
        return char


# -------------------------------------------------------------------- <function=f><parameter=p>value</parameter></function>

_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"


class TagForm(WordForm):
    """<function=f> <parameter=p> value </parameter> ... </function>

    One newline after a parameter's tag and one before its end are not part of the value. A value of which the schema says that
    it is a string is one, and is given as it comes; another is given when it is whole, as JSON if it is such and fits.
    """

    def __init__(self, tools: Mapping[str, Any]) -> None:
        super().__init__(tools)
        self._keys: set[str] = set()
        self._types: frozenset[str] = frozenset()  # of the value at hand
        self._is_text = False  # it can be nothing but a string
        self._value: list[str] = []  # that is to be judged when it is whole
        self._tail = ""  # what may be the end of the value
        self._is_first = False  # no character of the value has come

    def _begin(self, char: str) -> str | None:
        mark = self._mark(char, _FUNCTION)
        if mark:
            self._state = self._function_name
        return None if mark is None else ""

    def _function_name(self, char: str) -> str | None:
        if char != ">":
            return self._hold(char) if any(name.startswith(self._read + char) for name in self._tools) else None
        if self._read not in self._tools:
            return None
        self.name, self._read, self._state = self._read, "", self._between
        self.pending.clear()
        return "{"

    def _between(self, char: str) -> str | None:
        """Before a parameter or the end."""
        mark = self._mark(char, _PARAMETER, _END_FUNCTION)
        if mark == _PARAMETER:
            self._state = self._key
        elif mark == _END_FUNCTION:
            self.pending.clear()
            self.is_whole = self.is_over = True
            return "}"
        return None if mark is None else ""

    def _key(self, char: str) -> str | None:
        """The name of a parameter."""
        if char != ">":
            return self._hold(char) if char not in WHITESPACE and len(self._read) < MAX_NAME else None
        key, self._read = self._read, ""
        if not key or key in self._keys:
            return None
        self.pending.clear()
        separator = ", " if self._keys else ""
        self._keys.add(key)
        properties = self._tools[self.name].get("properties")
        self._types = types_of(properties.get(key) if isinstance(properties, dict) else None)
        self._is_text = self._types == {"string"}
        self._is_first, self._state = True, self._in_value
        return f"{separator}{_json_string(key)}: " + ('"' if self._is_text else "")

    def _in_value(self, char: str) -> str | None:
        is_gap, self._is_first = self._is_first and char == "\n", False
        if is_gap:
            return ""
        self._tail += char
        given = ""
        while not any(end.startswith(self._tail) for end in (_END_PARAMETER, "\n" + _END_PARAMETER)):
            given, self._tail = given + self._tail[0], self._tail[1:]
        is_end = self._tail.endswith(_END_PARAMETER)
        if is_end:
            self._tail, self._state = "", self._between
        if self._is_text:
            return _json_string(given)[1:-1] + ('"' if is_end else "")
        self._value.append(given)
        if not is_end:
            return ""
        text = "".join(self._value)
        self._value.clear()
        return _value(text, self._types)


_PYTHON = {"True": "true", "False": "false", "None": "null"}  # as templates show values that earlier calls had


def _value(text: str, types: frozenset[str]) -> str:
    """A parameter's value as JSON: itself if it is JSON of one of the types, else a string."""
    word = text.strip(WHITESPACE)
    word = _PYTHON.get(word, word)
    try:
        value = parse_json(word.encode("utf-8", "replace"))
    except HTTPError:
        return _json_string(text)
    return word if _type_of(value) & types else _json_string(text)


def _json_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# -------------------------------------------------------------------- types of a schema

_ALL = frozenset(("string", "number", "integer", "boolean", "null", "object", "array"))
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}


def _type_of(value: Any) -> frozenset[str]:
    """The types, in a schema's words, that a value of JSON has."""
    name = _TYPES.get(type(value), "null")
    is_whole = isinstance(value, float) and value.is_integer()
    return frozenset((name, "number") if name == "integer" else (name, "integer") if is_whole else (name,))


def types_of(schema: Any, depth: int = 8) -> frozenset[str]:
    """The types of which a value may be by its schema, as far as it says so in plain words; all if it does not."""
    if not isinstance(schema, dict) or depth == 0:
        return _ALL
    kind = schema.get("type")
    if isinstance(kind, str):
        return frozenset((kind,)) & _ALL or _ALL
    if isinstance(kind, list):
        return frozenset(one for one in kind if isinstance(one, str)) & _ALL or _ALL
    if "const" in schema:
        return _type_of(schema["const"])
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return frozenset().union(*map(_type_of, schema["enum"]))
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list) and schema[name]:
            return frozenset().union(*(types_of(one, depth - 1) for one in schema[name]))
    return _ALL
