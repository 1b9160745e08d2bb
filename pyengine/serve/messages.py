"""The messages of a chat, as clients send them -> as templates take them."""

from __future__ import annotations

from typing import Any

from pyengine.serve.errors import bad_request
from pyengine.serve.fields import Fields

_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text")


def chat_messages(fields: Fields, name: str = "messages") -> list[dict[str, Any]]:
    """Checked messages. Raises HTTPError with the path to what is wrong."""
    values = fields.list_(name)
    if values is None:
        fields.missing(name)
    if not values:
        raise bad_request(f"{name} is empty", fields.path(name))
    messages: list[dict[str, Any]] = []
    open_calls: set[str] = set()
    for i, value in enumerate(values):
        message = Fields(value, f"{fields.path(name)}[{i}]")
        messages.append(_message(message, open_calls))
        message.end()
    return messages


def _message(message: Fields, open_calls: set[str]) -> dict[str, Any]:
    role = message.one_of("role", *_ROLES)
    if role is None:
        message.missing("role")
    out: dict[str, Any] = {"role": "system" if role == "developer" else role}
    speaker = message.string("name")
    if speaker is not None:
        out["name"] = speaker
    if role == "assistant":
        message.refuse("refusal", "refusals are not rendered")
        message.refuse("annotations", "annotations are not rendered", [])
        message.refuse("audio", "this server has no audio")
        message.refuse("function_call", "use tool_calls")
        calls = _tool_calls(message)
        if calls:
            out["tool_calls"] = calls
            open_calls.update(call["id"] for call in calls)
    if role == "tool":
        call_id = message.required_string("tool_call_id")
        if call_id not in open_calls:
            path = message.path("tool_call_id")
            raise bad_request(f"{path} is {call_id!r}, which no earlier message's tool_calls has", path)
        out["tool_call_id"] = call_id
    content = text_content(message)
    if content is None and not out.get("tool_calls"):
        message.missing("content")
    out["content"] = content or ""
    return out


def text_content(message: Fields) -> str | None:
    """Its content: a string, or parts of text, joined."""
    value = message.take("content")
    path = message.path("content")
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad_request(f"{path} must be a string or a list of parts", path)
    texts = []
    for i, item in enumerate(value):
        part = Fields(item, f"{path}[{i}]")
        kind = part.required_string("type")
        if kind not in _TEXT_PARTS:
            where = part.path("type")
            raise bad_request(
                f"{where} is {kind!r}: models of this server read text only", where, "unsupported_content"
            )
        texts.append(part.required_string("text"))
        part.refuse("annotations", "annotations are not rendered", [])
        part.refuse("logprobs", "log-probabilities are not rendered", [])
        part.end()
    return "".join(texts)


def _tool_calls(message: Fields) -> list[dict[str, Any]]:
    from pyengine.serve.fields import parse_json

    calls = []
    for i, value in enumerate(message.list_("tool_calls") or []):
        call = Fields(value, f"{message.path('tool_calls')}[{i}]")
        call.one_of("type", "function", default="function")
        call.integer("index")  # streamed calls have one; their order is that of the list
        function = call.object_("function")
        if function is None:
            call.missing("function")
        arguments = function.string("arguments", "{}") or "{}"
        try:  # templates write the arguments as JSON themselves
            parsed = parse_json(arguments.encode("utf-8", "replace"))
        except Exception:
            path = function.path("arguments")
            raise bad_request(f"{path} is not JSON", path) from None
        entry = {"name": function.required_string("name"), "arguments": parsed}
        calls.append({"id": call.required_string("id"), "type": "function", "function": entry})
        function.end()
        call.end()
    return calls
