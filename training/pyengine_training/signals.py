"""SIGINT, SIGTERM and SIGHUP while a run trains."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from .errors import Interrupted

HANGUP: int | None = getattr(signal, "SIGHUP", None)  # the terminal is closed; some systems have none


@contextlib.contextmanager
def signals(received: list[int], ranks: int = 1) -> Iterator[None]:
    """Collect SIGINT, SIGTERM and SIGHUP instead of dying; a second one of the first two kills as usual.

    A SIGHUP that is ignored, as nohup has it, stays so. A second one does nothing: a shell whose terminal is closed tells its
    jobs, and the system tells them again when the shell ends. A rank that ends because of a signal is not disturbed any more
    while it takes leave of the others.
    """

    def handler(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_IGN if number == HANGUP else signal.SIG_DFL)

    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    if HANGUP is not None and signal.getsignal(HANGUP) is not signal.SIG_IGN:
        numbers.append(HANGUP)
    previous = {number: signal.signal(number, handler) for number in numbers}
    interrupted = False
    try:
        yield
    except Interrupted:
        interrupted = True
        raise
    finally:
        for number, old in previous.items():
            signal.signal(number, signal.SIG_IGN if interrupted and ranks > 1 else old)
