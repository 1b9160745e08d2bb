"""/tokenize and /detokenize, with llama.cpp's fields and vLLM's."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from pyengine.serve.errors import bad_request
from pyengine.serve.exchange import Exchange
from pyengine.serve.messages import chat_messages

if TYPE_CHECKING:
    from pyengine.serve.app import App


async def tokenize(app: App, exchange: Exchange) -> None:
    """{"content" or "prompt": text} or {"messages": [...]} -> {"tokens": [...], "count", "max_model_len"}."""
    fields = await app.fields(exchange)
    model = app.models.get(fields.string("model"))
    given = [name for name in ("content", "prompt", "messages") if fields.has(name)]
    if len(given) != 1:
        raise bad_request("give one of content, prompt and messages", given[1] if given else "content")
    if given == ["messages"]:
        add_prompt = fields.boolean("add_generation_prompt", True)
        encode: Any = partial(model.chat_ids, chat_messages(fields), add_generation_prompt=add_prompt)
    else:
        text = fields.required_string(given[0])
        specials = [name for name in ("add_special", "add_special_tokens") if fields.has(name)]
        add_bos = all(map(partial(fields.boolean, default=True), specials))
        parse = fields.boolean("parse_special")
        encode = partial(model.engine.tokenize, text, add_bos=add_bos, parse_special=parse)
    with_pieces = fields.boolean("with_pieces")
    fields.end()
    ids = await asyncio.to_thread(encode)
    tokens: list[Any] = ids
    if with_pieces:
        pieces = (model.engine.tokenizer.token_bytes(token) for token in ids)
        tokens = [{"id": token, "piece": _piece(piece)} for token, piece in zip(ids, pieces, strict=True)]
    await exchange.reply_json({"tokens": tokens, "count": len(ids), "max_model_len": model.engine.n_ctx})


def _piece(data: bytes) -> str | list[int]:
    """As llama.cpp gives it: text, or the bytes if they are no text."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return list(data)


async def detokenize(app: App, exchange: Exchange) -> None:
    """{"tokens": [...]} -> {"content": text, "prompt": the same}."""
    fields = await app.fields(exchange)
    model = app.models.get(fields.string("model"))
    tokens = token_ids(fields.list_("tokens"), "tokens", model.engine.vocab_size)
    skip = fields.boolean("skip_special_tokens")
    fields.end()
    text = await asyncio.to_thread(model.engine.detokenize, tokens, skip_special_tokens=skip)
    await exchange.reply_json({"content": text, "prompt": text})


def token_ids(values: list[Any] | None, path: str, vocab_size: int) -> list[int]:
    """Checked token ids. Raises HTTPError."""
    if values is None:
        raise bad_request(f"you must provide {path}", path, "missing_required_parameter")
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise bad_request(f"{path}[{i}] is no token id from 0 to {vocab_size - 1}", f"{path}[{i}]")
    return values
