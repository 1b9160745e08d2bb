"""uvicorn around the application: sockets, signals, start and end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from pyengine.serve.app import App
from pyengine.serve.connection import ACCEPTED_AT_ONCE, KEEP_ALIVE, Protocol
from pyengine.serve.models import Models
from pyengine.serve.shared_store import shared

BACKLOG = 1024  # connections that wait to be accepted


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises OSError that says which address. `shared`: other processes may
    listen there, too, and the kernel deals connections out among them."""
    sock = reserve(host, port, shared=shared)
    sock.listen(BACKLOG)
    return sock


def reserve(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """As `listen`, but takes no connection."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(f"{host}: {error.strerror or error}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        sock.set_inheritable(True)
    except OSError as error:
        sock.close()
        hint = "; another server has it: choose one with --port" if error.errno == errno.EADDRINUSE else ""
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}{hint}") from None
    return sock


def url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """The first SIGTERM or Ctrl-C drains, a second one ends at once."""

    on_signal: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(BACKLOG)  # asyncio has made it as many as are accepted at once

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.on_signal()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, without raising the signal again at the end: an exit that was asked for is no failure."""
        try:
            before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever runs us has his own way to stop
            yield
            return
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


class Runner:
    """One server in one event loop: takes connections at once, loads the models beside that, drains at the end."""

    def __init__(self, app: App, sock: socket.socket, load: Callable[[], Models]) -> None:
        self.app = app
        self._sock = sock
        self._load = load
        self._stops = 0
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of clients that send nonsense
        config = uvicorn.Config(
            app,
            http=Protocol,
            backlog=ACCEPTED_AT_ONCE,
            ws="none",  # else, where websockets is installed, an upgrade would go past the application
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=int(KEEP_ALIVE),
            timeout_graceful_shutdown=5,
        )
        self._server = _Server(config)
        self._server.on_signal = self.stop

    def stop(self) -> None:
        """Drain and end; the second time, end. From any thread, or from a signal handler."""
        self._stops += 1
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended
                self._loop.call_soon_threadsafe(self._stop.set)

    def run(self, ready: Callable[[Models], None]) -> None:
        """Until `stop`. ready(models) is called when requests are taken. Raises what loading raises."""
        asyncio.run(self.main(ready))

    async def main(self, ready: Callable[[Models], None]) -> None:
        siblings = self.app.siblings
        if siblings is None:
            await self._main(ready)
            return
        async with siblings.telling(self.app.metrics.snapshot), shared(self.app.store, siblings.ends):
            await self._main(ready)

    async def _main(self, ready: Callable[[Models], None]) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        if self._stops:
            self._stop.set()
        serving = asyncio.create_task(self._server.serve([self._sock]))
        watching = asyncio.create_task(self.app.watch_writers())
        models: Models | None = None
        try:
            models = await asyncio.to_thread(self._load)
            self.app.start(models)
            ready(models)
            stopped = asyncio.create_task(self._stop.wait())
            await asyncio.wait({stopped, serving}, return_when=asyncio.FIRST_COMPLETED)
            await self._drain()
        finally:
            watching.cancel()
            self._server.should_exit = True
            await serving
            if models is not None:
                models.close()

    async def _drain(self) -> None:
        """Nothing new; what runs may end, until time or patience is out."""
        self.app.drain()
        deadline = asyncio.get_running_loop().time() + self.app.settings.drain_timeout
        while self.app.exchanges and self._stops < 2 and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        self.app.abort_all()
