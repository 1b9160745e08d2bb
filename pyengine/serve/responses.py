"""/v1/responses: OpenAI's newer form of a chat, text and calls, kept for the next turn unless that is not wanted (store.py).

How a request is read stands in response_fields.py. The answer is a list of items, messages and calls, which grows as text
comes: a stream tells of each change, and a whole answer is what a stream would have built.
"""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any, Protocol

from pyengine.results import Piece
from pyengine.run.request import GenerationRequest
from pyengine.serve import payload, work
from pyengine.serve.exchange import Exchange, dumps, event
from pyengine.serve.response_fields import FIELDS, ResponsesCall, parse
from pyengine.serve.store import Stored
from pyengine.serve.tools import reader_of

if TYPE_CHECKING:
    from pyengine.run.jobs import Job
    from pyengine.serve.app import App

_Item = dict[str, Any]


class _Tell(Protocol):
    def __call__(self, kind: str, **more: Any) -> bytes:
        """An event of the stream."""


class _Output:
    """The items of a response, complete ones and at most one that is being written; `tell` makes the event of a change."""

    def __init__(self, call: ResponsesCall, tell: _Tell) -> None:
        self.items: list[_Item] = []
        self._reader = reader_of(call.chat.tools)
        self._tell = tell
        self._is_open = False  # the last item is being written
        self._texts: list[str] = []  # of that item

    def push(self, text: str) -> bytes:
        return b"".join(map(self._delta, self._reader.push(text)))

    def finish(self, status: str) -> bytes:
        """At the end of the text, which has this status; so does a message that was being written."""
        last = b"".join(map(self._delta, self._reader.finish()))
        if not self.items:
            last += self._open_message()
        return last + self._close(status)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        if "content" in delta:
            begun = b"" if self._is_open and "content" in self.items[-1] else self._open_message()
            self._texts.append(delta["content"])
            return begun + self._tell(
                "response.output_text.delta", **self._part_place(), delta=delta["content"], logprobs=[]
            )
        (part,) = delta["tool_calls"]
        function = part["function"]
        begun = self._open_call(part["id"], function["name"]) if "id" in part else b""
        self._texts.append(function["arguments"])
        return begun + self._tell(
            "response.function_call_arguments.delta", **self._place(), delta=function["arguments"]
        )

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _part_place(self) -> dict[str, Any]:
        return {**self._place(), "content_index": 0}

    def _open(self, item: _Item) -> bytes:
        closed = self._close("completed") if self._is_open else b""
        self.items.append(item)
        self._is_open = True
        return closed + self._tell("response.output_item.added", output_index=len(self.items) - 1, item=item)

    def _open_message(self) -> bytes:
        id_ = payload.new_id("msg_")
        begun = self._open({"type": "message", "id": id_, "status": "in_progress", "role": "assistant", "content": []})
        return begun + self._tell("response.content_part.added", **self._part_place(), part=_part(""))

    def _open_call(self, call_id: str, name: str) -> bytes:
        item = {"type": "function_call", "id": payload.new_id("fc_"), "call_id": call_id, "name": name}
        return self._open({**item, "arguments": "", "status": "in_progress"})

    def _close(self, status: str) -> bytes:
        """End the item that is being written, if there is one."""
        if not self._is_open:
            return b""
        item, text = self.items[-1], "".join(self._texts)
        self._texts.clear()
        self._is_open = False
        if "content" in item:
            part = _part(text)
            item |= {"content": [part], "status": status}
            done = self._tell("response.output_text.done", **self._part_place(), text=text, logprobs=[])
            done += self._tell("response.content_part.done", **self._part_place(), part=part)
        else:
            item |= {"arguments": text, "status": "completed" if _is_json(text) else "incomplete"}
            done = self._tell(
                "response.function_call_arguments.done", **self._place(), name=item["name"], arguments=text
            )
        return done + self._tell("response.output_item.done", output_index=len(self.items) - 1, item=item)


def _is_json(text: str) -> bool:
    """Whether arguments came to their end."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _response(call: ResponsesCall, status: str, output: list[_Item], **more: Any) -> dict[str, Any]:
    return {
        "id": call.chat.id,
        "object": "response",
        "created_at": call.chat.created,
        "status": status,
        "error": None,
        "incomplete_details": None,
        **call.repeated,
        "output": output,
        "usage": None,
        **more,
    }


def _finished(call: ResponsesCall, request: GenerationRequest, output: list[_Item]) -> dict[str, Any]:
    """The response when its one output is complete."""
    status, usage = _status(request), payload.usage([request])
    return _response(
        call,
        status,
        output,
        incomplete_details=None if status == "completed" else {"reason": "max_output_tokens"},
        usage={
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
        timings=payload.timings(request.result.timings),
        seed=request.result.seed,
    )


def _status(request: GenerationRequest) -> str:
    return "completed" if request.result.finish_reason == "stop" else "incomplete"


async def responses(app: App, exchange: Exchange) -> None:
    call = await parse(app, exchange, await app.fields(exchange, FIELDS))
    async with app.job(exchange, call.chat.model, call.make, call.chat.params) as job:
        if call.chat.stream is None:
            (request,) = await app.finish(exchange, call.chat.model, job)
            response, stored = await work.made_of([request], lambda: _kept(call, _whole(call, request)))
            if stored is not None and await app.store.put(call.chat.id, stored):
                body = stored.response
            else:
                body = await work.made_of([request], lambda: dumps(_unkept(response)))
            await exchange.reply(200, body, b"application/json")
        else:
            await _stream(app, exchange, call, job)


async def input_tokens(app: App, exchange: Exchange) -> None:
    """How many tokens the prompt of such a request has."""
    call = await parse(app, exchange, await app.fields(exchange, FIELDS))
    ids = await app.aside(call.chat.prompt_ids)
    await exchange.reply_json({"object": "response.input_tokens", "input_tokens": len(ids)})


def _kept(call: ResponsesCall, response: dict[str, Any]) -> tuple[dict[str, Any], Stored | None]:
    """A response as it is answered, and as it is kept if there is room."""
    return response, None if call.kept is None else Stored.of(call.owner, response, call.kept)


def _unkept(response: dict[str, Any]) -> dict[str, Any]:
    return {**response, "store": False}


def _whole(call: ResponsesCall, request: GenerationRequest) -> dict[str, Any]:
    output = _Output(call, _silence)
    output.push(request.result.text)
    output.finish(_status(request))
    return _finished(call, request, output.items)


def _silence(kind: str, **more: Any) -> bytes:
    return b""


async def _stream(app: App, exchange: Exchange, call: ResponsesCall, job: Job) -> None:
    numbers = itertools.count()

    def tell(kind: str, **more: Any) -> bytes:
        return event({"type": kind, "sequence_number": next(numbers), **more}, kind)

    output = _Output(call, tell)

    def part(index: int, pieces: list[Piece]) -> bytes:
        return output.push("".join(piece.text for piece in pieces))

    begun = _response(call, "in_progress", [])
    first = tell("response.created", response=begun) + tell("response.in_progress", response=begun)
    (request,) = await app.stream(exchange, call.chat.model, job, first, part)
    last = output.finish(_status(request))
    response, stored = await work.made_of([request], lambda: _kept(call, _finished(call, request, output.items)))
    # before its client can know of its end
    if stored is not None and not await app.store.put(call.chat.id, stored):
        response = _unkept(response)
    await exchange.end(last + tell(f"response.{response['status']}", response=response))
