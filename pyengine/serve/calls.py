"""Calls in a model's text: the formats in which models write them, and a reader that follows a text as it comes.

Formats differ in the form of a call (call_forms.py) and in what stands around it and between two of them. One is a row of
`SYNTAXES`, chosen by the text of the model's chat template.

The reader goes character by character, so a text gives the same however it is cut. What may become a call is held back
until it is one: until its name is that of a tool and its arguments have begun. From then on the arguments are given out as
they come. What turns out to be no call is content, to the last character.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pyengine.serve import payload
from pyengine.serve.call_forms import MAX_GAP, WHITESPACE, Form, NamedForm, ObjectForm, TagForm

FENCE = ("```json", "```")


@dataclass(frozen=True, slots=True)
class Syntax:
    """How calls are written.

    name       of the format
    form       of a call
    marks      one of these in a chat template says that its model writes calls so ...
    unless     ... and none of these, which belong to formats that begin alike
    opening    before a call; its first character occurs in it once
    bracket    may stand between the opening and the first call
    separator  between two calls after one opening
    closing    after the last one; may be missing at the end of a text
    bare       how a call begins that needs no opening; its first character occurs in it once
    is_first   such a call must begin the answer, and may stand in a block of code
    id_length  of the call's id, where the template insists on one; 0: "call_" and more

    And how a model is made to write them (call_grammars.py):

    around_all   before the first call of an answer, and after the last
    around_each  before and after each
    joint        between two; None: an answer is one call
    arguments    the name of the arguments in the object that is a call
    """

    name: str
    form: type[Form] = ObjectForm
    marks: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    opening: str = ""
    bracket: str = ""
    separator: str = ""
    closing: str = ""
    bare: str = ""
    is_first: bool = True
    id_length: int = 0
    around_all: tuple[str, str] = ("", "")
    around_each: tuple[str, str] = ("", "")
    joint: str | None = None
    arguments: str = "arguments"

    def new_id(self) -> str:
        return payload.new_id("")[: self.id_length] if self.id_length else payload.new_id("call_")

    def special(self) -> frozenset[str]:
        """What may be special tokens of a vocabulary, and must be seen all the same."""
        return frozenset((self.opening, self.closing, *self.form.special))


SYNTAXES = (
    # Hermes, Qwen 2.5 and 3, some of which forget the tag
    Syntax(
        "Hermes", ObjectForm, ("<tool_call>",), ("<function=", "<arg_key>"),
        opening="<tool_call>", separator=",", closing="</tool_call>", bare="{",
        around_each=("<tool_call>\n", "\n</tool_call>"), joint="\n",
    ),
    # Qwen3-Coder and Qwen 3.5, which forget the tag in the middle of an answer, too
    Syntax(
        "Qwen3-Coder", TagForm, ("<parameter=",), ("<seed:",),
        opening="<tool_call>", closing="</tool_call>", bare="<function=", is_first=False,
        around_each=("<tool_call>\n", "\n</tool_call>"), joint="\n",
    ),
    # Mistral 7B v0.3, Nemo, Large 2407
    Syntax(
        "Mistral", ObjectForm, ("[TOOL_CALLS]",), ("[ARGS]",),
        opening="[TOOL_CALLS]", bracket="[", separator=",", closing="]", id_length=9,
        around_all=("[TOOL_CALLS] [", "]"), joint=", ",
    ),
    # Mistral Small 3.2, Devstral, Ministral 3
    Syntax(
        "Mistral v11", NamedForm, ("[ARGS]",),
        opening="[TOOL_CALLS]", id_length=9,
        around_each=("[TOOL_CALLS]", ""), joint="",
    ),
    # Llama 3.1, 3.2 and 3.3
    Syntax(
        "Llama 3", ObjectForm, ("<|python_tag|>", '"parameters": '), ("<parameter=",),
        opening="<|python_tag|>", separator=";", bare="{",
        arguments="parameters",
    ),
)  # fmt: skip
OBJECT = Syntax("object", bare="{")  # the text is one call and nothing else: what a guide makes of it


def syntax_of(template: str) -> Syntax | None:
    """The format of the calls of a model with this chat template; None if it has none that we read."""
    for syntax in SYNTAXES:
        if any(mark in template for mark in syntax.marks) and not any(mark in template for mark in syntax.unless):
            return syntax
    return None


class TextReader:
    """The text of one output -> the deltas of a streamed message, where there are no calls: all of it is content."""

    has_call = False

    def push(self, text: str) -> list[dict[str, Any]]:
        return [{"content": text}] if text else []

    def finish(self) -> list[dict[str, Any]]:
        return []


class CallReader:
    """The text of one output -> the deltas of a streamed message: {"content": text} and {"tool_calls": [part of a call]}.

    tools     {name: schema of the arguments} of those that may be called
    only_one  leave out what comes after the first call
    has_call  whether a call has been read to its end
    """

    def __init__(self, syntax: Syntax, tools: Mapping[str, Any], *, only_one: bool = False) -> None:
        self.has_call = False
        self._syntax = syntax
        self._tools = tools
        self._only_one = only_one
        self._state: Callable[[str], None] = self._text
        self._deltas = _Deltas()
        self._n_calls = 0
        self._may_be_bare = bool(syntax.bare)
        self._closing = syntax.closing  # of the call at hand
        self._is_after_call = False  # nothing but whitespace since
        # Given out as content unless they become part of a call: what stands before the call, and what is pending of it.
        self._held = ""
        self._call = syntax.form(tools)

    def push(self, text: str) -> list[dict[str, Any]]:
        """What is certain after `text`."""
        for char in text:
            self._state(char)
        return self._deltas.take()

    def finish(self) -> list[dict[str, Any]]:
        """What was held back, at the end of the text."""
        is_gap = self._is_after_call and not self._call.pending and self._held.isspace()
        if not is_gap and self._state not in (self._after, self._rest):
            self._say(self._all_held())
        self._state = self._ignore
        return self._deltas.take()

    # ------------------------------------------------------------ states: each takes a character

    def _text(self, char: str) -> None:
        """Outside of calls. Held: whitespace, and the beginning of an opening after it."""
        syntax, tag = self._syntax, self._held.lstrip(WHITESPACE) + char
        fence = FENCE[0] if self._may_be_bare and syntax.is_first else ""
        if char in WHITESPACE and tag == char and len(self._held) < MAX_GAP:
            self._held += char
        elif self._may_be_bare and tag == syntax.bare:
            self._held = self._held[: len(self._held) + 1 - len(tag)]
            self._begin_call(tag)
        elif any(one.startswith(tag) for one in (syntax.opening, fence, syntax.bare if self._may_be_bare else "")):
            self._held += char
            if tag in (syntax.opening, fence):
                self._closing = FENCE[1] if tag == fence else syntax.closing
                self._state = self._before
        elif len(tag) > 1:  # no opening after all, but one may begin here
            self._give_up(char)
        else:
            self._say(self._all_held() + char)

    def _before(self, char: str) -> None:
        """Between an opening, or a separator, and a call."""
        is_bracket = char == self._syntax.bracket and self._held.rstrip(WHITESPACE).endswith(self._syntax.opening)
        if (char in WHITESPACE or is_bracket) and len(self._held) < MAX_GAP:
            self._held += char
        else:
            self._begin_call(char)

    def _begin_call(self, text: str) -> None:
        """`text` may begin a call."""
        self._call = self._syntax.form(self._tools)
        self._state = self._in_call
        for char in text:
            self._state(char)

    def _in_call(self, char: str) -> None:
        """In a call, or in what may become one."""
        call, was_call = self._call, bool(self._call.name)
        given = call.push(char)
        if given is None:  # what has been given out of this call is so; the rest is content
            self._give_up(char)
            return
        if call.name and not was_call:
            self._all_held()
            self._may_be_bare = self._may_be_bare and not self._syntax.is_first
            head = {"id": self._syntax.new_id(), "type": "function"}
            self._deltas.call(self._n_calls, head, call.name)
            self._n_calls += 1
        if given:
            self._deltas.add(self._n_calls - 1, given)
        if call.is_whole:
            self.has_call = self._is_after_call = True
            self._state = self._ignore if self._only_one else self._after if call.is_over else self._rest

    def _rest(self, char: str) -> None:
        """Between the arguments and the end of their object. Models forget the last brace."""
        if self._call.push(char) is None:
            self._state = self._after
            self._after(char)
        elif self._call.is_over:
            self._state = self._after

    def _after(self, char: str) -> None:
        """After a call. Held: whitespace, and the beginning of a closing."""
        syntax = self._syntax
        self._held += char
        tag = self._held.strip(WHITESPACE)
        if tag and tag == self._closing:
            self._held, self._state = "", self._text
        elif tag and tag == syntax.separator:
            self._state = self._before
        elif tag and tag == syntax.bare and syntax.separator:
            self._held = self._held[:-1]
            self._begin_call(char)
        elif (tag and not self._closing.startswith(tag)) or len(self._held) > MAX_GAP:
            held, self._held, self._state = self._held, "", self._text
            for one in held:
                self._state(one)

    def _ignore(self, char: str) -> None:
        pass

    # ------------------------------------------------------------ what is given out

    def _all_held(self) -> str:
        """What is held, which is so no more."""
        held, self._held = self._held + "".join(self._call.pending), ""
        self._call.pending.clear()
        return held

    def _give_up(self, char: str) -> None:
        """What is held is no call, and `char` comes after it."""
        self._state = self._text
        self._say(self._all_held())
        self._text(char)

    def _say(self, text: str) -> None:
        if text:
            self._may_be_bare = self._may_be_bare and not self._syntax.is_first
            self._is_after_call = False
            self._deltas.add("content", text)


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
