"""Paths and what answers them. An endpoint's module is imported when it is first asked for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    "/tokenize": {"POST": "tokens.tokenize"},
    "/detokenize": {"POST": "tokens.detokenize"},
    "/v1/models": {"GET": "info.models"},
    "/v1/chat/completions": {"POST": "chat.chat_completions"},
    "/v1/completions": {"POST": "completions.completions"},
    "/v1/embeddings": {"POST": "embeddings.embeddings"},
    "/v1/responses": {"POST": "responses.responses"},
}
MODEL_PATH = "/v1/models/"  # and the rest is a name, slashes included
ONE_MODEL = f"{MODEL_PATH}{{id}}"  # all of these, in OpenAPI's notation

# Paths of other servers, and what does here what they do there.
ELSEWHERE = {
    "/api/chat": "/v1/chat/completions",
    "/api/generate": "/v1/completions",
    "/api/tags": "/v1/models",
    "/api/embed": "/v1/embeddings",
    "/api/embeddings": "/v1/embeddings",
    "/completion": "/v1/completions",
    "/embedding": "/v1/embeddings",
    "/generate": "/v1/completions",
    "/slots": "/metrics",
    "/v1/messages": "/v1/chat/completions",
    "/version": "/props",
}


def full_path(path: str) -> str:
    """The path with /v1, which may be missing, as clients that are told an address without it ask."""
    return f"/v1{path}" if f"/v1{path}" in ROUTES or f"/v1{path}".startswith(MODEL_PATH) else path


def find_route(path: str) -> dict[str, Handler] | None:
    """{method: handler} of a full path."""
    route = ROUTES.get(path)
    if route is None and path.startswith(MODEL_PATH):
        route = {"GET": "info.model"}
    return None if route is None else {method: _handler(name) for method, name in route.items()}


def label(path: str) -> str:
    """What the metrics call a full path: one of few words, whatever clients ask for."""
    return ONE_MODEL if path.startswith(MODEL_PATH) else path if path in ROUTES else "other"


def hint(path: str) -> str:
    """What to ask instead of a path at which there is nothing, or nothing."""
    meant = ELSEWHERE.get(path) or next((one for one in ROUTES if one != "/" and path.rstrip("/").endswith(one)), None)
    return f"; there is {meant}" if meant else ""


def _handler(name: str) -> Handler:
    module, function = name.split(".")

    async def handle(app: App, exchange: Exchange) -> None:
        answer: Any = getattr(import_module(f"pyengine.serve.{module}"), function)
        await answer(app, exchange)

    return handle
