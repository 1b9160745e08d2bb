"""OLMo 3: OLMo 2 with a window in three layers of four; YaRN is of the layers without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...format.config import LayerSpec
from ..fields import Fields
from ..rope import Rope, rope_inv_freq
from . import gguf_keys, hf_config
from .base import Shape, Tensors, Traits
from .olmo2 import NORMS, OLMO2

_PERIOD, _WINDOW, _BASE = 4, 4096, 500_000.0


def _traits(
    kinds: Sequence[str], windows: Sequence[int], ropes: Mapping[str, Rope], activation: str, has_bias: bool
) -> Traits:
    """``ropes``: of each kind of layer; the tables are numbered as layers need them."""
    used = list(dict.fromkeys(kinds))
    layers = zip(windows, map(used.index, kinds), strict=True)
    return Traits(
        layers=tuple(LayerSpec(window, table, NORMS, activation) for window, table in layers),
        rope_tables=tuple(ropes[kind].inv_freq for kind in used),
        rope_amplitudes=tuple(ropes[kind].amplitude for kind in used),
        qkv_bias=has_bias,
        o_bias=has_bias,
        qk_norm=True,
        qk_norm_all_heads=True,
    )


def _ropes_hf(config: Fields, head_dim: int) -> dict[str, Rope]:
    """transformers 5 writes an object for each kind of layer; what it wrote before, as version 4, is of all layers, but for the
    scaling."""
    if hf_config.has_ropes_of_kinds(config):
        base = config.number("rope_theta", _BASE)
        return hf_config.ropes_of_kinds(config, head_dim, {hf_config.FULL: base, hf_config.SLIDING: base})
    plain = Rope(rope_inv_freq(head_dim, hf_config.rope_base(config), None))
    return {hf_config.FULL: hf_config.scaled_rope(config, head_dim), hf_config.SLIDING: plain}


def _hf(config: Fields, shape: Shape) -> Traits:
    kinds = hf_config.layer_kinds(config, hf_config.every(_PERIOD, shape.n_layers))
    ropes = _ropes_hf(config, shape.head_dim)
    windows, activation = hf_config.windows(config, kinds, _WINDOW), hf_config.activation(config)
    return _traits(kinds, windows, ropes, activation, config.flag("attention_bias", False))


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    kinds, window = gguf_keys.layer_kinds(keys, shape.n_layers, _PERIOD), gguf_keys.window(keys)
    plain = Rope(rope_inv_freq(shape.head_dim, keys.number("rope.freq_base", 10_000.0), None))
    windows = [window if kind == hf_config.SLIDING else 0 for kind in kinds]
    has_bias = gguf_keys.has_bias(file, "attn_q")
    ropes = {hf_config.FULL: gguf_keys.scaled_rope(keys, shape, file), hf_config.SLIDING: plain}
    return _traits(kinds, windows, ropes, "swiglu", has_bias)


# Its GGUF files call themselves "olmo2", and have a window.
OLMO3 = OLMO2._replace(
    hf="Olmo3ForCausalLM",
    model_type="olmo3",
    from_hf=_hf,
    from_gguf=_gguf,
    gguf_sign="attention.sliding_window",
    gguf_keys=frozenset({gguf_keys.WINDOW_PATTERN}),
    hf_defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
)
