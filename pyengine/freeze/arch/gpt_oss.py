"""gpt-oss: experts, in MXFP4 or not, with biases and a clamped gate, a score in each head's softmax that has no value (a sink),
windows in every other layer, YaRN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...errors import UnsupportedModelError
from ...format.config import LayerSpec
from ..fields import Fields
from ..rope import Rope
from . import gguf_keys, hf_config
from .base import PARTS, Architecture, Fold, Shape, SourceName, Tensors, Traits
from .mixture import GGUF_EXPERTS

_PERIOD, _WINDOW, _BASE = 2, 128, 150_000.0
_LIMIT = 7.0
_EXPERTS = "model.layers.{i}.mlp.experts."
_GATED = ("gate", "up", "gate.bias", "up.bias")  # a row of the gate, a row of what it gates, and so on


def _traits(
    shape: Shape, windows: Sequence[int], rope: Rope, hidden_dim: int, experts: tuple[int, int], folds: Mapping[str, Fold]
) -> Traits:
    return Traits(
        layers=tuple(LayerSpec(window, activation="swiglu_clamped") for window in windows),
        rope_tables=(rope.inv_freq,),
        rope_amplitudes=(rope.amplitude,),
        qkv_bias=True,
        o_bias=True,
        attention_sinks=True,
        hidden_dim=hidden_dim,
        n_experts=experts[0],
        n_experts_used=experts[1],
        experts_normalized=True,
        router_bias=True,
        gate_up_bias=True,
        down_bias=True,
        folds=folds,
    )


def _hf(config: Fields, shape: Shape) -> Traits:
    if config.number("swiglu_limit", _LIMIT) != _LIMIT:
        raise UnsupportedModelError(f"swiglu_limit {config.number('swiglu_limit')!r} is not implemented, only {_LIMIT}")
    hf_config.activation(config)
    kinds = hf_config.layer_kinds(config, hf_config.every(_PERIOD, shape.n_layers))
    rope = hf_config.scaled_rope(config, shape.head_dim, _BASE)
    hidden_dim, is_transposed = config.integer("intermediate_size"), not hf_config.is_mxfp4(config)
    folds = {part: Fold(pieces=hidden_dim) for part in _GATED}
    if is_transposed:  # checkpoints in BF16 have their experts' matrices as (inputs, outputs)
        folds |= {part: Fold(pieces=hidden_dim, is_transposed=True) for part in ("gate", "up")}
        folds["down"] = Fold(is_transposed=True)
    return _traits(
        shape, hf_config.windows(config, kinds, _WINDOW), rope, hidden_dim,
        (config.integer("num_local_experts"), config.integer("num_experts_per_tok")),
        folds,
    )  # fmt: skip


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    """The format has no key for YaRN's ``truncate``: the model was made without."""
    kinds, window = gguf_keys.layer_kinds(keys, shape.n_layers, _PERIOD), gguf_keys.window(keys)
    return _traits(
        shape, [window if kind == hf_config.SLIDING else 0 for kind in kinds],
        gguf_keys.scaled_rope(keys, shape, file, truncate=False), keys.integer("expert_feed_forward_length"),
        (keys.integer("expert_count"), keys.integer("expert_used_count")), {},
    )  # fmt: skip


_GATE_UP, _GATE_UP_BIAS = _EXPERTS + "gate_up_proj", _EXPERTS + "gate_up_proj_bias"

GPT_OSS = Architecture(
    "GptOssForCausalLM", "gpt_oss", "gpt-oss", _hf, _gguf,
    {
        **PARTS,
        "sinks": SourceName("model.layers.{i}.self_attn.sinks", "blk.{i}.attn_sinks.weight"),
        "ffn_norm": SourceName("model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.post_attention_norm.weight"),
        "router": SourceName("model.layers.{i}.mlp.router.weight", GGUF_EXPERTS["router"]),
        "router.bias": SourceName("model.layers.{i}.mlp.router.bias", "blk.{i}.ffn_gate_inp.bias"),
        "gate": SourceName(_GATE_UP, GGUF_EXPERTS["gate"]),
        "up": SourceName(_GATE_UP, GGUF_EXPERTS["up"]),
        "down": SourceName(_EXPERTS + "down_proj", GGUF_EXPERTS["down"]),
        "gate.bias": SourceName(_GATE_UP_BIAS, "blk.{i}.ffn_gate_exps.bias"),
        "up.bias": SourceName(_GATE_UP_BIAS, "blk.{i}.ffn_up_exps.bias"),
        "down.bias": SourceName(_EXPERTS + "down_proj_bias", "blk.{i}.ffn_down_exps.bias"),
    },
    has_experts=True,
    gguf_keys=frozenset({gguf_keys.WINDOW_PATTERN, "expert_feed_forward_length"}),
    hf_defaults={
        "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128, "num_experts_per_tok": 4, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
)  # fmt: skip
