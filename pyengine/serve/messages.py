"""The messages of a chat, as clients send them -> as templates take them."""

from __future__ import annotations

from typing import Any

from pyengine.serve.errors import HTTPError, bad_request
from pyengine.serve.fields import (
    BOOLEAN,
    STRING,
    Fields,
    Kind,
    Table,
    hint,
    integer,
    kind_of,
    list_of,
    needed,
    object_of,
    one_of,
    parse_json,
    refused,
    schema_of,
)

# -------------------------------------------------------------------- content

_TEXT_PARTS = ("text", "input_text", "output_text")
_PART: Table = {
    "type": needed(one_of(*_TEXT_PARTS)),
    "text": needed(STRING),
    "annotations": refused("annotations are not rendered", []),
    "logprobs": refused("log-probabilities are not rendered", []),
}


def _read_content(value: Any, path: str) -> str:
    """A string, or parts of text, joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad_request(f"{path} must be a string or a list of parts", path)
    return "".join(_read_part(item, f"{path}[{i}]") for i, item in enumerate(value))


def _read_part(value: Any, path: str) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in _TEXT_PARTS:
        text = f"{path}.type is {kind[:100]!r}: models of this server read text only"
        raise bad_request(text, f"{path}.type", "unsupported_content")
    text = Fields(value, _PART, path).take("text")
    return str(text)


CONTENT = Kind({"anyOf": [{"type": "string"}, {"type": "array", "items": schema_of(_PART)}]}, _read_content)

# -------------------------------------------------------------------- calls


def _read_arguments(value: Any, path: str) -> Any:
    text = STRING.read(value, path) or "{}"
    try:  # templates write the arguments as JSON themselves
        return parse_json(text.encode("utf-8", "replace"))
    except HTTPError:
        raise bad_request(f"{path} is not JSON", path) from None


ARGUMENTS = Kind({"type": "string"}, _read_arguments)
_CALL: Table = {
    "id": needed(STRING),
    "type": one_of("function"),
    "index": hint(integer()),  # streamed calls have one; their order is that of the list
    "function": needed(object_of({"name": needed(STRING), "arguments": ARGUMENTS})),
}


def call_of(id_: str, function: Fields) -> dict[str, Any]:
    """A call of an earlier message, as templates take it; `function` has name and arguments."""
    arguments = function.take("arguments") if function.has("arguments") else {}
    return {"id": id_, "type": "function", "function": {"name": function.take("name"), "arguments": arguments}}


# -------------------------------------------------------------------- messages

_SAID: Table = {"name": STRING, "content": needed(CONTENT)}
_ASSISTANT: Table = {
    "name": STRING,
    "content": CONTENT,
    "tool_calls": list_of(object_of(_CALL)),
    "refusal": refused("refusals are not rendered"),
    "annotations": refused("annotations are not rendered", []),
    "audio": refused("this server has no audio"),
    "function_call": refused("use tool_calls"),
}
# What a message may hold depends on its role.
_BY_ROLE: dict[str, Table] = {
    role: {"role": needed(one_of(role)), **table}
    for role, table in (
        ("system", _SAID),
        ("developer", _SAID),
        ("user", _SAID),
        ("assistant", _ASSISTANT),
        ("tool", {**_SAID, "tool_call_id": needed(STRING)}),
    )
}
_ROLE: Table = {"role": needed(one_of(*_BY_ROLE))}


def _read_message(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad_request(f"{path} must be an object, not {kind_of(value)}", path)
    role = Fields({"role": value.get("role")}, _ROLE, path).take("role")
    fields = Fields(value, _BY_ROLE[role], path)
    out: dict[str, Any] = {"role": "system" if role == "developer" else role}
    if fields.has("name"):
        out["name"] = fields.take("name")
    if role == "assistant":
        calls = fields.take("tool_calls")
        if calls:
            out["tool_calls"] = [call_of(call.take("id"), call.take("function")) for call in calls]
        elif not fields.has("content"):
            fields.missing("content")
    if role == "tool":
        out["tool_call_id"] = fields.take("tool_call_id")
    out["content"] = fields.take("content") or ""
    return out


def _schema_of(role: str) -> dict[str, Any]:
    schema = schema_of(_BY_ROLE[role])
    if role == "assistant":  # it has said something, or called
        calls = {**_ASSISTANT["tool_calls"].schema, "minItems": 1}
        ways = {"content": CONTENT.schema, "tool_calls": calls}
        schema["anyOf"] = [{"properties": {name: way}, "required": [name]} for name, way in ways.items()]
    return schema


MESSAGES = list_of(Kind({"anyOf": [_schema_of(role) for role in _BY_ROLE]}, _read_message), least=1)


# How the rendered conversation ends: with the beginning of an answer, as it is, or inside of its last message.
ENDING: Table = {
    "add_generation_prompt": Kind(BOOLEAN.schema, BOOLEAN.read),  # None: unless the last message goes on
    "continue_final_message": BOOLEAN,
}


def ending_of(fields: Fields, messages: list[dict[str, Any]]) -> dict[str, bool]:
    """As arguments for the template. Raises HTTPError."""
    adds, goes_on = fields.take("add_generation_prompt"), fields.take("continue_final_message")
    if not goes_on:
        return {"add_generation_prompt": adds is not False}
    if adds:
        text = "add_generation_prompt and continue_final_message contradict each other"
        raise bad_request(text, "continue_final_message")
    if messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1]:
        text = "continue_final_message needs a last message of the assistant, of text alone"
        raise bad_request(text, "continue_final_message")
    return {"continue_final_message": True}


def chat_messages(messages: list[dict[str, Any]], path: str = "messages") -> list[dict[str, Any]]:
    """Messages of the kind MESSAGES, as templates take them: results of tools answer calls. Raises HTTPError."""
    open_calls: set[str] = set()
    for i, message in enumerate(messages):
        open_calls.update(call["id"] for call in message.get("tool_calls", ()))
        id_ = message.get("tool_call_id")
        if id_ is not None and id_ not in open_calls:
            where = f"{path}[{i}].tool_call_id"
            raise bad_request(f"{where} is {id_!r}, which no earlier message's tool_calls has", where)
    return messages
