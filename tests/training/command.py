"""The command as the tests start it, in this process, and the sizes of a run that takes a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIZES = "--dim 32 --n-layers 1 --n-heads 2 --n-kv-heads 1 --head-dim 16 --hidden-dim 64"
KNOBS = "--seq-len 32 --batch-size 4 --shards 2 --eval-documents 4 --sample-tokens 4"
TINY = f"--vocab-size 300 {SIZES} {KNOBS} --sample-every 0"


def train(run: Path, *words: object) -> int:
    """``pyengine train`` into a run folder; words: texts of several arguments, and paths. Its exit code."""
    from pyengine_training.__main__ import main

    given = [part for word in words for part in (str(word).split() if isinstance(word, str) else [str(word)])]
    return main(["train", "--run-dir", str(run), *given])


def arguments(run: Path, data: Path | None, extra: str) -> list[str]:
    """Of the same command, for a process of its own, too; no data where the folder has it."""
    given = ["--data", str(data)] if data else []
    return ["train", "--run-dir", str(run), *given, *f"--vocab-size 300 {SIZES} {KNOBS} {extra}".split()]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_of(run: Path) -> list[tuple[int, float]]:
    """(step, loss)"""
    return [(e["step"], e["loss"]) for e in metrics(run) if "loss" in e]
