"""Calls in a model's text: the formats in which models write them, and a reader that follows a text as it comes.

A call is an object with a name and arguments, {"name": "f", "arguments": {...}}; formats differ in what stands around it
and between two of them. One is a row of `SYNTAXES`, chosen by the text of the model's chat template.

The reader goes character by character, so a text gives the same however it is cut. What may become a call is held back
until it is one: until its name is that of a tool and its arguments have begun. From then on the arguments are given out as
they come. What turns out to be no call is content, to the last character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from pyengine.serve import payload
from pyengine.serve.errors import HTTPError
from pyengine.serve.fields import parse_json
from pyengine.serve.json_scan import ObjectScanner

_WHITESPACE = " \t\n\r"
FENCE = ("```json", "```")
MAX_GAP = 256  # whitespace before a call, which is left out; more of it is content
# The first key of an object that may be a call, and the text up to its arguments if it is spelled as models are taught to.
_FIRST_KEY = re.compile(r'\{\s*"(name|arguments|parameters|type|id)"\s*:')
_STRING = r'"[^"\\]*"'
_BEGINNING = re.compile(
    rf'\{{\s*(?:"(?:type|id)"\s*:\s*{_STRING}\s*,\s*)*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*\{{'
)


@dataclass(frozen=True, slots=True)
class Syntax:
    """How calls are written.

    name       of the format
    marks      one of these in a chat template says that its model writes calls so ...
    unless     ... and none of these, which belong to formats that begin alike
    opening    before a call; its first character occurs in it once
    bracket    may stand between the opening and the first call
    separator  between two calls after one opening
    closing    after the last one; may be missing at the end of a text
    is_bare    a call that begins the answer needs no opening, and may stand in a block of code
    id_length  of the call's id, where the template insists on one; 0: "call_" and more
    """

    name: str
    marks: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    opening: str = ""
    bracket: str = ""
    separator: str = ""
    closing: str = ""
    is_bare: bool = False
    id_length: int = 0

    def new_id(self) -> str:
        return payload.new_id("")[: self.id_length] if self.id_length else payload.new_id("call_")


SYNTAXES = (
    # Hermes, Qwen 2.5 and 3, some of which forget the tag; others after the same tag write XML, which is not read
    Syntax(
        "Hermes", ("<tool_call>",), ("<function=", "<arg_key>"),
        opening="<tool_call>", separator=",", closing="</tool_call>", is_bare=True,
    ),
    # Mistral 7B v0.3, Nemo, Large 2407; later ones write [TOOL_CALLS]name[ARGS]{...}, which is not read
    Syntax(
        "Mistral", ("[TOOL_CALLS]",), ("[ARGS]",),
        opening="[TOOL_CALLS]", bracket="[", separator=",", closing="]", id_length=9,
    ),
    # Llama 3.1, 3.2 and 3.3
    Syntax(
        "Llama 3", ("<|python_tag|>", '"parameters": '),
        opening="<|python_tag|>", separator=";", is_bare=True,
    ),
)  # fmt: skip
OBJECT = Syntax("object", is_bare=True)  # the text is one call and nothing else: what a guide makes of it


def syntax_of(template: str) -> Syntax | None:
    """The format of the calls of a model with this chat template; None if it has none that we read."""
    for syntax in SYNTAXES:
        if any(mark in template for mark in syntax.marks) and not any(mark in template for mark in syntax.unless):
            return syntax
    return None


class CallReader:
    """The text of one output -> the deltas of a streamed message: {"content": text} and {"tool_calls": [part of a call]}.

    names     of the tools that may be called
    only_one  leave out what comes after the first call
    has_call  whether a call has been read to its end
    """

    def __init__(self, syntax: Syntax, names: Collection[str], *, only_one: bool = False) -> None:
        self.has_call = False
        self._syntax = syntax
        self._names = frozenset(names)
        self._only_one = only_one
        self._state: Callable[[str], None] = self._text
        self._deltas = _Deltas()
        self._n_calls = 0
        self._may_be_bare = syntax.is_bare
        self._closing = syntax.closing  # of the call at hand
        self._is_after_call = False  # nothing but whitespace since
        # Given out as content unless they become part of a call: what stands before an object, and its characters.
        self._held = ""
        self._object: list[str] = []
        self._scanner = ObjectScanner()
        self._has_key = False  # the object has one, and it is one of a call's
        self._is_spelled_otherwise = False  # the object can be judged only when it is whole

    def push(self, text: str) -> list[dict[str, Any]]:
        """What is certain after `text`."""
        for char in text:
            self._state(char)
        return self._deltas.take()

    def finish(self) -> list[dict[str, Any]]:
        """What was held back, at the end of the text."""
        is_gap = self._is_after_call and not self._object and self._held.isspace()
        if not is_gap and self._state != self._after:
            self._say(self._all_held())
        self._state = self._ignore
        return self._deltas.take()

    # ------------------------------------------------------------ states: each takes a character

    def _text(self, char: str) -> None:
        """Outside of calls. Held: whitespace, and the beginning of an opening after it."""
        syntax, tag = self._syntax, self._held.lstrip(_WHITESPACE) + char
        if char in _WHITESPACE and tag == char and len(self._held) < MAX_GAP:
            self._held += char
        elif syntax.opening.startswith(tag) or (self._may_be_bare and FENCE[0].startswith(tag)):
            self._held += char
            if tag in (syntax.opening, FENCE[0]):
                self._closing = FENCE[1] if tag == FENCE[0] else syntax.closing
                self._state = self._before
        elif self._may_be_bare and tag == "{":
            self._begin_object(char)
        elif len(tag) > 1:  # no opening after all, but one may begin here
            self._give_up(char)
        else:
            self._say(self._all_held() + char)

    def _before(self, char: str) -> None:
        """Between an opening, or a separator, and an object."""
        is_bracket = char == self._syntax.bracket and self._held.rstrip(_WHITESPACE).endswith(self._syntax.opening)
        if (char in _WHITESPACE or is_bracket) and len(self._held) < MAX_GAP:
            self._held += char
        elif char == "{":
            self._begin_object(char)
        else:
            self._give_up(char)

    def _begin_object(self, char: str) -> None:
        self._scanner = ObjectScanner()
        self._has_key = self._is_spelled_otherwise = False
        self._state = self._in_object
        self._in_object(char)

    def _in_object(self, char: str) -> None:
        """In an object that may be a call."""
        if not self._scanner.push(char):
            self._give_up(char)
            return
        self._object.append(char)
        if self._scanner.depth == 0:
            self._whole_object()
        elif self._is_spelled_otherwise:
            pass
        elif char == ":" and not self._has_key and not self._scanner.is_in_string:
            self._has_key = True
            if not _FIRST_KEY.fullmatch("".join(self._object)):
                self._give_up()
        elif char == "{" and self._scanner.depth == 2 and not self._scanner.is_in_string:
            begun = _BEGINNING.fullmatch("".join(self._object))
            if begun is not None and begun[1] in self._names:
                self._call(begun[1], char)
                self._state = self._arguments
            else:
                self._is_spelled_otherwise = True

    def _whole_object(self) -> None:
        """The object is complete: a call of another spelling, or none."""
        name, arguments = _called("".join(self._object))
        if name in self._names:
            self._call(name, arguments)
            self._end_call(self._after)
        else:
            self._give_up()

    def _arguments(self, char: str) -> None:
        if not self._scanner.push(char):  # what has been said of this call is said; the rest is content
            self._give_up(char)
            return
        self._deltas.add(self._n_calls - 1, char)
        if self._scanner.depth == 1:
            self._end_call(self._rest)

    def _rest(self, char: str) -> None:
        """Between the arguments and the end of their object. Models forget the last brace."""
        if not self._scanner.push(char):
            self._state = self._after
            self._after(char)
        elif self._scanner.depth == 0:
            self._state = self._after

    def _after(self, char: str) -> None:
        """After a call. Held: whitespace, and the beginning of a closing."""
        syntax = self._syntax
        self._held += char
        tag = self._held.strip(_WHITESPACE)
        if tag and tag == self._closing:
            self._held, self._state = "", self._text
        elif tag and tag == syntax.separator:
            self._state = self._before
        elif tag == "{" and syntax.is_bare and syntax.separator:
            self._held = self._held[:-1]
            self._begin_object(char)
        elif (tag and not self._closing.startswith(tag)) or len(self._held) > MAX_GAP:
            held, self._held, self._state = self._held, "", self._text
            for one in held:
                self._state(one)

    def _ignore(self, char: str) -> None:
        pass

    # ------------------------------------------------------------ what is given out

    def _all_held(self) -> str:
        """What is held, which is so no more."""
        held, self._held = self._held + "".join(self._object), ""
        self._object.clear()
        return held

    def _give_up(self, char: str = "") -> None:
        """What is held is no call, and `char` comes after it."""
        self._state = self._text
        self._say(self._all_held())
        if char:
            self._text(char)

    def _say(self, text: str) -> None:
        if text:
            self._may_be_bare = self._is_after_call = False
            self._deltas.add("content", text)

    def _call(self, name: str, arguments: str) -> None:
        self._all_held()
        self._may_be_bare = False
        self._deltas.call(self._n_calls, {"id": self._syntax.new_id(), "type": "function"}, name)
        self._deltas.add(self._n_calls, arguments)
        self._n_calls += 1

    def _end_call(self, state: Callable[[str], None]) -> None:
        self.has_call = self._is_after_call = True
        self._state = self._ignore if self._only_one else state


class _Deltas:
    """Deltas in the making. What goes on with the same text, or the same call, becomes one."""

    def __init__(self) -> None:
        self._done: list[dict[str, Any]] = []
        self._of: str | int = "content"  # or the index of a call
        self._head: dict[str, Any] = {}  # of a call that begins
        self._name: dict[str, Any] = {}
        self._texts: list[str] = []

    def call(self, index: int, head: dict[str, Any], name: str) -> None:
        self._flush()
        self._of, self._head, self._name = index, head, {"name": name}

    def add(self, of: str | int, text: str) -> None:
        if of != self._of:
            self._flush()
            self._of = of
        self._texts.append(text)

    def _flush(self) -> None:
        if not self._texts:
            return
        text = "".join(self._texts)
        if self._of == "content":
            self._done.append({"content": text})
        else:
            call = {"index": self._of, **self._head, "function": {**self._name, "arguments": text}}
            self._done.append({"tool_calls": [call]})
        self._head, self._name = {}, {}
        self._texts.clear()

    def take(self) -> list[dict[str, Any]]:
        self._flush()
        done, self._done = self._done, []
        return done


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
    try:
        return call["name"], json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError:  # a number that is too large for a float
        return "", ""


def message_of(deltas: Iterable[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """(content, tool_calls) of the message that the deltas make."""
    content: list[str] = []
    calls: list[dict[str, Any]] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        content.append(delta.get("content", ""))
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls.append({"id": part["id"], "type": part["type"], "function": {"name": part["function"]["name"]}})
                arguments.append([])
            arguments[part["index"]].append(part["function"]["arguments"])
    for call, texts in zip(calls, arguments, strict=True):
        call["function"]["arguments"] = "".join(texts)
    return "".join(content), calls
