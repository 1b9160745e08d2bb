"""JSON from strangers, field by field: each is honoured, or refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

from pyengine.serve.errors import bad_request

MAX_DEPTH = 64  # of nested lists and objects


def parse_json(body: bytes) -> Any:
    """Strict JSON: UTF-8, no key twice in one object, no NaN, bounded depth. Raises HTTPError 400."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise bad_request(f"the body is not JSON that we read: {error}") from None
    _check_depth(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise bad_request(f"the body has the key {name!r} twice in one object", name)
            seen.add(name)
    return out


def _no_constant(name: str) -> NoReturn:
    raise bad_request(f"the body is not JSON: {name} is no number")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise bad_request(f"the body is nested more than {MAX_DEPTH} levels deep")
        level = [
            item
            for one in level
            if isinstance(one, (dict, list))
            for item in (one.values() if isinstance(one, dict) else one)
        ]


class Fields:
    """An object's fields, taken one by one; `end` refuses what nobody took. null is the same as absent."""

    def __init__(self, value: Any, path: str = "") -> None:
        if not isinstance(value, dict):
            raise bad_request(f"{path or 'the body'} must be an object, not {_kind(value)}", path or None)
        self._left = {name: item for name, item in value.items() if item is not None}
        self._path = path

    def path(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def has(self, name: str) -> bool:
        return name in self._left

    def names(self) -> list[str]:
        return list(self._left)

    def take(self, name: str) -> Any:
        """The value as it came, None if there is none."""
        return self._left.pop(name, None)

    def _typed(self, name: str, kind: type | tuple[type, ...], words: str, default: Any) -> Any:
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise bad_request(f"{self.path(name)} must be {words}, not {_kind(value)}", self.path(name))
        return value

    def string(self, name: str, default: str | None = None) -> str | None:
        value: str | None = self._typed(name, str, "a string", default)
        return value

    def required_string(self, name: str) -> str:
        value = self.string(name)
        return self.missing(name) if value is None else value

    def boolean(self, name: str, default: bool = False) -> bool:
        return bool(self._typed(name, bool, "true or false", default))

    def integer(self, name: str, default: int | None = None, *, least: int | None = None) -> int | None:
        value: int | None = self._typed(name, int, "an integer", default)
        if value is not None and least is not None and value < least:
            raise bad_request(f"{self.path(name)} is {value}, expected at least {least}", self.path(name))
        return value

    def list_(self, name: str) -> list[Any] | None:
        value: list[Any] | None = self._typed(name, list, "a list", None)
        return value

    def object_(self, name: str) -> Fields | None:
        return Fields(self._left.pop(name), self.path(name)) if name in self._left else None

    def one_of(self, name: str, *values: Any, default: Any = None) -> Any:
        value = self._left.pop(name, default)
        if value not in values and value != default:
            allowed = ", ".join(map(json.dumps, values))
            raise bad_request(f"{self.path(name)} is {_shown(value)}, supported: {allowed}", self.path(name))
        return value

    def refuse(self, name: str, why: str, *neutral: Any) -> None:
        """A field that we know and do not support, unless its value asks for nothing."""
        value = self._left.pop(name, None)
        if value is not None and not any(
            value is item or (value == item and type(value) is type(item)) for item in neutral
        ):
            raise bad_request(f"{self.path(name)} is not supported: {why}", self.path(name), "unsupported_parameter")

    def missing(self, name: str) -> NoReturn:
        raise bad_request(f"you must provide {self.path(name)}", self.path(name), "missing_required_parameter")

    def check(self, name: str, function: Callable[[Any], Any]) -> Any:
        """function(value), with its ValueErrors and TypeErrors told of this field; None if there is none."""
        value = self._left.pop(name, None)
        if value is None:
            return None
        try:
            return function(value)
        except (ValueError, TypeError) as error:
            raise bad_request(f"{self.path(name)}: {error}", self.path(name)) from None

    def end(self) -> None:
        for name in self._left:
            raise bad_request(f"unknown field {self.path(name)!r}", self.path(name), "unknown_parameter")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:100] + "…"
