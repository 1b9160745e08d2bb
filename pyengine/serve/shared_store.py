"""One store of responses for several processes: the first keeps it, and the others ask it.

They ask over pairs of sockets that are made before any process is forked. No name leads to one, so nobody else can ask; and what
is kept is in one memory, within one set of bounds. When the first process ends, so do all (processes.py), and what was kept.

A message is the length of a line of JSON, the line, which says what is asked or answered and how long the parts are, and the
parts: bytes of responses, which are not JSON within JSON. A process is answered in the order in which it asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pyengine.serve.errors import HTTPError, shutting_down
from pyengine.serve.store import Owner, Store, Stored

_LENGTH = struct.Struct("=I")
_Message = tuple[Any, list[bytes]]  # a value of JSON's types, and the parts


class Links:
    """The pairs of sockets of n processes."""

    def __init__(self, n_processes: int) -> None:
        self._pairs = [socket.socketpair() for _ in range(n_processes - 1)]

    def of(self, number: int) -> list[socket.socket]:
        """In a process, once: its own ends. The first has one to each of the others, and another has one to the first."""
        own = [first for first, _ in self._pairs] if number == 0 else [self._pairs[number - 1][1]]
        self._close(but=own)
        return own

    def close(self) -> None:
        """In the parent, when all have theirs: the end of a process is then the end of its connections."""
        self._close()

    def _close(self, but: Sequence[socket.socket] = ()) -> None:
        for pair in self._pairs:
            for end in pair:
                if end not in but:
                    end.close()


@contextlib.asynccontextmanager
async def shared(store: Store, ends: Sequence[socket.socket]) -> AsyncIterator[None]:
    """Answer from the store, or ask for it, at these ends of a process, as long as the block runs."""
    if isinstance(store, SharedStore):
        await store.connect(*ends)
    task = asyncio.create_task(store.listen() if isinstance(store, SharedStore) else _keep(store, ends))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


# -------------------------------------------------------------------- the process that keeps


async def _keep(store: Store, ends: Sequence[socket.socket]) -> None:
    await asyncio.gather(*(_serve(store, end) for end in ends))


async def _serve(store: Store, end: socket.socket) -> None:
    """Answer what is asked at this end, until the other one is closed."""
    reader, writer = await asyncio.open_unix_connection(sock=end)
    with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while True:
            writer.write(await _answer(store, *await _read(reader)))
            await writer.drain()


async def _answer(store: Store, asked: Any, parts: list[bytes]) -> bytes:
    kind, owner, id_, *more = asked
    whose: Owner = (_bytes(owner[0]), _bytes(owner[1]))
    if kind == "put":
        response, items = parts
        return _message(await store.put(id_, Stored(whose, response, items, tuple(more[0]))))
    if kind == "delete":
        return _message(await store.delete(whose, id_))
    stored = await (store.get if kind == "get" else store.with_item)(whose, id_)
    return _message(None) if stored is None else _message(stored.output_ids, stored.response, stored.items)


# -------------------------------------------------------------------- a process that asks


class SharedStore(Store):
    """A store that another process keeps."""

    def __init__(self, keeps_any: bool) -> None:
        self._keeps_any = keeps_any
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None  # None before `connect`, and when the other process has ended
        self._asked: deque[asyncio.Future[_Message]] = deque()  # what is not answered yet, in its order

    @property
    def keeps_any(self) -> bool:
        return self._keeps_any

    async def put(self, id_: str, stored: Stored) -> bool:
        try:
            kept, _ = await self._ask(("put", stored.owner, id_, stored.output_ids), stored.response, stored.items)
        except HTTPError:  # nothing is kept any more
            return False
        return bool(kept)

    async def get(self, owner: Owner, id_: str) -> Stored | None:
        return self._stored(owner, *await self._ask(("get", owner, id_)))

    async def with_item(self, owner: Owner, item_id: str) -> Stored | None:
        return self._stored(owner, *await self._ask(("with_item", owner, item_id)))

    async def delete(self, owner: Owner, id_: str) -> bool:
        was_there, _ = await self._ask(("delete", owner, id_))
        return bool(was_there)

    @staticmethod
    def _stored(owner: Owner, output_ids: Any, parts: list[bytes]) -> Stored | None:
        if output_ids is None:
            return None
        response, items = parts
        return Stored(owner, response, items, tuple(output_ids))

    async def connect(self, end: socket.socket) -> None:
        self._reader, self._writer = await asyncio.open_unix_connection(sock=end)

    async def listen(self) -> None:
        """Hand the answers to those who wait for them, until the other process has ended."""
        assert self._writer is not None
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while True:
                    answer = await _read(self._reader)
                    future = self._asked.popleft()
                    if not future.done():  # whoever asked may have gone
                        future.set_result(answer)
        finally:
            self._writer.close()
            self._writer = None
            for future in self._asked:
                if not future.done():
                    future.set_exception(shutting_down())
            self._asked.clear()

    async def _ask(self, asked: Any, *parts: bytes) -> _Message:
        if self._writer is None:
            raise shutting_down()
        future: asyncio.Future[_Message] = asyncio.get_running_loop().create_future()
        self._asked.append(future)
        self._writer.write(_message(asked, *parts))
        return await future


# -------------------------------------------------------------------- messages


def _message(value: Any, *parts: bytes) -> bytes:
    head = json.dumps([value, [len(part) for part in parts]], default=bytes.hex).encode()
    return b"".join([_LENGTH.pack(len(head)), head, *parts])


async def _read(reader: asyncio.StreamReader) -> _Message:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    value, sizes = json.loads(await reader.readexactly(length))
    return value, [await reader.readexactly(size) for size in sizes]


def _bytes(given: str | None) -> bytes | None:
    return None if given is None else bytes.fromhex(given)
