"""/tokenize and /detokenize, with llama.cpp's fields and vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pyengine.serve.errors import bad_request
from pyengine.serve.exchange import Exchange, dumps
from pyengine.serve.fields import BOOLEAN, STRING, TRUE, Kind, Table, integer, list_of, needed
from pyengine.serve.messages import ENDING, MESSAGES, chat_messages, ending_of

if TYPE_CHECKING:
    from pyengine.serve.app import App


def _read_ids(value: Any, path: str) -> list[int]:
    for i, one in enumerate(list_of(integer()).read(value, path)):
        if one < 0:
            raise bad_request(f"{path}[{i}] is no token id", f"{path}[{i}]")
    ids: list[int] = value
    return ids


TOKEN_IDS = Kind({"type": "array", "items": {"type": "integer", "minimum": 0}}, _read_ids)


def check_token_ids(values: Sequence[int], path: str, vocab_size: int) -> None:
    """Of ids that are no less than 0, as TOKEN_IDS reads them. Raises HTTPError."""
    if max(values, default=0) < vocab_size:  # at once: there may be a million, and the event loop waits
        return
    for i, value in enumerate(values):
        if value >= vocab_size:
            raise bad_request(f"{path}[{i}] is no token id from 0 to {vocab_size - 1}", f"{path}[{i}]")


TOKENIZE: Table = {
    "model": STRING,
    "content": STRING,
    "prompt": STRING,
    "messages": MESSAGES,
    **ENDING,
    "add_special": TRUE,
    "add_special_tokens": TRUE,
    "parse_special": BOOLEAN,
    "with_pieces": BOOLEAN,
}


async def tokenize(app: App, exchange: Exchange) -> None:
    """{"content" or "prompt": text} or {"messages": [...]} -> {"tokens": [...], "count", "max_model_len"}."""
    fields = await app.fields(exchange, TOKENIZE)
    model = app.models.get(fields.take("model"))
    given = [name for name in ("content", "prompt", "messages") if fields.has(name)]
    if len(given) != 1:
        raise bad_request("give one of content, prompt and messages", given[1] if given else "content")
    if given == ["messages"]:
        messages = chat_messages(fields.take("messages"))
        encode: Any = partial(model.chat_ids, messages, ending=ending_of(fields, messages))
    else:
        add_bos = all([fields.take("add_special"), fields.take("add_special_tokens")])
        parse = fields.take("parse_special")
        encode = partial(model.engine.tokenize, fields.take(given[0]), add_bos=add_bos, parse_special=parse)
    with_pieces = fields.take("with_pieces")
    fields.end()

    def body() -> bytes:
        tokens = ids = encode()
        if with_pieces:
            tokens = [{"id": token, "piece": _piece(model.engine.tokenizer.token_bytes(token))} for token in ids]
        return dumps({"tokens": tokens, "count": len(ids), "max_model_len": model.engine.n_ctx})

    await exchange.reply(200, await app.aside(body), b"application/json")


def _piece(data: bytes) -> str | list[int]:
    """As llama.cpp gives it: text, or the bytes if they are no text."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return list(data)


DETOKENIZE: Table = {"model": STRING, "tokens": needed(TOKEN_IDS), "skip_special_tokens": BOOLEAN}


async def detokenize(app: App, exchange: Exchange) -> None:
    """{"tokens": [...]} -> {"content": text, "prompt": the same}."""
    fields = await app.fields(exchange, DETOKENIZE)
    model = app.models.get(fields.take("model"))
    tokens, skip = fields.take("tokens"), fields.take("skip_special_tokens")
    check_token_ids(tokens, "tokens", model.engine.vocab_size)
    fields.end()

    def body() -> bytes:
        text = model.engine.detokenize(tokens, skip_special_tokens=skip)
        return dumps({"content": text, "prompt": text})

    await exchange.reply(200, await app.aside(body), b"application/json")
