"""LayerNorms as RMSNorms, of models whose every norm of the residual stream is one.

LayerNorm(x) = (x - mean(x)) / sqrt(var(x) + eps) * w + b is RMSNorm(x) * w + b of a row x whose mean is 0, with the same eps. So
whatever is added to the residual stream loses its mean (embeddings, o, down and their biases), and b moves on into what reads the
norm: W (y + b) = W y + W b. Tied embeddings are added to the stream without their means and read as they are: two matrices.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from .base import Fold, SourceName, Traits

NORM_BIASES: Mapping[str, SourceName] = {
    "attention_norm.bias": SourceName("model.layers.{i}.input_layernorm.bias", "blk.{i}.attn_norm.bias"),
    "ffn_norm.bias": SourceName("model.layers.{i}.post_attention_layernorm.bias", "blk.{i}.ffn_norm.bias"),
    "norm.bias": SourceName("model.norm.bias", "output_norm.bias"),
}

QKV_BIASES = ("q.bias", "k.bias", "key_bias", "v.bias")
_READERS = {
    "attention_norm.bias": QKV_BIASES,
    "ffn_norm.bias": ("gate.bias", "up.bias"),
    "norm.bias": ("output.bias",),
}
_WRITERS = ("wo", "wo.bias", "down", "down.bias")


def folded(
    traits: Traits, *, norm_eps: float, own: Collection[str], has_norm_biases: bool = True, is_parallel: bool = False
) -> Traits:
    """The same with LayerNorms. ``own`` are the biases, by part, that the source has beside those of its norms, which may have
    none; the MLP of a parallel layer reads attention's norm."""
    folds = dict(traits.folds)
    folds["tok_embeddings"] = folds.get("tok_embeddings", Fold())._replace(center="rows")
    for part in _WRITERS:
        folds[part] = folds.get(part, Fold())._replace(center="columns")
    for norm, readers in _READERS.items() if has_norm_biases else ():
        source = "attention_norm.bias" if is_parallel and norm == "ffn_norm.bias" else norm
        for part in readers:
            folds[part] = folds.get(part, Fold())._replace(norm_bias=source, is_absent=part not in own)
    return replace(
        traits,
        folds=folds,
        qkv_bias=has_norm_biases or "q.bias" in own,
        o_bias="wo.bias" in own,
        gate_up_bias=has_norm_biases or "up.bias" in own,
        down_bias="down.bias" in own,
        output_bias=has_norm_biases or "output.bias" in own,
        is_untied=True,
        norm_eps=norm_eps,
    )
