"""Which elements of a head RoPE turns, and with which: an order of rows, and pairs whose frequency is 0."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import ModelFormatError
from ...format.quantize import Float32Array
from ..fields import Fields
from ..rope import Rope
from . import gguf_keys, hf_config
from .base import Fold, Order, Shape, Tensors

ROTATED_PARTS = ("q", "q.bias", "k", "k.bias", "key_bias")


def order(head_dim: int, rotated: int, *, is_interleaved: bool = False) -> Order:
    """Where row i of a head lies in the source, whose first ``rotated`` elements are turned, i with i + rotated / 2, or 2i with
    2i + 1 if they are interleaved: the file turns i with i + head_dim / 2, the last pairs by angle 0."""
    turned = np.arange(rotated).reshape(-1, 2).T if is_interleaved else np.arange(rotated).reshape(2, -1)
    found: Order = np.concatenate([turned, np.arange(rotated, head_dim).reshape(2, -1)], axis=1).reshape(-1)
    return found


def folds(of_rows: Order) -> dict[str, Fold]:
    return {part: Fold(order=of_rows) for part in ROTATED_PARTS}


def hf_rope(config: Fields, shape: Shape, rotated: int) -> dict[str, Any]:
    """The fields of Traits of a model whose layers all turn so many elements of a head alike, perhaps by YaRN."""
    return _fields(hf_config.scaled_rope(config, rotated, is_partial=True), shape)


def gguf_rope(keys: Fields, shape: Shape, file: Tensors, rotated: int) -> dict[str, Any]:
    """The same."""
    return _fields(gguf_keys.scaled_rope(keys, shape, file, rotated), shape)


def _fields(rope: Rope, shape: Shape) -> dict[str, Any]:
    return {"rope_tables": (padded(rope.inv_freq, shape.head_dim),), "rope_amplitudes": (rope.amplitude,)}


def padded(inv_freq: Float32Array, head_dim: int) -> Float32Array:
    """Frequencies of the pairs that are turned -> of all, (head_dim / 2)."""
    return np.pad(inv_freq, (0, head_dim // 2 - len(inv_freq)))


def checked(rotated: int, head_dim: int) -> int:
    if not 2 <= rotated <= head_dim or rotated % 2:
        raise ModelFormatError(f"RoPE over {rotated} elements of a head of {head_dim}")
    return rotated


def hf_rotated(config: Fields, shape: Shape) -> int:
    share = hf_config.partial_rotary_factor(config)
    if not 0 < share <= 1:
        raise config.wrong("partial_rotary_factor", "a number above 0, at most 1")
    return checked(int(shape.head_dim * share), shape.head_dim)


def gguf_rotated(keys: Fields, shape: Shape) -> int:
    return checked(gguf_keys.rope_dimensions(keys, shape.head_dim), shape.head_dim)
