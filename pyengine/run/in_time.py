"""A call into a library that nothing can interrupt, for those who cannot wait for ever."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from pyengine import fork

T = TypeVar("T")

MOST_LEFT = 2  # calls that still run though nobody waits for them: a thread cannot be ended. While there are so many, none begins

_left: set[threading.Event] = set()  # of each such call; set when it has come to its end


def in_time(call: Callable[[], T], seconds: float) -> T:
    """call(), which leaves the interpreter's lock to others and takes no lock of ours, in a thread of its own. Raises what it
    raises, and TimeoutError if that takes longer, or others did that still run. A Ctrl-C is heard meanwhile."""
    for one in list(_left):
        if one.is_set():
            _left.discard(one)
    if len(_left) >= MOST_LEFT:
        raise TimeoutError(f"{len(_left)} that took longer than {seconds:g} s still run; try again later")
    values: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            values.append(call())
        except BaseException as error:  # raised where it is waited for
            errors.append(error)
        done.set()

    with contextlib.suppress(RuntimeError):  # no thread can be had: below, then
        threading.Thread(target=run, name="pyengine-in-time", daemon=True).start()
        try:
            done.wait(seconds)
        finally:
            if not done.is_set():
                _left.add(done)
        if not (values or errors):
            raise TimeoutError(f"it takes longer than {seconds:g} s")
    if errors:
        raise errors[0]
    return values[0] if values else call()


fork.call_after(in_child=_left.clear)
