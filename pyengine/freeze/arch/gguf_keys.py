"""What several architectures read in a GGUF file's metadata."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...errors import ModelFormatError, UnsupportedModelError
from ...format.config import MAX_POSITIONS, SOFTCAP_RANGE, LayerSpec
from ...format.quantize import Float32Array
from ..fields import Fields
from ..rope import Rope, rope_inv_freq, yarn
from . import hf_config
from .base import Shape, Tensors

ROPE_DIVISORS = "rope_freqs.weight"
WINDOW_PATTERN = "attention.sliding_window_pattern"
_YARN_AMPLITUDE = "rope.scaling.yarn_attn_factor"
YARN = frozenset({_YARN_AMPLITUDE, "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"})  # keys
YARN_LOG = "rope.scaling.yarn_log_multiplier"  # of some architectures
LAYER_NORM_EPS = "attention.layer_norm_epsilon"


def window(keys: Fields, default: int = 0) -> int:
    """``attention.sliding_window`` in positions, 0 for none."""
    found = keys.integer("attention.sliding_window", default)
    return 0 if found > MAX_POSITIONS else found  # wider than any context


def layer_kinds(keys: Fields, n_layers: int, period: int) -> list[str]:
    """``sliding_window_pattern``: a period, or a flag for each layer; absent from older files, whose readers know the period."""
    found = keys.raw(WINDOW_PATTERN)
    if found is None or type(found) is int:
        period = period if found is None else found
        if period < 1:
            raise keys.wrong(WINDOW_PATTERN, "a positive integer")
        return [hf_config.SLIDING if (i + 1) % period else hf_config.FULL for i in range(n_layers)]
    flags = list(found) if hasattr(found, "__len__") and not isinstance(found, str) else []
    if len(flags) != n_layers or not all(flag in (0, 1) for flag in flags):
        raise keys.wrong(WINDOW_PATTERN, "an integer, or a 0 or 1 for each layer")
    return [hf_config.SLIDING if flag else hf_config.FULL for flag in flags]


def same_windows(keys: Fields, shape: Shape, **spec: Any) -> tuple[LayerSpec, ...]:
    return (LayerSpec(window=window(keys), **spec),) * shape.n_layers


def rope_dimensions(keys: Fields, head_dim: int) -> int:
    """How many elements of a head RoPE turns."""
    return keys.integer("rope.dimension_count", head_dim)


def scaling(keys: Fields) -> dict[str, Any] | None:
    """``rope.scaling`` as transformers' dictionary, or None."""
    kind = keys.text("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", 1.0)
    if "rope.scaling.type" not in keys:
        factor = keys.number("rope.scale_linear", factor)
        kind = "linear" if factor != 1.0 else "none"
    if factor == 0.0 and kind == "linear":  # how some converters write that there is none
        kind = "none"
    return None if kind == "none" else {"rope_type": kind, "factor": factor}


def divisors(file: Tensors, name: str, n: int) -> Float32Array:
    """A tensor of n positive numbers that RoPE frequencies are divided by."""
    if name not in file.shapes:
        raise ModelFormatError(f"tensor {name!r} is missing")
    found = file.vector(name)
    if found.shape != (n,):
        raise ModelFormatError(f"tensor {name!r} has {len(found)} values, not {n}")
    if not (np.isfinite(found).all() and (found > 0).all()):
        raise ModelFormatError(f"tensor {name!r} must hold finite positive numbers")
    return found


def rope_table(keys: Fields, head_dim: int, file: Tensors, default_base: float = 10_000.0) -> Float32Array:
    """The one table of a model whose layers all turn whole heads."""
    if rope_dimensions(keys, head_dim) != head_dim:
        raise UnsupportedModelError("RoPE over a part of the head (rope.dimension_count) for this architecture")
    inv_freq = rope_inv_freq(head_dim, keys.number("rope.freq_base", default_base), scaling(keys))
    if ROPE_DIVISORS not in file.shapes:
        return inv_freq
    with np.errstate(over="ignore", under="ignore"):  # the freezer refuses what is not finite
        return inv_freq / divisors(file, ROPE_DIVISORS, head_dim // 2)


def scaled_rope(keys: Fields, shape: Shape, file: Tensors, rotated: int | None = None, *, truncate: bool = True) -> Rope:
    """The same, or YaRN, of ``rotated`` elements of a head, by default all. The amplitude is what its readers make of the factor:
    a file that says another one is refused."""
    rotated = shape.head_dim if rotated is None else rotated
    found = scaling(keys)
    if found is None or found["rope_type"] != "yarn":
        return Rope(rope_table(keys, rotated, file))
    if rope_dimensions(keys, rotated) != rotated:
        raise UnsupportedModelError("RoPE over a part of the head (rope.dimension_count) for this architecture")
    if ROPE_DIVISORS in file.shapes:
        raise UnsupportedModelError(f"YaRN and {ROPE_DIVISORS} together are not implemented")
    settings = {
        "factor": found["factor"],
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length", shape.context),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
        "truncate": truncate,
    }
    if growth := keys.number(YARN_LOG, 0.0):
        settings |= {"mscale": 1.0, "mscale_all_dim": growth}
    rope = yarn(rotated, keys.number("rope.freq_base", 10_000.0), settings)
    said = keys.number(_YARN_AMPLITUDE, 1.0)
    if not math.isclose(said, 1.0, rel_tol=1e-6) and not math.isclose(said, rope.amplitude, rel_tol=1e-6):
        raise UnsupportedModelError(f"{_YARN_AMPLITUDE} {said!r}: another amplitude than YaRN's own is not implemented")
    return rope


def one_rope(keys: Fields, shape: Shape, file: Tensors) -> dict[str, Any]:
    """The fields of Traits of a model whose layers all turn whole heads alike, perhaps by YaRN."""
    rope = scaled_rope(keys, shape, file)
    return {"rope_tables": (rope.inv_freq,), "rope_amplitudes": (rope.amplitude,)}


def norm_eps(keys: Fields, key: str = "attention.layer_norm_rms_epsilon") -> float:
    """The float32 in the file as the decimal that people wrote: 1e-05, not 9.999999747378752e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(keys.number(key))))


def multiplier(keys: Fields, key: str, default: float = 1.0) -> float:
    """A factor that may be folded into weights: the float32 in the file as the decimal that people wrote, 0.22."""
    value = keys.number(key, default)
    if not 1e-9 <= value <= 1e9:
        raise keys.wrong(key, "a number in 1e-9..1e9")
    return float(str(np.float32(value))) if key in keys else default


def softcap(keys: Fields, key: str) -> float:
    """A soft limit of scores or logits; 0 for none."""
    with np.errstate(over="ignore"):
        value = float(str(np.float32(keys.number(key, 0.0))))
    if not SOFTCAP_RANGE[0] <= value <= SOFTCAP_RANGE[1] and value != 0.0:
        raise keys.wrong(key, f"0, or a number in {SOFTCAP_RANGE[0]}..{SOFTCAP_RANGE[1]}")
    return value


def has_bias(file: Tensors, part: str) -> bool:
    """Whether layer 0 has it, and so all: ``part`` is "attn_q", "attn_output", "ffn_up" or "ffn_down"."""
    return f"blk.0.{part}.bias" in file.shapes
