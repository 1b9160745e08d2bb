"""The model's states and likeliest tokens along the texts that a draft head learns from: one int8 forward, kept on disk.

RUN/states/, memory-mapped; a row is a position of some output, in order:

tokens  (N,) uint32        the token that came next
hidden  (N, dim) float16   the final hidden state whose logits it was chosen from
ids     (N, k) uint16|32   the k likeliest next tokens of the draft vocabulary, as indices into it, likeliest first,
probs   (N, k + 1) float16 their probabilities and that of all others, within the draft vocabulary (a teacher's cache has such)
inside  (N,) float32       the probability of the whole draft vocabulary
greedy  (N,) int32         the likeliest token of all, as an index into the draft vocabulary, or -1

sequences.npy (S, 3) int64: first row, rows, whether held out; vocab.npy (V,) int32: ids of the draft vocabulary, ascending.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..files import read_json, write_json
from ..teacher_cache import likeliest
from .target import Target

Array = NDArray[Any]
Output = tuple[list[int], list[int]]
TOGETHER = 64  # sequences from one note of the progress to the next
PROGRESS = "progress.json"


def draft_vocabulary(outputs: Sequence[list[int]], size: int, vocab_size: int, end_ids: Sequence[int]) -> Array:
    """The tokens that outputs have most often, ends of texts always among them: (size,) int32, ascending."""
    counts = np.zeros(vocab_size, np.int64)
    for output in outputs:
        np.add.at(counts, output, 1)
    counts[list(end_ids)] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


class States:
    """The files, opened. ``create`` makes them, :func:`fill` computes what they hold."""

    def __init__(self, folder: Path, mode: str = "r") -> None:
        self.folder = folder
        try:
            self.vocab: Array = np.load(folder / "vocab.npy")
            self.sequences: Array = np.load(folder / "sequences.npy")
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: no states: {error}") from error
        values = read_json(folder / "layout.json")
        n, dim, k = int(values["rows"]), int(values["dim"]), int(values["k"])
        self.tokens = self._array("tokens", np.uint32, (n,), mode)
        self.hidden = self._array("hidden", np.float16, (n, dim), mode)
        self.ids = self._array("ids", np.uint16 if len(self.vocab) <= 1 << 16 else np.uint32, (n, k), mode)
        self.probs = self._array("probs", np.float16, (n, k + 1), mode)
        self.inside = self._array("inside", np.float32, (n,), mode)
        self.greedy = self._array("greedy", np.int32, (n,), mode)

    def _array(self, name: str, dtype: Any, shape: tuple[int, ...], mode: str) -> Array:
        path, size = self.folder / name, int(np.prod(shape)) * np.dtype(dtype).itemsize
        if mode == "r+" and not path.exists():
            with open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an OSError now, and no signal later
        if not path.exists() or path.stat().st_size != size:
            raise DataError(f"{path}: missing or of the wrong size")
        return np.memmap(path, dtype, mode, shape=shape)  # type: ignore[call-overload, no-any-return]

    @property
    def done(self) -> int:
        """Sequences that are computed."""
        path = self.folder / PROGRESS
        return int(read_json(path)["sequences"]) if path.exists() else 0

    def starts(self, held_out: bool) -> Array:
        """Rows from which a guess can be made and judged: every one of a sequence but its last. (n,) int64."""
        chosen = self.sequences[self.sequences[:, 2] == held_out]
        parts = [np.arange(first, first + rows - 1) for first, rows, _ in chosen]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def ends(self) -> Array:
        """(N,) int64: the row behind the sequence of each row."""
        return np.repeat(self.sequences[:, 0] + self.sequences[:, 1], self.sequences[:, 1])


def create(
    folder: Path, outputs: Sequence[Output], n_prompts: int, share: float, vocab_size: int, k: int, target: Target
) -> None:
    """Empty files for outputs, line by line of n_prompts prompts in turn, one in 1 / share of which is held out.

    Raises DataError where one side has nothing that a guess could be judged by.
    """
    period = max(2, round(1 / share))
    held_out = [number % n_prompts % period == 0 for number in range(len(outputs))]
    rows = np.array([len(output) for _, output in outputs], np.int64)
    sequences = np.stack([np.cumsum(rows) - rows, rows, np.array(held_out, np.int64)], axis=1)
    for side, what in ((False, "to learn from"), (True, "held out")):
        if not (rows[np.array(held_out) == side] > 1).any():
            raise DataError(f"no output of two tokens or more is {what}: give more prompts, or longer outputs")
    learnt = [output for (_, output), held in zip(outputs, held_out, strict=True) if not held]
    vocab = draft_vocabulary(learnt, vocab_size, target.vocab_size, target.end_ids)
    folder.mkdir(exist_ok=True)
    np.save(folder / "vocab.npy", vocab)
    np.save(folder / "sequences.npy", sequences)
    write_json(folder / "layout.json", {"rows": int(rows.sum()), "dim": target.dim, "k": min(k, len(vocab))})


def fill(folder: Path, outputs: Sequence[Output], target: Target, say: Callable[[str], None]) -> States:
    """Compute what is not there yet."""
    states = States(folder, "r+")
    index = np.full(target.vocab_size, -1, np.int32)  # of a token in the draft vocabulary
    index[states.vocab] = np.arange(len(states.vocab), dtype=np.int32)
    for begin in range(states.done, len(outputs), TOGETHER):
        part = outputs[begin : begin + TOGETHER]
        _fill_part(states, begin, part, target, index)
        for array in (states.tokens, states.hidden, states.ids, states.probs, states.inside, states.greedy):
            array.flush()  # type: ignore[attr-defined]
        write_json(folder / PROGRESS, {"sequences": begin + len(part)})
        say(f"states: {begin + len(part):,} of {len(outputs):,} sequences")
    return States(folder)


def _fill_part(states: States, begin: int, part: Sequence[Output], target: Target, index: Array) -> None:
    # the last token of an output is not read: nothing is known of what follows it
    texts = [np.array([*prompt, *output[:-1]], np.int64) for prompt, output in part]
    first = [len(prompt) - 1 for prompt, _ in part]
    k = states.ids.shape[1]

    def take(number: int, position: int, hidden: Array, logits: Array) -> None:
        """hidden (n, dim), logits (n, vocab_size) of consecutive positions."""
        at = int(states.sequences[begin + number, 0]) + position - first[number]
        rows = slice(at, at + len(hidden))
        known = logits[:, states.vocab]
        top = logits.max(axis=1, keepdims=True)
        total, inside = (np.exp(x - top).sum(axis=1, dtype=np.float64) for x in (logits, known))
        states.hidden[rows] = hidden
        states.ids[rows], states.probs[rows] = likeliest(known, k, 1.0)
        states.inside[rows] = inside / total
        states.greedy[rows] = index[logits.argmax(axis=1)]

    for number, (_, output) in enumerate(part):
        at = int(states.sequences[begin + number, 0])
        states.tokens[at : at + len(output)] = output
    target.read(texts, first, take)
