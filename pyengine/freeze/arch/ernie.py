"""ERNIE 4.5 (dense), with biases everywhere or nowhere, and Helium: Llamas whose RoPE turns neighbours."""

from __future__ import annotations

from dataclasses import replace

from ..fields import Fields
from . import hf_config, llama, rotary
from .base import Architecture, Shape, Tensors, Traits, no_gguf


def _folded(traits: Traits, shape: Shape) -> Traits:
    return replace(traits, folds=rotary.folds(rotary.order(shape.head_dim, shape.head_dim, is_interleaved=True)))


def _hf(config: Fields, shape: Shape) -> Traits:
    has_bias = config.flag("use_bias", False)
    plain = Traits(
        layers=hf_config.no_windows(shape, activation=hf_config.activation(config)),
        **hf_config.one_rope(config, shape),
        qkv_bias=has_bias,
        o_bias=has_bias,
        gate_up_bias=has_bias,
        down_bias=has_bias,
    )
    return _folded(plain, shape)


def _helium_hf(config: Fields, shape: Shape) -> Traits:
    mlp_bias = config.flag("mlp_bias", False)
    plain = Traits(
        layers=hf_config.no_windows(shape, activation=hf_config.activation(config)),
        **hf_config.one_rope(config, shape, 100_000.0),
        qkv_bias=config.flag("attention_bias", False),
        gate_up_bias=mlp_bias,
        down_bias=mlp_bias,
    )
    return _folded(plain, shape)


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    return _folded(llama.gguf_traits(keys, shape, file), shape)


ERNIE = Architecture(
    "Ernie4_5ForCausalLM", "ernie4_5", "ernie4_5", _hf, _gguf,
    hf_defaults={
        "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": True,
    },
)  # fmt: skip
HELIUM = Architecture(
    "HeliumForCausalLM", "helium", None, _helium_hf, no_gguf,
    hf_defaults={"num_key_value_heads": 20, "head_dim": 128, "rms_norm_eps": 1e-8, "max_position_embeddings": 4096},
)  # fmt: skip
