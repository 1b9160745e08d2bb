"""SmolLM3: every fourth layer without RoPE, which is a table of frequencies 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import ModelFormatError, UnsupportedModelError
from ...format.config import LayerSpec
from ..fields import Fields
from ..rope import Rope
from . import gguf_keys, hf_config
from .base import Architecture, Shape, Tensors, Traits

_DEFAULT_BASE = 2_000_000.0
_INTERVAL = 4


def _default_rope(n_layers: int, interval: int) -> list[int]:
    return [int((i + 1) % interval != 0) for i in range(n_layers)]


def _has_rope(config: Fields, n_layers: int) -> list[bool]:
    """``no_rope_layers``, which in spite of its name is 1 where a layer has RoPE."""
    interval = config.integer("no_rope_layer_interval", _INTERVAL)
    if interval < 1:
        raise config.wrong("no_rope_layer_interval", "a positive integer")
    found = config.raw("no_rope_layers")
    if found is None:
        found = _default_rope(n_layers, interval)
    if not isinstance(found, list) or len(found) != n_layers or not all(x in (0, 1) for x in found):
        raise ModelFormatError("config.json: no_rope_layers must have a 0 or 1 for every layer")
    return [bool(x) for x in found]


def tables_of(has_rope: Sequence[bool], rope: Rope) -> tuple[list[int], dict[str, Any]]:
    """(every layer's table, the fields of Traits that are of the tables), numbered in the order in which layers need them."""
    kinds = list(dict.fromkeys(has_rope))
    tables = [rope if kind else Rope(np.zeros_like(rope.inv_freq)) for kind in kinds]
    fields = {"rope_tables": tuple(one.inv_freq for one in tables), "rope_amplitudes": tuple(one.amplitude for one in tables)}
    return [kinds.index(kind) for kind in has_rope], fields


def _windows(config: Fields, has_rope: Sequence[bool]) -> list[int]:
    """By default none; with ``use_sliding_window``, by default for the layers without RoPE."""
    if not config.flag("use_sliding_window", False):
        if hf_config.SLIDING in hf_config.layer_kinds(config, [hf_config.FULL] * len(has_rope)):
            raise UnsupportedModelError(f"layer_types with {hf_config.SLIDING} beside use_sliding_window false")
        return [0] * len(has_rope)
    default = [hf_config.FULL if rope else hf_config.SLIDING for rope in has_rope]
    return hf_config.windows(config, hf_config.layer_kinds(config, default))


def _hf(config: Fields, shape: Shape) -> Traits:
    has_rope, activation = _has_rope(config, shape.n_layers), hf_config.activation(config)
    which, tables = tables_of(has_rope, hf_config.scaled_rope(config, shape.head_dim, _DEFAULT_BASE))
    has_bias = config.flag("attention_bias", False)
    windows = _windows(config, has_rope)
    return Traits(
        layers=tuple(LayerSpec(window, table, activation=activation) for window, table in zip(windows, which, strict=True)),
        **tables,
        qkv_bias=has_bias,
        o_bias=has_bias,
    )


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    """The format has no key for it: its readers know that every fourth layer has no RoPE."""
    has_rope = [bool(x) for x in _default_rope(shape.n_layers, _INTERVAL)]
    which, tables = tables_of(has_rope, gguf_keys.scaled_rope(keys, shape, file))
    return Traits(
        layers=tuple(LayerSpec(gguf_keys.window(keys), table) for table in which),
        **tables,
        qkv_bias=gguf_keys.has_bias(file, "attn_q"),
        o_bias=gguf_keys.has_bias(file, "attn_output"),
    )


SMOLLM3 = Architecture("SmolLM3ForCausalLM", "smollm3", "smollm3", _hf, _gguf, gguf_permuted=True)
