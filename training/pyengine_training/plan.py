"""What a run will do and cost, printed before its first step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .config import ModelConfig, TrainConfig

if TYPE_CHECKING:
    from .lora import LoraConfig


@dataclass(frozen=True)
class Plan:
    """Numbers of a run. Bytes and seconds are estimates."""

    parameters: int
    frozen_bytes: int
    steps: int
    tokens: int
    epochs: list[float]
    memory_bytes: int | None
    flops: float
    seconds: float | None
    threads: int
    adapters: int  # parameters that are trained instead of the model's; 0: none

    def lines(self, model: ModelConfig, config: TrainConfig) -> list[str]:
        """For people."""
        m = model
        shape = f"{m.n_layers} layers, dim {m.dim}, heads {m.n_heads}/{m.n_kv_heads} x {m.head_dim}"
        memory = "unknown here" if self.memory_bytes is None else f"about {self.memory_bytes / 2**20:.0f} MiB"
        time = "unknown until steps have run"
        if self.seconds is not None:
            time = f"about {format_seconds(self.seconds)} on {self.threads} threads"
        epochs = ", ".join(f"{e:.2f}" for e in self.epochs)
        quantized = {"never": "never", "always": "all steps", "decay": "during the decay"}[config.quantize]
        if 0 < config.quantized_steps < config.decay_steps:
            quantized = f"in the last {config.quantized_steps:,} steps"
        optimizer = "adamw" if self.adapters else config.optimizer
        trained = f", of adapters {self.adapters:,}, which alone are trained" if self.adapters else ""
        return [
            f"model       {shape}, hidden {m.hidden_dim}, vocabulary {m.vocab_size}",
            f"parameters  {self.parameters:,} (about {self.frozen_bytes / 1e6:.1f} MB frozen){trained}",
            f"steps       {self.steps:,} of {config.batch_size} x {config.seq_len} tokens: "
            f"{config.warmup_steps} warmup, {config.decay_steps} decay ({config.decay_shape})",
            f"tokens      {self.tokens:,} ({epochs} epochs)",
            f"optimizer   {optimizer}, int8 simulated: {quantized}",
            f"memory      {memory}",
            f"compute     {self.flops:.3g} FLOP",
            f"time        {time}",
        ]


def make_plan(
    model: ModelConfig,
    config: TrainConfig,
    epochs: list[float],
    threads: int,
    seconds_per_step: float | None,
    memory_bytes: int | None,
    lora: LoraConfig | None = None,
) -> Plan:
    """Estimate."""
    tokens = config.steps * config.batch_size * config.seq_len
    n = model.n_params()
    return Plan(
        parameters=n,
        frozen_bytes=int(n * (1 + 2 / 64)),
        steps=config.steps,
        tokens=tokens,
        epochs=epochs,
        memory_bytes=memory_bytes,
        flops=model.flops_per_token(config.seq_len, adapters=lora is not None) * tokens,
        seconds=None if seconds_per_step is None else seconds_per_step * config.steps,
        threads=threads,
        adapters=lora.n_params(model) if lora else 0,
    )


HELD_OUT_SHARE, HELD_OUT_TOKENS = 0.01, 20_000  # less than these says little
EPOCHS = 4  # passes over a text that are nearly as good as new text


def warnings(epochs: list[float], held_out: int, tokens: int) -> list[str]:
    """What a run's numbers will not tell, or will not gain. held_out of tokens: of the text that validation uses."""
    found = []
    if held_out < HELD_OUT_TOKENS or held_out < HELD_OUT_SHARE * tokens:
        found.append(
            f"warning: {held_out:,} of {tokens:,} tokens are held out: validation of so few says little "
            f"(at least {HELD_OUT_TOKENS:,} and {HELD_OUT_SHARE:.0%} say more)"
        )
    if max(epochs) > EPOCHS:
        found.append(
            f"warning: {max(epochs):.1f} passes over a text: beyond {EPOCHS} a model learns little but the text"
        )
    return found


STEPS = 500  # that a short run should have, of so many tokens at least: measured at 1 million tokens (docs/training.md)
LEAST_TOKENS = 2048


def batch_rows(tokens: float, seq_len: int) -> int:
    """Rows of a step, a power of two, that suit a run of so many tokens."""
    wanted = max(LEAST_TOKENS, int(tokens) // STEPS)
    return 1 << (max(1, wanted // seq_len).bit_length() - 1)


def batch_hint(config: TrainConfig) -> list[str]:
    """Where a run has few large steps, what would teach it more from the same text."""
    every = config.batch_size * config.seq_len
    rows = batch_rows(config.steps * every, config.seq_len)
    if config.batch_size < 2 * rows:
        return []
    again = (
        f"--batch-size {rows} --shards {min(rows, config.shards)} --steps {config.steps * config.batch_size // rows}"
    )
    return [
        f"hint: {config.steps:,} steps of {every:,} tokens: so short a run learns more in smaller steps "
        f"(as many tokens: {again})"
    ]


BLAS_SHARE = 0.55  # of a large matrix product's rate is what whole steps reach, typically


def estimated_step_seconds(
    model: ModelConfig, config: TrainConfig, threads: int, lora: LoraConfig | None = None
) -> float:
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
    return model.flops_per_token(config.seq_len, adapters=lora is not None) * tokens / rate


def format_seconds(seconds: float) -> str:
    """1:02:03, 4:05, or 12 s."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
