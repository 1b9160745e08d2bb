"""From a reader of named tensors to a ``SourceModel``: every weight of the inventory finds its place in the source, and is
folded on its way (arch/base.py)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError, ModelFormatError, UnsupportedModelError
from ..format.config import FOLDED_PARTS, KEY_BIAS, FrozenConfig
from ..format.inventory import Part, Weight, inventory
from ..format.quantize import Float32Array, RowSource
from .arch.base import Float64Array, Fold, Shape, SourceName, Traits
from .sources import (
    AlternatingPanels,
    CenteredColumns,
    CenteredRows,
    LastMatrix,
    NormedRows,
    Order,
    PickedRows,
    ReorderedHeads,
    ScaledColumns,
    ScaledRows,
    SlicedRows,
    SourceModel,
    StackedRows,
    TransposedRows,
    alternating_panels,
    half_split_order,
    row_blocks,
)

_ROTATED = ("q", "k", "q.bias", "k.bias", "key_bias")  # parts whose rows are heads that RoPE turns
_KEY_BIAS_SIDES = {"k.bias": 0, "key_bias": 1}  # parts that share k's bias, with their place in what split_key_bias returns
_NO_FOLD = Fold()
_AS_VECTORS = ("router", "shared_router", "taps")  # matrices of a source, vectors in the frozen file

LARGE_KEY_BIAS = 4.0  # a pair with a bias this large is kept out of the cache (docs/performance.md)


def checked_n_ctx(n_ctx: int | None, context: int) -> int | None:
    """The positions that are asked for, of a checkpoint for ``context``. InvalidArgumentError if it has fewer."""
    if n_ctx is not None and n_ctx > context:
        raise InvalidArgumentError(f"n_ctx is {n_ctx}, but the model is made for {context} positions")
    return n_ctx


def frozen_fields(shape: Shape, traits: Traits) -> dict[str, Any]:
    """What the two say of a FrozenConfig."""
    max_seq_len = traits.max_seq_len or shape.n_ctx or shape.context
    return {
        "dim": shape.dim,
        "n_layers": shape.n_layers,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "max_seq_len": max_seq_len,
        "tie_embeddings": shape.tied and not traits.is_untied,
        "layers": traits.layers,
        "qkv_bias": traits.qkv_bias,
        "o_bias": traits.o_bias,
        "qk_norm": traits.qk_norm,
        "qk_norm_all_heads": traits.qk_norm_all_heads,
        "qk_norm_after_rope": traits.qk_norm_after_rope,
        "attention_softcap": traits.attention_softcap,
        "logits_softcap": traits.logits_softcap,
        "n_experts": traits.n_experts,
        "n_experts_used": traits.n_experts_used,
        "experts_normalized": traits.experts_normalized,
        "shared_hidden_dim": traits.shared_hidden_dim,
        "shared_gated": traits.shared_gated,
        "gate_up_bias": traits.gate_up_bias,
        "down_bias": traits.down_bias,
        "output_bias": traits.output_bias,
        "attention_sinks": traits.attention_sinks,
        "router_bias": traits.router_bias,
        "requires": (KEY_BIAS,) if traits.qkv_bias and not traits.qk_norm else (),
    }


def folded_multipliers(traits: Traits) -> dict[str, Any]:
    """For ``extra``: what the rows of parts were multiplied by, for adapters, whose products need the same. Empty if nothing was;
    False where more was done to them, so that adapters can only be merged."""
    folds = {part: traits.folds[part] for part in FOLDED_PARTS if part in traits.folds}
    folds = {part: fold for part, fold in folds.items() if fold.pieces == 1 and not fold.is_transposed}
    scales: dict[str, Any] = {part: fold.scale for part, fold in folds.items()}
    queries = [traits.query_scale(i) for i in range(len(traits.layers))]
    if not traits.qk_norm and any(one is not queries[0] and not np.array_equal(one, queries[0]) for one in queries):
        return {"folded": False}
    if not traits.qk_norm and not np.all(queries[0] == 1.0):
        scales["q"] = scales.get("q", 1.0) * queries[0]
    if any(fold.order is not None or fold.center or fold.gain for fold in folds.values()):
        return {"folded": False}
    if not all(isinstance(scale, float) for scale in scales.values()):
        return {"folded": False}
    return {"folded": scales} if scales else {}


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


class _Place(NamedTuple):
    """A part in a tensor of the source: its rows, or its values of all of the tensor's, and how many there are."""

    name: str
    where: slice | npt.NDArray[np.intp]
    n: int


class _Source:
    """A reader's tensors by part: checks shapes, remembers what was taken, and folds."""

    def __init__(
        self,
        reader: TensorReader,
        parts: Mapping[str, SourceName],
        kind: str,
        folds: Mapping[str, Fold],
        config: FrozenConfig,
        interleaved: bool,
        query_scales: Sequence[float | Float64Array],
    ) -> None:
        self._reader, self._shapes = reader, reader.shapes
        self._parts, self._kind = parts, kind
        self._folds, self._config = folds, config
        self._queries = ("q_norm",) if config.qk_norm else ("q", "q.bias")
        self._query_scales = query_scales
        self._interleaved = half_split_order(config.head_dim) if interleaved else None
        weights = (weight for weight in inventory(config) if weight.expert is None)
        self._weights = {(weight.layer, part.name): (weight, part) for weight in weights for part in weight.parts}
        self._last_transposed = LastMatrix()
        self.taken: set[str] = set()

    def _spelling(self, part: Part) -> str:
        spelling: str = getattr(self._parts[part.name], self._kind)
        return spelling

    def _place(self, weight: Weight, part: Part) -> _Place:
        """Where ``part`` of ``weight`` lies."""
        spelling = self._spelling(part)
        name = spelling.format(i=weight.layer, e=weight.expert)
        fused = [one for one in weight.parts if self._spelling(one) == spelling]
        rows, base = sum(one.rows for one in fused), 0
        begin = sum(one.rows for one in fused[: fused.index(part)])
        found, shape = self._shapes.get(name), (rows, *weight.shape[1:])
        found = (1,) if found == () else found  # a number by itself
        if part.name in _AS_VECTORS:
            n = part.rows // self._config.dim
            if found is not None and len(found) == 3 and found[1] == 1:  # a depthwise convolution: one input a channel
                found = found[0], found[2]
            shape = (n, self._config.dim) if n > 1 or found != (self._config.dim,) else (self._config.dim,)
        fold, n_tensor = self._fold(weight, part), rows
        shape = shape[::-1] if fold.is_transposed else shape
        if weight.expert is not None and weight.expert < self._config.n_experts and "{e}" not in spelling:
            shape = (self._config.n_experts, *shape)
            base, n_tensor = weight.expert * rows, self._config.n_experts * rows
        if found is None:
            raise ModelFormatError(f"tensor {name!r} is missing")
        if found != shape:
            raise ModelFormatError(f"tensor {name!r} has shape {list(found)}, the configuration needs {list(shape)}")
        self.taken.add(name)
        pieces = fold.pieces
        if pieces == 1:
            return _Place(name, slice(base + begin, base + begin + part.rows), n_tensor)
        of_piece = np.arange(base, base + rows).reshape(pieces, -1)
        return _Place(name, of_piece[:, begin // pieces : (begin + part.rows) // pieces].reshape(-1), n_tensor)

    def _order(self, part: Part, fold: Fold) -> Order | None:
        """Of a head's rows, by what the format of the source does to them and by what the architecture does."""
        if self._interleaved is None or part.name not in _ROTATED:
            return fold.order
        return self._interleaved if fold.order is None else self._interleaved[fold.order]

    def _fold(self, weight: Weight, part: Part) -> Fold:
        fold = self._folds.get(part.name, _NO_FOLD)
        if weight.layer is None or part.name not in self._queries or not self._query_scales:
            return fold
        return fold._replace(scale=fold.scale * self._query_scales[weight.layer])

    def _unfolded(self, weight: Weight, part: Part) -> RowSource:
        name, where, n_rows = self._place(weight, part)
        rows = self._reader.matrix(name)
        if self._fold(weight, part).is_transposed:
            rows = TransposedRows(rows, weight.shape[1], self._last_transposed)
        if not isinstance(where, slice):
            return PickedRows(rows, where)
        return rows if n_rows == part.rows else SlicedRows(rows, where.start, part.rows)

    def _rows(self, weight: Weight, part: Part) -> RowSource:
        rows = self._unfolded(weight, part)
        fold = self._fold(weight, part)
        if (order := self._order(part, fold)) is not None:
            rows = ReorderedHeads(rows, order)
        if not np.all(fold.scale == 1.0):
            rows = ScaledRows(rows, fold.scale)
        if fold.gain is not None:
            rows = ScaledColumns(rows, self._alone(weight, fold.gain, weight.shape[1]))
        if fold.row_norm_eps is not None:
            rows = NormedRows(rows, fold.row_norm_eps)
        if fold.center:
            rows = CenteredRows(rows) if fold.center == "rows" else CenteredColumns(rows)
        return rows

    def matrix(self, weight: Weight) -> RowSource:
        rows = [self._rows(weight, part) for part in weight.parts]
        if weight.alternating:
            return AlternatingPanels(*rows)
        return rows[0] if len(rows) == 1 else StackedRows(rows)

    def _own(self, weight: Weight, part: Part, fold: Fold) -> Callable[[], Float32Array]:
        """A part of a vector as the source has it, (part.rows)."""
        if fold.is_absent:
            return lambda: np.zeros(part.rows, np.float32)
        if part.name == "key_bias":  # a share of what the source has as k's
            weight, part = self._weights[weight.layer, "k.bias"]
        name, where, _ = self._place(weight, part)
        if fold.is_transposed:
            return lambda: self._flat(name).reshape(self._config.dim, -1).T.reshape(-1)
        return lambda: self._flat(name)[where]

    def _flat(self, name: str) -> Float32Array:
        """All values of a tensor, one after the other."""
        if len(self._shapes[name]) == 1:
            return self._reader.vector(name)
        matrix = self._reader.matrix(name)
        return matrix.read_rows(0, matrix.rows).reshape(-1)

    def _alone(self, weight: Weight, name: str, n: int) -> Callable[[], Float32Array]:
        """A vector of the weight's layer that is folded into the weight and has no place of its own, (n)."""
        part = Part(name, n)
        return self._own(weight._replace(shape=(n,), parts=(part,)), part, _NO_FOLD)

    def _through_matrix(self, weight: Weight, part: Part, norm_bias: str) -> Callable[[], Float64Array]:
        """What the bias of the norm before it becomes in a matrix: of a bias "q.bias", rows of q times it, in float64."""
        of = "k" if part.name == "key_bias" else part.name.removesuffix(".bias")
        rows = self._unfolded(*self._weights[weight.layer, of])
        bias = self._alone(weight, norm_bias, self._config.dim)

        def product() -> Float64Array:
            x = bias().astype(np.float64)
            return np.concatenate([block.astype(np.float64) @ x for _, block in row_blocks(rows)])

        return product

    def _values(self, weight: Weight, part: Part) -> Callable[[], Float32Array]:
        """A part of a vector as the frozen file has it, (part.rows)."""
        fold = self._fold(weight, part)
        own = self._own(weight, part, fold)
        added = None if fold.norm_bias is None else self._through_matrix(weight, part, fold.norm_bias)
        plus = None if fold.plus is None else self._alone(weight, fold.plus, part.rows)

        def folded() -> Float32Array:
            values: npt.NDArray[np.floating[Any]] = own()
            with np.errstate(over="ignore", invalid="ignore"):  # the freezer refuses what is not finite
                values = values if added is None else values + added()
                if (order := self._order(part, fold)) is not None:
                    values = values.reshape(-1, len(order))[:, order].reshape(-1)
                if fold.is_softplus:
                    values = np.logaddexp(0.0, values.astype(np.float64))
                if plus is not None:
                    values = values + plus()
                if fold.offset != 0.0:
                    values = values + np.float32(fold.offset)
                if not np.all(fold.scale == 1.0):
                    values = values.astype(np.float64) * np.resize(fold.scale, len(values))
                if fold.center:
                    values = values - np.mean(values, dtype=np.float64)
                values = values.astype(np.float32, copy=False)
            if self._config.key_bias and part.name in _KEY_BIAS_SIDES:
                return split_key_bias(values, self._config.head_dim)[_KEY_BIAS_SIDES[part.name]]
            return values

        return folded

    def vector(self, weight: Weight) -> Callable[[], Float32Array]:
        parts = [self._values(weight, part) for part in weight.parts]
        if weight.alternating:
            return lambda: alternating_panels(*(part() for part in parts))
        return parts[0] if len(parts) == 1 else lambda: np.concatenate([part() for part in parts])


def build_model(
    reader: TensorReader,
    config: FrozenConfig,
    rope_tables: Sequence[Float32Array],
    *,
    parts: Mapping[str, SourceName],
    kind: str,
    name: str,
    source: str,
    interleaved: bool,
    folds: Mapping[str, Fold] | None = None,
    query_scales: Sequence[float | Float64Array] = (),
    ignored: Collection[str] = (),
) -> SourceModel:
    """Map every tensor of ``reader`` to its frozen place.

    ``rope_tables`` are the frequencies of each RoPE table of the configuration, (head_dim / 2); ``kind`` is the column
    of ``parts`` ("hf" or "gguf"); ``interleaved`` says that q and k rows must be put back; ``query_scales`` (n_layers, or none)
    are ``Traits.query_scale`` of each layer; ``ignored`` names tensors that were used elsewhere. A missing tensor or a wrong
    shape is a ModelFormatError, a tensor that no part takes an UnsupportedModelError.
    """
    model = SourceModel(name=name, source=source, config=config)
    tensors, tables = _Source(reader, parts, kind, folds or {}, config, interleaved, query_scales), iter(rope_tables)
    for weight in inventory(config):
        if weight.role.startswith("rope."):
            model.vectors[weight.name] = partial(np.asarray, next(tables))
        elif weight.is_matrix:
            model.matrices[weight.name] = tensors.matrix(weight)
        else:
            model.vectors[weight.name] = tensors.vector(weight)
    if unknown := sorted(set(reader.shapes) - tensors.taken - set(ignored)):
        raise UnsupportedModelError(
            f"tensor {unknown[0]!r} has no place in {config.architecture} with this configuration"
        )
    return model
