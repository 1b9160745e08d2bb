"""What an architecture is: names, and two functions from a source's configuration to traits.

Fold first, flag last: whatever is linear (multipliers, gains of 1 + w, fused matrices, RoPE over a part of the head) is a
``Fold`` of weights or a place in a tensor, applied in float64 when the file is written. What is not linear is a field of the
frozen file's configuration (csrc/FORMAT.md section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import UnsupportedModelError
from ...format.config import LayerSpec
from ...format.quantize import Float32Array, RowSource
from ..fields import Fields

Float64Array = npt.NDArray[np.float64]
Order = npt.NDArray[np.intp]


class SourceName(NamedTuple):
    """A part's name in Hugging Face and GGUF files; ``{i}`` is the layer, ``{e}`` the expert: a name without it is of a tensor
    (n_experts, rows, columns) of them all. Parts of a weight that have one name lie in that tensor one under the other."""

    hf: str
    gguf: str


PARTS: Mapping[str, SourceName] = {
    "tok_embeddings": SourceName("model.embed_tokens.weight", "token_embd.weight"),
    "norm": SourceName("model.norm.weight", "output_norm.weight"),
    "output": SourceName("lm_head.weight", "output.weight"),
    "output.bias": SourceName("lm_head.bias", "output.bias"),
    "attention_norm": SourceName("model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight"),
    "q": SourceName("model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight"),
    "k": SourceName("model.layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight"),
    "v": SourceName("model.layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight"),
    "q.bias": SourceName("model.layers.{i}.self_attn.q_proj.bias", "blk.{i}.attn_q.bias"),
    "k.bias": SourceName("model.layers.{i}.self_attn.k_proj.bias", "blk.{i}.attn_k.bias"),
    "v.bias": SourceName("model.layers.{i}.self_attn.v_proj.bias", "blk.{i}.attn_v.bias"),
    "q_norm": SourceName("model.layers.{i}.self_attn.q_norm.weight", "blk.{i}.attn_q_norm.weight"),
    "k_norm": SourceName("model.layers.{i}.self_attn.k_norm.weight", "blk.{i}.attn_k_norm.weight"),
    "wo": SourceName("model.layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight"),
    "wo.bias": SourceName("model.layers.{i}.self_attn.o_proj.bias", "blk.{i}.attn_output.bias"),
    "ffn_norm": SourceName("model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight"),
    "gate": SourceName("model.layers.{i}.mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight"),
    "up": SourceName("model.layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight"),
    "down": SourceName("model.layers.{i}.mlp.down_proj.weight", "blk.{i}.ffn_down.weight"),
    "gate.bias": SourceName("model.layers.{i}.mlp.gate_proj.bias", "blk.{i}.ffn_gate.bias"),
    "up.bias": SourceName("model.layers.{i}.mlp.up_proj.bias", "blk.{i}.ffn_up.bias"),
    "down.bias": SourceName("model.layers.{i}.mlp.down_proj.bias", "blk.{i}.ffn_down.bias"),
}


def spelled(parts: Mapping[str, SourceName], tied: bool) -> Mapping[str, SourceName]:
    """The parts' names where the embeddings are the output matrix too."""
    return {**parts, "output": parts["tok_embeddings"]} if tied else parts


class Fold(NamedTuple):
    """What is done to a part on its way into the file: values become (value + offset) * scale, the sum in float32 as transformers
    and GGUF's converters have it, the product in float64 and rounded once.

    ``order`` (head_dim) says where each row of a head lies in the source's head; ``scale`` is a number, or (head_dim) one for
    each row of a head, in the order of the file. The others are for LayerNorms (arch/layer_norm.py): ``center`` subtracts means,
    "rows" of each row, "columns" of each column, and of all of a vector; a bias with ``norm_bias``, the part that is the bias of
    the norm before its matrix, gets the matrix times it. ``is_absent``: the source has no such vector, which is ``offset`` then.
    ``pieces``: the parts of a fused tensor are cut into so many pieces; the first of each lie one under the other, then the
    second of each, and so on. ``is_transposed``: the source has the matrix, or those of all experts, as (inputs, outputs);
    a convolution's taps by channel.
    ``gain``: the part that is the gain of the norm before a matrix, whose columns are multiplied by it. ``row_norm_eps``: each
    row of a matrix is normed like a row of the residual stream, by an RMSNorm with that eps. ``is_softplus``: of each value of a
    vector log(1 + exp(value)), to which those of the part ``plus`` are added.
    """

    scale: float | Float64Array = 1.0
    offset: float = 0.0
    order: Order | None = None
    center: str = ""
    norm_bias: str | None = None
    is_absent: bool = False
    pieces: int = 1
    is_transposed: bool = False
    gain: str | None = None
    row_norm_eps: float | None = None
    is_softplus: bool = False
    plus: str | None = None


class Shape(NamedTuple):
    """The sizes that every architecture has, in the names of FrozenConfig."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    tied: bool  # the embeddings are the output matrix too
    context: int  # positions that the checkpoint is made for
    n_ctx: int | None  # positions that are asked for, at most `context`; None = as many as come at no cost


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What an architecture makes of a configuration, beyond the sizes."""

    layers: tuple[LayerSpec, ...]  # (n_layers)
    rope_tables: tuple[Float32Array, ...]  # each (head_dim / 2): the tables that the layers name
    rope_amplitudes: tuple[float, ...] = ()  # what each multiplies cos and sin by; () = 1
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    qk_norm_all_heads: bool = False
    qk_norm_after_rope: bool = False
    attention_softcap: float = 0.0
    logits_softcap: float = 0.0
    hidden_dim: int | None = None  # None: intermediate_size, feed_forward_length
    n_experts: int = 0
    n_experts_used: int = 0
    experts_normalized: bool = False
    shared_hidden_dim: int = 0
    shared_gated: bool = False
    gate_up_bias: bool = False
    down_bias: bool = False
    output_bias: bool = False
    attention_sinks: bool = False
    router_bias: bool = False
    is_untied: bool = False  # tied embeddings become two matrices, which are folded in different ways
    norm_eps: float | None = None  # None: rms_norm_eps, attention.layer_norm_rms_epsilon
    max_seq_len: int | None = None  # None: what is asked for, or the checkpoint's own
    folds: Mapping[str, Fold] = field(default_factory=dict)  # part -> what is done to it

    def query_scale(self, layer: int) -> float | Float64Array:
        """The amplitude of a layer's RoPE as a factor of its query: q and k carry it where they are turned, the query gets it for
        both. A number, or (head_dim) where not all of a head is turned."""
        table = self.layers[layer].rope
        squared = self.rope_amplitudes[table] ** 2 if self.rope_amplitudes else 1.0
        turned = self.rope_tables[table] != 0
        return squared if squared == 1.0 or turned.all() else np.tile(np.where(turned, squared, 1.0), 2)


class Tensors(Protocol):
    """What a reader of GGUF metadata may ask of the file's tensors."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def matrix(self, name: str) -> RowSource: ...

    def vector(self, name: str) -> Float32Array: ...


def no_gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    """``from_gguf`` where ``gguf`` is None, of which no GGUF file can be."""
    raise UnsupportedModelError("GGUF does not have this architecture")


class Architecture(NamedTuple):
    """One family of checkpoints.

    ``from_hf`` reads config.json; ``from_gguf`` reads the metadata below the architecture's prefix, and where it must, tensors.
    """

    hf: str  # "architectures" in config.json
    model_type: str  # "model_type" in config.json
    gguf: str | None  # "general.architecture"; None: the format does not have it
    from_hf: Callable[[Fields, Shape], Traits]
    from_gguf: Callable[[Fields, Shape, Tensors], Traits]
    parts: Mapping[str, SourceName] = PARTS
    # Where the text model is a part of what the file has, images' models beside it: beginnings of its tensors -> those of `parts`
    hf_text: Mapping[str, str] | None = None
    hf_keys: Mapping[str, str] = {}  # config.json's names of keys that others name otherwise -> these names
    has_experts: bool = False
    has_shared_expert: bool = False  # beside them, or alone
    gguf_sign: str | None = None  # a key that tells its GGUF files from others of the same name
    gguf_permuted: bool = False  # q and k rows are interleaved for RoPE in GGUF
    hf_ignored: tuple[str, ...] = ()  # ends of tensors that say nothing: constants that were saved along
    hf_defaults: Mapping[str, Any] = {}  # of transformers' class, for sizes that published files leave out
    gguf_numbers: Mapping[str, str] = {}  # keys without its prefix, of a number for each layer -> as which tensors they are read
    gguf_keys: frozenset[str] = frozenset()  # what it reads beyond the keys that all have
    gguf_tensors: frozenset[str] = frozenset()  # what `from_gguf` reads: they have no place in the frozen file
