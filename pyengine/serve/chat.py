"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pyengine.results import BeamHypothesis, Generation, Piece
from pyengine.run.jobs import Job
from pyengine.run.request import Request
from pyengine.sampling import StructuredOutputs
from pyengine.serve import neutral, payload
from pyengine.serve.answer import Call, Choice, answer
from pyengine.serve.beams import BEAMS, beams_of
from pyengine.serve.calls import message_of
from pyengine.serve.effort import EFFORT, effort_variables
from pyengine.serve.errors import bad_request, told_of
from pyengine.serve.exchange import Exchange
from pyengine.serve.fields import (
    BOOLEAN,
    OBJECT,
    STRING,
    Fields,
    Kind,
    Table,
    hint,
    needed,
    object_of,
    one_of,
)
from pyengine.serve.messages import ENDING, MESSAGES, chat_messages, ending_of
from pyengine.serve.prompts import CALLER, note_user
from pyengine.serve.sampling import SAMPLING, SCHEMA, Asked, parameter, sampling_params
from pyengine.serve.stream import STREAM, stream_options
from pyengine.serve.tools import TOOLS, Tools, held_to, reader_of, tools_of

if TYPE_CHECKING:
    from pyengine.serve.app import App

_RESERVED = ("self", "tokenizer", "n_ctx", "time_limit")  # names of ChatTemplate.encode


@dataclass(kw_only=True)
class ChatCall(Call):
    messages: list[dict[str, Any]]
    messages_field: str = "messages"
    ending: dict[str, bool] = field(default_factory=dict)
    template_variables: dict[str, Any] = field(default_factory=dict)
    tools: Tools | None = None
    id: str = field(default_factory=lambda: payload.new_id("chatcmpl-"))
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def choice(self, index: int) -> ChatChoice:
        return ChatChoice(self)

    def prompt_ids(self) -> list[int]:
        """The conversation as the model reads it; in a thread."""
        with told_of(self.messages_field):
            return self.model.chat_ids(
                self.messages,
                tools=None if self.tools is None else self.tools.shown,
                ending=self.ending,
                variables=self.template_variables,
            )

    def make(self, job: Job) -> Sequence[Request]:
        """The requests for the engine; in a thread."""
        ids = self.prompt_ids()
        shown = frozenset() if self.tools is None else self.model.call_tokens(self.tools.syntax)
        return self.requests(job, [ids], shown_special=shown)


class ChatChoice(Choice):
    last: ClassVar = {"delta": {}}

    def __init__(self, call: ChatCall) -> None:
        self._call = call
        self._reader = reader_of(call.tools)

    def whole(self, text: str, pieces: Sequence[Piece]) -> dict[str, Any]:
        content, calls = message_of(self._deltas(text, is_last=True))
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return {"message": message, "logprobs": self._logprobs(pieces)}

    def begin(self) -> list[dict[str, Any]]:
        return [{"delta": {"role": "assistant", "content": "" if self._call.tools is None else None}}]

    def push(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        text = "".join(piece.text for piece in pieces)
        deltas = self._deltas(text, is_last=pieces[-1].result is not None)
        logprobs = self._logprobs(pieces)
        if not deltas and logprobs is not None and logprobs["content"]:
            deltas = [{}]
        return [{"delta": delta, "logprobs": None if i else logprobs} for i, delta in enumerate(deltas)]

    def finish_reason(self, result: Generation | BeamHypothesis) -> str:
        reason = super().finish_reason(result)
        return "tool_calls" if reason == "stop" and self._reader.has_call else reason

    def _deltas(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        return self._reader.push(text) + (self._reader.finish() if is_last else [])

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        said = self._call.said(pieces)
        return None if said is None else payload.chat_logprobs(said, self._call.model.engine.tokenizer)


# -------------------------------------------------------------------- parsed


_JSON_SCHEMA: Table = {
    "name": needed(STRING),
    "description": hint(STRING),
    "strict": hint(BOOLEAN),  # answers are always held to the schema
    "schema": SCHEMA,
}
_RESPONSE_FORMAT: Table = {
    "type": needed(one_of("text", "json_object", "json_schema")),
    "json_schema": object_of(_JSON_SCHEMA),
    "schema": SCHEMA,  # of an object, as llama.cpp's server takes it
}


def _read_variables(value: Any, path: str) -> dict[str, Any]:
    variables: dict[str, Any] = OBJECT.read(value, path)
    for name in ("messages", "tools", *ENDING, "bos_token", "eos_token", *_RESERVED):
        if variables.get(name) is not None:
            where = f"{path}.{name}"
            raise bad_request(f"{where} is not supported: the server sets it", where, "unsupported_parameter")
    return {name: item for name, item in variables.items() if item is not None}


FIELDS: Table = {
    "messages": needed(MESSAGES),
    **CALLER,
    **STREAM,
    **SAMPLING,
    **BEAMS,
    **TOOLS,
    "max_tokens": parameter("max_tokens"),
    "max_completion_tokens": parameter("max_tokens"),
    "logprobs": BOOLEAN,
    "top_logprobs": parameter("logprobs"),
    "response_format": object_of(_RESPONSE_FORMAT),
    **ENDING,
    "chat_template_kwargs": Kind(OBJECT.schema, _read_variables, default={}),
    **neutral.CHAT,
    **neutral.OTHERS_CHAT,
    "reasoning_effort": EFFORT,
}


def parse(app: App, exchange: Exchange, fields: Fields) -> ChatCall:
    """Every field is honoured or refused by name. Raises HTTPError."""
    model = app.models.get(fields.take("model"))
    messages = chat_messages(fields.take("messages"))
    beams = beams_of(fields, model)
    given: dict[str, Any] = {}
    limits = [name for name in ("max_completion_tokens", "max_tokens") if fields.has(name)]
    if len(limits) > 1:
        raise bad_request("max_tokens and max_completion_tokens are the same: give one of them", "max_tokens")
    for name in limits:
        given["max_tokens"] = fields.take(name)
    top = fields.take("top_logprobs")
    if fields.take("logprobs"):
        given["logprobs"] = top or 0
    elif top:
        raise bad_request("top_logprobs needs logprobs = true", "top_logprobs")
    asked = response_format(fields.take("response_format"))
    tools = tools_of(fields, model)
    wanted, asked = held_to(tools, asked, fields, model)
    if wanted is not None:
        given["structured_outputs"] = wanted
    thinking = effort_variables(fields.take("reasoning_effort"), model, "reasoning_effort")
    note_user(exchange, fields)
    call = ChatCall(
        model=model,
        stream=stream_options(fields),
        cache_salt=app.cache_salt(exchange, fields),
        messages=messages,
        ending=ending_of(fields, messages),
        template_variables=thinking | fields.take("chat_template_kwargs"),
        tools=tools,
        asked=asked,
        beams=beams,
        params=sampling_params(fields, model, given),
    )
    fields.end()
    return call


def response_format(given: Fields | None) -> Asked:
    """Nothing for plain text. Raises HTTPError."""
    if given is None:
        return ()
    kind, schema, of_object = given.take("type"), given.take("json_schema"), given.take("schema")
    if of_object is not None and kind != "json_object":
        raise bad_request("response_format.schema goes with type json_object", "response_format.schema")
    if kind == "json_schema":
        if schema is None:
            given.missing("json_schema")
        return [(schema.path("schema"), schema.take("schema") or StructuredOutputs(json_object=True))]
    if schema is not None:
        raise bad_request("response_format.json_schema goes with type json_schema", "response_format.json_schema")
    if kind == "json_object":
        return [(given.path("schema"), of_object or StructuredOutputs(json_object=True))]
    return ()


async def chat_completions(app: App, exchange: Exchange) -> None:
    await answer(app, exchange, parse(app, exchange, await app.fields(exchange, FIELDS)))
