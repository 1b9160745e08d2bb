"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pyengine.async_engine import Job
from pyengine.results import Generation, Piece
from pyengine.run.request import GenerationRequest
from pyengine.sampling import StructuredOutputs
from pyengine.serve import payload
from pyengine.serve.answer import Call, Choice, answer
from pyengine.serve.calls import message_of
from pyengine.serve.errors import bad_request
from pyengine.serve.exchange import Exchange
from pyengine.serve.fields import Fields
from pyengine.serve.messages import chat_messages
from pyengine.serve.prompts import note_user
from pyengine.serve.sampling import checked, sampling_params
from pyengine.serve.stream import stream_options
from pyengine.serve.tools import Tools, tools_of

if TYPE_CHECKING:
    from pyengine.serve.app import App

_RESERVED = ("self", "tokenizer", "time_limit")  # names of ChatTemplate.encode


@dataclass(kw_only=True)
class ChatCall(Call):
    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    template_variables: dict[str, Any] = field(default_factory=dict)
    tools: Tools | None = None
    id: str = field(default_factory=lambda: payload.new_id("chatcmpl-"))
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def choice(self, index: int) -> ChatChoice:
        return ChatChoice(self)

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


class ChatChoice(Choice):
    last: ClassVar = {"delta": {}}

    def __init__(self, call: ChatCall) -> None:
        self._call = call
        self._reader = None if call.tools is None else call.tools.reader()

    def whole(self, request: GenerationRequest) -> dict[str, Any]:
        content, calls = message_of(self._deltas(request.result.text, is_last=True))
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return {"message": message, "logprobs": self._logprobs(request.output.pieces)}

    def begin(self) -> list[dict[str, Any]]:
        return [{"delta": {"role": "assistant", "content": "" if self._reader is None else None}}]

    def push(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        text = "".join(piece.text for piece in pieces)
        deltas = self._deltas(text, is_last=pieces[-1].result is not None)
        logprobs = self._logprobs(pieces)
        if not deltas and logprobs is not None and logprobs["content"]:
            deltas = [{}]
        return [{"delta": delta, "logprobs": None if i else logprobs} for i, delta in enumerate(deltas)]

    def finish_reason(self, result: Generation) -> str:
        reason = super().finish_reason(result)
        return "tool_calls" if reason == "stop" and self._reader is not None and self._reader.has_call else reason

    def _deltas(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        if self._reader is None:
            return [{"content": text}] if text else []
        return self._reader.push(text) + (self._reader.finish() if is_last else [])

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        said = self._call.said(pieces)
        return None if said is None else payload.chat_logprobs(said, self._call.model.engine.tokenizer)


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
    return ChatCall(
        model=model,
        params=params,
        stream=stream,
        cache_salt=salt,
        messages=messages,
        add_generation_prompt=add_prompt,
        template_variables=template_variables(variables),
        tools=tools,
    )


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
    await answer(app, exchange, parse(app, exchange, await app.fields(exchange)))
