"""The process that runs inputs: started by runner.py, and killed by it if need be.

    worker.py TARGET SEED FIRST COUNT SCRATCH STATUS_FD REPORT_FD

Runs COUNT inputs from FIRST on (0: no end), until it is told to stop. STATUS_FD is a file that both processes map, REPORT_FD a
pipe for JSON lines: {"ready"}, {"counts"} and {"finding"}.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import mmap
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

# index of the input, CPU seconds of the process when it was begun; then the runner's wish to stop
STATUS = struct.Struct("<qd")
STATUS_BYTES = STATUS.size + 8


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def wanted(first: int, count: int, status: mmap.mmap) -> Iterator[int]:
    for index in itertools.islice(itertools.count(first), count or None):
        if status[STATUS.size]:
            return
        yield index


def main(argv: list[str]) -> None:
    name, seed, first, count, scratch, status_fd, report_fd = argv
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    sys.path.insert(0, str(TESTS))
    from fuzz.cases import MEMORY_BYTES, Finding, run_all
    from fuzz.runner import make_target

    target = make_target(name, Path(scratch))
    status = mmap.mmap(int(status_fd), STATUS_BYTES)
    report = os.fdopen(int(report_fd), "w", buffering=1)
    limit = address_space() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def begin(index: int) -> None:
        STATUS.pack_into(status, 0, index, time.process_time())

    begin(int(first))
    report.write(json.dumps({"ready": True}) + "\n")
    for found in run_all(target, int(seed), wanted(int(first), int(count), status), begin):
        key = "finding" if isinstance(found, Finding) else "counts"
        report.write(json.dumps({key: asdict(found) if isinstance(found, Finding) else found}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
