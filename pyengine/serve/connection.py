"""A connection: uvicorn's HTTP/1.1, with bounds on what a client may send before it is read, and on how long it may take.

httptools bounds neither the headers of a request nor those behind a chunked body, and uvicorn neither how many requests come
before their answers nor how long one takes to come.
"""

from __future__ import annotations

import asyncio
import importlib
from collections import deque
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_TIMEOUT = 15.0  # seconds for a request line and headers, from a connection's beginning or their own first byte on
KEEP_ALIVE = 75.0  # seconds between two requests of a connection
TAKE_TIMEOUT = 75.0  # seconds in which a client takes something of an answer that is all written
MAX_HEAD = 1 << 16  # bytes of a request line and headers, together with those behind a body
MAX_PIPELINED = 16  # requests that wait for the answer to an earlier one
ACCEPTED_AT_ONCE = 16  # connections
RESERVED = 64  # descriptors for all else: models, processes of templates, connections that are still to be closed


def most_connections() -> int:
    """As many as there are descriptors for: asyncio logs each that it cannot accept, thousands a second."""
    try:
        resource: Any = importlib.import_module("resource")
    except ImportError:  # Windows has no such limit
        return 1 << 16
    soft: int = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 16 if soft == resource.RLIM_INFINITY else max(soft - RESERVED, soft // 2)


class _TooMuch(Exception):
    """Raised in httptools' callbacks: it ends the parsing, and uvicorn refuses the request."""


def _new_parser(protocol: Protocol) -> Any:
    parser: Any = httptools.HttpRequestParser(protocol)
    if hasattr(parser, "set_dangerous_leniencies"):  # httptools 0.6.3: data behind a last request are passed over, as by uvicorn
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


class _Parser:
    """httptools', for which a wish to go on in another protocol changes nothing (RFC 9110, 7.8): by itself it would take all that
    follows for that protocol's, the body of the request as well. Java's client asks so for HTTP/2."""

    def __init__(self, protocol: Protocol) -> None:
        self._parser, self._protocol = _new_parser(protocol), protocol

    def feed_data(self, data: bytes) -> None:
        while True:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if not self.is_to_upgrade():  # CONNECT
                    raise
                data = self._protocol.head_without_upgrade() + data[upgrade.args[0] :]
                self._parser = _new_parser(self._protocol)  # the other has come to its end

    def is_to_upgrade(self) -> bool:
        return bool(self._parser.should_upgrade()) and self._parser.get_method() != b"CONNECT"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)


class Protocol(HttpToolsProtocol):
    """uvicorn's, and it lets go of a connection that sends no request, sends too much, or takes nothing of its answer."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.parser: Any = _Parser(self)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = None
        self._take_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0  # of the request that is being read
        self._unread_bytes = 0  # at least, since the parser last told of anything
        self._used = self.loop.time()  # when its last answer was written
        self._is_in_body = False
        self._unanswered: deque[Any] = deque()  # uvicorn's cycles, the oldest first
        self._await_head(HEADER_TIMEOUT)
        most = most_connections()
        if len(self.connections) > most:
            self._make_room(most)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cease_awaiting()
        if self._take_timer is not None:
            self._take_timer.cancel()
        for cycle in self._unanswered:  # uvicorn tells the newest only, which may wait behind the one that is computed
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_idle():
            # Data ends uvicorn's own timer, that of idle connections. A body that is sent on behind its answer is let come:
            # many clients read the answer only then.
            self._await_head(KEEP_ALIVE if self._is_in_body else HEADER_TIMEOUT)
        self._unread_bytes += len(data)
        super().data_received(data)
        if self._unread_bytes > MAX_HEAD and not self.transport.is_closing():  # one header without an end
            self.send_400_response("")

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be read, or is too much of it, and let go. In the middle of an answer, let go only."""
        if self._unanswered and self._unanswered[0].response_started:
            self.transport.close()
            return
        is_long = max(self._head_bytes, self._unread_bytes) > MAX_HEAD
        status = b"431 Request Header Fields Too Large" if is_long else b"400 Bad Request"
        text = b"the request line and headers are longer than %d bytes" % MAX_HEAD if is_long else msg.encode()
        head = b"HTTP/1.1 %s\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, len(text)) + text)
        self.transport.close()

    # ------------------------------------------------------------ what httptools tells

    def on_message_begin(self) -> None:
        super().on_message_begin()
        extensions: dict[str, Any] = {"pyengine.abort": self._abort}
        self.scope["extensions"] = extensions
        self._head_bytes = self._unread_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._cease_awaiting()
        self._unread_bytes = 0
        if self.parser.is_to_upgrade():  # it comes again, without that
            return
        if len(self.pipeline) == MAX_PIPELINED:
            raise _TooMuch
        super().on_headers_complete()
        self._is_in_body = True
        self._unanswered.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._unread_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread_bytes = 0
        if not self.parser.is_to_upgrade():
            self._is_in_body = False
            super().on_message_complete()

    def head_without_upgrade(self) -> bytes:
        """Of the request that is being read: its bytes again, as far as they count."""
        start = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        headers = (b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade")
        return start + b"".join(headers) + b"\r\n"

    # ------------------------------------------------------------ what uvicorn's cycle tells

    def on_response_complete(self) -> None:
        self._unanswered.popleft()
        self._used = self.loop.time()
        super().on_response_complete()
        if self._take_timer is not None:
            self._take_timer.cancel()
        self._await_taking()

    # ------------------------------------------------------------ bounds

    def _count(self, n_bytes: int) -> None:
        self._unread_bytes = 0
        self._head_bytes += n_bytes
        if self._head_bytes > MAX_HEAD:
            raise _TooMuch

    def _is_idle(self) -> bool:
        return not self._unanswered

    def _make_room(self, most: int) -> None:
        """If more are open, let go of the connection that has been idle for longest, all its answers taken; this one is, too."""
        known = [one for one in self.connections if isinstance(one, Protocol) and not one.transport.is_closing()]
        if len(known) > most:
            idle = [one for one in known if one._is_idle() and not one.transport.get_write_buffer_size()]
            min(idle, key=lambda one: one._used)._abort()

    def _await_head(self, seconds: float) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(seconds, self._close)

    def _await_taking(self) -> None:
        """A connection whose buffer is not empty would stay open for ever, also when it is closed."""
        n_bytes = self.transport.get_write_buffer_size()
        self._take_timer = self.loop.call_later(TAKE_TIMEOUT, self._abort_untaken, n_bytes) if n_bytes else None

    def _abort_untaken(self, n_bytes: int) -> None:
        if not self._is_idle():
            self._take_timer = None  # the next answer's end begins another
        elif self.transport.get_write_buffer_size() >= n_bytes:
            self._abort()
        else:
            self._await_taking()

    def _cease_awaiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def _abort(self) -> None:
        """At once: what the client has not taken is lost."""
        self.transport.abort()
