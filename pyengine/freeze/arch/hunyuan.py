"""Hunyuan, dense and as a mixture of experts beside a shared one: norms of each q and k head after RoPE and not before it, and a
base of RoPE that ``alpha`` makes larger."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...errors import UnsupportedModelError
from ...format.quantize import Float32Array
from ..fields import Fields
from ..rope import rope_inv_freq
from . import gguf_keys, hf_config
from .base import PARTS, Architecture, Shape, SourceName, Tensors, Traits
from .mixture import GGUF_EXPERTS, GGUF_SHARED, SHARED_FEED_FORWARD


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


def _of_all_layers(config: Fields, key: str) -> int:
    """A number, or a list of one for each layer, which must be the same."""
    found = config.raw(key)
    if isinstance(found, list) and found and all(type(one) is int and one == found[0] for one in found):
        return int(found[0])
    return config.integer(key)


def _moe_hf(config: Fields, shape: Shape) -> Traits:
    """The softmax is over the experts that are taken; the shared one has their width, and no weight."""
    return replace(
        _hf(config, shape),
        n_experts=_of_all_layers(config, "num_experts"),
        n_experts_used=_of_all_layers(config, "moe_topk"),
        experts_normalized=True,
        shared_hidden_dim=config.integer("intermediate_size"),
    )


def _moe_gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    if keys.integer("expert_shared_count", 1) != 1:
        raise UnsupportedModelError("more than one shared expert (expert_shared_count) is not implemented")
    return replace(
        _gguf(keys, shape, file),
        hidden_dim=keys.integer("expert_feed_forward_length", keys.integer("feed_forward_length")),
        n_experts=keys.integer("expert_count"),
        n_experts_used=keys.integer("expert_used_count"),
        experts_normalized=True,
        shared_hidden_dim=keys.integer(SHARED_FEED_FORWARD),
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
_MLP, _NAMES = "model.layers.{i}.mlp.", ("gate", "up", "down")
HUNYUAN_MOE = HUNYUAN._replace(
    hf="HunYuanMoEV1ForCausalLM", model_type="hunyuan_v1_moe", gguf="hunyuan-moe", from_hf=_moe_hf, from_gguf=_moe_gguf,
    has_experts=True, has_shared_expert=True, gguf_keys=frozenset({"expert_feed_forward_length", "expert_shared_count"}),
    parts={
        **HUNYUAN.parts,
        "router": SourceName(_MLP + "gate.wg.weight", GGUF_EXPERTS["router"]),
        **{part: SourceName(f"{_MLP}experts.{{e}}.{part}_proj.weight", GGUF_EXPERTS[part]) for part in _NAMES},
        **{
            f"shared_{part}": SourceName(f"{_MLP}shared_mlp.{part}_proj.weight", GGUF_SHARED[f"shared_{part}"])
            for part in _NAMES
        },
    },
)  # fmt: skip
