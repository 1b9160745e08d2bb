"""/v1/responses: OpenAI's newer form of a chat, text in and text out; nothing is kept between two requests."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from pyengine.results import Generation, Piece
from pyengine.run.request import GenerationRequest
from pyengine.sampling import StructuredOutputs
from pyengine.serve import payload
from pyengine.serve.chat import ChatCall
from pyengine.serve.errors import bad_request
from pyengine.serve.exchange import Exchange, event
from pyengine.serve.fields import Fields
from pyengine.serve.messages import text_content
from pyengine.serve.prompts import note_user
from pyengine.serve.sampling import checked, sampling_params
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


def parse(app: App, exchange: Exchange, fields: Fields) -> ResponsesCall:
    """Every field is honoured or refused by name. Raises HTTPError."""
    model = app.models.get(fields.string("model"))
    messages = _messages(fields)
    instructions = fields.string("instructions")
    if instructions is not None:
        messages.insert(0, {"role": "system", "content": instructions})
    given: dict[str, Any] = {}
    if fields.has("max_output_tokens"):
        given["max_tokens"] = checked("max_output_tokens", "max_tokens", fields.take("max_output_tokens"))
    text_format, wanted = _text_format(fields)
    if wanted is not None:
        given["structured_outputs"] = wanted
    metadata = fields.object_("metadata")
    repeated = {} if metadata is None else {name: metadata.required_string(name) for name in metadata.names()}
    stream = StreamOptions() if fields.boolean("stream") else None
    salt = app.cache_salt(exchange, fields)
    note_user(exchange, fields)
    _refuse(fields)
    params = sampling_params(fields, model, given)
    fields.end()
    id_ = payload.new_id("resp_")
    chat = ChatCall(model=model, params=params, stream=stream, cache_salt=salt, messages=messages, id=id_)
    return ResponsesCall(chat, instructions, repeated, text_format)


def _refuse(fields: Fields) -> None:
    refuse = fields.refuse
    refuse("n", "a response has one output", 1)
    refuse("previous_response_id", "nothing is kept between requests: send the whole conversation")
    refuse("conversation", "nothing is kept between requests: send the whole conversation")
    refuse("store", "nothing is stored here", False)
    refuse("background", "answers come with their request", False)
    refuse("include", "there is nothing to include", [])
    refuse("tools", "this server does not call tools", [])
    refuse("tool_choice", "this server does not call tools", "none", "auto")
    fields.boolean("parallel_tool_calls")  # there are no tools it could be about
    refuse("max_tool_calls", "this server does not call tools")
    refuse("truncation", "conversations are not cut", "disabled")
    refuse("reasoning", "effort cannot be chosen", {})
    refuse("prompt", "there are no stored prompts")
    refuse("service_tier", "there is one tier", "auto", "default")
    refuse("top_logprobs", "use /v1/chat/completions for log-probabilities", 0)
    refuse("stream_options", "events are not padded", {}, {"include_obfuscation": False})
    fields.string("prompt_cache_key")  # a hint for routing between machines, and this is one
    fields.string("prompt_cache_retention")


def _messages(fields: Fields) -> list[dict[str, Any]]:
    value = fields.take("input")
    if value is None:
        fields.missing("input")
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise bad_request("input must be a string or a list of messages that is not empty", "input")
    messages = []
    for i, item in enumerate(value):
        message = Fields(item, f"input[{i}]")
        message.one_of("type", "message", default="message")
        role = message.one_of("role", "user", "assistant", "system", "developer")
        if role is None:
            message.missing("role")
        message.string("id")  # as the answer that it may be has them
        message.one_of("status", "completed", "incomplete", "in_progress")
        content = text_content(message)
        if content is None:
            message.missing("content")
        message.end()
        messages.append({"role": "system" if role == "developer" else role, "content": content})
    return messages


def _text_format(fields: Fields) -> tuple[dict[str, Any], StructuredOutputs | None]:
    """The format as the answer repeats it, and what the output must be. Raises HTTPError."""
    plain = {"type": "text"}
    text = fields.object_("text")
    if text is None:
        return plain, None
    text.refuse("verbosity", "verbosity cannot be chosen", "medium")
    given = text.object_("format")
    text.end()
    if given is None:
        return plain, None
    kind = given.one_of("type", "text", "json_object", "json_schema")
    if kind is None:
        given.missing("type")
    if kind != "json_schema":
        given.end()
        return {"type": kind}, StructuredOutputs(json_object=True) if kind == "json_object" else None
    name, description = given.required_string("name"), given.string("description")
    strict = given.boolean("strict")  # answers are always held to the schema
    wanted = given.check("schema", lambda value: StructuredOutputs(json=value))
    if wanted is None:
        given.missing("schema")
    given.end()
    repeated = {"type": kind, "name": name, "description": description, "strict": strict, "schema": wanted.json}
    return repeated, wanted


# -------------------------------------------------------------------- answered


async def responses(app: App, exchange: Exchange) -> None:
    call = parse(app, exchange, await app.fields(exchange))
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
