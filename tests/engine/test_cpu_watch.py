"""Threads that do not get the CPUs they count on: noticed, and said once."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from engine import cli_tools

import pyengine
from pyengine import _core, cpu_watch


class Machine:
    """What the core would report, as the test likes it."""

    def __init__(self) -> None:
        self.counters = {"n_periods": 1000, "n_throttled": 900, "throttled_us": 5}
        self.n_reads = 0
        self.info = {"n_affinity": 8, "cpu_quota": 2.0, "n_default": 2}

    def throttling(self) -> dict[str, int]:
        self.n_reads += 1
        return dict(self.counters)

    def run(self, periods: int, stops: int) -> None:
        self.counters["n_periods"] += periods
        self.counters["n_throttled"] += stops


@pytest.fixture()
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(_core, "throttling", machine.throttling)
    monkeypatch.setattr(_core, "thread_info", lambda: machine.info)
    return machine


@pytest.fixture()
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A process that has said nothing yet; what it says from now on."""
    messages: list[str] = []
    monkeypatch.setattr(cpu_watch, "_state", cpu_watch._State())
    monkeypatch.setattr(cpu_watch, "say", messages.append)
    return messages


@contextmanager
def computing(n_threads: int) -> Iterator[None]:
    cpu_watch.begin()
    yield
    cpu_watch.end(n_threads)


# -------------------------------------------------------------------- throttling


@pytest.mark.parametrize(
    ("periods", "stops", "told"),
    [(10, 10, True), (10, 3, True), (30, 3, True), (10, 2, False), (31, 3, False), (1000, 99, False), (0, 0, False)],
)
def test_stops_while_computing_are_said(
    machine: Machine, said: list[str], periods: int, stops: int, told: bool
) -> None:
    with computing(4):
        machine.run(periods, stops)
        assert not said
    assert len(said) == told
    if told:
        assert f"quota of 2 CPUs was used up in {stops} of {periods} periods; 4 threads are more" in said[0]


def test_they_are_said_once(machine: Machine, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_watch, "INTERVAL_S", 0.0)
    for _ in range(3):
        with computing(2):
            machine.run(10, 10)
    assert len(said) == 1 and "other work shares it" in said[0]
    n_reads = machine.n_reads
    with computing(2):
        pass
    assert machine.n_reads == n_reads  # nothing left to look for


def test_stops_before_and_between_are_not_ours(
    machine: Machine, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_watch, "INTERVAL_S", 0.0)
    for _ in range(3):
        machine.run(50, 50)
        with computing(2):
            machine.run(50, 0)
    assert not said


def test_many_short_calls_read_little(machine: Machine, said: list[str]) -> None:
    for _ in range(1000):
        with computing(2):
            machine.run(1, 1)
    assert machine.n_reads == 2
    cpu_watch._state.judged_at -= cpu_watch.INTERVAL_S
    with computing(2):
        pass
    assert machine.n_reads <= 4 and "999 of 999" in said[0]


def test_calls_of_several_threads(machine: Machine, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_watch, "INTERVAL_S", 0.0)
    inside, leave = threading.Barrier(5), threading.Barrier(5)

    def call() -> None:
        with computing(2):
            inside.wait(10)
            leave.wait(10)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    inside.wait(10)
    machine.run(10, 10)
    leave.wait(10)
    for thread in threads:
        thread.join()
    assert len(said) == 1


def test_a_quota_below_one_cpu(machine: Machine, said: list[str]) -> None:
    machine.info = {"n_affinity": 8, "cpu_quota": 0.5, "n_default": 1}
    with computing(1):
        machine.run(10, 10)
    assert said[0].endswith("less than one CPU: tokens come in bursts")


# -------------------------------------------------------------------- too many threads


@pytest.mark.parametrize(
    ("quota", "n_threads", "words"),
    [
        (2.5, 3, "3 threads are more than the cgroup's quota of 2.5 CPUs can run: slow; the default is 2"),
        (0.0, 9, "9 threads are more than the affinity mask of 8 CPUs can run: slow; the default is 8"),
        (2.5, 2, None), (0.0, 8, None), (0.0, 0, None), (0.5, 1, None),
    ],
)  # fmt: skip
def test_too_many_threads(machine: Machine, said: list[str], quota: float, n_threads: int, words: str | None) -> None:
    machine.info = {"n_affinity": 8, "cpu_quota": quota, "n_default": max(1, int(quota)) if quota else 8}
    cpu_watch.check_threads(n_threads)
    cpu_watch.check_threads(n_threads)
    assert said == ([] if words is None else [words])


def test_an_engine_does_as_it_is_told_and_logs(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_watch, "_state", cpu_watch._State())
    monkeypatch.setattr(cpu_watch, "say", cpu_watch._log)
    n_threads = _core.thread_info()["n_default"] + 1
    with caplog.at_level(logging.WARNING, "pyengine"):
        for _ in range(2):
            with pyengine.Engine(tiny_model, n_threads=n_threads) as engine:
                assert engine.n_threads == n_threads
        with pyengine.Engine(tiny_model):
            pass
    assert [record.name for record in caplog.records] == ["pyengine"]
    assert f"{n_threads} threads are more than" in caplog.text


def test_the_command_line_says_it_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    command = ("generate", "-m", tiny_model, "hello", "-n", 4, "--temp", 0)
    quiet = cli_tools.run_process(tmp_path, *command)
    told = cli_tools.run_process(tmp_path, *command, "-t", 200)
    assert (told.stdout, quiet.stderr) == (quiet.stdout, "")
    assert told.stderr.startswith("pyengine: warning: 200 threads are more than ") and told.stderr.count("\n") == 1


# -------------------------------------------------------------------- a real group


def make_group(name: str, n_cpus: float) -> Path:
    """A cgroup below this process's own with a quota, v1 or v2. OSError where that is not possible."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    v1 = next((names for names in own if "cpu" in names.split(",")), None)
    parent = Path("/sys/fs/cgroup", "" if v1 is None else "cpu", own["" if v1 is None else v1].lstrip("/"))
    group = parent / name
    group.mkdir()
    try:
        if v1 is None:
            (group / "cpu.max").write_text(f"{int(n_cpus * 100_000)} 100000")
        else:
            (group / "cpu.cfs_quota_us").write_text(str(int(n_cpus * 100_000)))
    except OSError:
        group.rmdir()
        raise
    return group


@pytest.fixture()
def tenth_of_a_cpu() -> Iterator[Path]:
    """Little enough to be used up on a machine that is busy otherwise."""
    try:
        group = make_group(f"pyengine-test-{os.getpid()}", 0.1)
    except (OSError, KeyError) as error:
        pytest.skip(f"no cgroup with a CPU quota can be made here: {error}")
    yield group
    for _ in range(100):  # its process has been waited for; the kernel may need a moment more
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.05)


# The scalar table takes tenths of a second of CPU time for this batch.
SCENE = """
import os, sys
with open(os.path.join(sys.argv[2], "cgroup.procs"), "w") as file:
    file.write(str(os.getpid()))
import pyengine
with pyengine.Engine(sys.argv[1], n_threads=2) as engine:
    for _ in range(2):
        engine.generate([[i + 1] * 300 for i in range(8)], max_tokens=1)
"""


def run_in_group(group: Path, directory: Path, *command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", *map(str, command)],
        capture_output=True, text=True, timeout=120, cwd=directory, env=cli_tools.environment(PYENGINE_ISA="scalar"),
    )  # fmt: skip


def test_a_throttled_process_says_so_once(tenth_of_a_cpu: Path, tiny_model: Path, tmp_path: Path) -> None:
    done = run_in_group(tenth_of_a_cpu, tmp_path, SCENE, tiny_model, tenth_of_a_cpu)
    assert done.returncode == 0, done.stderr
    threads, throttled = done.stderr.splitlines()  # what logging does where nobody has configured it
    assert threads == "2 threads are more than the cgroup's quota of 0.1 CPUs can run: slow; the default is 1"
    assert throttled.startswith("throttled: the cgroup's CPU quota of 0.1 CPUs was used up in "), throttled


DOCTOR = """
import os, sys, time
with open(os.path.join(sys.argv[1], "cgroup.procs"), "w") as file:
    file.write(str(os.getpid()))
start = time.process_time()
while time.process_time() < start + 0.06: pass
from pyengine.cli import main
sys.exit(main(["doctor", *sys.argv[2:]]))
"""


def test_doctor_counts_the_stops(tenth_of_a_cpu: Path, tmp_path: Path) -> None:
    done = run_in_group(tenth_of_a_cpu, tmp_path, DOCTOR, tenth_of_a_cpu, "--json")
    facts: dict[str, Any] = json.loads(done.stdout)
    counters = facts["threads"]["throttling"]
    assert facts["threads"]["cpu_quota"] == 0.1 and 3 <= counters["n_throttled"] <= counters["n_periods"]
    assert counters["throttled_us"] > 0
    assert any("was used up in" in warning for warning in facts["warnings"])
    text = run_in_group(tenth_of_a_cpu, tmp_path, DOCTOR, tenth_of_a_cpu)
    assert "throttled:" in text.stdout and " periods\n" in text.stdout
    assert "pyengine: warning: the cgroup's quota was used up in" in text.stderr
