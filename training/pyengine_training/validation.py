"""Loss and bits per byte over whole documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arena import Arena
from .data import ValidationBatch
from .model import Worker
from .threads import run_all

Array = NDArray[Any]


@dataclass(frozen=True)
class Validation:
    """loss: nats per token with the final EOS; bits_per_byte: of the text alone, without the EOS."""

    loss: float
    bits_per_byte: float
    tokens: int
    n_bytes: int


def batch_sums(loss: Array, batch: ValidationBatch) -> tuple[float, int, float, int]:
    """Loss and tokens of a batch, then loss and tokens of its text alone; loss (rows, seq_len)."""
    return (
        float(loss.sum(dtype=np.float64)),
        int((batch.targets >= 0).sum()),
        float(loss[batch.is_text].sum(dtype=np.float64)),
        int(batch.is_text.sum()),
    )


def sums_on_threads(
    workers: list[Worker], pool: ThreadPoolExecutor, params: Arena, batches: Iterable[ValidationBatch], quantize: bool
) -> Array:
    """(batches, 4) float64: :func:`batch_sums` of each, spread over the workers."""
    rows = list(batches)
    sums = np.zeros((len(rows), 4))

    def run(slot: int) -> Callable[[], None]:
        def work() -> None:
            for index in range(slot, len(rows), len(workers)):
                batch = rows[index]
                sums[index] = batch_sums(workers[slot].evaluate(params, batch.tokens, batch.targets, quantize), batch)

        return work

    run_all(pool, [run(slot) for slot in range(len(workers))])
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
