"""EXAONE 4: norms after both halves of a layer and of each q and k head; of the larger models three layers of four have a window,
and the others no RoPE."""

from __future__ import annotations

from collections.abc import Sequence

from ...format.config import LayerSpec
from ..fields import Fields
from ..rope import Rope
from . import gguf_keys, hf_config
from .base import Architecture, Shape, Tensors, Traits
from .olmo2 import NORMS, OLMO2
from .smollm3 import tables_of

_PERIOD = 4


def _traits(kinds: Sequence[str], windows: Sequence[int], rope: Rope, activation: str, *, are_alike: bool) -> Traits:
    """Layers without a window have no RoPE, unless all ``are_alike`` for want of one."""
    which, tables = tables_of([are_alike or kind == hf_config.SLIDING for kind in kinds], rope)
    layers = tuple(LayerSpec(*one, NORMS, activation) for one in zip(windows, which, strict=True))
    return Traits(layers=layers, qk_norm=True, **tables)


def _hf(config: Fields, shape: Shape) -> Traits:
    rope, activation = hf_config.scaled_rope(config, shape.head_dim), hf_config.activation(config)
    if config.is_null("sliding_window"):
        full = [hf_config.FULL] * shape.n_layers
        return _traits(full, [0] * shape.n_layers, rope, activation, are_alike=True)
    kinds = config.raw("layer_types") or hf_config.periodic_kinds(config, shape.n_layers, _PERIOD)
    kinds = hf_config.layer_kinds(config, kinds)
    return _traits(kinds, hf_config.windows(config, kinds), rope, activation, are_alike=False)


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    window = gguf_keys.window(keys)
    kinds = gguf_keys.layer_kinds(keys, shape.n_layers, _PERIOD if window else 1)
    windows = [window if kind == hf_config.SLIDING else 0 for kind in kinds]
    rope = Rope(gguf_keys.rope_table(keys, shape.head_dim, file))
    return _traits(kinds, windows, rope, "swiglu", are_alike=not window)


EXAONE4 = Architecture(
    "Exaone4ForCausalLM", "exaone4", "exaone4", _hf, _gguf, OLMO2.parts, gguf_keys=frozenset({gguf_keys.WINDOW_PATTERN}),
    hf_defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096},
)  # fmt: skip
