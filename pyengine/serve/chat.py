"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyengine.async_engine import Job
from pyengine.results import Generation, Piece
from pyengine.run.request import GenerationRequest
from pyengine.sampling import SamplingParams, StructuredOutputs
from pyengine.serve import payload
from pyengine.serve.calls import CallReader, message_of
from pyengine.serve.errors import bad_request
from pyengine.serve.exchange import Exchange, event
from pyengine.serve.fields import Fields
from pyengine.serve.messages import chat_messages
from pyengine.serve.models import ServedModel
from pyengine.serve.prompts import note_user
from pyengine.serve.sampling import checked, sampling_params
from pyengine.serve.stream import StreamOptions, stream_options
from pyengine.serve.tools import Tools, tools_of

if TYPE_CHECKING:
    from pyengine.serve.app import App

_RESERVED = ("self", "tokenizer", "time_limit")  # names of ChatTemplate.encode


@dataclass
class ChatCall:
    """A request that was understood."""

    model: ServedModel
    messages: list[dict[str, Any]]
    params: SamplingParams
    stream: StreamOptions | None
    cache_salt: str | None
    add_generation_prompt: bool
    template_variables: dict[str, Any]
    tools: Tools | None = None
    id: str = field(default_factory=lambda: payload.new_id("chatcmpl-"))
    created: int = field(default_factory=lambda: int(time.time()))

    def make(self, job: Job) -> Sequence[GenerationRequest]:
        """The requests for the engine; in a thread."""
        ids = self.model.chat_ids(
            self.messages,
            tools=None if self.tools is None else self.tools.shown,
            add_generation_prompt=self.add_generation_prompt,
            variables=self.template_variables,
        )
        engine = self.model.engine
        return engine.requests(
            job,
            [ids],
            engine.resolve(self.params),
            cache_salt=self.cache_salt,
            interactive=self.stream is not None,
            shown_special=frozenset() if self.tools is None else self.model.call_tokens(self.tools.syntax),
        )

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": payload.FINGERPRINT,
        }


def parse(app: App, exchange: Exchange, fields: Fields) -> ChatCall:
    """Every field is honoured or refused by name. Raises HTTPError."""
    model = app.models.get(fields.string("model"))
    messages = chat_messages(fields)
    given: dict[str, Any] = {}
    limits = [name for name in ("max_completion_tokens", "max_tokens") if fields.has(name)]
    if len(limits) > 1:
        raise bad_request("max_tokens and max_completion_tokens are the same: give one of them", "max_tokens")
    for name in limits:
        given["max_tokens"] = checked(name, "max_tokens", fields.take(name))
    top = fields.integer("top_logprobs", least=0)
    if fields.boolean("logprobs"):
        given["logprobs"] = checked("top_logprobs", "logprobs", top or 0)
    elif top:
        raise bad_request("top_logprobs needs logprobs = true", "top_logprobs")
    stream = stream_options(fields)
    salt = app.cache_salt(exchange, fields)
    add_prompt = fields.boolean("add_generation_prompt", True)
    variables = fields.object_("chat_template_kwargs")
    _refuse(fields)
    note_user(exchange, fields)
    wanted = response_format(fields)
    tools = tools_of(fields, model)
    if tools is not None:
        if wanted is not None or fields.has("structured_outputs"):
            raise bad_request("tool calls and a response format contradict each other", "tool_choice")
        wanted = tools.output()
    if wanted is not None:
        given["structured_outputs"] = wanted
    params = sampling_params(fields, model, given)
    fields.end()
    return ChatCall(model, messages, params, stream, salt, add_prompt, template_variables(variables), tools)


def response_format(fields: Fields) -> StructuredOutputs | None:
    """None for plain text. Raises HTTPError."""
    given = fields.object_("response_format")
    if given is None:
        return None
    kind = given.one_of("type", "text", "json_object", "json_schema")
    schema = given.object_("json_schema")
    if kind is None:
        given.missing("type")
    if kind == "json_schema":
        if schema is None:
            given.missing("json_schema")
        schema.required_string("name")
        schema.string("description")
        schema.boolean("strict")  # answers are always held to the schema
        value = schema.check("schema", lambda value: StructuredOutputs(json=value))
        schema.end()
        given.end()
        return value or StructuredOutputs(json_object=True)
    if schema is not None:
        raise bad_request("response_format.json_schema goes with type json_schema", "response_format.json_schema")
    given.end()
    return StructuredOutputs(json_object=True) if kind == "json_object" else None


def template_variables(variables: Fields | None) -> dict[str, Any]:
    """Further names for the template, those aside that it gets from us."""
    if variables is None:
        return {}
    for name in ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token", *_RESERVED):
        variables.refuse(name, "the server sets it")
    out = {name: variables.take(name) for name in variables.names()}
    return out


def _refuse(fields: Fields) -> None:
    refuse = fields.refuse
    refuse("functions", "use tools", [])
    refuse("function_call", "use tool_choice", "none", "auto")
    refuse("modalities", "answers are text", ["text"])
    refuse("audio", "answers are text")
    refuse("prediction", "predicted outputs are not used")
    refuse("store", "nothing is stored here", False)
    refuse("metadata", "nothing is stored here", {})
    refuse("service_tier", "there is one tier", "auto", "default")
    refuse("reasoning_effort", "effort cannot be chosen", "none")
    refuse("verbosity", "verbosity cannot be chosen", "medium")
    refuse("web_search_options", "this server does not search")
    refuse("moderation", "this server does not moderate")
    # A hint for routing between machines, and this is one: nothing is left to do.
    fields.string("prompt_cache_key")
    fields.string("prompt_cache_retention")


async def chat_completions(app: App, exchange: Exchange) -> None:
    call = parse(app, exchange, await app.fields(exchange))
    exchange.notes["model"] = call.model.name
    job = await app.queue.submit(call.model, call.make)
    try:
        if call.stream is None:
            await exchange.reply_json(_whole(call, await app.finish(exchange, call.model, job)))
        else:
            await _stream(app, exchange, call, job)
    finally:
        job.close()


# -------------------------------------------------------------------- whole


def _whole(call: ChatCall, requests: list[GenerationRequest]) -> dict[str, Any]:
    return {
        **call.head("chat.completion"),
        "choices": [_choice(call, index, request) for index, request in enumerate(requests)],
        "usage": payload.usage(requests),
        "timings": payload.timings(requests[0].result),
        "seed": requests[0].result.seed,
    }


def _choice(call: ChatCall, index: int, request: GenerationRequest) -> dict[str, Any]:
    result = request.result
    message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
    reader = None if call.tools is None else call.tools.reader()
    if reader is not None:
        content, calls = message_of(reader.push(result.text) + reader.finish())
        message["content"] = content or (None if calls else "")
        if calls:
            message["tool_calls"] = calls
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(call, request.output.pieces),
        "finish_reason": _finish_reason(reader, result),
        "stop_reason": payload.stop_reason(result),
    }


def _finish_reason(reader: CallReader | None, result: Generation) -> str:
    reason = payload.finish_reason(result)
    return "tool_calls" if reason == "stop" and reader is not None and reader.has_call else reason


def _logprobs(call: ChatCall, pieces: Sequence[Piece]) -> dict[str, Any] | None:
    if call.params.logprobs is None:
        return None
    engine = call.model.engine
    ends = (*engine.eos_token_ids, *(call.params.stop_token_ids or ()))
    return payload.chat_logprobs(payload.said(pieces, ends), engine.tokenizer)


# -------------------------------------------------------------------- streamed


async def _stream(app: App, exchange: Exchange, call: ChatCall, job: Job) -> None:
    assert call.stream is not None
    head = call.head("chat.completion.chunk")
    if call.stream.include_usage:
        head["usage"] = None  # in every chunk but the last

    def chunk(index: int, delta: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return event({**head, "choices": [choice]})

    readers = [None if call.tools is None else call.tools.reader() for _ in job.requests]

    def deltas(index: int, text: str, is_last: bool) -> list[dict[str, Any]]:
        reader = readers[index]
        if reader is None:
            return [{"content": text}] if text else []
        return reader.push(text) + (reader.finish() if is_last else [])

    def part(index: int, pieces: list[Piece]) -> bytes:
        result = pieces[-1].result
        new = deltas(index, "".join(piece.text for piece in pieces), result is not None)
        logprobs = _logprobs(call, pieces)
        if not new and logprobs is not None and logprobs["content"]:
            new = [{}]
        out = b"".join(chunk(index, delta, logprobs=None if i else logprobs) for i, delta in enumerate(new))
        if result is not None:
            reasons = {
                "finish_reason": _finish_reason(readers[index], result),
                "stop_reason": payload.stop_reason(result),
            }
            end = {**head, "choices": [{"index": index, "delta": {}, "logprobs": None, **reasons}]}
            out += event({**end, "timings": payload.timings(result), "seed": result.seed})
        return out

    n = len(job.requests)
    role = {"role": "assistant", "content": "" if call.tools is None else None}
    first = b"".join(chunk(index, role) for index in range(n))
    requests = await app.stream(exchange, call.model, job, first, part)
    last = b""
    if call.stream.include_usage:
        last = event({**head, "choices": [], "usage": payload.usage(requests)})
    await exchange.end(last + b"data: [DONE]\n\n")
