"""Fuzzing from the command line, with the installed package:

    python -m tests.fuzz                                all targets, 60 seconds in all
    python -m tests.fuzz gguf hf --hours 3 --seed 7     two of them in turn, for hours
    python -m tests.fuzz --executions 1000              so many inputs of each
    python -m tests.fuzz capi-asan capi-tsan            the C API under sanitizers (compiled first, from the sources)
    python -m tests.fuzz --replay gguf:7:123456         one input again, with its traceback

What is found is written to --save, and its seed is printed; the exit code is 1. Counts of executions are printed in the end.
"""

from __future__ import annotations

import argparse
import collections
import secrets
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
# The checkout's package is not built: the installed one is what is tested.
sys.path[:] = [str(TESTS), *(path for path in sys.path if Path(path or ".").resolve() != TESTS.parent)]

from fuzz import capi, runner  # noqa: E402
from fuzz.cases import Finding  # noqa: E402
from fuzz.targets import TARGETS  # noqa: E402

TURN_SECONDS = 60.0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*TARGETS, *capi.SANITIZERS]
    parser.add_argument(
        "targets", nargs="*", default=[], choices=[[], *names], metavar="TARGET", help=f"of {', '.join(names)}"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="in all; default 60")
    length.add_argument("--hours", type=float, help="in all, every target a minute in turn")
    length.add_argument("--executions", type=int, help="of each target")
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, which is printed")
    parser.add_argument("--save", type=Path, default=Path("fuzz-findings"), help="directory for what is found")
    parser.add_argument("--replay", metavar="TARGET:SEED:INDEX", help="run one input here")
    return parser


def replay(text: str) -> int:
    name, seed, index = text.rsplit(":", 2)
    if name in capi.SANITIZERS:
        counts, finding = capi.replay(name, int(seed), int(index))
        print(finding.text if finding else counts)
        return 1 if finding else 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        target, case = runner.case_of(name, int(seed), int(index), Path(scratch))
        print(
            f"files {[(file, len(content)) for file, content in case.files.items()]}, arguments {case.arguments!a:.500}",
            flush=True,
        )
        try:
            target.run(case)
        finally:
            print(f"it came to: {target.stage}")
    return 0


class Totals:
    """Counts over all turns, and what was found."""

    def __init__(self, save: Path) -> None:
        self._save = save
        self.executions: collections.Counter[str] = collections.Counter()
        self.outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.findings: dict[tuple[str, str, str], Finding] = {}

    def found(self, finding: Finding) -> None:
        if finding.key in self.findings:
            return
        self.findings[finding.key] = finding
        place = runner.save(finding, self._save)
        print(
            f"FOUND {finding.kind} in {finding.where}: --replay {finding.target}:{finding.seed}:{finding.index} ({place})",
            flush=True,
        )

    def add(self, result: runner.Result) -> None:
        self.executions[result.target] += result.executions
        self.outcomes[result.target] += result.outcomes

    def print(self) -> None:
        for target, count in self.executions.items():
            common = ", ".join(f"{name} {n}" for name, n in self.outcomes[target].most_common(6))
            print(f"{target:12} {count:12,} executions: {common}")
        print(f"{'all':12} {sum(self.executions.values()):12,} executions, {len(self.findings)} findings")


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.replay:
        return replay(args.replay)
    seed = secrets.randbelow(1 << 32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    names, totals = args.targets or list(TARGETS), Totals(args.save)
    seconds = args.hours * 3600 if args.hours else args.seconds or 60.0
    deadline = time.monotonic() + seconds
    turn = min(TURN_SECONDS, seconds / len(names))
    while True:
        for name in names:
            limits = {"executions": args.executions} if args.executions else {"seconds": turn}
            run = capi.run_capi if name in capi.SANITIZERS else runner.run_target
            totals.add(run(name, seed, first=totals.executions[name], found=totals.found, **limits))
        if args.executions or time.monotonic() + turn > deadline:
            break
        totals.print()
    totals.print()
    return 1 if totals.findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
