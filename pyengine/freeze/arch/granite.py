"""Granite 3, dense and as a mixture of experts with or without a shared one, Granite 4 if every layer has attention, those with
windows and sinks (SWA), and HyperCLOVA X: a Llama with four multipliers, all of them linear."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from ...errors import UnsupportedModelError
from ..fields import Fields
from . import gguf_keys, hf_config
from .base import PARTS, Architecture, Fold, Shape, SourceName, Tensors, Traits, no_gguf
from .mixture import GGUF_EXPERTS, GGUF_SHARED, SHARED_FEED_FORWARD


class Multipliers(NamedTuple):
    embedding: float
    residual: float  # of what attention and the MLP add
    attention: float  # of scores, instead of 1 / sqrt(head_dim)
    logits: float  # logits are divided by it


def folds(m: Multipliers, shape: Shape) -> dict[str, Fold]:
    query = Fold(m.attention * math.sqrt(shape.head_dim))
    final = m.logits * (m.embedding if shape.tied else 1.0)
    return {
        "tok_embeddings": Fold(m.embedding),
        "q": query,
        "q.bias": query,
        "wo": Fold(m.residual),
        "wo.bias": Fold(m.residual),
        "down": Fold(m.residual),
        "down.bias": Fold(m.residual),
        "shared_down": Fold(m.residual),
        "norm": Fold(1.0 / final),
    }


def _hf(config: Fields, shape: Shape) -> Traits:
    has_bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    found = Multipliers(
        hf_config.multiplier(config, "embedding_multiplier"),
        hf_config.multiplier(config, "residual_multiplier"),
        hf_config.multiplier(config, "attention_multiplier"),
        hf_config.multiplier(config, "logits_scaling"),
    )
    return Traits(
        layers=hf_config.no_windows(shape, activation=hf_config.activation(config)),
        **hf_config.one_rope(config, shape),
        qkv_bias=has_bias,
        o_bias=has_bias,
        gate_up_bias=mlp_bias,
        down_bias=mlp_bias,
        folds=folds(found, shape),
    )


def _swa_hf(config: Fields, shape: Shape, plain: Callable[[Fields, Shape], Traits] = _hf) -> Traits:
    """``plain`` and a sink in each head's softmax, windows, by default in all but the first layer of four, and a base of RoPE for
    each layer, 0 for none."""
    default = [hf_config.SLIDING if i % 4 else hf_config.FULL for i in range(shape.n_layers)]
    windows = hf_config.windows(config, hf_config.layer_kinds(config, default), 128)
    bases = config.raw("layer_rope_theta")
    if bases is None:
        bases = [hf_config.rope_base(config)] * shape.n_layers
    is_list = isinstance(bases, list) and len(bases) == shape.n_layers
    if not is_list or not all(type(base) in (int, float) and 0 <= base <= 1e12 for base in bases):
        raise config.wrong("layer_rope_theta", "a list of a number from 0 to 1e12 for each layer")
    used = list(dict.fromkeys(bases))
    ropes = [hf_config.scaled_rope(config, shape.head_dim, base=base or None) for base in used]
    traits = plain(config, shape)
    return replace(
        traits,
        layers=tuple(
            spec._replace(window=window, rope=used.index(base))
            for spec, window, base in zip(traits.layers, windows, bases, strict=True)
        ),
        rope_tables=tuple(rope.inv_freq * np.float32(base != 0) for rope, base in zip(ropes, used, strict=True)),
        rope_amplitudes=tuple(rope.amplitude if base else 1.0 for rope, base in zip(ropes, used, strict=True)),
        attention_sinks=True,
    )


def _hyperclovax_hf(config: Fields, shape: Shape) -> Traits:
    """Its logits are multiplied by what Granite's are divided by, and norms behind both halves of a layer, if there are any,
    stand before the multiplier of residuals."""
    found = Multipliers(
        hf_config.multiplier(config, "embedding_multiplier"),
        hf_config.multiplier(config, "residual_multiplier"),
        hf_config.multiplier(config, "attention_multiplier", shape.head_dim**-0.5),
        1.0 / hf_config.multiplier(config, "logits_scaling"),
    )
    own, has_norms = folds(found, shape), config.flag("use_post_norm", True)
    if has_norms:
        own = {part: fold for part, fold in own.items() if part not in ("wo", "wo.bias", "down", "down.bias")}
        own |= dict.fromkeys(("post_attention_norm", "post_ffn_norm"), Fold(found.residual))
    norm = "rmsnorm_around" if has_norms else "rmsnorm"
    return replace(
        _hf(config, shape), layers=hf_config.no_windows(shape, norm=norm, activation=hf_config.activation(config)), folds=own
    )


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    found = Multipliers(
        gguf_keys.multiplier(keys, "embedding_scale"),
        gguf_keys.multiplier(keys, "residual_scale"),
        gguf_keys.multiplier(keys, "attention.scale", 1.0 / math.sqrt(shape.head_dim)),
        gguf_keys.multiplier(keys, "logit_scale"),
    )
    rope = gguf_keys.rope_table(keys, shape.head_dim, file)
    return Traits(
        layers=gguf_keys.same_windows(keys, shape),
        rope_tables=(rope if keys.flag("rope.scaling.finetuned", True) else np.zeros_like(rope),),  # so its readers mean it
        qkv_bias=gguf_keys.has_bias(file, "attn_q"),
        o_bias=gguf_keys.has_bias(file, "attn_output"),
        gate_up_bias=gguf_keys.has_bias(file, "ffn_up"),
        down_bias=gguf_keys.has_bias(file, "ffn_down"),
        folds=folds(found, shape),
    )


def _placed_hf(config: Fields, shape: Shape, default: str) -> Traits:
    """The same of the classes that read ``position_embedding_type``: with RoPE or without."""
    position = config.text("position_embedding_type", default)
    if position not in ("rope", "nope"):
        raise UnsupportedModelError(f"position_embedding_type {position!r:.80} is not implemented, only rope and nope")
    traits = _hf(config, shape)
    if position == "rope":
        return traits
    return replace(traits, rope_tables=(np.zeros_like(traits.rope_tables[0]),), rope_amplitudes=())


def _moe_hf(config: Fields, shape: Shape) -> Traits:
    """The softmax is over the experts that are taken."""
    return replace(
        _placed_hf(config, shape, "rope"),
        n_experts=config.integer("num_local_experts"),
        n_experts_used=config.integer("num_experts_per_tok"),
        experts_normalized=True,
    )


def _moe_gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    return replace(
        _gguf(keys, shape, file),
        n_experts=keys.integer("expert_count"),
        n_experts_used=keys.integer("expert_used_count"),
        experts_normalized=True,
    )


def _shared_hf(config: Fields, shape: Shape) -> Traits:
    """The same, and an MLP beside the experts whose weight is 1; width 0 is none."""
    return replace(_moe_hf(config, shape), shared_hidden_dim=config.integer("shared_intermediate_size"))


def _shared_gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    return replace(_moe_gguf(keys, shape, file), shared_hidden_dim=keys.integer(SHARED_FEED_FORWARD))


def _hybrid_hf(config: Fields, shape: Shape) -> Traits:
    """Of a class whose layers have attention or a state space, and whose MLP is what others have beside experts: with attention
    in all layers, and without experts. transformers 5 calls attention full, as elsewhere."""
    hf_config.layer_kinds(config, ["mamba"] * shape.n_layers, known=["attention", hf_config.FULL])
    if config.integer("num_local_experts") != 0:
        raise UnsupportedModelError("experts (num_local_experts) are not implemented for this architecture")
    return replace(_placed_hf(config, shape, "nope"), hidden_dim=config.integer("shared_intermediate_size"))


def _hybrid_gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    return replace(_gguf(keys, shape, file), hidden_dim=keys.integer(SHARED_FEED_FORWARD))


_MOE = "model.layers.{i}.block_sparse_moe."
_KEYS = frozenset({"embedding_scale", "residual_scale", "attention.scale", "logit_scale"})

GRANITE = Architecture("GraniteForCausalLM", "granite", "granite", _hf, _gguf, gguf_permuted=True, gguf_keys=_KEYS)
GRANITE_MOE = Architecture(
    "GraniteMoeForCausalLM", "granitemoe", "granitemoe", _moe_hf, _moe_gguf,
    {
        **PARTS,
        "router": SourceName(_MOE + "router.layer.weight", GGUF_EXPERTS["router"]),
        "gate": SourceName(_MOE + "input_linear.weight", GGUF_EXPERTS["gate"]),
        "up": SourceName(_MOE + "input_linear.weight", GGUF_EXPERTS["up"]),
        "down": SourceName(_MOE + "output_linear.weight", GGUF_EXPERTS["down"]),
    },
    has_experts=True, gguf_permuted=True, gguf_keys=_KEYS,
    hf_defaults={"num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-6},
)  # fmt: skip
_SHARED_MLP = "model.layers.{i}.shared_mlp."
GRANITE_MOE_SHARED = GRANITE_MOE._replace(
    hf="GraniteMoeSharedForCausalLM",
    model_type="granitemoeshared",
    from_hf=_shared_hf,
    from_gguf=_shared_gguf,
    has_shared_expert=True,
    parts={
        **GRANITE_MOE.parts,
        "shared_gate": SourceName(_SHARED_MLP + "input_linear.weight", GGUF_SHARED["shared_gate"]),
        "shared_up": SourceName(_SHARED_MLP + "input_linear.weight", GGUF_SHARED["shared_up"]),
        "shared_down": SourceName(_SHARED_MLP + "output_linear.weight", GGUF_SHARED["shared_down"]),
    },
    hf_defaults={**GRANITE_MOE.hf_defaults, "shared_intermediate_size": 0},
)
_SHARED_GATE_UP = SourceName(_SHARED_MLP + "input_linear.weight", PARTS["gate"].gguf)
# Its GGUF files call themselves "granite", and have the length of a shared expert without experts, and what a state space would
# need.
GRANITE_HYBRID = Architecture(
    "GraniteMoeHybridForCausalLM", "granitemoehybrid", "granite", _hybrid_hf, _hybrid_gguf,
    {
        **PARTS,
        "gate": _SHARED_GATE_UP,
        "up": _SHARED_GATE_UP._replace(gguf=PARTS["up"].gguf),
        "down": SourceName(_SHARED_MLP + "output_linear.weight", PARTS["down"].gguf),
    },
    has_shared_expert=True, gguf_permuted=True,
    hf_defaults={"num_local_experts": 8, "shared_intermediate_size": 1024, "rms_norm_eps": 1e-6},
    gguf_keys=_KEYS | {f"ssm.{key}" for key in ("conv_kernel", "state_size", "group_count", "inner_size", "time_step_rank")},
)  # fmt: skip
_SINKS = SourceName("model.layers.{i}.self_attn.sinks", "")
GRANITE_SWA = GRANITE._replace(
    hf="GraniteSWAForCausalLM", model_type="granite_swa", gguf=None, from_hf=_swa_hf, from_gguf=no_gguf,
    parts={**PARTS, "sinks": _SINKS},
    hf_defaults={"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 8192},
)  # fmt: skip
GRANITE_MOE_SWA = GRANITE_MOE_SHARED._replace(
    hf="GraniteMoeSWAForCausalLM", model_type="granitemoe_swa", gguf=None, from_hf=partial(_swa_hf, plain=_shared_hf),
    from_gguf=no_gguf,
    parts={
        **GRANITE_MOE_SHARED.parts,
        "sinks": _SINKS,
        "router": SourceName(_MOE + "router.weight", ""),
        "gate": SourceName(_MOE + "experts.gate_up_proj", ""),
        "up": SourceName(_MOE + "experts.gate_up_proj", ""),
        "down": SourceName(_MOE + "experts.down_proj", ""),
    },
)  # fmt: skip
HYPERCLOVAX = GRANITE._replace(
    hf="HyperCLOVAXForCausalLM", model_type="hyperclovax", gguf=None, from_hf=_hyperclovax_hf, from_gguf=no_gguf,
    parts={
        **PARTS,
        "post_attention_norm": SourceName("model.layers.{i}.post_norm1.weight", ""),
        "post_ffn_norm": SourceName("model.layers.{i}.post_norm2.weight", ""),
    },
    hf_defaults={"rms_norm_eps": 1e-6},
)  # fmt: skip
