"""Load with faults on a real server, for minutes or hours:

    python -m tests.soak                              20 seconds, the model in the package
    python -m tests.soak --minutes 10 --clients 32    as long as you like
    python -m tests.soak --model smollm2.safetensors --seed 7

Clients ask for whole and streamed answers of every endpoint, hang up anywhere (in a header, a body, an answer, by FIN or RST),
read slowly, run out of time, and send what is no request at all. At the end it is checked that

    every finished answer was that of the request alone, before the load; one that ran out of time was a beginning of it
    what was wrong was refused with a status that says so, and nothing had status 500
    no request is left, no page of keys and values is held, and no descriptor or thread more than before is open
    memory of its own that the server gained after the first third is a few per cent at most
    the server ends when it is told to, and has said nothing on stderr but its address

The last line is one JSON document; the exit code is 1 if there is a finding. The seed is printed: the same one makes the same
clients, but what is in flight together is up to the clock.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import re
import secrets
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

GROWTH_BYTES, GROWTH_SHARE = 8 << 20, 0.05  # of anonymous memory after the first third
PATIENCE = 60.0  # seconds for whatever must come: an answer, the end of what was hung up
# More of them than before the load are right: asyncio.to_thread starts so many threads, which stay.
SPARE = {"descriptors": 0, "threads": min(32, (os.cpu_count() or 1) + 4)}
KV_BYTES = 4 << 20  # so few that requests wait for pages, and give them up

# -------------------------------------------------------------------- what is asked

JSON_SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"enum": [1, 2, 3]}}}
JSON_SCHEMA |= {"required": ["name", "n"], "additionalProperties": False}
FUNCTION = {"name": "note", "parameters": JSON_SCHEMA}
BEGINNINGS = (
    "Once upon a time there was a little girl", "The dog saw a big red ball and", "One day, Tom and his mom went", "x",
)  # fmt: skip


@dataclass(frozen=True)
class Ask:
    path: str
    body: dict[str, Any]

    @property
    def can_stream(self) -> bool:
        return self.path != "/v1/embeddings" and self.body.get("max_tokens") != 0


def asks(rng: random.Random) -> list[Ask]:
    """The requests whose answers are known: every endpoint, short and long, with what a request may have."""
    out: list[Ask] = []
    for i in range(24):
        text = " ".join(rng.choice(BEGINNINGS) for _ in range(rng.choice((1, 1, 3, 12))))
        base: dict[str, Any] = {"seed": i, "temperature": rng.choice((0, 0.8, 1.5)), "cache_salt": rng.choice("ab")}
        n_tokens = rng.choice((1, 5, 30, 120))
        more: dict[str, Any] = rng.choice(
            ({}, {"n": 3, "temperature": 1}, {"stop": ["the", "."]}, {"repetition_penalty": 1.3}, {"ignore_eos": True})
        )
        messages = [{"role": "user", "content": text}]
        out.append(Ask("/v1/completions", {**base, **more, "prompt": text, "max_tokens": n_tokens, "logprobs": 2}))
        out.append(Ask("/v1/chat/completions", {**base, **more, "messages": messages, "max_tokens": n_tokens}))
        out.append(Ask("/v1/responses", {**base, "input": text, "max_output_tokens": n_tokens}))
    out.append(Ask("/v1/completions", {"prompt": list(BEGINNINGS), "max_tokens": 20, "seed": 1}))
    out.append(Ask("/v1/completions", {"prompt": BEGINNINGS[0], "max_tokens": 0, "echo": True, "logprobs": 0}))
    out.append(Ask("/v1/embeddings", {"input": list(BEGINNINGS)}))
    if find_spec("llguidance") is not None:
        base = {"seed": 3, "temperature": 1}
        tool, flat = {"type": "function", "function": FUNCTION}, {"type": "function", **FUNCTION}
        schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": JSON_SCHEMA}}
        chat = {**base, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 150}
        out.append(Ask("/v1/chat/completions", {**chat, "response_format": schema}))
        out.append(Ask("/v1/chat/completions", {**chat, "tools": [tool], "tool_choice": "required"}))
        responses = {**base, "input": "Hi", "max_output_tokens": 150}
        out.append(Ask("/v1/responses", {**responses, "tools": [flat], "tool_choice": "required"}))
    return out


WRONG: list[tuple[str, str, bytes, tuple[int, ...]]] = [  # method, path, body, statuses that are right
    ("POST", "/v1/completions", b"", (400,)),
    ("POST", "/v1/completions", b"nonsense", (400,)),
    ("POST", "/v1/completions", b"[]", (400,)),
    ("POST", "/v1/completions", b"\xff\xfe", (400,)),
    ("POST", "/v1/completions", b"[" * 100_000, (400,)),
    ("POST", "/v1/completions", b'{"prompt": "a", "prompt": "b"}', (400,)),
    ("POST", "/v1/completions", b'{"prompt": "a", "max_tokens": -1}', (400,)),
    ("POST", "/v1/completions", b'{"prompt": "a", "max_tokens": 1e99}', (400,)),
    ("POST", "/v1/completions", b'{"prompt": "a", "temperature": NaN}', (400,)),
    ("POST", "/v1/completions", b'{"prompt": "a", "n": 100000000}', (400,)),
    ("POST", "/v1/completions", b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", (400,)),
    ("POST", "/v1/completions", b'{"prompt": [-1]}', (400,)),
    ("POST", "/v1/completions", b'{"prompt": "' + b"word " * 200_000 + b'"}', (400,)),
    ("POST", "/v1/completions", b'{"prompt": "a", "model": "nobody"}', (404,)),
    ("POST", "/v1/completions", b'{"prompt": "a", "stop": [' + b'"x",' * 9_999 + b'"y"]}', (200, 400)),
    ("POST", "/v1/completions", b'{"prompt": "\\ud800", "max_tokens": 1}', (200, 400)),
    ("POST", "/v1/completions", b'{"prompt": "a", "structured_outputs": {"regex": "("}}', (400,)),
    ("POST", "/v1/completions", b" " * (5 << 20), (413,)),
    ("POST", "/v1/chat/completions", b'{"messages": []}', (400,)),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]}', (400,)),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', (400,)),
    ("POST", "/v1/responses", b'{"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}', (400,)),
    ("POST", "/v1/embeddings", b'{"input": []}', (400,)),
    ("GET", "/v1/completions", b"", (405,)),
    ("GET", "/nowhere", b"", (404,)),
    ("PATCH", "/v1/models", b"{}", (405,)),
    ("GET", "/v1/models/nobody", b"", (404,)),
]
LOOKS = ("/health", "/metrics", "/props", "/v1/models", "/openapi.json", "/")
GARBAGE = (
    b"\x16\x03\x01\x02\x00",
    b"GET\r\n\r\n",
    b"\r\n" * 50,
    b"POST / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nA" + b"a" * 70_000,
)

# -------------------------------------------------------------------- HTTP, as far as it is needed


class Connection:
    """One connection of a client. Whatever does not come within PATIENCE is a TimeoutError."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, method: str, path: str, body: bytes = b"") -> None:
        self.writer.write(request_bytes(method, path, body))

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split(" ")[1]), headers

    async def body(self, headers: dict[str, str], pause: Callable[[], Awaitable[None]] | None = None) -> bytes:
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        parts: list[bytes] = []
        while True:
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            part = (await self.reader.readexactly(size + 2))[:-2]
            if not part:
                return b"".join(parts)
            parts.append(part)
            if pause is not None:
                await pause()

    def close(self, *, hard: bool = False) -> None:
        if hard:  # RST: what was sent and what has come is lost
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.close()


def request_bytes(method: str, path: str, body: bytes) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def essence(answer: Any) -> Any:
    """What of an answer depends on its request alone."""
    if isinstance(answer, list):
        return [essence(one) for one in answer]
    if not isinstance(answer, dict):
        return answer
    left_out = (
        "id",
        "call_id",
        "created",
        "created_at",
        "timings",
        "cached_tokens",
        "prompt_tokens_details",
        "input_tokens_details",
    )
    return {name: essence(one) for name, one in answer.items() if name not in left_out}


def streamed(path: str, data: bytes) -> Any:
    """The texts that a stream's events make, in the order of `texts`. Raises ValueError for one that is not whole."""
    events = [line.removeprefix(b"data: ") for line in data.split(b"\n") if line.startswith(b"data: ")]
    if path == "/v1/responses":
        last = json.loads(events[-1])
        if last["type"] not in ("response.completed", "response.incomplete"):
            raise ValueError(last)
        return texts(path, last["response"])
    if events[-1] != b"[DONE]":
        raise ValueError(events[-1])
    out: dict[int, list[str]] = {}
    for choice in (choice for event in events[:-1] for choice in json.loads(event)["choices"]):
        said = out.setdefault(choice["index"], ["", "", ""])
        delta = choice.get("delta", choice)
        said[0] += delta.get("content") or delta.get("text") or ""
        for part in delta.get("tool_calls", ()):
            said[1] += part["function"].get("name", "") + part["function"]["arguments"]
        said[2] = choice["finish_reason"] or said[2]
    return [out[i] for i in sorted(out)]


def texts(path: str, answer: Any) -> Any:
    """[text, calls, reason] of each output of a whole answer."""
    if path == "/v1/responses":
        parts = [part["text"] for item in answer["output"] for part in item.get("content", ())]
        calls = [item["name"] + item["arguments"] for item in answer["output"] if "arguments" in item]
        return [["".join(parts), "".join(calls), answer["status"]]]
    out = []
    for choice in answer["choices"]:
        message = choice.get("message", choice)
        calls = [call["function"]["name"] + call["function"]["arguments"] for call in message.get("tool_calls", ())]
        out.append([message.get("content") or message.get("text") or "", "".join(calls), choice["finish_reason"]])
    return out


# -------------------------------------------------------------------- the server, seen from outside


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


# -------------------------------------------------------------------- the clients


@dataclass
class Soak:
    server: Server
    known: list[tuple[Ask, Any]]  # and its answer, alone
    until: float
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    findings: list[str] = field(default_factory=list)
    memory_mib: list[int] = field(default_factory=list)  # anonymous, at times of equal distance

    def find(self, what: str) -> None:
        self.counts["findings"] += 1
        if len(self.findings) < 20:
            self.findings.append(what[:2000])

    async def client(self, rng: random.Random) -> None:
        actions = (
            (self.ask, 50), (self.hang_up, 20), (self.break_off, 8), (self.be_wrong, 12), (self.run_out, 4), (self.look, 5),
            (self.talk_nonsense, 1),
        )  # fmt: skip
        while time.monotonic() < self.until:
            (action,) = rng.choices([one for one, _ in actions], [weight for _, weight in actions])
            self.counts[action.__name__] += 1
            try:
                await asyncio.wait_for(action(rng), PATIENCE)
            except (OSError, EOFError, asyncio.TimeoutError, ValueError, KeyError, IndexError) as error:
                self.find(f"{action.__name__}: {error!r}")

    async def ask(self, rng: random.Random) -> None:
        """One to three requests over one connection, read to the end, some of them slowly."""
        connection = await Connection.open(self.server.port)
        try:
            for _ in range(rng.choice((1, 1, 3))):
                ask, wanted = rng.choice(self.known)
                stream = ask.can_stream and rng.random() < 0.5
                slow = rng.random() < 0.1
                connection.send(
                    "POST", ask.path, json.dumps({**ask.body, "stream": True} if stream else ask.body).encode()
                )
                status, headers = await connection.head()
                data = await connection.body(headers, (lambda: asyncio.sleep(0.01)) if slow else None)
                if status in (429, 503) and "retry-after" in headers:
                    self.counts["told to come back"] += 1
                    await asyncio.sleep(0.1)
                elif status != 200:
                    self.find(f"{status} for {ask}: {data!r}")
                elif stream and streamed(ask.path, data) != texts(ask.path, wanted):
                    self.find(f"{ask}, streamed: {streamed(ask.path, data)}, alone {texts(ask.path, wanted)}")
                elif not stream and essence(json.loads(data)) != essence(wanted):
                    self.find(f"{ask}: {data!r}, alone {wanted}")
                else:
                    self.counts["equal answers"] += 1
        finally:
            connection.close()

    async def hang_up(self, rng: random.Random) -> None:
        """Somewhere in an answer, or before it."""
        connection = await Connection.open(self.server.port)
        ask, _ = rng.choice(self.known)
        fields = {"ignore_eos": True, "stream": ask.can_stream and rng.random() < 0.7}
        body = ask.body if ask.path == "/v1/embeddings" else {**ask.body, **fields}
        connection.send("POST", ask.path, json.dumps(body).encode())
        try:
            if rng.random() < 0.5:
                await asyncio.sleep(rng.choice((0, 0.001, 0.01, 0.05)))
            else:
                await connection.reader.read(rng.choice((1, 100, 3000)))
        finally:
            connection.close(hard=rng.random() < 0.5)

    async def break_off(self, rng: random.Random) -> None:
        """Somewhere in the request."""
        connection = await Connection.open(self.server.port)
        ask, _ = rng.choice(self.known)
        data = request_bytes("POST", ask.path, json.dumps(ask.body).encode())
        try:
            for part in (data[: rng.randrange(len(data))], data[rng.randrange(len(data)) : -1]):
                connection.writer.write(part if rng.random() < 0.3 else part[:20])
                await asyncio.sleep(rng.choice((0, 0.01)))
        finally:
            connection.close(hard=rng.random() < 0.5)

    async def be_wrong(self, rng: random.Random) -> None:
        method, path, body, right = rng.choice(WRONG)
        connection = await Connection.open(self.server.port)
        try:
            connection.send(method, path, body)
            status, headers = await connection.head()
            data = await connection.body(headers)
            if status not in right or (status != 200 and "message" not in json.loads(data)["error"]):
                self.find(f"{status} for {method} {path} {body[:100]!r}: {data!r}")
        finally:
            connection.close(hard=True)  # it may not have taken all of the body

    async def run_out(self, rng: random.Random) -> None:
        """Of time: what has come by then is a beginning of the answer."""
        ask, wanted = rng.choice([one for one in self.known if one[0].path == "/v1/completions"])
        connection = await Connection.open(self.server.port)
        try:
            connection.send(
                "POST", ask.path, json.dumps({**ask.body, "timeout": rng.choice((0.001, 0.02, 0.1))}).encode()
            )
            status, headers = await connection.head()
            data = await connection.body(headers)
            if status in (429, 503):
                return
            for (text, _, _), (whole, _, _) in zip(
                texts(ask.path, json.loads(data)), texts(ask.path, wanted), strict=True
            ):
                if not whole.startswith(text.rstrip("\ufffd")):
                    self.find(f"{ask} ran out of time with {text!r}, alone {whole!r}")
        finally:
            connection.close()

    async def look(self, rng: random.Random) -> None:
        connection = await Connection.open(self.server.port)
        try:
            path = rng.choice(LOOKS)
            connection.send("GET", path)
            status, headers = await connection.head()
            await connection.body(headers)
            if status != 200:
                self.find(f"{status} for {path}")
        finally:
            connection.close()

    async def talk_nonsense(self, rng: random.Random) -> None:
        connection = await Connection.open(self.server.port)
        try:
            connection.writer.write(rng.choice(GARBAGE))
            connection.writer.write_eof()
            answer = await connection.reader.read(1000)
            if answer and not answer.startswith(b"HTTP/1.1 4"):
                self.find(f"nonsense was answered {answer!r}")
        except ConnectionResetError:  # as good an answer
            pass
        finally:
            connection.close()


async def alone(port: int, todo: list[Ask]) -> list[tuple[Ask, Any]]:
    """The answer of each with nothing beside it."""
    known = []
    for ask in todo:
        connection = await Connection.open(port)
        connection.send("POST", ask.path, json.dumps(ask.body).encode())
        status, headers = await asyncio.wait_for(connection.head(), PATIENCE)
        answer = json.loads(await connection.body(headers))
        connection.close()
        if status != 200:
            raise SystemExit(f"{ask}: {status} {answer}")
        known.append((ask, answer))
    return known


async def quiet(server: Server, before: dict[str, int]) -> list[str]:
    """What is left when nobody asks for anything any more; [] if that is nothing."""
    deadline = time.monotonic() + PATIENCE
    while True:
        held = await is_idle(server.port)
        now = server.open_things()
        left = ([f"left: {held}"] if held else []) + [
            f"{now[name]} {name}, {n} before" for name, n in before.items() if now[name] > n + SPARE[name]
        ]
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.2)


async def soak(server: Server, seconds: float, n_clients: int, seed: int) -> Soak:
    rng = random.Random(seed)
    known = await alone(server.port, asks(rng))
    warm = Soak(
        server, known, time.monotonic() + min(5.0, seconds / 4)
    )  # pools, threads and caches are as large as they get
    await asyncio.gather(*(warm.client(random.Random(f"{seed} warm {i}")) for i in range(n_clients)))
    await quiet(server, {})
    before = server.open_things()
    run = Soak(server, known, time.monotonic() + seconds)
    run.counts, run.findings = warm.counts, warm.findings
    memory: list[int] = []

    async def watch() -> None:
        while True:
            memory.append(server.anonymous_bytes())
            await asyncio.sleep(seconds / 60)

    watching = asyncio.ensure_future(watch())
    await asyncio.gather(*(run.client(random.Random(f"{seed} {i}")) for i in range(n_clients)))
    watching.cancel()
    for what in await quiet(server, before):
        run.find(what)
    third = len(memory) // 3
    first, last = max(memory[: third + 1]), max(memory[-third - 1 :])
    run.memory_mib = [one >> 20 for one in memory[:: max(1, len(memory) // 12)]]
    if last > first * (1 + GROWTH_SHARE) + GROWTH_BYTES:
        run.find(f"memory grew from {first >> 20} to {last >> 20} MiB")
    again = await alone(server.port, [ask for ask, _ in known])
    run.findings += [
        f"{ask}: {now} in the end"
        for (ask, now), (_, was) in zip(again, known, strict=True)
        if essence(now) != essence(was)
    ]
    return run


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1 / 3)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, which is printed")
    parser.add_argument("--model", help="default: the one in the package")
    parser.add_argument("--kv-bytes", type=int, default=KV_BYTES, help="memory for keys and values; scarce by default")
    args = parser.parse_args()
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    options = ["--parallel", "8", "--max-kv-bytes", str(args.kv_bytes), "--max-queue-tokens", "4096"]
    server = Server([*options, *(["-m", args.model] if args.model else [])])
    try:
        run = asyncio.run(soak(server, 60 * args.minutes, args.clients, seed))
    finally:
        code = server.end()
    said = [line for line in server.said().splitlines() if not line.startswith("pyengine: ")]
    if code != 0 or said:
        run.find(f"the server ended with {code}; stderr: {said}")
    for finding in run.findings:
        print(f"finding: {finding}")
    print(json.dumps({"seed": seed, **run.counts, "memory_mib": run.memory_mib, "findings": len(run.findings)}))
    return 1 if run.findings else 0


if __name__ == "__main__":
    sys.exit(main())
