"""Jobs: requests that tasks of event loops wait for, and the thread that steps for them.

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
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from pyengine import fork
from pyengine.run.request import Caller, Request

if TYPE_CHECKING:
    from pyengine.run.scheduler import Scheduler


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


fork.call_after(in_child=_after_fork_in_child)


def _wake(jobs: Iterable[weakref.ref[Job]]) -> None:
    for ref in jobs:
        job = ref()
        if job is not None:
            job.wake()
