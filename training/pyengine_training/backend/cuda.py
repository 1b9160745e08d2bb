"""Training on one GPU: the CPU's list of operations, every array on the device.

Parameters, moments and gradients are float32 arenas on the device; the host has copies of parameters and moments that
are brought up to date when somebody looks (checkpoints, samples) and go back before the next step. Activations are
bfloat16, or float32 with precision "float32". Steps that simulate int8 and all validation run in float32: rounding to
bfloat16 would change the codes. With precision "bf16" the products of such steps may use TF32; validation never does.

A step is one list of launches. The first runs it as it is, which compiles the kernels; then it is recorded into a graph
and started with one call. What changes between steps (learning rates, bias corrections, 1 / targets, and the clip
coefficient, which the device computes itself) lies in the small device array ``knobs``. The only wait is at the end, for
the loss. Updates are skipped on the device when the gradient's norm is not finite, so parameters stay as they were.

Several ranks have a GPU each (:mod:`.cuda_ranks`). A rank's shards are summed on its device by the tree of :mod:`..ranks`,
the ranks' sums by its upper levels; two lists are recorded then, with the exchange between. Every rank updates everything, or
with a sharded optimizer its units (:mod:`.cuda_optimizer`), and then all get the parameters. They all have the whole gradient
in either case: its norm is added up in one order, whoever owns what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from ..arena import Arena, parameter_shapes
from ..comm import ALONE, Comm, PaperComm, together
from ..config import ModelConfig, TrainConfig
from ..data import ValidationBatch
from ..distill import Distillation, check_teacher
from ..errors import ConfigError
from ..lora import Adapters
from ..model import Array, Worker, fake_quantize_parameters
from ..ops import cuda as ops
from ..ops.cuda import adamw, buffers, fake_quant, grad_norm
from ..ops.cuda._counting import CountingRuntime
from ..ops.cuda._runtime import DeviceError, runtime, use_runtime
from ..ranks import Exchange, check_ranks, slices, trailing_ones
from ..threads import available_threads, run_all
from ..validation import batch_sums
from . import StepInputs
from .cuda_optimizer import CudaOptimizer

NARROW = np.uint16  # bfloat16 bits
MESSAGE = 1 << 21  # elements of the gradient that a rank adds up at once; twice as many of each other rank are held


class Mirror:
    """An arena on the device and its copy on the host; whoever asks for one gets it up to date."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._device = Arena(shapes, np.float32, ops.zeros)
        self._host: Arena | None = None
        self._device_is_newer = self._host_may_be_newer = False

    def host(self) -> Arena:
        """The host's copy, which the caller may read and write."""
        if self._host is None:
            self._host = Arena(self._device.shapes)
        if self._device_is_newer:
            self._host.flat[...] = runtime().download(self._device.flat)
            self._device_is_newer = False
        self._host_may_be_newer = True
        return self._host

    def device(self, *, written: bool = False) -> Arena:
        """The device's arena; ``written`` says that the caller changes it."""
        if self._host is not None and self._host_may_be_newer:
            runtime().upload(self._host.flat, self._device.flat)
            self._host_may_be_newer = False
        self._device_is_newer = self._device_is_newer or written
        return self._device


class Weights:
    """Matrices from one arena, norms from another: bfloat16 beside float32."""

    def __init__(self, matrices: Arena, norms: Arena) -> None:
        self.matrices, self.norms = matrices, norms

    def __getitem__(self, name: str) -> Array:
        arena = self.norms if len(self.norms.shapes[name]) == 1 else self.matrices
        return arena[name]


class CudaBackend:
    """:class:`.Backend` on a GPU."""

    adapters: Adapters | None = None

    def __init__(
        self,
        model: ModelConfig,
        config: TrainConfig,
        *,
        precision: str = "bf16",
        threads: int | None = None,
        teacher: tuple[ModelConfig, Arena] | None = None,
        comm: Comm = ALONE,
        shard_optimizer: bool = False,
    ) -> None:
        self.model, self.config, self.precision, self.comm = model, config, precision, comm
        check_ranks(comm.size, config)
        self.shard_rows = config.batch_size // config.shards
        self._n_shards = config.shards // comm.size  # of this rank
        self.threads = threads or comm.threads or available_threads()
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="pyengine-train")
        shapes = parameter_shapes(model)
        self._masters = Mirror(shapes)
        self._grads = Arena(shapes, np.float32, ops.zeros)
        flat = self._grads.flat
        self._levels = [ops.empty(flat.shape, np.float32) for _ in range(trailing_ones(self._n_shards - 1) - 1)]
        self._levels.append(flat)  # the highest is free until the last shard
        self.sharded = shard_optimizer and comm.size > 1
        products = NARROW if precision == "bf16" else np.float32
        share = MESSAGE if self.sharded else None
        self.optimizer = CudaOptimizer(self._grads, model, config, comm, products, share)
        pieces = self.optimizer.pieces(MESSAGE) if self.sharded else (slices(flat.size, MESSAGE),)
        self.exchange = Exchange(comm, *pieces, empty=ops.empty, add=ops.add)
        self._int8_values: Arena | None = None
        self._narrow: Arena | None = None
        self._host_int8_values: Arena | None = None
        self._worker: tuple[Any, Worker] | None = None
        self._graphs: dict[bool, list[Callable[[], None]]] = {}
        rows = self._n_shards * self.shard_rows, config.seq_len
        self._tokens, self._targets, self._starts = (ops.zeros(rows, np.int64) for _ in range(3))
        self._knobs = ops.zeros(adamw.KNOBS, np.float32)
        self._losses = ops.zeros((self._n_shards, buffers.SUM_BLOCKS), np.float32)
        self._squares = ops.zeros(-(-self._grads.flat.size // grad_norm.BLOCK), np.float32)
        self._distillation = self._teach(teacher) if teacher else None

    def _teach(self, teacher: tuple[ModelConfig, Arena]) -> Distillation:
        config, host = teacher
        check_teacher(config, self.model, self.config.seq_len)
        params = Arena(host.shapes, np.float32, ops.zeros)
        runtime().upload(host.flat, params.flat)
        worker = Worker(config, self.shard_rows, self.config.seq_len, training=False, ops=ops)
        return Distillation(worker, params, self.config)

    # ---- what the loop and checkpoints look at -----------------------------------------------------------------------

    @property
    def params(self) -> Arena:
        """The float32 masters, on the host."""
        return self._masters.host()

    @property
    def grads(self) -> Arena:
        """A host copy of the last gradients."""
        host = Arena(self._grads.shapes)
        host.flat[...] = runtime().download(self._grads.flat)
        return host

    def weights(self, quantize: bool) -> Arena:
        """The masters, or the values that their int8 codes stand for, on the host."""
        params = self.params
        if not quantize:
            return params
        self._host_int8_values = values = self._host_int8_values or params.like()
        run_all(
            self.pool, [lambda name=name: fake_quantize_parameters(values, params, [name]) for name in params.shapes]
        )
        return values

    @property
    def moments_size(self) -> int:
        """Of the whole arena."""
        return int(self._grads.flat.size)

    def save_moments(self, m: Array | None, v: Array | None) -> None:
        """From the ranks that keep them."""
        self.optimizer.save(m, v)

    def load_moments(self, m: Array, v: Array) -> None:
        """Copies of what this rank keeps."""
        self.optimizer.load(m, v)

    def close(self) -> None:
        """Stop the host's threads, and forget the graphs: where steps are not recorded they are this back end's own methods, and
        its arrays would not go with its last reference."""
        self.pool.shutdown()
        self._graphs.clear()

    # ---- one step ----------------------------------------------------------------------------------------------------

    def training_worker(self, quantize: bool) -> Worker:
        """The worker of a phase; the other phase's is dropped with its graph when the types differ."""
        dtype = np.float32 if quantize or self.precision == "float32" else NARROW
        if self._worker is None or self._worker[0] is not dtype:
            self._worker = None
            self._graphs.clear()
            size = self.shard_rows, self.config.seq_len
            self._worker = dtype, Worker(self.model, *size, recompute=self.config.recompute, dtype=dtype, ops=ops)
        return self._worker[1]

    def _device_weights(self, worker: Worker, quantize: bool) -> Any:
        """What products see: the values of the int8 codes, the masters rounded to bfloat16, or the masters."""
        masters = self._masters.device()
        if quantize:
            self._int8_values = self._int8_values or masters.like()
            for name, view in masters.shapes.items():
                if len(view) > 1:
                    ops.fake_quant_weights(self._int8_values[name], masters[name])
            return Weights(self._int8_values, masters)
        if worker.dtype is NARROW:
            self._narrow = self._narrow or Arena(masters.shapes, NARROW, ops.zeros)
            ops.copy(self._narrow.flat, masters.flat)  # to nearest: the masters lose nothing that noise could save
            return Weights(self._narrow, masters)
        return masters

    def _launch_gradients(self, quantize: bool, shards: int) -> None:
        """The sum of this rank's gradients, of the batch in the device's buffers, into self._grads; losses into self._losses.

        By the tree: a binary counter, as :class:`..ranks.ShardSum`.
        """
        with fake_quant.deferred_checks(), runtime().tensor_floats(self.precision == "bf16"):
            worker = self.training_worker(quantize)
            weights = self._device_weights(worker, quantize)
            inv = self._knobs[adamw.INV : adamw.INV + 1]
            for shard in range(shards):
                rows = slice(shard * self.shard_rows, (shard + 1) * self.shard_rows)
                tokens, targets = self._tokens[rows], self._targets[rows]
                worker.gradients(weights, tokens, targets, inv, quantize, self._distillation, self._starts[rows])
                ops.copy(self._losses[shard], buffers.partial_sums(worker.loss))
                level, gradient = trailing_ones(shard), worker.grads.flat
                for below in self._levels[:level]:
                    ops.add(gradient, below)
                ops.copy(self._grads.flat if shard + 1 == shards else self._levels[level], gradient)

    def _add_up_ranks(self) -> None:
        """self._grads = the sum of all ranks', on every rank."""
        self.exchange.reduce(self._grads.flat)
        self.exchange.distribute(self._grads.flat)

    def _launch_update(self) -> None:
        """Norm, clipping and the update, from self._grads."""
        ops.sum_of_squares(self._squares, self._grads.flat, grad_norm.BLOCK)
        grad_norm.norm_and_clip(self._knobs[: adamw.GRAD_SCALE + 1], self._squares, self.config.clip)
        self.optimizer.launch(self._masters.device(written=True).flat, self._grads.flat, self._knobs)

    def _upload(self, tokens: Array, targets: Array, inputs: StepInputs) -> None:
        """This rank's rows of the batch, and the step's knobs."""
        c, n = self.config, len(tokens) // self.comm.size
        rows = slice(self.comm.rank * n, (self.comm.rank + 1) * n)
        if inputs.preference is not None:
            raise ConfigError("--device cuda does not learn from preferences; --device cpu does")
        if inputs.soft is not None:
            raise ConfigError(
                "--device cuda does not read a teacher's cache; without --teacher-cache it runs the teacher"
            )
        device = runtime()
        device.upload(np.ascontiguousarray(tokens[rows], np.int64), self._tokens[:n])
        device.upload(np.ascontiguousarray(targets[rows], np.int64), self._targets[:n])
        if inputs.starts is None:  # every position sees its whole row, also after a batch of documents
            ops.fill(self._starts, 0)
        else:
            device.upload(np.ascontiguousarray(inputs.starts[rows], np.int64), self._starts[:n])
        knobs = adamw.host_knobs(
            step=inputs.step + 1,
            lr=c.lr * inputs.lr_factor,
            muon_lr=c.muon_lr * inputs.lr_factor,
            beta1=c.beta1,
            beta2=c.beta2,
            inv=1.0 / inputs.counted,
        )
        device.upload(knobs, self._knobs)
        self._masters.device()

    def gradients(self, tokens: Array, targets: Array, inputs: StepInputs) -> float:
        """Mean loss; its gradient into ``grads``."""
        self._upload(tokens, targets, inputs)
        shards = len(tokens) // self.shard_rows // self.comm.size
        self._launch_gradients(inputs.quantize, shards)
        self._add_up_ranks()
        return self._loss(shards, inputs)

    def _loss(self, shards: int, inputs: StepInputs) -> float:
        """Mean over the counted targets of all ranks, whose first ``shards`` losses are on their devices."""
        losses = runtime().download(self._losses[:shards]).sum(axis=1, dtype=np.float64)
        return math.fsum(loss for part in self.comm.gather(losses.tolist()) for loss in part) / inputs.counted

    def _parts(self, quantize: bool) -> list[Callable[[], None]]:
        """What a step launches, in parts of which each is recorded; between them the ranks add up their gradients."""
        gradients = partial(self._launch_gradients, quantize, self._n_shards)
        if self.comm.size > 1:
            return [gradients, self._launch_update]

        def step() -> None:
            gradients()
            self._launch_update()

        return [step]

    def _run(self, parts: list[Callable[[], None]]) -> None:
        for number, part in enumerate(parts):
            if number:
                self._add_up_ranks()
            part()
        if self.sharded:
            self.exchange.distribute(self._masters.device(written=True).flat)

    def step(self, tokens: Array, targets: Array, inputs: StepInputs) -> tuple[float, float]:
        """Loss and gradient norm; the device updates nothing unless the norm is finite."""
        device, quantize = runtime(), inputs.quantize
        self._upload(tokens, targets, inputs)
        self.training_worker(quantize)
        recorded = self._graphs.get(quantize)
        if recorded is None:
            self._run(self._parts(quantize))
            device.synchronize()
            self._graphs[quantize] = [device.record(part) for part in self._parts(quantize)]
        else:
            self._masters.device(written=True)
            self._run(recorded)
        loss = self._loss(self._n_shards, inputs)
        norm = float(device.download(self._knobs)[adamw.NORM])
        if quantize:
            with together(self.comm):
                fake_quant.raise_if_not_finite(f"{fake_quant.BAD_WEIGHT}, or an activation is")
        return loss, norm

    # ---- validation --------------------------------------------------------------------------------------------------

    def validation_sums(self, batches: Iterable[ValidationBatch], quantize: bool) -> Array:
        """Spread over the ranks, on each one batch after another; in float32."""
        rows = list(batches)
        with together(self.comm):
            part = self._validation_sums(rows[self.comm.rank :: self.comm.size], quantize)
        sums = np.zeros((len(rows), 4))
        for rank, found in enumerate(self.comm.gather(part)):
            sums[rank :: self.comm.size] = found
        return sums

    def _validation_sums(self, batches: list[Any], quantize: bool) -> Array:
        device = runtime()
        worker = Worker(self.model, self.shard_rows, self.config.seq_len, training=False, ops=ops)
        with fake_quant.deferred_checks():
            weights = self._device_weights(worker, quantize)
        sums = []
        for batch in batches:
            tokens, targets = (device.upload(np.ascontiguousarray(x, np.int64)) for x in (batch.tokens, batch.targets))
            with fake_quant.deferred_checks():
                loss = worker.evaluate(weights, tokens, targets, quantize)
            sums.append(batch_sums(device.download(loss), batch))
            if quantize:
                fake_quant.raise_if_not_finite("validation: an activation is infinite or NaN")
        return np.asarray(sums, np.float64).reshape(-1, 4)


# ---- memory ------------------------------------------------------------------------------------------------------


def device_bytes(
    model: ModelConfig,
    config: TrainConfig,
    precision: str,
    teacher: tuple[ModelConfig, Arena] | None = None,
    ranks: int = 1,
    shard_optimizer: bool = False,
    rank: int = 0,
) -> int:
    """Most bytes of GPU memory that a rank holds at once: trunk, int8 steps and validation are gone through, not run.

    rank: which; with a sharded optimizer they hold not quite the same.
    """
    rows = config.batch_size, config.seq_len
    tokens = np.zeros(rows, np.int64)
    part = tokens[: config.batch_size // config.shards]
    batches = [ValidationBatch(part, part, part == 0, part[:, 0])] * ranks
    phases = {"never": (False,), "always": (True,), "decay": (False, True)}[config.quantize]
    with use_runtime(CountingRuntime()) as counter:
        comm = PaperComm(ranks, rank) if ranks > 1 else ALONE
        more: dict[str, Any] = {"teacher": teacher, "comm": comm, "shard_optimizer": shard_optimizer}
        backend = CudaBackend(model, config, precision=precision, threads=1, **more)
        for quantize in phases:
            backend.step(tokens, tokens, StepInputs(0, tokens.size, quantize))
            backend.validation_sums(batches, quantize)
        if config.quantize != "never":  # the end of a run validates in both arithmetics
            backend.validation_sums(batches, False)
        backend.close()
        return int(counter.peak)


def check_memory(
    model: ModelConfig,
    config: TrainConfig,
    precision: str,
    teacher: tuple[ModelConfig, Arena] | None = None,
    ranks: int = 1,
    shard_optimizer: bool = False,
    rank: int = 0,
) -> None:
    """Raise DeviceError, before anything is allocated, for sizes that cannot fit."""
    wanted = device_bytes(model, config, precision, teacher, ranks, shard_optimizer, rank)
    free, total = runtime().memory()
    if wanted > free:
        raise DeviceError(
            f"{wanted / 2**30:.2f} GiB of GPU memory are needed, {free / 2**30:.2f} of "
            f"{total / 2**30:.2f} are free: use a smaller --batch-size, more --shards, or --recompute block"
        )
