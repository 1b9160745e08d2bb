"""`pyengine bench`: tokens per second, as llama-bench lays them out, and what starting costs."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine.cli import UsageError, options
from pyengine.cli.progress import ProgressLine
from pyengine.cli.roofline import Bound, Roofline, Work
from pyengine.cli.terminal import say
from pyengine.errors import ContextFullError, PyEngineError

if TYPE_CHECKING:
    from pyengine import _core
    from pyengine.engine import Engine

EPILOG = f"""\
examples:
  pyengine bench -m model.safetensors -p 512 -n 128 -d 0,4096 -t 1,2
  pyengine bench -m model.safetensors -p 0 -n 64 -b 1,8,32 -r 3 --json
  pyengine bench -m model.safetensors -p 0 -n 64 -d 0,1024,4096 -b 1,8 --plot speed.png
  pyengine bench -m model.safetensors -p 0 -n 128 -f report.txt

With -f FILE a text is gone on with, greedily, without guesses and with them (docs/speculation.md), those of the model's draft
head among them if its file has one, and how many came true.

ppN is N prompt tokens in one forward, tgN is N tokens one after the other, xB with B sequences side by side (t/s of all
together), @ dD after D tokens. Every test runs once unmeasured before its -r times. "of limit" is the share of what this machine
allows: "read", when reading the weights once a forward is what takes longest, or "int8", when multiplying them is; each is
measured right before each run, and the share is the median over the runs. Attention counts for neither. "first token" is from
the start of a process of `pyengine generate` to its first output.

{options.ENVIRONMENT}"""

STRIDE = 7919  # a prime: tokens that walk all over the vocabulary
FIRST_TOKEN_PROMPT = "The capital of France is"


def parser() -> argparse.ArgumentParser:
    parser = options.Parser("bench", EPILOG)
    add = parser.add_argument
    add(
        "-p", "--n-prompt", type=options.count_list, default=[512], metavar="N,…", help="prompt lengths (512); 0 = none"
    )
    add(
        "-n",
        "--n-gen",
        type=options.count_list,
        default=[128],
        metavar="N,…",
        help="tokens to generate (128); 0 = none",
    )
    add(
        "-d",
        "--n-depth",
        type=options.count_list,
        default=[0],
        metavar="N,…",
        help="tokens in the cache beforehand (0)",
    )
    add(
        "-b",
        "--batch",
        type=options.count_list,
        default=[1],
        metavar="N,…",
        help="sequences that generate side by side (1)",
    )
    add("-f", "--file", metavar="FILE", help="also go on with this text, without guesses and with them")
    add("-t", "--threads", type=options.count_list, metavar="N,…", help="threads; default: what the container allows")
    add("-r", "--repetitions", type=options.positive, default=5, metavar="N", help="times that each test runs (5)")
    add("--no-limits", dest="limits", action="store_false", help="do not measure what the machine allows")
    add("--json", action="store_true", help="one JSON object, with every sample")
    add("--plot", metavar="PNG", help="also draw tokens/s against context and batch (needs matplotlib)")
    group = parser.add_argument_group("model")
    options.add_model_option(group)
    options.add_isa_option(group)
    return parser


@dataclass(frozen=True)
class Test:
    """n_prompt tokens in one forward, or n_gen of them one by one in each of `batch` sequences, after `depth` tokens."""

    n_prompt: int
    n_gen: int
    depth: int
    batch: int

    @property
    def label(self) -> str:
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return name + (f" x{self.batch}" if self.batch > 1 else "") + (f" @ d{self.depth}" if self.depth else "")

    @property
    def n_tokens(self) -> int:
        return (self.n_prompt or self.n_gen) * self.batch

    @property
    def work(self) -> Work:
        """One of its forwards."""
        return Work(self.n_prompt, 1) if self.n_prompt else Work(self.batch, self.batch)

    def run(self, engine: Engine) -> float:
        """Seconds of the measured part. Logits are computed as generation needs them: of the last row of each sequence."""
        return engine.exclusively(lambda context: self._run(engine, context))

    def _run(self, engine: Engine, context: _core.Context) -> float:
        sequences = [context.sequence_new() for _ in range(self.batch)]
        for sequence in sequences[: self.batch if self.depth else 0]:
            context.forward(_tokens(engine, self.depth), [sequence] * self.depth, bytes(self.depth - 1) + b"\1")
        return self._run_prompt(engine, sequences[0]) if self.n_prompt else self._run_generation(engine, sequences)

    def _run_prompt(self, engine: Engine, sequence: _core.Sequence) -> float:
        tokens, which, want = (
            _tokens(engine, self.n_prompt),
            [sequence] * self.n_prompt,
            bytes(self.n_prompt - 1) + b"\1",
        )
        started = time.perf_counter()
        engine.context.forward(tokens, which, want)
        return time.perf_counter() - started

    def _run_generation(self, engine: Engine, sequences: list[_core.Sequence]) -> float:
        tokens, want = _tokens(engine, self.n_gen), b"\1" * self.batch
        started = time.perf_counter()
        for token in tokens:
            engine.context.forward([token] * self.batch, sequences, want)
        return time.perf_counter() - started


class TextTest:
    """n_gen tokens that go on with a text, one a step or, with `guesses`, as many as are guessed right."""

    batch = 1

    def __init__(self, prompt: list[int], n_gen: int, guesses: bool) -> None:
        self._prompt, self._n_gen, self._guesses = prompt, n_gen, guesses
        self.drafted = self.accepted = 0  # in all runs
        self.label = f"tg{n_gen} of a text" + (", guesses" if guesses else "")
        self.depth = len(prompt)
        self.n_tokens = n_gen
        self.work = Work(1, 1)

    def run(self, engine: Engine) -> float:
        """Seconds of all tokens, behind a prompt that was computed before: the first step, too, may yield several."""
        guesses: Any = {"store": False} if self._guesses else "off"  # earlier runs have said the same
        engine.generate(self._prompt, max_tokens=1, temperature=0, ignore_eos=True, speculative="off")
        result = engine.generate(
            self._prompt, max_tokens=self._n_gen, temperature=0, ignore_eos=True, speculative=guesses
        )
        timings = result.timings
        self.drafted += timings.drafted_tokens
        self.accepted += timings.accepted_tokens
        return timings.total


def text_tests(args: argparse.Namespace, engine: Engine) -> list[TextTest]:
    """Those of --file, without guesses and with them, for each of -n. Raises ContextFullError if the text does not fit."""
    if args.file is None:
        return []
    ids = engine.prompt_ids(options.prompt_text(args.file))
    chosen = [TextTest(ids, n, guesses) for n in args.n_gen if n > 1 for guesses in (False, True)]
    if not chosen:
        raise UsageError("-f: nothing to measure, -n is below 2")
    if len(ids) + max(args.n_gen) > engine.n_ctx:
        needed = len(ids) + max(args.n_gen)
        what = f"{args.file} and {max(args.n_gen)} tokens"
        raise ContextFullError(f"{what} need a context of {needed}, the model's holds {engine.n_ctx}")
    return chosen


def _tokens(engine: Engine, n: int) -> list[int]:
    return [(1 + STRIDE * i) % engine.vocab_size for i in range(n)]


def tests(args: argparse.Namespace, n_ctx: int) -> list[Test]:
    """Every test that was asked for. Raises ContextFullError if one does not fit."""
    chosen = [Test(n, 0, depth, 1) for depth in args.n_depth for n in args.n_prompt if n]
    chosen += [
        Test(0, n, depth, batch) for depth in args.n_depth for n in args.n_gen if n for batch in args.batch if batch
    ]
    if not chosen and args.file is None:
        raise UsageError("nothing to measure: -p and -n are both 0")
    for test in chosen:
        if (needed := test.depth + (test.n_prompt or test.n_gen)) > n_ctx:
            raise ContextFullError(f"{test.label} needs a context of {needed}, the model's holds {n_ctx}")
    return chosen


@dataclass(frozen=True)
class Row:
    """One line of the table. samples: tokens per second, one a repetition; bounds: what the machine allowed right before each."""

    model: str
    size_bytes: int
    params: int
    threads: int
    isa: str
    test: str
    depth: int
    batch: int
    samples: list[float]
    bounds: list[Bound]
    drafted: int = 0  # tokens that were guessed ahead, in all runs,
    accepted: int = 0  # and how many came true

    @property
    def of_limit(self) -> float | None:
        """Median of the shares, run by run."""
        pairs = zip(self.samples, self.bounds, strict=True) if self.bounds else ()
        shares = [sample / bound.tokens_per_second for sample, bound in pairs]
        return statistics.median(shares) if shares else None

    def to_dict(self) -> dict[str, Any]:
        values = self.samples
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        row = {**asdict(self), "mean": statistics.fmean(values), "sd": deviation, "median": statistics.median(values)}
        row["bounds"] = [bound.tokens_per_second for bound in self.bounds]
        return {**row, "limit": self.bounds[0].limit if self.bounds else None, "of_limit": self.of_limit}


def measure(
    path: Path, args: argparse.Namespace, n_threads: int | None, show: Callable[[str], None]
) -> Iterator[tuple[Row, float]]:
    """(row of a test, ms that loading took) for one number of threads."""
    from pyengine.engine import Engine
    from pyengine.format.inventory import count_parameters

    started = time.perf_counter()
    with Engine(path, n_threads=n_threads) as engine:
        load_ms = (time.perf_counter() - started) * 1e3
        size, parameters = engine.memory()["weights"], count_parameters(engine._file.config)
        name = engine.metadata.get("name") or path.stem
        facts = name, size, parameters, engine.n_threads, engine.isa
        with closing(Roofline(engine)) as roofline:
            every: list[Test | TextTest] = [*tests(args, engine.n_ctx), *text_tests(args, engine)]
            for test in every:
                limit = roofline.nearest(test.work) if args.limits else None
                samples, bounds = [], []
                for repetition in range(args.repetitions + 1):
                    show(f"bench {test.label}, {engine.n_threads} threads: {repetition or 'warm-up'}")
                    if limit:
                        bounds.append(roofline.bound(test.work, limit))
                    samples.append(test.n_tokens / max(test.run(engine), 1e-9))
                guesses = (test.drafted, test.accepted) if isinstance(test, TextTest) else (0, 0)
                yield Row(*facts, test.label, test.depth, test.batch, samples[1:], bounds[1:], *guesses), load_ms


def first_token_ms(path: Path, n_threads: int | None, isa: str | None) -> float:
    """Milliseconds from the start of a `pyengine generate` process to its first output."""
    import pyengine

    command = [sys.executable, "-m", "pyengine", "generate", "-m", str(path.resolve()), "-p", FIRST_TOKEN_PROMPT]
    command += ["-n", "16", "--temp", "0", "--ignore-eos"]
    command += [] if n_threads is None else ["-t", str(n_threads)]
    command += [] if isa is None else ["--isa", isa]
    started = time.perf_counter()
    home = Path(
        pyengine.__file__
    ).parent.parent  # -m looks there first: this very package, whatever lies in our directory
    with subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.read(1)
        elapsed = (time.perf_counter() - started) * 1e3
        process.stdout.read()
        message = process.stderr.read().decode(errors="replace").strip()
    if not first:
        raise PyEngineError(f"pyengine generate said nothing: {message}")
    return elapsed


def peak_rss_mib() -> float:
    """Peak resident memory of this process, mapped weights included."""
    from pyengine.system import peak_memory

    return peak_memory() / 2**20


def print_table(rows: Sequence[Row]) -> None:
    """llama-bench's columns, as Markdown; beside mean and standard deviation the median and its share of the limit."""
    print("| model | size | params | threads | isa | test | t/s | median | of limit |")
    print("| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        r = row.to_dict()
        size, params, speed = (
            f"{row.size_bytes / 2**20:.2f} MiB",
            f"{row.params / 1e6:.2f} M",
            f"{r['mean']:.2f} ± {r['sd']:.2f}",
        )
        share = "" if row.of_limit is None else f"{row.of_limit:.0%} {r['limit']}"
        guesses = f" ({row.accepted} of {row.drafted} right)" if row.drafted else ""
        columns = [row.model, size, params, str(row.threads), row.isa, row.test + guesses, speed, f"{r['median']:.2f}", share]
        say(f"| {' | '.join(columns)} |")


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.threads is not None and 0 in args.threads:
        raise UsageError("-t: threads are counted from 1")
    options.show_warnings()
    options.select_isa(args.isa)
    path = Path(options.frozen_path(args))
    threads: list[int | None] = [None] if args.threads is None else list(args.threads)
    with ProgressLine("bench") as line:
        measured = [item for n in threads for item in measure(path, args, n, line.show)]
        line.show("bench: time to the first token", force=True)
        first = [first_token_ms(path, threads[-1], args.isa) for _ in range(min(args.repetitions, 5))]
    rows = [row for row, _ in measured]
    start = {
        "load_ms": statistics.median({ms for _, ms in measured}),
        "first_token_ms": statistics.median(first),
        "peak_rss_mib": peak_rss_mib(),
    }
    if args.plot:
        from pyengine.cli.bench_plot import plot_rows

        plot_rows([row.to_dict() for row in rows], args.plot)
    options.tolerant_stdout()
    if args.json:
        print(json.dumps({"path": str(path), "tests": [row.to_dict() for row in rows], **start}))
        return 0
    print_table(rows)
    print(f"\nload {start['load_ms']:.0f} ms, process start to first token {start['first_token_ms']:.0f} ms, "
          f"peak RSS {start['peak_rss_mib']:.0f} MiB")  # fmt: skip
    return 0
