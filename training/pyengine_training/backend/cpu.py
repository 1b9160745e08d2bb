"""Training on CPUs: shards side by side on threads, single-threaded BLAS and kernels in each; ranks beside one another.

A rank has consecutive shards of the batch, and gradients are summed by a tree over all shards (:mod:`..ranks`), so the
result has the same bits on any number of threads and ranks; more shards than threads is gradient accumulation. All
memory is allocated in the constructor, or by the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arena import Arena, parameter_shapes
from ..comm import ALONE, Comm, together
from ..config import ModelConfig, TrainConfig
from ..distill import AnyDistillation, CachedDistillation, Distillation, check_teacher
from ..lora import Adapters, LoraConfig
from ..model import Worker, activation_bytes, fake_quantize_parameters
from ..optimizer import Optimizer, norm_of
from ..ranks import Exchange, ShardSum, check_ranks, cut
from ..scale import state_bytes
from ..threads import available_threads, run_all, single_threaded_blas
from ..validation import Batches, sums_on_threads
from . import StepInputs

Array = NDArray[Any]


class CpuBackend:
    """:class:`.Backend` on this machine's cores, or on those of several ranks."""

    def __init__(
        self,
        model: ModelConfig,
        config: TrainConfig,
        *,
        threads: int | None = None,
        teacher: tuple[ModelConfig, Arena] | None = None,
        comm: Comm = ALONE,
        shard_optimizer: bool = False,
        lora: LoraConfig | None = None,
    ) -> None:
        self.config, self.comm = config, comm
        check_ranks(comm.size, config)
        self.blas_limit = single_threaded_blas()
        wanted = threads or comm.threads or available_threads()
        self.threads = max(1, min(wanted, config.shards // comm.size))
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="pyengine-train")
        self.params = Arena(parameter_shapes(model))
        self.adapters = Adapters(lora, model, self.params) if lora else None
        trained = self.adapters.values if self.adapters else self.params
        self._grads = trained.like()
        self._int8_values = self.params.like() if config.quantize != "never" else None
        pieces = cut(trained, model, config)
        self.exchange = Exchange(comm, pieces)
        self.sharded = shard_optimizer and comm.size > 1 and not lora
        updated = self.exchange.mine if self.sharded else pieces
        self.optimizer = Optimizer(config, [] if lora else updated, self.pool)
        self.shard_rows = config.batch_size // config.shards
        size = self.shard_rows, config.seq_len
        kept = {"recompute": config.recompute, "adapters": self.adapters}
        self.workers = [Worker(model, *size, **kept) for _ in range(self.threads)]
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

    @property
    def grads(self) -> Arena:
        """Of the last gradients or step. Every rank asks, or none."""
        if self.sharded:
            self.exchange.distribute(self._grads.flat)
        return self._grads

    def gradients(self, tokens: Array, targets: Array, inputs: StepInputs) -> float:
        """Mean loss; its gradient into ``grads``."""
        loss = self._reduced_gradients(tokens, targets, inputs)
        if not self.sharded:
            self.exchange.distribute(self._grads.flat)
        return loss

    def _reduced_gradients(self, tokens: Array, targets: Array, inputs: StepInputs) -> float:
        """Mean loss; this rank's pieces of the gradient."""
        shards = len(tokens) // self.shard_rows // self.comm.size
        losses = [0.0] * shards
        with together(self.comm):
            self._local_gradients(tokens, targets, inputs, losses)
        self.exchange.reduce(self._grads.flat)
        if self.adapters:
            self._grads.flat *= self.adapters.scale
        return math.fsum(loss for part in self.comm.gather(losses) for loss in part)

    def _local_gradients(self, tokens: Array, targets: Array, inputs: StepInputs, losses: list[float]) -> None:
        """The sum over this rank's shards into _grads, each shard's loss into losses."""
        weights = self.weights(inputs.quantize)
        first_shard = self.comm.rank * len(losses)

        def shard(index: int, slot: int) -> Callable[[], None]:
            first = (first_shard + index) * self.shard_rows
            rows = slice(first, first + self.shard_rows)
            distillation: AnyDistillation | None = None
            if inputs.soft is not None:
                distillation = CachedDistillation(inputs.soft[rows], self.config.distill_alpha, self.config.distill_tau)
            elif self.distillations:
                distillation = self.distillations[slot]
            starts = None if inputs.starts is None else inputs.starts[rows]
            preference = None if inputs.preference is None else inputs.preference[rows]

            def run() -> None:
                with np.errstate(over="ignore", invalid="ignore"):  # the loss and the norm tell
                    losses[index] = self.workers[slot].forward_backward(
                        weights,
                        tokens[rows],
                        targets[rows],
                        1.0 / inputs.counted,
                        inputs.quantize,
                        distillation,
                        starts,
                        preference,
                    )

            return run

        total = ShardSum(self._grads.flat, len(losses), self.pool)
        for first in range(0, len(losses), self.threads):
            wave = range(first, min(len(losses), first + self.threads))
            run_all(self.pool, [shard(index, slot) for slot, index in enumerate(wave)])
            total.add(first, [worker.grads.flat for worker in self.workers[: len(wave)]])

    def step(self, tokens: Array, targets: Array, inputs: StepInputs) -> tuple[float, float]:
        """Loss and gradient norm; nothing is updated unless both are finite."""
        if self.adapters:
            return self._adapter_step(self.adapters, tokens, targets, inputs)
        loss = self._reduced_gradients(tokens, targets, inputs)
        squares: dict[int, Array] = {}
        for part in self.comm.gather(self.optimizer.squares(self._grads.flat, self.exchange.mine)):
            squares.update(part)
        norm = norm_of(squares)
        if not self.sharded:
            self.exchange.distribute(self._grads.flat)
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step(self.params.flat, self._grads.flat, inputs.step, inputs.lr_factor, norm)
            if self.sharded:
                self.exchange.distribute(self.params.flat)
        return loss, norm

    def _adapter_step(
        self, adapters: Adapters, tokens: Array, targets: Array, inputs: StepInputs
    ) -> tuple[float, float]:
        """As step; they are small, so every rank updates all of them."""
        loss = self.gradients(tokens, targets, inputs)
        norm = adapters.norm(self._grads)
        if math.isfinite(loss) and math.isfinite(norm):
            adapters.step(self.config, self._grads, inputs.step, inputs.lr_factor, norm)
        return loss, norm

    # ---- validation and checkpoints ----------------------------------------------------------------------------------

    def validation_sums(self, batches: Batches, quantize: bool) -> Array:
        """Spread over the ranks, and in each over its workers."""
        rows = list(batches)
        with together(self.comm):
            mine = rows[self.comm.rank :: self.comm.size]
            part = sums_on_threads(self.workers, self.pool, self.weights(quantize), mine, quantize)
        sums = np.zeros((len(rows), 4))
        for rank, found in enumerate(self.comm.gather(part)):
            sums[rank :: self.comm.size] = found
        return sums

    @property
    def moments_size(self) -> int:
        """Of the adapters, or of the whole arena."""
        return int((self.adapters.values if self.adapters else self.params).flat.size)

    def save_moments(self, m: Array | None, v: Array | None) -> None:
        """Piece by piece, from their owners."""
        if self.adapters:
            if m is not None and v is not None:
                m[...], v[...] = self.adapters.m.flat, self.adapters.v.flat
            return
        for index, out in enumerate((m, v)):
            if self.sharded:
                self.exchange.collect(lambda piece, i=index: self.optimizer.moments(piece)[i], out)  # type: ignore[misc]
            elif out is not None:
                for piece in self.optimizer.pieces:
                    out[piece.start : piece.stop] = self.optimizer.moments(piece)[index]

    def load_moments(self, m: Array, v: Array) -> None:
        """Copies of what this rank keeps."""
        if self.adapters:
            self.adapters.m.flat[...], self.adapters.v.flat[...] = m, v
            return
        self.optimizer.load(m, v)


def cpu_bytes(
    model: ModelConfig,
    config: TrainConfig,
    threads: int,
    ranks: int = 1,
    shard_optimizer: bool = False,
    lora: LoraConfig | None = None,
) -> int:
    """Roughly what a rank holds: a worker for each thread, masters, gradients, int8 values, its moments. With adapters their
    gradients and moments, and once more the matrices that they stand beside."""
    rows = config.batch_size // config.shards
    copies = 2 + (config.quantize != "never")
    worker = activation_bytes(model, rows, config.seq_len, config.recompute, lora)
    moments = 4 * 4 * lora.n_params(model) if lora else state_bytes(model, config, ranks, shard_optimizer)
    return min(threads, max(1, config.shards // ranks)) * worker + copies * 4 * model.n_params() + moments
