"""JSON from strangers, field by field: each is honoured, or refused by its name.

What an object may hold is a table, {name of a field: its kind}. The table is read in two ways: `Fields` checks an object against
it, and openapi.py writes it down for clients.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn
from urllib.parse import parse_qsl

from pyengine.serve.errors import bad_request

MAX_DEPTH = 64  # of nested lists and objects


def parse_json(body: bytes) -> Any:
    """Strict JSON: UTF-8, no key twice in one object, finite numbers, bounded depth. Raises HTTPError 400."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise bad_request(f"the body is not JSON that we read: {error}") from None
    _check_values(value)
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


def _check_values(value: Any) -> None:
    """Depth and numbers: Python's reader takes NaN and Infinity, and makes 1e999 infinite."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise bad_request(f"the body is nested more than {MAX_DEPTH} levels deep")
        if not all(math.isfinite(one) for one in level if type(one) is float):
            place = (_way_to_infinity(value, depth) or "").removeprefix(".")
            raise bad_request(f"{place or 'the body'} is not a finite number", place or None)
        level = [
            item
            for one in level
            if isinstance(one, (dict, list))
            for item in (one.values() if isinstance(one, dict) else one)
        ]


def _way_to_infinity(value: Any, levels: int) -> str | None:
    """The path below a value of a number that is none, or is infinite, at most so many levels down; None if there is none. Only
    the path that is the answer is put together: a body may have a long name above a million numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    if levels == 0 or not isinstance(value, (dict, list)):
        return None
    items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
    for step, item in items:
        rest = _way_to_infinity(item, levels - 1)
        if rest is not None:
            return (f".{step}" if isinstance(value, dict) else f"[{step}]") + rest
    return None


@dataclass(frozen=True, slots=True)
class Kind:
    """What a field may be.

    schema      as a JSON schema, for its readers; what it lets through may still be refused
    read        read(value, path) gives the value as the endpoint takes it. Raises HTTPError
    default     if there is none; null is the same as absent
    is_needed   there must be one
    is_dropped  it is checked and has no effect: its value asks for nothing, or is a hint
    """

    schema: dict[str, Any]
    read: Callable[[Any, str], Any]
    default: Any = None
    is_needed: bool = False
    is_dropped: bool = False


Table = Mapping[str, Kind]


class Fields:
    """An object's fields, checked against a table. Raises HTTPError with the path to what is wrong."""

    def __init__(self, value: Any, table: Table, path: str = "") -> None:
        if not isinstance(value, dict):
            raise bad_request(f"{path or 'the body'} must be an object, not {kind_of(value)}", path or None)
        self._path = path
        self._defaults = {name: kind.default for name, kind in table.items()}
        given = {name: item for name, item in value.items() if item is not None}
        for name in given:
            if name not in table:
                near = difflib.get_close_matches(name[:64], table, n=1)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                raise bad_request(f"unknown field {self.path(name)!r}{meant}", self.path(name), "unknown_parameter")
        self._left: dict[str, Any] = {}
        for name, kind in table.items():
            if name in given:
                read = kind.read(given[name], self.path(name))
                if not kind.is_dropped:
                    self._left[name] = read
            elif kind.is_needed:
                self.missing(name)

    def path(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def has(self, name: str) -> bool:
        return name in self._left

    def peek(self, name: str) -> Any:
        """The value of a field that is there; it is still to be taken."""
        return self._left[name]

    def take(self, name: str) -> Any:
        """The value, its kind's default if there is none."""
        default = self._defaults[name]
        return self._left.pop(name, default)

    def missing(self, name: str) -> NoReturn:
        raise bad_request(f"you must provide {self.path(name)}", self.path(name), "missing_required_parameter")

    def end(self) -> None:
        """Everything must have been taken by now: nothing is ignored in silence."""
        for name in self._left:
            raise bad_request(f"{self.path(name)} has no place here", self.path(name), "unsupported_parameter")


def query_fields(query: str, table: Table) -> Fields:
    """What stands in a query, "a=b&c=d", checked as a body is: a field that may be a list is one, of what it is given as. Raises
    HTTPError."""
    given: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name in table and table[name].schema.get("type") == "array":
            given.setdefault(name, []).append(text)
        elif name in given:
            raise bad_request(f"the query has {name[:100]!r} twice", name)
        else:
            given[name] = text
    return Fields(given, table)


def kind_of(value: Any) -> str:
    """What a value of JSON is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


# -------------------------------------------------------------------- kinds


def _typed(kind: type, words: str) -> Callable[[Any, str], Any]:
    def read(value: Any, path: str) -> Any:
        if type(value) is not kind:
            raise bad_request(f"{path} must be {words}, not {kind_of(value)}", path)
        return value

    return read


def _number(value: Any, path: str) -> Any:
    if kind_of(value) != "a number":
        raise bad_request(f"{path} must be a number, not {kind_of(value)}", path)
    return value


NUMBER = Kind({"type": "number"}, _number)
STRING = Kind({"type": "string"}, _typed(str, "a string"))
BOOLEAN = Kind({"type": "boolean"}, _typed(bool, "true or false"), default=False)
TRUE = replace(BOOLEAN, default=True)  # unless it is said to be false


def needed(kind: Kind) -> Kind:
    return replace(kind, is_needed=True)


def hint(kind: Kind) -> Kind:
    """A field that has nothing to act on here."""
    return replace(kind, is_dropped=True)


def integer(least: int | None = None, most: int | None = None) -> Kind:
    is_number = _typed(int, "an integer")

    def read(value: Any, path: str) -> Any:
        if least is not None and is_number(value, path) < least:
            raise bad_request(f"{path} is {value}, expected at least {least}", path)
        if most is not None and is_number(value, path) > most:
            raise bad_request(f"{path} is {value}, expected at most {most}", path)
        return is_number(value, path)

    bounds = {"minimum": least, "maximum": most}
    return Kind({"type": "integer", **{name: bound for name, bound in bounds.items() if bound is not None}}, read)


def one_of(*values: str, default: str | None = None) -> Kind:
    def read(value: Any, path: str) -> Any:
        if value not in values:
            raise bad_request(f"{path} is {_shown(value)}, supported: {', '.join(map(json.dumps, values))}", path)
        return value

    return Kind({"type": "string", "enum": list(values)}, read, default)


def list_of(item: Kind, *, least: int = 0) -> Kind:
    """A list whose items are all of one kind."""
    is_list = _typed(list, "a list")

    def read(value: Any, path: str) -> Any:
        if len(is_list(value, path)) < least:
            raise bad_request(f"{path} is empty", path)
        return [item.read(one, f"{path}[{i}]") for i, one in enumerate(value)]

    schema: dict[str, Any] = {"type": "array", "items": item.schema}
    return Kind(schema | ({"minItems": least} if least else {}), read)


def object_of(table: Table) -> Kind:
    """An object with a table of its own, read as `Fields`."""
    return Kind(schema_of(table), lambda value, path: Fields(value, table, path))


def map_of(item: Kind) -> Kind:
    """An object with any keys, whose values are all of one kind."""

    def read(value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            raise bad_request(f"{path} must be an object, not {kind_of(value)}", path)
        return {name: item.read(one, f"{path}.{name}") for name, one in value.items()}

    return Kind({"type": "object", "additionalProperties": item.schema}, read)


ANYTHING = Kind({}, lambda value, path: value)
OBJECT = map_of(ANYTHING)


def refused(why: str, *neutral: Any) -> Kind:
    """A field that we know and do not support, unless its value asks for nothing."""

    def read(value: Any, path: str) -> Any:
        if not any(value == one and type(value) is type(one) for one in neutral):
            raise bad_request(f"{path} is not supported: {why}", path, "unsupported_parameter")

    return Kind({"enum": list(neutral), "description": f"Not supported: {why}."}, read, is_dropped=True)


def checked(kind: Kind, function: Callable[[Any], Any]) -> Kind:
    """`kind`, whose value function(value) makes of it, with its ValueErrors and TypeErrors told of the field."""

    def read(value: Any, path: str) -> Any:
        try:
            return function(kind.read(value, path))
        except (ValueError, TypeError) as error:
            raise bad_request(f"{path}: {error}", path) from None

    return replace(kind, read=read)


def with_given(kind: Kind, default: tuple[Any, Any]) -> Kind:
    """`kind`, read as (the value as it was given, what `kind` makes of it)."""
    return replace(kind, read=lambda value, path: (value, kind.read(value, path)), default=default)


def schema_of(table: Table) -> dict[str, Any]:
    """A table as the JSON schema of an object. A field that need not be there may be null, and so may one that is not known."""
    properties = {name: kind.schema if kind.is_needed else nullable(kind.schema) for name, kind in table.items()}
    required = [name for name, kind in table.items() if kind.is_needed]
    schema = {"type": "object", "properties": properties, "additionalProperties": {"type": "null"}}
    return schema | ({"required": required} if required else {})


def nullable(schema: dict[str, Any]) -> dict[str, Any]:
    if not schema:
        return schema
    if "enum" in schema:
        types = {"type": [schema["type"], "null"]} if "type" in schema else {}
        return {**schema, **types, "enum": [*schema["enum"], None]}
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:100] + "…"
