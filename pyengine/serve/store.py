"""Responses that are kept for those who asked for them, in memory, up to a number of them and of bytes.

A kept response holds the whole of its conversation, so it depends on no other one: where another is deleted, or makes room,
nothing that came after it is lost. Texts are kept as the bytes that they are counted as.

Room is made by whoever has most, with what he has used least recently. So a tenant may have all the room that nobody else wants,
and none can drive out another one who has less: of n tenants who all want more, each has an n-th. Before them room is made by
those who have used nothing for an hour, the one who has been away longest first: shares are for whoever is there. A tenant is
whoever has a key, where there are several keys, and otherwise a cache_salt.
"""

from __future__ import annotations

import hashlib
import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pyengine.serve.exchange import dumps

# Whose it is: digests of a key, None where there are no keys, and of what the request itself kept apart by (cache_salt), which
# may be as long as a body.
Owner = tuple[bytes | None, bytes | None]

OVERHEAD = 1024  # bytes that a response is counted beside its own: objects, keys of tables
ITEM_OVERHEAD = 256  # and for each item of its output, which can be found by its id
AWAY = 3600.0  # seconds without a use of the store, after which a tenant is not there


def owner_of(key_digest: bytes | None, salt: str | None) -> Owner:
    """Of a request with this key and cache_salt."""
    return key_digest, None if salt is None else hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True, slots=True)
class Stored:
    """A response: the bytes of the answer, those of the list of items that it was computed from, and the ids of its output."""

    owner: Owner
    response: bytes
    items: bytes
    output_ids: tuple[str, ...]

    @classmethod
    def of(cls, owner: Owner, response: Mapping[str, Any], items: bytes) -> Stored:
        return cls(owner, dumps(response), items, tuple(item["id"] for item in response["output"]))

    @property
    def n_bytes(self) -> int:
        return OVERHEAD + len(self.response) + len(self.items) + ITEM_OVERHEAD * len(self.output_ids)


class Store(Protocol):
    """Where responses are kept, by this process or by another (shared_store.py). Nobody finds what is not his, as if it were not
    there. Raises HTTPError 503 where the process that keeps them has ended."""

    @property
    def keeps_any(self) -> bool: ...

    async def put(self, id_: str, stored: Stored) -> bool:
        """Keep one under an id that is new. Whether there is room: for one that alone is too large there is none."""

    async def get(self, owner: Owner, id_: str) -> Stored | None: ...

    async def with_item(self, owner: Owner, item_id: str) -> Stored | None:
        """The response that has an item of this id in its output."""

    async def delete(self, owner: Owner, id_: str) -> bool:
        """Whether it was there."""


@dataclass(slots=True)
class _Held:
    """What a tenant has, by id, the least recently used first; its bytes; and when it last put or found something."""

    stored: OrderedDict[str, Stored] = field(default_factory=OrderedDict)
    n_bytes: int = 0
    used: float = 0.0


class ResponseStore(Store):
    """At most `max_responses` responses, of `max_bytes` bytes together. by_key: tenants are told apart by their keys, not by
    cache_salt. clock: seconds, never backwards. Each call is done at once, in the event loop."""

    def __init__(
        self, max_responses: int, max_bytes: int, *, by_key: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._by_key = by_key
        self._clock = clock
        self._held: dict[bytes | None, _Held] = {}  # by tenant, of those that have something
        self._stored: dict[str, Stored] = {}  # by id
        self._response_of: dict[str, str] = {}  # {id of an item of an output: id of the response}
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    @property
    def keeps_any(self) -> bool:
        return self._max_responses > 0

    async def put(self, id_: str, stored: Stored) -> bool:
        making_room = self._making_room(stored)
        if making_room is None:
            return False
        for one in making_room:
            self._drop(one)
        held = self._held.setdefault(self._tenant(stored), _Held())
        held.stored[id_] = self._stored[id_] = stored
        held.n_bytes += stored.n_bytes
        held.used = self._clock()
        self.n_bytes += stored.n_bytes
        self._response_of.update(dict.fromkeys(stored.output_ids, id_))
        return True

    async def get(self, owner: Owner, id_: str) -> Stored | None:
        stored = self._stored.get(id_)
        if stored is None or stored.owner != owner:
            return None
        held = self._held[self._tenant(stored)]
        held.stored.move_to_end(id_)
        held.used = self._clock()
        return stored

    async def with_item(self, owner: Owner, item_id: str) -> Stored | None:
        return await self.get(owner, self._response_of.get(item_id, ""))

    async def delete(self, owner: Owner, id_: str) -> bool:
        if await self.get(owner, id_) is None:
            return False
        self._drop(id_)
        return True

    def _tenant(self, stored: Stored) -> bytes | None:
        return stored.owner[0 if self._by_key else 1]

    def _making_room(self, new: Stored) -> list[str] | None:
        """Ids of the responses that make room for a new one; None if it has to go itself, and then no other one does."""
        n, n_bytes = len(self._stored) + 1, self.n_bytes + new.n_bytes
        if n <= self._max_responses and n_bytes <= self._max_bytes:
            return []
        counts = {tenant: [len(held.stored), held.n_bytes] for tenant, held in self._held.items()}
        own = counts.setdefault(self._tenant(new), [0, 0])
        own[0] += 1
        own[1] += new.n_bytes
        tenants, asking = list(counts), self._tenant(new)
        held_by = [self._held.get(one, _Held()) for one in tenants]
        oldest = [iter(held.stored.items()) for held in held_by]
        since = self._clock() - AWAY

        def entry(i: int) -> tuple[bool, float, bool, int]:
            """Of the heap. First come tenants who are away and have something, in the order in which they were last there. Of the
            others the first has most: the larger of a tenant's two shares, of responses and of bytes; of equals the one who
            asks comes first."""
            held, held_bytes = counts[tenants[i]]
            if held and held_by[i].used < since and tenants[i] != asking:
                return False, held_by[i].used, True, i
            return True, -max(held * self._max_bytes, held_bytes * self._max_responses), tenants[i] != asking, i

        going: list[str] = []
        heap = [entry(i) for i in range(len(tenants))]
        heapq.heapify(heap)
        while n > self._max_responses or n_bytes > self._max_bytes:
            *_, i = heap[0]
            id_, stored = next(oldest[i], ("", new))
            if stored is new:
                return None
            going.append(id_)
            n, n_bytes = n - 1, n_bytes - stored.n_bytes
            counts[tenants[i]][0] -= 1
            counts[tenants[i]][1] -= stored.n_bytes
            heapq.heapreplace(heap, entry(i))
        return going

    def _drop(self, id_: str) -> None:
        stored = self._stored.pop(id_)
        tenant = self._tenant(stored)
        held = self._held[tenant]
        del held.stored[id_]
        held.n_bytes -= stored.n_bytes
        if not held.stored:
            del self._held[tenant]
        for item_id in stored.output_ids:
            del self._response_of[item_id]
        self.n_bytes -= stored.n_bytes
