"""Arcee (AFM): a Llama whose MLP has no gate and squares what is positive."""

from __future__ import annotations

from dataclasses import replace

from ..fields import Fields
from . import gguf_keys, hf_config, llama
from .base import Architecture, Shape, Tensors, Traits


def _hf(config: Fields, shape: Shape) -> Traits:
    has_bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    return Traits(
        layers=hf_config.no_windows(shape, activation=hf_config.ungated_activation(config, "relu2")),
        **hf_config.one_rope(config, shape),
        qkv_bias=has_bias,
        o_bias=has_bias,
        gate_up_bias=mlp_bias,
        down_bias=mlp_bias,
    )


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    layers = gguf_keys.same_windows(keys, shape, activation="relu2")
    return replace(llama.gguf_traits(keys, shape, file), layers=layers)


ARCEE = Architecture("ArceeForCausalLM", "arcee", "arcee", _hf, _gguf, gguf_permuted=True, hf_defaults={"rms_norm_eps": 1e-5})
