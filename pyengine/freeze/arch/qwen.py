"""Qwen2, Qwen2.5 (biases of q, k and v) and Qwen3 (norms of q and k instead), and the text models of those that see (VL), whose
RoPE turns by three positions, which are one in a text."""

from __future__ import annotations

from ...format.config import LayerSpec
from ..fields import Fields
from . import gguf_keys, hf_config
from .base import Architecture, Shape, Tensors, Traits

_DEFAULT_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28


def _layers(config: Fields, shape: Shape) -> tuple[LayerSpec, ...]:
    """Windows are opt-in: published files carry a width that ``use_sliding_window`` turns off."""
    activation = hf_config.activation(config)
    if config.is_null("sliding_window") or not config.flag("use_sliding_window", False):
        return hf_config.no_windows(shape, activation=activation)
    n_layers = shape.n_layers
    full = max(0, min(config.integer("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS), n_layers))
    kinds = hf_config.layer_kinds(config, [hf_config.FULL] * full + [hf_config.SLIDING] * (n_layers - full))
    windows = hf_config.windows(config, kinds, _DEFAULT_WINDOW)
    return tuple(LayerSpec(window=window, activation=activation) for window in windows)


def _qwen2_hf(config: Fields, shape: Shape) -> Traits:
    return Traits(layers=_layers(config, shape), qkv_bias=True, **hf_config.one_rope(config, shape))


def _qwen3_hf(config: Fields, shape: Shape) -> Traits:
    has_bias = config.flag("attention_bias", False)
    return Traits(
        layers=_layers(config, shape),
        **hf_config.one_rope(config, shape),
        qkv_bias=has_bias,
        o_bias=has_bias,
        qk_norm=True,
    )


def _qwen2_gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    return Traits(
        layers=gguf_keys.same_windows(keys, shape),
        **gguf_keys.one_rope(keys, shape, file),
        qkv_bias=True,
    )


def _qwen3_gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    return Traits(
        layers=gguf_keys.same_windows(keys, shape),
        **gguf_keys.one_rope(keys, shape, file),
        qkv_bias=gguf_keys.has_bias(file, "attn_q"),
        o_bias=gguf_keys.has_bias(file, "attn_output"),
        qk_norm=True,
    )


_DEFAULTS = {"num_key_value_heads": 32}

QWEN2 = Architecture("Qwen2ForCausalLM", "qwen2", "qwen2", _qwen2_hf, _qwen2_gguf, hf_defaults=_DEFAULTS)
QWEN3 = Architecture(
    "Qwen3ForCausalLM", "qwen3", "qwen3", _qwen3_hf, _qwen3_gguf, hf_defaults={**_DEFAULTS, "head_dim": 128}
)
# The text model's tensors have one of two spellings; what else is there, under ``visual`` and ``model.visual``, is not of it.
VL_TEXT = {
    "model.language_model.": "model.",
    **{name: name for name in ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")},
}
VL_GGUF_KEYS = frozenset({"rope.dimension_sections", "n_deepstack_layers"})
QWEN2_VL = QWEN2._replace(
    hf="Qwen2VLForConditionalGeneration", model_type="qwen2_vl", gguf="qwen2vl", hf_text=VL_TEXT, gguf_keys=VL_GGUF_KEYS,
    hf_defaults={"num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
)  # fmt: skip
QWEN2_5_VL = QWEN2_VL._replace(hf="Qwen2_5_VLForConditionalGeneration", model_type="qwen2_5_vl")
QWEN3_VL = QWEN3._replace(
    hf="Qwen3VLForConditionalGeneration", model_type="qwen3_vl", gguf="qwen3vl", hf_text=VL_TEXT, gguf_keys=VL_GGUF_KEYS
)
