"""LongRoPE: two tables of frequencies, one for texts up to the length that the model was first trained for, and one for longer
texts. A frozen file has one: the second if more positions are asked for than the first one serves, else the first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ...errors import ModelFormatError, UnsupportedModelError
from ...format.config import MAX_POSITIONS
from ...format.quantize import Float32Array
from ..fields import Fields
from ..rope import Rope, long_rope_inv_freq, rope_inv_freq
from . import gguf_keys, hf_config
from .base import Shape, Tensors

_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
GGUF_TENSORS = frozenset({_LONG, _SHORT})
GGUF_KEYS = frozenset({"rope.scaling.attn_factor"})


class LongRope(NamedTuple):
    """Its settings: divisors of frequencies (rotated / 2), and what cos and sin are multiplied by."""

    short: Float32Array
    long: Float32Array
    trained: int  # positions that `short` serves
    amplitude: float  # rounded to float32: so transformers multiplies, and so GGUF has it


def table(long_rope: LongRope | None, shape: Shape, rotated: int, base: float) -> tuple[Rope, int | None]:
    """(the table of the positions that are asked for, how many it serves if there is a choice)."""
    if long_rope is None:
        return Rope(rope_inv_freq(rotated, base, None)), None
    asked = long_rope.trained if shape.n_ctx is None else shape.n_ctx
    max_seq_len = min(asked, shape.context)
    divisors = long_rope.long if max_seq_len > long_rope.trained else long_rope.short
    return Rope(long_rope_inv_freq(rotated, base, divisors), long_rope.amplitude), max_seq_len


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


def from_hf(config: Fields, shape: Shape, rotated: int) -> LongRope | None:
    """None where RoPE is not scaled."""
    inside, _ = hf_config.rope_scaling(config)
    kind = inside.text("rope_type", inside.text("type", "default"))
    if kind == "default":
        return None
    # The older names of the same, as transformers takes them for Phi-3; "yarn" is one only where LongRoPE's numbers are.
    if kind not in ("longrope", "su") and not (kind == "yarn" and "short_factor" in inside):
        raise UnsupportedModelError(
            f"RoPE type {kind!r:.80} is not implemented for this architecture; known are default, longrope"
        )
    key = "original_max_position_embeddings"
    trained = _check_trained(config.integer(key, inside.integer(key, shape.context)))
    factor = hf_config.multiplier(inside, "factor", shape.context / trained)
    amplitude = hf_config.multiplier(inside, "attention_factor", _amplitude(factor * trained, trained))
    n = rotated // 2
    short, long = _factors(inside, "short_factor", n), _factors(inside, "long_factor", n)
    return LongRope(short, long, trained, float(np.float32(amplitude)))


def from_gguf(keys: Fields, shape: Shape, rotated: int, file: Tensors) -> LongRope | None:
    if _LONG in file.shapes or _SHORT in file.shapes:
        short, long = (gguf_keys.divisors(file, name, rotated // 2) for name in (_SHORT, _LONG))
        trained = _check_trained(keys.integer("rope.scaling.original_context_length", shape.context))
        amplitude = gguf_keys.multiplier(keys, "rope.scaling.attn_factor", _amplitude(shape.context, trained))
        return LongRope(short, long, trained, float(np.float32(amplitude)))
    if gguf_keys.scaling(keys) is not None:
        raise UnsupportedModelError("RoPE scaling without factors is not implemented for this architecture")
    return None
