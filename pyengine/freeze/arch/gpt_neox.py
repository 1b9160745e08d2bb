"""GPT-NeoX and Pythia: LayerNorms, biases everywhere, a fused qkv, RoPE over a part of the head, exact GELU without a gate, and
halves of a layer that are parallel, each with a norm of its own.

The file has one norm for parallel halves: one without weights, whose gains multiply the columns of the matrices that read it.
"""

from __future__ import annotations

from typing import Any

from ...format.config import NORMS, PARALLEL
from ..fields import Fields
from . import gguf_keys, hf_config, rotary
from .base import PARTS, Architecture, Fold, Shape, SourceName, Tensors, Traits
from .layer_norm import NORM_BIASES, QKV_BIASES, folded

_PARALLEL_KEY = "use_parallel_residual"
_BIASES = (*QKV_BIASES, "wo.bias", "up.bias", "down.bias")


def _linear(hf: str, gguf: str, *parts: str) -> dict[str, SourceName]:
    """Of parts that lie in one matrix, and of their biases."""
    return {
        part + end: SourceName(f"gpt_neox.layers.{{i}}.{hf}.{kind}", f"blk.{{i}}.{gguf}.{kind}")
        for end, kind in (("", "weight"), (".bias", "bias"))
        for part in parts
    }


_PARTS = {
    **PARTS,
    **NORM_BIASES,
    "tok_embeddings": SourceName("gpt_neox.embed_in.weight", "token_embd.weight"),
    "output": SourceName("embed_out.weight", "output.weight"),
    **_linear("input_layernorm", "attn_norm", "attention_norm"),
    **_linear("input_layernorm", "attn_norm", "attention_norm.gain"),
    **_linear("post_attention_layernorm", "ffn_norm", "ffn_norm"),
    **_linear("post_attention_layernorm", "ffn_norm", "ffn_norm.gain"),
    **_linear("attention.query_key_value", "attn_qkv", "q", "k", "v"),
    **_linear("attention.dense", "attn_output", "wo"),
    **_linear("mlp.dense_h_to_4h", "ffn_up", "up"),
    **_linear("mlp.dense_4h_to_h", "ffn_down", "down"),
    "norm": SourceName("gpt_neox.final_layer_norm.weight", "output_norm.weight"),
    "norm.bias": SourceName("gpt_neox.final_layer_norm.bias", "output_norm.bias"),
}


def _folds(shape: Shape, rotated: int, is_parallel: bool, n_pieces: int) -> dict[str, Fold]:
    """``n_pieces``: heads of a matrix that has q, k and v of each one after the other, or 1."""
    turned = rotary.folds(rotary.order(shape.head_dim, rotated))
    fused = ("q", "k", "v", *QKV_BIASES)
    folds = {**turned, **{part: turned.get(part, Fold())._replace(pieces=n_pieces) for part in fused}}
    if is_parallel:
        folds["attention_norm"] = Fold(offset=1.0, is_absent=True)
        for part in ("q", "k", "v", "up"):
            folds[part] = folds.get(part, Fold())._replace(gain="ffn_norm.gain" if part == "up" else "attention_norm.gain")
    return folds


def _spec(is_parallel: bool, activation: str) -> dict[str, Any]:
    return {"norm": PARALLEL if is_parallel else NORMS[0], "activation": activation}


def _hf(config: Fields, shape: Shape) -> Traits:
    rotated, is_parallel = rotary.hf_rotated(config, shape), config.flag(_PARALLEL_KEY, True)
    plain = Traits(
        layers=hf_config.no_windows(shape, **_spec(is_parallel, hf_config.ungated_activation(config, "gelu"))),
        **rotary.hf_rope(config, shape, rotated),
        folds=_folds(shape, rotated, is_parallel, shape.n_heads),
    )
    own = _BIASES if config.flag("attention_bias", True) else ("up.bias", "down.bias")
    return folded(plain, norm_eps=config.number("layer_norm_eps", 1e-5), own=own)


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    """The converters put the rows of q, of k and of v together."""
    rotated, is_parallel = rotary.gguf_rotated(keys, shape), keys.flag(_PARALLEL_KEY, True)
    plain = Traits(
        layers=gguf_keys.same_windows(keys, shape, **_spec(is_parallel, "gelu")),
        **rotary.gguf_rope(keys, shape, file, rotated),
        folds=_folds(shape, rotated, is_parallel, 1),
    )
    own = _BIASES if gguf_keys.has_bias(file, "attn_qkv") else ("up.bias", "down.bias")
    return folded(plain, norm_eps=gguf_keys.norm_eps(keys, gguf_keys.LAYER_NORM_EPS), own=own)


GPT_NEOX = Architecture(
    "GPTNeoXForCausalLM", "gpt_neox", "gptneox", _hf, _gguf, _PARTS,
    hf_ignored=(".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq"),
    hf_keys={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
    hf_defaults={"partial_rotary_factor": 0.25}, gguf_keys=frozenset({gguf_keys.LAYER_NORM_EPS, _PARALLEL_KEY}),
)  # fmt: skip
