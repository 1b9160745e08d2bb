"""Phi-1.5 and Phi-2: LayerNorms, halves of a layer that are parallel, an MLP without a gate, biases everywhere, and RoPE over a
part of the head."""

from __future__ import annotations

from ...errors import UnsupportedModelError
from ...format.config import PARALLEL
from ..fields import Fields
from . import gguf_keys, hf_config, rotary
from .base import PARTS, Architecture, Shape, SourceName, Tensors, Traits
from .layer_norm import NORM_BIASES, QKV_BIASES, folded

_BIASES = (*QKV_BIASES, "wo.bias", "up.bias", "down.bias", "output.bias")
_PARTS = {
    **PARTS,
    **NORM_BIASES,
    "norm": SourceName("model.final_layernorm.weight", "output_norm.weight"),
    "norm.bias": SourceName("model.final_layernorm.bias", "output_norm.bias"),
    "wo": SourceName("model.layers.{i}.self_attn.dense.weight", "blk.{i}.attn_output.weight"),
    "wo.bias": SourceName("model.layers.{i}.self_attn.dense.bias", "blk.{i}.attn_output.bias"),
    "up": SourceName("model.layers.{i}.mlp.fc1.weight", "blk.{i}.ffn_up.weight"),
    "up.bias": SourceName("model.layers.{i}.mlp.fc1.bias", "blk.{i}.ffn_up.bias"),
    "down": SourceName("model.layers.{i}.mlp.fc2.weight", "blk.{i}.ffn_down.weight"),
    "down.bias": SourceName("model.layers.{i}.mlp.fc2.bias", "blk.{i}.ffn_down.bias"),
}


def _hf(config: Fields, shape: Shape) -> Traits:
    if config.flag("qk_layernorm", False):
        raise UnsupportedModelError("qk_layernorm, LayerNorms of q and k heads, is not implemented")
    rotated = rotary.hf_rotated(config, shape)
    plain = Traits(
        layers=hf_config.no_windows(shape, norm=PARALLEL, activation=hf_config.ungated_activation(config, "gelu_new")),
        **rotary.hf_rope(config, shape, rotated),
        folds=rotary.folds(rotary.order(shape.head_dim, rotated)),
    )
    return folded(plain, norm_eps=config.number("layer_norm_eps", 1e-5), own=_BIASES, is_parallel=True)


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    rotated = rotary.gguf_rotated(keys, shape)
    plain = Traits(
        layers=gguf_keys.same_windows(keys, shape, norm=PARALLEL, activation="gelu_tanh"),
        **rotary.gguf_rope(keys, shape, file, rotated),
        folds=rotary.folds(rotary.order(shape.head_dim, rotated)),
    )
    eps = gguf_keys.norm_eps(keys, gguf_keys.LAYER_NORM_EPS)
    return folded(plain, norm_eps=eps, own=_BIASES, is_parallel=True)


PHI2 = Architecture(
    "PhiForCausalLM", "phi", "phi2", _hf, _gguf, _PARTS, hf_defaults={"partial_rotary_factor": 0.5},
    gguf_keys=frozenset({gguf_keys.LAYER_NORM_EPS}),
)  # fmt: skip
