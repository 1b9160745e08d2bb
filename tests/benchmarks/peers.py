"""pyengine, llama.cpp, ik_llama.cpp and OpenVINO GenAI on the same weights, in turn in one run; writes JSON and a table.

    python tests/benchmarks/peers.py --model smollm2.safetensors --gguf smollm2.Q8_0.gguf --openvino smollm2_openvino_int8

Every engine runs in a process of its own (peer_worker.py) and they take turns: A B C A B C ... Shared machines drift, so what
counts is the median of the ratios round by round, not the ratio of two medians. The limits of the machine (pyengine's probes)
take their turn too. The first round warms up and is dropped. Run it with nothing else running; the load average is in the
JSON. A peer that is not installed is named and left out; so is a case that this machine does not allow.

All sections: quality, decode, decode-4096, prefill, prefill-8192, batch, isa, quota, neighbour, start, rss; with --big-model also
decode-big and prefill-big. `quality` is no speed: KL(float32 || engine) of the next-token distributions over the same tokens, the
mean, with --float32 naming the weights' source for transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from peer_processes import (
    Neighbour,
    PeerMissingError,
    Worker,
    commit,
    cpu_quota,
    generate_command,
    machine,
    run_to_end,
)
from quality import default_text, kl_divergence

OURS, LLAMA_CPP, IK_LLAMA_CPP, OPENVINO = "pyengine", "llama.cpp", "ik_llama.cpp", "openvino"
PEERS = (LLAMA_CPP, IK_LLAMA_CPP, OPENVINO)
FLOAT32 = "float32"  # no peer: what quality is measured against
LLAMA_CPP_AVX2 = "llama.cpp AVX2-build"
TITLES = {
    OURS: "pyengine",
    LLAMA_CPP: "llama.cpp Q8_0",
    IK_LLAMA_CPP: "ik_llama.cpp Q8_0",
    OPENVINO: "OpenVINO GenAI int8",
}


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class Ratio:
    """`value` is a median of pairwise ratios; `target` reads like ">= 2.0", or is empty."""

    of: str
    value: float
    target: str

    def __str__(self) -> str:
        return f"{self.value:.2f} {self.of}" + (f" ({self.target})" if self.target else "")


@dataclass
class Row:
    """One kind of work: samples by who did it, one a round."""

    work: str
    unit: str
    samples: dict[str, list[float]]
    ratios: list[Ratio] = field(default_factory=list)

    def pairwise(self, a: str, b: str) -> float | None:
        """Median of a / b round by round; None if one of them was left out."""
        if a not in self.samples or b not in self.samples:
            return None
        return statistics.median(x / y for x, y in zip(self.samples[a], self.samples[b], strict=True))

    def compare(self, a: str, b: str, of: str, target: str) -> None:
        if (value := self.pairwise(a, b)) is not None:
            self.ratios.append(Ratio(of, value, target))

    def compare_with_peers(
        self, better: str | None, llama_cpp: str | None = None, openvino: str | None = None, *, lower: bool = False
    ) -> None:
        """Against the better peer, or against each by name, where a target (or "") is given."""
        present = [peer for peer in PEERS if peer in self.samples]
        if better is not None and present:
            best = (min if lower else max)(present, key=lambda peer: statistics.median(self.samples[peer]))
            self.compare(OURS, best, f"x {TITLES[best]}", better)
        for peer, target in ((LLAMA_CPP, llama_cpp), (OPENVINO, openvino)):
            if target is not None:
                self.compare(OURS, peer, f"x {TITLES[peer]}", target)


# ---------------------------------------------------------------- the run


@dataclass(frozen=True)
class Sizes:
    """How much each section does; the small ones only show that it runs."""

    decode: int = 64
    depth: int = 128
    deep: int = 4096
    prefill: int = 512
    long: int = 8192
    batches: tuple[int, ...] = (8, 32)
    rss_tokens: int = 128
    quality: int = 512
    disturbed: int = 16  # decode under a quota or beside a neighbour, where some peers all but stop

    @staticmethod
    def quick() -> Sizes:
        return Sizes(decode=3, depth=8, deep=300, prefill=64, long=300, batches=(2,), rss_tokens=4, quality=48, disturbed=3)


class Run:
    """Workers, which are started when a section first needs them, rows, and what was left out."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.sizes = Sizes.quick() if args.quick else Sizes()
        self.rows: list[Row] = []
        self.left_out: dict[str, str] = {}
        self.versions: dict[str, Any] = {}
        self.workers: dict[tuple[Any, ...], Worker] = {}
        self.stack = ExitStack()

    def models(self, big: bool) -> dict[str, Path | None]:
        a = self.args
        ours, gguf, openvino = (a.big_model, a.big_gguf, a.big_openvino) if big else (a.model, a.gguf, a.openvino)
        return {OURS: ours, LLAMA_CPP: gguf, IK_LLAMA_CPP: gguf, OPENVINO: openvino}

    def python(self, kind: str) -> str:
        a = self.args
        choices = {
            OURS: a.python,
            LLAMA_CPP: a.llama_python,
            IK_LLAMA_CPP: a.ik_llama_python,
            OPENVINO: a.openvino_python,
            FLOAT32: a.float32_python,
        }
        return os.path.abspath(choices[kind] or sys.executable)  # not resolved: a link is what makes a venv

    def leave_out(self, what: str, reason: object) -> None:
        if what not in self.left_out:
            print(f"left out: {what}: {reason}", file=sys.stderr)
        self.left_out[what] = re.sub(r"/\S*/", "", str(reason))  # results name no directories

    def start(
        self, kind: str, *, big: bool = False, isa: str = "", python: str = "", copy: int = 0, **options: Any
    ) -> Worker | None:
        """A worker that lives on and is shared by all sections that want the same one."""
        threads = options.pop("n_threads", self.args.threads)
        key = (kind, big, isa, python, copy, threads, *sorted((k, str(v)) for k, v in options.items()))
        label = " ".join(filter(None, (kind, "1.1B" if big else "", isa, *map(str, options))))
        model = self.args.float32 if kind == FLOAT32 else self.models(big)[kind]
        if key in self.workers:
            return self.workers[key]
        if model is None:
            self.leave_out(label, "no model was given")
            return None
        try:
            env = {"PYENGINE_ISA": isa} if isa else None
            worker = Worker(kind, python or self.python(kind), model, threads, env=env, **options)
        except (PeerMissingError, OSError) as error:
            self.leave_out(label, error)
            return None
        self.stack.callback(worker.close)
        self.workers[key] = worker
        self.versions[label] = worker.info
        return worker

    def finish_workers(self) -> None:
        """End them all: sections that look at memory and quotas want no strangers about."""
        self.stack.close()
        self.workers.clear()

    def everyone(self, big: bool = False) -> dict[str, Worker]:
        started = {kind: self.start(kind, big=big) for kind in (OURS, *PEERS)}
        return {kind: worker for kind, worker in started.items() if worker is not None}

    def alternate(
        self, work: str, turns: Mapping[str, Callable[[], float]], unit: str = "tok/s", repeats: int = 0
    ) -> Row:
        """Everybody in turn, `repeats` rounds (0: as asked for) after one to warm up. Who fails is left out from then on."""
        samples: dict[str, list[float]] = {name: [] for name in turns}
        repeats = repeats or self.args.repeats
        for round_ in range(repeats + 1):
            for name in list(samples):
                try:
                    value = turns[name]()
                except PeerMissingError as error:
                    self.leave_out(f"{name}: {work}", error)
                    del samples[name]
                    continue
                if round_ > 0:
                    samples[name].append(value)
            print(f"{work}: round {round_} of {repeats}", file=sys.stderr)
        row = Row(work, unit, samples)
        self.rows.append(row)
        return row


def turn(worker: Worker, do: str, **request: int) -> Callable[[], float]:
    return lambda: worker.measure({"do": do, **request})


# ---------------------------------------------------------------- sections


def quality(run: Run) -> None:
    """KL to float32 in nats: the mean over the first tokens of one English text."""
    ours, float32 = run.start(OURS), run.start(FLOAT32)
    if ours is None or float32 is None:
        return
    ids = ours.ask({"do": "tokenize", "text": default_text().read_text(encoding="utf-8"), "n": run.sizes.quality})
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        files = {}
        for kind, worker in {FLOAT32: float32, **run.everyone()}.items():
            try:
                worker.ask({"do": "logits", "ids": ids, "path": f"{directory}/{kind}.npy"})
            except PeerMissingError as error:
                run.leave_out(f"{kind}: quality", error)
                continue
            files[kind] = np.load(f"{directory}/{kind}.npy")
        if (reference := files.pop(FLOAT32, None)) is not None:
            samples = {kind: [float(kl_divergence(reference, logits).mean())] for kind, logits in files.items()}
    row = Row(f"KL to float32, {len(ids)} tokens", "nats", samples)
    row.compare_with_peers("", lower=True)
    run.rows.append(row)
    run.finish_workers()  # a float32 model is large


def decode(run: Run, big: bool = False) -> None:
    """One sequence, context below 256."""
    workers = run.everyone(big)
    request = {"n": run.sizes.decode, "depth": run.sizes.depth, "batch": 1}
    turns = {"limit": turn(workers[OURS], "read")} if OURS in workers else {}
    turns |= {kind: turn(worker, "decode", **request) for kind, worker in workers.items()}
    row = run.alternate("decode, 1.1B" if big else "decode", turns)
    row.compare(OURS, "limit", "of read bandwidth", ">= 0.92" if big else ">= 0.80")
    if big:
        row.compare_with_peers(None, llama_cpp=">= 1.7", openvino=">= 1.15")
    else:
        row.compare_with_peers(">= 2.0")


def decode_deep(run: Run) -> None:
    """One sequence with a long past, beside the same with a short one."""
    workers, sizes = run.everyone(), run.sizes
    turns: dict[str, Callable[[], float]] = {}
    if OURS in workers:  # alternating depths in one worker would fill the cache again each time
        shallow = run.start(OURS, copy=1)
        if shallow is not None:
            turns["shallow"] = turn(shallow, "decode", n=sizes.decode, depth=sizes.depth, batch=1)
    request = {"n": sizes.decode, "depth": sizes.deep, "batch": 1}
    turns |= {kind: turn(worker, "decode", **request) for kind, worker in workers.items()}
    row = run.alternate(f"decode at context {sizes.deep:,}", turns)
    row.compare(OURS, "shallow", f"of tok/s at context {sizes.depth}", ">= 0.60")
    row.compare_with_peers("")


def prefill(run: Run, big: bool = False) -> None:
    """512 tokens."""
    workers, n = run.everyone(big), run.sizes.prefill
    turns = {"limit": turn(workers[OURS], "int8")} if OURS in workers else {}
    turns |= {kind: turn(worker, "prefill", n=n) for kind, worker in workers.items()}
    row = run.alternate(f"prefill {n}, 1.1B" if big else f"prefill {n}", turns)
    row.compare(OURS, "limit", "of int8 peak", ">= 0.58" if big else ">= 0.48")
    row.compare_with_peers(None, llama_cpp=">= 6", openvino=">= 1.5" if big else ">= 2.0")


def prefill_long(run: Run) -> None:
    """8,192 tokens, beside 512."""
    workers, sizes = run.everyone(), run.sizes
    turns = {"short": turn(workers[OURS], "prefill", n=sizes.prefill)} if OURS in workers else {}
    turns |= {kind: turn(worker, "prefill", n=sizes.long) for kind, worker in workers.items()}
    row = run.alternate(f"prefill {sizes.long:,}", turns, repeats=(run.args.repeats + 1) // 2)  # some take minutes
    row.compare(OURS, "short", f"of tok/s at {sizes.prefill}", ">= 0.20")
    row.compare_with_peers("")


def batch(run: Run) -> None:
    """Several sequences side by side; tokens of all together."""
    workers = run.everyone()
    for n in run.sizes.batches:
        request = {"n": run.sizes.decode, "depth": 8, "batch": n}
        row = run.alternate(f"decode, batch {n}", {k: turn(w, "decode", **request) for k, w in workers.items()})
        row.compare_with_peers(">= 4.5" if n >= 32 else ">= 3.5")


def isa(run: Run) -> None:
    """pyengine forced to other kernel tables, llama.cpp as built and, where given, built for AVX2 alone."""
    best = run.start(OURS)
    if best is None:
        return
    tables = [name for name in ("avx2", "scalar") if name != best.info["isa"]]
    workers = {f"{OURS} {best.info['isa']}": best} | {f"{OURS} {name}": run.start(OURS, isa=name) for name in tables}
    native = workers[LLAMA_CPP] = run.start(LLAMA_CPP)
    if run.args.llama_avx2_python:
        workers[LLAMA_CPP_AVX2] = run.start(LLAMA_CPP, python=os.path.abspath(run.args.llama_avx2_python))
    elif native is not None and "AVX512 = 1" not in native.info["system_info"]:
        workers[LLAMA_CPP_AVX2] = workers.pop(LLAMA_CPP)  # it is one
    else:
        run.leave_out(LLAMA_CPP_AVX2, "no --llama-avx2-python")
    sizes = run.sizes
    full = {
        "decode": {"n": sizes.decode, "depth": sizes.depth, "batch": 1},
        "prefill": {"n": sizes.prefill},
    }
    # The scalar table is there to be right: it gets less to do.
    little = {"decode": {"n": 4, "depth": 8, "batch": 1}, "prefill": {"n": min(sizes.prefill, 64)}}
    fastest, avx2, scalar = f"{OURS} {best.info['isa']}", f"{OURS} avx2", f"{OURS} scalar"
    for do, target in (("decode", ">= 0.9"), ("prefill", ">= 0.2")):
        turns = {
            name: turn(worker, do, **(little if name == scalar else full)[do])
            for name, worker in workers.items()
            if worker is not None
        }
        row = run.alternate(f"{do} by instruction set", turns)
        if fastest != avx2:
            row.compare(avx2, fastest, f"AVX2 x {best.info['isa']}", target)
        row.compare(scalar, avx2, "scalar x AVX2", "")
        row.compare(avx2, LLAMA_CPP, "AVX2 x llama.cpp", "")
        row.compare(avx2, LLAMA_CPP_AVX2, f"AVX2 x {LLAMA_CPP_AVX2}", ">= 1.0")


def quota(run: Run) -> None:
    """All threads under a quota of one CPU, beside one pinned thread without a quota."""
    run.finish_workers()
    request = {"n": run.sizes.disturbed, "depth": run.sizes.depth, "batch": 1}
    one = min(os.sched_getaffinity(0))
    try:
        with cpu_quota(1.0) as group:
            workers = {
                "pinned": run.start(OURS, n_threads=1, cpus={one}),
                OURS: run.start(OURS, n_threads=None, cgroup=group),
                "pyengine, threads forced": run.start(OURS, cgroup=group),
                LLAMA_CPP: run.start(LLAMA_CPP, cgroup=group),
                OPENVINO: run.start(OPENVINO, cgroup=group),
            }
            turns = {k: turn(w, "decode", **request) for k, w in workers.items() if w is not None}
            row = run.alternate("decode, quota of 1 CPU", turns)
            run.finish_workers()
    except PeerMissingError as error:
        run.leave_out("quota", error)
        return
    row.compare(OURS, "pinned", "of one pinned thread", ">= 0.9")
    row.compare("pyengine, threads forced", "pinned", "threads forced, of one pinned thread", "")
    row.compare_with_peers("")


def neighbour(run: Run) -> None:
    """Another process that keeps one of the CPUs busy."""
    workers = run.everyone()
    request = {"n": run.sizes.disturbed, "depth": run.sizes.depth, "batch": 1}
    busy = Neighbour(max(os.sched_getaffinity(0)))

    def beside(worker: Worker) -> Callable[[], float]:
        def measure() -> float:
            busy.work()
            try:
                return worker.measure({"do": "decode", **request})
            finally:
                busy.rest()

        return measure

    turns: dict[str, Callable[[], float]] = {}
    for kind, worker in workers.items():
        turns |= {f"{kind} alone": turn(worker, "decode", **request), kind: beside(worker)}
    try:
        row = run.alternate("decode, busy neighbour on one CPU", turns)
    finally:
        busy.close()
    row.compare(OURS, f"{OURS} alone", "of undisturbed", ">= 0.45")
    for kind in PEERS:
        row.compare(kind, f"{kind} alone", f"{TITLES[kind]}, of undisturbed", "")
    row.compare_with_peers("")


def whole_processes(run: Run, n_tokens: int, work: str, unit: str, which: int) -> Row:
    """`which` of run_to_end's two numbers, of processes that generate n_tokens."""
    run.finish_workers()
    turns: dict[str, Callable[[], float]] = {}
    for kind, model in run.models(big=False).items():
        if model is None:
            run.leave_out(kind, "no model was given")
            continue
        command = generate_command(kind, run.python(kind), model.resolve(), n_tokens, run.args.threads)
        turns[kind] = lambda command=command: run_to_end(command)[which]
    return run.alternate(work, turns, unit)


def start(run: Run) -> None:
    """From the start of a process to its first output."""
    row = whole_processes(run, 4, "process start to first token", "ms", 0)
    row.compare_with_peers(None, llama_cpp="<= 0.75, stretch 0.50", openvino="")


def rss(run: Run) -> None:
    """Peak resident memory of a process that generates."""
    row = whole_processes(run, run.sizes.rss_tokens, f"peak RSS, {run.sizes.rss_tokens} tokens", "MiB", 1)
    if OURS in row.samples:
        above = statistics.median(row.samples[OURS]) - run.args.model.stat().st_size / 2**20
        row.ratios.append(Ratio("MiB above the file", above, "<= 95 MB, stretch 60 MB"))
    row.compare_with_peers("", lower=True)


SECTIONS: dict[str, Callable[[Run], None]] = {
    "quality": quality,
    "decode": decode,
    "decode-4096": decode_deep,
    "prefill": prefill,
    "prefill-8192": prefill_long,
    "batch": batch,
    "isa": isa,
    "neighbour": neighbour,
    "quota": quota,
    "start": start,
    "rss": rss,
    "decode-big": lambda run: decode(run, big=True),
    "prefill-big": lambda run: prefill(run, big=True),
}

# ---------------------------------------------------------------- output


def cell(row: Row, kind: str) -> str:
    """The engine's median; where it took part in several forms ("pyengine avx2"), each with its name."""
    if row.samples.get(kind):
        return number(statistics.median(row.samples[kind]))
    forms = {name.removeprefix(kind).strip(): values for name, values in row.samples.items() if name.startswith(kind)}
    return ", ".join(f"{name} {number(statistics.median(values))}" for name, values in forms.items())


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def table(rows: Sequence[Row]) -> str:
    """Markdown: medians, and the ratios with their targets."""
    lines = [f"| work | {' | '.join(TITLES.values())} | ratios (target) |", f"| --- |{' ---: |' * len(TITLES)} --- |"]
    for row in rows:
        cells = [cell(row, kind) for kind in TITLES]
        lines.append(f"| {row.work}, {row.unit} | {' | '.join(cells)} | {'; '.join(map(str, row.ratios))} |")
    return "\n".join(lines)


def document(run: Run, before: Mapping[str, Any]) -> dict[str, Any]:
    args = run.args
    files = {"model": args.model, "gguf": args.gguf, "openvino": args.openvino, "big_model": args.big_model,
             "big_gguf": args.big_gguf, "big_openvino": args.big_openvino}  # fmt: skip
    return {
        "commit": commit(),
        "machine": {**before, "load_average_after": os.getloadavg()},
        "threads": args.threads,
        "repeats": args.repeats,
        "quick": args.quick,
        "files": {name: path.name for name, path in files.items() if path is not None},
        "engines": run.versions,
        "left_out": run.left_out,
        "rows": [asdict(row) for row in run.rows],
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="frozen file")
    add("--gguf", type=Path, help="the same model as Q8_0 GGUF, for llama.cpp")
    add("--openvino", type=Path, help="directory of the same model, exported with --weight-format int8")
    add("--big-model", type=Path, help="frozen file of a 1.1B Llama shape (make_big_gguf.py, then pyengine freeze)")
    add("--big-gguf", type=Path)
    add("--big-openvino", type=Path)
    add("--python", help="interpreter that has pyengine (this one)")
    add("--llama-python", help="interpreter that has llama_cpp (this one)")
    add("--float32", type=Path, help="what the frozen file was made from, for transformers: the section quality")
    add("--float32-python", help="interpreter that has torch and transformers (this one)")
    add("--ik-llama-python", help="interpreter that has ik_llama_cpp (this one)")
    add("--openvino-python", help="interpreter that has openvino_genai (this one)")
    add("--llama-avx2-python", help="interpreter whose llama_cpp was built for AVX2 without AVX-512")
    add("--threads", type=int, default=2)
    add("--repeats", type=int, default=5, help="rounds after the one that warms up (5)")
    add("--only", help=f"sections, separated by commas: {', '.join(SECTIONS)}")
    add("--quick", action="store_true", help="tiny sizes: does everything run?")
    add("--output", type=Path, help="JSON file (default: results/<CPU>.json beside this script; none with --quick)")
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else [n for n in SECTIONS if args.big_model or not n.endswith("-big")]
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    args.sections = chosen
    return args


def main() -> int:
    args = arguments()
    before = machine()
    if before["load_average"][0] > 0.3:
        print(f"this machine is busy (load {before['load_average'][0]:.2f}): ratios will be noisy", file=sys.stderr)
    run = Run(args)
    try:
        for name in args.sections:
            SECTIONS[name](run)
    finally:
        run.finish_workers()
    result = document(run, before)
    slug = re.sub(r"[^a-z0-9]+", "-", f"{before['cpu']} {before['family']} {before['model']}".lower()).strip("-")
    output = args.output or (None if args.quick else Path(__file__).parent / "results" / f"{slug}.json")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(run.rows))
    for what, reason in run.left_out.items():
        print(f"\nleft out: {what}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
