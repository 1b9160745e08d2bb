"""/v1/responses/{id}: responses that are kept, and the items that they were computed from."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pyengine.serve.errors import HTTPError, bad_request
from pyengine.serve.exchange import Exchange
from pyengine.serve.fields import STRING, Kind, Table, hint, integer, list_of, one_of, query_fields, refused
from pyengine.serve.neutral import VACUOUS
from pyengine.serve.prompts import SALT
from pyengine.serve.response_fields import LONG
from pyengine.serve.store import owner_of
from pyengine.serve.work import unless_short

if TYPE_CHECKING:
    from pyengine.serve.app import App
    from pyengine.serve.fields import Fields
    from pyengine.serve.store import Stored


def _written(kind: Kind) -> Kind:
    """A number, as it is written in a query."""

    def read(value: str, path: str) -> Any:
        is_number = value.isascii() and value.isdigit() and len(value) < 20
        return kind.read(int(value) if is_number else value, path)

    return replace(kind, read=read)


# What a query may hold.
_CALLER: Table = {"cache_salt": SALT}  # with which the response was asked for
_INCLUDE: Table = dict.fromkeys(("include", "include[]"), hint(list_of(VACUOUS)))
_NO_STREAM = refused("a response that is kept is whole", "false")
RETRIEVE: Table = {**_CALLER, **_INCLUDE, "stream": _NO_STREAM, "include_obfuscation": _NO_STREAM}
DELETE: Table = _CALLER
INPUT_ITEMS: Table = {
    **_CALLER,
    **_INCLUDE,
    "limit": replace(_written(integer(1, 100)), default=20),
    "order": one_of("asc", "desc", default="desc"),
    "after": STRING,
    "before": STRING,
}


def _not_found(id_: str) -> HTTPError:
    shown = id_ if len(id_) <= 100 else id_[:100] + "…"
    return HTTPError(404, f"there is no response {shown!r} among those that are kept", code="response_not_found")


async def _stored(app: App, exchange: Exchange, fields: Fields) -> Stored:
    """Raises HTTPError 404, also for what is somebody else's."""
    stored = await app.store.get(owner_of(exchange.key_digest, fields.take("cache_salt")), exchange.path_id)
    if stored is None:
        raise _not_found(exchange.path_id)
    return stored


async def retrieve(app: App, exchange: Exchange) -> None:
    """The response as it was answered."""
    stored = await _stored(app, exchange, query_fields(exchange.query, RETRIEVE))
    await exchange.reply(200, stored.response, b"application/json")


async def delete(app: App, exchange: Exchange) -> None:
    """Those that went on from it stay as they are."""
    salt = query_fields(exchange.query, DELETE).take("cache_salt")
    if not await app.store.delete(owner_of(exchange.key_digest, salt), exchange.path_id):
        raise _not_found(exchange.path_id)
    await exchange.reply_json({"id": exchange.path_id, "object": "response", "deleted": True})


async def input_items(app: App, exchange: Exchange) -> None:
    """A page of the items that a response was computed from, those of earlier turns included."""
    fields = query_fields(exchange.query, INPUT_ITEMS)
    stored = await _stored(app, exchange, fields)
    items: list[dict[str, Any]] = await unless_short(LONG, len(stored.items), json.loads, stored.items)
    if fields.take("order") == "desc":
        items.reverse()
    begin, end = 0, len(items)
    if fields.has("after"):
        begin = _place(items, fields.take("after"), "after") + 1
    if fields.has("before"):
        end = _place(items, fields.take("before"), "before")
    chosen, limit = items[begin:end], fields.take("limit")
    page = chosen[:limit]
    await exchange.reply_json(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(chosen) > limit,
        }
    )


def _place(items: list[dict[str, Any]], id_: str, name: str) -> int:
    for i, item in enumerate(items):
        if item["id"] == id_:
            return i
    raise bad_request(f"{name}: the response was not computed from an item {id_[:100]!r}", name)
