"""The body of a request to /v1/responses -> the chat that it is, and what its answer repeats."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pyengine.sampling import StructuredOutputs
from pyengine.serve import neutral, payload
from pyengine.serve.chat import SCHEMA, ChatCall
from pyengine.serve.effort import REASONING, effort_variables
from pyengine.serve.errors import bad_request
from pyengine.serve.exchange import Exchange
from pyengine.serve.fields import (
    BOOLEAN,
    STRING,
    Fields,
    Kind,
    Table,
    hint,
    map_of,
    needed,
    object_of,
    one_of,
    refused,
    schema_of,
    with_given,
)
from pyengine.serve.messages import ARGUMENTS, CONTENT, call_of
from pyengine.serve.prompts import CALLER, note_user
from pyengine.serve.sampling import SAMPLING, parameter, sampling_params
from pyengine.serve.stream import StreamOptions
from pyengine.serve.tools import FLAT_TOOLS, choice_of, chosen_tools, held_to

if TYPE_CHECKING:
    from pyengine.serve.app import App


@dataclass(frozen=True)
class ResponsesCall:
    """A request that was understood: the chat that it is, and what its answer repeats."""

    chat: ChatCall
    repeated: dict[str, Any]


# -------------------------------------------------------------------- input

_FORMAT: Table = {
    "type": needed(one_of("text", "json_object", "json_schema")),
    "name": STRING,
    "description": STRING,
    "strict": BOOLEAN,  # answers are always held to the schema
    "schema": SCHEMA,
}
# as the answer that an item may be has them
_OF_ANSWERS: Table = {"id": hint(STRING), "status": hint(one_of("completed", "incomplete", "in_progress"))}
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
}
_TYPE = one_of(*_ITEMS, default="message")


def _read_input(value: Any, path: str) -> list[dict[str, Any]]:
    """Messages as templates take them. Calls belong to the assistant's message before them; results answer calls."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise bad_request(f"{path} must be a string or a list of items that is not empty", path)
    messages: list[dict[str, Any]] = []
    call_ids: set[str] = set()
    for i, item in enumerate(value):
        where = f"{path}[{i}]"
        kind = item.get("type") if isinstance(item, dict) else None
        kind = "message" if kind is None else _TYPE.read(kind, f"{where}.type")
        fields = Fields(item, _ITEMS[kind], where)
        if kind == "message":
            role = fields.take("role")
            messages.append({"role": "system" if role == "developer" else role, "content": fields.take("content")})
            continue
        call_id = fields.take("call_id")
        if kind == "function_call":
            call_ids.add(call_id)
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(call_of(call_id, fields))
        elif call_id in call_ids:
            messages.append({"role": "tool", "tool_call_id": call_id, "content": fields.take("output")})
        else:
            raise bad_request(f"{where}.call_id is {call_id!r}, which no earlier call has", f"{where}.call_id")
    return messages


_ITEM_SCHEMA = {"anyOf": [schema_of(table) for table in _ITEMS.values()]}
INPUT = Kind({"anyOf": [{"type": "string"}, {"type": "array", "items": _ITEM_SCHEMA, "minItems": 1}]}, _read_input)
FIELDS: Table = {
    "input": needed(INPUT),
    "instructions": STRING,
    **CALLER,
    **SAMPLING,
    "stream": BOOLEAN,
    "max_output_tokens": parameter("max_tokens"),
    "text": object_of({"format": object_of(_FORMAT), "verbosity": refused("verbosity cannot be chosen", "medium")}),
    "metadata": replace(map_of(STRING), default={}),
    "tools": with_given(FLAT_TOOLS["tools"], default=([], [])),
    "tool_choice": with_given(FLAT_TOOLS["tool_choice"], default=("auto", None)),
    "parallel_tool_calls": FLAT_TOOLS["parallel_tool_calls"],
    **neutral.RESPONSES,
    "priority": neutral.OTHERS["priority"],
    "reasoning": object_of(REASONING),
}

# -------------------------------------------------------------------- parsed


def parse(app: App, exchange: Exchange, fields: Fields) -> ResponsesCall:
    """Every field is honoured or refused by name. Raises HTTPError."""
    model = app.models.get(fields.take("model"))
    messages, instructions = fields.take("input"), fields.take("instructions")
    if instructions is not None:
        messages.insert(0, {"role": "system", "content": instructions})
    given: dict[str, Any] = {}
    if fields.has("max_output_tokens"):
        given["max_tokens"] = fields.take("max_output_tokens")
    text = fields.take("text")
    text_format, wanted = _text_format(None if text is None else text.take("format"))
    given_tools, functions = fields.take("tools")
    given_choice, choice = fields.take("tool_choice")
    is_parallel = fields.take("parallel_tool_calls")
    tools = chosen_tools(functions, choice_of(choice, is_flat=True), model, only_one=not is_parallel)
    wanted = held_to(tools, wanted, fields, model)
    if wanted is not None:
        given["structured_outputs"] = wanted
    metadata, reasoning = fields.take("metadata"), fields.take("reasoning")
    effort = None if reasoning is None else reasoning.take("effort")
    note_user(exchange, fields)
    chat = ChatCall(
        model=model,
        stream=StreamOptions() if fields.take("stream") else None,
        cache_salt=app.cache_salt(exchange, fields),
        messages=messages,
        messages_field="input",
        template_variables=effort_variables(effort, model, "reasoning.effort"),
        tools=tools,
        id=payload.new_id("resp_"),
        params=sampling_params(fields, model, given),
    )
    fields.end()
    repeated = {
        "instructions": instructions,
        "max_output_tokens": chat.params.max_tokens,
        "metadata": metadata,
        "model": model.name,
        "parallel_tool_calls": is_parallel,
        "previous_response_id": None,
        "reasoning": {"effort": effort, "summary": None},
        "store": False,
        "temperature": chat.params.temperature,
        "text": {"format": text_format},
        "tool_choice": given_choice,
        "tools": given_tools,
        "top_p": chat.params.top_p,
        "truncation": "disabled",
    }
    return ResponsesCall(chat, repeated)


def _text_format(given: Fields | None) -> tuple[dict[str, Any], StructuredOutputs | None]:
    """The format as the answer repeats it, and what the output must be. Raises HTTPError."""
    if given is None:
        return {"type": "text"}, None
    kind = given.take("type")
    if kind != "json_schema":
        given.end()
        return {"type": kind}, StructuredOutputs(json_object=True) if kind == "json_object" else None
    for name in ("name", "schema"):
        if not given.has(name):
            given.missing(name)
    wanted = given.take("schema")
    repeated = {name: given.take(name) for name in ("name", "description", "strict")}
    return {"type": kind, **repeated, "schema": wanted.json}, wanted
