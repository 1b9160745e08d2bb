"""InternLM 2 and 2.5, whose q, k and v are one matrix with the rows of each kv head together, and InternLM 3: Llamas both.

Their RoPE is ``dynamic``: frequencies that change for texts beyond ``max_position_embeddings``, which a frozen file has not."""

from __future__ import annotations

from ...format.quantize import Float32Array
from ..fields import Fields
from ..rope import rope_inv_freq
from . import hf_config, llama
from .base import PARTS, Architecture, Fold, Shape, SourceName, Traits

_QKV = "model.layers.{i}.attention.wqkv.weight"
_INTERNLM2 = {
    "tok_embeddings": "model.tok_embeddings.weight",
    "output": "output.weight",
    "attention_norm": "model.layers.{i}.attention_norm.weight",
    "q": _QKV,
    "k": _QKV,
    "v": _QKV,
    "wo": "model.layers.{i}.attention.wo.weight",
    "ffn_norm": "model.layers.{i}.ffn_norm.weight",
    "gate": "model.layers.{i}.feed_forward.w1.weight",
    "up": "model.layers.{i}.feed_forward.w3.weight",
    "down": "model.layers.{i}.feed_forward.w2.weight",
}


def _rope_table(config: Fields, shape: Shape) -> Float32Array:
    inside, _ = hf_config.rope_scaling(config)
    if inside.text("rope_type", inside.text("type", "default")) == "dynamic":
        return rope_inv_freq(shape.head_dim, hf_config.rope_base(config), None)
    return hf_config.rope_table(config, shape.head_dim)


def _internlm2_hf(config: Fields, shape: Shape) -> Traits:
    """A checkpoint with biases (``bias``) has tensors that find no place: the published ones have none."""
    return Traits(
        layers=hf_config.no_windows(shape, activation=hf_config.activation(config)),
        rope_tables=(_rope_table(config, shape),),
        folds={part: Fold(pieces=shape.n_kv_heads) for part in ("q", "k", "v")},
    )


def _internlm3_hf(config: Fields, shape: Shape) -> Traits:
    has_bias = config.flag("bias", False)
    return Traits(
        layers=hf_config.no_windows(shape, activation=hf_config.activation(config)),
        rope_tables=(_rope_table(config, shape),),
        qkv_bias=config.flag("qkv_bias", False),
        o_bias=has_bias,
        gate_up_bias=has_bias,
        down_bias=has_bias,
    )


INTERNLM2 = Architecture(
    "InternLM2ForCausalLM", "internlm2", "internlm2", _internlm2_hf, llama.gguf_traits,
    {part: name if part not in _INTERNLM2 else SourceName(_INTERNLM2[part], name.gguf) for part, name in PARTS.items()},
    gguf_permuted=True, hf_defaults={"rms_norm_eps": 1e-6},
)  # fmt: skip
# The format's converters call it a Llama.
INTERNLM3 = Architecture(
    "InternLM3ForCausalLM", "internlm3", "llama", _internlm3_hf, llama.gguf_traits, gguf_permuted=True,
    hf_defaults={"rms_norm_eps": 1e-6},
)  # fmt: skip
