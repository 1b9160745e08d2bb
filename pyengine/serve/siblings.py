"""What the processes of one address know of each other: whichever is asked for metrics tells those of all.

Each listens on a socket in Linux's abstract namespace: it has no file, so nothing is left behind however a process ends. Names
are no secret there, and that of a process that has ended is free: both sides look whose process is at the other end. Those of
the same user may connect and are told the metrics; nobody can say anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from pyengine.errors import PyEngineError

# Seconds that a sibling has: its engine's step may be a long one, and who collects metrics does not wait much longer (Prometheus
# 10 s by default). The socket of one that has ended is closed: only one that is stopped, or busy for longer, is left out.
TIMEOUT = 5.0
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def new_family() -> str:
    """What the names of one parent's processes have in common."""
    return f"pyengine-{secrets.token_hex(16)}"


class Siblings:
    """family: see `new_family`; number: of this process, from 0 on; n_processes: of the family; ends: of shared_store.py."""

    def __init__(self, family: str, number: int, n_processes: int, ends: Sequence[socket.socket] = ()) -> None:
        self.number = number
        self.ends = ends
        self._names = [f"\0{family}-{i}" for i in range(n_processes)]

    @contextlib.asynccontextmanager
    async def telling(self, facts: Callable[[], Any]) -> AsyncIterator[None]:
        """Tell who asks what facts() returns, a value of JSON's types; it is called in a thread. Nothing if it raises
        PyEngineError: engines close while processes end."""

        async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.closing(writer), contextlib.suppress(OSError, PyEngineError):
                if _is_own(writer):
                    writer.write(json.dumps(await asyncio.to_thread(facts)).encode())
                    await writer.drain()

        server = await asyncio.start_unix_server(tell, self._names[self.number])
        try:
            yield
        finally:
            server.close()

    async def gather(self) -> dict[int, Any]:
        """{number: what it tells} of the other processes; without those that do not answer: they start, or they end."""
        others = [i for i in range(len(self._names)) if i != self.number]
        told = await asyncio.gather(*(_answer(self._names[i]) for i in others))
        return {i: one for i, one in zip(others, told, strict=True) if one is not None}


async def _answer(name: str) -> Any:
    """What the process of this name tells; None if it does not, or is cut short."""
    try:
        return json.loads(await asyncio.wait_for(_ask(name), TIMEOUT))
    except (OSError, asyncio.TimeoutError, ValueError):
        return None


async def _ask(name: str) -> bytes:
    reader, writer = await asyncio.open_unix_connection(name)
    with contextlib.closing(writer):
        return await reader.read() if _is_own(writer) else b""


def _is_own(writer: asyncio.StreamWriter) -> bool:
    """Whether the process at the other end is one of this user."""
    return _uid(writer.get_extra_info("socket")) == os.geteuid()


def _uid(sock: socket.socket) -> int:
    """Of the process at the other end: of the one that connected, or of the one that listens."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(data)[1]
    return uid
