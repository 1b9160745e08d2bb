"""Paths and what answers them. An endpoint's module is imported when it is first asked for."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pyengine.serve.app import App
    from pyengine.serve.exchange import Exchange

    Handler = Callable[[App, Exchange], Awaitable[None]]

# path: {method: module.function}
ROUTES: dict[str, dict[str, str]] = {
    "/": {"GET": "page.page"},
    "/health": {"GET": "info.health"},
    "/metrics": {"GET": "info.metrics"},
    "/props": {"GET": "info.props"},
    "/openapi.json": {"GET": "openapi.openapi"},
    "/infill": {"POST": "infill.infill"},
    "/tokenize": {"POST": "tokens.tokenize"},
    "/detokenize": {"POST": "tokens.detokenize"},
    "/api/chat": {"POST": "ollama.chat"},
    "/api/embed": {"POST": "ollama.embed"},
    "/api/generate": {"POST": "ollama.generate"},
    "/api/ps": {"GET": "ollama.running"},
    "/api/show": {"POST": "ollama.show"},
    "/api/tags": {"GET": "ollama.tags"},
    "/api/version": {"GET": "ollama.version"},
    "/v1/models": {"GET": "info.models"},
    "/v1/models/{id}": {"GET": "info.model"},
    "/v1/chat/completions": {"POST": "chat.chat_completions"},
    "/v1/completions": {"POST": "completions.completions"},
    "/v1/embeddings": {"POST": "embeddings.embeddings"},
    "/v1/messages": {"POST": "anthropic.messages"},
    "/v1/messages/count_tokens": {"POST": "anthropic.count_tokens"},
    "/v1/rerank": {"POST": "rerank.rerank"},
    "/v1/reranking": {"POST": "rerank.rerank"},
    "/v2/rerank": {"POST": "rerank.rerank"},
    "/v1/responses": {"POST": "responses.responses"},
    "/v1/responses/input_tokens": {"POST": "responses.input_tokens"},
    "/v1/responses/{id}": {"GET": "stored_responses.retrieve", "DELETE": "stored_responses.delete"},
    "/v1/responses/{id}/input_items": {"GET": "stored_responses.input_items"},
}
# What {id} is in a path: the name of a model may have slashes.
_ID = {"/v1/models/{id}": "(.*)"}
_WITH_ID = {one: re.compile(one.replace("{id}", _ID.get(one, "([^/]+)"))) for one in ROUTES if "{id}" in one}

# Paths of other servers, and what does here what they do there.
ELSEWHERE = {
    "/api/embeddings": "/api/embed",
    "/completion": "/v1/completions",
    "/embedding": "/v1/embeddings",
    "/generate": "/v1/completions",
    "/score": "/v1/rerank",
    "/slots": "/metrics",
    "/v1/fim/completions": "/v1/completions",
    "/v1/score": "/v1/rerank",
    "/version": "/props",
}
_OF_MODELS = ("/api/copy", "/api/create", "/api/delete", "/api/pull", "/api/push")


class Place(NamedTuple):
    """A path of ROUTES, and what stands in the place of its {id}."""

    path: str
    id: str = ""


def find_place(path: str) -> Place | None:
    """Of a path as it was asked for; /v1 may be missing, as with clients that are told an address without it."""
    for full in (path, f"/v1{path}"):
        if full in ROUTES and "{id}" not in full:
            return Place(full)
        for one, pattern in _WITH_ID.items():
            match = pattern.fullmatch(full)
            if match:
                return Place(one, match[1])
    return None


def handlers(place: Place) -> dict[str, Handler]:
    """By method."""
    return {method: _handler(name) for method, name in ROUTES[place.path].items()}


def hint(path: str) -> str:
    """What to ask instead of a path at which there is nothing, or nothing."""
    if path in _OF_MODELS:
        return "; models are those of the command line"
    plain = [one for one in ROUTES if one != "/" and one not in _WITH_ID]
    meant = ELSEWHERE.get(path) or next((one for one in plain if path.rstrip("/").endswith(one)), None)
    return f"; there is {meant}" if meant else ""


def _handler(name: str) -> Handler:
    module, function = name.split(".")

    async def handle(app: App, exchange: Exchange) -> None:
        answer: Any = getattr(import_module(f"pyengine.serve.{module}"), function)
        await answer(app, exchange)

    return handle
