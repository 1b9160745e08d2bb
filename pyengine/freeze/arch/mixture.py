"""Mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE, Mellum 2, OLMoE and FlexOlmo, whose every layer has a router and experts of
one size, and Qwen2-MoE's one of another size beside them that every row takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import UnsupportedModelError
from ...format.config import LayerSpec
from ..fields import Fields
from . import hf_config, llama
from .base import PARTS, Architecture, Fold, Shape, SourceName, Tensors, Traits, no_gguf
from .olmo2 import NORMS, OLMO2
from .qwen import VL_GGUF_KEYS, VL_TEXT

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
    return _qwen3_with(config, shape, hf_config.one_rope(config, shape))


def _qwen3_with(config: Fields, shape: Shape, rope: Mapping[str, Any]) -> Traits:
    """``rope``: the fields of Traits that are of the tables."""
    has_bias = config.flag("attention_bias", False)
    return Traits(
        layers=hf_config.no_windows(shape, activation=hf_config.activation(config)),
        **rope,
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


def _qwen3_vl_hf(config: Fields, shape: Shape) -> Traits:
    """Weights of experts sum to 1 whatever the configuration says. Their matrices are (inputs, outputs), but where transformers 5
    wrote them; of what somebody else wrote under its name the shapes would not fit."""
    is_version_5 = config.text("transformers_version", "").startswith("5.")
    folds = {} if is_version_5 else {part: Fold(is_transposed=True) for part in ("gate", "up", "down")}
    return replace(_qwen3_hf(config, shape), experts_normalized=True, folds=folds)


def _mellum_hf(config: Fields, shape: Shape) -> Traits:
    """Two tables, of the layers with a window and of those without."""
    if (config.raw("mlp_layer_types") or ["sparse"] * shape.n_layers) != ["sparse"] * shape.n_layers:
        raise UnsupportedModelError("layers without experts beside layers with them (mlp_layer_types) are not implemented")
    kinds = hf_config.layer_kinds(config, [hf_config.FULL] * shape.n_layers)
    bases = {hf_config.FULL: 500_000.0, hf_config.SLIDING: 10_000.0}
    ropes, used = hf_config.ropes_of_kinds(config, shape.head_dim, bases), list(dict.fromkeys(kinds))
    layers = zip(hf_config.windows(config, kinds, 1024), kinds, strict=True)
    activation = hf_config.activation(config)
    tables = {
        "rope_tables": tuple(ropes[kind].inv_freq for kind in used),
        "rope_amplitudes": tuple(ropes[kind].amplitude for kind in used),
    }
    return replace(
        _qwen3_with(config, shape, tables),
        layers=tuple(LayerSpec(window, used.index(kind), activation=activation) for window, kind in layers),
        experts_normalized=config.flag("norm_topk_prob", True),
    )


def _flex_olmo_hf(config: Fields, shape: Shape) -> Traits:
    """OLMoE with OLMo 2's norms."""
    traits = _olmoe_hf(config, shape)
    return replace(traits, layers=tuple(spec._replace(norm=NORMS) for spec in traits.layers))


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
_EXPERTS = "model.layers.{i}.mlp.experts."
QWEN3_VL_MOE = QWEN3_MOE._replace(
    hf="Qwen3VLMoeForConditionalGeneration", model_type="qwen3_vl_moe", gguf="qwen3vlmoe", from_hf=_qwen3_vl_hf, hf_text=VL_TEXT,
    gguf_keys=QWEN3_MOE.gguf_keys | VL_GGUF_KEYS,
    parts={
        **QWEN3_MOE.parts,
        "gate": SourceName(_EXPERTS + "gate_up_proj", GGUF_EXPERTS["gate"]),
        "up": SourceName(_EXPERTS + "gate_up_proj", GGUF_EXPERTS["up"]),
        "down": SourceName(_EXPERTS + "down_proj", GGUF_EXPERTS["down"]),
    },
)  # fmt: skip
# Its files may have layers that guess tokens ahead beside it.
MELLUM = QWEN3_MOE._replace(
    hf="MellumForCausalLM", model_type="mellum", gguf=None, from_hf=_mellum_hf, from_gguf=no_gguf,
    hf_text={"model.": "model.", "lm_head.": "lm_head."},
    hf_defaults={
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 896,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 131_072,
    },
)  # fmt: skip
FLEX_OLMO = OLMOE._replace(
    hf="FlexOlmoForCausalLM", model_type="flex_olmo", gguf=None, from_hf=_flex_olmo_hf, from_gguf=no_gguf,
    parts={
        **OLMOE.parts,
        **{part: OLMO2.parts[part] for part in ("post_attention_norm", "post_ffn_norm")},
    },
    hf_defaults={"num_experts": 7, "num_experts_per_tok": 5, "rms_norm_eps": 1e-6, "rope_theta": 500_000.0},
)  # fmt: skip
