"""Threads of the host: how many, BLAS kept to one, and tasks run side by side."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .errors import MissingLibraryError


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


def run_all(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], object]]) -> None:
    """Run tasks side by side; the first exception is raised after all have ended."""
    futures = [pool.submit(task) for task in tasks]
    for future in futures:
        future.exception()
    for future in futures:
        future.result()
