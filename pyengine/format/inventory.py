"""The inventory of a model: every weight, from its configuration (csrc/FORMAT.md, section 2).

Names and shapes of weights are written here and in ``visit_tensors`` of csrc/model.c, which checks a file against its
own list when it loads, and nowhere else: the reader, the writer, the freezer and whoever counts parameters, bytes or
multiplications ask ``inventory``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from ..errors import ModelFormatError
from .config import DEFAULT_KIND, XIELU, FrozenConfig, unknown
from .container import StoredTensor, pad, vector_tensor

FORMAT_VERSION = "4"

PANEL_ROWS = 16
GROUP_COLUMNS = 64

GOLDEN_BYTES = 8192  # reserved for golden.json: it is computed from the finished file
MAX_ATTACHMENT_BYTES = 512 << 20
REQUIRED_ATTACHMENTS = ("config.json", "tokenizer.json", "golden.json", "checksums.json")
ATTACHMENTS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "golden.json",
    "checksums.json",
)
EXTRA_PREFIX = "extra."  # tensors that a reader may ignore
DRAFT_PREFIX = EXTRA_PREFIX + "draft."  # of a draft head
_VECTOR_DTYPES = {"f32": "F32", "i32": "I32"}

# How much of a weight a forward pass reads: one row for each token, all of it for the tokens of a batch, all of it for
# those of them whose logits, or hidden state, are wanted.
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
    kind: str  # how its values are stored: a matrix kind, "f32" or "i32"
    use: Use
    alternating: bool = False
    expert: int | None = None  # which of the layer's MLPs it belongs to, of a model that has many; n_experts is the shared one

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    @property
    def is_parameter(self) -> bool:
        """Trained, in contrast to a table of constants and to ``key_bias``, a share of parameters counted elsewhere."""
        return not self.role.startswith("rope.") and self.role != "key_bias"

    def stored(self) -> dict[str, StoredTensor]:
        """Name -> tensor of the file, in file order."""
        if self.is_matrix:
            return MATRIX_KINDS[self.kind].stored(self)
        n = _n_panels(self) * PANEL_ROWS if self.alternating else self.shape[0]
        return {self.name: vector_tensor(n, _VECTOR_DTYPES[self.kind])}


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


class MatrixKind(NamedTuple):
    """A way to store a matrix."""

    description: str
    stored: Callable[[Weight], dict[str, StoredTensor]]


MATRIX_KINDS = {"int8_g64": MatrixKind("int8, Hadamard-transformed, groups of 64, f16 scales", _int8_g64)}


# ---------------------------------------------------------------------------- the inventory


def _vector(
    layer: int | None,
    role: str,
    parts: dict[str, int],
    use: Use = "tokens",
    alternating: bool = False,
    expert: int | None = None,
) -> Weight:
    name = role if expert is None else f"experts.{expert}.{role}"
    name = name if layer is None else f"layers.{layer}.{name}"
    n, named = sum(parts.values()), tuple(map(Part._make, parts.items()))
    return Weight(name, role, layer, (n,), named, "f32", use, alternating, expert)


def _matrix(
    c: FrozenConfig,
    layer: int | None,
    role: str,
    parts: dict[str, int],
    columns: int,
    use: Use = "tokens",
    alternating: bool = False,
    expert: int | None = None,
) -> Weight:
    name = role if expert is None else f"shared.{role}" if expert == c.n_experts else f"experts.{expert}.{role}"
    name = name if layer is None else f"layers.{layer}.{name}"
    kind = c.kind_of(role, layer)
    if kind not in MATRIX_KINDS:
        raise unknown(f"config: the matrix {name!r} is of the kind {kind!r}")
    shape = sum(parts.values()), columns
    return Weight(name, role, layer, shape, tuple(map(Part._make, parts.items())), kind, use, alternating, expert)


def _mlp(c: FrozenConfig, i: int, expert: int | None, hidden_dim: int, prefix: str = "") -> Iterator[Weight]:
    """One of a layer's MLPs; its parts' names begin with ``prefix``."""
    names = ["gate", "up"] if c.is_gated(i) else ["up"]
    role, gated = "w_gate_up" if c.is_gated(i) else "w_up", c.is_gated(i)
    parts = {prefix + name: hidden_dim for name in names}
    yield _matrix(c, i, role, parts, c.dim, alternating=gated, expert=expert)
    if c.gate_up_bias:
        biases = {f"{part}.bias": rows for part, rows in parts.items()}
        yield _vector(i, f"{role}.bias", biases, alternating=gated, expert=expert)
    yield _matrix(c, i, "w_down", {f"{prefix}down": c.dim}, hidden_dim, expert=expert)
    if c.down_bias:
        yield _vector(i, "w_down.bias", {"down.bias": c.dim}, expert=expert)


def _convolution(c: FrozenConfig, i: int) -> Iterator[Weight]:
    yield _matrix(c, i, "conv_in", {"conv_in": 3 * c.dim}, c.dim)
    yield _vector(i, "taps", {"taps": c.layers[i].window * c.dim})
    yield _matrix(c, i, "conv_out", {"conv_out": c.dim}, c.dim)


def _attention(c: FrozenConfig, i: int) -> Iterator[Weight]:
    qkv = {"q": c.q_dim, "k": c.kv_dim, "v": c.kv_dim}
    yield _matrix(c, i, "wqkv", qkv, c.dim)
    if c.qkv_bias:
        yield _vector(i, "wqkv.bias", {f"{part}.bias": rows for part, rows in qkv.items()})
    if c.key_bias:
        yield _vector(i, "key_bias", {"key_bias": c.kv_dim})
    if c.qk_norm:
        yield _vector(i, "q_norm", {"q_norm": c.q_dim if c.qk_norm_all_heads else c.head_dim})
        yield _vector(i, "k_norm", {"k_norm": c.kv_dim if c.qk_norm_all_heads else c.head_dim})
    if c.attention_sinks:
        yield _vector(i, "sinks", {"sinks": c.n_heads})
    yield _matrix(c, i, "wo", {"wo": c.dim}, c.q_dim)
    if c.o_bias:
        yield _vector(i, "wo.bias", {"wo.bias": c.dim})


def _layer(c: FrozenConfig, i: int) -> Iterator[Weight]:
    before, after = c.has_norms_before(i), c.has_norms_after(i)
    if before:
        yield _vector(i, "attention_norm", {"attention_norm": c.dim})
    yield from _convolution(c, i) if c.is_convolution(i) else _attention(c, i)
    if after:
        yield _vector(i, "post_attention_norm", {"post_attention_norm": c.dim})
    if c.has_ffn_norm(i):
        yield _vector(i, "ffn_norm", {"ffn_norm": c.dim})
    if c.layers[i].activation == XIELU:
        yield _vector(i, XIELU, {"xielu.above": 1, "xielu.below": 1, "xielu.slope": 1})
    if c.n_experts:
        yield _vector(i, "router", {"router": c.n_experts * c.dim})
    if c.router_bias:
        yield _vector(i, "router.bias", {"router.bias": c.n_experts})
    if c.shared_gated:
        yield _vector(i, "shared_router", {"shared_router": c.dim})
    for expert in range(c.n_experts) if c.n_experts else [None]:
        yield from _mlp(c, i, expert, c.hidden_dim)
    if c.shared_hidden_dim:
        yield from _mlp(c, i, c.n_experts, c.shared_hidden_dim, "shared_")
    if after:
        yield _vector(i, "post_ffn_norm", {"post_ffn_norm": c.dim})


# What makes a layer's queries, keys and values, or a convolution's inputs: of the last layer all that a token takes of which
# nothing is wanted.
_PROJECTION = frozenset({"attention_norm", "wqkv", "wqkv.bias", "key_bias", "q_norm", "k_norm", "conv_in"})


def _weights(c: FrozenConfig) -> Iterator[Weight]:
    embeddings = {"tok_embeddings": c.vocab_size}
    yield _matrix(c, None, "tok_embeddings", embeddings, c.dim, "logits" if c.tie_embeddings else "row")
    for i in range(c.n_layers):
        for weight in _layer(c, i):
            all_tokens = i + 1 < c.n_layers or weight.role in _PROJECTION
            yield weight if all_tokens else weight._replace(use="logits")
    yield _vector(None, "norm", {"norm": c.dim}, "logits")
    if not c.tie_embeddings:
        yield _matrix(c, None, "output", {"output": c.vocab_size}, c.dim, "logits")
    if c.output_bias:
        yield _vector(None, "output.bias", {"output.bias": c.vocab_size}, "logits")
    for i in range(c.n_rope_tables):
        yield _vector(None, f"rope.{i}.inv_freq", {"inv_freq": c.head_dim // 2})


def inventory(config: FrozenConfig) -> list[Weight]:
    """Every weight of such a model, in file order. UnsupportedModelError names the matrix whose kind is not known."""
    weights = list(_weights(config))
    matrices = {weight.role for weight in weights if weight.is_matrix}
    if strange := sorted(config.kinds.keys() - matrices - {"default"}):
        raise ModelFormatError(f"config: kinds names {strange[0]!r}, which is no matrix of this model")
    return weights


def draft_inventory(config: FrozenConfig) -> list[Weight]:
    """Every weight of the model's draft head, in the order in which a step reads them; none if it has no head."""
    head = config.draft_head
    if head is None:
        return []
    dim = config.dim

    def vector(role: str, n: int = dim, kind: str = "f32") -> Weight:
        return Weight(DRAFT_PREFIX + role, role, None, (n,), (Part(role, n),), kind, "tokens")

    def matrix(role: str, parts: dict[str, int], columns: int, alternating: bool = False) -> Weight:
        shape = sum(parts.values()), columns
        of_parts = tuple(map(Part._make, parts.items()))
        return Weight(DRAFT_PREFIX + role, role, None, shape, of_parts, DEFAULT_KIND, "tokens", alternating)

    return [
        vector("token_norm"),
        vector("state_norm"),
        matrix("w_in", {"w_in": dim}, 2 * dim),
        vector("mlp_norm"),
        matrix("w_gate_up", {"w_gate": head.hidden_dim, "w_up": head.hidden_dim}, dim, alternating=True),
        matrix("w_down", {"w_down": dim}, head.hidden_dim),
        vector("output_norm"),
        matrix("output", {"output": head.vocab_size}, dim),
        vector("vocab", head.vocab_size, "i32"),
    ]


def stored_tensors(config: FrozenConfig) -> dict[str, StoredTensor]:
    """Name -> stored tensor of every weight of such a model, in file order. Extra tensors and attachments follow them."""
    return {name: tensor for weight in inventory(config) for name, tensor in weight.stored().items()}


def stored_draft_tensors(config: FrozenConfig) -> dict[str, StoredTensor]:
    """The same of its draft head; none if it has no head."""
    return {name: tensor for weight in draft_inventory(config) for name, tensor in weight.stored().items()}


# ---------------------------------------------------------------------------- counting


def count_parameters(config: FrozenConfig) -> int:
    """Numbers that were trained, without padding; tied embeddings count once."""
    return sum(math.prod(weight.shape) for weight in inventory(config) if weight.is_parameter)


def count_macs(config: FrozenConfig, n_rows: int, n_logits: int) -> int:
    """Multiply-accumulates of the matrix products of one forward: n_rows tokens, logits for n_logits of them and nothing of
    the others, each token in as many experts as it takes. Attention is not counted, nor is the router."""
    times = {"row": 0, "tokens": n_rows, "logits": n_logits}
    some = {None, config.n_experts, *range(config.n_experts_used)}  # as many experts as are taken, and the shared one
    matrices = (weight for weight in inventory(config) if weight.is_matrix and weight.expert in some)
    return sum(times[weight.use] * math.prod(weight.shape) for weight in matrices)
