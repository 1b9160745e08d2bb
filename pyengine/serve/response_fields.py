"""The body of a request to /v1/responses -> the chat that it is, and what its answer repeats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pyengine.sampling import StructuredOutputs
from pyengine.serve import neutral, payload
from pyengine.serve.chat import ChatCall
from pyengine.serve.effort import REASONING, effort_variables
from pyengine.serve.errors import HTTPError, bad_request
from pyengine.serve.exchange import Exchange, dumps
from pyengine.serve.fields import (
    BOOLEAN,
    STRING,
    Fields,
    Kind,
    Table,
    map_of,
    needed,
    object_of,
    one_of,
    refused,
    with_given,
)
from pyengine.serve.prompts import CALLER, note_user
from pyengine.serve.response_input import INPUT, REFERENCE, Item, messages_of, read_item
from pyengine.serve.sampling import SAMPLING, SCHEMA, Asked, parameter, sampling_params
from pyengine.serve.store import Owner, Stored, owner_of
from pyengine.serve.stream import StreamOptions
from pyengine.serve.tools import FLAT_TOOLS, choice_of, chosen_tools, held_to
from pyengine.serve.work import unless_short

if TYPE_CHECKING:
    from pyengine.run.jobs import Job
    from pyengine.run.request import Request
    from pyengine.serve.app import App

LONG = 1 << 14  # bytes; to read a longer text as JSON takes milliseconds
LONG_LIST = 256  # items


@dataclass
class ResponsesCall:
    """A request that was understood.

    chat      the chat that it is
    repeated  what its answer repeats
    owner     whose it is
    items     that it is computed from, None if it is not to be kept
    kept      these as they are kept, once the requests are made
    """

    chat: ChatCall
    repeated: dict[str, Any]
    owner: Owner
    items: list[Item] | None
    kept: bytes | None = None

    def make(self, job: Job) -> Sequence[Request]:
        """The requests for the engine; in a thread."""
        requests = self.chat.make(job)  # first: what is too long for the model is not written for the store
        if self.items is not None:
            self.kept = dumps([item.kept() for item in self.items])
            self.items = None
        return requests


# -------------------------------------------------------------------- fields

_FORMAT: Table = {
    "type": needed(one_of("text", "json_object", "json_schema")),
    "name": STRING,
    "description": STRING,
    "strict": BOOLEAN,  # answers are always held to the schema
    "schema": SCHEMA,
}
FIELDS: Table = {
    "input": needed(INPUT),
    "instructions": STRING,
    "previous_response_id": STRING,
    "store": Kind(BOOLEAN.schema, BOOLEAN.read),  # None: if the server keeps any
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


async def parse(app: App, exchange: Exchange, fields: Fields) -> ResponsesCall:
    """Every field is honoured or refused by name. Raises HTTPError."""
    model = app.models.get(fields.take("model"))
    salt = fields.take("cache_salt")
    owner = owner_of(exchange.key_digest, salt)
    previous = fields.take("previous_response_id")
    items = [*await _earlier(app, owner, previous), *await _resolved(app, owner, fields.take("input"))]
    store = _is_kept(app, fields.take("store"))
    messages = await unless_short(LONG_LIST, len(items), messages_of, items)
    instructions = fields.take("instructions")
    if instructions is not None:
        messages.insert(0, {"role": "system", "content": instructions})
    given: dict[str, Any] = {}
    if fields.has("max_output_tokens"):
        given["max_tokens"] = fields.take("max_output_tokens")
    text = fields.take("text")
    text_format, asked = _text_format(None if text is None else text.take("format"))
    given_tools, functions = fields.take("tools")
    given_choice, choice = fields.take("tool_choice")
    is_parallel = fields.take("parallel_tool_calls")
    tools = chosen_tools(functions, choice_of(choice, is_flat=True), model, only_one=not is_parallel)
    wanted, asked = held_to(tools, asked, fields, model)
    if wanted is not None:
        given["structured_outputs"] = wanted
    metadata, reasoning = fields.take("metadata"), fields.take("reasoning")
    effort = None if reasoning is None else reasoning.take("effort")
    note_user(exchange, fields)
    chat = ChatCall(
        model=model,
        stream=StreamOptions() if fields.take("stream") else None,
        cache_salt=app.salted(exchange, salt),
        messages=messages,
        messages_field="input",
        template_variables=effort_variables(effort, model, "reasoning.effort"),
        tools=tools,
        asked=asked,
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
        "previous_response_id": previous,
        "reasoning": {"effort": effort, "summary": None},
        "store": store,
        "temperature": chat.params.temperature,
        "text": {"format": text_format},
        "tool_choice": given_choice,
        "tools": given_tools,
        "top_p": chat.params.top_p,
        "truncation": "disabled",
    }
    return ResponsesCall(chat, repeated, owner, items if store else None)


def _is_kept(app: App, wanted: bool | None) -> bool:
    if wanted and not app.store.keeps_any:
        text = "store is not supported: this server keeps no responses (--max-stored-responses 0)"
        raise bad_request(text, "store", "unsupported_parameter")
    return app.store.keeps_any if wanted is None else wanted


async def _earlier(app: App, owner: Owner, previous: str | None) -> list[Item]:
    """The conversation that a request goes on with, instructions left out: they are said anew in every turn."""
    name = "previous_response_id"
    if previous is None:
        return []
    stored = await app.store.get(owner, previous)
    if stored is None:
        text = f"{name}: there is no response {previous[:100]!r} among those that are kept"
        raise bad_request(text, name, "previous_response_not_found")
    _check_length(app, stored.n_bytes, name)

    def read() -> list[Item]:
        items = [*json.loads(stored.items), *json.loads(stored.response)["output"]]
        return [read_item(item, f"{name}[{i}]") for i, item in enumerate(items)]

    return await unless_short(LONG, stored.n_bytes, read)


async def _resolved(app: App, owner: Owner, items: list[Item]) -> list[Item]:
    """Items with what they refer to in their places: outputs of responses that are kept, each of which is read once."""
    stored: dict[str, Stored] = {}  # by the first item of its output
    references: set[str] = set()
    for item in items:
        if item.kind != REFERENCE:
            continue
        id_, where = item.fields.peek("id"), f"{item.path}.id"
        found = await app.store.with_item(owner, id_)
        if found is None:
            raise bad_request(f"{where}: no response that is kept has an item {id_[:100]!r}", where, "item_not_found")
        if id_ in references:
            raise bad_request(f"{where}: the item {id_!r} is referred to twice", where)
        references.add(id_)
        stored[found.output_ids[0]] = found
    if not references:
        return items
    n_bytes = sum(one.n_bytes for one in stored.values())
    _check_length(app, n_bytes, "input")

    def read() -> list[Item]:
        outputs = [one for response in stored.values() for one in json.loads(response.response)["output"]]
        by_id = {one["id"]: one for one in outputs}
        return [
            read_item(by_id[item.fields.take("id")], item.path) if item.kind == REFERENCE else item for item in items
        ]

    return await unless_short(LONG, n_bytes, read)


def _check_length(app: App, n_bytes: int, name: str) -> None:
    """A request that names what is kept is held to the length of one that says it all: few words must not cost much memory."""
    most = app.settings.max_body_bytes
    if n_bytes > most:
        text = f"{name}: what is kept of this conversation has {n_bytes} bytes; a request may have {most}"
        raise HTTPError(413, text, param=name, code="body_too_large")


def _text_format(given: Fields | None) -> tuple[dict[str, Any], Asked]:
    """The format as the answer repeats it, and what it asks of the output. Raises HTTPError."""
    if given is None:
        return {"type": "text"}, ()
    kind = given.take("type")
    if kind != "json_schema":
        given.end()
        return {"type": kind}, [
            (given.path("type"), StructuredOutputs(json_object=True))
        ] if kind == "json_object" else ()
    for name in ("name", "schema"):
        if not given.has(name):
            given.missing(name)
    wanted = given.take("schema")
    repeated = {name: given.take(name) for name in ("name", "description", "strict")}
    return {"type": kind, **repeated, "schema": wanted.json}, [(given.path("schema"), wanted)]
