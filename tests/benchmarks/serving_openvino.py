"""The load of serving.py on OpenVINO GenAI's continuous batching, in its own process.

    python tests/benchmarks/serving_openvino.py MODEL_DIR --clients 8 32
    python tests/benchmarks/serving_openvino.py MODEL_DIR --trace AzureLLMInferenceTrace_conv.csv --scale 0.1 --requests 100

Run by a Python that has openvino_genai. Prompts, shapes, trace and numbers are those of serving.py. There is no server here:
requests are given to the pipeline and tokens taken from it by one loop in the same thread, so what HTTP and JSON cost the
others, this one does not pay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openvino_genai
from serving import WORDS, Request, Timing, prompt, read_trace, summary


def pipeline(args: argparse.Namespace) -> Any:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs = args.cache_gb, args.max_num_seqs
    scheduler.max_num_batched_tokens = args.batched_tokens
    scheduler.enable_prefix_caching = True
    options = {"INFERENCE_NUM_THREADS": args.threads} if args.threads else {}
    return openvino_genai.ContinuousBatchingPipeline(args.model, scheduler, "CPU", options)


class Load:
    """A pipeline, and what became of the requests given to it."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.timings: list[Timing] = []
        self._running: dict[int, tuple[Any, float, list[float], int]] = {}  # handle, begin, times of writes, client
        self._number = 0

    def add(self, text: str, n_tokens: int, client: int = 0) -> None:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = n_tokens
        config.ignore_eos, config.do_sample = True, False
        begun = time.perf_counter()
        self._number += 1
        handle = self.pipe.add_request(self._number, text, config)
        self._running[self._number] = (handle, begun, [], client)

    def step(self) -> Iterator[int]:
        """One step of the batch; gives the clients whose answers are complete."""
        self.pipe.step()
        now = time.perf_counter()
        for number, (handle, begun, times, client) in list(self._running.items()):
            while handle.can_read():
                for output in handle.read().values():
                    times += [now] * len(output.generated_ids)
            if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                del self._running[number]
                writes = sorted(set(times))
                gaps = [after - before for before, after in itertools.pairwise(writes)]
                self.timings.append(Timing(writes[0] - begun, gaps, len(times)))
                yield client

    @property
    def is_idle(self) -> bool:
        return not self._running


def closed_loop(pipe: Any, n_clients: int, n_each: int, shape: tuple[int, int]) -> list[Timing]:
    load, left = Load(pipe), [n_each - 1] * n_clients
    rngs = [random.Random(number) for number in range(n_clients)]
    for client, rng in enumerate(rngs):
        load.add(prompt(rng, shape[0]), shape[1], client)
    while not load.is_idle:
        for client in list(load.step()):
            if left[client]:
                left[client] -= 1
                load.add(prompt(rngs[client], shape[0]), shape[1], client)
    return load.timings


def from_trace(pipe: Any, requests: list[Request]) -> list[Timing]:
    load, rng = Load(pipe), random.Random(0)
    n_words = 8 * len(WORDS)
    word = pipe.get_tokenizer().encode(prompt(random.Random(1), n_words)).input_ids.shape[1] / n_words
    texts = [prompt(rng, round(request.prompt_tokens / word)) for request in requests]
    begun, n_added = time.perf_counter(), 0
    while n_added < len(requests) or not load.is_idle:
        now = time.perf_counter() - begun
        while n_added < len(requests) and requests[n_added].at <= now:
            load.add(texts[n_added], requests[n_added].output_tokens)
            n_added += 1
        if load.is_idle:
            time.sleep(max(0.0, requests[n_added].at - now))
        else:
            list(load.step())
    return load.timings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory that optimum-cli has exported")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=4, help="requests of each client")
    parser.add_argument("--shape", type=int, nargs=2, default=[64, 64], metavar=("PROMPT", "OUTPUT"), help="tokens")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="arrivals so many times as often as in the trace")
    parser.add_argument("--requests", type=int, default=100, help="so many of the trace")
    parser.add_argument("--n-ctx", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="0: as OpenVINO likes")
    parser.add_argument("--cache-gb", type=int, default=2)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--batched-tokens", type=int, default=2048, help="tokens of a step, prompts included")
    args = parser.parse_args()
    pipe = pipeline(args)
    closed_loop(pipe, 1, 1, (8, 4))  # it compiles
    for n in args.clients if args.trace is None else [0]:
        begun, cpu = time.perf_counter(), time.process_time()
        if args.trace is None:
            line: dict[str, Any] = {"clients": n, "prompt": args.shape[0], "output": args.shape[1]}
            timings = closed_loop(pipe, n, args.rounds, tuple(args.shape))
        else:
            line = {"trace": args.trace.name, "scale": args.scale}
            timings = from_trace(pipe, read_trace(args.trace, args.scale, args.requests, args.n_ctx))
        seconds = time.perf_counter() - begun
        line |= summary(timings, seconds)
        line |= {
            "server": f"openvino_genai {openvino_genai.__version__}, in process",
            "cpus": round((time.process_time() - cpu) / seconds, 2),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
