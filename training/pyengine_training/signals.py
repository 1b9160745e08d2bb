"""SIGINT and SIGTERM while a run trains."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from .errors import Interrupted


@contextlib.contextmanager
def signals(received: list[int], ranks: int = 1) -> Iterator[None]:
    """Collect SIGINT and SIGTERM instead of dying; a second one of them kills as usual.

    A rank that ends because of one is not disturbed any more while it takes leave of the others.
    """

    def handler(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    previous = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    interrupted = False
    try:
        yield
    except Interrupted:
        interrupted = True
        raise
    finally:
        for number, old in previous.items():
            signal.signal(number, signal.SIG_IGN if interrupted and ranks > 1 else old)
