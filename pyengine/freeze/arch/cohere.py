"""Command R and Command R7B: LayerNorms without biases, halves of a layer that are parallel, RoPE that turns neighbours, scaled
logits; of Command R7B three layers of four have a window, and the others no RoPE."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import UnsupportedModelError
from ...format.config import PARALLEL, LayerSpec
from ..fields import Fields
from ..rope import Rope
from . import gguf_keys, hf_config, rotary
from .base import Architecture, Fold, Shape, Tensors, Traits
from .layer_norm import QKV_BIASES, folded
from .smollm3 import tables_of

_BIASES = (*QKV_BIASES, "wo.bias")
_PERIOD = 4
_DEFAULT_SCALE = 0.0625


def _folds(shape: Shape, logit_scale: float) -> Mapping[str, Fold]:
    order = rotary.order(shape.head_dim, shape.head_dim, is_interleaved=True)
    return {**rotary.folds(order), "norm": Fold(logit_scale)}


def _folded(traits: Traits, norm_eps: float, has_bias: bool) -> Traits:
    own = _BIASES if has_bias else ()
    return folded(traits, norm_eps=norm_eps, own=own, has_norm_biases=False, is_parallel=True)


def _hf_folded(config: Fields, shape: Shape, traits: Traits) -> Traits:
    return _folded(traits, config.number("layer_norm_eps", 1e-5), config.flag("attention_bias", False))


def _command_r_hf(config: Fields, shape: Shape) -> Traits:
    if config.flag("use_qk_norm", False):
        raise UnsupportedModelError("use_qk_norm, LayerNorms of q and k heads, is not implemented")
    plain = Traits(
        layers=hf_config.no_windows(shape, norm=PARALLEL, activation=hf_config.activation(config)),
        **hf_config.one_rope(config, shape),
        folds=_folds(shape, hf_config.multiplier(config, "logit_scale", _DEFAULT_SCALE)),
    )
    return _hf_folded(config, shape, plain)


def _command_r7b_hf(config: Fields, shape: Shape) -> Traits:
    default = hf_config.periodic_kinds(config, shape.n_layers, _PERIOD)
    kinds, activation = hf_config.layer_kinds(config, default), hf_config.activation(config)
    has_rope = [kind == hf_config.SLIDING and not config.is_null("sliding_window") for kind in kinds]
    which, tables = tables_of(has_rope, hf_config.scaled_rope(config, shape.head_dim))
    windows = hf_config.windows(config, kinds, 4096)
    plain = Traits(
        layers=tuple(LayerSpec(*one, PARALLEL, activation) for one in zip(windows, which, strict=True)),
        **tables,
        folds=_folds(shape, hf_config.multiplier(config, "logit_scale", _DEFAULT_SCALE)),
    )
    return _hf_folded(config, shape, plain)


def _command_r_gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    plain = Traits(
        layers=gguf_keys.same_windows(keys, shape, norm=PARALLEL),
        rope_tables=(gguf_keys.rope_table(keys, shape.head_dim, file),),
        folds=_folds(shape, gguf_keys.multiplier(keys, "logit_scale")),
    )
    return _folded(plain, gguf_keys.norm_eps(keys, gguf_keys.LAYER_NORM_EPS), gguf_keys.has_bias(file, "attn_q"))


def _command_r7b_gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    """The format's readers know the period."""
    kinds = gguf_keys.layer_kinds(keys, shape.n_layers, _PERIOD)
    has_rope, window = [kind == hf_config.SLIDING for kind in kinds], gguf_keys.window(keys)
    which, tables = tables_of(has_rope, Rope(gguf_keys.rope_table(keys, shape.head_dim, file)))
    layers = zip(has_rope, which, strict=True)
    plain = Traits(
        layers=tuple(LayerSpec(window * has, table, PARALLEL) for has, table in layers),
        **tables,
        folds=_folds(shape, gguf_keys.multiplier(keys, "logit_scale")),
    )
    return _folded(plain, gguf_keys.norm_eps(keys, gguf_keys.LAYER_NORM_EPS), gguf_keys.has_bias(file, "attn_q"))


_KEYS = frozenset({"logit_scale", gguf_keys.LAYER_NORM_EPS})
_DEFAULTS = {"tie_word_embeddings": True, "max_position_embeddings": 8192}

COMMAND_R = Architecture(
    "CohereForCausalLM", "cohere", "command-r", _command_r_hf, _command_r_gguf, hf_defaults=_DEFAULTS, gguf_keys=_KEYS
)
COMMAND_R7B = Architecture(
    "Cohere2ForCausalLM", "cohere2", "cohere2", _command_r7b_hf, _command_r7b_gguf, hf_defaults=_DEFAULTS,
    gguf_keys=_KEYS | {gguf_keys.WINDOW_PATTERN},
)  # fmt: skip
