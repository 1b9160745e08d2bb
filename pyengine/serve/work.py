"""Work of the models: who is let in, and how its output is read."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence, Sized
from typing import TYPE_CHECKING, Any, TypeVar

from pyengine.results import FinishReason, Piece, Timings
from pyengine.run.beam_search import BeamRequest, BeamSearch
from pyengine.run.jobs import Job
from pyengine.run.request import GenerationRequest, Request
from pyengine.serve.aside import Aside
from pyengine.serve.errors import HTTPError, shutting_down

if TYPE_CHECKING:
    from pyengine.sampling import SamplingParams
    from pyengine.serve.models import ServedModel
    from pyengine.serve.settings import Settings

T = TypeVar("T")
Make = Callable[[Job], Sequence[Request]]
# Prompt tokens a second, before any was measured: only for "try again in".
FIRST_GUESS = 1000.0
# Threads for what one request may make last for seconds. All else is done in those of the event loop, which may be five.
LONG_AT_ONCE = 2
LONG = 1 << 16  # characters and token ids of a request: some tens of milliseconds


def _asks_long(params: SamplingParams) -> bool:
    """Whether what these ask for may last: a grammar, breakers that are looked for in the whole vocabulary, many words."""
    if params.structured_outputs is not None or (params.dry_multiplier and params.dry_sequence_breakers is not None):
        return True
    return sum(map(len, params.bad_words or ())) > LONG


class Queue:
    """Admits jobs while the prompts that wait for their first token are not too many tokens.

    aside  the threads for texts that are tokenized whatever their length, for many texts, for grammars and breakers: who waits
           for one waits in turn, and whoever wants none of these does not wait
    """

    def __init__(self, settings: Settings) -> None:
        self.aside = Aside(LONG_AT_ONCE)
        self._limit = settings.max_queue_tokens
        # those that somebody holds, and the model of each; changed by single operations only: /metrics is told in a thread
        self._jobs: dict[weakref.ref[Job], str] = {}
        self._rate = FIRST_GUESS
        self._unready: set[asyncio.Task[Any]] = set()  # what requests wait for that have no job yet
        self.is_draining = False

    async def until_end(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns. Raises HTTPError 503 if `end` comes first."""
        task = asyncio.ensure_future(work)
        self._unready.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if task in self._unready:  # by whoever cancelled this request
                raise
            raise shutting_down() from None
        finally:
            self._unready.discard(task)

    def end(self) -> None:
        """Nobody waits any longer: not for a job, and not for what comes before it."""
        for job in self.jobs():
            job.close()
        while self._unready:
            self._unready.pop().cancel()

    async def submit(
        self, model: ServedModel, make: Make, params: SamplingParams | None = None, given: Iterable[Sized] = ()
    ) -> Job:
        """A job that is computed from now on. params: of its outputs; given: texts and token ids that `make` reads, where their
        number has no bound. Raises HTTPError 429, 503 and whatever `make` raises."""
        is_long = (params is not None and _asks_long(params)) or sum(map(len, given)) > LONG
        self._check_open()
        job = await self.until_end(model.asynchronous.prepare(make, self.aside if is_long else None))
        self._check_open()
        waiting, wanted = self.waiting_tokens(), sum(request.waiting_tokens for request in job.requests)
        if waiting > 0 and waiting + wanted > self._limit:
            raise HTTPError(
                429,
                f"{waiting} prompt tokens wait already, {wanted} more would exceed {self._limit}",
                code="queue_full",
                retry_after=min(60.0, max(0.1, waiting / self._rate)),
            )
        self._jobs[weakref.ref(job, lambda gone: self._jobs.pop(gone, None))] = model.name
        model.asynchronous.stepper.add(job)
        return job

    def _check_open(self) -> None:
        if self.is_draining:
            raise shutting_down()

    def jobs(self) -> list[Job]:
        return [job for job, _ in self._named()]

    def _named(self) -> list[tuple[Job, str]]:
        living = ((ref(), name) for ref, name in self._jobs.copy().items())  # in one step, unlike a list
        return [(job, name) for job, name in living if job is not None and not job.is_closed]

    def waiting_tokens(self) -> int:
        """Of prompts whose first output token has not come."""
        return sum(request.waiting_tokens for job in self.jobs() for request in job.requests)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Outputs that have not started, and those that run, of each model that has any; a search is one."""
        counts: dict[str, tuple[int, int]] = {}
        for job, name in self._named():
            started = [one.is_started for one in job.requests if not one.is_done and not is_further_beam(one)]
            waiting, running = counts.get(name, (0, 0))
            counts[name] = waiting + started.count(False), running + started.count(True)
        return counts

    def note_rate(self, prompt_tokens_per_second: float) -> None:
        self._rate = max(1.0, 0.8 * self._rate + 0.2 * prompt_tokens_per_second)

    def finished(self, job: Job) -> None:
        """Notes how fast a job, all of whose requests are done, was: for "try again in"."""
        for _, timings in ends(job):
            if timings.prompt_tokens - timings.cached_tokens > 16:
                self.note_rate(timings.prompt_tokens_per_second)


def generations(job: Job) -> list[GenerationRequest]:
    return [request for request in job.requests if isinstance(request, GenerationRequest)]


def is_further_beam(request: Request) -> bool:
    """Whether it is of a search, and not its first one."""
    return isinstance(request, BeamRequest) and request.index > 0


def searches(job: Job) -> list[BeamSearch]:
    return [one.search for one in job.requests if isinstance(one, BeamRequest) and not is_further_beam(one)]


def ends(job: Job) -> list[tuple[FinishReason, Timings]]:
    """How each output of a job ended that is done without an error. A search is one, which ended as its best beam."""
    sampled = [(result.finish_reason, result.timings) for result in (one.result for one in generations(job))]
    return sampled + [(one.finish_reason, one.timings) for one in searches(job)]


def raise_error(job: Job) -> None:
    """The first error of one of its requests."""
    for request in job.requests:
        if request.error is not None:
            raise request.error


async def finish(job: Job) -> list[GenerationRequest]:
    """Its outputs, complete. Raises the first error of one of its requests."""
    await job.wait(lambda: job.is_done or any(request.error is not None for request in job.requests))
    is_done = job.is_done  # before its errors: one that comes in between makes it done, too
    raise_error(job)
    if not is_done:
        raise shutting_down()
    return generations(job)


LONG = 256  # tokens of an answer: to read so many for calls, or to write their log-probabilities, takes milliseconds


async def unless_short(least: int, size: int, function: Callable[..., T], *args: Any) -> T:
    """function(*args); in a thread if its work is of a size from `least` on, so that the loop goes on."""
    return function(*args) if size < least else await asyncio.to_thread(function, *args)


async def made_of(requests: Sequence[GenerationRequest], make: Callable[[], T]) -> T:
    """make(), which makes an answer of whole outputs; long ones in a thread, so that the loop goes on."""
    n_tokens = sum(request.result.timings.generated_tokens for request in requests)
    return await unless_short(LONG + 1, n_tokens, make)


async def read(job: Job, interval: float) -> AsyncIterator[list[tuple[int, list[Piece]]]]:
    """What has come since the last time, [(index of the output, its pieces)]; an empty list after `interval` seconds of
    silence. Raises the first error of one of its requests."""
    requests = generations(job)
    others = [request for request in job.requests if not isinstance(request, GenerationRequest)]

    def ready() -> bool:
        return all(other.is_done for other in others) and (
            any(request.has_news for request in requests) or all(request.is_done for request in requests)
        )

    while any(request.n_taken < len(request.output.pieces) or not request.is_done for request in requests):
        if not await job.wait(ready, interval) and job.is_closed:
            raise shutting_down()
        raise_error(job)
        news = []
        for index, request in enumerate(requests):
            pieces = request.output.pieces[request.n_taken :] if all(other.is_done for other in others) else []
            if pieces:
                request.n_taken += len(pieces)
                news.append((index, pieces))
        yield news
    raise_error(job)  # one that came before the first look
