"""From a parsed GGUF file to a ``SourceModel``: hyperparameters, RoPE, attachments and which tensor goes
where.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..errors import ModelFormatError, UnsupportedModelError
from ..format.config import MAX_HEAD_DIM, MAX_LAYERS, MAX_POSITIONS, FrozenConfig
from ..format.quantize import Float32Array, RowSource
from . import rank_head
from .arch import architecture_of_gguf, gguf_keys
from .arch.base import Architecture, Shape, Traits, spelled
from .build import build_model, checked_n_ctx, folded_multipliers, frozen_fields
from .fields import Fields
from .gguf import GGUFFile
from .gguf_split import SplitGGUF, open_gguf
from .sources import SourceModel
from .tokenizer import begin_token_id, check_tokenizer_json, end_token_ids, gguf_tokenizer_attachments

_LABELS, _HEAD = "classifier.output_labels", "cls.output.weight"  # of a reranker
# Keys under the architecture's prefix. One that is not here may change the arithmetic and is
# refused.
_KNOWN_KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "attention.causal",
    "attention.sliding_window",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "expert_count", "expert_used_count", "expert_shared_feed_forward_length", "pooling_type",
    _LABELS, *gguf_keys.YARN,
}  # fmt: skip


GGUF = GGUFFile | SplitGGUF

_POOLINGS = {1: "mean", 3: "last"}  # of llama.cpp's kinds those that there are here


def _architecture(file: GGUF) -> Architecture:
    name = Fields(file.metadata, "GGUF").text("general.architecture")
    keys = Fields(file.metadata, "GGUF", f"{name}.")
    found = architecture_of_gguf(
        name,
        has_experts=bool(keys.integer("expert_count", 0)),
        has_shared_expert=bool(keys.integer("expert_shared_feed_forward_length", 0)),
        keys={key.removeprefix(f"{name}.") for key in file.metadata if key.startswith(f"{name}.")},
    )
    prefix, known = f"{found.gguf}.", _KNOWN_KEYS | found.gguf_keys
    for key in file.metadata:
        if key.startswith(prefix) and key.removeprefix(prefix) not in known:
            raise UnsupportedModelError(f"key {key!r:.200} is not implemented")
    return found


class WithNumbers:
    """A file's tensors, and beside them keys of its metadata that have a number for each layer: a tensor of one value each.

    ``numbers`` maps keys to the tensors' names, ``{i}`` being the layer."""

    def __init__(self, file: GGUF, numbers: Mapping[str, str], n_layers: int) -> None:
        self._file = file
        self._numbers: dict[str, Float32Array] = {}
        for key, name in numbers.items():
            found = file.metadata.get(key)
            values = np.atleast_1d(found) if isinstance(found, (int, float, np.ndarray)) else np.empty(0)
            if values.dtype.kind not in "fiu" or values.ndim != 1 or len(values) not in (1, n_layers):
                raise ModelFormatError(f"GGUF: {key} must be a number, or one for each of {n_layers} layers")
            with np.errstate(over="ignore"):  # the freezer refuses what is not finite
                of_layers = np.resize(values.astype(np.float32), n_layers)
            self._numbers |= {name.format(i=i): of_layers[i : i + 1] for i in range(n_layers)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {**self._file.shapes, **dict.fromkeys(self._numbers, (1,))}

    def matrix(self, name: str) -> RowSource:
        return self._file.matrix(name)

    def vector(self, name: str) -> Float32Array:
        return self._numbers[name] if name in self._numbers else self._file.vector(name)


def _keys(file: GGUF, architecture: Architecture) -> Fields:
    """The architecture's metadata. A value for each layer becomes one value, if it is one."""
    prefix = f"{architecture.gguf}."
    values = {key: value for key, value in file.metadata.items() if key.startswith(prefix)}
    for key, value in values.items():
        if isinstance(value, np.ndarray) and value.size and key.removeprefix(prefix) not in architecture.gguf_keys:
            if (value != value[0]).any():
                raise UnsupportedModelError(f"key {key!r} differs between layers: not implemented")
            values[key] = value[0].item()
    return Fields(values, "GGUF", prefix)


def _kv_heads(keys: Fields, n_heads: int) -> int:
    """One number, or one for each layer, 0 where it has no attention."""
    key = "attention.head_count_kv"
    found = keys.raw(key)
    if not isinstance(found, np.ndarray):
        return keys.integer(key, n_heads)
    counts = {count for count in found.tolist() if count}
    if len(counts) != 1 or type(count := counts.pop()) is not int:
        raise keys.wrong(key, "one number of heads in all layers that have any")
    return count


def _shape(file: GGUF, keys: Fields, n_ctx: int | None) -> Shape:
    if not keys.flag("attention.causal", True):
        raise UnsupportedModelError("attention that is not causal is not implemented")
    dim, n_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    if n_heads < 1 or dim < 1:
        raise ModelFormatError(f"GGUF: {n_heads} heads, embedding_length {dim}: must be positive")
    head_dim = keys.integer("attention.key_length", dim // n_heads)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError("value heads of another size than key heads")
    if not 2 <= head_dim <= MAX_HEAD_DIM or head_dim % 2:
        raise ModelFormatError(f"GGUF: heads of {head_dim} elements: not an even number in 2..{MAX_HEAD_DIM}")
    n_layers = keys.integer("block_count")
    if not 1 <= n_layers <= MAX_LAYERS:
        raise ModelFormatError(f"GGUF: block_count {n_layers} is not in 1..{MAX_LAYERS}")
    context = min(keys.integer("context_length"), MAX_POSITIONS)
    return Shape(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=_kv_heads(keys, n_heads),
        head_dim=head_dim,
        tied="output.weight" not in file.tensors,
        context=context,
        n_ctx=checked_n_ctx(n_ctx, context),
    )


def _config(file: GGUF, keys: Fields, architecture: Architecture, shape: Shape, traits: Traits) -> FrozenConfig:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFormatError("tensor 'token_embd.weight' is missing")
    eps = gguf_keys.norm_eps(keys) if traits.norm_eps is None else traits.norm_eps
    return FrozenConfig(
        architecture=architecture.hf,
        hidden_dim=keys.integer("feed_forward_length") if traits.hidden_dim is None else traits.hidden_dim,
        vocab_size=embedding.shape[0],
        norm_eps=eps,
        bos_token_id=begin_token_id(file.metadata),
        eos_token_ids=tuple(end_token_ids(file.metadata)),
        extra=({"pooling": pooling} if (pooling := _POOLINGS.get(keys.integer("pooling_type", 0))) else {})
        | folded_multipliers(traits),
        **frozen_fields(shape, traits),
    )


def _ranks_by(file: GGUF, output: str, tokenizer_json: bytes, traits: Traits) -> dict[str, int | None]:
    """Which tokens a reranker's head stands for; output: the name of the output matrix."""
    if len(file.tensors[_HEAD].shape) != 2:
        raise ModelFormatError(f"tensor {_HEAD!r} is no matrix")
    rows = file.matrix(output)
    ids = check_tokenizer_json(tokenizer_json, rows.rows)
    return rank_head.tokens_of(file.matrix(_HEAD), rows, ids, tolerance=rank_head.QUANTIZED, is_folded=bool(traits.folds))


def load_gguf(path: str | os.PathLike[str], name: str | None = None, n_ctx: int | None = None) -> SourceModel:
    """Read the header of a GGUF model; weights are read when the freezer asks for their rows. ``n_ctx`` as in ``freeze``."""
    file = open_gguf(path)
    try:
        architecture = _architecture(file)
        keys = _keys(file, architecture)
        shape = _shape(file, keys, n_ctx)
        traits = architecture.from_gguf(keys, shape, file)
        config = _config(file, keys, architecture, shape, traits)
        attachments = gguf_tokenizer_attachments(file.metadata, config.vocab_size)
        if _HEAD in file.tensors:
            output = spelled(architecture.parts, shape.tied)["output"].gguf
            ids = _ranks_by(file, output, attachments["tokenizer.json"], traits)
            config = replace(config, extra={**config.extra, "rerank": ids})
        named = file.metadata.get("general.name")
        model = build_model(
            WithNumbers(file, architecture.gguf_numbers, shape.n_layers) if architecture.gguf_numbers else file,
            config,
            traits.rope_tables,
            parts=spelled(architecture.parts, shape.tied),
            kind="gguf",
            name=name or (named if isinstance(named, str) and named else file.path.stem),
            source=file.path.name,
            interleaved=architecture.gguf_permuted,
            folds=traits.folds,
            query_scales=[traits.query_scale(i) for i in range(shape.n_layers)],
            ignored=architecture.gguf_tensors | {gguf_keys.ROPE_DIVISORS, _HEAD},
        )
        model.attachments = attachments
    except BaseException:
        file.close()
        raise
    model.close = file.close
    return model
