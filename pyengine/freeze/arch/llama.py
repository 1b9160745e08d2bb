"""Llama 2 and 3.x (SmolLM2 too), Mistral, Ministral and CWM, and EXAONE 3 and IQuest-Coder, Llamas under other names: the plain
family."""

from __future__ import annotations

from ...errors import UnsupportedModelError
from ...format.config import LayerSpec
from ..fields import Fields
from . import gguf_keys, hf_config
from .base import PARTS, Architecture, Shape, SourceName, Tensors, Traits, no_gguf

_MISTRAL_WINDOW = 4096


def _llama_hf(config: Fields, shape: Shape) -> Traits:
    has_bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    return Traits(
        layers=hf_config.no_windows(shape, activation=hf_config.activation(config)),
        **hf_config.one_rope(config, shape),
        qkv_bias=has_bias,
        o_bias=has_bias,
        gate_up_bias=mlp_bias,
        down_bias=mlp_bias,
    )


def _mistral_hf(config: Fields, shape: Shape) -> Traits:
    kinds = hf_config.layer_kinds(config, [hf_config.SLIDING] * shape.n_layers)
    windows = hf_config.windows(config, kinds, _MISTRAL_WINDOW)
    activation = hf_config.activation(config)
    return Traits(
        layers=tuple(LayerSpec(window=window, activation=activation) for window in windows),
        **hf_config.one_rope(config, shape),
    )


def _iquest_hf(config: Fields, shape: Shape) -> Traits:
    if config.raw("clip_qkv") is not None or config.flag("use_sliding_window", False):
        raise UnsupportedModelError("clip_qkv and use_sliding_window are not implemented for this architecture")
    return _llama_hf(config, shape)


def _cwm_hf(config: Fields, shape: Shape) -> Traits:
    """By default the first layer of four has no window."""
    default = [hf_config.SLIDING if i % 4 else hf_config.FULL for i in range(shape.n_layers)]
    windows = hf_config.windows(config, hf_config.layer_kinds(config, default), 8192)
    activation = hf_config.activation(config)
    return Traits(
        layers=tuple(LayerSpec(window=window, activation=activation) for window in windows),
        **hf_config.one_rope(config, shape, 1e6),
    )


def gguf_traits(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    """Of a file with nothing but what Llamas have."""
    return Traits(
        layers=gguf_keys.same_windows(keys, shape),
        **gguf_keys.one_rope(keys, shape, file),
        qkv_bias=gguf_keys.has_bias(file, "attn_q"),
        o_bias=gguf_keys.has_bias(file, "attn_output"),
        gate_up_bias=gguf_keys.has_bias(file, "ffn_up"),
        down_bias=gguf_keys.has_bias(file, "ffn_down"),
    )


LLAMA = Architecture("LlamaForCausalLM", "llama", "llama", _llama_hf, gguf_traits, gguf_permuted=True)
MISTRAL = Architecture(
    "MistralForCausalLM", "mistral", "llama", _mistral_hf, gguf_traits, gguf_permuted=True, hf_defaults={"num_key_value_heads": 8}
)
# Mistral's layers under another name.
MINISTRAL = MISTRAL._replace(hf="MinistralForCausalLM", model_type="ministral")
CWM = Architecture(
    "CwmForCausalLM", "cwm", None, _cwm_hf, no_gguf,
    hf_defaults={
        "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
)  # fmt: skip
IQUEST_CODER = LLAMA._replace(
    hf="IQuestCoderForCausalLM", model_type="iquestcoder", from_hf=_iquest_hf,
    hf_defaults={"num_key_value_heads": 8, "head_dim": 128},
)  # fmt: skip
_EXAONE_LAYER = "transformer.h.{i}."
_EXAONE_WEIGHTS = {
    "tok_embeddings": "transformer.wte.weight",
    "norm": "transformer.ln_f.weight",
    "attention_norm": _EXAONE_LAYER + "ln_1.weight",
    **{part: f"{_EXAONE_LAYER}attn.attention.{part}_proj.weight" for part in ("q", "k", "v")},
    "wo": _EXAONE_LAYER + "attn.attention.out_proj.weight",
    "ffn_norm": _EXAONE_LAYER + "ln_2.weight",
    "gate": _EXAONE_LAYER + "mlp.c_fc_0.weight",
    "up": _EXAONE_LAYER + "mlp.c_fc_1.weight",
    "down": _EXAONE_LAYER + "mlp.c_proj.weight",
}
_EXAONE = _EXAONE_WEIGHTS | {
    f"{part}.bias": name.replace(".weight", ".bias") for part, name in _EXAONE_WEIGHTS.items() if f"{part}.bias" in PARTS
}
_EXAONE["key_bias"] = _EXAONE["k.bias"]
EXAONE = Architecture(
    "ExaoneForCausalLM", "exaone", "exaone", _llama_hf, gguf_traits,
    {part: name if part not in _EXAONE else SourceName(_EXAONE[part], name.gguf) for part, name in PARTS.items()},
    hf_keys={
        "num_layers": "num_hidden_layers", "layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act",
    },
    hf_defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "max_position_embeddings": 4096},
)  # fmt: skip
