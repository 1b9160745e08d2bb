"""The items that a response is computed from, as clients send them and as they are kept -> the messages of a chat."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pyengine.serve import payload
from pyengine.serve.errors import bad_request
from pyengine.serve.fields import STRING, Fields, Kind, Table, hint, needed, one_of, schema_of
from pyengine.serve.messages import ARGUMENTS, CONTENT, call_of

# as the answer that an item may be has them
_OF_ANSWERS: Table = {"id": hint(STRING), "status": hint(one_of("completed", "incomplete", "in_progress"))}
REFERENCE = "item_reference"
_ITEMS: dict[str, Table] = {
    "message": {
        "type": hint(one_of("message")),
        "role": needed(one_of("user", "assistant", "system", "developer")),
        "content": needed(CONTENT),
        **_OF_ANSWERS,
    },
    "function_call": {
        "type": needed(one_of("function_call")),
        "call_id": needed(STRING),
        "name": needed(STRING),
        "arguments": needed(ARGUMENTS),
        **_OF_ANSWERS,
    },
    "function_call_output": {
        "type": needed(one_of("function_call_output")),
        "call_id": needed(STRING),
        "output": needed(CONTENT),
        **_OF_ANSWERS,
    },
    REFERENCE: {"type": needed(one_of(REFERENCE)), "id": needed(STRING)},
}
_TYPE = one_of(*_ITEMS, default="message")
_PREFIXES = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_"}


@dataclass(frozen=True, slots=True)
class Item:
    """kind: its type; path: where it stands in the request; given: as it came, without what is null; fields: what is in it."""

    kind: str
    path: str
    given: dict[str, Any]
    fields: Fields

    def kept(self) -> dict[str, Any]:
        """As it is listed: with an id, and the parts of its content."""
        item = {"type": self.kind, "id": payload.new_id(_PREFIXES[self.kind]), "status": "completed", **self.given}
        if isinstance(item.get("content"), str):
            kind = "output_text" if item["role"] == "assistant" else "input_text"
            more: dict[str, Any] = {"annotations": []} if kind == "output_text" else {}
            item["content"] = [{"type": kind, "text": item["content"], **more}]
        return item


def read_item(value: Any, path: str) -> Item:
    """Raises HTTPError."""
    given = {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value
    kind = given.get("type", "message") if isinstance(given, dict) else "message"
    kind = _TYPE.read(kind, f"{path}.type")
    return Item(kind, path, given, Fields(given, _ITEMS[kind], path))


def _read_input(value: Any, path: str) -> list[Item]:
    if isinstance(value, str):
        return [read_item({"role": "user", "content": value}, path)]
    if not isinstance(value, list) or not value:
        raise bad_request(f"{path} must be a string or a list of items that is not empty", path)
    return [read_item(item, f"{path}[{i}]") for i, item in enumerate(value)]


_ITEM_SCHEMA = {"anyOf": [schema_of(table) for table in _ITEMS.values()]}
INPUT = Kind({"anyOf": [{"type": "string"}, {"type": "array", "items": _ITEM_SCHEMA, "minItems": 1}]}, _read_input)


def messages_of(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Messages as templates take them, of items without references. Calls belong to the assistant's message before them;
    results answer calls. Raises HTTPError for one that answers none."""
    messages: list[dict[str, Any]] = []
    call_ids: set[str] = set()
    for item in items:
        fields = item.fields
        if item.kind == "message":
            role = fields.take("role")
            messages.append({"role": "system" if role == "developer" else role, "content": fields.take("content")})
            continue
        call_id = fields.take("call_id")
        if item.kind == "function_call":
            call_ids.add(call_id)
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(call_of(call_id, fields))
        elif call_id in call_ids:
            messages.append({"role": "tool", "tool_call_id": call_id, "content": fields.take("output")})
        else:
            where = f"{item.path}.call_id"
            raise bad_request(f"{where} is {call_id!r}, which no earlier call has", where)
    return messages
