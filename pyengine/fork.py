"""The locks of this package at a fork: one place that knows them all.

A child has one thread, the one that forked. A lock that another thread held at that moment is held in the child for ever, and
what it guards may be half done. So whoever forks first takes every registered lock, in one order, and then lets go of them in
parent and child: a fork waits for the step, or the load, that is running, and the child finds everything whole.

**The order.** Each lock has a rank. A thread that holds a lock takes only locks of higher rank, and waits for no other thread in
any other way; two locks of one rank are held together only here. All are re-entrant: the thread that forks may hold some.

**Forks inside a step.** A caller's own function, which a step calls, may fork, and would wait for another's fork with the step's
lock held. So a fork does not wait for such a function, which cannot use the engine; it lets the step go on only when the fork is
over (`call_guest`). That is so of these functions alone: a signal's handler may interrupt the core, and a fork there waits for
ever if another thread forks meanwhile.

**Imports.** An import that another thread has begun never ends in the child, and whoever imports that module there waits for
ever. What a method imports when it is first called, it imports under the lock `importing`.

The core's thread pool has a handler of its own (csrc/threadpool.c): the child forgets the workers, which it does not have.
"""

from __future__ import annotations

import _thread
import itertools
import operator
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Protocol

# Ranks, from the outside in.
STEP = 0  # an engine's step
ENGINE = 1  # what an engine loads when it is first needed, for those who have its step, too: tokenizer, template, grammars
PART = 2  # what belongs to one tokenizer or template
LEAF = 3  # counters and the like
_IMPORTING = 4


class Lock(Protocol):
    """threading.RLock, or what behaves like one."""

    def acquire(self) -> bool: ...

    def release(self) -> object: ...


_locks: dict[tuple[int, int], weakref.ref[Lock]] = {}  # (rank, number of the registration) -> lock
_numbers = itertools.count()


def register(lock: Lock, rank: int) -> None:
    """Hold `lock` at every fork from now on. Only a weak reference to it is kept."""
    key = (rank, next(_numbers))
    _locks[key] = weakref.ref(lock, lambda _: _locks.pop(key, None))


def _in_order() -> list[Lock]:
    references = [_locks.get(key) for key in sorted(_locks)]  # a copy, made at once: other threads change it
    alive = [reference() for reference in references if reference is not None]
    return [lock for lock in alive if lock is not None]


# ------------------------------------------------------------------ around a fork

_forking = threading.RLock()  # held by the thread that forks: one fork at a time
_held: list[list[Lock]] = []  # the locks of each fork under way: a signal handler may fork inside a fork
_late: list[BaseException] = []  # what a signal handler raised meanwhile

_acquired = operator.methodcaller("acquire")


def _take_all(held: list[Lock]) -> None:
    """Take every registered lock, in order. If a signal handler raises, `held` is what is held, and another call goes on.

    (That is why `filter` takes them: between two bytecodes an exception could come after `acquire` and before `append`.)
    """
    while (wanted := _in_order()) != held:  # others may register more while this waits
        n = next((i for i, (a, b) in enumerate(zip(held, wanted, strict=False)) if a is not b), len(held))
        while len(held) > n:  # one comes before these: back, to take them in order
            held.pop().release()
        held.extend(filter(_acquired, wanted[n:]))


def _before() -> None:
    held: list[Lock] = []
    forking: list[Lock] = []
    while True:
        try:
            if not forking:
                forking.extend(filter(_acquired, [_forking]))
            _take_all(held)
            if not any(one is held for one in _held):
                _held.append(held)
            break
        except BaseException as error:  # the interpreter would print it and fork all the same
            _late.append(error)


def _after() -> None:
    for lock in reversed(_held.pop()):
        lock.release()
    _forking.release()


def _after_in_parent() -> None:
    errors = _late.copy()
    _late.clear()
    _after()
    for error in errors:
        if not isinstance(error, KeyboardInterrupt):
            raise error
        _thread.start_new_thread(_interrupt_main_after, (_after_in_parent.__code__,))


def _interrupt_main_after(handler: CodeType) -> None:
    """A Ctrl-C that came too early comes now, but not while the main thread is in a handler of the fork: there it would be
    printed and forgotten."""
    main = threading.main_thread().ident or 0
    while _runs(handler, sys._current_frames().get(main)):
        time.sleep(0.001)
    _thread.interrupt_main()


def _runs(code: CodeType, frame: FrameType | None) -> bool:
    """Whether `code` runs in a frame or in one of its callers."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def _after_in_child() -> None:
    _late.clear()
    _after()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)


def call_after(*, in_parent: Callable[[], None] | None = None, in_child: Callable[[], None] | None = None) -> None:
    """Call them after every fork, when its locks have been given back: handlers come in the order of their registration."""
    handlers = {"after_in_parent": in_parent, "after_in_child": in_child}
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(**{name: handler for name, handler in handlers.items() if handler is not None})


importing = threading.RLock()
register(importing, _IMPORTING)
