"""A parent for each rank, so that no rank waits for ever for one that is gone.

MPI waits for messages without end, and a launcher that sees a process die ends the others before any of them can say
which it was. So each rank works in a child process. Its parent, which does nothing else, sees the child be killed or
stopped, and leaves a sign of life beside the run folder every second; where another rank's stays away (its machine
hangs, its parent was stopped too), the lowest rank that is left says so. Then it kills itself, which is what makes
launchers end everybody, stopped processes too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from .terminal import tell

PATIENCE = 15.0  # seconds that a rank may be stopped or silent; PYENGINE_RANK_PATIENCE
BEAT = 1.0  # seconds from one sign of life to the next
POLL = 0.1
REPEAT = 5.0  # seconds within which a signal that comes again is the same one
PR_SET_PDEATHSIG = 1
ADVICE = "continue with --resume from the last checkpoint"


_to_parent: int | None = None  # in a child: the end of the pipe by which it says that all ranks have begun


def in_child(rank: int, size: int, arguments: Sequence[str]) -> None:
    """Return in a child process; the parent watches it and never returns."""
    global _to_parent
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    from_child, to_parent = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(from_child)
        _to_parent = to_parent
        os.setpgid(0, 0)  # signals of the terminal reach the parent, who passes them on: once
        die_with(parent)
        return
    os.close(to_parent)
    os.set_blocking(from_child, False)
    patience = float(os.environ.get("PYENGINE_RANK_PATIENCE", PATIENCE))
    code: int | None = None
    try:
        code = _Parent(rank, size, child, from_child, _folder(arguments), patience).watch()
    finally:
        if code is None:  # a rank is lost
            os.kill(os.getpid(), signal.SIGKILL)  # the child goes too
        os._exit(code)


def all_have_begun() -> None:
    """Tell this rank's parent, where it has one, that every rank runs: by now each has left a sign of life."""
    global _to_parent
    if _to_parent is not None:
        with contextlib.suppress(BrokenPipeError):
            os.write(_to_parent, b"b")
        os.close(_to_parent)
        _to_parent = None


def die_with(parent: int) -> None:
    """Be killed when the parent is (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _folder(arguments: Sequence[str]) -> Path | None:
    """Where signs of life are left: beside the run folder, which all ranks see."""
    for number, word in enumerate(arguments):
        name, _, value = word.partition("=")
        if name == "--run-dir":
            value = value or (arguments[number + 1] if number + 1 < len(arguments) else "")
            run = Path(value).absolute() if value else None
            return run.with_name(f".{run.name}.ranks") if run and run.parent.is_dir() else None
    return None


class _Parent:
    """The watch over one child and over the other ranks' parents."""

    def __init__(
        self, rank: int, size: int, child: int, from_child: int, folder: Path | None, patience: float
    ) -> None:
        self.rank, self.child, self.folder, self.patience = rank, child, folder, patience
        self.from_child = from_child
        self.others = [other for other in range(size) if other != rank]
        self.beats = 0
        self.seen: dict[int, tuple[str, float]] = {}  # rank -> its last sign, and when it was new
        self.first: dict[int, str] = {}  # what lay there at the start: of an earlier run, until all have begun
        self.stopped: float | None = None
        self.passed: dict[int, float] = {}  # signals passed on, and when
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._pass_on)
        if folder:
            with contextlib.suppress(OSError):
                folder.mkdir(exist_ok=True)
            self.first = {other: self._read(other) for other in self.others}

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        """To the child; not a second time within REPEAT: launchers signal a process and its group."""
        now = time.monotonic()
        if now - self.passed.get(number, now - 2 * REPEAT) < REPEAT:
            return
        self.passed[number] = now
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child, number)

    def watch(self) -> int | None:
        """Until the child ends by itself, whose exit code is returned, or a rank is lost: None."""
        next_beat, last = 0.0, time.monotonic()
        while True:
            pid, status = os.waitpid(self.child, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            now = time.monotonic()
            if now - last > 2 * BEAT:  # this parent itself did not run, nor did the others, perhaps: a suspended job
                self.seen = {rank: (sign, now) for rank, (sign, _) in self.seen.items()}
                self.stopped = None if self.stopped is None else now
            last = now
            if pid:
                if os.WIFEXITED(status):
                    self._forget()
                    return os.WEXITSTATUS(status)
                if os.WIFSIGNALED(status):
                    return self._killed(os.WTERMSIG(status))
                self.stopped = now if os.WIFSTOPPED(status) else None
            if self.stopped is not None and now - self.stopped > self.patience:
                return self._lost(self.rank, f"has been stopped for {self.patience:.0f} s")
            if now >= next_beat and self.folder:
                next_beat = now + BEAT
                self._beat()
                if self._somebody_is_silent(now):
                    return None
            time.sleep(POLL)

    def _killed(self, number: int) -> None:
        why = " (out of memory?)" if number == signal.SIGKILL else ""
        self._lost(self.rank, f"was killed by {signal.Signals(number).name}{why}")

    def _lost(self, rank: int, what: str) -> None:
        host = f" on {socket.gethostname()}" if rank == self.rank else ""
        tell(f"pyengine: error: rank {rank}{host} {what}: {ADVICE}")

    # ---- signs of life -----------------------------------------------------------------------------------------------

    def _path(self, rank: int) -> Path:
        assert self.folder is not None
        return self.folder / str(rank)

    def _beat(self) -> None:
        self.beats += 1
        path = self._path(self.rank)
        with contextlib.suppress(OSError):  # a full disk is the trainer's to tell
            path.with_suffix(".new").write_text(f"{os.getpid()} {self.beats}")
            path.with_suffix(".new").replace(path)  # whole or not at all: an empty sign would mean an end

    def _read(self, rank: int) -> str:
        try:
            return self._path(rank).read_text()
        except OSError:
            return ""

    def _somebody_is_silent(self, now: float) -> bool:
        """Whether a rank that was heard before is not heard any more and has not ended; the lowest rank left says so."""
        if self.first and self._all_have_begun():
            self.first.clear()  # one sign is enough from here on: a rank can be lost before its second
        for other in self.others:
            sign = self._read(other)
            if not sign:  # not begun, or ended
                self.seen.pop(other, None)
            elif sign != self.seen.get(other, (self.first.get(other, ""), 0.0))[0]:
                self.seen[other] = sign, now
        lost = [other for other, (_, when) in self.seen.items() if now - when > self.patience]
        if not lost:
            return False
        if self.rank > min([rank for rank in self.seen if rank not in lost], default=self.rank):
            time.sleep(2 * BEAT)
        else:
            self._lost(lost[0], f"has not been heard of for {self.patience:.0f} s")
        return True

    def _all_have_begun(self) -> bool:
        try:
            return bool(os.read(self.from_child, 1))
        except BlockingIOError:
            return False

    def _forget(self) -> None:
        """This rank has ended; the last one removes the folder."""
        if self.folder:
            with contextlib.suppress(OSError):
                self._path(self.rank).unlink()
            with contextlib.suppress(OSError):
                self.folder.rmdir()
