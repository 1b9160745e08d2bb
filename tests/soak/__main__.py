"""Load with faults on a real server, for minutes or hours:

    python -m tests.soak                              20 seconds, the model in the package
    python -m tests.soak --minutes 10 --clients 32    as long as you like
    python -m tests.soak --model smollm2.safetensors --seed 7

Clients ask for whole and streamed answers of every endpoint, hang up anywhere (in a header, a body, an answer, by FIN or RST),
read slowly, run out of time, and send what is no request at all. At the end it is checked that

    every finished answer was that of the request alone, before the load; one that ran out of time was a beginning of it
    a response that was kept came back as it was, to its owner alone, and what went on from it was that of the whole conversation
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
import secrets
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from soak.asks import GARBAGE, LOOKS, WRONG, Ask, asks
from soak.client import Connection, essence, request_bytes, streamed, texts
from soak.observed import PATIENCE, Server, is_idle

GROWTH_BYTES, GROWTH_SHARE = 8 << 20, 0.05  # of anonymous memory after the first third
# More of them than before the load are right: asyncio.to_thread starts so many threads, which stay.
SPARE = {"descriptors": 0, "threads": min(32, (os.cpu_count() or 1) + 4)}
KV_BYTES = 4 << 20  # so few that requests wait for pages, and give them up

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
            (self.go_on, 5), (self.talk_nonsense, 1),
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

    async def go_on(self, rng: random.Random) -> None:
        """From a response that is kept, unless it has made room: as from the whole conversation. Read it, or delete it."""
        ask, wanted = rng.choice(
            [one for one in self.known if one[0].path == "/v1/responses" and "tools" not in one[0].body]
        )
        salt = ask.body.get("cache_salt")
        first = await self.json_of("POST", ask.path, ask.body)
        if first is None:
            return
        path = f"{ask.path}/{first['id']}" + ("" if salt is None else f"?cache_salt={salt}")
        stranger = await self.json_of("GET", f"{ask.path}/{first['id']}?cache_salt=nobody", right=(404,))
        kept = await self.json_of("GET", path, right=(200, 404))
        if essence(first) != essence(wanted) or stranger is not None or (kept is not None and kept != first):
            self.find(f"{ask}: {first}, kept as {kept}, alone {wanted}")
        more = {**ask.body, "max_output_tokens": 5}
        turn = {**more, "input": "So.", "previous_response_id": first["id"]}
        whole = {
            **more,
            "input": [
                {"role": "user", "content": ask.body["input"]},
                *first["output"],
                {"role": "user", "content": "So."},
            ],
        }
        answers = [
            await self.json_of("POST", ask.path, body, right=(200, 400)) for body in (turn, {**whole, "store": False})
        ]
        outputs = [essence(answer["output"]) for answer in answers if answer is not None]
        if len(outputs) == 2 and outputs[0] != outputs[1]:
            self.find(f"{turn}: {answers[0]}, of the whole conversation {answers[1]}")
        if rng.random() < 0.5:
            await self.json_of("DELETE", path, right=(200, 404))
        self.counts["gone on from"] += len(outputs) == 2

    async def json_of(
        self, method: str, path: str, body: Any = None, right: tuple[int, ...] = (200,)
    ) -> dict[str, Any] | None:
        """Of an answer of status 200; None if it has another one that is right, or says to come back."""
        connection = await Connection.open(self.server.port)
        try:
            connection.send(method, path, b"" if body is None else json.dumps(body).encode())
            status, headers = await connection.head()
            data = await connection.body(headers)
        finally:
            connection.close()
        if status not in (*right, 429, 503):
            self.find(f"{status} for {method} {path} {body}: {data!r}")
        answer: dict[str, Any] | None = json.loads(data) if status == 200 else None
        return answer

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
    if args.clients < 1:
        parser.error(f"--clients is {args.clients}, expected at least 1")
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    options = ["--parallel", "8", "--max-kv-bytes", str(args.kv_bytes), "--max-queue-tokens", "4096"]
    options += ["--max-stored-responses", "50", "--max-stored-bytes", "100000"]  # so few that they make room
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
