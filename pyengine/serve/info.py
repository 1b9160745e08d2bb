"""What the server is and has: /health, /metrics, /props, /v1/models."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from pyengine import __version__
from pyengine.serve.metrics import CONTENT_TYPE, text_of

if TYPE_CHECKING:
    from pyengine.serve.app import App
    from pyengine.serve.exchange import Exchange


async def health(app: App, exchange: Exchange) -> None:
    """200 when requests are taken, else 503; never waits for the engine."""
    ready = app.health == "ready"
    headers = () if ready else ((b"retry-after", b"1"),)
    await exchange.reply_json({"status": "ok" if ready else app.health}, 200 if ready else 503, headers)


async def metrics(app: App, exchange: Exchange) -> None:
    """Of all the processes behind this address."""
    if app.siblings is None:
        text = await asyncio.to_thread(app.metrics.text)  # it waits for the step that runs
    else:
        own, others = await asyncio.gather(asyncio.to_thread(app.metrics.snapshot), app.siblings.gather())
        text = text_of({app.siblings.number: own, **others})
    await exchange.reply(200, text, CONTENT_TYPE)


async def models(app: App, exchange: Exchange) -> None:
    await exchange.reply_json({"object": "list", "data": app.models.cards()})


async def model(app: App, exchange: Exchange) -> None:
    await exchange.reply_json(app.models.get(exchange.path_id).card())


async def props(app: App, exchange: Exchange) -> None:
    """Of the model that ?model= names, or of the default: what it is, its template and its defaults."""
    query = parse_qs(exchange.query)
    chosen = app.models.get(query["model"][-1] if "model" in query else None)
    engine = chosen.engine
    bos, text = engine.tokenizer.bos_id, engine.tokenizer.token_text
    counts = app.queue.counts().values()
    await exchange.reply_json(
        {
            "model": chosen.name,
            "n_ctx": engine.n_ctx,
            "vocab_size": engine.vocab_size,
            "bos_token": None if bos is None else text(bos),
            "eos_tokens": [text(token) for token in engine.eos_token_ids],
            "has_chat_template": chosen.has_template,
            "chat_template": chosen.template.source,
            "has_infill": chosen.fills_in,
            "default_generation_settings": engine.generation_defaults(),
            "isa": engine.isa,
            "n_threads": engine.n_threads,
            "requests_waiting": sum(waiting for waiting, _ in counts),
            "requests_running": sum(running for _, running in counts),
            "max_queue_tokens": app.settings.max_queue_tokens,
            "build": f"pyengine {__version__}",
        }
    )
