"""Phi-3, Phi-3.5 mini and Phi-4-mini: fused matrices, RoPE over a part of the head, LongRoPE. All of it is linear.

LongRoPE has two tables of frequencies: one for texts up to the length that the model was first trained for, and one for longer
texts. A frozen file has one: the second if more positions are asked for than the first one serves, else the first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ...errors import ModelFormatError, UnsupportedModelError
from ...format.config import MAX_POSITIONS, LayerSpec
from ...format.quantize import Float32Array
from ..fields import Fields
from ..rope import ROPE_TYPES, long_rope_inv_freq, rope_inv_freq
from . import gguf_keys, hf_config, rotary
from .base import PARTS, Architecture, Fold, Shape, SourceName, Tensors, Traits

_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_QKV = SourceName("model.layers.{i}.self_attn.qkv_proj.weight", "blk.{i}.attn_qkv.weight")
_GATE_UP = SourceName("model.layers.{i}.mlp.gate_up_proj.weight", "blk.{i}.ffn_up.weight")


class _LongRope(NamedTuple):
    """LongRoPE's settings: divisors of frequencies (rotated / 2), and what cos and sin are multiplied by."""

    short: Float32Array
    long: Float32Array
    trained: int  # positions that `short` serves
    amplitude: float  # rounded to float32: so transformers multiplies, and so GGUF has it


def _traits(shape: Shape, window: int, activation: str, rotated: int, base: float, long_rope: _LongRope | None) -> Traits:
    max_seq_len, amplitude = None, 1.0
    if long_rope is None:
        inv_freq = rope_inv_freq(rotated, base, None)
    else:
        asked = long_rope.trained if shape.n_ctx is None else shape.n_ctx
        max_seq_len, amplitude = min(asked, shape.context), long_rope.amplitude
        divisors = long_rope.long if max_seq_len > long_rope.trained else long_rope.short
        inv_freq = long_rope_inv_freq(rotated, base, divisors)
    half, still = rotated // 2, (shape.head_dim - rotated) // 2
    inv_freq = rotary.padded(inv_freq, shape.head_dim)
    # q and k both carry the amplitude, where they are turned; the query gets it for both.
    scale = np.tile(np.concatenate([np.full(half, amplitude**2), np.ones(still)]), 2)
    order = rotary.order(shape.head_dim, rotated)
    return Traits(
        layers=(LayerSpec(window=window, activation=activation),) * shape.n_layers,
        rope_tables=(inv_freq,),
        max_seq_len=max_seq_len,
        folds={"q": Fold(scale, order=order), "k": Fold(order=order)},
    )


def _check_trained(trained: int) -> int:
    if not 2 <= trained <= MAX_POSITIONS:
        wanted = f"LongRoPE needs at least 2 and at most {MAX_POSITIONS}"
        raise ModelFormatError(f"original_max_position_embeddings is {trained!r:.80}, {wanted}")
    return trained


def _amplitude(context: float, trained: int) -> float:
    return math.sqrt(1 + math.log(context / trained) / math.log(trained)) if context > trained else 1.0


def _factors(inside: Fields, key: str, n: int) -> Float32Array:
    values = inside.raw(key)
    if not isinstance(values, list) or len(values) != n or not all(type(x) in (int, float) for x in values):
        raise inside.wrong(key, f"a list of {n} numbers")
    if not all(1e-6 <= x <= 1e6 for x in values):
        raise inside.wrong(key, "a list of numbers in 1e-6..1e6")
    return np.array(values, np.float32)


def _hf_long_rope(config: Fields, shape: Shape, rotated: int) -> _LongRope | None:
    inside, _ = hf_config.rope_scaling(config)
    kind = inside.text("rope_type", inside.text("type", "default"))
    if kind == "default":
        return None
    if kind not in ("longrope", "su", "yarn"):  # the older names of the same, as transformers takes them for this class
        raise UnsupportedModelError(f"RoPE type {kind!r:.80} is not implemented; known are {', '.join(ROPE_TYPES)}")
    key = "original_max_position_embeddings"
    trained = _check_trained(config.integer(key, inside.integer(key, shape.context)))
    factor = hf_config.multiplier(inside, "factor", shape.context / trained)
    amplitude = hf_config.multiplier(inside, "attention_factor", _amplitude(factor * trained, trained))
    n = rotated // 2
    short, long = _factors(inside, "short_factor", n), _factors(inside, "long_factor", n)
    return _LongRope(short, long, trained, float(np.float32(amplitude)))


def _hf(config: Fields, shape: Shape) -> Traits:
    rotated = rotary.hf_rotated(config, shape)
    window = hf_config.windows(config, [hf_config.SLIDING] * shape.n_layers)[0]
    long_rope = _hf_long_rope(config, shape, rotated)
    return _traits(shape, window, hf_config.activation(config), rotated, hf_config.rope_base(config), long_rope)


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    rotated = rotary.gguf_rotated(keys, shape)
    long_rope = None
    if _LONG in file.shapes or _SHORT in file.shapes:
        short, long = (gguf_keys.divisors(file, name, rotated // 2) for name in (_SHORT, _LONG))
        trained = _check_trained(keys.integer("rope.scaling.original_context_length", shape.context))
        amplitude = gguf_keys.multiplier(keys, "rope.scaling.attn_factor", _amplitude(shape.context, trained))
        long_rope = _LongRope(short, long, trained, float(np.float32(amplitude)))
    elif gguf_keys.scaling(keys) is not None:
        raise UnsupportedModelError("RoPE scaling without factors is not implemented for Phi-3")
    base = keys.number("rope.freq_base", 10_000.0)
    return _traits(shape, gguf_keys.window(keys), "swiglu", rotated, base, long_rope)


PHI3 = Architecture(
    "Phi3ForCausalLM", "phi3", "phi3", _hf, _gguf,
    parts={**PARTS, "q": _QKV, "k": _QKV, "v": _QKV, "gate": _GATE_UP, "up": _GATE_UP},
    gguf_keys=frozenset({"rope.scaling.attn_factor"}),
    gguf_tensors=frozenset({_LONG, _SHORT}),
)  # fmt: skip
