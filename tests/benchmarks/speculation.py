"""What guessing ahead saves, and that it never costs: each prompt with and without it, in turn, in one run.

    python tests/benchmarks/speculation.py --model smollm2.safetensors --questions spec_bench_question.jsonl

--questions: Spec-Bench's questions (github.com/hemingkx/Spec-Bench), of which the first --per-category of each category are
asked; without it only the rewriting tasks run, which are made of this package's own sources: a function, and one name in it
to be changed. A ratio is the time of plain decoding over the time with guesses, both from the first token on, for the same bytes,
which is checked. Each prompt runs once with guesses, in an engine that has seen only the prompts before it; if
the file has a draft head, in two: one that guesses by n-grams alone, and one that asks the head, too. They must be compared in
one run: what a step of several rows costs beside one of a single row changes with what else the machine does, by more than a head
brings. Rows with several sequences ask that many questions in one call, --batches times, no question twice. What counts is the
ratio of the sums, and beside it the median of the ratios, which a busy neighbour moves less. --cpu-time is for a busy machine:
one thread, and the time that it had a CPU, also for what the engine measures of its own steps.

--llama-cpp PYTHON --gguf MODEL.gguf: the same questions, greedily, to llama.cpp with the prompt lookup of llama-cpp-python, which
is installed for that interpreter, in turn with ours; ratios are tokens a second of ours over its, both guessing, and of its own
with guesses over those without.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pyengine
from pyengine import Engine
from pyengine.results import Generation
from pyengine.run import output, proposer, scheduler, speculation

MAX_PROMPT = 1500
LARGEST_BATCH = 32


PLAIN, NGRAMS, HEAD = "plain", "n-grams", "draft head"  # kinds of engines: what guesses


@dataclass
class Row:
    """One kind of work: each prompt, or call of several, by every kind of engine."""

    n_tokens: int = 0
    n_answers: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # by kind of engine
    drafted: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    accepted: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, answers: dict[str, Timed]) -> None:
        expected = [result.tokens for result in answers[PLAIN].results]
        self.n_tokens += sum(map(len, expected))
        self.n_answers += len(expected)
        for kind, (results, seconds) in answers.items():
            assert [result.tokens for result in results] == expected, "the output differs"
            self.seconds[kind].append(seconds)
            self.drafted[kind] += sum(result.timings.drafted_tokens for result in results)
            self.accepted[kind] += sum(result.timings.accepted_tokens for result in results)

    def to_dict(self) -> dict[str, Any]:
        plain = self.seconds[PLAIN]
        return {
            "n_prompts": len(plain),
            "n_tokens": self.n_tokens,
            "plain_tokens_per_second": (self.n_tokens - self.n_answers) / sum(plain),  # but for each answer's first one
            **{kind: self._ratio(kind) for kind in self.seconds if kind != PLAIN},
        }

    def _ratio(self, kind: str) -> dict[str, Any]:
        plain, guessed = self.seconds[PLAIN], self.seconds[kind]
        return {
            "ratio": sum(plain) / sum(guessed),
            "median_ratio": statistics.median(a / b for a, b in zip(plain, guessed, strict=True)),
            "drafted": self.drafted[kind],
            "accepted": self.accepted[kind],
        }


class Timed(NamedTuple):
    results: list[Generation]
    seconds: float


def generate(engine: Engine, prompts: list[list[int]], **options: Any) -> Timed:
    """What comes after the prompts, and the seconds from the first token to the last one. Before it no guess is possible, and the
    step that gives it is the one that touches new memory for keys and values, which takes now long and now short."""
    engine.generate(prompts, **{**options, "max_tokens": 1, "speculative": "off"})
    results = engine.generate(prompts, **options)
    first = min(result.timings.time_to_first_token for result in results)
    return Timed(results, max(1e-9, max(result.timings.total for result in results) - first))


# ------------------------------------------------------------------ prompts


def spec_bench(engine: Engine, path: Path, per_category: int) -> dict[str, list[list[int]]]:
    """{category: token ids of its first questions' first turns}."""
    prompts: dict[str, list[list[int]]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        question = json.loads(line)
        if len(prompts[question["category"]]) < per_category:
            message = {"role": "user", "content": question["turns"][0][: 4 * MAX_PROMPT]}
            prompts[question["category"]].append(engine.chat_ids([message])[-MAX_PROMPT:])
    return dict(prompts)


def functions() -> Iterable[tuple[str, str]]:
    """Functions of this package, and a name that each of them uses: those of 8 to 25 lines with an argument."""
    for path in sorted(Path(pyengine.__file__).parent.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or not 8 <= (node.end_lineno or 0) - node.lineno <= 25:
                continue
            names = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
            code = ast.get_source_segment(source, node)
            if names and code is not None and code.count(names[0]) > 2:
                yield code, names[0]


def rewriting(engine: Engine, n: int) -> list[list[int]]:
    """n tasks: the function, a request, and the beginning of the answer."""
    found = list(functions())
    chosen = [found[i * len(found) // n] for i in range(min(n, len(found)))]
    prompts = []
    for code, name in chosen:
        request = f"Rename `{name}` to `given_{name}` in this code and change nothing else.\n\n```python\n{code}\n```"
        prompts.append(engine.chat_ids([{"role": "user", "content": request}])[-MAX_PROMPT:])
    return prompts


# ------------------------------------------------------------------ llama.cpp


class LlamaCpp:
    """speculation_llama_cpp.py in a process of its own. Raises OSError or ValueError with the reason if it does not start."""

    def __init__(self, python: str, gguf: Path, n_threads: int) -> None:
        worker = Path(__file__).with_name("speculation_llama_cpp.py")
        self._process = subprocess.Popen(
            [python, "-I", str(worker), str(gguf), str(n_threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.version: str = self._read()["version"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"no answer; it ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def rate(self, ids: list[int], n: int, drafts: bool) -> tuple[int, float]:
        """Tokens after the first one, and their seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ids": ids, "n": n, "drafts": drafts, "temperature": 0}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        return answer["tokens"], answer["seconds"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def beside_llama_cpp(args: argparse.Namespace, work: list[tuple[str, list[list[int]]]]) -> dict[str, Any] | None:
    """Tokens a second over all questions: ours and llama.cpp's, each with guesses and without. None where it cannot be run."""
    try:
        peer = LlamaCpp(args.llama_cpp, args.gguf, args.threads)
    except (OSError, ValueError) as reason:
        print(f"llama.cpp is not measured: {reason}", file=sys.stderr)
        return None
    sums: dict[str, list[float]] = {name: [0, 0.0] for name in ("ours", "ours, plain", "llama.cpp", "llama.cpp, plain")}
    with Engine(args.model, n_threads=args.threads) as engine:
        for number, (_, (ids,)) in enumerate(work):
            names = list(sums)
            for name in names[number % 4 :] + names[: number % 4]:
                drafts = not name.endswith("plain")
                if name.startswith("llama"):
                    n, seconds = peer.rate(ids, args.n_tokens, drafts)
                else:
                    guesses = "auto" if drafts else "off"
                    timed = generate(
                        engine, [ids], max_tokens=args.n_tokens, seed=1, temperature=0, speculative=guesses
                    )
                    n, seconds = len(timed.results[0].tokens) - 1, timed.seconds
                sums[name][0] += n
                sums[name][1] += seconds
    peer.close()
    rates = {name: n / seconds for name, (n, seconds) in sums.items()}
    return {
        "version": peer.version,
        "tokens_per_second": rates,
        "ours_over_llama_cpp": rates["ours"] / rates["llama.cpp"],
        "llama_cpp_over_its_plain": rates["llama.cpp"] / rates["llama.cpp, plain"],
    }


# ------------------------------------------------------------------ runs


def open_engine(path: Path, kind: str, n_threads: int) -> Engine:
    engine = Engine(path, n_threads=n_threads, speculative="off" if kind == PLAIN else "auto")
    if kind == NGRAMS:
        engine.scheduler.speculation.close()  # its head, if it has one, is asked nothing
    return engine


def run_in_turn(
    path: Path, work: Iterable[tuple[str, list[list[int]]]], args: argparse.Namespace, **options: Any
) -> dict[str, Row]:
    """Each (row, prompts of one call) of the work by fresh engines of all kinds, another one first each time."""
    rows: dict[str, Row] = defaultdict(Row)
    with ExitStack() as stack:
        engines = {kind: stack.enter_context(open_engine(path, kind, args.threads)) for kind in args.kinds}
        for number, (name, prompts) in enumerate(work):
            first = number % len(args.kinds)
            answers = {
                kind: generate(engines[kind], prompts, max_tokens=args.n_tokens, seed=1, **options)
                for kind in args.kinds[first:] + args.kinds[:first]
            }
            for row in (name, "overall"):
                rows[row].add(answers)
            if args.verbose:
                print(name, rows["overall"].to_dict(), file=sys.stderr)
    return rows


def in_turn(prompts: dict[str, list[list[int]]]) -> list[tuple[str, list[list[int]]]]:
    """One call a prompt, the categories in turn."""
    longest = max(map(len, prompts.values()), default=0)
    return [(name, [ids]) for i in range(longest) for name, all_ids in prompts.items() for ids in all_ids[i : i + 1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a frozen file with a chat template")
    add("--questions", type=Path, help="Spec-Bench's question.jsonl")
    add("--per-category", type=int, default=4)
    add("--rewriting", type=int, default=50, help="tasks")
    add("--n-tokens", type=int, default=96)
    add("--batches", type=int, default=2, help="calls of 8 and of 32 sequences; 0 = none")
    add("--threads", type=int, default=2)
    add("--llama-cpp", metavar="PYTHON", help="an interpreter that has llama-cpp-python")
    add("--gguf", type=Path, help="the same model for it")
    add("--cpu-time", action="store_true", help="one thread, CPU time")
    add("--out", type=Path, help="JSON")
    add("--verbose", action="store_true")
    args = parser.parse_args()
    if (args.llama_cpp is None) != (args.gguf is None):
        parser.error("--llama-cpp and --gguf belong together")
    results: dict[str, dict[str, Any]] = {}
    if args.cpu_time:
        args.threads = 1
        cpu = SimpleNamespace(monotonic=time.thread_time, perf_counter=time.thread_time)
        output.time = scheduler.time = speculation.time = proposer.time = cpu  # type: ignore[assignment]

    def note(name: str, row: Row) -> None:
        if row.n_tokens > 0:
            results[name] = {**row.to_dict(), "load": os.getloadavg()[0]}
            found = [(kind, results[name][kind]) for kind in args.kinds[1:]]
            line = "{}: {ratio:5.2f}x  median {median_ratio:5.2f}x  accepted {accepted:4}/{drafted:<4}"
            print(f"{name:34}", "   ".join(line.format(kind, **one) for kind, one in found), flush=True)

    with Engine(args.model, n_threads=args.threads) as engine:
        args.kinds = [PLAIN, NGRAMS] + [HEAD] * (engine.scheduler.speculation.proposer is not None)
        questions = spec_bench(engine, args.questions, args.per_category) if args.questions else {}
        per_category = -(-LARGEST_BATCH * args.batches // max(1, len(questions)))
        mixed = in_turn(spec_bench(engine, args.questions, per_category)) if args.questions else []
        tasks = rewriting(engine, args.rewriting)
    questions_in_turn = in_turn(questions)
    if args.llama_cpp is not None:
        beside = beside_llama_cpp(args, questions_in_turn)
        print("beside llama.cpp:", json.dumps(beside))
        results["beside llama.cpp, greedy"] = beside or {}
    for label, options in (("greedy", {"temperature": 0}), ("temperature 0.7", {"temperature": 0.7})):
        for name, row in run_in_turn(args.model, questions_in_turn, args, **options).items():
            note(f"{name}, {label}", row)
    note("rewriting, greedy", run_in_turn(args.model, in_turn({"rewriting": tasks}), args, temperature=0)["overall"])
    for size in (8, LARGEST_BATCH):
        n = min(args.batches, len(mixed) // size)
        batches = [("", [ids for _, (ids,) in mixed[i * size : (i + 1) * size]]) for i in range(n)]
        note(f"{size} sequences together, greedy", run_in_turn(args.model, batches, args, temperature=0)["overall"])
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
