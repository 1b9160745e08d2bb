"""Seed-OSS: a Llama with biases of q, k and v, and perhaps of more."""

from __future__ import annotations

from ..fields import Fields
from . import hf_config, llama
from .base import PARTS, Architecture, Shape, SourceName, Traits


def _hf(config: Fields, shape: Shape) -> Traits:
    mlp_bias = config.flag("mlp_bias", False)
    return Traits(
        layers=hf_config.no_windows(shape, activation=hf_config.activation(config)),
        **hf_config.one_rope(config, shape),
        qkv_bias=config.flag("attention_bias", True),
        o_bias=config.flag("attention_out_bias", False),
        gate_up_bias=mlp_bias,
        down_bias=mlp_bias,
    )


SEED_OSS = Architecture(
    "SeedOssForCausalLM", "seed_oss", "seed_oss", _hf, llama.gguf_traits,
    {
        **PARTS,
        "ffn_norm": SourceName("model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.post_attention_norm.weight"),
    },
    hf_defaults={"num_key_value_heads": 8, "head_dim": 128},
)  # fmt: skip
