"""Several server processes behind one address.

The parent serves nothing. It starts the processes, each on CPUs of its own, hands SIGTERM and Ctrl-C on to them, and ends
them all when one is lost: whoever started it starts it again, with nothing left over. It has no thread when it forks, and
every process notices when the parent is gone.
"""

from __future__ import annotations

import os
import selectors
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


def shares(cpus: Sequence[int], n: int) -> list[list[int]]:
    """n disjoint shares of CPUs, neighbours together, whose sizes differ by at most one; n <= len(cpus)."""
    cpus = sorted(cpus)
    bounds = [i * len(cpus) // n for i in range(n + 1)]
    return [cpus[begin:end] for begin, end in pairwise(bounds)]


class Child:
    """What a process knows of its parent. number: of the process, from 0 on."""

    def __init__(self, number: int, news: int, life: int) -> None:
        self.number = number
        self._news, self._life = news, life

    def ready(self) -> None:
        """Requests are taken from now on."""
        os.write(self._news, b"r")

    def when_orphaned(self, function: Callable[[], None]) -> None:
        """Call function() in a thread when the parent is gone, however it went."""

        def wait() -> None:
            os.read(self._life, 1)  # nobody writes: it returns when the other end is closed
            function()

        threading.Thread(target=wait, name="pyengine-parent", daemon=True).start()


class Parent:
    """Runs work(child) in a process for each share of CPUs; its value is the process's exit code. The first process must be
    ready before the others start, so that what is wrong is said once."""

    def __init__(self, cpus: Sequence[Sequence[int]], work: Callable[[Child], int]) -> None:
        self._cpus = cpus
        self._work = work
        self._pids: dict[int, int] = {}  # and the number of each process
        self._n_ready = 0
        self._is_ending = False
        self._code = 0
        self._signals = os.pipe()
        self._news = os.pipe()
        self._life = os.pipe()  # children hold the reading end, the parent alone the other
        for end in self._signals:
            os.set_blocking(end, False)

    def run(self, ready: Callable[[Sequence[int]], None]) -> int:
        """Until all have ended. ready(pids) is called when all take requests. 0, or the exit code of the first that failed."""
        wakeup = signal.set_wakeup_fd(self._signals[1], warn_on_full_buffer=False)  # first: what is heard is in the pipe
        before = {one: signal.signal(one, _heard) for one in SIGNALS}
        try:
            self._start(0)
            self._watch(ready)
        finally:
            for pid in self._pids:  # after an exception only
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            for one, handler in before.items():
                signal.signal(one, handler)
            signal.set_wakeup_fd(wakeup)
            for end in (*self._signals, *self._news, *self._life):
                os.close(end)
        return self._code

    def _watch(self, ready: Callable[[Sequence[int]], None]) -> None:
        with selectors.DefaultSelector() as selector:
            for end in (self._signals[0], self._news[0]):
                selector.register(end, selectors.EVENT_READ)
            while self._pids:
                for key, _ in selector.select():
                    if key.fd == self._news[0]:
                        self._note_ready(len(os.read(key.fd, 64)), ready)
                    else:
                        for number in os.read(key.fd, 64):
                            self._hear(number)

    def _note_ready(self, n: int, ready: Callable[[Sequence[int]], None]) -> None:
        self._n_ready += n
        if self._is_ending:
            return
        if self._n_ready == len(self._cpus):
            ready(list(self._pids))
        for number in range(len(self._pids), len(self._cpus)):
            self._start(number)

    def _hear(self, number: int) -> None:
        if number == signal.SIGCHLD:
            self._reap()
        elif number in SIGNALS:
            self._end()

    def _reap(self) -> None:
        while self._pids:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            number, code = self._pids.pop(pid, None), os.waitstatus_to_exitcode(status)
            if number is None:  # not ours: of the shell that became this process, or an orphan if this is a container's first
                continue
            if self._is_ending and code in (0, -signal.SIGTERM):
                continue
            if code <= 0:  # another one has said itself what is wrong
                how = f"signal {-code}" if code < 0 else "it ended by itself"
                print(f"pyengine: error: process {number} ({pid}) was lost: {how}", file=sys.stderr, flush=True)
            self._code = self._code or (code if code > 0 else 1)
            if not self._is_ending:
                self._end()

    def _end(self) -> None:
        self._is_ending = True
        for pid in self._pids:
            os.kill(pid, signal.SIGTERM)  # a child that has ended is there until it is reaped

    def _start(self, number: int) -> None:
        # Until the child has its own handlers, a signal for it must not look like one for the parent.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        pid = os.fork()
        if pid == 0:
            code = 1
            with suppress(BaseException):
                code = self._be_child(number, mask)
            os._exit(code)
        self._pids[pid] = number
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _be_child(self, number: int, mask: set[int | signal.Signals]) -> int:
        os.setpgid(0, 0)  # Ctrl-C at a terminal is the parent's to hear
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in (*self._signals, self._news[0], self._life[1]):
            os.close(end)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.sched_setaffinity(0, self._cpus[number])
        return self._work(Child(number, self._news[1], self._life[0]))


def _heard(number: int, frame: object) -> None:
    """The number of the signal is in the pipe by now."""
