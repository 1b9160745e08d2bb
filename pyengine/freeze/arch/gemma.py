"""Gemma 1 to 3 (text) and VaultGemma: gains of 1 + w, scaled embeddings and queries are folded; norms around both halves of a
layer, GELU, windows with a RoPE table of their own and softcaps are fields of the file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ...errors import UnsupportedModelError
from ...format.config import LayerSpec
from ..fields import Fields
from ..rope import Rope, rope_inv_freq
from . import gguf_keys, hf_config
from .base import PARTS, Architecture, Fold, Shape, SourceName, Tensors, Traits, no_gguf

_NORMS = "rmsnorm_around"
_GAINS = ("attention_norm", "post_attention_norm", "ffn_norm", "post_ffn_norm", "q_norm", "k_norm", "norm")
_PERIOD = {2: 2, 3: 6}  # generation -> the last layer of so many has no window
_GLOBAL_BASE, _LOCAL_BASE = 1_000_000.0, 10_000.0  # of Gemma 3
_GELU = "gelu_pytorch_tanh"
_LAYERS_27B = {2: 46, 3: 62}

_PARTS = {
    **PARTS,
    "post_attention_norm": SourceName(
        "model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.post_attention_norm.weight"
    ),
    "ffn_norm": SourceName("model.layers.{i}.pre_feedforward_layernorm.weight", "blk.{i}.ffn_norm.weight"),
    "post_ffn_norm": SourceName("model.layers.{i}.post_feedforward_layernorm.weight", "blk.{i}.post_ffw_norm.weight"),
}


def _folds(shape: Shape, query: float, offset: float, qk_norm: bool) -> dict[str, Fold]:
    """``query`` is what scores are multiplied by; ``offset`` is 1, or 0 where gains are whole already, as in GGUF."""
    gains = {part: Fold(offset=offset) for part in _GAINS}
    embedding, ratio = math.sqrt(shape.dim), query * math.sqrt(shape.head_dim)
    gains["norm"] = Fold(1.0 / embedding if shape.tied else 1.0, offset)
    queries = {"q_norm": Fold(ratio, offset)} if qk_norm else {"q": Fold(ratio), "q.bias": Fold(ratio)}
    return {**gains, **queries, "tok_embeddings": Fold(embedding)}


def _layers(
    kinds: Sequence[str], windows: Sequence[int], ropes: Mapping[str, Rope], activation: str
) -> dict[str, Any]:
    """The fields of Traits that are of the layers and their tables, numbered in the order in which layers need them."""
    used = list(dict.fromkeys(kinds))
    layers = tuple(
        LayerSpec(window, used.index(kind), _NORMS, activation) for kind, window in zip(kinds, windows, strict=True)
    )
    return {
        "layers": layers,
        "rope_tables": tuple(ropes[kind].inv_freq for kind in used),
        "rope_amplitudes": tuple(ropes[kind].amplitude for kind in used),
    }


# ---------------------------------------------------------------------------- Hugging Face


def _ropes_hf(config: Fields, head_dim: int) -> dict[str, Rope]:
    """Gemma 3's two tables. Older files have the bases in two keys."""
    bases = {
        hf_config.FULL: config.number("rope_theta", _GLOBAL_BASE),
        hf_config.SLIDING: config.number("rope_local_base_freq", _LOCAL_BASE),
    }
    return hf_config.ropes_of_kinds(config, head_dim, bases)


def _common_hf(config: Fields, shape: Shape, qk_norm: bool) -> dict[str, Any]:
    has_bias = config.flag("attention_bias", False)
    if qk_norm and "attn_logit_softcapping" in config:  # transformers reads the key of Gemma 3 and leaves it at that
        raise UnsupportedModelError("attn_logit_softcapping, soft caps of scores, is not implemented beside norms of q and k")
    query = hf_config.multiplier(config, "query_pre_attn_scalar") ** -0.5
    return {
        "qkv_bias": has_bias,
        "o_bias": has_bias,
        "qk_norm": qk_norm,
        "attention_softcap": hf_config.softcap(config, "attn_logit_softcapping"),
        "logits_softcap": hf_config.softcap(config, "final_logit_softcapping"),
        "folds": _folds(shape, query, 1.0, qk_norm),
    }


def _gemma3_hf(config: Fields, shape: Shape) -> Traits:
    kinds = hf_config.layer_kinds(config, hf_config.periodic_kinds(config, shape.n_layers, _PERIOD[3]))
    activation = hf_config.activation(config, "hidden_activation", _GELU)
    layers = _layers(kinds, hf_config.windows(config, kinds), _ropes_hf(config, shape.head_dim), activation)
    return Traits(**layers, **_common_hf(config, shape, qk_norm=True))


def _gemma2_hf(config: Fields, shape: Shape, norms: str = _NORMS) -> Traits:
    kinds = hf_config.layer_kinds(config, hf_config.periodic_kinds(config, shape.n_layers, _PERIOD[2]))
    activation = hf_config.activation(config, "hidden_activation", _GELU)
    windows = hf_config.windows(config, kinds)
    return Traits(
        layers=tuple(LayerSpec(window, 0, norms, activation) for window in windows),
        **hf_config.one_rope(config, shape),
        **_common_hf(config, shape, qk_norm=False),
    )


def _gemma1_hf(config: Fields, shape: Shape) -> Traits:
    """``gelu`` in the first published files means the other one."""
    has_bias = config.flag("attention_bias", False)
    activation = hf_config.activation(config, default=_GELU, known={_GELU: "geglu_tanh", "gelu": "geglu_tanh"})
    return Traits(
        layers=hf_config.no_windows(shape, activation=activation),
        **hf_config.one_rope(config, shape),
        qkv_bias=has_bias,
        o_bias=has_bias,
        folds=_folds(shape, shape.head_dim**-0.5, 1.0, False),
    )


# ---------------------------------------------------------------------------- GGUF


def _query_scale_gguf(shape: Shape, generation: int) -> float:
    """The format has no key for it: its readers know that the 27B models alone do not divide by sqrt(head_dim)."""
    if shape.n_layers == _LAYERS_27B[generation]:
        return float((shape.dim / shape.n_heads) ** -0.5)
    return float(shape.head_dim**-0.5)


def _windows_gguf(keys: Fields, kinds: Sequence[str]) -> list[int]:
    window = gguf_keys.window(keys)
    return [window if kind == hf_config.SLIDING else 0 for kind in kinds]


def _common_gguf(keys: Fields, shape: Shape, file: Tensors, generation: int) -> dict[str, Any]:
    qk_norm = generation == 3
    return {
        "qkv_bias": gguf_keys.has_bias(file, "attn_q"),
        "o_bias": gguf_keys.has_bias(file, "attn_output"),
        "qk_norm": qk_norm,
        "attention_softcap": gguf_keys.softcap(keys, "attn_logit_softcapping"),
        "logits_softcap": gguf_keys.softcap(keys, "final_logit_softcapping"),
        "folds": _folds(shape, _query_scale_gguf(shape, generation), 0.0, qk_norm),
    }


def _gemma3_gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    """A rope.scaling is of the layers without a window."""
    kinds = gguf_keys.layer_kinds(keys, shape.n_layers, _PERIOD[3])
    ropes = {
        hf_config.FULL: Rope(gguf_keys.rope_table(keys, shape.head_dim, file, _GLOBAL_BASE)),
        hf_config.SLIDING: Rope(rope_inv_freq(shape.head_dim, keys.number("rope.freq_base_swa", _LOCAL_BASE), None)),
    }
    layers = _layers(kinds, _windows_gguf(keys, kinds), ropes, "geglu_tanh")
    return Traits(**layers, **_common_gguf(keys, shape, file, 3))


def _gemma2_gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    windows = _windows_gguf(keys, gguf_keys.layer_kinds(keys, shape.n_layers, _PERIOD[2]))
    return Traits(
        layers=tuple(LayerSpec(window, 0, _NORMS, "geglu_tanh") for window in windows),
        rope_tables=(gguf_keys.rope_table(keys, shape.head_dim, file),),
        **_common_gguf(keys, shape, file, 2),
    )


def _gemma1_gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    return Traits(
        layers=gguf_keys.same_windows(keys, shape, activation="geglu_tanh"),
        rope_tables=(gguf_keys.rope_table(keys, shape.head_dim, file),),
        qkv_bias=gguf_keys.has_bias(file, "attn_q"),
        o_bias=gguf_keys.has_bias(file, "attn_output"),
        folds=_folds(shape, shape.head_dim**-0.5, 0.0, False),
    )


# What published files leave out: transformers' classes have it.
_DEFAULTS = {
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6, "sliding_window": 4096,
    "query_pre_attn_scalar": 256, "tie_word_embeddings": True,
}  # fmt: skip
_KEYS = frozenset({gguf_keys.WINDOW_PATTERN, "final_logit_softcapping"})

GEMMA2 = Architecture(
    "Gemma2ForCausalLM", "gemma2", "gemma2", _gemma2_hf, _gemma2_gguf, _PARTS,
    gguf_keys=_KEYS | {"attn_logit_softcapping"},
    hf_defaults={**_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "max_position_embeddings": 8192},
)  # fmt: skip
GEMMA = Architecture(
    "GemmaForCausalLM", "gemma", "gemma", _gemma1_hf, _gemma1_gguf,
    hf_defaults={
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
)  # fmt: skip
# Gemma 2 with norms before both halves of a layer only.
VAULT_GEMMA = GEMMA2._replace(
    hf="VaultGemmaForCausalLM", model_type="vaultgemma", gguf=None, from_gguf=no_gguf,
    from_hf=partial(_gemma2_hf, norms="rmsnorm"), parts={**PARTS, "ffn_norm": _PARTS["ffn_norm"]},
)  # fmt: skip
GEMMA3 = Architecture(
    "Gemma3ForCausalLM", "gemma3_text", "gemma3", _gemma3_hf, _gemma3_gguf, _PARTS, gguf_keys=_KEYS | {"rope.freq_base_swa"},
    hf_defaults={**_DEFAULTS, "max_position_embeddings": 131_072, "vocab_size": 262_208},
)  # fmt: skip


def _images_hf(config: Fields, shape: Shape) -> Traits:
    if hf_config.softcap(config, "final_logit_softcapping"):  # this class of transformers reads the key and leaves it at that
        raise UnsupportedModelError("final_logit_softcapping, a soft cap of logits, is not implemented for this architecture")
    return _gemma3_hf(config, shape)


# Of a model that sees images. Published files have the first spelling of names, some the last but one; version 5 the others.
TEXT_OF_IMAGES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "model.text_model.": "model.",
    "lm_head.": "lm_head.",
}
# The models from 4B on.
GEMMA3_IMAGES = GEMMA3._replace(
    hf="Gemma3ForConditionalGeneration",
    model_type="gemma3",
    from_hf=_images_hf,
    hf_text=TEXT_OF_IMAGES,
)
