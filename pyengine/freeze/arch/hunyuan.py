"""Hunyuan (dense): norms of each q and k head after RoPE and not before it, and a base of RoPE that ``alpha`` makes larger."""

from __future__ import annotations

import numpy as np

from ...errors import UnsupportedModelError
from ...format.quantize import Float32Array
from ..fields import Fields
from ..rope import rope_inv_freq
from . import gguf_keys, hf_config
from .base import PARTS, Architecture, Shape, SourceName, Tensors, Traits


def _rope_table(config: Fields, shape: Shape) -> Float32Array:
    """``dynamic`` with an ``alpha`` is a base for all texts; without one, frequencies change beyond the model's positions."""
    inside, _ = hf_config.rope_scaling(config)
    if inside.text("rope_type", inside.text("type", "default")) != "dynamic":
        return hf_config.rope_table(config, shape.head_dim)
    if shape.head_dim < 4:
        raise UnsupportedModelError(f"alpha with heads of {shape.head_dim} elements")
    alpha = hf_config.multiplier(inside, "alpha", 1.0)
    with np.errstate(over="ignore"):  # an infinite base is refused
        base = np.float32(hf_config.rope_base(config) * alpha ** (shape.head_dim / (shape.head_dim - 2)))  # so GGUF has it
    return rope_inv_freq(shape.head_dim, float(base), None)


def _hf(config: Fields, shape: Shape) -> Traits:
    if config.flag("use_cla", False):
        raise UnsupportedModelError("use_cla, keys and values that layers share, is not implemented")
    has_bias = config.flag("attention_bias", False)
    return Traits(
        layers=hf_config.no_windows(shape, activation=hf_config.activation(config)),
        rope_tables=(_rope_table(config, shape),),
        qkv_bias=has_bias,
        o_bias=has_bias,
        qk_norm=True,
        qk_norm_after_rope=True,
    )


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    return Traits(
        layers=gguf_keys.same_windows(keys, shape),
        rope_tables=(gguf_keys.rope_table(keys, shape.head_dim, file),),
        qkv_bias=gguf_keys.has_bias(file, "attn_q"),
        o_bias=gguf_keys.has_bias(file, "attn_output"),
        qk_norm=True,
        qk_norm_after_rope=True,
    )


_ATTENTION = "model.layers.{i}.self_attn."

HUNYUAN = Architecture(
    "HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", "hunyuan-dense", _hf, _gguf,
    {
        **PARTS,
        "q_norm": SourceName(_ATTENTION + "query_layernorm.weight", PARTS["q_norm"].gguf),
        "k_norm": SourceName(_ATTENTION + "key_layernorm.weight", PARTS["k_norm"].gguf),
    },
    hf_defaults={"rms_norm_eps": 1e-5},
)  # fmt: skip
