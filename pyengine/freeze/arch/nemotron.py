"""Nemotron and Minitron: LayerNorms with gains of 1 + w, RoPE over a part of the head, and an MLP without a gate that squares
what is positive."""

from __future__ import annotations

from collections.abc import Mapping

from ..fields import Fields
from . import gguf_keys, hf_config, rotary
from .base import PARTS, Architecture, Fold, Shape, Tensors, Traits
from .layer_norm import NORM_BIASES, QKV_BIASES, folded

_GAINS: Mapping[str, Fold] = dict.fromkeys(("attention_norm", "ffn_norm", "norm"), Fold(offset=1.0))


def _own(has_bias: bool, mlp_bias: bool) -> tuple[str, ...]:
    return (*(QKV_BIASES if has_bias else ()), *(["wo.bias"] * has_bias), *(["up.bias", "down.bias"] * mlp_bias))


def _hf(config: Fields, shape: Shape) -> Traits:
    rotated = rotary.hf_rotated(config, shape)
    plain = Traits(
        layers=hf_config.no_windows(shape, activation=hf_config.ungated_activation(config, "relu2")),
        **rotary.hf_rope(config, shape, rotated),
        folds={**rotary.folds(rotary.order(shape.head_dim, rotated)), **_GAINS},
    )
    own = _own(config.flag("attention_bias", False), config.flag("mlp_bias", False))
    return folded(plain, norm_eps=config.number("norm_eps", 1e-5), own=own)


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    """The converters add the 1."""
    rotated = rotary.gguf_rotated(keys, shape)
    plain = Traits(
        layers=gguf_keys.same_windows(keys, shape, activation="relu2"),
        **rotary.gguf_rope(keys, shape, file, rotated),
        folds=rotary.folds(rotary.order(shape.head_dim, rotated)),
    )
    own = _own(gguf_keys.has_bias(file, "attn_q"), gguf_keys.has_bias(file, "ffn_up"))
    return folded(plain, norm_eps=gguf_keys.norm_eps(keys, gguf_keys.LAYER_NORM_EPS), own=own)


NEMOTRON = Architecture(
    "NemotronForCausalLM", "nemotron", "nemotron", _hf, _gguf, {**PARTS, **NORM_BIASES},
    hf_defaults={"partial_rotary_factor": 0.5}, gguf_keys=frozenset({gguf_keys.LAYER_NORM_EPS}),
)  # fmt: skip
