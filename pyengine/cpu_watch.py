"""Notices that threads do not get the CPUs they count on, and says it once a process.

Two things are said, as warnings of the logger "pyengine" (the command line shows them itself): that a caller asked for more
threads than the affinity mask and the cgroup's quota allow, which is done as asked; and that the kernel kept stopping the
process's cgroup while it computed, because its quota was used up. Nothing is read while tokens are computed: the counters are
looked at before and after, and at most once in `INTERVAL_S`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyengine import fork

INTERVAL_S = 5.0
# Now and then a period of 100 ms ends in a stop although the threads are right: the interpreter also computes.
LEAST_STOPS, LEAST_SHARE = 3, 0.1


def _log(message: str) -> None:
    import logging  # here, since most processes never need it

    logging.getLogger("pyengine").warning("%s", message)


say: Callable[[str], None] = _log  # the command line puts its own in


class _State:
    """What this process has said, and the counters (pe_throttling) when it last looked."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        fork.register(self.lock, fork.LEAF)
        self.said: set[str] = set()
        self.n_computing = 0
        self.before: dict[str, int] = {}
        self.before_at = self.judged_at = -INTERVAL_S


_state = _State()


def _after_fork() -> None:
    _state.n_computing = 0  # those threads are not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _say_once(topic: str, message: str) -> None:
    with _state.lock:
        if topic in _state.said:
            return
        _state.said.add(topic)
    say(message)


def n_cpus(count: float) -> str:
    return "1 CPU" if count == 1 else f"{count:g} CPUs"


def check_threads(n_threads: int) -> None:
    """Say it if the caller's number of threads is more than can run at the same time."""
    if n_threads < 2 or "threads" in _state.said:
        return
    from pyengine import _core

    info = _core.thread_info()
    if n_threads <= info["n_default"]:
        return
    limited = 0 < info["cpu_quota"] < info["n_affinity"]
    limit = (
        f"the cgroup's quota of {n_cpus(info['cpu_quota'])}"
        if limited
        else f"the affinity mask of {n_cpus(info['n_affinity'])}"
    )
    _say_once(
        "threads",
        f"{n_threads} threads are more than {limit} can run: slow; the default is {info['n_default']}",
    )


@contextmanager
def computing(n_threads: int) -> Iterator[None]:
    """Around whatever computes with so many threads."""
    _begin()
    try:
        yield
    finally:
        _end(n_threads)


def _begin() -> None:
    from pyengine import _core

    with _state.lock:
        now = time.monotonic()
        if _state.n_computing == 0 and now - _state.before_at >= INTERVAL_S and "throttling" not in _state.said:
            _state.before, _state.before_at = _core.throttling(), now
        _state.n_computing += 1


def _end(n_threads: int) -> None:
    from pyengine import _core

    with _state.lock:
        _state.n_computing = max(0, _state.n_computing - 1)  # after a fork, what began in the parent ends here too
        now = time.monotonic()
        if now - _state.judged_at < INTERVAL_S or not _state.before or "throttling" in _state.said:
            return
        after = _core.throttling()
        grown = {name: after[name] - _state.before[name] for name in after}
        _state.before, _state.before_at, _state.judged_at = after, now, now
    if is_throttled(grown):
        _say_once("throttling", throttling_message(grown, n_threads, _core.thread_info()["cpu_quota"]))


def is_throttled(counters: dict[str, int]) -> bool:
    """Whether so many stops in so many periods are worth a word."""
    stops = counters["n_throttled"]
    return stops >= LEAST_STOPS and stops >= LEAST_SHARE * counters["n_periods"]


def throttling_message(grown: dict[str, int], n_threads: int, quota: float) -> str:
    """What to say about the stops in a stretch of computing with n_threads threads; quota 0 = not known."""
    text = f"throttled: the cgroup's CPU quota{f' of {n_cpus(quota)}' if quota else ''} was used up in "
    text += f"{grown['n_throttled']} of {grown['n_periods']} periods; "
    if 0 < quota < 1:
        return text + "less than one CPU: tokens come in bursts"
    if 0 < quota < n_threads:
        return text + f"{n_threads} threads are more than it can run, {int(quota)} would be faster"
    return text + "other work shares it: fewer threads may be faster"
