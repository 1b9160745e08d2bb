"""OLMo (the first): LayerNorms without weights and biases."""

from __future__ import annotations

from dataclasses import replace

from ...errors import UnsupportedModelError
from ..fields import Fields
from . import gguf_keys, hf_config, llama
from .base import Architecture, Fold, Shape, Tensors, Traits
from .layer_norm import QKV_BIASES, folded

_EPS = 1e-5
_GAINS = {part: Fold(offset=1.0, is_absent=True) for part in ("attention_norm", "ffn_norm", "norm")}


def _folded(traits: Traits, norm_eps: float) -> Traits:
    own = (*QKV_BIASES, "wo.bias") if traits.qkv_bias else ()
    return folded(replace(traits, folds=_GAINS), norm_eps=norm_eps, own=own, has_norm_biases=False)


def _hf(config: Fields, shape: Shape) -> Traits:
    if not config.is_null("clip_qkv") and "clip_qkv" in config:
        raise UnsupportedModelError("clip_qkv, a limit of q, k and v, is not implemented")
    plain = Traits(
        layers=hf_config.no_windows(shape, activation=hf_config.activation(config)),
        **hf_config.one_rope(config, shape),
        qkv_bias=config.flag("attention_bias", False),
    )
    return _folded(plain, _EPS)


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    return _folded(llama.gguf_traits(keys, shape, file), gguf_keys.norm_eps(keys, gguf_keys.LAYER_NORM_EPS))


OLMO = Architecture(
    "OlmoForCausalLM", "olmo", "olmo", _hf, _gguf, gguf_permuted=True, gguf_keys=frozenset({gguf_keys.LAYER_NORM_EPS})
)
