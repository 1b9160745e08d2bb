"""The body of a request to /api/chat or /api/generate, ollama's forms of a chat and of a text -> what it asks for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pyengine.arguments import INT32_MAX
from pyengine.sampling import StructuredOutputs
from pyengine.serve.answer import Call
from pyengine.serve.anthropic_fields import ending_of
from pyengine.serve.chat import ChatCall
from pyengine.serve.completions import CompletionCall
from pyengine.serve.effort import EFFORT, effort_variables
from pyengine.serve.errors import bad_request
from pyengine.serve.fields import (
    BOOLEAN,
    NUMBER,
    OBJECT,
    STRING,
    TRUE,
    Fields,
    Kind,
    Table,
    hint,
    integer,
    list_of,
    needed,
    object_of,
    one_of,
    refused,
)
from pyengine.serve.prompts import CALLER, TEXTS, note_user
from pyengine.serve.sampling import SAMPLING, SCHEMA, sampling_params
from pyengine.serve.stream import StreamOptions
from pyengine.serve.tools import TOOLS, Choice, Tools, chosen_tools, held_to

if TYPE_CHECKING:
    from pyengine.serve.app import App
    from pyengine.serve.exchange import Exchange
    from pyengine.serve.models import Models, ServedModel

# -------------------------------------------------------------------- options


def _read_duration(value: Any, path: str) -> Any:
    """ "5m", or seconds."""
    return value if isinstance(value, str) else NUMBER.read(value, path)


_NUMBER = hint(NUMBER)
# How ollama computes and keeps; here a model has its context, and no option of these changes a byte.
_OF_THE_RUNNER: Table = {
    **dict.fromkeys(
        ("num_ctx", "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict"), _NUMBER
    ),
    **dict.fromkeys(("numa", "low_vram", "f16_kv", "use_mmap", "use_mlock", "vocab_only", "logits_all"), hint(BOOLEAN)),
}


_OPTIONS: Table = {
    **SAMPLING,
    "n": refused("an answer is one message", 1),
    "num_predict": integer(-2, INT32_MAX),  # negative: as many as the context holds
    "mirostat": refused("there is no mirostat", 0),
    **dict.fromkeys(("mirostat_tau", "mirostat_eta"), _NUMBER),
    "tfs_z": refused("there is no tail-free sampling", 1, 1.0),
    "penalize_newline": refused("penalties are for all tokens", True),
    **_OF_THE_RUNNER,
}


def _read_options(value: Any, path: str) -> Fields:
    fields = Fields(value, _OPTIONS, path)
    if fields.has("num_predict") and fields.peek("num_predict") == 0:
        raise bad_request(f"{path}.num_predict is 0, which asks for nothing", f"{path}.num_predict")
    return fields


# -------------------------------------------------------------------- fields


def _read_format(value: Any, path: str) -> StructuredOutputs | None:
    if value == "":
        return None
    if isinstance(value, str) and value != "json":
        raise bad_request(f'{path} must be "json" or a JSON schema', path)
    wanted: StructuredOutputs = StructuredOutputs(json_object=True) if value == "json" else SCHEMA.read(value, path)
    return wanted


def _read_thinking(value: Any, path: str) -> str:
    """As an effort."""
    if isinstance(value, bool):
        return "medium" if value else "none"
    effort: str = EFFORT.read(value, path)
    return effort


_COMMON: Table = {
    **CALLER,
    "stream": TRUE,
    "format": Kind({"anyOf": [{"enum": ["", "json"]}, {"type": "object"}]}, _read_format),
    "options": replace(object_of(_OPTIONS), read=_read_options),
    "think": Kind({"anyOf": [{"type": "boolean"}, EFFORT.schema]}, _read_thinking),
    # a model is there as long as the server
    "keep_alive": hint(Kind({"anyOf": [STRING.schema, _NUMBER.schema]}, _read_duration)),
    "logprobs": refused("use /v1/chat/completions", False),
    "top_logprobs": refused("use /v1/chat/completions", 0),
    "truncate": refused("conversations are not cut", False),
    "shift": refused("conversations are not cut", False),
}
_NO_IMAGES = refused("models of this server read text only", [])
_CALLED: Table = {
    "name": needed(STRING),
    "arguments": needed(OBJECT),
    "index": hint(integer()),
    "description": hint(STRING),
}
_CALL: Table = {"id": STRING, "type": one_of("function"), "function": needed(object_of(_CALLED))}
_MESSAGE: Table = {
    "role": needed(one_of("system", "user", "assistant", "tool")),
    "content": replace(STRING, default=""),
    "images": _NO_IMAGES,
    "thinking": refused("thoughts are not rendered", ""),
    "tool_calls": list_of(object_of(_CALL)),
    "tool_name": STRING,
    "tool_call_id": STRING,
}
CHAT: Table = {"messages": list_of(object_of(_MESSAGE)), "tools": TOOLS["tools"], **_COMMON}
GENERATE: Table = {
    "prompt": replace(STRING, default=""),
    "system": STRING,
    "raw": BOOLEAN,
    "images": _NO_IMAGES,
    "suffix": STRING,
    "template": refused("a model has its own template; use raw", ""),
    "context": refused("use /api/chat to go on", []),
    **_COMMON,
}
EMBED: Table = {
    **CALLER,
    "input": needed(TEXTS),
    "dimensions": integer(1),
    "truncate": refused("texts are not cut", False),
    "keep_alive": _COMMON["keep_alive"],
    "options": object_of(_OF_THE_RUNNER),
}
SHOW: Table = {
    "model": STRING,
    "name": STRING,
    "verbose": hint(BOOLEAN),
    "system": refused("there are no modelfiles", ""),
}


# -------------------------------------------------------------------- parsed


def model_of(models: Models, name: str | None) -> ServedModel:
    """ollama's clients write the tag that a name without one has. Raises HTTPError."""
    if name is not None and name not in models.names():
        name = name.removesuffix(":latest")
    return models.get(name)


class _Unanswered:
    """The calls that have no result yet, in their order; each is found in a time that does not depend on how many there are."""

    def __init__(self) -> None:
        self._tools: OrderedDict[str, str] = OrderedDict()  # {id of a call: name of its tool}
        self._ids: dict[str, OrderedDict[str, None]] = {}  # {name of a tool: ids of its calls}

    def add(self, id_: str, tool: str) -> None:
        if id_ in self._tools:
            self._drop(id_)
        self._tools[id_] = tool
        self._ids.setdefault(tool, OrderedDict())[id_] = None

    def take(self, id_: str | None, tool: str | None) -> tuple[str, str] | None:
        """(id, tool) of the first one with this id and tool, of each that is given. It waits no longer."""
        if id_ is None:
            id_ = next(iter(self._tools if tool is None else self._ids.get(tool, ())), None)
        if id_ is None or id_ not in self._tools or tool not in (None, self._tools[id_]):
            return None
        return id_, self._drop(id_)

    def _drop(self, id_: str) -> str:
        tool = self._tools.pop(id_)
        del self._ids[tool][id_]
        return tool


def messages_of(given: list[Fields]) -> list[dict[str, Any]]:
    """As templates take them. A result that does not say which call it answers is that of the first one, of its tool if it names
    one, that has none yet. Raises HTTPError."""
    messages: list[dict[str, Any]] = []
    unanswered = _Unanswered()
    for fields in given:
        message = {"role": fields.take("role"), "content": fields.take("content")}
        calls, id_, tool = fields.take("tool_calls"), fields.take("tool_call_id"), fields.take("tool_name")
        if message["role"] == "assistant" and calls:
            message["tool_calls"] = [_call(call, f"call_{len(messages)}_{i}") for i, call in enumerate(calls)]
            for call in message["tool_calls"]:
                unanswered.add(call["id"], call["function"]["name"])
        elif calls:
            raise bad_request(f"{fields.path('tool_calls')} are the assistant's", fields.path("tool_calls"))
        if message["role"] == "tool":
            found = unanswered.take(id_, tool)
            if found is None:
                raise bad_request(f'{fields.path("role")} is "tool", and no call waits for it', fields.path("role"))
            message["tool_call_id"], message["name"] = found
        messages.append(message)
    return messages


def _call(call: Fields, id_: str) -> dict[str, Any]:
    function = call.take("function")
    called = {"name": function.take("name"), "arguments": function.take("arguments")}
    return {"id": call.take("id") or id_, "type": "function", "function": called}


def parse_chat(app: App, exchange: Exchange, fields: Fields) -> tuple[ServedModel, Call | None]:
    """(the model, the chat); None without a message: such a request loads a model. Raises HTTPError."""
    model = model_of(app.models, fields.take("model"))
    messages = messages_of(fields.take("messages") or [])
    functions = [one.take("function") for one in fields.take("tools") or ()]
    if functions and model.call_syntax is None:
        why = "its chat template shows none, or writes calls in a format that is not read here"
        text = f"tools are not supported by {model.name}: {why}; /v1/chat/completions can force calls"
        raise bad_request(text, "tools", "unsupported_parameter")
    tools = chosen_tools(functions, Choice(), model, only_one=False)
    make = _chat(messages, "messages", fields, model)
    return model, _parsed(app, exchange, fields, model, tools, make) if messages else None


def parse_generate(app: App, exchange: Exchange, fields: Fields) -> tuple[ServedModel, Call | None]:
    """As parse_chat, of a prompt: a chat of one message, or with `raw` the text itself, or with a suffix what fills the hole."""
    model = model_of(app.models, fields.take("model"))
    prompt, system = fields.take("prompt"), fields.take("system")
    is_raw, suffix = fields.take("raw"), fields.take("suffix") or None
    if is_raw or suffix:
        for name, value in (("system", system), ("think", fields.take("think") not in (None, "none"))):
            if value:
                raise bad_request(f"{name} goes into a template, and {'raw' if is_raw else 'suffix'} uses none", name)

        def make(**common: Any) -> Call:
            return CompletionCall(prompts=[prompt], suffix=suffix, **common)

    else:
        said = [{"role": "system", "content": system}] if system else []
        make = _chat([*said, {"role": "user", "content": prompt}], "prompt", fields, model)
    return model, _parsed(app, exchange, fields, model, None, make) if prompt or suffix else None


def _chat(messages: list[dict[str, Any]], name: str, fields: Fields, model: ServedModel) -> Callable[..., Call]:
    variables = effort_variables(fields.take("think"), model, "think")

    def make(*, tools: Tools | None = None, **common: Any) -> Call:
        return ChatCall(
            messages=messages,
            messages_field=name,
            ending=ending_of(messages),
            template_variables=variables,
            tools=tools,
            **common,
        )

    return make


def _parsed(
    app: App, exchange: Exchange, fields: Fields, model: ServedModel, tools: Tools | None, make: Callable[..., Call]
) -> Call:
    """Every field is honoured or refused by name. Raises HTTPError."""
    options = fields.take("options") or Fields({}, _OPTIONS, "options")
    wanted = fields.take("format")
    given: dict[str, Any] = {}
    held, asked = held_to(tools, [("format", wanted)] if wanted is not None else (), options, model)
    if held is not None:
        given["structured_outputs"] = held
    most = options.take("num_predict")
    if most is not None and most > 0:
        given["max_tokens"] = most
    note_user(exchange, fields)
    call = make(
        model=model,
        stream=StreamOptions() if fields.take("stream") else None,
        cache_salt=app.cache_salt(exchange, fields),
        asked=asked,
        params=sampling_params(options, model, given),
        **({} if tools is None else {"tools": tools}),
    )
    options.end()
    fields.end()
    return call
