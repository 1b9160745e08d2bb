"""Training on the CPU: shards side by side on threads, single-threaded BLAS and kernels in each.

Gradients are summed in shard order, so the result has the same bits on any number of threads; more shards than threads
is gradient accumulation. All memory is allocated in the constructor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from numpy.typing import NDArray

from ..arena import Arena, parameter_shapes
from ..config import ModelConfig, TrainConfig
from ..data import ValidationBatch
from ..distill import Distillation, check_teacher
from ..model import Worker, activation_bytes, fake_quantize_parameters
from ..optimizer import Optimizer
from ..threads import available_threads, run_all, single_threaded_blas
from ..validation import sums_on_threads
from . import StepInputs

Array = NDArray[Any]
SUM_SLICE = 1 << 18  # elements that one task adds up


class CpuBackend:
    """:class:`.Backend` on this machine's cores."""

    def __init__(
        self,
        model: ModelConfig,
        config: TrainConfig,
        *,
        threads: int | None = None,
        teacher: tuple[ModelConfig, Arena] | None = None,
    ) -> None:
        self.blas_limit = single_threaded_blas()
        self.threads = max(1, min(threads or available_threads(), config.shards))
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="pyengine-train")
        self.params = Arena(parameter_shapes(model))
        self.grads = self.params.like()
        self._int8_values = self.params.like() if config.quantize != "never" else None
        self.optimizer = Optimizer(model, config, self.params, self.pool)
        self.shard_rows = config.batch_size // config.shards
        size = self.shard_rows, config.seq_len
        self.workers = [Worker(model, *size, recompute=config.recompute) for _ in range(self.threads)]
        self.distillations: list[Distillation] = []
        if teacher:
            check_teacher(teacher[0], model, config.seq_len)
            teachers = [Worker(teacher[0], *size, training=False) for _ in range(self.threads)]
            self.distillations = [Distillation(worker, teacher[1], config) for worker in teachers]

    def close(self) -> None:
        """Stop the threads."""
        self.pool.shutdown()

    # ---- one step ----------------------------------------------------------------------------------------------------

    def weights(self, quantize: bool) -> Arena:
        """The masters, or the values that their int8 codes stand for."""
        if not quantize:
            return self.params
        self._int8_values = values = self._int8_values or self.params.like()

        def quantizer(name: str) -> Callable[[], None]:
            return lambda: fake_quantize_parameters(values, self.params, [name])

        run_all(self.pool, [quantizer(name) for name in self.params.shapes])
        return values

    def gradients(self, tokens: Array, targets: Array, inputs: StepInputs) -> float:
        """Mean loss; its gradient into ``grads``."""
        shards = len(tokens) // self.shard_rows
        weights = self.weights(inputs.quantize)
        losses = [0.0] * shards
        self.grads.flat.fill(0)

        def shard(index: int, slot: int) -> Callable[[], None]:
            rows = slice(index * self.shard_rows, (index + 1) * self.shard_rows)
            distillation = self.distillations[slot] if self.distillations else None

            def run() -> None:
                losses[index] = self.workers[slot].forward_backward(
                    weights, tokens[rows], targets[rows], 1.0 / inputs.counted, inputs.quantize, distillation
                )

            return run

        for first in range(0, shards, self.threads):
            wave = range(first, min(shards, first + self.threads))
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

    def step(self, tokens: Array, targets: Array, inputs: StepInputs) -> tuple[float, float]:
        """Loss and gradient norm; nothing is updated unless both are finite."""
        loss = self.gradients(tokens, targets, inputs)
        norm = self.optimizer.grad_norm(self.grads)
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step(self.grads, inputs.step, inputs.lr_factor, norm)
        return loss, norm

    # ---- validation and checkpoints ----------------------------------------------------------------------------------

    def validation_sums(self, batches: Iterable[ValidationBatch], quantize: bool) -> Array:
        """Spread over the workers."""
        return sums_on_threads(self.workers, self.pool, self.weights(quantize), batches, quantize)

    def save_moments(self, m: Array, v: Array) -> None:
        """Copies."""
        m[...], v[...] = self.optimizer.m.flat, self.optimizer.v.flat

    def load_moments(self, m: Array, v: Array) -> None:
        """Copies."""
        self.optimizer.m.flat[...], self.optimizer.v.flat[...] = m, v


def cpu_bytes(model: ModelConfig, config: TrainConfig, threads: int) -> int:
    """Roughly what a run holds: a worker for each thread, masters, gradients, two moments, int8 values."""
    rows = config.batch_size // config.shards
    copies = 4 + (config.quantize != "never")
    worker = activation_bytes(model, rows, config.seq_len, config.recompute)
    return min(threads, config.shards) * worker + copies * 4 * model.n_params()
