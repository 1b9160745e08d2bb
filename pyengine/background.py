"""One call that runs beside the caller, for start-up work that waits for nothing the caller does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """`work()` on a thread of its own, from now on. `result` says what came of it.

    The thread is no daemon and cannot be cancelled: whoever starts one waits for it, by `result` or `wait`, before what it uses
    goes away. Where no thread can be had (a limit on processes), `result` does the work itself.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._values: list[T] = []  # none or one: None may be a result
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = threading.Thread(target=self._run, name="pyengine-start")
        try:
            self._thread.start()
        except RuntimeError:
            self._thread = None

    def _run(self) -> None:
        try:
            self._values.append(self._work())
        except BaseException as error:  # raised where the result is asked for
            self._error = error

    def wait(self) -> None:
        """Return when nothing runs any more, whatever came of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def result(self) -> T:
        """What `work` returned or raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        if not self._values:
            self._values.append(self._work())
        return self._values[0]
