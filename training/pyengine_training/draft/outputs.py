"""Token sequences that a draft head learns from: what the model says after prompts, or given texts. RUN/outputs.jsonl.

A line is {"prompt": [ids], "output": [ids]}: positions of the output are learnt, the prompt is what they follow. Lines are
appended group by group, and a group's prompts, temperature and seed follow from its number, so a stopped run goes on
where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..files import write_atomic
from .target import Target

NAME, DONE = "outputs.jsonl", "outputs.done"
GROUP = 64  # prompts that the engine continues together


@dataclass(frozen=True)
class Sampling:
    """How outputs are made: group g at temperatures[g mod len], until so many tokens, or seconds if not 0, have passed."""

    temperatures: tuple[float, ...]
    max_tokens: int
    tokens: int
    seconds: float
    seed: int


def read_outputs(folder: Path) -> list[tuple[list[int], list[int]]]:
    """(prompt, output) of every whole line."""
    path = folder / NAME
    found = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:  # what follows the last newline was torn
        try:
            value = json.loads(line)
            found.append((value["prompt"], value["output"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: line {len(found) + 1} is damaged") from error
    return found


def is_complete(folder: Path) -> bool:
    return (folder / DONE).exists()


def make_outputs(
    folder: Path, prompts: Sequence[list[int]], target: Target, sampling: Sampling, say: Callable[[str], None]
) -> None:
    """Sample, from the group that is not there yet. Ends after every prompt at every temperature has been answered."""
    done = read_outputs(folder)
    groups = [prompts[at : at + GROUP] for at in range(0, len(prompts), GROUP)]
    kept, group, n_tokens = 0, 0, 0
    while kept + len(groups[group % len(groups)]) <= len(done):  # a torn group is made again
        kept += len(groups[group % len(groups)])
        group += 1
    n_tokens = sum(len(output) for _, output in done[:kept])
    lines = [json.dumps({"prompt": prompt, "output": output}) + "\n" for prompt, output in done[:kept]]
    write_atomic(folder / NAME, "".join(lines).encode())
    began = time.monotonic()
    total = len(groups) * len(sampling.temperatures)
    with open(folder / NAME, "a", encoding="utf-8") as file:
        while group < total and n_tokens < sampling.tokens:
            if sampling.seconds and group and time.monotonic() - began > sampling.seconds:
                break
            chosen = groups[group % len(groups)]
            # another temperature for every group, and in the next round for the same prompts
            temperature = sampling.temperatures[(group + group // len(groups)) % len(sampling.temperatures)]
            seed = (sampling.seed << 32) + group
            found = target.outputs(chosen, max_tokens=sampling.max_tokens, temperature=temperature, seed=seed)
            lines = [json.dumps({"prompt": list(p), "output": o}) + "\n" for p, o in zip(chosen, found, strict=True)]
            file.write("".join(lines))
            file.flush()
            group += 1
            n_tokens += sum(map(len, found))
            rate = n_tokens / max(1e-9, time.monotonic() - began)
            say(f"outputs: {n_tokens:,} tokens, {group} of at most {total} groups, {rate:,.0f} tokens/s")
    write_atomic(folder / DONE, b"")


def take_given(folder: Path, texts: Sequence[list[int]]) -> None:
    """Given texts instead: everything behind their first token is learnt."""
    lines = [json.dumps({"prompt": ids[:1], "output": ids[1:]}) + "\n" for ids in texts]
    write_atomic(folder / NAME, "".join(lines).encode())
    write_atomic(folder / DONE, b"")
