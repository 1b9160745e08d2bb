"""AsyncEngine: the engine for programs that run an event loop.

One thread steps while there is anything to compute, and ends when there is not. After each step it tells every event
loop, in one call, which of its jobs have something to read; the loop's own tasks read it. No lock is held across an
await, and a loop never waits for a step. Synchronous callers of the same engine go on leading steps as they please:
whoever leads computes for all.

A job that nobody holds any more ends, as a `Stream` does: the scheduler and this module know it weakly.

**Nobody is forgotten.** Other threads change what is looked at here between any two looks, so each pair of looks has an order.
Whoever makes news does so before it looks who waits, and whoever waits says so before it looks for news: `Job.wait` against
`Job.close`, `Stepper.add` against `Job.close`. What can go on is asked before who has what it waits for (`Stepper._deliver`), and
the stepping thread leaves under a lock and looks once more when it has left (`Stepper._leaves`).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from pyengine import fork
from pyengine.engine import Engine, Message, Prompt, holes_of, sampling_params
from pyengine.errors import InvalidArgumentError, PyEngineError
from pyengine.run.request import Caller, GenerationRequest, Request
from pyengine.text.prompts import is_batch

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Unpack  # typing's own from Python 3.11 on

    from pyengine.embeddings import Pooled
    from pyengine.results import BeamHypothesis, Generation, Piece, Score
    from pyengine.run.beam_search import BeamSearch
    from pyengine.run.scheduler import Scheduler
    from pyengine.sampling import SamplingParams
    from pyengine.sampling_options import BeamOptions, SamplingOptions

T = TypeVar("T")

# asyncio.to_thread imports it when first called: too late for a fork under way, which would let go of a lock it has not taken.
importlib.import_module("concurrent.futures.thread")


class Job(Caller):
    """Requests that a task of the running event loop waits for. Close it, or let go of it, and they end.

    requests  what is computed; set before `Stepper.add`
    ready     what its task waits for, None while it does not wait; the stepping thread asks it, too
    """

    __slots__ = ("_is_late", "_news", "_stepper", "is_closed", "loop", "ready", "requests")

    def __init__(self, stepper: Stepper) -> None:
        self.loop = asyncio.get_running_loop()
        self.requests: Sequence[Request] = ()
        self.ready: Callable[[], bool] | None = None
        self.is_closed = False
        self._stepper = stepper
        self._news = asyncio.Event()

    def __hash__(self) -> int:
        return id(self)

    @property
    def is_done(self) -> bool:
        return all(request.is_done for request in self.requests)

    @property
    def can_go_on(self) -> bool:
        """Whether something can be computed for it before its task reads more."""
        return any(request.can_go_on for request in self.requests)

    @property
    def should_look(self) -> bool:
        """Whether its task waits for something and has it."""
        ready = self.ready
        try:
            return ready is not None and ready()
        except Exception:  # for its task, who asks, too
            return True

    def wake(self) -> None:
        """In its loop: look again."""
        self._news.set()

    async def wait(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Return when `ready()`, when the job is closed, or after so many seconds: whether `ready()`."""
        self.ready = ready
        timer = None if timeout is None else self.loop.call_later(timeout, self._time_out)
        self._is_late = False
        try:
            while True:
                self._news.clear()  # what comes from here on sets it again
                if ready():
                    return True
                if self.is_closed or self._is_late:
                    return False
                self._stepper.ensure_running()
                await self._news.wait()
        finally:
            self.ready = None
            if timer is not None:
                timer.cancel()

    def _time_out(self) -> None:
        self._is_late = True
        self._news.set()

    def close(self) -> None:
        """End it; what is left is not computed. Idempotent. From any thread; waits for nothing."""
        if not self.is_closed:
            self.is_closed = True
            if self.ready is not None:
                with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits
                    self.loop.call_soon_threadsafe(self.wake)
            self._stepper.remove(self)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # not wholly made, or the interpreter is going
            self._stepper.remove(self)


class Stepper:
    """The thread that steps for jobs, while something can be computed for one of them."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._lock = threading.RLock()  # of _thread: held for a few instructions, never in a step
        fork.register(self._lock, fork.LEAF)
        self._thread: threading.Thread | None = None
        self._jobs: dict[int, weakref.ref[Job]] = {}  # by id; changed by single operations only
        _steppers.add(self)

    def add(self, job: Job) -> None:
        """Compute the requests of a job from now on."""
        try:
            self._jobs[id(job)] = weakref.ref(job)
            self._scheduler.add(job.requests)
            self.ensure_running()
            if job.is_closed:  # by another thread, before there was anything to remove
                self.remove(job)
        except BaseException:  # whose traceback may hold the job for long
            self.remove(job)
            raise

    def remove(self, job: Job) -> None:
        """Drop the requests of a job, done or not. Idempotent."""
        self._jobs.pop(id(job), None)
        self._scheduler.abort(job.requests)

    def ensure_running(self) -> None:
        """There may be work again."""
        with self._lock:
            # is_alive: an exception may have fallen between its two lines
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="pyengine-step", daemon=True)
                self._thread.start()

    def after_fork_in_child(self) -> None:
        """Here are neither the thread nor the loops of these jobs."""
        self._thread = None
        for job in self._living():
            self.remove(job)
        self._jobs.clear()

    def _run(self) -> None:
        error: BaseException | None = None
        while True:
            try:
                if error is not None:
                    self._fail(error)
                error = None
                self._scheduler.wait(self._deliver)
                if self._leaves():
                    return
            except BaseException as raised:  # a closed engine, no memory: for those who wait, not for this thread
                error = raised

    def _leaves(self) -> bool:
        """Whether there is nothing to compute and the thread ends: whatever comes from now on starts another one."""
        with self._lock:
            if self._can_go_on(self._living()):
                return False
            self._thread = None
        self._deliver()  # what another caller has ended since
        return True

    def _living(self) -> list[Job]:
        return [job for job in (ref() for ref in list(self._jobs.values())) if job is not None]

    @staticmethod
    def _can_go_on(jobs: Iterable[Job]) -> bool:
        return any(job.can_go_on for job in jobs)

    def _deliver(self) -> bool:
        """Wake the jobs that have what they wait for. Whether there is nothing more to compute."""
        jobs = self._living()
        # Asked first: another caller's step may end a job at any moment, and what it ends after this is asked about again.
        is_over = not self._can_go_on(jobs)
        by_loop: dict[asyncio.AbstractEventLoop, list[Job]] = {}
        for job in jobs:
            if job.should_look:
                by_loop.setdefault(job.loop, []).append(job)
        for loop, some in by_loop.items():
            try:
                loop.call_soon_threadsafe(_wake, [weakref.ref(job) for job in some])
            except RuntimeError:  # the loop is closed: nobody will read this
                for job in some:
                    self.remove(job)
        return is_over

    def _fail(self, error: BaseException) -> None:
        for job in self._living():
            for request in job.requests:
                if not request.is_done:
                    request.error = error
        self._deliver()


_steppers: weakref.WeakSet[Stepper] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for stepper in list(_steppers):
        stepper.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _wake(jobs: Iterable[weakref.ref[Job]]) -> None:
    for ref in jobs:
        job = ref()
        if job is not None:
            job.wake()


class AsyncStream(AsyncIterator["Piece"]):
    """The pieces of one output, as they come, for one task at a time. Ends with `close`, with its last piece, with any exception
    (cancellation included), or when nobody holds it any more."""

    def __init__(self, engine: AsyncEngine, make: Callable[[Job], Sequence[GenerationRequest]]) -> None:
        self._engine = engine
        self._make = make
        self._job: Job | None = None
        self._is_closed = False
        self._is_read = False  # a task waits for a piece

    async def __anext__(self) -> Piece:
        if self._is_closed:
            raise StopAsyncIteration
        if self._is_read:
            raise PyEngineError("another task waits for the next piece of this stream")
        try:
            self._is_read = True
            if self._job is None:
                self._job = await self._engine.prepare(self._make)
                if self._is_closed:  # by another task
                    raise StopAsyncIteration
                self._engine.stepper.add(self._job)
            (request,) = self._job.requests
            assert isinstance(request, GenerationRequest)
            await self._job.wait(lambda: request.has_news)
            if self._is_closed:  # by another task
                raise StopAsyncIteration
            piece = request.take()
        except BaseException:
            self.close()
            raise
        finally:
            self._is_read = False
        if piece.result is not None:
            self.close()
        return piece

    def close(self) -> None:
        """End it; what is left is not computed. From any thread; waits for nothing."""
        self._is_closed = True
        if self._job is not None:
            self._job.close()

    async def aclose(self) -> None:
        """`close`, for contextlib.aclosing."""
        self.close()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class AsyncEngine:
    """An `Engine` whose methods are awaited. Any number of event loops, in any threads, may share one.

    model, options   as for Engine; or an Engine, which goes on working for synchronous callers, too

    Cancelling a task that waits here, or closing a stream, ends its computation at once, be it in the middle of a prompt.
    Results, parameters and exceptions are those of Engine.
    """

    def __init__(self, model: str | os.PathLike[str] | Engine | None = None, **options: Any) -> None:
        if isinstance(model, Engine) and options:
            raise InvalidArgumentError(f"an engine that is open has its options already ({', '.join(options)})")
        self._owned = not isinstance(model, Engine)
        self.engine = model if isinstance(model, Engine) else Engine(model, **options)
        self.stepper = Stepper(self.engine.scheduler)

    # ------------------------------------------------------------ jobs

    async def prepare(self, make: Callable[[Job], Sequence[Request]]) -> Job:
        """A job with the requests of make(job), not started. `make` runs in another thread: it may tokenize a long text."""
        job = Job(self.stepper)
        job.requests = await asyncio.to_thread(make, job)
        return job

    async def start(self, make: Callable[[Job], Sequence[Request]]) -> Job:
        """A job that is computed from now on."""
        job = await self.prepare(make)
        self.stepper.add(job)
        return job

    async def _run(self, make: Callable[[Job], Sequence[Request]]) -> Sequence[Request]:
        """The requests of make(job), done. Raises the first error of one of them."""
        job = await self.start(make)
        try:
            await job.wait(lambda: job.is_done)
        finally:
            job.close()
        for request in job.requests:
            if request.error is not None:
                raise request.error
        return job.requests

    # ------------------------------------------------------------ text

    @overload
    async def generate(  # type: ignore[overload-overlap]
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        parse_special: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation: ...
    @overload
    async def generate(
        self,
        prompt: Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        *,
        parse_special: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Generation]: ...
    async def generate(
        self,
        prompt: Prompt | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        *,
        parse_special: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | list[Generation]:
        """See Engine.generate."""
        chosen = sampling_params(params, options)
        many = is_batch(prompt)
        prompts: Any = prompt if many else [prompt]
        engine = self.engine

        def make(job: Job) -> Sequence[Request]:
            resolved = engine.resolve(chosen)
            ids = [engine.prompt_ids(item, parse_special=parse_special) for item in prompts]
            return engine.requests(job, ids, resolved, adapter=adapter, cache_salt=cache_salt)

        results = [one.result for one in await self._run(make) if isinstance(one, GenerationRequest)]
        return results if many or len(results) > 1 else results[0]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        parse_special: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """See Engine.stream. What a prompt is refused for is raised with the first piece: it is tokenized then."""
        return self._stream(
            lambda: self.engine.prompt_ids(prompt, parse_special=parse_special),
            sampling_params(params, options),
            adapter,
            cache_salt,
        )

    def _stream(
        self,
        ids: Callable[[], list[int]],
        params: SamplingParams,
        adapter: str | None,
        cache_salt: str | None,
        *,
        ending: Callable[[SamplingParams], SamplingParams] = lambda params: params,
    ) -> AsyncStream:
        """ids, ending: called in another thread; the latter may add to what ends the output."""
        if params.n not in (None, 1):
            raise InvalidArgumentError(f"a stream has one sample, n is {params.n}; use generate")
        engine = self.engine

        def make(job: Job) -> list[GenerationRequest]:
            resolved = engine.resolve(ending(params))
            return engine.requests(job, [ids()], resolved, adapter=adapter, cache_salt=cache_salt, interactive=True)

        return AsyncStream(self, make)

    async def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        continue_final_message: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation:
        """See Engine.chat."""
        chosen = sampling_params(params, options)
        ids = await asyncio.to_thread(self.engine.chat_ids, messages, continue_final_message=continue_final_message)
        return await self.generate(ids, chosen, adapter=adapter, cache_salt=cache_salt)

    def chat_stream(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        continue_final_message: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """The answer of `chat` as a stream."""
        chosen = sampling_params(params, options)

        def ids() -> list[int]:
            return self.engine.chat_ids(messages, continue_final_message=continue_final_message)

        return self._stream(ids, chosen, adapter, cache_salt)

    @overload
    async def infill(  # type: ignore[overload-overlap]
        self,
        prefix: str,
        suffix: str,
        params: SamplingParams | None = None,
        *,
        files: Sequence[tuple[str, str]] = (),
        filename: str = "",
        repository: str = "",
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation: ...
    @overload
    async def infill(
        self,
        prefix: Sequence[str],
        suffix: Sequence[str],
        params: SamplingParams | None = None,
        *,
        files: Sequence[tuple[str, str]] = (),
        filename: str = "",
        repository: str = "",
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Generation]: ...
    async def infill(
        self,
        prefix: str | Sequence[str],
        suffix: str | Sequence[str],
        params: SamplingParams | None = None,
        *,
        files: Sequence[tuple[str, str]] = (),
        filename: str = "",
        repository: str = "",
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | list[Generation]:
        """See Engine.infill."""
        chosen = sampling_params(params, options)
        engine = self.engine

        def asked() -> tuple[list[list[int]], SamplingParams]:
            ids = [
                engine.infill_ids(*hole, files=files, filename=filename, repository=repository)
                for hole in holes_of(prefix, suffix)
            ]
            return ids, engine.infill_params(chosen)

        ids, ending = await asyncio.to_thread(asked)
        prompt: Any = ids[0] if isinstance(prefix, str) else ids
        filled: Generation | list[Generation] = await self.generate(prompt, ending, adapter=adapter, cache_salt=cache_salt)
        return filled

    def infill_stream(
        self,
        prefix: str,
        suffix: str,
        params: SamplingParams | None = None,
        *,
        files: Sequence[tuple[str, str]] = (),
        filename: str = "",
        repository: str = "",
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """The filling of `infill` as a stream. What it is refused for is raised with the first piece."""

        def ids() -> list[int]:
            return self.engine.infill_ids(prefix, suffix, files=files, filename=filename, repository=repository)

        return self._stream(ids, sampling_params(params, options), adapter, cache_salt, ending=self.engine.infill_params)

    async def score(
        self,
        text: Prompt,
        *,
        parse_special: bool = False,
        start: int = 0,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> Score:
        """See Engine.score."""
        scores: list[Score] = []

        def make(job: Job) -> Sequence[Request]:
            score, requests = self.engine.score_requests(
                job, text, parse_special=parse_special, start=start, adapter=adapter, cache_salt=cache_salt
            )
            scores.append(score)
            return requests

        await self._run(make)
        return scores[0]

    async def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        pooling: Literal["mean", "last"] | None = None,
        normalize: bool = True,
        parse_special: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> npt.NDArray[np.float32]:
        """See Engine.embed."""
        made: list[Pooled] = []

        def make(job: Job) -> Sequence[Request]:
            pooled, requests = self.engine.embed_requests(
                job, texts, pooling=pooling, parse_special=parse_special, adapter=adapter, cache_salt=cache_salt
            )
            made.extend(pooled)
            return requests

        await self._run(make)
        from pyengine.embeddings import vectors

        return vectors(made, normalize=normalize)

    async def beam_search(self, prompt: Prompt, **options: Unpack[BeamOptions]) -> list[BeamHypothesis]:
        """See Engine.beam_search."""
        searches: list[BeamSearch] = []

        def make(job: Job) -> Sequence[Request]:
            search, requests = self.engine.beam_requests(job, prompt, **options)
            searches.append(search)
            return requests

        await self._run(make)
        return searches[0].results

    # ------------------------------------------------------------ life

    def close(self) -> None:
        """Waits for the step that is running, so at most some milliseconds; closes the engine if this object opened it."""
        if self._owned:
            self.engine.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)
