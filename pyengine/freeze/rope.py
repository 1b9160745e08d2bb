"""RoPE frequencies with every scaling resolved: what ``rope.inv_freq`` holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import ModelFormatError, UnsupportedModelError
from ..format.quantize import Float32Array

_TYPES = ("default", "linear", "llama3")  # of every architecture; LongRoPE is in arch/long_rope.py, YaRN below


class Rope(NamedTuple):
    """A table of RoPE, and what it multiplies."""

    inv_freq: Float32Array  # (turned elements of a head / 2)
    amplitude: float = 1.0  # of cos and sin, in the query and in the key


def default_inv_freq(head_dim: int, theta: float) -> Float32Array:
    """theta ** (-2i / head_dim), float32 (head_dim / 2), rounded where transformers rounds."""
    exponent = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    powers = (np.float64(theta) ** exponent.astype(np.float64)).astype(np.float32)
    inv_freq: Float32Array = np.float32(1) / powers
    return inv_freq


def _number(scaling: Mapping[str, Any], key: str) -> float:
    value = scaling.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelFormatError(f"RoPE scaling: {key} must be a number, not {value!r:.80}")
    if not 1e-9 <= value <= 1e12:  # nor is NaN: quotients and their logarithms stay finite
        raise ModelFormatError(f"RoPE scaling: {key} {value!r} is out of range")
    return float(value)


def _llama3(inv_freq: Float32Array, scaling: Mapping[str, Any]) -> Float32Array:
    """Long wavelengths are slowed by ``factor``, short ones kept, those between interpolated."""
    factor = np.float32(_number(scaling, "factor"))
    low = _number(scaling, "low_freq_factor")
    high = _number(scaling, "high_freq_factor")
    context = _number(scaling, "original_max_position_embeddings")
    if high <= low:
        raise ModelFormatError("RoPE scaling: high_freq_factor must exceed low_freq_factor")
    wavelength = np.float32(2 * math.pi) / inv_freq
    smooth = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = np.where(wavelength > context / low, inv_freq / factor, inv_freq)
    is_between = (wavelength >= context / high) & (wavelength <= context / low)
    return np.where(is_between, between, scaled).astype(np.float32)


@np.errstate(all="ignore")  # what comes out is checked
def rope_inv_freq(head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> Float32Array:
    """``scaling`` is transformers' ``rope_scaling`` dictionary or None. float32 (head_dim / 2)."""
    if not (math.isfinite(theta) and theta > 0):
        raise ModelFormatError(f"RoPE base {theta!r} is not a positive number")
    inv_freq = default_inv_freq(head_dim, theta)
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if kind in ("default", None):
        result = inv_freq
    elif kind == "linear":
        result = inv_freq / np.float32(_number(scaling or {}, "factor"))
    elif kind == "llama3":
        result = _llama3(inv_freq, scaling or {})
    else:
        known = ", ".join(_TYPES)
        raise UnsupportedModelError(f"RoPE type {kind!r:.80} is not implemented for this architecture; known are {known}")
    return _checked(result)


def _checked(inv_freq: Float32Array) -> Float32Array:
    if not (np.isfinite(inv_freq).all() and (inv_freq > 0).all()):
        raise ModelFormatError("the RoPE frequencies are not finite positive numbers")
    return inv_freq


@np.errstate(all="ignore")  # what comes out is checked
def long_rope_inv_freq(rotated: int, theta: float, divisors: Float32Array) -> Float32Array:
    """LongRoPE's frequencies of the elements that are turned, float32 (rotated / 2); divisors (rotated / 2)."""
    powers = np.float32(1) / rope_inv_freq(rotated, theta, None)
    return _checked(np.float32(1) / (divisors * powers))


# ---------------------------------------------------------------------------- YaRN


def _yarn_amplitude(scaling: Mapping[str, Any], factor: float) -> float:
    """``attention_factor``, or what follows from ``factor``."""
    if scaling.get("attention_factor") is not None:
        return _number(scaling, "attention_factor")

    def growth(share: float) -> float:
        return 0.1 * share * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return growth(_number(scaling, "mscale")) / growth(_number(scaling, "mscale_all_dim"))
    return growth(1.0)


@np.errstate(all="ignore")  # what comes out is checked
def yarn(rotated: int, theta: float, scaling: Mapping[str, Any]) -> Rope:
    """YaRN: pairs that turn at least ``beta_fast`` times in the length of the first training keep their frequency, those that
    turn at most ``beta_slow`` times are slowed by ``factor``, those between interpolated. ``scaling`` as in ``rope_inv_freq``."""
    inv_freq = rope_inv_freq(rotated, theta, None)
    if theta <= 1.0:
        raise ModelFormatError(f"RoPE base {theta!r}: YaRN needs one above 1")
    factor, trained = _number(scaling, "factor"), _number(scaling, "original_max_position_embeddings")

    def pair_that_turns(key: str, default: float) -> float:
        times = default if not scaling.get(key) else _number(scaling, key)
        return rotated * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns("beta_fast", 32.0), pair_that_turns("beta_slow", 1.0)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    if low == high:
        high += 0.001
    slowed = np.clip((np.arange(rotated // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = 1 - slowed
    return Rope(_checked(inv_freq / np.float32(factor) * (1 - kept) + inv_freq * kept), _yarn_amplitude(scaling, factor))
