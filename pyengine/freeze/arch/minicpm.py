"""MiniCPM and MiniCPM4 with all of their attention: a Llama whose embeddings, residuals and logits are scaled, and LongRoPE. Of
it all is linear. Attention that leaves out blocks of a long text (``sparse_config``) is refused."""

from __future__ import annotations

import math

import numpy as np

from ...errors import UnsupportedModelError
from ..fields import REQUIRED, Fields
from . import gguf_keys, hf_config, long_rope
from .base import Architecture, Shape, Tensors, Traits
from .granite import Multipliers, folds
from .long_rope import LongRope


def _traits(shape: Shape, found: Multipliers, activation: str, base: float, scaling: LongRope | None, has_bias: bool) -> Traits:
    rope, max_seq_len = long_rope.table(scaling, shape, shape.head_dim, base)
    return Traits(
        layers=hf_config.no_windows(shape, activation=activation),
        rope_tables=(rope.inv_freq,),
        rope_amplitudes=(rope.amplitude,),
        max_seq_len=max_seq_len,
        qkv_bias=has_bias,
        o_bias=has_bias,
        folds=folds(found, shape),
    )


def _as_in_gguf(value: float) -> float:
    """The float32 next to it as a decimal."""
    return float(str(np.float32(value)))


def _hf(config: Fields, shape: Shape) -> Traits:
    if config.raw("sparse_config"):
        raise UnsupportedModelError("sparse_config, attention to some blocks of a long text, is not implemented")
    found = Multipliers(
        hf_config.multiplier(config, "scale_emb", REQUIRED),
        _as_in_gguf(hf_config.multiplier(config, "scale_depth", REQUIRED) / math.sqrt(shape.n_layers)),
        1.0 / math.sqrt(shape.head_dim),
        _as_in_gguf(shape.dim / hf_config.multiplier(config, "dim_model_base", REQUIRED)),
    )
    scaling, base = long_rope.from_hf(config, shape, shape.head_dim), hf_config.rope_base(config)
    return _traits(shape, found, hf_config.activation(config), base, scaling, config.flag("attention_bias", False))


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    """Files of before there were these keys mean what their readers know of the one model that there was; they are refused."""
    found = Multipliers(
        gguf_keys.multiplier(keys, "embedding_scale", REQUIRED),
        gguf_keys.multiplier(keys, "residual_scale", REQUIRED),
        1.0 / math.sqrt(shape.head_dim),
        gguf_keys.multiplier(keys, "logit_scale", REQUIRED),
    )
    scaling = long_rope.from_gguf(keys, shape, shape.head_dim, file)
    base = keys.number("rope.freq_base", 10_000.0)
    return _traits(shape, found, "swiglu", base, scaling, gguf_keys.has_bias(file, "attn_q"))


MINICPM = Architecture(
    "MiniCPMForCausalLM", "minicpm", "minicpm", _hf, _gguf, gguf_permuted=True,
    hf_defaults={"rms_norm_eps": 1e-6},
    gguf_keys=long_rope.GGUF_KEYS | {"embedding_scale", "residual_scale", "logit_scale"},
    gguf_tensors=long_rope.GGUF_TENSORS,
)  # fmt: skip
