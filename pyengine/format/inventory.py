"""The inventory of a model: every weight, from its configuration (csrc/FORMAT.md, section 2).

Names and shapes of weights are written here and in ``visit_tensors`` of csrc/model.c, which checks a file against its
own list when it loads, and nowhere else: the reader, the writer, the freezer and whoever counts parameters, bytes or
multiplications ask ``inventory``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from .config import FrozenConfig
from .container import StoredTensor, pad, vector_tensor

FORMAT_VERSION = "1"

PANEL_ROWS = 16
GROUP_COLUMNS = 64

GOLDEN_BYTES = 8192  # reserved for golden.json: it is computed from the finished file
MAX_RIDER_BYTES = 512 << 20
REQUIRED_RIDERS = ("config.json", "tokenizer.json", "golden.json", "checksums.json")
RIDERS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "golden.json",
    "checksums.json",
)

# How much of a weight a forward pass reads: one row for each token, all of it for the tokens of a batch, all of it for
# those of them whose logits are wanted.
Use = Literal["row", "tokens", "logits"]


class Part(NamedTuple):
    """What a weight is made of: ``rows`` rows of a matrix, or values of a vector."""

    name: str
    rows: int


class Weight(NamedTuple):
    """A matrix or a vector of the model.

    ``shape`` is (rows = outputs, columns = inputs) or (n), without padding. The parts lie one after the other, or, if
    ``alternating``, by panels of 16 rows in turn, each padded by itself. ``layer`` is None for what belongs to no layer.
    """

    name: str  # in the file: "layers.3.wqkv"
    role: str  # without the layer: "wqkv"
    layer: int | None
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    kind: str  # how its values are stored
    use: Use
    alternating: bool = False

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    @property
    def is_parameter(self) -> bool:
        """Trained, in contrast to a table of constants."""
        return self.role != "rope.inv_freq"

    def part_shape(self, part: Part) -> tuple[int, ...]:
        return (part.rows, *self.shape[1:])

    def stored(self) -> dict[str, StoredTensor]:
        """Name -> tensor of the file, in file order."""
        return _KINDS[self.kind](self)


# ---------------------------------------------------------------------------- kinds


def _n_panels(weight: Weight) -> int:
    blocks = [part.rows for part in weight.parts] if weight.alternating else [weight.shape[0]]
    return sum(pad(rows, PANEL_ROWS) // PANEL_ROWS for rows in blocks)


def _int8_g64(weight: Weight) -> dict[str, StoredTensor]:
    """int8 codes in panels and one f16 scale for each row and group of 64 columns (sections 3 and 4)."""
    n_panels, n_groups = _n_panels(weight), pad(weight.shape[1], GROUP_COLUMNS) // GROUP_COLUMNS
    shape = (n_panels, n_groups, GROUP_COLUMNS // 4, PANEL_ROWS, 4)
    return {
        f"{weight.name}.codes": StoredTensor("I8", shape, math.prod(shape)),
        f"{weight.name}.scales": vector_tensor(n_panels * n_groups * PANEL_ROWS, "F16"),
    }


def _f32(weight: Weight) -> dict[str, StoredTensor]:
    return {weight.name: vector_tensor(weight.shape[0], "F32")}


_KINDS: dict[str, Callable[[Weight], dict[str, StoredTensor]]] = {"int8_g64": _int8_g64, "f32": _f32}


# ---------------------------------------------------------------------------- the inventory


def _weight(
    role: str, parts: dict[str, int], columns: int | None, layer: int | None, use: Use, alternating: bool = False
) -> Weight:
    name = role if layer is None else f"layers.{layer}.{role}"
    shape = (sum(parts.values()),) if columns is None else (sum(parts.values()), columns)
    kind = "f32" if columns is None else "int8_g64"
    return Weight(name, role, layer, shape, tuple(Part(*part) for part in parts.items()), kind, use, alternating)


def _layer(c: FrozenConfig, i: int) -> Iterator[Weight]:
    qkv = {"q": c.q_dim, "k": c.kv_dim, "v": c.kv_dim}

    def vector(role: str, parts: dict[str, int]) -> Weight:
        return _weight(role, parts, None, i, "tokens")

    def matrix(role: str, parts: dict[str, int], columns: int, alternating: bool = False) -> Weight:
        return _weight(role, parts, columns, i, "tokens", alternating)

    yield vector("attention_norm", {"attention_norm": c.dim})
    yield matrix("wqkv", qkv, c.dim)
    if c.qkv_bias:
        yield vector("wqkv.bias", {f"{part}.bias": rows for part, rows in qkv.items()})
    if c.qk_norm:
        yield vector("q_norm", {"q_norm": c.head_dim})
        yield vector("k_norm", {"k_norm": c.head_dim})
    yield matrix("wo", {"wo": c.dim}, c.q_dim)
    if c.o_bias:
        yield vector("wo.bias", {"wo.bias": c.dim})
    yield vector("ffn_norm", {"ffn_norm": c.dim})
    yield matrix("w_gate_up", {"gate": c.hidden_dim, "up": c.hidden_dim}, c.dim, alternating=True)
    yield matrix("w_down", {"down": c.dim}, c.hidden_dim)


def inventory(config: FrozenConfig) -> Iterator[Weight]:
    """Every weight of such a model, in file order."""
    c = config
    embeddings = {"tok_embeddings": c.vocab_size}
    yield _weight("tok_embeddings", embeddings, c.dim, None, "logits" if c.tie_embeddings else "row")
    for i in range(c.n_layers):
        yield from _layer(c, i)
    yield _weight("norm", {"norm": c.dim}, None, None, "logits")
    if not c.tie_embeddings:
        yield _weight("output", {"output": c.vocab_size}, c.dim, None, "logits")
    yield _weight("rope.inv_freq", {"rope.inv_freq": c.head_dim // 2}, None, None, "tokens")


def stored_tensors(config: FrozenConfig) -> dict[str, StoredTensor]:
    """Name -> stored tensor of every weight of such a model, in file order. Riders follow them."""
    return {name: tensor for weight in inventory(config) for name, tensor in weight.stored().items()}


# ---------------------------------------------------------------------------- counting


def count_parameters(config: FrozenConfig) -> int:
    """Numbers that were trained, without padding; tied embeddings count once."""
    return sum(math.prod(weight.shape) for weight in inventory(config) if weight.is_parameter)


def count_macs(config: FrozenConfig, n_rows: int, n_logits: int) -> int:
    """Multiply-accumulates of the matrix products of one forward: n_rows tokens, logits for n_logits of them. Attention
    is not counted."""
    times = {"row": 0, "tokens": n_rows, "logits": n_logits}
    return sum(times[weight.use] * math.prod(weight.shape) for weight in inventory(config) if weight.is_matrix)


def kv_bytes_per_position(config: FrozenConfig, kv_dtype: str = "int8") -> int:
    """Bytes of the KV cache for one position: codes of K and V, a scale for 32 values of K and one for a head of V."""
    padded = pad(config.head_dim, 32)
    head = 2 * padded + 4 * (padded // 32) + 4 if kv_dtype == "int8" else 8 * padded
    return config.n_layers * config.n_kv_heads * head
