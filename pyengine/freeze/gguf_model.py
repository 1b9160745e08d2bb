"""From a parsed GGUF file to a ``SourceModel``: hyperparameters, RoPE, attachments and which tensor goes
where.
"""

from __future__ import annotations

import os

import numpy as np

from ..errors import ModelFormatError, UnsupportedModelError
from ..format.config import MAX_POSITIONS, FrozenConfig, same_layers
from ..format.quantize import Float32Array
from .architectures import ARCHITECTURES, Architecture, build_model, required_features
from .fields import Fields
from .gguf import GGUFFile
from .gguf_split import SplitGGUF, open_gguf
from .rope import rope_inv_freq
from .sources import SourceModel
from .tokenizer import begin_token_id, end_token_ids, gguf_tokenizer_attachments

# Keys under the architecture's prefix. One that is not here may change the arithmetic and is
# refused.
_KNOWN_KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "attention.causal",
    "attention.sliding_window",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "expert_count", "expert_used_count",
}  # fmt: skip


GGUF = GGUFFile | SplitGGUF


def _architecture(file: GGUF) -> Architecture:
    name = Fields(file.metadata, "GGUF").text("general.architecture")
    found = next((a for a in ARCHITECTURES if a.gguf == name), None)
    if found is None:
        raise UnsupportedModelError(f"architecture {name!r:.80} is not implemented")
    prefix = f"{name}."
    for key in file.metadata:
        if key.startswith(prefix) and key.removeprefix(prefix) not in _KNOWN_KEYS:
            raise UnsupportedModelError(f"key {key!r:.200} is not implemented")
    return found


def _keys(file: GGUF, architecture: Architecture) -> Fields:
    """The architecture's metadata. A value for each layer becomes one value, if it is one."""
    prefix = f"{architecture.gguf}."
    values = {key: value for key, value in file.metadata.items() if key.startswith(prefix)}
    for key, value in values.items():
        if isinstance(value, np.ndarray) and value.size:
            if (value != value[0]).any():
                raise UnsupportedModelError(f"key {key!r} differs between layers: not implemented")
            values[key] = value[0].item()
    return Fields(values, "GGUF", prefix)


def _inv_freq(file: GGUF, keys: Fields, head_dim: int) -> Float32Array:
    kind = keys.text("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", 1.0)
    if "rope.scaling.type" not in keys:
        factor = keys.number("rope.scale_linear", factor)
        kind = "linear" if factor != 1.0 else "none"
    if factor == 0.0 and kind == "linear":  # how some converters write that there is none
        kind = "none"
    scaling = None if kind == "none" else {"rope_type": kind, "factor": factor}
    inv_freq = rope_inv_freq(head_dim, keys.number("rope.freq_base", 10_000.0), scaling)
    if "rope_freqs.weight" in file.tensors:
        divisors = file.vector("rope_freqs.weight")
        if divisors.shape != inv_freq.shape:
            raise ModelFormatError(f"tensor 'rope_freqs.weight' has {len(divisors)} values, not {len(inv_freq)}")
        if not (np.isfinite(divisors).all() and (divisors > 0).all()):
            raise ModelFormatError("tensor 'rope_freqs.weight' must hold finite positive numbers")
        inv_freq = inv_freq / divisors
    return inv_freq


def _config(file: GGUF, keys: Fields, architecture: Architecture) -> FrozenConfig:
    if keys.integer("expert_count", 0):
        raise UnsupportedModelError("mixtures of experts (expert_count > 0) are not implemented")
    if not keys.flag("attention.causal", True):
        raise UnsupportedModelError("attention that is not causal is not implemented")
    dim, n_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    if n_heads < 1 or dim < 1:
        raise ModelFormatError(f"GGUF: {n_heads} heads, embedding_length {dim}: must be positive")
    head_dim = keys.integer("attention.key_length", dim // n_heads)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError("value heads of another size than key heads")
    if keys.integer("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModelError("RoPE over a part of the head (rope.dimension_count)")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFormatError("tensor 'token_embd.weight' is missing")
    window = keys.integer("attention.sliding_window", 0)
    with np.errstate(over="ignore"):
        # The float32 in the file as the decimal that people wrote: 1e-05, not 9.999999747378752e-06.
        eps = float(str(np.float32(keys.number("attention.layer_norm_rms_epsilon"))))
    qkv_bias, o_bias, n_layers = architecture.qkv_bias, architecture.o_bias, keys.integer("block_count")
    if qkv_bias is None:
        qkv_bias = "blk.0.attn_q.bias" in file.tensors
    return FrozenConfig(
        architecture=architecture.hf,
        dim=dim,
        hidden_dim=keys.integer("feed_forward_length"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=keys.integer("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        max_seq_len=min(keys.integer("context_length"), MAX_POSITIONS),
        norm_eps=eps,
        layers=same_layers(n_layers, window=0 if window > MAX_POSITIONS else window),  # wider than any context
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias=qkv_bias,
        o_bias="blk.0.attn_output.bias" in file.tensors if o_bias is None else o_bias,
        qk_norm=architecture.qk_norm,
        bos_token_id=begin_token_id(file.metadata),
        eos_token_ids=tuple(end_token_ids(file.metadata)),
        requires=required_features(qkv_bias, architecture.qk_norm),
    )


def load_gguf(path: str | os.PathLike[str], name: str | None = None) -> SourceModel:
    """Read the header of a GGUF model; weights are read when the freezer asks for their rows."""
    file = open_gguf(path)
    try:
        architecture = _architecture(file)
        keys = _keys(file, architecture)
        config = _config(file, keys, architecture)
        named = file.metadata.get("general.name")
        model = build_model(
            file,
            config,
            [_inv_freq(file, keys, config.head_dim)],
            kind="gguf",
            name=name or (named if isinstance(named, str) and named else file.path.stem),
            source=file.path.name,
            interleaved=architecture.gguf_permuted,
            ignored=("rope_freqs.weight",),
        )
        model.attachments = gguf_tokenizer_attachments(file.metadata, config.vocab_size)
    except BaseException:
        file.close()
        raise
    model.close = file.close
    return model
