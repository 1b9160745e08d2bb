"""Responses that are kept for those who asked for them, in memory, up to a number of them and of bytes.

A kept response holds the whole of its conversation, so it depends on no other one: where another is deleted, or makes room,
nothing that came after it is lost. Texts are kept as the bytes that they are counted as. The least recently used makes room.
All of it is called in the event loop, but for `Stored` itself.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pyengine.serve.exchange import dumps

# Whose it is: digests of a key, None where there are no keys, and of what the request itself kept apart by (cache_salt), which
# may be as long as a body.
Owner = tuple[bytes | None, bytes | None]

OVERHEAD = 1024  # bytes that a response is counted beside its own: objects, keys of tables
ITEM_OVERHEAD = 256  # and for each item of its output, which can be found by its id


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


class ResponseStore:
    """At most `max_responses` responses, of `max_bytes` bytes together. Nobody finds what is not his, as if it were not there."""

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._stored: OrderedDict[str, Stored] = OrderedDict()  # by id, the least recently used first
        self._response_of: dict[str, str] = {}  # {id of an item of an output: id of the response}
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    @property
    def keeps_any(self) -> bool:
        return self._max_responses > 0

    def fits(self, stored: Stored) -> bool:
        """Whether there is room for it once all others have made theirs. In any thread."""
        return self.keeps_any and stored.n_bytes <= self._max_bytes

    def put(self, id_: str, stored: Stored) -> None:
        """Keep one that fits, under an id that is new."""
        while len(self._stored) >= self._max_responses or self.n_bytes + stored.n_bytes > self._max_bytes:
            self._drop(next(iter(self._stored)))
        self._stored[id_] = stored
        self._response_of.update(dict.fromkeys(stored.output_ids, id_))
        self.n_bytes += stored.n_bytes

    def get(self, owner: Owner, id_: str) -> Stored | None:
        stored = self._stored.get(id_)
        if stored is None or stored.owner != owner:
            return None
        self._stored.move_to_end(id_)
        return stored

    def with_item(self, owner: Owner, item_id: str) -> Stored | None:
        """The response that has an item of this id in its output."""
        return self.get(owner, self._response_of.get(item_id, ""))

    def delete(self, owner: Owner, id_: str) -> bool:
        """Whether it was there."""
        if self.get(owner, id_) is None:
            return False
        self._drop(id_)
        return True

    def _drop(self, id_: str) -> None:
        stored = self._stored.pop(id_)
        for item_id in stored.output_ids:
            del self._response_of[item_id]
        self.n_bytes -= stored.n_bytes
