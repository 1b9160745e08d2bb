"""StarCoder2: LayerNorms, biases everywhere, and an MLP without a gate."""

from __future__ import annotations

from ...errors import UnsupportedModelError
from ...format.config import LayerSpec
from ..fields import Fields
from . import gguf_keys, hf_config
from .base import PARTS, Architecture, Shape, SourceName, Tensors, Traits
from .layer_norm import NORM_BIASES, QKV_BIASES, folded

_BIASES = (*QKV_BIASES, "wo.bias", "up.bias", "down.bias")
_MLP = {
    "up": SourceName("model.layers.{i}.mlp.c_fc.weight", "blk.{i}.ffn_up.weight"),
    "up.bias": SourceName("model.layers.{i}.mlp.c_fc.bias", "blk.{i}.ffn_up.bias"),
    "down": SourceName("model.layers.{i}.mlp.c_proj.weight", "blk.{i}.ffn_down.weight"),
    "down.bias": SourceName("model.layers.{i}.mlp.c_proj.bias", "blk.{i}.ffn_down.bias"),
}


def _hf(config: Fields, shape: Shape) -> Traits:
    windows = hf_config.windows(config, [hf_config.SLIDING] * shape.n_layers)
    activation = hf_config.ungated_activation(config, default="gelu_pytorch_tanh")
    plain = Traits(
        layers=tuple(LayerSpec(window=window, activation=activation) for window in windows),
        **hf_config.one_rope(config, shape),
    )
    own = _BIASES if config.flag("use_bias", True) else ()
    return folded(plain, norm_eps=config.number("norm_epsilon", 1e-5), own=own)


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    """The converters leave the window out."""
    if not gguf_keys.has_bias(file, "attn_q"):
        raise UnsupportedModelError("StarCoder2 without biases is not implemented from GGUF")
    plain = Traits(
        layers=gguf_keys.same_windows(keys, shape, activation="gelu_tanh"),
        rope_tables=(gguf_keys.rope_table(keys, shape.head_dim, file),),
    )
    return folded(plain, norm_eps=gguf_keys.norm_eps(keys, gguf_keys.LAYER_NORM_EPS), own=_BIASES)


STARCODER2 = Architecture(
    "Starcoder2ForCausalLM", "starcoder2", "starcoder2", _hf, _gguf, {**PARTS, **NORM_BIASES, **_MLP},
    hf_defaults={"num_key_value_heads": 2, "tie_word_embeddings": True}, gguf_keys=frozenset({gguf_keys.LAYER_NORM_EPS}),
)  # fmt: skip
