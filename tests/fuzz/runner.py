"""Runs targets in processes of their own and collects what they find, whatever becomes of the process."""

from __future__ import annotations

import collections
import importlib
import json
import mmap
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fuzz import cases, worker
from fuzz.cases import Case, Finding, Target

_POLL_SECONDS = 0.2


def make_target(name: str, scratch: Path) -> Target:
    """A target by its name in TARGETS, or another as module:class."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        made: Target = getattr(importlib.import_module(module), attribute)(scratch)
        return made
    from fuzz.targets import TARGETS

    return TARGETS[name](scratch)


@dataclass
class Result:
    """What came of a target's inputs."""

    target: str
    seed: int
    executions: int = 0
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    findings: dict[tuple[str, str, str], Finding] = field(default_factory=dict)

    def add(self, finding: Finding) -> bool:
        """Whether it is a new one: the same exception from the same line is the same finding."""
        is_new = finding.key not in self.findings
        self.findings.setdefault(finding.key, finding)
        return is_new


class Worker:
    """One process at work on a target, and what is known of it."""

    def __init__(self, target: str, seed: int, first: int, count: int, scratch: Path, cpu_seconds: float) -> None:
        self.cpu_seconds = cpu_seconds
        self._errors = open(scratch / "stderr", "w+b")  # noqa: SIM115  # closed with the process
        self._status_file = tempfile.TemporaryFile()  # noqa: SIM115
        self._status_file.truncate(worker.STATUS_BYTES)
        self._status = mmap.mmap(self._status_file.fileno(), worker.STATUS_BYTES)
        worker.STATUS.pack_into(self._status, 0, first, 0.0)
        read_end, write_end = os.pipe()
        fds = self._status_file.fileno(), write_end
        arguments = [target, seed, first, count, scratch, *fds]
        self.process = subprocess.Popen(
            [sys.executable, "-P", worker.__file__, *map(str, arguments)],
            stdout=subprocess.DEVNULL, stderr=self._errors, pass_fds=fds, cwd=scratch,
        )  # fmt: skip
        os.close(write_end)
        self.report = os.fdopen(read_end)
        self.is_ready = False
        self._polled, self._n_polls = (-1, 0.0), 0

    def ask_to_stop(self) -> None:
        self._status[worker.STATUS.size] = 1

    @property
    def index(self) -> int:
        """Of the input that is being run."""
        return int(worker.STATUS.unpack_from(self._status)[0])

    def overdue(self) -> str | None:
        """Why the current input should be ended, or None. To be asked every _POLL_SECONDS."""
        status = worker.STATUS.unpack_from(self._status)
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        if not self.is_ready or status != self._polled:
            self._polled, self._n_polls = status, 0  # another input than the last time
            return None
        _, cpu_began = status
        cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") - cpu_began
        if cpu > self.cpu_seconds:
            return f"more than {self.cpu_seconds:g} CPU seconds"
        self._n_polls += fields[0] != "T"  # polls and not a clock: whoever stops processes stops it for all
        if self._n_polls * _POLL_SECONDS > cases.WALL_SECONDS:
            return f"waits longer than {cases.WALL_SECONDS:g} seconds"
        return None

    def end(self) -> str:
        """Let it say where it is, end it, and return the end of what it wrote to stderr."""
        if self.process.poll() is None and self.is_ready:
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.3)
        self.process.kill()
        self.process.wait()
        self._errors.seek(0)
        text = self._errors.read().decode("utf-8", "replace")[-4000:]
        self.close()
        return text

    def close(self) -> None:
        self.process.wait()
        for file in (self._errors, self._status_file, self.report):
            file.close()
        self._status.close()


def _line_of_ours(text: str) -> str:
    """file:line of the innermost frame inside the package, from a dump of faulthandler."""
    lines = re.findall(r'File "[^"]*/pyengine/([^"]*)", line (\d+)', text)
    return ":".join(lines[0]) if lines else "?"


def run_target(
    name: str,
    seed: int,
    *,
    executions: int | None = None,
    seconds: float | None = None,
    first: int = 0,
    cpu_seconds: float = cases.CPU_SECONDS,
    found: Callable[[Finding], None] = lambda finding: None,
) -> Result:
    """Run inputs `first`, `first` + 1, … of a target: so many, or for so long. `found` is told every new finding."""
    result = Result(name, seed)
    deadline = None if seconds is None else time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        while not _is_over(result, executions, deadline):
            started = result.executions
            count = 0 if executions is None else executions - started
            current = Worker(name, seed, first + started, count, Path(directory), cpu_seconds)
            reason = _watch(current, result, executions, deadline, found)
            if reason is None:
                current.close()
                continue
            was_ready, index, text = current.is_ready, current.index, current.end()
            if not was_ready:
                raise RuntimeError(f"the target {name} cannot be made:\n{text}")
            result.outcomes["not told before an end"] += index - first - result.executions
            result.outcomes["FOUND"] += 1
            result.executions = index - first + 1
            finding = Finding(name, seed, index, reason, _line_of_ours(text), text)
            if result.add(finding):
                found(finding)
    return result


def _is_over(result: Result, executions: int | None, deadline: float | None) -> bool:
    return (executions is not None and result.executions >= executions) or (
        deadline is not None and time.monotonic() >= deadline
    )


def _watch(
    current: Worker, result: Result, executions: int | None, deadline: float | None, found: Callable[[Finding], None]
) -> str | None:
    """Follow a worker to its end. The reason if that was not a good one."""
    with selectors.DefaultSelector() as selector:
        selector.register(current.report, selectors.EVENT_READ)
        while True:
            if selector.select(_POLL_SECONDS):
                line = current.report.readline()
                if not line:
                    break
                _take(json.loads(line), current, result, found)
            elif reason := current.overdue():
                return reason
            if _is_over(result, executions, deadline):
                current.ask_to_stop()
    code = current.process.wait()
    if code == 0:
        return None
    return f"death by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _take(message: dict[str, object], current: Worker, result: Result, found: Callable[[Finding], None]) -> None:
    if "finding" in message:
        finding = Finding(**message["finding"])  # type: ignore[arg-type]
        if result.add(finding):
            found(finding)
    elif "counts" in message:
        counts = collections.Counter(message["counts"])  # type: ignore[call-overload]
        result.outcomes += counts
        result.executions += sum(counts.values())
    else:
        current.is_ready = True


def case_of(name: str, seed: int, index: int, scratch: Path) -> tuple[Target, Case]:
    """The target, and one of its inputs made again."""
    target = make_target(name, scratch)
    return target, target.make(cases.generator(name, seed, index))


def save(finding: Finding, directory: Path) -> Path:
    """Write a finding and the files of its input down; returns where."""
    place = directory / f"{finding.target.replace(':', '.')}-{finding.seed}-{finding.index}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "finding.json").write_text(json.dumps(asdict(finding), indent=1))
    if finding.target.startswith("capi-"):
        return place  # the state machine over the C API: its seed is its input
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        _, case = case_of(finding.target, finding.seed, finding.index, Path(scratch))
    for name, content in case.files.items():
        (place / name).write_bytes(content)
    (place / "arguments.txt").write_text(ascii(case.arguments) + "\n")
    return place
