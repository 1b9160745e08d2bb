"""/infill: what belongs between two texts, in llama.cpp's form, which editors speak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyengine.arguments import INT32_MAX
from pyengine.serve import neutral, payload, work
from pyengine.serve.completions import CompletionCall
from pyengine.serve.exchange import Exchange, dumps, event
from pyengine.serve.fields import BOOLEAN, STRING, Fields, Table, integer, list_of, needed, object_of
from pyengine.serve.prompts import CALLER, note_user
from pyengine.serve.sampling import SAMPLING, asked_by, parameter, sampling_params
from pyengine.serve.stream import StreamOptions

if TYPE_CHECKING:
    from pyengine.results import Generation, Piece
    from pyengine.run.jobs import Job
    from pyengine.serve.app import App

_FILE: Table = {"text": needed(STRING), "filename": STRING}
FIELDS: Table = {
    "input_prefix": needed(STRING),
    "input_suffix": needed(STRING),
    "input_extra": list_of(object_of(_FILE)),
    "prompt": STRING,  # the rest of input_prefix: editors send the line with the cursor by itself
    **CALLER,
    "stream": BOOLEAN,
    **SAMPLING,
    "token_healing": parameter("token_healing"),
    "n_predict": integer(-1, INT32_MAX),  # -1: as many as the context holds; 0: the texts are computed, for what comes next
    "response_fields": list_of(STRING),
    **neutral.INFILL,
}

UNNAMED = "tmp"  # a file without a name


def parse(app: App, exchange: Exchange, fields: Fields) -> tuple[CompletionCall, bool, list[str] | None]:
    """(the call, whether a text is wanted, what of the answer is). Every field is honoured or refused by name. Raises
    HTTPError."""
    model = app.models.get(fields.take("model"))
    prefix = fields.take("input_prefix") + (fields.take("prompt") or "")
    files = [(file.take("filename") or UNNAMED, file.take("text")) for file in fields.take("input_extra") or ()]
    most = fields.take("n_predict")
    # A prompt is computed for the token that follows it: one that nobody is told is what "none" costs.
    given: dict[str, Any] = {"max_tokens": max(most, 1)} if most is not None and most >= 0 else {}
    if fields.take("token_healing"):
        given["token_healing"] = True
    note_user(exchange, fields)
    call = CompletionCall(
        model=model,
        stream=StreamOptions() if fields.take("stream") else None,
        cache_salt=app.cache_salt(exchange, fields),
        prompts=[prefix],
        suffix=fields.take("input_suffix"),
        suffix_field="input_suffix",
        files=files,
        asked=asked_by(fields),
        params=sampling_params(fields, model, given),
    )
    wanted = fields.take("response_fields")
    fields.end()
    return call, most != 0, wanted


async def infill(app: App, exchange: Exchange) -> None:
    call, is_text, wanted = parse(app, exchange, await app.fields(exchange, FIELDS))
    async with app.job(exchange, call.model, call.make, call.params) as job:
        if call.stream is not None:
            await _stream(app, exchange, call, job, is_text)
            return
        (request,) = await app.finish(exchange, call.model, job)
        result = request.result

        def body() -> bytes:
            whole = _end(call, result, result.text if is_text else "", is_text)
            return dumps(whole if not wanted else _chosen(whole, wanted))

        await exchange.reply(200, await work.made_of([request], body), b"application/json")


async def _stream(app: App, exchange: Exchange, call: CompletionCall, job: Job, is_text: bool) -> None:
    n_tokens = 0

    def part(_: int, pieces: list[Piece]) -> bytes:
        nonlocal n_tokens
        n_tokens += sum(piece.token is not None for piece in pieces)
        text = "".join(piece.text for piece in pieces) if is_text else ""
        counts = {"tokens_predicted": n_tokens, "tokens_evaluated": len(work.generations(job)[0].prompt)}
        return event({"index": 0, "content": text, "tokens": [], "stop": False, "id_slot": -1, **counts}) if text else b""

    (request,) = await app.stream(exchange, call.model, job, b"", part)
    await exchange.end(event(_end(call, request.result, "", is_text)))


def _end(call: CompletionCall, result: Generation, text: str, is_text: bool) -> dict[str, Any]:
    """The answer, or a stream's last event."""
    t = result.timings
    is_word = isinstance(result.stop_reason, str)
    n_tokens = t.generated_tokens if is_text else 0
    return {
        "index": 0,
        "content": text,
        "tokens": [],
        "id_slot": -1,
        "stop": True,
        "model": call.model.name,
        "tokens_predicted": n_tokens,
        "tokens_evaluated": t.prompt_tokens,
        "tokens_cached": t.prompt_tokens + n_tokens,
        "generation_settings": {"n_ctx": call.model.engine.n_ctx, "seed": result.seed},
        "has_new_line": "\n" in result.text and is_text,
        "truncated": False,
        "stop_type": "limit" if result.finish_reason != "stop" else "word" if is_word else "eos",
        "stopping_word": result.stop_reason if is_word else "",
        "timings": payload.timings(t),
    }


def _chosen(whole: dict[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """What of the answer is wanted: names, of what lies inside an object with a slash, which stay in the answer's."""
    out: dict[str, Any] = {}
    for path in wanted:
        value: Any = whole
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            out[path] = value
    return out
