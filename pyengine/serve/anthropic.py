"""/v1/messages: Anthropic's form of a chat. How a request is read stands in anthropic_fields.py."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pyengine.results import Generation, Piece
from pyengine.run.request import GenerationRequest
from pyengine.serve import payload, work
from pyengine.serve.anthropic_fields import COUNT, FIELDS, conversation, ending_of, parse
from pyengine.serve.chat import ChatCall
from pyengine.serve.errors import told_of
from pyengine.serve.exchange import Exchange, dumps, event
from pyengine.serve.tools import arguments_of, reader_of

if TYPE_CHECKING:
    from pyengine.run.jobs import Job
    from pyengine.serve.app import App

_Block = dict[str, Any]


def _tell(kind: str, **more: Any) -> bytes:
    return event({"type": kind, **more}, kind)


class _Content:
    """The blocks of an answer, text and calls, the last of which may be written still."""

    def __init__(self, call: ChatCall) -> None:
        self.blocks: list[_Block] = []
        self.reader = reader_of(call.tools)
        self._texts: list[str] | None = None  # of the block that is being written

    def push(self, text: str) -> bytes:
        """The events of this text."""
        return b"".join(map(self._delta, self.reader.push(text)))

    def finish(self) -> bytes:
        return b"".join(map(self._delta, self.reader.finish())) + self._close()

    def _delta(self, delta: dict[str, Any]) -> bytes:
        if "content" in delta:
            is_begun = self._texts is not None and self.blocks[-1]["type"] == "text"
            begun = b"" if is_begun else self._open({"type": "text", "text": ""})
            return begun + self._write(delta["content"], {"type": "text_delta", "text": delta["content"]})
        (part,) = delta["tool_calls"]
        function = part["function"]
        begun = b""
        if "id" in part:
            begun = self._open({"type": "tool_use", "id": part["id"], "name": function["name"], "input": {}})
        text = function["arguments"]
        return begun + self._write(text, {"type": "input_json_delta", "partial_json": text})

    def _write(self, text: str, delta: dict[str, Any]) -> bytes:
        assert self._texts is not None
        self._texts.append(text)
        return _tell("content_block_delta", index=len(self.blocks) - 1, delta=delta)

    def _open(self, block: _Block) -> bytes:
        closed = self._close()
        self.blocks.append(block)
        self._texts = []
        return closed + _tell("content_block_start", index=len(self.blocks) - 1, content_block=block)

    def _close(self) -> bytes:
        if self._texts is None:
            return b""
        text, self._texts = "".join(self._texts), None
        if self.blocks[-1]["type"] == "text":
            self.blocks[-1]["text"] = text
        else:
            self.blocks[-1]["input"] = arguments_of(text)
        return _tell("content_block_stop", index=len(self.blocks) - 1)


def _message(call: ChatCall, content: list[_Block], **more: Any) -> dict[str, Any]:
    return {"id": call.id, "type": "message", "role": "assistant", "model": call.model.name, "content": content, **more}


def _end(content: _Content, result: Generation) -> dict[str, Any]:
    """Why it ended, in Anthropic's words."""
    if result.finish_reason != "stop":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(result.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": result.stop_reason}
    has_call = any(block["type"] == "tool_use" for block in content.blocks)
    return {"stop_reason": "tool_use" if has_call else "end_turn", "stop_sequence": None}


def _usage(request: GenerationRequest) -> dict[str, Any]:
    timings = request.result.timings
    return {
        "input_tokens": timings.prompt_tokens - timings.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": timings.cached_tokens,
        "output_tokens": timings.generated_tokens,
    }


async def messages(app: App, exchange: Exchange) -> None:
    call = parse(app, exchange, await app.fields(exchange, FIELDS))
    async with app.job(exchange, call.model, call.make, call.params) as job:
        if call.stream is None:
            (request,) = await app.finish(exchange, call.model, job)
            body = await work.made_of([request], lambda: dumps(_whole(call, request)))
            await exchange.reply(200, body, b"application/json")
        else:
            await _stream(app, exchange, call, job)


def _whole(call: ChatCall, request: GenerationRequest) -> dict[str, Any]:
    content = _Content(call)
    content.push(request.result.text)
    content.finish()
    result = request.result
    more = {"usage": _usage(request), "timings": payload.timings(result.timings), "seed": result.seed}
    return _message(call, content.blocks, **_end(content, result), **more)


async def _stream(app: App, exchange: Exchange, call: ChatCall, job: Job) -> None:
    content = _Content(call)

    def part(index: int, pieces: list[Piece]) -> bytes:
        return content.push("".join(piece.text for piece in pieces))

    # how much of it is cached shows when it is computed, and is told at the end
    usage = {"input_tokens": len(work.generations(job)[0].prompt), "output_tokens": 0}
    first = _tell("message_start", message=_message(call, [], stop_reason=None, stop_sequence=None, usage=usage))
    (request,) = await app.stream(exchange, call.model, job, first, part)
    last, result = content.finish(), request.result
    last += _tell("message_delta", delta=_end(content, result), usage=_usage(request))
    await exchange.end(last + _tell("message_stop", timings=payload.timings(result.timings), seed=result.seed))


async def count_tokens(app: App, exchange: Exchange) -> None:
    """How many tokens the prompt of such a request has."""
    fields = await app.fields(exchange, COUNT)
    model = app.models.get(fields.take("model"))
    said = conversation(fields, model)
    fields.end()
    shown = None if said.tools is None else said.tools.shown
    with told_of("messages"):
        ids = await app.aside(
            partial(model.chat_ids, said.messages, tools=shown, ending=ending_of(said.messages), variables=said.variables)
        )
    await exchange.reply_json({"input_tokens": len(ids)})
