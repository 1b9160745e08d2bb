"""One call that runs beside the caller, for start-up work that waits for nothing the caller does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """`work()` on a thread of its own, from `start` on. `result` waits and says what came of it.

    The thread is no daemon and cannot be cancelled: whoever starts one also waits, whatever happens in between. Where no thread
    can be had (a limit on processes, or a Ctrl-C at the wrong moment), `result` does the work itself.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._turn = [True]  # whoever pops it does the work
        self._has_thread = False
        self._values: list[T] = []  # none or one: None may be a result
        self._error: BaseException | None = None
        self._done = threading.Event()

    def start(self) -> None:
        with contextlib.suppress(RuntimeError):
            threading.Thread(target=self._run, name="pyengine-start").start()
            self._has_thread = True

    def _run(self) -> None:
        try:
            self._turn.pop()
        except IndexError:  # nobody waits for this thread
            return
        try:
            self._values.append(self._work())
        except BaseException as error:  # raised where the result is asked for
            self._error = error
        self._done.set()

    def wait(self) -> None:
        """Return when the work is done, whatever came of it, or when no thread will do it. A Ctrl-C waits too, a second one does
        not."""
        if not self._has_thread:  # or there is one of which `start`, interrupted, does not know
            with contextlib.suppress(IndexError):
                self._turn.pop()
                self._done.set()
        # Not Thread.join: one that Ctrl-C interrupts may take the thread for dead (Python 3.11), and the next returns at once.
        try:
            self._done.wait()
        except BaseException:
            self._done.wait()
            raise

    def result(self) -> T:
        """What `work` returned or raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        if not self._values:
            self._values.append(self._work())
        return self._values[0]
