"""The command as the tests start it, in this process, and the sizes of a run that takes a second."""

from __future__ import annotations

from pathlib import Path

SIZES = "--dim 32 --n-layers 1 --n-heads 2 --n-kv-heads 1 --head-dim 16 --hidden-dim 64"
KNOBS = "--seq-len 32 --batch-size 4 --shards 2 --eval-documents 4 --sample-tokens 4"
TINY = f"--vocab-size 300 {SIZES} {KNOBS} --sample-every 0"


def train(run: Path, *words: object) -> int:
    """``pyengine train`` into a run folder; words: texts of several arguments, and paths. Its exit code."""
    from pyengine_training.__main__ import main

    given = [part for word in words for part in (str(word).split() if isinstance(word, str) else [str(word)])]
    return main(["train", "--run-dir", str(run), *given])
