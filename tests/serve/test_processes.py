"""`pyengine serve --processes`: one address, CPUs of their own, and all end together."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pyengine.serve.processes import shares

pytest.importorskip("uvicorn", reason="the extra serve is not installed")
if not hasattr(os, "sched_getaffinity"):
    pytest.skip("this system does not pin processes to CPUs", allow_module_level=True)

from prometheus_client.parser import text_string_to_metric_families
from serve.test_server import HELLO, get, post

from pyengine.errors import PyEngineError
from pyengine.serve import siblings
from pyengine.serve.metrics import Metrics, text_of
from pyengine.serve.siblings import Siblings, new_family

# Two where there are CPUs for them; everything here is as true of one.
N_PROCESSES = min(2, len(os.sched_getaffinity(0)))


@contextmanager
def servers(model: Path) -> Iterator[tuple[subprocess.Popen[str], int, list[int]]]:
    """(the parent, the port, the processes) once all are ready. Whatever happens, they end with the parent's input."""
    command = [sys.executable, "-I", "-m", "pyengine", "serve", "-m", str(model), "--port", "0", "--log-format", "none"]
    process = subprocess.Popen([*command, "--processes", str(N_PROCESSES)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = next((one for one in process.stderr if " at http://" in one), "")
        said = re.search(r"processes \(([\d ]+)\) at http://127.0.0.1:(\d+);", line)
        assert said is not None
        yield process, int(said[2]), [int(pid) for pid in said[1].split()]
    finally:
        process.kill()  # the others notice that it is gone
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("n_cpus", range(1, 9))
def test_every_process_has_cpus_of_its_own(n_cpus: int) -> None:
    cpus = [3 * i + 1 for i in range(n_cpus)]
    for n in range(1, n_cpus + 1):
        parts = shares(cpus[::-1], n)
        assert [cpu for part in parts for cpu in part] == cpus and len(parts) == n
        assert max(map(len, parts)) - min(map(len, parts)) <= 1 and all(parts)


def test_a_signal_that_comes_while_the_parent_begins_to_listen_is_heard() -> None:
    code = """
import os, signal, sys
from pyengine.serve import processes
listen = signal.signal
def heard_at_once(number, handler):
    before = listen(number, handler)
    if handler is processes._heard and number == signal.SIGTERM:
        signal.raise_signal(number)
    return before
signal.signal = heard_at_once
cpus = sorted(os.sched_getaffinity(0))
sys.exit(processes.Parent([cpus], lambda child: signal.pause() or 1).run(print))
"""
    assert subprocess.run([sys.executable, "-I", "-c", code], timeout=120).returncode == 0


def test_they_answer_alike_and_end_together(chat_model: Path) -> None:
    with servers(chat_model) as (process, port, pids):
        assert len(set(pids)) == N_PROCESSES
        cpus = [os.sched_getaffinity(pid) for pid in pids]
        assert set.union(*cpus) == os.sched_getaffinity(0) and sum(map(len, cpus)) == len(set.union(*cpus))
        answers = [post(port, "/v1/chat/completions", HELLO) for _ in range(8)]
        assert all(status == 200 for status, _ in answers)
        assert len({answer["choices"][0]["message"]["content"] for _, answer in answers}) == 1
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        process.stderr.read()  # until nobody holds it: all have ended
        assert process.wait() == 0


def test_a_response_is_there_whichever_process_is_asked(chat_model: Path) -> None:
    """Every request is a connection of its own, and may come to any of them."""
    with servers(chat_model) as (_, port, _):
        body = {"input": "Hello", "max_output_tokens": 2, "seed": 1}
        kept = [post(port, "/v1/responses", body) for _ in range(8)]
        assert all(status == 200 and response["store"] for status, response in kept)
        for _, response in kept:
            assert json.loads(get(port, f"/v1/responses/{response['id']}")) == response
            status, next_one = post(port, "/v1/responses", {**body, "previous_response_id": response["id"]})
            assert status == 200 and next_one["previous_response_id"] == response["id"]
        gauge = re.compile(r'^pyengine:stored_responses\{process="(\d)"\} (.+)$', re.MULTILINE)
        while not (stored := gauge.findall(get(port, "/metrics"))):
            pass  # the first process took longer than a sibling has
        assert stored == [("0", "16.0")]


def test_whichever_is_asked_tells_the_metrics_of_all(chat_model: Path) -> None:
    with servers(chat_model) as (_, port, _):
        for _ in range(6):
            assert post(port, "/v1/chat/completions", HELLO)[0] == 200
        for _ in range(6):
            while f"\npyengine:processes {N_PROCESSES}.0\n" not in (text := get(port, "/metrics")):
                pass  # one of them took longer than a sibling has
            said = re.findall(r'^vllm:generation_tokens_total\{.*process="(\d)"\} (.+)$', text, re.MULTILINE)
            assert sum(float(n) for _, n in said) == 6 * HELLO["max_tokens"]
            pages = re.findall(r'^vllm:kv_cache_usage_perc\{.*process="(\d)"\}', text, re.MULTILINE)
            assert pages == [str(i) for i in range(N_PROCESSES)]


def test_the_metrics_of_processes_are_of_one_family_each() -> None:
    """As the format wants it: what describes a family once, before all its samples; and as prometheus_client reads it."""
    both = [Metrics(), Metrics()]
    for n, one in enumerate(both):
        one.requests.labels("/", "200").inc(3 + n)
        one.first_token.labels("m").observe(0.01)
    text = text_of({1: both[1].snapshot(), 0: json.loads(json.dumps(both[0].snapshot()))}).decode()
    assert text.count("# TYPE pyengine:http_requests_total ") == 1
    counts = [line for line in text.splitlines() if line.startswith("pyengine:http_requests_total")]
    assert [line.rsplit(" ", 1)[1] for line in counts] == ["3.0", "4.0"]
    read = {family.name: family for family in text_string_to_metric_families(text)}
    buckets = [s for s in read["vllm:time_to_first_token_seconds"].samples if s.labels.get("le") == "+Inf"]
    assert [(s.labels["process"], s.value) for s in buckets] == [("0", 1.0), ("1", 1.0)]


def test_a_process_that_does_not_answer_is_left_out() -> None:
    async def main() -> None:
        family = new_family()
        first, second = (Siblings(family, number, 3) for number in range(2))
        assert await first.gather() == {}
        async with second.telling(lambda: [1, {"a": 2.5}]):
            assert await first.gather() == {1: [1, {"a": 2.5}]}
            assert await Siblings(new_family(), 0, 2).gather() == {}
        assert await first.gather() == {}

    asyncio.run(main())


def test_a_process_of_another_user_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has taken the name of one that ended."""

    async def lie(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"[1]")
        writer.close()

    async def main() -> None:
        family = new_family()
        async with await asyncio.start_unix_server(lie, f"\0{family}-1"):
            assert await Siblings(family, 0, 2).gather() == {1: [1]}
            monkeypatch.setattr(siblings, "_uid", lambda _: os.geteuid() + 1)
            assert await Siblings(family, 0, 2).gather() == {}

    asyncio.run(main())


def test_a_process_whose_engines_are_closed_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siblings, "TIMEOUT", None)  # were the connection left open, this would wait for ever
    errors: list[Any] = []

    def closed() -> None:
        raise PyEngineError("the engine is closed")

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, error: errors.append(error))
        family = new_family()
        async with Siblings(family, 1, 2).telling(closed):
            assert await Siblings(family, 0, 2).gather() == {}

    asyncio.run(main())
    gc.collect()  # what an error that nobody has asked for waits for
    assert errors == []


def test_one_that_is_lost_is_told_and_ends_all(chat_model: Path) -> None:
    with servers(chat_model) as (process, _, pids):
        os.kill(pids[-1], signal.SIGKILL)
        assert process.stderr is not None
        assert f"({pids[-1]}) was lost: signal 9" in process.stderr.read()
        assert process.wait() == 1


def test_they_end_when_their_parent_is_gone(chat_model: Path) -> None:
    """It is killed, and can tell them nothing. Were one to stay, this would wait for ever."""
    with servers(chat_model) as (process, _, _):
        process.kill()
        assert process.stderr is not None
        process.stderr.read()  # until the last has closed it


STRANGER = """
import os, sys
from pyengine.serve.processes import Parent
stranger = os.fork() or os._exit(0)
os.waitid(os.P_PID, stranger, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how
sys.exit(Parent([sorted(os.sched_getaffinity(0))], lambda child: 3).run(print))
"""


def test_a_child_that_is_not_one_of_them_is_not_missed() -> None:
    """As a shell leaves behind that replaces itself by the server."""
    done = subprocess.run([sys.executable, "-I", "-c", STRANGER], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")


def test_what_is_wrong_is_said_once(chat_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-m", "pyengine", "serve", "--port", "0", "--processes"]
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(chat_model.read_bytes()[:1000])
    for options in ([str(N_PROCESSES), "-m", str(wrong)], ["100000"], [str(N_PROCESSES), "-m", str(tmp_path / "none")]):
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        assert done.returncode != 0 and done.stderr.count("pyengine: error:") == 1, done.stderr
