"""A call into a library that nothing can interrupt, for those who cannot wait for ever."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from pyengine import fork
from pyengine.errors import BusyError

T = TypeVar("T")

# Calls at a time, also of those that still run though nobody waits for them: a thread cannot be ended. The others wait in turn.
MOST_AT_ONCE = 2

# Taken by the threads that call, and by nobody else: no exception falls between taking a turn and giving it back.
_turns = threading.BoundedSemaphore(MOST_AT_ONCE)
_left: set[threading.Event] = set()  # of each call that nobody waits for any longer; set when it has come to its end


def in_time(call: Callable[[], T], seconds: float) -> T:
    """call(), which leaves the interpreter's lock to others and takes no lock of ours, in a thread of its own. Raises what it
    raises, TimeoutError if that takes longer, and BusyError if its turn has not come by then, or cannot come since all turns
    are those of calls that took longer. A Ctrl-C is heard meanwhile."""
    _left.difference_update([one for one in list(_left) if one.is_set()])
    if len(_left) >= MOST_AT_ONCE:
        raise BusyError(f"{len(_left)} that took longer than {seconds:g} s still run; try again later")
    values: list[T] = []
    errors: list[BaseException] = []
    in_turn: list[bool] = []
    decided, gone, done = threading.Event(), threading.Event(), threading.Event()

    def run() -> None:
        in_turn.append(_turns.acquire(timeout=seconds))
        decided.set()
        if in_turn[0]:
            try:
                if not gone.is_set():
                    values.append(call())
            except BaseException as error:  # raised where it is waited for
                errors.append(error)
            finally:
                _turns.release()
        done.set()

    with contextlib.suppress(RuntimeError):  # no thread can be had: below, then
        threading.Thread(target=run, name="pyengine-in-time", daemon=True).start()
        try:
            decided.wait()
            done.wait(seconds)
        finally:
            gone.set()
            if in_turn == [True] and not done.is_set():
                _left.add(done)
        if not in_turn[0]:
            raise BusyError(f"{MOST_AT_ONCE} others took all of {seconds:g} s; try again later")
        if not (values or errors):
            raise TimeoutError(f"it takes longer than {seconds:g} s")
    if errors:
        raise errors[0]
    return values[0] if values else call()


def _forget() -> None:
    """The child has none of these threads."""
    global _turns
    _turns = threading.BoundedSemaphore(MOST_AT_ONCE)
    _left.clear()


fork.call_after(in_child=_forget)
