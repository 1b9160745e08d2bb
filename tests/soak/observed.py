"""The server, seen from outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from soak.client import Connection

PATIENCE = 60.0  # seconds for whatever must come: an answer, the end of what was hung up


class Server:
    """A `pyengine serve` of its own."""

    def __init__(self, options: list[str]) -> None:
        command = [sys.executable, "-I", "-m", "pyengine", "serve", "--port", "0", "--log-format", "none", *options]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(command, stderr=self._said)
        self.pid = self._process.pid
        deadline = time.monotonic() + PATIENCE
        while (found := re.search(r" at http://[^:]+:(\d+)", self.said())) is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start: {self.said()}")
            time.sleep(0.05)
        self.port = int(found[1])

    def said(self) -> str:
        self._said.seek(0)
        return self._said.read()

    def anonymous_bytes(self) -> int:
        """Memory of its own: not what it maps from files."""
        match = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert match is not None
        return int(match[1]) << 10

    def open_things(self) -> dict[str, int]:
        return {
            name: len(os.listdir(f"/proc/{self.pid}/{where}"))
            for name, where in (("descriptors", "fd"), ("threads", "task"))
        }

    def end(self) -> int | None:
        """SIGTERM; its exit code, None if it had to be killed."""
        self._process.terminate()
        try:
            return self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return None


async def metrics(port: int) -> dict[str, float]:
    connection = await Connection.open(port)
    try:
        connection.send("GET", "/metrics")
        _, headers = await connection.head()
        lines = (await connection.body(headers)).decode().splitlines()
    finally:
        connection.close()
    return {
        line.split("{")[0].split(" ")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")
    }


async def is_idle(port: int) -> str:
    """ "" when the server holds nothing of any request, else what it holds."""
    now = await metrics(port)
    names = ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc")
    return ", ".join(f"{name} {now[name]:g}" for name in names if now[name])
