"""GLM-4 (GLM-Edge too) and GLM-4-0414: RoPE that turns neighbours in a part of the head, and of the later ones norms around both
halves of a layer."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..fields import Fields
from . import gguf_keys, hf_config, rotary
from .base import PARTS, Architecture, Shape, SourceName, Tensors, Traits, no_gguf
from .qwen import VL_TEXT

_GATE_UP = SourceName("model.layers.{i}.mlp.gate_up_proj.weight", "blk.{i}.ffn_up.weight")
_GLM = {**PARTS, "gate": _GATE_UP, "up": _GATE_UP}
_GLM4 = {
    **_GLM,
    "post_attention_norm": SourceName(
        "model.layers.{i}.post_self_attn_layernorm.weight", "blk.{i}.post_attention_norm.weight"
    ),
    "post_ffn_norm": SourceName("model.layers.{i}.post_mlp_layernorm.weight", "blk.{i}.post_ffw_norm.weight"),
}


def _folds(shape: Shape, rotated: int) -> dict[str, Any]:
    return rotary.folds(rotary.order(shape.head_dim, rotated, is_interleaved=True))


def _hf(config: Fields, shape: Shape, norm: str) -> Traits:
    rotated = rotary.hf_rotated(config, shape)
    return Traits(
        layers=hf_config.no_windows(shape, norm=norm, activation=hf_config.activation(config)),
        **rotary.hf_rope(config, shape, rotated),
        qkv_bias=config.flag("attention_bias", True),
        folds=_folds(shape, rotated),
    )


def _gguf(keys: Fields, shape: Shape, file: Tensors, norm: str) -> Traits:
    rotated = rotary.gguf_rotated(keys, shape)
    return Traits(
        layers=gguf_keys.same_windows(keys, shape, norm=norm),
        **rotary.gguf_rope(keys, shape, file, rotated),
        qkv_bias=gguf_keys.has_bias(file, "attn_q"),
        folds=_folds(shape, rotated),
    )


_DEFAULTS = {
    "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7, "max_position_embeddings": 131_072,
    "partial_rotary_factor": 0.5,
}  # fmt: skip

GLM = Architecture(
    "GlmForCausalLM", "glm", "chatglm", partial(_hf, norm="rmsnorm"), partial(_gguf, norm="rmsnorm"), _GLM, hf_defaults=_DEFAULTS
)
GLM4 = Architecture(
    "Glm4ForCausalLM", "glm4", "glm4", partial(_hf, norm="rmsnorm_around"), partial(_gguf, norm="rmsnorm_around"), _GLM4,
    hf_defaults=_DEFAULTS,
)  # fmt: skip
# The text model of GLM-4.1V, whose RoPE turns by three positions, which are one in a text.
GLM4V = GLM4._replace(
    hf="Glm4vForConditionalGeneration", model_type="glm4v", gguf=None, from_gguf=no_gguf, hf_text=VL_TEXT,
    hf_defaults={"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 32_768},
)  # fmt: skip
