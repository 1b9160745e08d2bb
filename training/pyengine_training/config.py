"""Sizes of the model and knobs of the run, checked once and stored beside every checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases.

    qk_norm: RMSNorm of each q and k head before RoPE, which makes it a Qwen3.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_embeddings: bool = True
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden_dim < 1 or self.max_seq_len < 1:
            raise ConfigError("hidden_dim and max_seq_len must be at least 1")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_kv_heads ({self.n_kv_heads}) does not divide n_heads ({self.n_heads})")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim ({self.head_dim}) is odd; RoPE rotates pairs")
        for name in ("norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be a positive number")

    @property
    def q_dim(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def n_rep(self) -> int:
        return self.n_heads // self.n_kv_heads

    def matrix_params(self) -> int:
        """Parameters of the blocks' matrices, all layers."""
        qkvo = (2 * self.q_dim + 2 * self.kv_dim) * self.dim
        return self.n_layers * (qkvo + 3 * self.hidden_dim * self.dim)

    def n_params(self) -> int:
        """All parameters; a tied embedding counts once."""
        tables = 1 if self.tie_embeddings else 2
        norms = (2 * self.n_layers + 1) * self.dim + (2 * self.n_layers * self.head_dim if self.qk_norm else 0)
        return self.matrix_params() + tables * self.vocab_size * self.dim + norms

    def flops_per_token(self, seq_len: int, *, training: bool = True, adapters: bool = False) -> float:
        """Multiply-adds counted as two: 2 per matrix weight, the output layer included, plus attention over half of seq_len
        keys on average. In training 6, and 4 where adapters take the weights' gradients.
        """
        products = self.matrix_params() + self.vocab_size * self.dim
        attention = self.n_layers * 2 * self.q_dim * (seq_len / 2)
        return (2.0 if not training else 4.0 if adapters else 6.0) * (products + attention)


# --depth d: dim = 64 d, head_dim 64, d heads, two query heads to a key where d is even
DEPTH_WIDTH = 64


def model_from_depth(depth: int, vocab_size: int, max_seq_len: int) -> ModelConfig:
    """The one dial: depth d gives d layers of width 64 d."""
    if depth < 1:
        raise ConfigError(f"depth is {depth}; it must be at least 1")
    dim = DEPTH_WIDTH * depth
    return ModelConfig(
        vocab_size=vocab_size,
        dim=dim,
        n_layers=depth,
        n_heads=depth,
        n_kv_heads=depth // 2 if depth % 2 == 0 else depth,
        head_dim=64,
        hidden_dim=-(-8 * dim // 3 // 64) * 64,
        max_seq_len=max_seq_len,
    )


CHOICES = {
    "optimizer": ("muon", "adamw"),
    "decay_shape": ("linear", "cosine"),
    "quantize": ("never", "decay", "always"),
    "recompute": ("none", "activations", "block"),
    "attention": ("row", "document"),
    "packing": ("restart", "best-fit"),
}


LEAST = sys.float_info.min  # positive
LEAST_FLOAT32 = 2.0**-126  # likewise: of what is divided by in float32
BELOW_ONE = math.nextafter(1, 0)
# names of TrainConfig's fields, lowest and highest value, what a value must do
RANGES: list[tuple[tuple[str, ...], float, float, str]] = [
    (("warmup_fraction", "decay_fraction", "quantize_fraction", "distill_alpha"), 0, 1, "lie in [0, 1]"),
    (("beta1", "beta2", "muon_momentum"), 0, BELOW_ONE, "lie in [0, 1)"),
    (("lr", "muon_lr", "dpo_beta"), LEAST, sys.float_info.max, "be positive"),
    (("eps", "distill_tau"), LEAST_FLOAT32, sys.float_info.max, "be at least 1.2e-38, which float32 still divides by"),
    (("weight_decay", "clip", "checkpoint_minutes"), 0, sys.float_info.max, "be at least 0"),
    (("eval_every", "sample_every", "checkpoint_every", "keep_checkpoints"), 0, math.inf, "be at least 0"),
    (("eval_documents", "sample_tokens"), 1, math.inf, "be at least 1"),
    (("seed",), 0, (1 << 63) - 1, "lie in 0..2^63 - 1"),
]


@dataclass(frozen=True)
class TrainConfig:
    """Every knob of a run. Learning rates are peaks; fractions are of ``steps``."""

    seq_len: int = 512
    batch_size: int = 16  # rows a step
    shards: int = 4  # parts the batch is cut into; one gradient sum order for any thread count
    steps: int = 1000
    optimizer: str = "muon"  # "muon" (blocks' matrices; AdamW for the rest) or "adamw"
    lr: float = 0.01  # AdamW, beside Muon
    muon_lr: float = 0.015
    muon_momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.99  # batches are small: 0.95 forgets a square after 20 of them
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.8
    decay_shape: str = "linear"  # or "cosine"
    quantize: str = "decay"  # fake-quantize "never", in the "decay" phase, or "always"
    quantize_fraction: float = 0.1  # of "decay": the last part of the steps alone, at most the decay; 0: all of it
    recompute: str = "none"  # or "activations", "block"
    packing: str = "best-fit"  # or "restart": how documents are laid into rows
    attention: str = "document"  # documents that share a row do not see each other; or "row"
    seed: int = 1
    eval_every: int = 200
    eval_documents: int = 200
    sample_every: int = 500
    sample_prompt: str = "Once upon a time"
    sample_tokens: int = 80
    checkpoint_every: int = 200
    checkpoint_minutes: float = 0.0  # instead of checkpoint_every, where it is not 0
    keep_checkpoints: int = 3
    distill_alpha: float = 0.0
    distill_tau: float = 2.0
    dpo_beta: float = 0.1  # where the text is pairs of answers
    data_weights: tuple[float, ...] = (1.0,)
    decay_data_weights: tuple[float, ...] = ()  # empty: as before the decay
    # provenance: command line, budget, parent checkpoint
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.shards < 1 or self.steps < 1 or self.seq_len < 2:
            raise ConfigError("batch_size, shards and steps must be at least 1, seq_len at least 2")
        if self.shards & (self.shards - 1):
            raise ConfigError(f"shards is {self.shards}; it must be a power of two: their sum is a binary tree")
        if self.batch_size % self.shards:
            raise ConfigError(f"shards ({self.shards}) does not divide batch_size ({self.batch_size})")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose from {allowed}")
        for names, low, high, words in RANGES:
            for name in names:
                if not low <= getattr(self, name) <= high:
                    raise ConfigError(f"{name} is {getattr(self, name)}; it must {words}")
        if self.warmup_fraction + self.decay_fraction > 1:
            raise ConfigError(
                f"warmup_fraction ({self.warmup_fraction}) and decay_fraction ({self.decay_fraction}) exceed 1 together"
            )

    @property
    def warmup_steps(self) -> int:
        return round(self.steps * self.warmup_fraction)

    @property
    def decay_steps(self) -> int:
        return round(self.steps * self.decay_fraction)

    @property
    def decay_start(self) -> int:
        """First step (from 0) of the decay."""
        return self.steps - self.decay_steps

    def quantized(self, step: int) -> bool:
        """Whether step (from 0) trains with fake-quantization."""
        return step >= self.steps - self.quantized_steps

    @property
    def quantized_steps(self) -> int:
        """How many of the last steps train with fake-quantization."""
        last = self.decay_steps
        if self.quantize_fraction:  # however small: 0 steps would be "never"
            last = min(last, max(1, round(self.steps * self.quantize_fraction)))
        return {"never": 0, "decay": last, "always": self.steps}[self.quantize]


def to_json(config: ModelConfig | TrainConfig) -> dict[str, Any]:
    """A dict that :func:`from_json` reads back."""
    return dataclasses.asdict(config)


def stored(values: dict[str, Any]) -> dict[str, Any]:
    """A TrainConfig as run.json or state.json have it; knobs that it was written without were what they are here."""
    return {"packing": "restart", "attention": "row", "quantize_fraction": 0.0, **values}


def train_config_from_json(values: dict[str, Any]) -> TrainConfig:
    """Build from a dict (a run folder's or a user's file); an unknown key is an error."""
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"unknown training option(s) {', '.join(unknown)}")
    types = {f.name: str(f.type) for f in dataclasses.fields(TrainConfig)}
    return TrainConfig(**{name: _typed(name, value, types[name]) for name, value in values.items()})


def _typed(name: str, value: Any, kind: str) -> Any:
    """A value as its field's type. Raises ConfigError."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "int" and number and isinstance(value, int):
        return value
    if kind == "float" and number and math.isfinite(value):
        return float(value)
    if kind == "str" and isinstance(value, str):
        return value
    if kind.startswith("tuple") and isinstance(value, list | tuple):
        return tuple(_typed(name, w, "float") for w in value)
    if kind.startswith("dict") and isinstance(value, dict):
        return value
    expected = {"int": "an integer", "float": "a finite number", "str": "a text"}.get(kind, "a list of numbers")
    raise ConfigError(f"{name} is {value!r}; expected {expected}")


def model_config_from_json(values: dict[str, Any]) -> ModelConfig:
    """Build from a dict; missing or unknown keys are errors."""
    try:
        return ModelConfig(**values)
    except TypeError as error:
        raise ConfigError(f"model config: {error}") from error


def load_options(path: Path) -> dict[str, Any]:
    """Options of a JSON or TOML file, as a flat dict."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        if path.suffix == ".toml":
            try:
                import tomllib
            except ImportError as error:  # Python 3.10
                raise ConfigError(f"{path}: TOML needs Python 3.11; use JSON") from error
            values: Any = tomllib.loads(text)
        else:
            values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a table of options")
    return values
