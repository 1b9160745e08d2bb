"""The trainer on one GPU: the same steps as :class:`.trainer.Trainer`, every array on the device.

Parameters, moments and gradients are float32 arenas on the device; the host has copies of parameters and moments that
are brought up to date when somebody looks (checkpoints, samples) and go back before the next step. Activations are
bfloat16, or float32 with precision "float32". Steps that simulate int8 and all validation run in float32: rounding to
bfloat16 would change the codes.

A step is one list of launches. The first runs it as it is, which compiles the kernels; then it is recorded into a graph
and started with one call. What changes between steps (learning rates, bias corrections, 1 / targets, seed, and the clip
coefficient, which the device computes itself) lies in the small device array ``knobs``. The only wait is at the end, for
the loss. Updates are skipped on the device when the gradient's norm is not finite, so parameters stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from .arena import Arena, block_matrices, initialize, parameter_shapes
from .checkpoint import TrainingState
from .config import ModelConfig, TrainConfig
from .data import ValidationBatch
from .device import PRECISIONS
from .errors import ConfigError, NotFiniteError
from .model import Array, Distillation, Worker, activation_bytes
from .ops import cuda as ops
from .ops.cuda import adamw, buffers, fake_quant, grad_norm, muon
from .ops.cuda._runtime import DeviceError, runtime
from .optimizer import schedule
from .trainer import StepResult, Trainer, Validation, available_threads, evaluate

NARROW = np.uint16  # bfloat16 bits


class Mirror:
    """An arena on the device and its copy on the host; whoever asks for one gets it up to date."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._device = Arena(shapes, np.float32, ops.zeros)
        self._host = Arena(shapes)
        self._device_is_newer = self._host_may_be_newer = False

    def host(self) -> Arena:
        """The host's copy, which the caller may read and write."""
        if self._device_is_newer:
            self._host.flat[...] = runtime().download(self._device.flat)
            self._device_is_newer = False
        self._host_may_be_newer = True
        return self._host

    def device(self, *, written: bool = False) -> Arena:
        """The device's arena; ``written`` says that the caller changes it."""
        if self._host_may_be_newer:
            runtime().upload(self._host.flat, self._device.flat)
            self._host_may_be_newer = False
        self._device_is_newer = self._device_is_newer or written
        return self._device


class Moments:
    """What checkpoints read and write as ``optimizer.m`` and ``optimizer.v``."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.mirrors = Mirror(shapes), Mirror(shapes)

    @property
    def m(self) -> Arena:
        return self.mirrors[0].host()

    @property
    def v(self) -> Arena:
        return self.mirrors[1].host()


class Weights:
    """Matrices from one arena, norms from another: bfloat16 beside float32."""

    def __init__(self, matrices: Arena, norms: Arena) -> None:
        self.matrices, self.norms = matrices, norms

    def __getitem__(self, name: str) -> Array:
        arena = self.norms if len(self.norms.shapes[name]) == 1 else self.matrices
        return arena[name]


class _Inline(ThreadPoolExecutor):
    """Runs tasks in the calling thread: the device has one stream, and streams belong to threads."""

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(task(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class _Evaluator:
    """A worker that takes and gives host arrays, for :func:`.trainer.evaluate`."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def evaluate(self, params: Any, tokens: Array, targets: Array, quantize: bool) -> Array:
        device = [runtime().upload(np.ascontiguousarray(x, np.int64)) for x in (tokens, targets)]
        with fake_quant.deferred_checks():
            loss = self.worker.evaluate(params, device[0], device[1], quantize)
        result: Array = runtime().download(loss)
        if quantize:
            fake_quant.raise_if_not_finite("validation: an activation is infinite or NaN")
        return result


class CudaTrainer(Trainer):
    """Trainer's interface on a GPU. ``params`` and ``optimizer.m`` and ``.v`` are the host's copies."""

    def __init__(  # the base class would allocate everything on the host
        self,
        model: ModelConfig,
        config: TrainConfig,
        *,
        precision: str = "bf16",
        threads: int | None = None,
        teacher: tuple[ModelConfig, Arena] | None = None,
    ) -> None:
        if config.seq_len > model.max_seq_len:
            raise ConfigError(f"seq_len ({config.seq_len}) exceeds the model's max_seq_len ({model.max_seq_len})")
        if precision not in PRECISIONS:
            raise ConfigError(f"precision is {precision!r}; choose from {PRECISIONS}")
        self.model, self.config, self.precision = model, config, precision
        self._check_memory()
        self.threads = threads or available_threads()
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="pyengine-train")
        shapes = parameter_shapes(model)
        self._masters = Mirror(shapes)
        self.optimizer = Moments(shapes)  # type: ignore[assignment]
        self.quantized = self.params
        self._grads = Arena(shapes, np.float32, ops.zeros)
        self._int8_values: Arena | None = None
        self._narrow: Arena | None = None
        self._rows = config.batch_size // config.shards
        self._worker: tuple[Any, Worker] | None = None
        self._graphs: dict[bool, Callable[[], None]] = {}
        self._tokens = ops.zeros((config.batch_size, config.seq_len), np.int64)
        self._targets = ops.zeros((config.batch_size, config.seq_len), np.int64)
        self._knobs = ops.zeros(adamw.KNOBS, np.float32)
        self._losses = ops.zeros((config.shards, buffers.SUM_BLOCKS), np.float32)
        self._squares = ops.zeros(-(-self._grads.flat.size // grad_norm.BLOCK), np.float32)
        self._device_distillation = self._teach(teacher) if teacher else None
        self.state = TrainingState()

    def _check_memory(self) -> None:
        """Refuse sizes that cannot fit before anything is allocated."""
        c = self.config
        rows = c.batch_size // c.shards
        activations = activation_bytes(self.model, rows, c.seq_len, c.recompute)
        wanted = 4 * 4 * self.model.n_params() + (activations // 2 if self.precision == "bf16" else activations)
        free, total = runtime().memory()
        if wanted > free:
            raise DeviceError(
                f"about {wanted / 2**30:.1f} GiB of GPU memory are needed, {free / 2**30:.1f} of "
                f"{total / 2**30:.1f} are free: use a smaller --batch-size, more --shards, or --recompute block"
            )

    def _teach(self, teacher: tuple[ModelConfig, Arena]) -> Distillation:
        config, host = teacher
        self._check_teacher(config)
        params = Arena(host.shapes, np.float32, ops.zeros)
        runtime().upload(host.flat, params.flat)
        worker = Worker(config, self._rows, self.config.seq_len, training=False, ops=ops)
        return Distillation(worker, params, self.config.distill_alpha, self.config.distill_tau)

    # ---- what the loop and checkpoints look at -------------------------------------------------------------------

    @property
    def params(self) -> Arena:  # type: ignore[override]
        """The float32 masters, on the host."""
        return self._masters.host()

    @property
    def grads(self) -> Arena:  # type: ignore[override]
        """A host copy of the last gradients."""
        host = Arena(self._grads.shapes)
        host.flat[...] = runtime().download(self._grads.flat)
        return host

    @property
    def workers(self) -> list[Worker]:  # type: ignore[override]
        """The one worker, of the current phase."""
        return [self._training_worker(self.config.quantized(self.state.step))]

    def close(self) -> None:
        """Stop the host's threads."""
        self.pool.shutdown()

    def initialize(self) -> None:
        """Fresh parameters from the seed: the CPU's."""
        initialize(self.params, self.model, self.config.seed)

    # ---- one step ------------------------------------------------------------------------------------------------

    def _training_worker(self, quantize: bool) -> Worker:
        """The worker of a phase; the other phase's is dropped with its graph when the types differ."""
        dtype = np.float32 if quantize or self.precision == "float32" else NARROW
        if self._worker is None or self._worker[0] is not dtype:
            self._worker = None
            self._graphs.clear()
            worker = Worker(
                self.model, self._rows, self.config.seq_len, recompute=self.config.recompute, dtype=dtype, ops=ops
            )
            self._worker = dtype, worker
        return self._worker[1]

    def _weights(self, worker: Worker, quantize: bool) -> Any:
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
            adamw.round_stochastic(self._narrow.flat, masters.flat, self._knobs)
            return Weights(self._narrow, masters)
        return masters

    def _launch_gradients(self, quantize: bool, shards: int, accumulate: bool = False) -> None:
        """Gradients of the batch in the device's buffers into self._grads, losses into self._losses."""
        worker = self._training_worker(quantize)
        weights = self._weights(worker, quantize)
        inv = self._knobs[adamw.INV : adamw.INV + 1]
        if not accumulate:
            ops.fill(self._grads.flat, 0)
        for shard in range(shards):
            rows = slice(shard * self._rows, (shard + 1) * self._rows)
            tokens, targets = self._tokens[rows], self._targets[rows]
            worker.gradients(weights, tokens, targets, inv, quantize, self._device_distillation)
            ops.copy(self._losses[shard], buffers.partial_sums(worker.loss))
            ops.add(self._grads.flat, worker.grads.flat)

    def _launch_step(self, quantize: bool) -> None:
        """Everything between the upload of a batch and the download of its loss."""
        with fake_quant.deferred_checks():
            self._launch_gradients(quantize, self.config.shards)
        ops.sum_of_squares(self._squares, self._grads.flat, grad_norm.BLOCK)
        grad_norm.norm_and_clip(self._knobs[: adamw.GRAD_SCALE + 1], self._squares, self.config.clip)
        c, params = self.config, self._masters.device(written=True)
        m, v = (mirror.device(written=True) for mirror in self.optimizer.mirrors)  # type: ignore[attr-defined]
        for name, shape in params.shapes.items():
            ranges = block_matrices(name, self.model) if c.optimizer == "muon" else []
            decay = c.weight_decay if len(shape) > 1 else 0.0
            for first, last in ranges:
                p, g, mean = (a[name][first:last] for a in (params, self._grads, m))
                options = {"momentum": c.muon_momentum, "weight_decay": c.weight_decay}
                muon.muon_update_by_knobs(p, g, mean, self._knobs, **options)
            if not ranges:
                p, g, mean, square = (a[name] for a in (params, self._grads, m, v))
                betas = {"beta1": c.beta1, "beta2": c.beta2, "eps": c.eps}
                adamw.adamw_update_by_knobs(p, g, mean, square, self._knobs, weight_decay=decay, **betas)

    def _upload(self, tokens: Array, targets: Array, inv: float, factor: float = 1.0) -> None:
        """The batch and the step's knobs."""
        c, step, n = self.config, self.state.step, len(tokens)
        device = runtime()
        device.upload(np.ascontiguousarray(tokens, np.int64), self._tokens[:n])
        device.upload(np.ascontiguousarray(targets, np.int64), self._targets[:n])
        knobs = adamw.host_knobs(
            step=step + 1,
            lr=c.lr * factor,
            muon_lr=c.muon_lr * factor,
            beta1=c.beta1,
            beta2=c.beta2,
            inv=inv,
            seed=c.seed * 1_000_003 + step,
        )
        device.upload(knobs, self._knobs)
        self._masters.device()

    def gradients(
        self,
        tokens: Array,
        targets: Array,
        *,
        quantize: bool = False,
        accumulate: bool = False,
        counted: int | None = None,
    ) -> float:
        """As the base class: the mean loss; the gradient into ``grads``."""
        inv = 1.0 / (counted or int((targets >= 0).sum()))
        self._upload(tokens, targets, inv)
        shards = len(tokens) // self._rows
        with fake_quant.deferred_checks():
            self._launch_gradients(quantize, shards, accumulate)
        losses = runtime().download(self._losses[:shards])
        return float(losses.sum(dtype=np.float64)) * inv

    def step(self, tokens: Array, targets: Array) -> StepResult:
        """One optimizer step on one batch. Raises NotFiniteError, with parameters untouched, for a bad loss."""
        step, device = self.state.step, runtime()
        quantize = self.config.quantized(step)
        factor = schedule(self.config, step)
        counted = int((targets >= 0).sum())
        self._upload(tokens, targets, 1.0 / counted, factor)
        self._training_worker(quantize)
        recorded = self._graphs.get(quantize)
        if recorded is None:
            self._launch_step(quantize)
            device.synchronize()
            self._graphs[quantize] = device.record(lambda: self._launch_step(quantize))
        else:
            for mirror in (self._masters, *self.optimizer.mirrors):  # type: ignore[attr-defined]
                mirror.device(written=True)
            recorded()
        loss = float(device.download(self._losses).sum(dtype=np.float64)) / counted
        norm = float(device.download(self._knobs)[adamw.NORM])
        self._raise_if_bad(step, loss, norm, quantize)
        self.state = replace(self.state, step=step + 1, tokens=self.state.tokens + counted)
        return StepResult(loss, norm, factor, quantize)

    def _raise_if_bad(self, step: int, loss: float, norm: float, quantize: bool) -> None:
        """NotFiniteError with the tensors that are not finite."""
        if quantize:
            fake_quant.raise_if_not_finite(f"step {step}: {fake_quant.BAD_WEIGHT}, or an activation is")
        if math.isfinite(loss) and math.isfinite(norm):
            return
        grads = self.grads
        bad = [name for name in grads.shapes if not np.isfinite(grads[name]).all()]
        raise NotFiniteError(
            f"step {step}: loss {loss}, gradient norm {norm}; not finite in the gradients of "
            f"{', '.join(bad[:4]) or 'no tensor'}. Lower the learning rate or warm up longer."
        )

    # ---- validation ----------------------------------------------------------------------------------------------

    def validate(self, batches: Iterable[ValidationBatch], n_bytes: int, quantize: bool = False) -> Validation:
        """Loss and bits per byte over whole documents of n_bytes bytes, in float32."""
        worker = Worker(self.model, self._rows, self.config.seq_len, training=False, ops=ops)
        with fake_quant.deferred_checks():
            weights = self._weights(worker, quantize)
        evaluators: Any = [_Evaluator(worker)]
        return evaluate(evaluators, _Inline(), weights, batches, n_bytes, quantize)
