"""The same load on `pyengine serve`, llama-cpp-python's server and OpenVINO GenAI's continuous batching, one after the other.

    python tests/benchmarks/serving_peers.py --model smollm2.safetensors \\
        --llama-python VENV/bin/python --gguf smollm2.Q8_0.gguf \\
        --openvino-python VENV/bin/python --openvino smollm2_openvino_int8 \\
        --trace AzureLLMInferenceTrace_conv.csv

Each peer is run by a Python that has it; one that is not named is left out. The load is that of serving.py: without --trace,
clients that ask again as soon as they are answered. A table on stdout, in the form of docs/serving.md; the lines of JSON that it
is made of on stderr. An engine that is not done after --limit seconds is ended and named.

80 requests of Azure's trace, a quarter as often as they came, are 150 seconds of arrivals: all three take 8 to 12 minutes on two
cores. llama-cpp-python answers one request at a time and falls behind: its waiting is part of its numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OURS, LLAMA, OPENVINO = "pyengine", "llama-cpp-python", "OpenVINO GenAI"
START = 120.0  # seconds for a server's start


def load_options(args: argparse.Namespace) -> list[str]:
    """As serving.py and serving_openvino.py take them."""
    options = ["--n-ctx", str(args.n_ctx)]
    if args.trace is None:
        return [*options, "--clients", *map(str, args.clients), "--rounds", str(args.rounds)]
    return [*options, "--trace", str(args.trace), "--scale", str(args.scale), "--requests", str(args.requests)]


def lines_of(command: list[str], limit: float) -> list[dict[str, Any]]:
    """What it measures. Raises TimeoutError, RuntimeError; then, too, nothing that it started is left."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"not done after {limit:g} seconds") from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a server that it started is of its group
        process.wait()
    if process.returncode != 0:
        raise RuntimeError(f"ended with {process.returncode}: {err[-1000:]}")
    print(out, end="", file=sys.stderr, flush=True)
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


@contextmanager
def llama_server(python: str, gguf: str, n_ctx: int) -> Iterator[tuple[str, int]]:
    """llama-cpp-python's server on a free port: (its URL, its process)."""
    command = [python, "-m", "llama_cpp.server", "--model", gguf, "--model_alias", "model", "--n_ctx", str(n_ctx)]
    command += ["--interrupt_requests", "False", "--host", "127.0.0.1", "--port", "0"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            deadline, text = time.monotonic() + START, ""
            while (found := re.search(r"running on (http://127.0.0.1:\d+)", text)) is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not start: {text[-1000:]}")
                time.sleep(0.1)
                said.seek(0)
                text = said.read()
            yield f"{found[1]}/v1", process.pid
        finally:
            process.kill()
            process.wait()


def ours(args: argparse.Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, str(HERE / "serving.py"), "--model", args.model, *load_options(args)]
    return lines_of(command, args.limit)


def llama(args: argparse.Namespace) -> list[dict[str, Any]]:
    with llama_server(args.llama_python, args.gguf, args.n_ctx) as (url, pid):
        options = ["--url", url, "--pid", str(pid), *load_options(args)]
        return lines_of([sys.executable, str(HERE / "serving.py"), *options], args.limit)


def openvino(args: argparse.Namespace) -> list[dict[str, Any]]:
    command = [args.openvino_python, str(HERE / "serving_openvino.py"), args.openvino, *load_options(args)]
    return lines_of(command, args.limit)


def row(name: str, line: dict[str, Any]) -> str:
    load = f"{line['clients']} clients" if "clients" in line else f"{line['requests']} requests, {line['scale']:g}x"
    times = (
        " / ".join(f"{line[kind][p]:,.0f}" for p in ("p50", "p95", "p99")) for kind in ("first_token_ms", "gap_ms")
    )
    cells = [
        load,
        name,
        f"{line['tokens_per_second']:,.0f}",
        *times,
        str(line.get("cpus", "")),
        str(line.get("peak_mib", "")),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a frozen model, for `pyengine serve` as it is installed here")
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python[server]")
    parser.add_argument("--gguf", help="the model for it")
    parser.add_argument("--openvino-python", help="a Python with openvino-genai")
    parser.add_argument("--openvino", help="the model for it, a directory that optimum-cli has exported")
    parser.add_argument("--trace", type=Path, help="a CSV as Azure published them")
    parser.add_argument("--scale", type=float, default=0.25, help="arrivals so many times as often as in the trace")
    parser.add_argument("--requests", type=int, default=80, help="so many of the trace")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=4, help="requests of each client")
    parser.add_argument("--n-ctx", type=int, default=2048)
    parser.add_argument("--limit", type=float, default=300.0, metavar="S", help="seconds for each engine")
    args = parser.parse_args()
    wanted = [(OURS, ours, args.model), (LLAMA, llama, args.llama_python and args.gguf)]
    wanted.append((OPENVINO, openvino, args.openvino_python and args.openvino))
    if not any(given for _, _, given in wanted):
        parser.error("name an engine: --model, --llama-python with --gguf, --openvino-python with --openvino")
    rows, failed = [], []
    for name, measure, given in wanted:
        if not given:
            continue
        try:
            rows += [row(name, line) for line in measure(args)]
        except (OSError, RuntimeError) as error:  # TimeoutError is an OSError
            failed.append(f"{name}: {error}")
    times = "first token, ms, p50 / p95 / p99 | between writes, ms, p50 / p95 / p99"
    print(f"| load | server | tokens/s in all | {times} | CPUs | peak MiB |")
    print("|---|---|---:|---|---|---:|---:|")
    print("\n".join(sorted(rows, key=lambda one: one.split("|")[1])))
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
