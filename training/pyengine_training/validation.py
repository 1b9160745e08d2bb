"""Loss and bits per byte over whole documents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arena import Arena
from .data import ValidationBatch
from .model import Worker
from .preference import PairBatch
from .threads import share_out

Array = NDArray[Any]
Batches = Iterable[ValidationBatch] | Iterable[PairBatch]


@dataclass(frozen=True)
class Validation:
    """loss: nats per token with the final EOS; bits_per_byte: of the text alone, without the EOS."""

    loss: float
    bits_per_byte: float
    tokens: int
    n_bytes: int

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl."""
        return {"val_loss": self.loss, "val_bits_per_byte": self.bits_per_byte}

    def __str__(self) -> str:
        return f"{self.loss:.4f} nats/token, {self.bits_per_byte:.4f} bits/byte"


@dataclass(frozen=True)
class PairValidation:
    """Over held-out pairs. accuracy: share of pairs whose chosen answer has gained on the rejected one since the start;
    margin: by how many nats, on average."""

    loss: float
    accuracy: float
    margin: float

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl."""
        return {"val_loss": self.loss, "val_accuracy": self.accuracy, "val_margin": self.margin}

    def __str__(self) -> str:
        return f"{self.loss:.4f} a pair, {self.accuracy:.1%} right, margin {self.margin:.2f} nats"


def batch_sums(loss: Array, batch: ValidationBatch | PairBatch) -> tuple[float, float, float, float]:
    """Loss and tokens of a batch, then loss and tokens of its text alone; loss (rows, seq_len). Of pairs: their own sums."""
    if isinstance(batch, PairBatch):
        return batch.sums(loss)
    return (
        float(loss.sum(dtype=np.float64)),
        int((batch.targets >= 0).sum()),
        float(loss[batch.is_text].sum(dtype=np.float64)),
        int(batch.is_text.sum()),
    )


def sums_on_threads(
    workers: list[Worker], pool: ThreadPoolExecutor, params: Arena, batches: Batches, quantize: bool
) -> Array:
    """(batches, 4) float64: :func:`batch_sums` of each, spread over the workers."""
    rows: list[ValidationBatch | PairBatch] = [*batches]
    sums = np.zeros((len(rows), 4))

    def work(worker: Worker, index: int) -> None:
        batch = rows[index]
        starts = batch.starts if isinstance(batch, PairBatch) else None
        sums[index] = batch_sums(worker.evaluate(params, batch.tokens, batch.targets, quantize, starts), batch)

    share_out(pool, workers, range(len(rows)), work)
    return sums


def summarize(sums: Array, n_bytes: int) -> Validation:
    """The result of all batches, added in batch order; n_bytes: of their text."""
    total, tokens, text, _ = sums.sum(axis=0)
    return Validation(
        loss=float(total / max(1, tokens)),
        bits_per_byte=float(text / math.log(2) / max(1, n_bytes)),
        tokens=int(tokens),
        n_bytes=n_bytes,
    )


def summarize_pairs(sums: Array) -> PairValidation:
    """The result of all batches of pairs."""
    loss, pairs, right, margin = sums.sum(axis=0)
    return PairValidation(float(loss / pairs), float(right / pairs), float(margin / pairs))


@dataclass(frozen=True)
class HeldOut:
    """What one text's validation is made of. n_bytes: of the documents' text."""

    name: str
    batches: Sequence[ValidationBatch] | Sequence[PairBatch]
    n_bytes: int = 0

    def result(self, sums: Array) -> Validation | PairValidation:
        """Of what the back end has added up."""
        pairs = isinstance(self.batches[0], PairBatch)
        return summarize_pairs(sums) if pairs else summarize(sums, self.n_bytes)
