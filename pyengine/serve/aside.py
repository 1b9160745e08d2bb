"""Threads for what one request may make last for seconds, and what nobody can interrupt."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, TypeVar

from pyengine import fork

T = TypeVar("T")


class Aside(Executor):
    """At most so many calls at a time; the others wait in turn. Unlike those of a ThreadPoolExecutor its threads hold up no exit:
    whoever waited for their calls is gone by then. A thread ends when nothing waits."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.RLock()  # of what follows, for a few instructions
        fork.register(self._lock, fork.LEAF)
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._n_threads = 0

    def submit(self, function: Callable[..., T], /, *args: Any, **options: Any) -> Future[T]:
        """See Executor. Raises RuntimeError if no thread can be had."""
        future: Future[T] = Future()
        with self._lock:
            if self._n_threads < self._most:
                threading.Thread(target=self._work, name="pyengine-aside", daemon=True).start()
                self._n_threads += 1
            self._waiting.append((future, partial(function, *args, **options)))
        return future

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._n_threads -= 1
                    return
                future, call = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # for whoever waits for it
                    future.set_exception(error)
            del future, call  # a thread that waits for the lock holds no request
