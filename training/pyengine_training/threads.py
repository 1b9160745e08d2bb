"""Threads of the host: how many, BLAS kept to one, and tasks run side by side."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from .errors import MissingLibraryError

W, Item = TypeVar("W"), TypeVar("Item")


def available_threads() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def single_threaded_blas() -> Any:
    """Limit BLAS to one thread from now on; our threads are the parallelism. Returns the limiter."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        if all(os.environ.get(name) == "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")):
            return contextlib.nullcontext()
        raise MissingLibraryError(
            "training on the CPU needs threadpoolctl, which keeps BLAS to one thread: pip install 'pyengine-lm[train]' "
            "(or set OPENBLAS_NUM_THREADS=1 and OMP_NUM_THREADS=1)"
        ) from error
    return threadpool_limits(limits=1, user_api="blas")


def share_out(
    pool: ThreadPoolExecutor,
    workers: Sequence[W],
    items: Sequence[Item],
    work: Callable[[W, Item], None],
    done: Callable[[int], None] = lambda _count: None,
) -> None:
    """work(worker, item) for every item, each worker on a thread of its own; the result may not depend on who has which.

    An exception, in the caller's thread too (Ctrl-C), ends it after the items that are under way: without that a pool waits for
    all of them. done: is told, on a worker's thread, how many items are done.
    """
    stop, count = threading.Event(), itertools.count(1)

    def task(slot: int) -> Callable[[], None]:
        def run() -> None:
            for item in items[slot :: len(workers)]:
                if stop.is_set():
                    return
                try:
                    work(workers[slot], item)
                    done(next(count))
                except BaseException:
                    stop.set()
                    raise

        return run

    try:
        run_all(pool, [task(slot) for slot in range(len(workers))])
    finally:
        stop.set()


def run_all(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], object]]) -> None:
    """Run tasks side by side; the first exception is raised after all have ended."""
    futures = [pool.submit(task) for task in tasks]
    for future in futures:
        future.exception()
    for future in futures:
        future.result()


class Beside:
    """One piece of work at a time on a thread beside the loop. What goes wrong there is raised by the next call of any method."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pyengine-beside")
        self._running: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin when what runs has ended."""
        self.finish()
        self._running = self._pool.submit(work)

    def check(self) -> None:
        """Raise what has gone wrong; wait for nothing."""
        if self._running is not None and self._running.done():
            self.finish()

    def finish(self) -> None:
        """Wait for what runs."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait, and end the thread; raises nothing, for the loop may be ending by an error already."""
        self._pool.shutdown()
