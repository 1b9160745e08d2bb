"""Load on an OpenAI-compatible server: closed-loop clients, or arrivals from a trace.

    python tests/benchmarks/serving.py --model smollm2.safetensors --clients 8 32
    python tests/benchmarks/serving.py --url http://localhost:8000/v1 --name NAME --clients 8
    python tests/benchmarks/serving.py --model smollm2.safetensors --trace AzureLLMInferenceTrace_conv.csv --scale 0.1

With --model it starts `pyengine serve`, and compares its tokens a second with those of the engine alone on a batch of the same
requests. With --url it drives any server that is running (llama_cpp.server, OpenVINO's, vLLM's). Prompts are random words of
about the wanted number of tokens; answers have exactly the wanted number where the server knows `ignore_eos`, and what
came is counted. llama_cpp.server needs `--interrupt_requests False`, or each request ends the one before it.

A line of JSON for every load: tokens a second, and p50, p95 and p99 in milliseconds of the time to the first token and of the
gaps between writes; with --model or --pid also CPU seconds of the server a second, and its peak memory. The trace is a CSV with
the columns TIMESTAMP, ContextTokens, GeneratedTokens, as Azure published them.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

WORDS = "time year people way day man thing woman life child world school state family student group country".split()  # noqa: SIM905


class Request(NamedTuple):
    at: float  # seconds after the begin
    prompt_tokens: int
    output_tokens: int


class Timing(NamedTuple):
    """Seconds: to the first token, and between the later ones; and how many tokens."""

    first: float
    gaps: list[float]
    n_tokens: int


def prompt(rng: random.Random, n_tokens: int) -> str:
    """Words of about one token each; the first ones differ, so that no prompt begins as another."""
    return " ".join(rng.choice(WORDS) for _ in range(max(1, n_tokens)))


async def complete(url: str, fields: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request for a completion, sent over a connection of its own."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    body = json.dumps(fields).encode()
    head = f"POST {parts.path}/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    return reader, writer


async def tokens_a_word(url: str, name: str) -> float:
    """How many tokens a word of `prompt` is for this model."""
    n_words = 8 * len(WORDS)
    text = prompt(random.Random(1), n_words)
    reader, writer = await complete(url, {"model": name, "prompt": text, "max_tokens": 1})
    answer = await reader.read()
    writer.close()
    match = re.search(rb'"prompt_tokens": ?(\d+)', answer)
    if match is None:
        raise SystemExit(f"the server does not say how many tokens a prompt has: {answer[-500:].decode()}")
    return int(match[1]) / n_words


async def stream(url: str, name: str, text: str, n_tokens: int) -> Timing:
    """One streamed completion. Raises RuntimeError for anything but status 200."""
    fields = {
        "model": name,
        "prompt": text,
        "max_tokens": n_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0,
    }
    begun = last = time.perf_counter()
    reader, writer = await complete(url, fields)
    try:
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status.decode().strip()}: {(await reader.read())[-500:].decode()}")
        first, gaps, reported = 0.0, [], 0
        while line := await reader.readline():
            if usage := re.search(rb'"completion_tokens": ?(\d+)', line):
                reported = int(usage[1])
            if not line.startswith(b"data: {") or not re.search(rb'"text": ?"[^"]', line):
                continue
            now = time.perf_counter()
            if first:
                gaps.append(now - last)
            else:
                first = now - begun
            last = now
        # What came, not what was asked for: a server may end an answer early. Without a count each write is a token at least.
        return Timing(first, gaps, reported or len(gaps) + 1)
    finally:
        writer.close()


async def closed_loop(url: str, name: str, n_clients: int, n_each: int, shape: tuple[int, int]) -> list[Timing]:
    """Each client asks again as soon as it has its answer."""

    async def client(number: int) -> list[Timing]:
        rng = random.Random(number)
        return [await stream(url, name, prompt(rng, shape[0]), shape[1]) for _ in range(n_each)]

    return [timing for timings in await asyncio.gather(*map(client, range(n_clients))) for timing in timings]


async def from_trace(url: str, name: str, requests: Sequence[Request]) -> list[Timing]:
    """Each request at its time, whatever has become of those before it."""
    rng, word = random.Random(0), await tokens_a_word(url, name)

    async def one(request: Request) -> Timing:
        await asyncio.sleep(request.at)
        return await stream(url, name, prompt(rng, round(request.prompt_tokens / word)), request.output_tokens)

    return list(await asyncio.gather(*map(one, requests)))


def read_trace(path: Path, scale: float, n_requests: int, n_ctx: int) -> list[Request]:
    """The first requests of a trace, `scale` times as often, and none longer than the context: prompts, whose words are not all
    of the same number of tokens, stay a tenth below what is left of it."""
    requests: list[Request] = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() / scale
            n_output = max(2, min(int(row["GeneratedTokens"]), n_ctx // 2))
            n_prompt = max(1, min(int(row["ContextTokens"]), (n_ctx - n_output) * 9 // 10))
            requests.append(Request(at, n_prompt, n_output))
            if len(requests) == n_requests:
                break
    return [request._replace(at=request.at - requests[0].at) for request in requests]


def summary(timings: Sequence[Timing], seconds: float) -> dict[str, Any]:
    def percentiles(values: list[float]) -> dict[str, float]:
        ordered = sorted(values) or [0.0]
        return {f"p{p}": round(1e3 * ordered[min(len(ordered) - 1, p * len(ordered) // 100)], 2) for p in (50, 95, 99)}

    return {
        "requests": len(timings),
        "tokens_per_second": round(sum(timing.n_tokens for timing in timings) / seconds, 1),
        "first_token_ms": percentiles([timing.first for timing in timings]),
        "gap_ms": percentiles([gap for timing in timings for gap in timing.gaps]),
    }


# -------------------------------------------------------------------- our server


@contextmanager
def our_server(model: str) -> Iterator[tuple[str, int]]:
    """`pyengine serve` on a free port: (its URL, its process)."""
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-m", "pyengine", "serve"]
    process = subprocess.Popen(
        [*command, "-m", f"model={model}", "--port", "0", "--log-format", "none"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if " at http://" in line:
                yield line.split("the API at ")[1].split(")")[0], process.pid
                return
        raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.wait()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mib(pid: int) -> int:
    match = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) // 1024


def batch_speed(model: str, n: int, shape: tuple[int, int]) -> float:
    """Tokens a second of the engine alone on n such requests at once."""
    from pyengine import Engine

    with Engine(model) as engine:
        prompts = [prompt(random.Random(i), shape[0]) for i in range(n)]
        engine.generate(prompts[0], max_tokens=4)
        begun = time.perf_counter()
        engine.generate(prompts, max_tokens=shape[1], ignore_eos=True, temperature=0)
        return n * shape[1] / (time.perf_counter() - begun)


def measure(url: str, args: argparse.Namespace, pid: int | None) -> None:
    for n in args.clients if args.trace is None else [0]:
        cpu = cpu_seconds(pid) if pid is not None else 0.0
        begun = time.perf_counter()
        if args.trace is None:
            line: dict[str, Any] = {"clients": n, "prompt": args.shape[0], "output": args.shape[1]}
            timings = asyncio.run(closed_loop(url, args.name, n, args.rounds, tuple(args.shape)))
        else:
            line = {"trace": args.trace.name, "scale": args.scale}
            trace = read_trace(args.trace, args.scale, args.requests, args.n_ctx)
            timings = asyncio.run(from_trace(url, args.name, trace))
        seconds = time.perf_counter() - begun
        line |= summary(timings, seconds)
        if pid is not None:
            line |= {"cpus": round((cpu_seconds(pid) - cpu) / seconds, 2), "peak_mib": peak_mib(pid)}
        if args.model is not None and n:
            alone = batch_speed(args.model, n, tuple(args.shape))
            line |= {"engine_alone": round(alone, 1), "of_engine": round(line["tokens_per_second"] / alone, 3)}
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="start `pyengine serve` with this model")
    parser.add_argument("--url", help="drive this server; ends with /v1")
    parser.add_argument("--name", default="model", help="the model's name there")
    parser.add_argument("--pid", type=int, help="its process, if its CPU seconds and memory are to be measured")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=4, help="requests of each client")
    parser.add_argument("--shape", type=int, nargs=2, default=[64, 64], metavar=("PROMPT", "OUTPUT"), help="tokens")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="arrivals so many times as often as in the trace")
    parser.add_argument("--requests", type=int, default=100, help="so many of the trace")
    parser.add_argument("--n-ctx", type=int, default=4096)
    args = parser.parse_args()
    if (args.model is None) == (args.url is None):
        parser.error("give one of --model and --url")
    if args.model is None:
        measure(args.url, args, args.pid)
    else:
        with our_server(args.model) as (url, pid):
            measure(url, args, pid)


if __name__ == "__main__":
    main()
