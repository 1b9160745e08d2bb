"""What callers give to a chat template, as plain data: JSON's types and nothing else, of bounded size and depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from pyengine.arguments import shown
from pyengine.errors import InvalidArgumentError

MAX_SIZE = 1 << 22  # characters and items of a conversation, tools and variables included
MAX_DEPTH = 64
MAX_INTEGER = 1 << 63


def plain_messages(messages: object) -> list[dict[str, Any]]:
    """A copy of messages ({"role": ..., "content": ...}, ...) in which content is text, null or data of the template's own.

    Content in parts, as OpenAI's interface has it ([{"type": "text", "text": ...}, ...]), becomes its text, a line a part.
    Raises InvalidArgumentError for what is no message, and for parts that are not text, by their type."""
    if isinstance(messages, (str, bytes, bytearray, memoryview)) or not isinstance(messages, Sequence):
        raise InvalidArgumentError(f"messages must be a list of {{'role': ..., 'content': ...}}, not {shown(messages)}")
    checked = [_message(message) for message in messages]
    if not checked:
        raise InvalidArgumentError("messages is empty")
    copies: list[dict[str, Any]] = plain_data(checked, "messages")
    return copies


def _message(message: object) -> dict[Any, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidArgumentError(f"a message must be a mapping with a string 'role', not {shown(message)}")
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        return {**message, "content": "\n".join(map(_text_of, content))}
    if content is not None and not isinstance(content, (str, Mapping)):
        raise InvalidArgumentError(
            f"the content of a message must be text or a list of text parts, not {shown(content)}"
        )
    return dict(message)


def _text_of(part: object) -> str:
    """The text of one part of a content."""
    if not isinstance(part, Mapping):
        raise InvalidArgumentError(f"a part of a message's content must be a mapping with a 'type', not {shown(part)}")
    kind, text = part.get("type"), part.get("text")
    if kind != "text":
        raise InvalidArgumentError(f"content parts of type {shown(kind)} are not supported: this model reads text")
    if not isinstance(text, str):
        raise InvalidArgumentError(f"a content part of type 'text' needs a string 'text', not {shown(text)}")
    return text


class _Budget:
    def __init__(self, what: str) -> None:
        self._what = what
        self._left = MAX_SIZE

    def take(self, n: int) -> None:
        self._left -= n
        if self._left < 0:
            raise InvalidArgumentError(f"{self._what} hold more than {MAX_SIZE} characters and items")


def plain_data(value: object, what: str) -> Any:
    """A copy of `value` in JSON's types: tuples become lists, NumPy's numbers Python's. Raises InvalidArgumentError for anything
    else, for more than MAX_SIZE characters and items, and for nesting (cycles too) deeper than MAX_DEPTH."""
    return _copy(value, what, _Budget(what), MAX_DEPTH)


def _copy(value: object, what: str, budget: _Budget, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        budget.take(1)
        return value
    if isinstance(value, str):
        budget.take(1 + len(value))
        return str(value)
    if isinstance(value, Integral):
        budget.take(1)
        if not -MAX_INTEGER <= int(value) <= MAX_INTEGER:
            raise InvalidArgumentError(f"{what} hold an integer that is too large: {shown(value)}")
        return int(value)
    if isinstance(value, Real):
        budget.take(1)
        return float(value)
    if depth == 0:
        raise InvalidArgumentError(f"{what} are nested deeper than {MAX_DEPTH}")
    if isinstance(value, Mapping):
        copy = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidArgumentError(f"{what} hold the key {shown(key)}, which is no string")
            budget.take(1 + len(key))
            copy[str(key)] = _copy(item, what, budget, depth - 1)
        return copy
    if isinstance(value, (list, tuple)):
        budget.take(1)
        return [_copy(item, what, budget, depth - 1) for item in value]
    raise InvalidArgumentError(f"{what} hold {shown(value)}, which is neither text nor a number, a list or a mapping")
