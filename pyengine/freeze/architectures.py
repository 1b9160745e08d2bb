"""The architectures that can be frozen, as one table of flags, and the names of their parts in each
kind of source.

``build_model`` turns a reader of named tensors into a ``SourceModel``. What the tables do not know
is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple, Protocol

from ..errors import ModelFormatError, UnsupportedModelError
from ..frozen import FrozenConfig
from .sources import (
    AlternatingPanels,
    Float32Array,
    RowSource,
    SourceModel,
    StackedRows,
    UnpermutedRows,
    half_split_order,
)


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


class Part(NamedTuple):
    """A source tensor's name in Hugging Face and GGUF files; ``{i}`` is the layer."""

    hf: str
    gguf: str


PARTS = {
    "tok_embeddings": Part("model.embed_tokens.weight", "token_embd.weight"),
    "norm": Part("model.norm.weight", "output_norm.weight"),
    "output": Part("lm_head.weight", "output.weight"),
    "attention_norm": Part("model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight"),
    "q": Part("model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight"),
    "k": Part("model.layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight"),
    "v": Part("model.layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight"),
    "q.bias": Part("model.layers.{i}.self_attn.q_proj.bias", "blk.{i}.attn_q.bias"),
    "k.bias": Part("model.layers.{i}.self_attn.k_proj.bias", "blk.{i}.attn_k.bias"),
    "v.bias": Part("model.layers.{i}.self_attn.v_proj.bias", "blk.{i}.attn_v.bias"),
    "q_norm": Part("model.layers.{i}.self_attn.q_norm.weight", "blk.{i}.attn_q_norm.weight"),
    "k_norm": Part("model.layers.{i}.self_attn.k_norm.weight", "blk.{i}.attn_k_norm.weight"),
    "wo": Part("model.layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight"),
    "wo.bias": Part("model.layers.{i}.self_attn.o_proj.bias", "blk.{i}.attn_output.bias"),
    "ffn_norm": Part("model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight"),
    "gate": Part("model.layers.{i}.mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight"),
    "up": Part("model.layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight"),
    "down": Part("model.layers.{i}.mlp.down_proj.weight", "blk.{i}.ffn_down.weight"),
}


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

    def _take(self, part: str, layer: int, shape: tuple[int, ...]) -> str:
        name: str = getattr(PARTS[part], self._kind).format(i=layer)
        found = self._shapes.get(name)
        if found is None:
            raise ModelFormatError(f"tensor {name!r} is missing")
        if found != shape:
            raise ModelFormatError(f"tensor {name!r} has shape {list(found)}, the configuration needs {list(shape)}")
        self.taken.add(name)
        return name

    def matrix(self, part: str, layer: int, rows: int, columns: int) -> RowSource:
        return self.reader.matrix(self._take(part, layer, (rows, columns)))

    def vector(self, part: str, layer: int, n: int) -> Callable[[], Float32Array]:
        return partial(self.reader.vector, self._take(part, layer, (n,)))


def _concatenated(parts: list[Callable[[], Float32Array]]) -> Callable[[], Float32Array]:
    import numpy as np

    return lambda: np.concatenate([part() for part in parts])


def _reordered(vector: Callable[[], Float32Array], head_dim: int) -> Callable[[], Float32Array]:
    def read() -> Float32Array:
        values = vector()
        return values[half_split_order(len(values) // head_dim, head_dim)]

    return read


def _add_layer(model: SourceModel, take: _Taker, i: int, interleaved: bool) -> None:
    c, layer = model.config, f"layers.{i}"
    rows = {"q": c.q_dim, "k": c.kv_dim, "v": c.kv_dim}
    qkv = {part: take.matrix(part, i, n, c.dim) for part, n in rows.items()}
    if interleaved:
        for part in "qk":
            qkv[part] = UnpermutedRows(qkv[part], c.head_dim)
    model.matrices[f"{layer}.wqkv"] = StackedRows(list(qkv.values()))
    if c.qkv_bias:
        biases = {part: take.vector(f"{part}.bias", i, n) for part, n in rows.items()}
        if interleaved:
            for part in "qk":
                biases[part] = _reordered(biases[part], c.head_dim)
        model.vectors[f"{layer}.wqkv.bias"] = _concatenated(list(biases.values()))
    if c.qk_norm:
        model.vectors[f"{layer}.q_norm"] = take.vector("q_norm", i, c.head_dim)
        model.vectors[f"{layer}.k_norm"] = take.vector("k_norm", i, c.head_dim)
    if c.o_bias:
        model.vectors[f"{layer}.wo.bias"] = take.vector("wo.bias", i, c.dim)
    model.vectors[f"{layer}.attention_norm"] = take.vector("attention_norm", i, c.dim)
    model.vectors[f"{layer}.ffn_norm"] = take.vector("ffn_norm", i, c.dim)
    model.matrices[f"{layer}.wo"] = take.matrix("wo", i, c.dim, c.q_dim)
    model.matrices[f"{layer}.w_gate_up"] = AlternatingPanels(
        take.matrix("gate", i, c.hidden_dim, c.dim), take.matrix("up", i, c.hidden_dim, c.dim)
    )
    model.matrices[f"{layer}.w_down"] = take.matrix("down", i, c.dim, c.hidden_dim)


def build_model(
    reader: TensorReader,
    config: FrozenConfig,
    inv_freq: Float32Array,
    *,
    kind: str,
    name: str,
    source: str,
    interleaved: bool,
    ignored: Collection[str] = (),
) -> SourceModel:
    """Map every tensor of ``reader`` to its frozen place.

    ``kind`` is the column of PARTS ("hf" or "gguf"); ``interleaved`` says that q and k rows must be
    put back; ``ignored`` names tensors that were used elsewhere. A missing tensor or a wrong shape
    is a ModelFormatError, a tensor that no part takes an UnsupportedModelError.
    """
    model = SourceModel(name=name, source=source, config=config)
    take = _Taker(reader, kind)
    model.matrices["tok_embeddings"] = take.matrix("tok_embeddings", 0, config.vocab_size, config.dim)
    for i in range(config.n_layers):
        _add_layer(model, take, i, interleaved)
    model.vectors["norm"] = take.vector("norm", 0, config.dim)
    if not config.tie_embeddings:
        model.matrices["output"] = take.matrix("output", 0, config.vocab_size, config.dim)
    model.vectors["rope.inv_freq"] = lambda: inv_freq
    if unknown := sorted(set(reader.shapes) - take.taken - set(ignored)):
        raise UnsupportedModelError(
            f"tensor {unknown[0]!r} has no place in {config.architecture} with this configuration"
        )
    return model
