"""The rider ``config.json``: the shape of a model (csrc/FORMAT.md, section 2)."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ModelFormatError
from .strict_json import parse_json_object

MAX_DIM = 1 << 20
MAX_LAYERS = 4096
MAX_POSITIONS = 1 << 24  # above it, positions are no longer exact in float32

_INT_RANGES = {
    "dim": (1, MAX_DIM),
    "hidden_dim": (1, MAX_DIM),
    "n_layers": (1, MAX_LAYERS),
    "n_heads": (1, 65_536),
    "n_kv_heads": (1, 65_536),
    "head_dim": (2, 512),
    "vocab_size": (1, 1 << 24),
    "max_seq_len": (1, MAX_POSITIONS),
    "sliding_window": (0, MAX_POSITIONS),
}
_FLAGS = ("tie_embeddings", "qkv_bias", "o_bias", "qk_norm")
_MAX_EOS_TOKENS = 256


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ModelFormatError(f"config: {name} must be an integer in {low}..{high}, not {value!r:.80}")


@dataclass(frozen=True)
class FrozenConfig:
    """The shape of a model, as in the rider ``config.json``. Every field is checked on
    construction.

    ``sliding_window`` 0 means none; lengths are in positions, ``norm_eps`` is added to a mean
    square.
    """

    architecture: str
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float
    sliding_window: int
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, str) or not 1 <= len(self.architecture) <= 256:
            raise ModelFormatError("config: architecture must be a string of 1..256 characters")
        for name, (low, high) in _INT_RANGES.items():
            _check_int(name, getattr(self, name), low, high)
        for name in _FLAGS:
            if type(getattr(self, name)) is not bool:
                raise ModelFormatError(f"config: {name} must be true or false")
        if self.head_dim % 2:
            raise ModelFormatError(f"config: head_dim must be even, not {self.head_dim}")
        if self.n_heads % self.n_kv_heads:
            raise ModelFormatError(f"config: n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.q_dim > MAX_DIM:
            raise ModelFormatError(f"config: n_heads * head_dim {self.q_dim} exceeds {MAX_DIM}")
        eps = self.norm_eps
        if type(eps) not in (float, int) or not math.isfinite(eps) or not 1e-30 <= eps <= 1:
            raise ModelFormatError(f"config: norm_eps must be in 1e-30..1, not {eps!r:.80}")
        if self.bos_token_id is not None:
            _check_int("bos_token_id", self.bos_token_id, 0, self.vocab_size - 1)
        eos = self.eos_token_ids
        if not isinstance(eos, (tuple, list)) or len(eos) > _MAX_EOS_TOKENS:
            raise ModelFormatError(f"config: eos_token_ids must list <= {_MAX_EOS_TOKENS} ids")
        for token in eos:
            _check_int("eos_token_ids", token, 0, self.vocab_size - 1)
        object.__setattr__(self, "eos_token_ids", tuple(eos))

    @property
    def q_dim(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.n_kv_heads * self.head_dim

    @classmethod
    def from_json(cls, text: bytes | str) -> FrozenConfig:
        """Parse ``config.json``. A missing or an unknown key is an error, like any bad value."""
        document = parse_json_object(text, "config.json")
        names = [field.name for field in fields(cls)]
        if unknown := sorted(document.keys() - set(names)):
            raise ModelFormatError(f"config: unknown key {unknown[0]!r:.80}")
        if missing := [name for name in names if name not in document]:
            raise ModelFormatError(f"config: key {missing[0]!r} is missing")
        return cls(**document)

    def to_json(self) -> str:
        document = asdict(self)
        document["eos_token_ids"] = list(self.eos_token_ids)
        return json.dumps(document, indent=1)
