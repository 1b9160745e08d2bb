"""OLMo 2: norms only after attention and after the MLP, and norms of q and k over all heads."""

from __future__ import annotations

from ...format.config import LayerSpec
from ..fields import Fields
from . import gguf_keys, hf_config
from .base import PARTS, Architecture, Shape, SourceName, Tensors, Traits

NORMS = "rmsnorm_after"
_PARTS = {
    **PARTS,
    "post_attention_norm": SourceName(
        "model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.post_attention_norm.weight"
    ),
    "post_ffn_norm": SourceName("model.layers.{i}.post_feedforward_layernorm.weight", "blk.{i}.post_ffw_norm.weight"),
}


def _hf(config: Fields, shape: Shape) -> Traits:
    has_bias = config.flag("attention_bias", False)
    return Traits(
        layers=(LayerSpec(norm=NORMS, activation=hf_config.activation(config)),) * shape.n_layers,
        **hf_config.one_rope(config, shape),
        qkv_bias=has_bias,
        o_bias=has_bias,
        qk_norm=True,
        qk_norm_all_heads=True,
    )


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    return Traits(
        layers=gguf_keys.same_windows(keys, shape, norm=NORMS),
        rope_tables=(gguf_keys.rope_table(keys, shape.head_dim, file),),
        qkv_bias=gguf_keys.has_bias(file, "attn_q"),
        o_bias=gguf_keys.has_bias(file, "attn_output"),
        qk_norm=True,
        qk_norm_all_heads=True,
    )


OLMO2 = Architecture("Olmo2ForCausalLM", "olmo2", "olmo2", _hf, _gguf, _PARTS, hf_defaults={"rms_norm_eps": 1e-5})
