"""Mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE, whose every layer has a router and experts of one size, and
Qwen2-MoE's one of another size beside them that every row takes."""

from __future__ import annotations

from dataclasses import replace

from ...errors import UnsupportedModelError
from ...format.config import LayerSpec
from ..fields import Fields
from . import hf_config, llama
from .base import PARTS, Architecture, Shape, SourceName, Tensors, Traits

SHARED_FEED_FORWARD = "expert_shared_feed_forward_length"
GGUF_SHARED = {
    "shared_router": "blk.{i}.ffn_gate_inp_shexp.weight",
    "shared_gate": "blk.{i}.ffn_gate_shexp.weight",
    "shared_up": "blk.{i}.ffn_up_shexp.weight",
    "shared_down": "blk.{i}.ffn_down_shexp.weight",
}
GGUF_EXPERTS = {
    "router": "blk.{i}.ffn_gate_inp.weight",
    "gate": "blk.{i}.ffn_gate_exps.weight",
    "up": "blk.{i}.ffn_up_exps.weight",
    "down": "blk.{i}.ffn_down_exps.weight",
}


def _parts(prefix: str, gate: str, up: str, down: str) -> dict[str, SourceName]:
    names = {"router": f"{prefix}.gate.weight"}
    names |= {part: f"{prefix}.experts.{{e}}.{name}.weight" for part, name in (("gate", gate), ("up", up), ("down", down))}
    return {**PARTS, **{part: SourceName("model.layers.{i}." + name, GGUF_EXPERTS[part]) for part, name in names.items()}}


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    """What these files have in common: what a Llama's say, and how many experts there are."""
    return replace(
        llama.gguf_traits(keys, shape, file),
        n_experts=keys.integer("expert_count"),
        n_experts_used=keys.integer("expert_used_count"),
    )


def _mixtral_hf(config: Fields, shape: Shape) -> Traits:
    windows = hf_config.windows(config, hf_config.layer_kinds(config, [hf_config.SLIDING] * shape.n_layers))
    activation = hf_config.activation(config)
    return Traits(
        layers=tuple(LayerSpec(window=window, activation=activation) for window in windows),
        **hf_config.one_rope(config, shape, 1e6),
        n_experts=config.integer("num_local_experts"),
        n_experts_used=config.integer("num_experts_per_tok"),
        experts_normalized=True,
    )


def _mixtral_gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    return replace(_gguf(keys, shape, file), experts_normalized=True)


def _n_experts(config: Fields) -> int:
    """transformers 5 writes the number under Mixtral's name for some of the others."""
    return config.integer("num_local_experts", config.integer("num_experts"))


def _refuse_layers_apart(config: Fields) -> None:
    if config.integer("decoder_sparse_step", 1) != 1 or config.raw("mlp_only_layers"):
        raise UnsupportedModelError("layers without experts beside layers with them are not implemented")
    if config.flag("use_sliding_window", False):
        raise UnsupportedModelError("use_sliding_window is not implemented for this architecture")


def _qwen2_hf(config: Fields, shape: Shape) -> Traits:
    _refuse_layers_apart(config)
    return Traits(
        layers=hf_config.no_windows(shape, activation=hf_config.activation(config)),
        **hf_config.one_rope(config, shape),
        qkv_bias=config.flag("qkv_bias", True),
        hidden_dim=config.integer("moe_intermediate_size"),
        n_experts=_n_experts(config),
        n_experts_used=config.integer("num_experts_per_tok"),
        experts_normalized=config.flag("norm_topk_prob", False),
        shared_hidden_dim=config.integer("shared_expert_intermediate_size"),
        shared_gated=True,
    )


def _qwen2_gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    """The format's readers do not normalize the weights of this architecture."""
    return replace(
        _gguf(keys, shape, file),
        hidden_dim=keys.integer("expert_feed_forward_length"),
        shared_hidden_dim=keys.integer(SHARED_FEED_FORWARD),
        shared_gated=True,
    )


def _qwen3_hf(config: Fields, shape: Shape) -> Traits:
    _refuse_layers_apart(config)
    has_bias = config.flag("attention_bias", False)
    return Traits(
        layers=hf_config.no_windows(shape, activation=hf_config.activation(config)),
        **hf_config.one_rope(config, shape),
        qkv_bias=has_bias,
        o_bias=has_bias,
        qk_norm=True,
        hidden_dim=config.integer("moe_intermediate_size"),
        n_experts=_n_experts(config),
        n_experts_used=config.integer("num_experts_per_tok"),
        experts_normalized=config.flag("norm_topk_prob", False),
    )


def _qwen3_gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    """The format's readers normalize the weights of this architecture."""
    return replace(
        _gguf(keys, shape, file),
        qk_norm=True,
        hidden_dim=keys.integer("expert_feed_forward_length"),
        experts_normalized=True,
    )


def _olmoe_hf(config: Fields, shape: Shape) -> Traits:
    if not config.is_null("clip_qkv") and "clip_qkv" in config:
        raise UnsupportedModelError("clip_qkv, a limit of q, k and v, is not implemented")
    has_bias = config.flag("attention_bias", False)
    return Traits(
        layers=hf_config.no_windows(shape, activation=hf_config.activation(config)),
        **hf_config.one_rope(config, shape),
        qkv_bias=has_bias,
        o_bias=has_bias,
        qk_norm=True,
        qk_norm_all_heads=True,
        n_experts=_n_experts(config),
        n_experts_used=config.integer("num_experts_per_tok"),
        experts_normalized=config.flag("norm_topk_prob", False),
    )


def _olmoe_gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    """The format's readers do not normalize the weights of this architecture."""
    return replace(_gguf(keys, shape, file), qk_norm=True, qk_norm_all_heads=True)


_SHARED = {
    "shared_router": SourceName("model.layers.{i}.mlp.shared_expert_gate.weight", GGUF_SHARED["shared_router"]),
    "shared_gate": SourceName("model.layers.{i}.mlp.shared_expert.gate_proj.weight", GGUF_SHARED["shared_gate"]),
    "shared_up": SourceName("model.layers.{i}.mlp.shared_expert.up_proj.weight", GGUF_SHARED["shared_up"]),
    "shared_down": SourceName("model.layers.{i}.mlp.shared_expert.down_proj.weight", GGUF_SHARED["shared_down"]),
}

MIXTRAL = Architecture(
    "MixtralForCausalLM", "mixtral", "llama", _mixtral_hf, _mixtral_gguf, _parts("block_sparse_moe", "w1", "w3", "w2"),
    has_experts=True, gguf_permuted=True,
    hf_defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
)  # fmt: skip
QWEN2_MOE = Architecture(
    "Qwen2MoeForCausalLM", "qwen2_moe", "qwen2moe", _qwen2_hf, _qwen2_gguf,
    {**_parts("mlp", "gate_proj", "up_proj", "down_proj"), **_SHARED},
    has_experts=True, has_shared_expert=True, gguf_keys=frozenset({"expert_feed_forward_length"}),
    hf_defaults={
        "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "rms_norm_eps": 1e-6,
    },
)  # fmt: skip
QWEN3_MOE = Architecture(
    "Qwen3MoeForCausalLM", "qwen3_moe", "qwen3moe", _qwen3_hf, _qwen3_gguf, _parts("mlp", "gate_proj", "up_proj", "down_proj"),
    has_experts=True, gguf_keys=frozenset({"expert_feed_forward_length"}),
    hf_defaults={"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
)  # fmt: skip
OLMOE = Architecture(
    "OlmoeForCausalLM", "olmoe", "olmoe", _olmoe_hf, _olmoe_gguf, _parts("mlp", "gate_proj", "up_proj", "down_proj"),
    has_experts=True,
    hf_defaults={"num_experts": 64, "num_experts_per_tok": 8, "rms_norm_eps": 1e-5},
)  # fmt: skip
