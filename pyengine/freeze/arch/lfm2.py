"""LFM2: most layers have a gated convolution over a few positions instead of attention, the others norms of q and k (Qwen3's)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import UnsupportedModelError
from ...format.config import MAX_DIM, MAX_TAPS, SHORT_CONV, LayerSpec
from ..fields import Fields
from . import gguf_keys, hf_config
from .base import PARTS, Architecture, Fold, Shape, SourceName, Tensors, Traits

_CONV = "conv"
_KINDS = (hf_config.FULL, _CONV)
_KV_HEADS = "attention.head_count_kv"
_TAPS = "shortconv.l_cache"
_DEFAULT_TAPS, _DEFAULT_BASE = 3, 1_000_000.0
_FOLDS = {"taps": Fold(is_transposed=True)}


def _layers(kinds: Sequence[str], taps: int) -> tuple[LayerSpec, ...]:
    return tuple(LayerSpec(window=taps, mixer=SHORT_CONV) if kind == _CONV else LayerSpec() for kind in kinds)


def _taps(fields: Fields, key: str) -> int:
    taps = fields.integer(key, _DEFAULT_TAPS)
    if not 1 <= taps <= MAX_TAPS:
        raise fields.wrong(key, f"an integer in 1..{MAX_TAPS}")
    return taps


def _default_kinds(config: Fields, n_layers: int) -> list[str]:
    """By ``full_attn_idxs``, which older files have in place of ``layer_types``."""
    full = config.raw("full_attn_idxs")
    if full is None:
        return [hf_config.FULL] * n_layers
    if not isinstance(full, list) or not all(type(i) is int for i in full):
        raise config.wrong("full_attn_idxs", "a list of layers")
    return [hf_config.FULL if i in full else _CONV for i in range(n_layers)]


def _size(config: Fields, key: str, default: int) -> int:
    value = config.integer(key, default)
    if not 1 <= value <= 2 * MAX_DIM:
        raise config.wrong(key, f"an integer in 1..{2 * MAX_DIM}")
    return value


def _hidden_dim(config: Fields) -> int:
    """The MLP's width: two thirds of what is said, times a factor, up to a multiple; or what is said."""
    width = _size(config, "block_ff_dim" if "block_ff_dim" in config else "intermediate_size", 12_288)
    if not config.flag("block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    if config.is_null("block_ffn_dim_multiplier"):
        return width
    factor = hf_config.multiplier(config, "block_ffn_dim_multiplier")
    multiple = _size(config, "block_multiple_of", 256)
    return -(-int(factor * width) // multiple) * multiple


def _hf(config: Fields, shape: Shape) -> Traits:
    if config.flag("conv_bias", False):
        raise UnsupportedModelError("conv_bias is not implemented")
    kinds = hf_config.layer_kinds(config, _default_kinds(config, shape.n_layers), _KINDS)
    return Traits(
        layers=_layers(kinds, _taps(config, "conv_L_cache")),
        **hf_config.one_rope(config, shape, _DEFAULT_BASE),
        qk_norm=True,
        hidden_dim=_hidden_dim(config),
        norm_eps=config.number("norm_eps", 1e-5),
        folds=_FOLDS,
    )


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    """Layers without key heads are the convolutions."""
    if gguf_keys.window(keys):
        raise UnsupportedModelError("LFM2 with windows of attention is not implemented")
    heads = keys.raw(_KV_HEADS)
    counts = heads.tolist() if isinstance(heads, np.ndarray) else [heads] * shape.n_layers
    if len(counts) != shape.n_layers:
        raise keys.wrong(_KV_HEADS, "a number of heads for each layer")
    kinds = [_CONV if count == 0 else hf_config.FULL for count in counts]
    return Traits(
        layers=_layers(kinds, _taps(keys, _TAPS)), **gguf_keys.one_rope(keys, shape, file), qk_norm=True, folds=_FOLDS
    )


_LAYER, _GGUF = "model.layers.{i}.", "blk.{i}.shortconv."

LFM2 = Architecture(
    "Lfm2ForCausalLM", "lfm2", "lfm2", _hf, _gguf,
    {
        **PARTS,
        "norm": SourceName("model.embedding_norm.weight", "token_embd_norm.weight"),
        "attention_norm": SourceName(_LAYER + "operator_norm.weight", PARTS["attention_norm"].gguf),
        "q_norm": SourceName(_LAYER + "self_attn.q_layernorm.weight", PARTS["q_norm"].gguf),
        "k_norm": SourceName(_LAYER + "self_attn.k_layernorm.weight", PARTS["k_norm"].gguf),
        "wo": SourceName(_LAYER + "self_attn.out_proj.weight", PARTS["wo"].gguf),
        "conv_in": SourceName(_LAYER + "conv.in_proj.weight", _GGUF + "in_proj.weight"),
        "taps": SourceName(_LAYER + "conv.conv.weight", _GGUF + "conv.weight"),
        "conv_out": SourceName(_LAYER + "conv.out_proj.weight", _GGUF + "out_proj.weight"),
        "ffn_norm": SourceName(_LAYER + "ffn_norm.weight", PARTS["ffn_norm"].gguf),
        "gate": SourceName(_LAYER + "feed_forward.w1.weight", PARTS["gate"].gguf),
        "up": SourceName(_LAYER + "feed_forward.w3.weight", PARTS["up"].gguf),
        "down": SourceName(_LAYER + "feed_forward.w2.weight", PARTS["down"].gguf),
    },
    hf_defaults={"num_key_value_heads": 8},
    gguf_keys=frozenset({_KV_HEADS, _TAPS}),
)  # fmt: skip
