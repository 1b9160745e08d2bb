"""What a run will do and cost, printed before its first step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from .config import ModelConfig, TrainConfig


@dataclass(frozen=True)
class Plan:
    """Numbers of a run. Bytes and seconds are estimates."""

    parameters: int
    frozen_bytes: int
    steps: int
    tokens: int
    epochs: list[float]
    memory_bytes: int
    flops: float
    seconds: float | None
    threads: int

    def lines(self, model: ModelConfig, config: TrainConfig) -> list[str]:
        """For people."""
        m = model
        shape = f"{m.n_layers} layers, dim {m.dim}, heads {m.n_heads}/{m.n_kv_heads} x {m.head_dim}"
        duration = "unknown" if self.seconds is None else format_seconds(self.seconds)
        epochs = ", ".join(f"{e:.2f}" for e in self.epochs)
        quantized = {"never": "never", "always": "all steps", "decay": "during the decay"}
        return [
            f"model       {shape}, hidden {m.hidden_dim}, vocabulary {m.vocab_size}",
            f"parameters  {self.parameters:,} (about {self.frozen_bytes / 1e6:.1f} MB frozen)",
            f"steps       {self.steps:,} of {config.batch_size} x {config.seq_len} tokens: "
            f"{config.warmup_steps} warmup, {config.decay_steps} decay ({config.decay_shape})",
            f"tokens      {self.tokens:,} ({epochs} epochs)",
            f"optimizer   {config.optimizer}, int8 simulated: {quantized[config.quantize]}",
            f"memory      about {self.memory_bytes / 2**20:.0f} MiB",
            f"compute     {self.flops:.3g} FLOP",
            f"time        about {duration} on {self.threads} threads",
        ]


def make_plan(
    model: ModelConfig,
    config: TrainConfig,
    epochs: list[float],
    threads: int,
    seconds_per_step: float | None,
) -> Plan:
    """Estimate."""
    from .model import activation_bytes  # brings numba, which the rest of this module does without

    tokens = config.steps * config.batch_size * config.seq_len
    rows = config.batch_size // config.shards
    worker = activation_bytes(model, rows, config.seq_len, config.recompute)
    copies = 4 + (config.quantize != "never")  # masters, gradients, two moments, int8 values
    n = model.n_params()
    return Plan(
        parameters=n,
        frozen_bytes=int(n * (1 + 2 / 64)),
        steps=config.steps,
        tokens=tokens,
        epochs=epochs,
        memory_bytes=threads * worker + copies * 4 * n,
        flops=model.flops_per_token(config.seq_len) * tokens,
        seconds=None if seconds_per_step is None else seconds_per_step * config.steps,
        threads=threads,
    )


BLAS_SHARE = 0.55  # of a large matrix product's rate is what whole steps reach, typically


def estimated_step_seconds(model: ModelConfig, config: TrainConfig, threads: int) -> float:
    """Seconds of a step, from a short matrix product on one thread: a first guess, a third off now and then."""
    from .threads import single_threaded_blas

    a = np.ones((512, 512), np.float32)
    out = np.empty_like(a)
    with single_threaded_blas():
        np.matmul(a, a, out=out)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            np.matmul(a, a, out=out)
            times.append(time.perf_counter() - began)
    rate = 2 * 512**3 / min(times) * threads * BLAS_SHARE
    tokens = config.batch_size * config.seq_len
    return model.flops_per_token(config.seq_len) * tokens / rate


def format_seconds(seconds: float) -> str:
    """1:02:03, 4:05, or 12 s."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
