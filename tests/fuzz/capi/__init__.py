"""The state machine over the C API (fuzz_api.c): built under sanitizers and run in rounds.

    python -m tests.fuzz capi-asan capi-tsan --hours 1

A round is a process: so many operations on each of eight threads, whose seed is made of the run's seed and the round's number.
"""

from __future__ import annotations

import collections
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fuzz.cases import Finding
from fuzz.runner import Result

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
N_THREADS = 8
OPERATIONS = 1000  # of a thread in a round
ROUND = N_THREADS * OPERATIONS
ROUND_SECONDS = 600.0  # far more than any takes: a deadlock

SANITIZERS = {
    "capi-asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "capi-tsan": ["-fsanitize=thread"],
}
_FLAGS = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
_WRAPPED = ["malloc", "calloc", "realloc", "aligned_alloc", "pthread_create"]
_TABLES = {
    "kernels_avx2.c": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512vnni.c": ["-mfma", "-mf16c", *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq", "vnni"))],
}


def reason_to_skip(name: str, directory: Path) -> str | None:
    """Why this machine cannot build it, or None."""
    if not (CSRC / "pyengine.h").exists():
        return "these are not the sources"
    if shutil.which("cc") is None:
        return "there is no C compiler"
    probe = directory / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    command = ["cc", *SANITIZERS[name], str(probe), "-o", str(directory / "probe")]
    if (
        subprocess.run(command, capture_output=True).returncode != 0
        or subprocess.run([str(directory / "probe")]).returncode != 0
    ):
        return f"the compiler has no runtime for {SANITIZERS[name][0]}"
    return None


def _finish(compiler: subprocess.Popen[bytes]) -> None:
    if compiler.wait() != 0:
        raise RuntimeError(f"it does not compile: {compiler.args!r}")


def build(name: str, directory: Path) -> Path:
    """Compile core, tiny model and state machine under a sanitizer; allocations go through failing.c."""
    sources = [*CSRC.glob("*.c"), *CSRC.glob("sampler/*.c"), *Path(__file__).parent.glob("*.c")]
    sources += [CSRC / "kernels" / name for name in ("dispatch.c", "cpu_features.c", "kernels_scalar.c")]
    sources += [ROOT / "tests" / "csrc" / name for name in ("harness.c", "tiny_model.c")]
    if platform.machine() == "x86_64":
        sources += [CSRC / "kernels" / table for table in _TABLES]
    includes = [f"-I{path}" for path in (CSRC, ROOT / "tests" / "csrc", Path(__file__).parent)]
    objects: list[str] = []
    running: list[subprocess.Popen[bytes]] = []
    for source in sources:
        objects.append(str(directory / f"{source.stem}.o"))
        flags = [*_FLAGS, *SANITIZERS[name], *includes, *_TABLES.get(source.name, [])]
        running.append(subprocess.Popen(["cc", *flags, "-c", str(source), "-o", objects[-1]]))
        if len(running) == 2:  # at once
            _finish(running.pop(0))
    for process in running:
        _finish(process)
    program = directory / name
    wrap = "-Wl," + ",".join(f"--wrap={function}" for function in _WRAPPED)
    subprocess.run(["cc", *SANITIZERS[name], *objects, wrap, "-pthread", "-lm", "-o", str(program)], check=True)
    return program


def _round_seed(name: str, seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{name} {seed} {number}".encode()).digest()[:8], "little")


def run_round(
    program: Path, seed: int, number: int, operations: int = OPERATIONS
) -> tuple[dict[str, int], Finding | None]:
    """(counts, what was found). The finding's index is the number of the round's first operation."""
    arguments = [str(program), str(_round_seed(program.name, seed, number)), str(N_THREADS), str(operations)]
    environment = os.environ | {
        "TSAN_OPTIONS": "halt_on_error=1",
        "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1",
    }
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, timeout=ROUND_SECONDS, env=environment, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return {}, Finding(program.name, seed, number * ROUND, "hang", "?", " ".join(arguments))
    if done.returncode == 0:
        words = done.stdout.split()
        return dict(zip(words[::2], map(int, words[1::2]), strict=True)), None
    text = (done.stdout + done.stderr)[-8000:]
    described = re.search(r"(violation: .*|SUMMARY: .*|runtime error: .*)", text)
    where = re.sub(r"0x[0-9a-f]+|\d+", "N", described[1])[:200] if described else "?"
    return {}, Finding(program.name, seed, number * ROUND, f"exit code {done.returncode}", where, text)


def run_capi(
    name: str,
    seed: int,
    *,
    executions: int | None = None,
    seconds: float | None = None,
    first: int = 0,
    found: Callable[[Finding], None] = lambda finding: None,
) -> Result:
    """Rounds until so many operations are done, or for so long; as `runner.run_target`."""
    result = Result(name, seed)
    deadline = None if seconds is None else time.monotonic() + seconds
    program = _built(name)
    while not result.executions or (
        result.executions < executions
        if executions is not None
        else deadline is not None and time.monotonic() < deadline
    ):
        counts, finding = run_round(program, seed, (first + result.executions) // ROUND)
        result.executions += ROUND
        result.outcomes += collections.Counter(counts)
        if finding is not None and result.add(finding):
            found(finding)
    return result


def replay(name: str, seed: int, index: int) -> tuple[dict[str, int], Finding | None]:
    """The round of an operation again. Threads run as they like: what depends on their order may not come twice."""
    return run_round(_built(name), seed, index // ROUND)


_directories: list[tempfile.TemporaryDirectory[str]] = []  # they go away with the process
_programs: dict[str, Path] = {}


def _built(name: str) -> Path:
    if name not in _programs:
        _directories.append(tempfile.TemporaryDirectory(prefix="fuzz-capi-"))
        directory = Path(_directories[-1].name)
        if reason := reason_to_skip(name, directory):
            sys.exit(f"{name}: {reason}")
        _programs[name] = build(name, directory)
    return _programs[name]
