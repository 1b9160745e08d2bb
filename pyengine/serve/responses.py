"""/v1/responses: OpenAI's newer form of a chat, text in and text out; nothing is kept between two requests."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pyengine.results import Generation, Piece
from pyengine.run.request import GenerationRequest
from pyengine.sampling import StructuredOutputs
from pyengine.serve import payload
from pyengine.serve.chat import SCHEMA, ChatCall
from pyengine.serve.errors import bad_request
from pyengine.serve.exchange import Exchange, event
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
)
from pyengine.serve.messages import CONTENT
from pyengine.serve.prompts import CALLER, note_user
from pyengine.serve.sampling import SAMPLING, parameter, sampling_params
from pyengine.serve.stream import StreamOptions

if TYPE_CHECKING:
    from pyengine.async_engine import Job
    from pyengine.serve.app import App


class ResponsesCall:
    """A request that was understood: the chat that it is, and what its answer repeats."""

    def __init__(self, chat: ChatCall, instructions: str | None, metadata: dict[str, str], text_format: Any) -> None:
        self.chat = chat
        self._message_id = payload.new_id("msg_")
        self._repeated: dict[str, Any] = {
            "instructions": instructions,
            "max_output_tokens": chat.params.max_tokens,
            "metadata": metadata,
            "model": chat.model.name,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": chat.params.temperature,
            "text": {"format": text_format},
            "tool_choice": "auto",
            "tools": [],
            "top_p": chat.params.top_p,
            "truncation": "disabled",
        }

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "message", "id": self._message_id, "status": status, "role": "assistant", "content": content}

    def response(self, status: str, output: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self.chat.id,
            "object": "response",
            "created_at": self.chat.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            **self._repeated,
            "output": output,
            "usage": None,
            **more,
        }

    def finished(self, request: GenerationRequest) -> dict[str, Any]:
        """The response when its one output is complete."""
        result = request.result
        status = _status(result)
        usage = payload.usage([request])
        return self.response(
            status,
            [self.item(status, [self.part(result.text)])],
            incomplete_details=None if status == "completed" else {"reason": "max_output_tokens"},
            usage={
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            timings=payload.timings(result),
            seed=result.seed,
        )


def _status(result: Generation) -> str:
    return "completed" if result.finish_reason == "stop" else "incomplete"


# -------------------------------------------------------------------- parsed


_FORMAT: Table = {
    "type": needed(one_of("text", "json_object", "json_schema")),
    "name": STRING,
    "description": STRING,
    "strict": BOOLEAN,  # answers are always held to the schema
    "schema": SCHEMA,
}
_MESSAGE: Table = {
    "type": hint(one_of("message")),
    "role": needed(one_of("user", "assistant", "system", "developer")),
    "content": needed(CONTENT),
    # as the answer that it may be has them
    "id": hint(STRING),
    "status": hint(one_of("completed", "incomplete", "in_progress")),
}


def _read_input(value: Any, path: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise bad_request(f"{path} must be a string or a list of messages that is not empty", path)
    messages = []
    for i, item in enumerate(value):
        message = Fields(item, _MESSAGE, f"{path}[{i}]")
        role = message.take("role")
        messages.append({"role": "system" if role == "developer" else role, "content": message.take("content")})
    return messages


INPUT = Kind(
    {"anyOf": [{"type": "string"}, {"type": "array", "items": schema_of(_MESSAGE), "minItems": 1}]}, _read_input
)
FIELDS: Table = {
    "input": needed(INPUT),
    "instructions": STRING,
    **CALLER,
    **SAMPLING,
    "stream": BOOLEAN,
    "max_output_tokens": parameter("max_tokens"),
    "text": object_of({"format": object_of(_FORMAT), "verbosity": refused("verbosity cannot be chosen", "medium")}),
    "metadata": replace(map_of(STRING), default={}),
    "n": refused("a response has one output", 1),
    "previous_response_id": refused("nothing is kept between requests: send the whole conversation"),
    "conversation": refused("nothing is kept between requests: send the whole conversation"),
    "store": refused("nothing is stored here", False),
    "background": refused("answers come with their request", False),
    "include": refused("there is nothing to include", []),
    "tools": refused("use /v1/chat/completions for tools", []),
    "tool_choice": refused("use /v1/chat/completions for tools", "none", "auto"),
    "parallel_tool_calls": hint(BOOLEAN),  # there are no tools it could be about
    "max_tool_calls": refused("use /v1/chat/completions for tools"),
    "truncation": refused("conversations are not cut", "disabled"),
    "reasoning": refused("effort cannot be chosen", {}),
    "prompt": refused("there are no stored prompts"),
    "service_tier": refused("there is one tier", "auto", "default"),
    "top_logprobs": refused("use /v1/chat/completions for log-probabilities", 0),
    "stream_options": refused("events are not padded", {}, {"include_obfuscation": False}),
    # for routing between machines, and this is one
    "prompt_cache_key": hint(STRING),
    "prompt_cache_retention": hint(STRING),
}


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
    if wanted is not None:
        given["structured_outputs"] = wanted
    metadata = fields.take("metadata")
    note_user(exchange, fields)
    chat = ChatCall(
        model=model,
        stream=StreamOptions() if fields.take("stream") else None,
        cache_salt=app.cache_salt(exchange, fields),
        messages=messages,
        messages_field="input",
        id=payload.new_id("resp_"),
        params=sampling_params(fields, model, given),
    )
    fields.end()
    return ResponsesCall(chat, instructions, metadata, text_format)


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


# -------------------------------------------------------------------- answered


async def responses(app: App, exchange: Exchange) -> None:
    call = parse(app, exchange, await app.fields(exchange, FIELDS))
    async with app.job(exchange, call.chat.model, call.chat.make) as job:
        if call.chat.stream is None:
            (request,) = await app.finish(exchange, call.chat.model, job)
            await exchange.reply_json(call.finished(request))
        else:
            await _stream(app, exchange, call, job)


async def _stream(app: App, exchange: Exchange, call: ResponsesCall, job: Job) -> None:
    numbers = itertools.count()

    def one(kind: str, **more: Any) -> bytes:
        return event({"type": kind, "sequence_number": next(numbers), **more}, kind)

    place = {"item_id": call.item("", [])["id"], "output_index": 0, "content_index": 0}

    def part(index: int, pieces: list[Piece]) -> bytes:
        text = "".join(piece.text for piece in pieces)
        return one("response.output_text.delta", **place, delta=text, logprobs=[]) if text else b""

    begun = call.response("in_progress", [])
    first = one("response.created", response=begun) + one("response.in_progress", response=begun)
    first += one("response.output_item.added", output_index=0, item=call.item("in_progress", []))
    first += one("response.content_part.added", **place, part=call.part(""))
    (request,) = await app.stream(exchange, call.chat.model, job, first, part)
    response, text = call.finished(request), request.result.text
    last = one("response.output_text.done", **place, text=text, logprobs=[])
    last += one("response.content_part.done", **place, part=call.part(text))
    last += one("response.output_item.done", output_index=0, item=response["output"][0])
    await exchange.end(last + one(f"response.{response['status']}", response=response))
