"""The body of a request to /v1/messages, Anthropic's form of a chat -> the chat that it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pyengine.serve import payload
from pyengine.serve.chat import ChatCall
from pyengine.serve.effort import effort_variables
from pyengine.serve.errors import bad_request
from pyengine.serve.exchange import Exchange
from pyengine.serve.fields import (
    ANYTHING,
    BOOLEAN,
    OBJECT,
    STRING,
    Fields,
    Kind,
    Table,
    hint,
    kind_of,
    list_of,
    map_of,
    needed,
    object_of,
    one_of,
    refused,
    schema_of,
)
from pyengine.serve.prompts import CALLER, note_user
from pyengine.serve.sampling import SAMPLING, SCHEMA, Asked, parameter, sampling_params
from pyengine.serve.stream import StreamOptions
from pyengine.serve.tools import NAME, PARAMETERS, Choice, Tools, chosen_tools, held_to

if TYPE_CHECKING:
    from pyengine.serve.app import App
    from pyengine.serve.models import ServedModel

# -------------------------------------------------------------------- content

_CACHED: Table = {"cache_control": hint(map_of(ANYTHING))}  # what is computed of a prompt is kept without being told to
_TEXT: Table = {
    "type": needed(one_of("text")),
    "text": needed(STRING),
    "citations": refused("citations are not rendered", []),
    **_CACHED,
}
_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": schema_of(_TEXT)}]}


def _read_block(value: Any, blocks: dict[str, Table], path: str) -> tuple[str, Fields]:
    """(its type, its fields)."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in blocks:
        text = f"{path}.type is {kind[:100]!r}, which has no place here; supported: {', '.join(blocks)}"
        raise bad_request(text, f"{path}.type", "unsupported_content")
    known = kind if isinstance(kind, str) else next(iter(blocks))
    return known, Fields(value, blocks[known], path)


def _read_blocks(value: Any, blocks: dict[str, Table], path: str) -> Iterator[tuple[str, Fields]]:
    if isinstance(value, str):
        value = [{"type": "text", "text": value}]
        yield from (("text", Fields(one, _TEXT, path)) for one in value)
        return
    if not isinstance(value, list):
        raise bad_request(f"{path} must be a string or a list of blocks, not {kind_of(value)}", path)
    for i, item in enumerate(value):
        yield _read_block(item, blocks, f"{path}[{i}]")


def _read_texts(value: Any, path: str) -> str:
    return "".join(fields.take("text") for _, fields in _read_blocks(value, {"text": _TEXT}, path))


_TEXT_CONTENT = Kind(_TEXTS, _read_texts)
_TOOL_USE: Table = {
    "type": needed(one_of("tool_use")),
    "id": needed(STRING),
    "name": needed(STRING),
    "input": needed(OBJECT),
    "caller": refused("tools are called by the model itself", {"type": "direct"}),
    "toolset_name": refused("there are no toolsets"),
    **_CACHED,
}
_TOOL_RESULT: Table = {
    "type": needed(one_of("tool_result")),
    "tool_use_id": needed(STRING),
    "content": _TEXT_CONTENT,
    "is_error": hint(BOOLEAN),  # templates know results only; its content says so
    "toolset_name": refused("there are no toolsets"),
    **_CACHED,
}
_BY_ROLE: dict[str, dict[str, Table]] = {
    "user": {"text": _TEXT, "tool_result": _TOOL_RESULT},
    "assistant": {"text": _TEXT, "tool_use": _TOOL_USE},
    "system": {"text": _TEXT},
}
_ROLE = one_of(*_BY_ROLE)


def _content_schema(blocks: dict[str, Table]) -> dict[str, Any]:
    items = {"anyOf": [schema_of(table) for table in blocks.values()]}
    return {"anyOf": [{"type": "string"}, {"type": "array", "items": items}]}


def _message_table(role: str) -> Table:
    content = Kind(_content_schema(_BY_ROLE[role]), lambda value, path: list(_read_blocks(value, _BY_ROLE[role], path)))
    return {"role": needed(one_of(role)), "content": needed(content)}


_MESSAGES = {role: _message_table(role) for role in _BY_ROLE}


@dataclass(frozen=True, slots=True)
class Said:
    """A message: who says it, and its blocks, (type, fields) of each."""

    role: str
    blocks: list[tuple[str, Fields]]


def _read_message(value: Any, path: str) -> Said:
    if not isinstance(value, dict):
        raise bad_request(f"{path} must be an object, not {kind_of(value)}", path)
    if value.get("role") is None:
        raise bad_request(f"you must provide {path}.role", f"{path}.role", "missing_required_parameter")
    role = _ROLE.read(value["role"], f"{path}.role")
    return Said(role, Fields(value, _MESSAGES[role], path).take("content"))


MESSAGES = list_of(Kind({"anyOf": [schema_of(table) for table in _MESSAGES.values()]}, _read_message), least=1)


def messages_of(said: list[Said]) -> list[dict[str, Any]]:
    """As templates take them: results of calls are messages of their own. Raises HTTPError for one that answers no call."""
    messages: list[dict[str, Any]] = []
    call_ids: set[str] = set()
    for message in said:
        texts: list[str] = []
        calls: list[dict[str, Any]] = []
        for kind, fields in message.blocks:
            if kind == "text":
                texts.append(fields.take("text"))
            elif kind == "tool_use":
                function = {"name": fields.take("name"), "arguments": fields.take("input")}
                calls.append({"id": fields.take("id"), "type": "function", "function": function})
                call_ids.add(calls[-1]["id"])
            else:
                messages += _spoken(message.role, texts)
                messages.append(_result_of(fields, call_ids))
        if calls or message.role != "user":
            more = {"tool_calls": calls} if calls else {}
            messages.append({"role": message.role, "content": "".join(texts), **more})
        else:
            messages += _spoken(message.role, texts)
    return messages


def _spoken(role: str, texts: list[str]) -> list[dict[str, Any]]:
    """A message of the texts so far, which are taken, if there are any."""
    text = "".join(texts)
    is_there = bool(texts)
    texts.clear()
    return [{"role": role, "content": text}] if is_there else []


def _result_of(fields: Fields, call_ids: set[str]) -> dict[str, Any]:
    id_ = fields.take("tool_use_id")
    if id_ not in call_ids:
        where = fields.path("tool_use_id")
        raise bad_request(f"{where} is {id_!r}, which no earlier tool_use has", where)
    return {"role": "tool", "tool_call_id": id_, "content": fields.take("content") or ""}


# -------------------------------------------------------------------- tools

_TOOL: Table = {
    "type": one_of("custom"),
    "name": needed(NAME),
    "description": replace(STRING, default=""),
    "input_schema": needed(PARAMETERS),
    "strict": hint(BOOLEAN),  # arguments of a forced call are always held to the schema, those of others never
    "eager_input_streaming": hint(BOOLEAN),  # they are always streamed
    "allowed_callers": refused("tools are called by the model itself", ["direct"]),
    "defer_loading": refused("the model is told of all tools", False),
    "input_examples": refused("templates show no examples", []),
    **_CACHED,
}
_ALONE: Table = {"disable_parallel_tool_use": BOOLEAN}
_CHOICES: dict[str, Table] = {
    kind: {"type": needed(one_of(kind)), **more}
    for kind, more in (("auto", _ALONE), ("any", _ALONE), ("tool", {"name": needed(STRING), **_ALONE}), ("none", {}))
}
_CHOICE_TYPE: Table = {"type": needed(one_of(*_CHOICES))}


def _read_choice(value: Any, path: str) -> tuple[Choice, bool]:
    """What it says, and whether calls come one at a time."""
    kind = Fields({"type": value.get("type")} if isinstance(value, dict) else value, _CHOICE_TYPE, path).take("type")
    fields = Fields(value, _CHOICES[kind], path)
    only_one = kind != "none" and fields.take("disable_parallel_tool_use")
    if kind == "tool":
        return Choice("required", [fields], True), only_one
    return Choice("required" if kind == "any" else kind), only_one


_CHOICE = Kind({"anyOf": [schema_of(table) for table in _CHOICES.values()]}, _read_choice, default=(Choice(), False))

# -------------------------------------------------------------------- fields

_FORMAT: Table = {"type": needed(one_of("json_schema")), "schema": needed(SCHEMA)}
_CONVERSATION: Table = {
    "messages": needed(MESSAGES),
    "system": _TEXT_CONTENT,
    "tools": list_of(object_of(_TOOL)),
    "tool_choice": _CHOICE,
    "thinking": object_of(
        {
            "type": needed(one_of("disabled", "adaptive")),
            "budget_tokens": refused("max_tokens is all that a model thinks and says"),
            "display": hint(one_of("summarized", "omitted")),
        }
    ),
    "output_config": object_of(
        {"format": object_of(_FORMAT), "effort": one_of("low", "medium", "high", "xhigh", "max")}
    ),
    **_CACHED,
    "speed": refused("there is one speed", "standard"),
    "user_profile_id": hint(STRING),
    "workspace_id": hint(STRING),
}
COUNT: Table = {"model": STRING, **_CONVERSATION}
FIELDS: Table = {
    **CALLER,
    **SAMPLING,
    **_CONVERSATION,
    "max_tokens": parameter("max_tokens"),
    "stop_sequences": parameter("stop"),
    "stream": BOOLEAN,
    "metadata": object_of({"user_id": STRING}),
    "n": refused("an answer is one message", 1),
    "stop": refused("use stop_sequences"),
    "service_tier": refused("there is one tier", "auto", "standard_only"),
    "container": refused("there are no containers"),
    "mcp_servers": refused("tools are called by whoever reads the answer", []),
    "context_management": refused("conversations are not cut", {}, {"edits": []}),
    "diagnostics": refused("there are no diagnostics"),
    "inference_geo": refused("it is computed where the server is"),
}

# -------------------------------------------------------------------- parsed


@dataclass(frozen=True)
class Conversation:
    """What a request says and what its answer may be, without how to sample it."""

    messages: list[dict[str, Any]]
    tools: Tools | None
    variables: dict[str, Any]
    asked: Asked


def conversation(fields: Fields, model: ServedModel) -> Conversation:
    """Raises HTTPError."""
    messages, system = messages_of(fields.take("messages")), fields.take("system")
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    choice, only_one = fields.take("tool_choice")
    tools = chosen_tools(fields.take("tools") or [], choice, model, only_one=only_one, parameters="input_schema")
    thinking, config = fields.take("thinking"), fields.take("output_config")
    effort, asked = None, []
    if config is not None:
        effort, wanted = config.take("effort"), config.take("format")
        if wanted is not None:
            asked.append((wanted.path("schema"), wanted.take("schema")))
    variables = effort_variables(effort, model, "output_config.effort")
    if thinking is not None and thinking.take("type") == "disabled":
        variables |= effort_variables("none", model, "thinking")
    return Conversation(messages, tools, variables, asked)


def parse(app: App, exchange: Exchange, fields: Fields) -> ChatCall:
    """Every field is honoured or refused by name. Raises HTTPError."""
    model = app.models.get(fields.take("model"))
    said = conversation(fields, model)
    given: dict[str, Any] = {}
    for name, parameter_name in (("max_tokens", "max_tokens"), ("stop_sequences", "stop")):
        if fields.has(name):
            given[parameter_name] = fields.take(name)
    wanted, asked = held_to(said.tools, said.asked, fields, model)
    if wanted is not None:
        given["structured_outputs"] = wanted
    note_user(exchange, fields)
    metadata = fields.take("metadata")
    if metadata is not None and metadata.has("user_id"):
        exchange.notes["user"] = metadata.take("user_id")[:64]
    call = ChatCall(
        model=model,
        stream=StreamOptions() if fields.take("stream") else None,
        cache_salt=app.cache_salt(exchange, fields),
        messages=said.messages,
        ending=ending_of(said.messages),
        template_variables=said.variables,
        tools=said.tools,
        asked=asked,
        id=payload.new_id("msg_"),
        params=sampling_params(fields, model, given),
    )
    fields.end()
    return call


def ending_of(messages: list[dict[str, Any]]) -> dict[str, bool]:
    """An answer goes on with a last message of the assistant's, as Anthropic's does."""
    last = messages[-1] if messages else {"role": "user"}
    return {"continue_final_message": last["role"] == "assistant" and "tool_calls" not in last}
