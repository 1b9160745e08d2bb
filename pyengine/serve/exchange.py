"""One request and its answer, over ASGI's receive and send."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from pyengine.serve.errors import HTTPError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

_ID = re.compile(r"[\x21-\x7e]{1,128}")
# Bytes of a body that is too long, read all the same: a client that still writes would not see our answer.
DISCARDED = 16
# Those that JSON lets stand in a string; it escapes the others itself.
_LINE_ENDS = [(char, f"\\u{ord(char):04x}") for char in "\x85\u2028\u2029"]


class Exchange:
    """id of the request, its method, path and headers; the answer's status; notes for the log."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: str = scope.get("query_string", b"").decode("latin-1")
        self.client: str = (scope.get("client") or ("-", 0))[0]
        self.http_version: str = scope.get("http_version", "")
        self.headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            self.headers.setdefault(name.decode("latin-1"), value.decode("latin-1"))
        self.n_hosts = sum(name == b"host" for name, _ in scope["headers"])
        given = self.headers.get("x-request-id", "")
        self.id = given if _ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        self.started = time.monotonic()
        self.status = 0
        self.is_stream = False
        self.notes: dict[str, Any] = {}
        self.extra_headers: list[tuple[bytes, bytes]] = []
        self.writing_since: float | None = None  # time.monotonic(), while the client does not take what we write
        self._receive = receive
        self._send = send
        self._more_body = True
        self._body_read = asyncio.Event()  # or nobody wants it
        self._abort: Callable[[], None] | None = (scope.get("extensions") or {}).get("pyengine.abort")
        self.key_digest: bytes | None = None
        self.path_id = ""  # what stands in the place of a route's {id}

    # ------------------------------------------------------------ the request

    async def body(self, limit: int, timeout: float, reserve: Callable[[int], None]) -> bytes:
        """The whole body; reserve(n) is called before n bytes more are kept. Raises HTTPError 413, 408, 415, and what `reserve`
        raises."""
        length = self.headers.get("content-length", "0")
        declared = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0
        expects = "100-continue" in self.headers.get("expect", "").lower()
        try:
            if declared > limit and expects:
                raise _too_long(limit)
            body = await asyncio.wait_for(self._read(limit, reserve), timeout)
            self._body_read.set()
        except asyncio.TimeoutError:
            self.extra_headers.append((b"connection", b"close"))
            raise HTTPError(408, f"the body was not complete after {timeout:g} seconds", code="body_timeout") from None
        except HTTPError:
            self.extra_headers.append((b"connection", b"close"))
            raise
        encoding = self.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            text = f"the body is encoded as {encoding[:100]!r} (content-encoding): send it as it is"
            raise HTTPError(415, text, code="unsupported_encoding")
        return body

    async def _read(self, limit: int, reserve: Callable[[int], None]) -> bytes:
        parts: list[bytes] = []
        size = 0
        while self._more_body and size <= DISCARDED * limit:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError
            data: bytes = message.get("body", b"")
            size += len(data)
            self._more_body = bool(message.get("more_body", False))
            if size <= limit:
                reserve(len(data))
                parts.append(data)
            else:
                parts.clear()
        if size > limit:
            raise _too_long(limit)
        return b"".join(parts)

    async def gone(self) -> None:
        """Return when the client has gone, once its body has been read."""
        await self._body_read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def hang_up(self) -> None:
        """Let this client go, whatever is still to be written. Needs the extension that server.py gives."""
        if self._abort is not None:
            self._abort()

    # ------------------------------------------------------------ the answer

    async def _start(self, status: int, headers: Headers) -> None:
        self.status = status
        all_headers = [(b"x-request-id", self.id.encode("latin-1")), *self.extra_headers, *headers]
        await self._send({"type": "http.response.start", "status": status, "headers": all_headers})

    async def reply(self, status: int, body: bytes, content_type: bytes, headers: Headers = ()) -> None:
        length = (b"content-length", b"%d" % len(body))
        await self._start(status, [(b"content-type", content_type), length, *headers])
        await self._write(b"" if self.method == "HEAD" else body, more=False)

    async def reply_json(self, value: Any, status: int = 200, headers: Headers = ()) -> None:
        await self.reply(status, dumps(value), b"application/json", headers)

    async def start_stream(self, content_type: bytes = b"text/event-stream; charset=utf-8") -> None:
        """Begin an answer that comes in parts, server-sent events if nothing else is said."""
        self.is_stream = True
        # x-accel-buffering: nginx passes events on as they come
        await self._start(
            200,
            [
                (b"content-type", content_type),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ],
        )

    async def write(self, data: bytes) -> None:
        await self._write(data, more=True)

    async def end(self, data: bytes = b"") -> None:
        await self._write(data, more=False)

    async def _write(self, data: bytes, *, more: bool) -> None:
        self.writing_since = time.monotonic()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self.writing_since = None


def dumps(value: Any) -> bytes:
    """JSON in one line, also for clients that split at every line end of Unicode (httpx's iter_lines, str.splitlines)."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for char, escape in _LINE_ENDS:
        text = text.replace(char, escape)
    return text.encode("utf-8", "replace")


def event(value: Any, name: str | None = None) -> bytes:
    """One server-sent event; its data is one line."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + dumps(value) + b"\n\n"


def _too_long(limit: int) -> HTTPError:
    return HTTPError(413, f"the body is longer than {limit} bytes", code="body_too_large")
