"""Phi-3, Phi-3.5 mini and Phi-4-mini: fused matrices, RoPE over a part of the head, LongRoPE. All of it is linear."""

from __future__ import annotations

from ...format.config import LayerSpec
from ..fields import Fields
from . import gguf_keys, hf_config, long_rope, rotary
from .base import PARTS, Architecture, Fold, Shape, SourceName, Tensors, Traits
from .long_rope import LongRope

_QKV = SourceName("model.layers.{i}.self_attn.qkv_proj.weight", "blk.{i}.attn_qkv.weight")
_GATE_UP = SourceName("model.layers.{i}.mlp.gate_up_proj.weight", "blk.{i}.ffn_up.weight")


def _traits(shape: Shape, window: int, activation: str, rotated: int, base: float, scaling: LongRope | None) -> Traits:
    rope, max_seq_len = long_rope.table(scaling, shape, rotated, base)
    order = rotary.order(shape.head_dim, rotated)
    return Traits(
        layers=(LayerSpec(window=window, activation=activation),) * shape.n_layers,
        rope_tables=(rotary.padded(rope.inv_freq, shape.head_dim),),
        rope_amplitudes=(rope.amplitude,),
        max_seq_len=max_seq_len,
        folds={"q": Fold(order=order), "k": Fold(order=order)},
    )


def _hf(config: Fields, shape: Shape) -> Traits:
    rotated = rotary.hf_rotated(config, shape)
    window = hf_config.windows(config, [hf_config.SLIDING] * shape.n_layers)[0]
    scaling = long_rope.from_hf(config, shape, rotated)
    return _traits(shape, window, hf_config.activation(config), rotated, hf_config.rope_base(config), scaling)


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    rotated = rotary.gguf_rotated(keys, shape)
    scaling = long_rope.from_gguf(keys, shape, rotated, file)
    base = keys.number("rope.freq_base", 10_000.0)
    return _traits(shape, gguf_keys.window(keys), "swiglu", rotated, base, scaling)


PHI3 = Architecture(
    "Phi3ForCausalLM", "phi3", "phi3", _hf, _gguf,
    parts={**PARTS, "q": _QKV, "k": _QKV, "v": _QKV, "gate": _GATE_UP, "up": _GATE_UP},
    gguf_keys=long_rope.GGUF_KEYS,
    gguf_tensors=long_rope.GGUF_TENSORS,
)  # fmt: skip
