"""What a fuzz target is, and the one loop that runs its inputs.

A target makes an input from a random generator and runs it. The generator of input i is seeded with (target, seed, i) alone, so
that any input can be made again without those before it. **The property** is that nothing but a PyEngineError leaves: every other
exception, a death, more than `CPU_SECONDS` of computing and an address space beyond `MEMORY_BYTES` are findings.
"""

from __future__ import annotations

import collections
import random
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pyengine.errors import PyEngineError

CPU_SECONDS = 2.0  # for one input, on whatever machine
WALL_SECONDS = 60.0  # for one that waits: a lock, a FIFO, a child
MEMORY_BYTES = 2 << 30  # address space beyond what a worker has when it is ready


@dataclass
class Case:
    """One input: files by name, and what is said in Python. Both are saved when something is found."""

    files: dict[str, bytes] = field(default_factory=dict)
    arguments: Any = None


class Target(Protocol):
    """A part of the engine and the inputs for it. `stage` says how far the current input came."""

    name: str
    stage: str

    def make(self, rng: random.Random) -> Case: ...

    def run(self, case: Case) -> None: ...


@dataclass
class Finding:
    target: str
    seed: int
    index: int
    kind: str  # the exception's class, "hang", "death by SIGSEGV", ...
    where: str  # stage and innermost line of ours
    text: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.target, self.kind, self.where


def generator(target: str, seed: int, index: int) -> random.Random:
    return random.Random(f"{target} {seed} {index}")


def innermost(error: BaseException) -> str:
    """file:line of the innermost frame inside the package, else of the innermost at all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/pyengine/" in frame.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


def run_all(
    target: Target, seed: int, indices: Iterator[int], begin: Callable[[int], None]
) -> Iterator[Finding | collections.Counter[str]]:
    """Run inputs; yields findings as they come, and after every hundredth input the outcomes counted since the last time. `begin`
    is told each index before its input is made."""
    outcomes: collections.Counter[str] = collections.Counter()
    for index in indices:
        begin(index)
        target.stage = "make"
        try:
            target.run(target.make(generator(target.name, seed, index)))
            outcomes["ran"] += 1
        except PyEngineError as error:
            outcomes[f"{target.stage}: {type(error).__name__}"] += 1
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the tokenizers library is no Exception
            outcomes["FOUND"] += 1
            text = "".join(traceback.format_exception(error))[-4000:]
            yield Finding(target.name, seed, index, type(error).__name__, f"{target.stage} {innermost(error)}", text)
        if sum(outcomes.values()) == 100:
            yield outcomes
            outcomes = collections.Counter()
    yield outcomes
