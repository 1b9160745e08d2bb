"""Llama 2 and 3.x (SmolLM2 too), and Mistral and Ministral: the plain family."""

from __future__ import annotations

from ...format.config import LayerSpec
from ..fields import Fields
from . import gguf_keys, hf_config
from .base import Architecture, Shape, Tensors, Traits

_MISTRAL_WINDOW = 4096


def _llama_hf(config: Fields, shape: Shape) -> Traits:
    has_bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    return Traits(
        layers=hf_config.no_windows(shape, activation=hf_config.activation(config)),
        **hf_config.one_rope(config, shape),
        qkv_bias=has_bias,
        o_bias=has_bias,
        gate_up_bias=mlp_bias,
        down_bias=mlp_bias,
    )


def _mistral_hf(config: Fields, shape: Shape) -> Traits:
    kinds = hf_config.layer_kinds(config, [hf_config.SLIDING] * shape.n_layers)
    windows = hf_config.windows(config, kinds, _MISTRAL_WINDOW)
    activation = hf_config.activation(config)
    return Traits(
        layers=tuple(LayerSpec(window=window, activation=activation) for window in windows),
        **hf_config.one_rope(config, shape),
    )


def gguf_traits(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    """Of a file with nothing but what Llamas have."""
    return Traits(
        layers=gguf_keys.same_windows(keys, shape),
        **gguf_keys.one_rope(keys, shape, file),
        qkv_bias=gguf_keys.has_bias(file, "attn_q"),
        o_bias=gguf_keys.has_bias(file, "attn_output"),
        gate_up_bias=gguf_keys.has_bias(file, "ffn_up"),
        down_bias=gguf_keys.has_bias(file, "ffn_down"),
    )


LLAMA = Architecture("LlamaForCausalLM", "llama", "llama", _llama_hf, gguf_traits, gguf_permuted=True)
MISTRAL = Architecture(
    "MistralForCausalLM", "mistral", "llama", _mistral_hf, gguf_traits, gguf_permuted=True, hf_defaults={"num_key_value_heads": 8}
)
# Mistral's layers under another name.
MINISTRAL = MISTRAL._replace(hf="MinistralForCausalLM", model_type="ministral")
