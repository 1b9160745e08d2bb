"""From a parsed GGUF file to a ``SourceModel``: hyperparameters, RoPE, riders and which tensor goes
where.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ..errors import ModelFormatError, UnsupportedModelError
from ..format.config import MAX_POSITIONS, FrozenConfig, same_layers
from ..format.quantize import Float32Array
from .architectures import ARCHITECTURES, Architecture, build_model
from .gguf import GGUFFile
from .rope import rope_inv_freq
from .sources import SourceModel
from .tokenizer import end_token_ids, gguf_tokenizer_riders

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


class _Keys:
    """Typed access to the architecture's metadata; errors name the key."""

    def __init__(self, file: GGUFFile, prefix: str) -> None:
        self._metadata = file.metadata
        self._prefix = prefix

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of ``prefix.key``; without a default a missing key is an error."""
        full = f"{self._prefix}.{key}"
        value = self._metadata.get(full, default)
        if value is None:
            raise ModelFormatError(f"GGUF: key {full!r} is missing")
        if isinstance(value, np.ndarray) and kind is int and value.dtype.kind in "iu" and value.size:
            if (value != value[0]).any():
                raise UnsupportedModelError(f"key {full!r} differs between layers: not implemented")
            value = int(value[0])
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ModelFormatError(f"GGUF: key {full!r} must be {kind.__name__}, not {value!r:.80}")
        return value


def _architecture(file: GGUFFile) -> Architecture:
    name = file.metadata.get("general.architecture")
    found = next((a for a in ARCHITECTURES if a.gguf == name), None)
    if found is None:
        raise UnsupportedModelError(f"architecture {name!r:.80} is not implemented")
    prefix = f"{name}."
    for key in file.metadata:
        if key.startswith(prefix) and key.removeprefix(prefix) not in _KNOWN_KEYS:
            raise UnsupportedModelError(f"key {key!r:.200} is not implemented")
    return found


def _inv_freq(file: GGUFFile, keys: _Keys, head_dim: int) -> Float32Array:
    kind = keys.get("rope.scaling.type", str, "none")
    factor = keys.get("rope.scaling.factor", float, 1.0)
    if "rope.scaling.type" not in keys_of(file):
        factor = keys.get("rope.scale_linear", float, factor)
        kind = "linear" if factor != 1.0 else "none"
    scaling = None if kind == "none" else {"rope_type": kind, "factor": factor}
    inv_freq = rope_inv_freq(head_dim, keys.get("rope.freq_base", float, 10_000.0), scaling)
    if "rope_freqs.weight" in file.tensors:
        divisors = file.vector("rope_freqs.weight")
        if divisors.shape != inv_freq.shape:
            raise ModelFormatError(f"tensor 'rope_freqs.weight' has {len(divisors)} values, not {len(inv_freq)}")
        if not (np.isfinite(divisors).all() and (divisors > 0).all()):
            raise ModelFormatError("tensor 'rope_freqs.weight' must hold finite positive numbers")
        inv_freq = inv_freq / divisors
    return inv_freq


def keys_of(file: GGUFFile) -> set[str]:
    """Metadata keys without the architecture's prefix."""
    prefix = f"{file.metadata.get('general.architecture')}."
    return {key.removeprefix(prefix) for key in file.metadata if key.startswith(prefix)}


def _config(file: GGUFFile, keys: _Keys, architecture: Architecture) -> FrozenConfig:
    if keys.get("expert_count", int, 0):
        raise UnsupportedModelError("mixtures of experts (expert_count > 0) are not implemented")
    if not keys.get("attention.causal", bool, True):
        raise UnsupportedModelError("attention that is not causal is not implemented")
    dim, n_heads = keys.get("embedding_length", int), keys.get("attention.head_count", int)
    if n_heads < 1 or dim < 1:
        raise ModelFormatError(f"GGUF: {n_heads} heads, embedding_length {dim}: must be positive")
    head_dim = keys.get("attention.key_length", int, dim // n_heads)
    if keys.get("attention.value_length", int, head_dim) != head_dim:
        raise UnsupportedModelError("value heads of another size than key heads")
    if keys.get("rope.dimension_count", int, head_dim) != head_dim:
        raise UnsupportedModelError("RoPE over a part of the head (rope.dimension_count)")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFormatError("tensor 'token_embd.weight' is missing")
    # The float32 in the file as the decimal that people wrote: 1e-05, not 9.999999747378752e-06.
    eps = float(str(np.float32(keys.get("attention.layer_norm_rms_epsilon", float))))
    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    qkv_bias, o_bias, n_layers = architecture.qkv_bias, architecture.o_bias, keys.get("block_count", int)
    return FrozenConfig(
        architecture=architecture.hf,
        dim=dim,
        hidden_dim=keys.get("feed_forward_length", int),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=keys.get("attention.head_count_kv", int, n_heads),
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        max_seq_len=min(keys.get("context_length", int), MAX_POSITIONS),
        norm_eps=eps,
        layers=same_layers(n_layers, window=keys.get("attention.sliding_window", int, 0)),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors if qkv_bias is None else qkv_bias,
        o_bias="blk.0.attn_output.bias" in file.tensors if o_bias is None else o_bias,
        qk_norm=architecture.qk_norm,
        bos_token_id=bos,
        eos_token_ids=tuple(end_token_ids(file.metadata)),
    )


def load_gguf(path: str | os.PathLike[str], name: str | None = None) -> SourceModel:
    """Read the header of a GGUF model; weights are read when the freezer asks for their rows."""
    file = GGUFFile(path)
    try:
        architecture = _architecture(file)
        keys = _Keys(file, architecture.gguf)
        config = _config(file, keys, architecture)
        model = build_model(
            file,
            config,
            [_inv_freq(file, keys, config.head_dim)],
            kind="gguf",
            name=name or str(file.metadata.get("general.name") or file.path.stem),
            source=file.path.name,
            interleaved=architecture.gguf_permuted,
            ignored=("rope_freqs.weight",),
        )
        model.riders = gguf_tokenizer_riders(file.metadata, config.vocab_size)
    except BaseException:
        file.close()
        raise
    model.close = file.close
    return model
