"""Callers: who waits for requests, and how."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pyengine import cpu_watch
from pyengine.errors import PyEngineError
from pyengine.results import Piece
from pyengine.run.request import Caller, GenerationRequest, Request

if TYPE_CHECKING:
    from pyengine.run.scheduler import Scheduler


def run_all(scheduler: Scheduler, requests: Sequence[Request]) -> None:
    """Compute requests to their end. Raises the first error of one of them."""
    left = list(reversed(requests))

    def all_done() -> bool:
        while left and left[-1].is_done:
            left.pop()
        return not left

    try:
        cpu_watch.begin()
        scheduler.add(requests)
        scheduler.wait(all_done)
    finally:
        scheduler.abort(requests)
    cpu_watch.end(scheduler.n_threads)
    for request in requests:
        if request.error is not None:
            raise request.error


class Stream(Caller, Iterator[Piece]):
    """The pieces of one output, computed as they are asked for (or a little ahead, while another caller computes), for one thread
    at a time. Ends with `close`, with its last piece, with any exception, or when nobody holds it any more."""

    __slots__ = ("_is_added", "_is_closed", "_reader", "_scheduler", "request")

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._is_added = False
        self._is_closed = False
        self._reader: dict[str, object] = {}  # the call of `next` under way, by single operations only
        self.request: GenerationRequest

    def __next__(self) -> Piece:
        if self._is_closed:
            raise StopIteration
        me, piece = object(), None
        try:
            if self._reader.setdefault("now", me) is me:
                piece = self._read()
                self._reader.clear()
        except BaseException:
            self.close()
            raise
        if piece is None:
            raise PyEngineError("this stream is read already: another thread waits for its next piece")
        if piece.result is not None:
            self.close()
            cpu_watch.end(self._scheduler.n_threads)
        return piece

    def _read(self) -> Piece:
        request = self.request
        if not self._is_added:
            self._is_added = True
            cpu_watch.begin()
            self._scheduler.add([request])
        self._scheduler.wait(lambda: request.has_news or self._is_closed)
        if self._is_closed:  # by another thread
            raise StopIteration
        return request.take()

    def close(self) -> None:
        """End it; what is left is not computed. Idempotent; a `with` block does it at its end."""
        self._is_closed = True
        if self._is_added:
            self._scheduler.abort([self.request])

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # not wholly made, or the interpreter is going
            self.close()
