"""Run the sections, each in its own process with its own time limit, most valuable first.

One JSON line for every finding and one for every section is printed and appended to $OUT/gpu_check.jsonl at once, so
that whatever ends the run leaves what was found. Exit code 0 only if every section that ran is "ok".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

TOTAL = 470  # seconds for everything; most sections need far less than their limit
LIMITS = {  # seconds; in order of worth
    "versions": 40,
    "kernels": 150,
    "gradients": 70,
    "throughput": 150,
    "profile": 60,
    "matmuls": 40,
    "loss_curve": 90,
    "resume": 60,
    "graph": 60,
    "ranks": 90,
    "memory": 60,
}
NO_DEVICE = 3  # exit code of a section that found no usable GPU


class Report:
    """Lines to stdout and to the file."""

    def __init__(self, folder: str | None) -> None:
        self.file: IO[str] | None = None
        self._kernels = tempfile.TemporaryDirectory(prefix="gpu_check_")
        self.kernels = self._kernels.name  # compiled once, for all sections
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.file = (Path(folder) / "gpu_check.jsonl").open("a", encoding="utf-8")

    def line(self, text: str) -> None:
        print(text, flush=True)
        if self.file:
            self.file.write(text + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self._kernels.cleanup()
        if self.file:
            self.file.close()

    def write(self, values: dict[str, Any]) -> None:
        self.line(json.dumps(values))


def run_section(name: str, limit: float, report: Report) -> str:
    """Run one section in a child; returns its status: ok, failed, timeout, no device or crashed."""
    command = [sys.executable, "-m", f"{__package__}", "--section", name]
    began = time.monotonic()
    environment = {**os.environ, "PYENGINE_CUDA_CACHE": "1", "NUMBA_CACHE_DIR": report.kernels}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
    child = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    code, errors = follow(child, limit, report)
    statuses = {None: "timeout", 0: "ok", 1: "failed", NO_DEVICE: "no device"}
    status = statuses.get(code, "crashed")
    values = {"section": name, "status": status, "seconds": round(time.monotonic() - began, 1)}
    if status != "ok":
        values["detail"] = errors[-1500:].strip()
    report.write(values)
    return status


def follow(child: subprocess.Popen[str], limit: float, report: Report) -> tuple[int | None, str]:
    """Pass on the child's findings as they come; its exit code (None: killed at the limit) and what it wrote to stderr.

    What it has started ends with it: a compiler, for one, that has its pipes would hold up the sections that come after.
    """
    errors: list[str] = []

    def pass_on() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("{"):
                report.line(line.rstrip("\n"))

    def collect() -> None:
        assert child.stderr is not None
        errors.extend(child.stderr)

    readers = [threading.Thread(target=target, daemon=True) for target in (pass_on, collect)]
    for reader in readers:
        reader.start()
    try:
        code: int | None = child.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody is left
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    for reader, pipe in zip(readers, (child.stdout, child.stderr), strict=True):
        reader.join(timeout=5)
        if pipe is not None and not reader.is_alive():  # closing waits for who reads, and so for who has left the child's session
            pipe.close()
    return code, "".join(errors)


def run_child(name: str) -> int:
    """One section in this process."""
    from ..errors import TrainingError
    from ..supervise import die_with
    from . import sections

    die_with(os.getppid())  # whose terminal, or whose time limit, does not reach this session
    try:
        return 0 if sections.SECTIONS[name]() else 1
    except (TrainingError, ImportError) as error:
        no_device = type(error).__name__ in ("DeviceError", "MissingLibraryError") or isinstance(error, ImportError)
        if no_device and not sections.started():
            print(f"no device: {error}", file=sys.stderr)
            return NO_DEVICE
        raise


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--only", action="append", choices=list(LIMITS), help="run this section only; repeatable")
    parser.add_argument("--section", choices=list(LIMITS), help=argparse.SUPPRESS)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all time limits")
    options = parser.parse_args()
    if options.section:
        return run_child(options.section)
    report = Report(os.environ.get("OUT"))
    statuses = {}
    deadline = time.monotonic() + TOTAL * options.scale
    for name in options.only or list(LIMITS):
        limit = min(LIMITS[name] * options.scale, deadline - time.monotonic())
        if limit > 1:
            statuses[name] = run_section(name, limit, report)
        else:
            statuses[name] = "no time left"
            report.write({"section": name, "status": "no time left", "seconds": 0})
    bad = {name: status for name, status in statuses.items() if status != "ok"}
    report.write({"summary": statuses, "ok": not bad})
    report.close()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
