"""Apertus: norms of q and k heads, and an MLP without a gate whose activation, xIELU, has numbers of each layer."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import UnsupportedModelError
from ...format.config import XIELU
from ..fields import Fields
from . import gguf_keys, hf_config
from .base import PARTS, Architecture, Fold, Shape, SourceName, Tensors, Traits

# Sources have the logarithms of exp(curvature) - 1, and below 0 of what it has beyond the slope. Their eps, -1e-6, keeps a
# derivative away from 0, and the exponential of such a number from 1: nothing that float32 sees.
_FOLDS: Mapping[str, Fold] = {"xielu.above": Fold(is_softplus=True), "xielu.below": Fold(is_softplus=True, plus="xielu.slope")}
_ACTIVATION = {"xielu.above": "alpha_p", "xielu.below": "alpha_n", "xielu.slope": "beta"}
_PARTS = {
    **PARTS,
    "attention_norm": SourceName("model.layers.{i}.attention_layernorm.weight", "blk.{i}.attn_norm.weight"),
    "ffn_norm": SourceName("model.layers.{i}.feedforward_layernorm.weight", "blk.{i}.ffn_norm.weight"),
    **{
        part: SourceName(f"model.layers.{{i}}.mlp.act_fn.{name}", f"blk.{{i}}.xielu.{name}")
        for part, name in _ACTIVATION.items()
    },
}


def _hf(config: Fields, shape: Shape) -> Traits:
    if not any(config.raw(key) for key in ("rope_scaling", "rope_parameters")) and not config.is_null("rope_scaling"):
        raise UnsupportedModelError("config.json has neither rope_scaling nor rope_parameters: write the model's RoPE into it")
    has_bias = config.flag("attention_bias", False)
    return Traits(
        layers=hf_config.no_windows(shape, activation=hf_config.ungated_activation(config, XIELU)),
        **hf_config.one_rope(config, shape, 12_000_000.0),
        qkv_bias=has_bias,
        o_bias=has_bias,
        qk_norm=True,
        folds=_FOLDS,
    )


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    return Traits(
        layers=gguf_keys.same_windows(keys, shape, activation=XIELU),
        **gguf_keys.one_rope(keys, shape, file),
        qkv_bias=gguf_keys.has_bias(file, "attn_q"),
        o_bias=gguf_keys.has_bias(file, "attn_output"),
        qk_norm=True,
        folds=_FOLDS,
    )


APERTUS = Architecture(
    "ApertusForCausalLM", "apertus", "apertus", _hf, _gguf, _PARTS, hf_ignored=(".mlp.act_fn.eps",),
    hf_defaults={"rms_norm_eps": 1e-5},
    gguf_numbers={f"xielu.{name}": f"blk.{{i}}.xielu.{name}" for name in _ACTIVATION.values()},
)  # fmt: skip
