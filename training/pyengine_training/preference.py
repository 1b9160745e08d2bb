"""Pairs of answers to learn a preference from: reading, storing, batches, and the reference's log-probabilities.

A line of a .jsonl file is ``{"prompt": …, "chosen": …, "rejected": …}``, or has ``"messages"`` (a conversation up to the
answer) instead of ``"prompt"``. The model's own template renders both answers after the same prompt. A row of a batch is one
pair, the chosen sequence and behind it the rejected one, which do not see each other; only tokens of the answers count. The loss
is in :mod:`.ops.cpu.dpo`.

The run folder keeps the tokens and, computed once before the first step, the log-probability of every answer by the model that
training starts from: there is no second model in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arena import Arena
from .chat import ChatFormat
from .config import ModelConfig
from .data import FROM_THE_BEGINNING, Reader
from .errors import DataError
from .files import atomic_directory
from .model import Worker
from .ops.cpu.dpo import dpo_margins
from .text import is_validation, read_json_lines
from .threads import share_out, single_threaded_blas

Array = NDArray[Any]
TOKENS, PAIRS, REFERENCE = "tokens.npy", "pairs.npy", "reference.npy"
# tokens: ids of all pairs, uint32, each chosen and then rejected sequence. reference: (pairs, 2) float64, log-probabilities.
# pairs: (pairs, 7) int64: where its tokens begin, tokens of the chosen sequence, of the rejected one, where the answer begins in
# each, whether held out, line of the file
HELD_OUT_COLUMN = 5
ROUND = 32  # rows are as long as the longest pair, rounded up to a multiple


def is_preference(path: Path) -> bool:
    """Whether a .jsonl file's first object has "chosen" and "rejected"."""
    if path.suffix != ".jsonl":
        return False
    for _, line in read_json_lines(path):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and {"chosen", "rejected"} <= set(value)
    return False


# ---- reading -----------------------------------------------------------------------------------------------------


def _pair(value: Any, where: str) -> tuple[list[Any], str, str]:
    """(messages, chosen, rejected) of a line's object."""
    if not isinstance(value, dict) or not {"chosen", "rejected"} <= set(value):
        raise DataError(f'{where} is no object with "chosen" and "rejected"')
    if ("prompt" in value) == ("messages" in value):
        raise DataError(f'{where} needs either "prompt" or "messages"')
    messages = value.get("messages", [{"role": "user", "content": value.get("prompt")}])
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where}: "messages" is not a list with something in it')
    answers = value["chosen"], value["rejected"]
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise DataError(f'{where}: "chosen" and "rejected" must be strings with something in them')
    if answers[0] == answers[1]:
        raise DataError(f'{where}: "chosen" and "rejected" are the same')
    return messages, *answers


def _sequence(chat: ChatFormat, messages: list[Any], answer: str, where: str) -> tuple[list[int], int]:
    """Token ids, and the first one of the answer, which goes on to the end."""
    whole = chat.checked([*messages, {"role": "assistant", "content": answer}], where)
    ids, counted = chat.encode(chat.render_answer(whole, where))
    if not counted[1:].any():
        raise DataError(f"{where}: an answer has no token of its own")
    return ids, int(np.argmax(counted))


def prepare_pairs(source: Path, folder: Path, chat: ChatFormat, share: float) -> None:
    """Tokens and pairs of a file, a share held out, atomically. Raises DataError that names the line which cannot be used."""
    tokens: list[int] = []
    table: list[tuple[int, ...]] = []
    for number, line in read_json_lines(source):
        where = f"{source}: line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is no JSON") from error
        messages, *answers = _pair(value, where)
        (chosen, first), (rejected, second) = (_sequence(chat, messages, answer, where) for answer in answers)
        held_out = is_validation(json.dumps(messages), share)  # pairs of one prompt are on one side
        table.append((len(tokens), len(chosen), len(rejected), first, second, held_out, number))
        tokens += [*chosen, *rejected]
    if len(table) < 2:
        raise DataError(f"{source}: {len(table)} pairs; one to learn from and one to validate with are needed")
    pairs = np.asarray(table, np.int64)
    if len(set(pairs[:, HELD_OUT_COLUMN].tolist())) == 1:  # neither side is ever empty
        pairs[-1, HELD_OUT_COLUMN] ^= 1
    with atomic_directory(folder) as temporary:
        np.save(temporary / TOKENS, np.asarray(tokens, np.uint32))
        np.save(temporary / PAIRS, pairs)


# ---- batches -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preference:
    """What the loss of some rows needs beside their tokens. reference (rows, 2) float64; beta: of the loss."""

    reference: Array
    beta: float

    def __getitem__(self, rows: slice) -> Preference:
        return Preference(self.reference[rows], self.beta)


@dataclass(frozen=True)
class PairBatch:
    """Held-out pairs, one a row; a row without one has no target."""

    tokens: Array
    targets: Array
    starts: Array
    preference: Preference
    rows: int  # that have a pair

    def sums(self, nll: Array) -> tuple[float, float, float, float]:
        """Loss, pairs, pairs whose chosen answer has gained on the other, margins; nll (rows, T)."""
        p = self.preference
        margins = dpo_margins(nll, self.targets, self.starts, p.reference)[: self.rows]
        losses = np.logaddexp(0, -p.beta * margins)
        return float(losses.sum()), float(self.rows), float((margins > 0).sum()), float(margins.sum())


class Pairs:
    """A prepared folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.tokens, self.table = np.load(folder / TOKENS, mmap_mode="r"), np.load(folder / PAIRS)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: no prepared pairs: {error}") from error
        path = folder / REFERENCE
        self.reference = np.load(path) if path.exists() else np.zeros((len(self.table), 2))
        held_out = self.table[:, HELD_OUT_COLUMN] != 0
        self.train, self.held_out = np.flatnonzero(~held_out), np.flatnonzero(held_out)

    @property
    def longest(self) -> int:
        """Tokens of the longest pair."""
        return int((self.table[:, 1] + self.table[:, 2]).max())

    def row_length(self, context: int) -> int:
        """Tokens of a row that holds every pair, at most ``context``."""
        return min(context, -(-self.longest // ROUND) * ROUND)

    def check(self, source: Path, seq_len: int) -> None:
        """Raise DataError, naming the line, for a pair that no row holds."""
        for pair in self.table:
            if pair[1] + pair[2] > seq_len:
                raise DataError(
                    f"{source}: line {pair[6]}: its two answers with their prompts have {pair[1] + pair[2]} tokens, more than "
                    f"a row of {seq_len}: give a longer --seq-len or shorter texts"
                )

    def fingerprint(self) -> str:
        """Changes when a token or a reference does."""
        parts = (np.ascontiguousarray(part).tobytes() for part in (self.tokens, self.table, self.reference))
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def fill(self, index: int, tokens: Array, targets: Array, starts: Array) -> None:
        """The row (each (T,) int64) of a pair."""
        start, *sizes, first, second = self.table[index][:5].tolist()
        tokens[...], targets[...], starts[...] = 0, -1, sum(sizes)
        at = 0
        for size, answer in zip(sizes, (first, second), strict=True):
            part = self.tokens[start + at : start + at + size]
            tokens[at : at + size] = part
            counted = max(1, answer)  # the first token of all is predicted from nothing
            targets[at + counted - 1 : at + size - 1] = part[counted:]
            starts[at : at + size] = at
            at += size

    def batch(self, indices: Array, rows: int, seq_len: int) -> tuple[Array, Array, Array]:
        """tokens, targets, starts (rows, seq_len) int64 of some pairs; rows behind them have no target."""
        tokens, starts = np.zeros((2, rows, seq_len), np.int64)
        targets = np.full((rows, seq_len), -1, np.int64)
        for row, index in enumerate(indices.tolist()):
            self.fill(index, tokens[row], targets[row], starts[row])
        return tokens, targets, starts

    def validation(self, rows: int, seq_len: int, beta: float, limit: int) -> Iterator[PairBatch]:
        """Batches of the first held-out pairs."""
        chosen = self.held_out[:limit]
        for first in range(0, len(chosen), rows):
            part = chosen[first : first + rows]
            reference = np.zeros((rows, 2))
            reference[: len(part)] = self.reference[part]
            yield PairBatch(*self.batch(part, rows, seq_len), Preference(reference, beta), len(part))


class PairSource:
    """Batches of pairs: a new order each epoch; batch(step) is a pure function of the arguments and step."""

    def __init__(
        self, pairs: Pairs, batch_size: int, seq_len: int, seed: int, beta: float, reader: Reader = FROM_THE_BEGINNING
    ) -> None:
        self.pairs, self.reader, self.beta = pairs, reader, beta
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        # a batch touches two epochs, unless there are fewer pairs than rows
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> Array:
        """The pairs' indices in the order of an epoch."""
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 4, epoch]))
        order: Array = self.pairs.train[generator.permutation(len(self.pairs.train))]
        return order

    def _index(self, row: int) -> int:
        epoch, place = divmod(row, len(self.pairs.train))
        return int(self._order(epoch)[place])

    def _row(self, step: int) -> int:
        return self.reader.row + (step - self.reader.step) * self.batch_size

    def batch(self, step: int) -> tuple[Array, Array, Array, Preference]:
        """tokens, targets, starts (batch_size, seq_len) int64, and the pairs' references."""
        indices = np.array([self._index(self._row(step) + i) for i in range(self.batch_size)])
        arrays = self.pairs.batch(indices, self.batch_size, self.seq_len)
        return *arrays, Preference(self.pairs.reference[indices], self.beta)

    def epochs(self, step: int) -> list[float]:
        """Passes over the pairs after ``step`` steps."""
        return [self._row(step) / len(self.pairs.train)]


# ---- reference ---------------------------------------------------------------------------------------------------


def store_reference(
    pairs: Pairs,
    model: ModelConfig,
    params: Arena,
    seq_len: int,
    threads: int,
    say: Callable[[int], None] = lambda _count: None,
) -> None:
    """Compute and keep the log-probability of every answer by a model, in float32; the same bits for any ``threads``.

    say: is told how many pairs are done.
    """
    result = np.zeros((len(pairs.table), 2))

    def work(worker: Worker, index: int) -> None:
        tokens, targets, starts = pairs.batch(np.array([index]), 1, seq_len)
        nll = worker.evaluate(params, tokens, targets, False, starts).astype(np.float64)
        result[index] = -nll[starts == 0].sum(), -nll[starts > 0].sum()

    with single_threaded_blas(), ThreadPoolExecutor(threads) as pool:
        workers = [Worker(model, 1, seq_len, training=False) for _ in range(threads)]
        share_out(pool, workers, range(len(result)), work, say)
    np.save(pairs.folder / REFERENCE, result)
    pairs.reference = result
