"""The architectures that can be frozen, as one table of flags, and the names of their parts in each
kind of source.

``build_model`` turns a reader of named tensors into a ``SourceModel``. What the tables do not know
is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from ..errors import ModelFormatError, UnsupportedModelError
from ..format.config import KEY_BIAS, FrozenConfig
from ..format.inventory import Part, Weight, inventory
from ..format.quantize import Float32Array, RowSource
from .sources import AlternatingPanels, SourceModel, StackedRows, UnpermutedRows, half_split_order


class Architecture(NamedTuple):
    """What tells one Llama-like model from another. A bias of None is decided by the checkpoint."""

    hf: str  # "architectures" in config.json
    model_type: str  # "model_type" in config.json
    gguf: str  # "general.architecture"
    qkv_bias: bool | None
    o_bias: bool | None
    qk_norm: bool
    window: str  # "never", "always" (when sliding_window is set), "opt-in" (use_sliding_window)
    gguf_permuted: bool  # q and k rows interleaved for RoPE in GGUF


ARCHITECTURES = (
    #            hf                    type       gguf     qkv    o      norm   window    permuted
    Architecture("LlamaForCausalLM", "llama", "llama", None, None, False, "never", True),
    Architecture("MistralForCausalLM", "mistral", "llama", False, False, False, "always", True),
    Architecture("Qwen2ForCausalLM", "qwen2", "qwen2", True, False, False, "opt-in", False),
    Architecture("Qwen3ForCausalLM", "qwen3", "qwen3", None, None, True, "opt-in", False),
)


class SourceName(NamedTuple):
    """A part's name in Hugging Face and GGUF files; ``{i}`` is the layer."""

    hf: str
    gguf: str


PARTS = {
    "tok_embeddings": SourceName("model.embed_tokens.weight", "token_embd.weight"),
    "norm": SourceName("model.norm.weight", "output_norm.weight"),
    "output": SourceName("lm_head.weight", "output.weight"),
    "attention_norm": SourceName("model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight"),
    "q": SourceName("model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight"),
    "k": SourceName("model.layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight"),
    "v": SourceName("model.layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight"),
    "q.bias": SourceName("model.layers.{i}.self_attn.q_proj.bias", "blk.{i}.attn_q.bias"),
    "k.bias": SourceName("model.layers.{i}.self_attn.k_proj.bias", "blk.{i}.attn_k.bias"),
    "key_bias": SourceName("model.layers.{i}.self_attn.k_proj.bias", "blk.{i}.attn_k.bias"),
    "v.bias": SourceName("model.layers.{i}.self_attn.v_proj.bias", "blk.{i}.attn_v.bias"),
    "q_norm": SourceName("model.layers.{i}.self_attn.q_norm.weight", "blk.{i}.attn_q_norm.weight"),
    "k_norm": SourceName("model.layers.{i}.self_attn.k_norm.weight", "blk.{i}.attn_k_norm.weight"),
    "wo": SourceName("model.layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight"),
    "wo.bias": SourceName("model.layers.{i}.self_attn.o_proj.bias", "blk.{i}.attn_output.bias"),
    "ffn_norm": SourceName("model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight"),
    "gate": SourceName("model.layers.{i}.mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight"),
    "up": SourceName("model.layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight"),
    "down": SourceName("model.layers.{i}.mlp.down_proj.weight", "blk.{i}.ffn_down.weight"),
}


_ROTATED = ("q", "k", "q.bias", "k.bias", "key_bias")  # parts whose rows are heads that RoPE turns
_KEY_BIAS_SIDES = {"k.bias": 0, "key_bias": 1}  # parts that share k's bias, with their place in what split_key_bias returns

LARGE_KEY_BIAS = 4.0  # a pair with a bias this large is kept out of the cache (docs/performance.md)


def required_features(qkv_bias: bool, qk_norm: bool) -> tuple[str, ...]:
    """What a model with such keys requires of its readers."""
    return (KEY_BIAS,) if qkv_bias and not qk_norm else ()


def split_key_bias(bias: Float32Array, head_dim: int) -> tuple[Float32Array, Float32Array]:
    """k's bias (kv_dim) -> what stays in the cache and what is kept out of it, each (kv_dim): whole pairs of RoPE."""
    pairs = bias.reshape(-1, 2, head_dim // 2)
    large = np.abs(pairs).max(axis=1, keepdims=True) >= LARGE_KEY_BIAS
    zero = np.float32(0)
    return np.where(large, zero, pairs).reshape(-1), np.where(large, pairs, zero).reshape(-1)


class TensorReader(Protocol):
    """Named float tensors of a checkpoint."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, (rows, columns) for matrices."""

    def matrix(self, name: str) -> RowSource: ...

    def vector(self, name: str) -> Float32Array: ...


class _Taker:
    """Hands out a reader's tensors by part, checks shapes, and remembers what was taken."""

    def __init__(self, reader: TensorReader, kind: str) -> None:
        self.reader = reader
        self._kind = kind
        self._shapes = reader.shapes
        self.taken: set[str] = set()

    def __call__(self, weight: Weight, part: Part) -> str:
        """The name of the source's tensor that is ``part`` of ``weight``."""
        name: str = getattr(PARTS[part.name], self._kind).format(i=weight.layer)
        found, shape = self._shapes.get(name), weight.part_shape(part)
        if found is None:
            raise ModelFormatError(f"tensor {name!r} is missing")
        if found != shape:
            raise ModelFormatError(f"tensor {name!r} has shape {list(found)}, the configuration needs {list(shape)}")
        self.taken.add(name)
        return name


def _concatenated(parts: list[Callable[[], Float32Array]]) -> Callable[[], Float32Array]:
    return lambda: np.concatenate([part() for part in parts])


def _reordered(vector: Callable[[], Float32Array], head_dim: int) -> Callable[[], Float32Array]:
    def read() -> Float32Array:
        values = vector()
        return values[half_split_order(len(values) // head_dim, head_dim)]

    return read


def _matrix(take: _Taker, weight: Weight, head_dim: int, interleaved: bool) -> RowSource:
    rows: list[RowSource] = []
    for part in weight.parts:
        source = take.reader.matrix(take(weight, part))
        rows.append(UnpermutedRows(source, head_dim) if interleaved and part.name in _ROTATED else source)
    if weight.alternating:
        return AlternatingPanels(*rows)
    return rows[0] if len(rows) == 1 else StackedRows(rows)


def _share(read: Callable[[], Float32Array], head_dim: int, side: int) -> Callable[[], Float32Array]:
    return lambda: split_key_bias(read(), head_dim)[side]


def _vector(take: _Taker, weight: Weight, config: FrozenConfig, interleaved: bool) -> Callable[[], Float32Array]:
    parts = []
    for part in weight.parts:
        read: Callable[[], Float32Array] = partial(take.reader.vector, take(weight, part))
        if interleaved and part.name in _ROTATED:
            read = _reordered(read, config.head_dim)
        if config.key_bias and part.name in _KEY_BIAS_SIDES:
            read = _share(read, config.head_dim, _KEY_BIAS_SIDES[part.name])
        parts.append(read)
    return parts[0] if len(parts) == 1 else _concatenated(parts)


def build_model(
    reader: TensorReader,
    config: FrozenConfig,
    rope_tables: Sequence[Float32Array],
    *,
    kind: str,
    name: str,
    source: str,
    interleaved: bool,
    ignored: Collection[str] = (),
) -> SourceModel:
    """Map every tensor of ``reader`` to its frozen place.

    ``rope_tables`` are the frequencies of each RoPE table of the configuration, (head_dim / 2); ``kind`` is the column
    of PARTS ("hf" or "gguf"); ``interleaved`` says that q and k rows must be
    put back; ``ignored`` names tensors that were used elsewhere. A missing tensor or a wrong shape
    is a ModelFormatError, a tensor that no part takes an UnsupportedModelError.
    """
    model = SourceModel(name=name, source=source, config=config)
    take, tables = _Taker(reader, kind), iter(rope_tables)
    for weight in inventory(config):
        if weight.role.startswith("rope."):
            model.vectors[weight.name] = partial(np.asarray, next(tables))
        elif weight.is_matrix:
            model.matrices[weight.name] = _matrix(take, weight, config.head_dim, interleaved)
        else:
            model.vectors[weight.name] = _vector(take, weight, config, interleaved)
    if unknown := sorted(set(reader.shapes) - take.taken - set(ignored)):
        raise UnsupportedModelError(
            f"tensor {unknown[0]!r} has no place in {config.architecture} with this configuration"
        )
    return model
