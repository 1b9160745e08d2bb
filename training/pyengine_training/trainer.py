"""The state of a training run and one step of it; the loop around it is in :mod:`.train`.

The batch is cut into a fixed number of shards. Each runs on one thread with single-threaded BLAS,
and gradients are summed in shard order, so the result has the same bits on any number of threads;
more shards than threads is gradient accumulation. All memory is allocated in the constructor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checkpoint as checkpoints
from .arena import Arena, initialize, parameter_shapes
from .checkpoint import TrainingState
from .config import ModelConfig, TrainConfig
from .data import ValidationBatch
from .errors import ConfigError, NotFiniteError
from .model import Distillation, Worker, fake_quantize_parameters
from .optimizer import Optimizer, run_all

Array = NDArray[Any]
SUM_SLICE = 1 << 18


def available_threads() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def single_threaded_blas() -> Any:
    """Limit BLAS to one thread from now on; our threads are the parallelism. Returns the limiter."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:  # a machine with the GPU's libraries only: slower, and OPENBLAS_NUM_THREADS=1 does the same
        return None
    return threadpool_limits(limits=1, user_api="blas")


@dataclass(frozen=True)
class StepResult:
    """What one step reports. loss: nats per token."""

    loss: float
    grad_norm: float
    lr_factor: float
    quantized: bool


@dataclass(frozen=True)
class Validation:
    """loss: nats per token with the final EOS; bits_per_byte: of the text alone, without the EOS."""

    loss: float
    bits_per_byte: float
    tokens: int
    n_bytes: int


class Trainer:
    """Parameters, moments, workers. ``params`` are the float32 masters."""

    def __init__(
        self,
        model: ModelConfig,
        config: TrainConfig,
        *,
        threads: int | None = None,
        teacher: tuple[ModelConfig, Arena] | None = None,
    ) -> None:
        if config.seq_len > model.max_seq_len:
            raise ConfigError(f"seq_len ({config.seq_len}) exceeds the model's max_seq_len ({model.max_seq_len})")
        self.model, self.config = model, config
        self.blas_limit = single_threaded_blas()
        self.threads = max(1, min(threads or available_threads(), config.shards))
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="pyengine-train")
        self.params = Arena(parameter_shapes(model))
        self.grads = self.params.like()
        self.quantized = self.params.like() if config.quantize != "never" else self.params
        self.optimizer = Optimizer(model, config, self.params, self.pool)
        rows = config.batch_size // config.shards
        self.workers = [Worker(model, rows, config.seq_len, recompute=config.recompute) for _ in range(self.threads)]
        self.distillation = self._distillations(teacher, rows) if teacher else None
        self.state = TrainingState()

    def _check_teacher(self, config: ModelConfig) -> None:
        if config.vocab_size != self.model.vocab_size:
            raise ConfigError(
                f"the teacher's vocabulary ({config.vocab_size}) is not the student's "
                f"({self.model.vocab_size}): train the student with the teacher's tokenizer"
            )
        if config.max_seq_len < self.config.seq_len:
            raise ConfigError("seq_len exceeds the teacher's max_seq_len")

    def _distillations(self, teacher: tuple[ModelConfig, Arena], rows: int) -> list[Distillation]:
        config, params = teacher
        self._check_teacher(config)
        return [
            Distillation(
                Worker(config, rows, self.config.seq_len, training=False),
                params,
                self.config.distill_alpha,
                self.config.distill_tau,
            )
            for _ in range(self.threads)
        ]

    def close(self) -> None:
        """Stop the threads."""
        self.pool.shutdown()

    def initialize(self) -> None:
        """Fresh parameters from the seed."""
        initialize(self.params, self.model, self.config.seed)

    # ---- one step ------------------------------------------------------------------------------------------------

    def weights(self, quantize: bool) -> Arena:
        """The parameters that products see: the masters, or the values that their int8 codes stand for."""
        if not quantize:
            return self.params
        if self.quantized is self.params:
            self.quantized = self.params.like()
        run_all(self.pool, [self._fake_quantize(name) for name in self.params.shapes])
        return self.quantized

    def _fake_quantize(self, name: str) -> Callable[[], None]:
        return lambda: fake_quantize_parameters(self.quantized, self.params, [name])

    def gradients(
        self,
        tokens: Array,
        targets: Array,
        *,
        quantize: bool = False,
        accumulate: bool = False,
        counted: int | None = None,
    ) -> float:
        """Mean loss over the counted targets; its gradient into self.grads (added to it when
        accumulate is set).

        tokens, targets (n * rows per shard, seq_len) int64. counted: number of targets that share
        the mean (default: those of this call); micro-batches of one step pass the step's.
        """
        rows = self.workers[0].rows
        shards = len(tokens) // rows
        inv = 1.0 / (counted or int((targets >= 0).sum()))
        weights = self.weights(quantize)
        losses = [0.0] * shards
        if not accumulate:
            self.grads.flat.fill(0)
        for first in range(0, shards, self.threads):
            wave = range(first, min(shards, first + self.threads))

            def shard(index: int, slot: int) -> Callable[[], None]:
                part = slice(index * rows, (index + 1) * rows)
                distillation = self.distillation[slot] if self.distillation else None

                def run() -> None:
                    losses[index] = self.workers[slot].forward_backward(
                        weights, tokens[part], targets[part], inv, quantize, distillation
                    )

                return run

            run_all(self.pool, [shard(index, slot) for slot, index in enumerate(wave)])
            self._add_gradients(len(wave))
        return math.fsum(losses)

    def _add_gradients(self, count: int) -> None:
        """self.grads += the workers' gradients, in shard order; slices run side by side, elements do not care."""
        flat = self.grads.flat

        def part(start: int) -> Callable[[], None]:
            piece = slice(start, start + SUM_SLICE)

            def run() -> None:
                for worker in self.workers[:count]:
                    flat[piece] += worker.grads.flat[piece]

            return run

        run_all(self.pool, [part(start) for start in range(0, flat.size, SUM_SLICE)])

    def step(self, tokens: Array, targets: Array) -> StepResult:
        """One optimizer step on one batch. Raises NotFiniteError, with parameters untouched, for a bad loss."""
        step = self.state.step
        quantize = self.config.quantized(step)
        loss = self.gradients(tokens, targets, quantize=quantize)
        norm = self.optimizer.grad_norm(self.grads)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            bad = [n for n in self.grads.shapes if not np.isfinite(self.grads[n]).all()]
            raise NotFiniteError(
                f"step {step}: loss {loss}, gradient norm {norm}; not finite in the gradients of "
                f"{', '.join(bad[:4]) or 'no tensor'}. Lower the learning rate or warm up longer."
            )
        factor = self.optimizer.step(self.grads, step, norm)
        self.state = replace(self.state, step=step + 1, tokens=self.state.tokens + int((targets >= 0).sum()))
        return StepResult(loss, norm, factor, quantize)

    # ---- validation ----------------------------------------------------------------------------------------------

    def validate(self, batches: Iterable[ValidationBatch], n_bytes: int, quantize: bool = False) -> Validation:
        """Loss and bits per byte over whole documents of n_bytes bytes."""
        return evaluate(self.workers, self.pool, self.weights(quantize), batches, n_bytes, quantize)

    # ---- saving --------------------------------------------------------------------------------------------------

    def save(self, folder: Path, data_fingerprint: str, write_model: Callable[[Path], None]) -> None:
        """Write a checkpoint of everything."""
        checkpoints.save_checkpoint(
            folder,
            self.params,
            self.model,
            self.config,
            (self.optimizer.m, self.optimizer.v),
            self.state,
            data_fingerprint,
            write_model,
        )

    def restore(self, folder: Path) -> dict[str, Any]:
        """Parameters, moments and counters of a checkpoint; returns its state.json."""
        values = checkpoints.read_state(folder)
        checkpoints.load_parameters(folder, self.params, self.model)
        checkpoints.load_moments(folder, (self.optimizer.m, self.optimizer.v))
        self.state = TrainingState(
            int(values["step"]),
            int(values["tokens"]),
            float(values["seconds"]),
            values.get("best_validation"),
            values.get("joules"),
        )
        return values


def evaluate(
    workers: list[Worker],
    pool: ThreadPoolExecutor,
    params: Arena,
    batches: Iterable[ValidationBatch],
    n_bytes: int,
    quantize: bool,
) -> Validation:
    """Losses of validation batches, spread over the workers; sums are taken in batch order."""
    rows = list(batches)
    sums = np.zeros((len(rows), 4))  # loss, tokens, text loss, text tokens

    def run(slot: int) -> Callable[[], None]:
        def work() -> None:
            for index in range(slot, len(rows), len(workers)):
                batch = rows[index]
                loss = workers[slot].evaluate(params, batch.tokens, batch.targets, quantize)
                text = loss[batch.is_text].sum(dtype=np.float64)
                sums[index] = (
                    loss.sum(dtype=np.float64),
                    (batch.targets >= 0).sum(),
                    text,
                    batch.is_text.sum(),
                )

        return work

    run_all(pool, [run(slot) for slot in range(len(workers))])
    total, tokens, text, _ = sums.sum(axis=0)
    return Validation(
        loss=float(total / max(1, tokens)),
        bits_per_byte=float(text / math.log(2) / max(1, n_bytes)),
        tokens=int(tokens),
        n_bytes=n_bytes,
    )


__all__ = ["StepResult", "Trainer", "Validation", "available_threads", "evaluate"]
