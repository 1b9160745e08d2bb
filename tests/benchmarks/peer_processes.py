"""Processes for peers.py: workers that measure, commands that are measured whole, CPU quotas, and facts about the machine."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("peer_worker.py")
SETTLE_SECONDS = 0.1  # after each measurement: threads that spin for their next task must have gone to sleep


class PeerMissingError(Exception):
    """This peer, or what a case needs, is not on this machine; the message is the reason."""


# ---------------------------------------------------------------- workers


class Worker:
    """peer_worker.py in a process of its own, waiting on a pipe while others measure. PeerMissingError if it does not start."""

    def __init__(
        self,
        kind: str,
        python: str,
        model: Path,
        n_threads: int | None,
        *,
        env: Mapping[str, str] | None = None,
        cpus: set[int] | None = None,
        cgroup: Path | None = None,
    ) -> None:
        command = [python, str(WORKER), kind, str(model), *([] if n_threads is None else [str(n_threads)])]
        if cgroup is not None:  # the shell enters the group before Python exists: quotas are read at start
            command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cgroup / "cgroup.procs"), *command]
        # What it says on stderr goes to a file: a pipe that nobody reads before the end would fill up.
        self.messages = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.messages,
            text=True,
            env=environment(env),
            preexec_fn=None if cpus is None else lambda: os.sched_setaffinity(0, cpus),
        )
        try:
            self.info: dict[str, Any] = self._answer()
        except PeerMissingError:
            self.close()
            raise

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.messages.seek(0)
            lines = self.messages.read().strip().splitlines()
            raise PeerMissingError(lines[-1] if lines else f"exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def measure(self, request: Mapping[str, Any]) -> float:
        """Raises PeerMissingError if the peer cannot do it."""
        return float(self.ask(request))

    def ask(self, request: Mapping[str, Any]) -> Any:
        """The value of its answer, whatever that is."""
        assert self.process.stdin is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except OSError as error:
            raise PeerMissingError(f"the process has ended ({error})") from None
        answer = self._answer()
        time.sleep(SETTLE_SECONDS)
        if "error" in answer:
            raise PeerMissingError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(OSError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.messages.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Nothing that steers one of the engines from outside, and `changes`."""
    steering = re.compile(r"^(PYENGINE_|OMP_|GOMP_|KMP_|OPENBLAS_|MKL_|GGML_|LLAMA_|OV_)")
    return {**{k: v for k, v in os.environ.items() if not steering.match(k)}, **(changes or {})}


# ---------------------------------------------------------------- whole processes

# What a user would write; the prompt is argv[2], the model argv[1], the number of tokens argv[3], threads argv[4].
LLAMA_CPP_GENERATE = """
import sys
from llama_cpp import Llama
model, prompt, n, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
llama = Llama(model, n_threads=threads, n_threads_batch=threads, verbose=False)
for piece in llama(prompt, max_tokens=n, temperature=0, stream=True):
    print(piece["choices"][0]["text"], end="", flush=True)
"""
OPENVINO_GENERATE = """
import sys
import openvino_genai
model, prompt, n, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
pipeline = openvino_genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads)
config = openvino_genai.GenerationConfig()
config.max_new_tokens = config.min_new_tokens = n
config.do_sample, config.ignore_eos = False, True
pipeline.generate(prompt, config, streamer=lambda text: print(text, end="", flush=True))
"""
IK_LLAMA_CPP_GENERATE = """
import sys
from ik_llama_cpp import _ctypes_api as lib
from ik_llama_cpp._internals import IkContext, IkModel, make_batch, make_batch_single
model = IkModel(sys.argv[1])
n, threads = int(sys.argv[3]), int(sys.argv[4])
context = IkContext(model, n_ctx=2048, n_threads=threads)
ids = model.tokenize(sys.argv[2])
batch = make_batch(ids)
for position in range(len(ids), len(ids) + n):
    if context.decode(batch) != 0:
        sys.exit(1)
    token = context.sample(-1)
    print(model.detokenize([token]), end="", flush=True)
    batch = make_batch_single(token, position)
"""
PROMPT = "The capital of France is"


def generate_command(kind: str, python: str, model: Path, n_tokens: int, n_threads: int) -> list[str]:
    """argv of a process that continues PROMPT, text to stdout as it comes."""
    if kind == "pyengine":
        options = ["-n", str(n_tokens), "-t", str(n_threads), "--temp", "0", "--ignore-eos"]
        return [python, "-m", "pyengine", "generate", "-m", str(model), "-p", PROMPT, *options]
    programs = {"llama.cpp": LLAMA_CPP_GENERATE, "ik_llama.cpp": IK_LLAMA_CPP_GENERATE, "openvino": OPENVINO_GENERATE}
    program = programs[kind]
    return [python, "-c", program, str(model), PROMPT, str(n_tokens), str(n_threads)]


def run_to_end(command: Sequence[str]) -> tuple[float, float]:
    """(milliseconds from start to the first byte of output, peak resident memory in MiB). Raises PeerMissingError."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, env=environment(), cwd="/"
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    elapsed = (time.perf_counter() - started) * 1e3
    while process.stdout.read(1 << 16):
        pass
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if not first or process.returncode != 0:
        raise PeerMissingError(f"no output from {Path(command[0]).name} {command[1]}, exit code {process.returncode}")
    time.sleep(SETTLE_SECONDS)
    return elapsed, usage.ru_maxrss / 2**10


# ---------------------------------------------------------------- neighbours and quotas


class Neighbour:
    """A process that keeps one CPU busy, when it is let."""

    def __init__(self, cpu: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "while True: pass"], preexec_fn=lambda: os.sched_setaffinity(0, {cpu})
        )
        self.rest()

    def rest(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def work(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        time.sleep(SETTLE_SECONDS)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def _cpu_controller() -> tuple[Path, bool]:
    """(directory of this process's cgroup that controls CPU time, whether it is version 2)."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, options = line.split()[:4]
        if kind == "cgroup" and "cpu" in options.split(","):
            name = next(names for names in own if "cpu" in names.split(","))
            return Path(mount) / own[name].lstrip("/"), False
        if kind == "cgroup2" and (Path(mount) / "cgroup.controllers").read_text().find("cpu") >= 0:
            return Path(mount) / own.get("", "/").lstrip("/"), True
    raise PeerMissingError("no cgroup controls CPU time here")


@contextmanager
def cpu_quota(n_cpus: float) -> Iterator[Path]:
    """A cgroup whose processes may use n_cpus CPUs. Raises PeerMissingError where this user cannot make one."""
    group: Path | None = None
    try:
        parent, version_2 = _cpu_controller()
        group = parent / f"pyengine-bench-{os.getpid()}"
        group.mkdir()
        if version_2:
            (group / "cpu.max").write_text(f"{int(n_cpus * 100_000)} 100000")
        else:
            (group / "cpu.cfs_period_us").write_text("100000")
            (group / "cpu.cfs_quota_us").write_text(str(int(n_cpus * 100_000)))
    except (OSError, StopIteration) as error:
        if group is not None and group.is_dir():
            group.rmdir()
        raise PeerMissingError(f"no cgroup with a CPU quota can be made here ({error})") from None
    try:
        yield group
    finally:
        for _ in range(100):  # the processes in it have been waited for; the kernel may need a moment more
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.05)


# ---------------------------------------------------------------- facts


def machine() -> dict[str, Any]:
    """CPU, caches, memory, system, and how busy it was."""
    text = Path("/proc/cpuinfo").read_text()
    facts = {"cpu": "model name", "family": "cpu family", "model": "model", "flags": "flags"}
    found = {k: re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE) for k, name in facts.items()}
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        caches[f"L{level} {kind.lower()}"] = size
    return {
        **{name: match[1] if match else "" for name, match in found.items()},
        "cpus": os.cpu_count(),
        "affinity": len(os.sched_getaffinity(0)),
        "caches": caches,
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


def commit() -> str:
    """Of the checkout that this file is in, with "-dirty" when tracked files differ from it."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()
