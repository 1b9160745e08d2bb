"""The ASGI application: which path is what, and what is the same for every request.

A request runs as a task of its own beside one that waits for the client to go away: whichever ends first ends the other,
so a client that hangs up stops its work wherever it is, streamed or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sized
from typing import TYPE_CHECKING, TypeVar

from pyengine.errors import PyEngineError
from pyengine.results import Piece
from pyengine.run.jobs import Job
from pyengine.run.request import GenerationRequest
from pyengine.serve import work
from pyengine.serve.access import Access
from pyengine.serve.errors import HTTPError, http_error
from pyengine.serve.exchange import Exchange, Receive, Scope, Send, dumps, event
from pyengine.serve.fields import Fields, Table, parse_json
from pyengine.serve.log import access_line
from pyengine.serve.metrics import Metrics
from pyengine.serve.models import Models, ServedModel
from pyengine.serve.routes import find_place, handlers, hint
from pyengine.serve.settings import Settings
from pyengine.serve.shared_store import SharedStore
from pyengine.serve.siblings import Siblings
from pyengine.serve.store import ResponseStore, Store
from pyengine.serve.stream import COMMENT

if TYPE_CHECKING:
    from pyengine.sampling import SamplingParams

T = TypeVar("T")
_logger = logging.getLogger("pyengine")


class App:
    """One server's state. models: None while they are loaded; health: "starting", "ready" or "draining"."""

    def __init__(self, settings: Settings | None = None, siblings: Siblings | None = None) -> None:
        self.settings = settings or Settings()
        self.siblings = siblings  # the other processes behind this address
        self.health = "starting"
        self.store = self._store()
        self.metrics = Metrics()
        self.queue = work.Queue(self.settings)
        self.access = Access(self.settings)
        self.exchanges: set[Exchange] = set()
        self._models: Models | None = None
        self._bodies_bytes = 0
        self.metrics.watch(lambda: self._models or Models(()), self.queue.counts, self.store)

    def _store(self) -> Store:
        """Of several processes the first keeps the responses of all."""
        settings = self.settings
        if self.siblings is not None and self.siblings.number > 0:
            return SharedStore(settings.max_stored_responses > 0)
        by_key = len(settings.api_keys) > 1
        return ResponseStore(settings.max_stored_responses, settings.max_stored_bytes, by_key=by_key)

    @property
    def models(self) -> Models:
        if self._models is None:
            raise HTTPError(503, "the models are being loaded", code="starting", retry_after=1.0)
        return self._models

    def start(self, models: Models) -> None:
        self._models = models
        self.health = "ready"

    def drain(self) -> None:
        """Let nothing new in."""
        self.health = "draining"
        self.queue.is_draining = True

    def abort_all(self) -> None:
        """End what still runs; its clients are told."""
        self.queue.end()

    # ------------------------------------------------------------ ASGI

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._exchange(Exchange(scope, receive, send))

    async def _exchange(self, exchange: Exchange) -> None:
        self.exchanges.add(exchange)
        task = asyncio.ensure_future(self._answer(exchange))
        try:
            await self._beside_client(exchange, task)
        finally:
            self.exchanges.discard(exchange)
            place = find_place(exchange.path)  # one of few words, whatever clients ask for
            self.metrics.requests.labels("other" if place is None else place.path, str(exchange.status)).inc()
            access_line(self.settings.log_format, exchange)

    @staticmethod
    async def _beside_client(exchange: Exchange, task: asyncio.Future[None]) -> None:
        """Wait for the task, and end it when the client goes away, or when this one is cancelled."""
        gone = asyncio.ensure_future(exchange.gone())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        if not task.cancelled():
            task.result()

    async def _answer(self, exchange: Exchange) -> None:
        try:
            if len(self.exchanges) > self.settings.max_exchanges:
                raise HTTPError(503, "too many requests at a time", code="overloaded", retry_after=1.0)
            await self._route(exchange)
        except (ConnectionError, asyncio.CancelledError) as error:
            exchange.notes["aborted"] = True
            self.metrics.aborted.inc()
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception as error:
            if not isinstance(error, (HTTPError, PyEngineError, MemoryError)):
                _logger.exception("request %s", exchange.id)
            await self._tell(exchange, http_error(error))

    @staticmethod
    async def _tell(exchange: Exchange, error: HTTPError) -> None:
        exchange.notes["error"] = error.message
        place = find_place(exchange.path)
        path = exchange.path if place is None else place.path
        is_anthropic, is_ollama = path.startswith("/v1/messages"), path.startswith("/api/")
        body = error.anthropic_body(exchange.id) if is_anthropic else error.ollama_body() if is_ollama else error.body()
        if exchange.is_stream:  # the status has gone out: clients raise at this event, or line
            await exchange.end(dumps(body) + b"\n" if is_ollama else event(body, "error" if is_anthropic else None))
        elif exchange.status == 0:
            await exchange.reply_json(body, error.status, error.headers)

    async def _route(self, exchange: Exchange) -> None:
        self.access.check_host(exchange)
        exchange.extra_headers += self.access.cors_headers(exchange)
        place = find_place(exchange.path)
        if exchange.method == "OPTIONS" and "access-control-request-method" in exchange.headers:
            await exchange.reply(204, b"", b"text/plain", self.access.preflight_headers(exchange))
            return
        if exchange.path != "/health":
            exchange.key_digest = self.access.check_key(exchange)
        if place is None:
            raise HTTPError(404, f"there is nothing at {exchange.path[:100]}{hint(exchange.path)}", code="unknown_path")
        method = "GET" if exchange.method == "HEAD" else exchange.method
        exchange.path_id, of_method = place.id, handlers(place)
        if method not in of_method:
            allowed = ", ".join(sorted(of_method))
            headers = ((b"allow", allowed.encode()),)
            raise HTTPError(405, f"{exchange.path} takes {allowed}", code="method_not_allowed", headers=headers)
        await of_method[method](self, exchange)

    # ------------------------------------------------------------ for the endpoints

    async def fields(self, exchange: Exchange, table: Table) -> Fields:
        """The fields of the body. Raises HTTPError."""
        held = 0

        def reserve(n_bytes: int) -> None:
            nonlocal held
            if self._bodies_bytes + n_bytes > self.settings.max_bodies_bytes:
                raise HTTPError(503, "too many bodies are being read", code="overloaded", retry_after=1.0)
            self._bodies_bytes += n_bytes
            held += n_bytes

        def read(body: bytes) -> Fields:
            return Fields(parse_json(body), table)

        try:
            body = await exchange.body(self.settings.max_body_bytes, self.settings.body_timeout, reserve)
            # a long one in a thread, so that the loop goes on: a body may hold a million token ids to check
            return read(body) if len(body) < 1 << 14 else await asyncio.to_thread(read, body)
        finally:
            self._bodies_bytes -= held

    async def aside(self, function: Callable[[], T]) -> T:
        """function(), which takes as long as what it is given is, in a thread of `Queue.aside`. Raises what it raises, and
        HTTPError 503 at the server's end."""

        async def wait() -> T:
            return await asyncio.get_running_loop().run_in_executor(self.queue.aside, function)

        return await self.queue.until_end(wait())

    def cache_salt(self, exchange: Exchange, fields: Fields) -> str | None:
        """What keeps this caller's cached beginnings apart: its key where there are several, and what it says itself."""
        return self.salted(exchange, fields.take("cache_salt"))

    def salted(self, exchange: Exchange, given: str | None) -> str | None:
        """`cache_salt` of what the caller says."""
        if exchange.key_digest is None or len(self.settings.api_keys) < 2:
            return given
        return hashlib.sha256(exchange.key_digest + (given or "").encode("utf-8", "surrogatepass")).hexdigest()

    @contextlib.asynccontextmanager
    async def job(
        self,
        exchange: Exchange,
        model: ServedModel,
        make: work.Make,
        params: SamplingParams | None = None,
        given: Iterable[Sized] = (),
    ) -> AsyncIterator[Job]:
        """A job of this exchange, computed from now on; what is left of it ends with the block. params, given: see
        `Queue.submit`. Raises HTTPError 429, 503 and whatever `make` raises."""
        exchange.notes["model"] = model.name
        job = await self.queue.submit(model, make, params, given)
        try:
            yield job
        finally:
            job.close()

    async def finish(self, exchange: Exchange, model: ServedModel, job: Job) -> list[GenerationRequest]:
        """The outputs of a job, complete. Raises the first error of one of its requests."""
        requests = await work.finish(job)
        self._note(exchange, model, job)
        return requests

    async def stream(
        self,
        exchange: Exchange,
        model: ServedModel,
        job: Job,
        first: bytes,
        part: Callable[[int, list[Piece]], bytes],
        *,
        silence: bytes = COMMENT,
        **form: bytes,
    ) -> list[GenerationRequest]:
        """Write a job's outputs as they come: `first`, then part(index, pieces) of each; `silence` as a sign of life where there
        is nothing else. Its caller writes the end. form: see Exchange.start_stream."""
        await exchange.start_stream(**form)
        await exchange.write(first)
        async for news in work.read(job, self.settings.comment_interval):
            data = b"".join([part(index, pieces) for index, pieces in news]) if news else silence
            if data:
                await exchange.write(data)
        self._note(exchange, model, job)
        return work.generations(job)

    def _note(self, exchange: Exchange, model: ServedModel, job: Job) -> None:
        self.queue.finished(job)
        ends = work.ends(job)
        for reason, timings in ends:
            self.metrics.note(model.name, reason, timings)
        exchange.notes["prompt"] = sum(timings.prompt_tokens for _, timings in ends)
        exchange.notes["cached"] = sum(timings.cached_tokens for _, timings in ends)
        exchange.notes["output"] = sum(timings.generated_tokens for _, timings in ends)

    async def watch_writers(self) -> None:
        """For ever: let clients go that take nothing of their answers."""
        while True:
            await asyncio.sleep(self.settings.write_timeout / 8)
            oldest = time.monotonic() - self.settings.write_timeout
            for exchange in list(self.exchanges):
                if exchange.writing_since is not None and exchange.writing_since < oldest:
                    exchange.hang_up()


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
