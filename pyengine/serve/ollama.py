"""/api: ollama's form of a chat, of a text and of embeddings, and its lists of models. How a request is read stands in
ollama_fields.py. A stream is a JSON object a line."""

from __future__ import annotations

import asyncio
import hashlib
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from pyengine import __version__
from pyengine.results import Generation, Piece
from pyengine.serve import work
from pyengine.serve.answer import Call
from pyengine.serve.chat import ChatCall
from pyengine.serve.embeddings import EmbeddingsCall, most_dimensions
from pyengine.serve.exchange import Exchange, dumps
from pyengine.serve.ollama_fields import CHAT, EMBED, GENERATE, SHOW, model_of, parse_chat, parse_generate
from pyengine.serve.prompts import note_user
from pyengine.serve.rows import checked_number
from pyengine.serve.tools import arguments_of, reader_of

if TYPE_CHECKING:
    from pyengine.run.jobs import Job
    from pyengine.serve.app import App
    from pyengine.serve.models import ServedModel

API_VERSION = "0.12.0"  # of ollama, whose form this is; clients compare it with what they need
LINES = b"application/x-ndjson"

# -------------------------------------------------------------------- answers


class _Output:
    """An answer as it grows: text at once, and each call when it is complete, since a line has whole calls."""

    def __init__(self, call: Call) -> None:
        self._is_chat = isinstance(call, ChatCall) and call.messages_field == "messages"
        self._reader = reader_of(call.tools if isinstance(call, ChatCall) else None)
        self._name = ""  # of the call that is being written
        self._arguments: list[str] = []
        self._n_calls = 0

    def push(self, text: str) -> list[dict[str, Any]]:
        return [part for delta in self._reader.push(text) for part in self._delta(delta)]

    def finish(self) -> list[dict[str, Any]]:
        return [part for delta in self._reader.finish() for part in self._delta(delta)] + self._complete()

    def part(self, content: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._is_chat:
            return {"response": content}
        return {"message": {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}}

    def whole(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """One part of all."""
        if not self._is_chat:
            return self.part("".join(one["response"] for one in parts), [])
        messages = [one["message"] for one in parts]
        calls = [call for one in messages for call in one.get("tool_calls", ())]
        return self.part("".join(one["content"] for one in messages), calls)

    def _delta(self, delta: dict[str, Any]) -> list[dict[str, Any]]:
        if "content" in delta:
            return [*self._complete(), self.part(delta["content"], [])]
        (part,) = delta["tool_calls"]
        done = self._complete() if "id" in part else []
        self._name = part["function"].get("name", self._name)
        self._arguments.append(part["function"]["arguments"])
        return done

    def _complete(self) -> list[dict[str, Any]]:
        """The call that was being written, if there is one."""
        if not self._name:
            return []
        function = {"index": self._n_calls, "name": self._name, "arguments": arguments_of("".join(self._arguments))}
        self._name, self._arguments = "", []
        self._n_calls += 1
        return [self.part("", [{"function": function}])]


def _time(seconds: float | None = None) -> str:
    when = datetime.now(timezone.utc) if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)
    return when.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _end(result: Generation) -> dict[str, Any]:
    """The last line's own; times are nanoseconds."""
    t = result.timings
    return {
        "done": True,
        "done_reason": "stop" if result.finish_reason == "stop" else "length",
        "total_duration": round(t.total * 1e9),
        "load_duration": 0,
        "prompt_eval_count": t.prompt_tokens,
        "prompt_eval_duration": round(t.time_to_first_token * 1e9),
        "eval_count": t.generated_tokens,
        "eval_duration": round((t.total - t.time_to_first_token) * 1e9),
    }


async def chat(app: App, exchange: Exchange) -> None:
    model, call = parse_chat(app, exchange, await app.fields(exchange, CHAT))
    await _answer(app, exchange, model, call, {"message": {"role": "assistant", "content": ""}})


async def generate(app: App, exchange: Exchange) -> None:
    model, call = parse_generate(app, exchange, await app.fields(exchange, GENERATE))
    await _answer(app, exchange, model, call, {"response": ""})


async def _answer(app: App, exchange: Exchange, model: ServedModel, call: Call | None, empty: dict[str, Any]) -> None:
    head = {"model": model.name}
    if call is None:
        await exchange.reply_json({**head, "created_at": _time(), **empty, "done": True, "done_reason": "load"})
        return
    output = _Output(call)
    async with app.job(exchange, model, call.make, call.params) as job:
        if call.stream is not None:
            await _stream(app, exchange, call, job, output)
            return
        (request,) = await app.finish(exchange, model, job)

        def whole() -> bytes:
            parts = output.push(request.result.text) + output.finish()
            return dumps({**head, "created_at": _time(), **output.whole(parts), **_end(request.result)})

        await exchange.reply(200, await work.made_of([request], whole), b"application/json")


async def _stream(app: App, exchange: Exchange, call: Call, job: Job, output: _Output) -> None:
    def line(part: dict[str, Any], **more: Any) -> bytes:
        return dumps({"model": call.model.name, "created_at": _time(), **part, "done": False, **more}) + b"\n"

    def part(index: int, pieces: list[Piece]) -> bytes:
        return b"".join(map(line, output.push("".join(piece.text for piece in pieces))))

    nothing = output.part("", [])
    (request,) = await app.stream(exchange, call.model, job, b"", part, content_type=LINES, silence=line(nothing))
    last = b"".join(map(line, output.finish()))
    await exchange.end(last + line(nothing, **_end(request.result)))


async def embed(app: App, exchange: Exchange) -> None:
    fields = await app.fields(exchange, EMBED)
    model = model_of(app.models, fields.take("model"))
    given = fields.take("input")
    checked_number(len(given), "input")
    dimensions = most_dimensions(fields.take("dimensions"), model)
    note_user(exchange, fields)
    call = EmbeddingsCall(model, given, None, False, dimensions, app.cache_salt(exchange, fields))
    fields.take("options")
    fields.end()
    async with app.job(exchange, model, call.make) as job:
        await call.finish(app, exchange, job)

    def body() -> bytes:
        """In a thread, since many vectors are long."""
        times = {"total_duration": round(call.seconds * 1e9), "load_duration": 0}
        return dumps({"model": model.name, "embeddings": call.values(), **times, "prompt_eval_count": call.n_tokens})

    await exchange.reply(200, await asyncio.to_thread(body), b"application/json")


# -------------------------------------------------------------------- models


def _card(model: ServedModel) -> dict[str, Any]:
    """digest: made of the file's name, size and date; the file is not read for it."""
    digest = hashlib.sha256(f"{model.name} {model.n_bytes} {model.created}".encode()).hexdigest()
    return {"name": model.name, "model": model.name, "size": model.n_bytes, "digest": digest, "details": _details(model)}


def _details(model: ServedModel) -> dict[str, Any]:
    family = _family(model)
    parent = "" if model.adapter is None else model.base
    return {
        "parent_model": parent,
        "format": "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": model.engine.config["kinds"]["default"],
    }


def _family(model: ServedModel) -> str:
    return str(model.engine.config["architecture"]).removesuffix("ForCausalLM").lower()


async def tags(app: App, exchange: Exchange) -> None:
    models = [app.models.get(name) for name in app.models.names()]
    await exchange.reply_json({"models": [{**_card(one), "modified_at": _time(one.created)} for one in models]})


async def running(app: App, exchange: Exchange) -> None:
    """All of them, for as long as the server runs."""
    models = [app.models.get(name) for name in app.models.names()]
    more = {"expires_at": "9999-12-31T23:59:59Z", "size_vram": 0}
    cards = [{**_card(one), **more, "context_length": one.engine.n_ctx} for one in models]
    await exchange.reply_json({"models": cards})


async def show(app: App, exchange: Exchange) -> None:
    fields = await app.fields(exchange, SHOW)
    named, older = fields.take("model"), fields.take("name")
    fields.end()
    model = model_of(app.models, older if named is None else named)
    family, config = _family(model), model.engine.config
    tools = ["tools"] if model.call_syntax is not None else []
    insert = ["insert"] if model.fills_in else []
    await exchange.reply_json(
        {
            "template": model.template.source,
            "details": _details(model),
            "model_info": {
                "general.architecture": family,
                f"{family}.context_length": model.engine.n_ctx,
                f"{family}.embedding_length": config["dim"],
                f"{family}.block_count": config["n_layers"],
            },
            "capabilities": ["completion", *tools, *insert, "embedding"],
            "modified_at": _time(model.created),
        }
    )


async def version(app: App, exchange: Exchange) -> None:
    await exchange.reply_json({"version": API_VERSION, "server": f"pyengine {__version__}"})
