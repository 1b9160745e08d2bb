"""From a reader of named tensors to a ``SourceModel``: every weight of the inventory finds its place in the source, and is
folded on its way (arch/base.py)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from ..errors import InvalidArgumentError, ModelFormatError, UnsupportedModelError
from ..format.config import FOLDED_PARTS, KEY_BIAS, FrozenConfig
from ..format.inventory import Part, Weight, inventory
from ..format.quantize import Float32Array, RowSource
from .arch.base import Fold, Shape, SourceName, Traits
from .sources import (
    AlternatingPanels,
    Order,
    ReorderedHeads,
    ScaledRows,
    SlicedRows,
    SourceModel,
    StackedRows,
    half_split_order,
)

_ROTATED = ("q", "k", "q.bias", "k.bias", "key_bias")  # parts whose rows are heads that RoPE turns
_KEY_BIAS_SIDES = {"k.bias": 0, "key_bias": 1}  # parts that share k's bias, with their place in what split_key_bias returns
_NO_FOLD = Fold()

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
        "tie_embeddings": shape.tied,
        "layers": traits.layers,
        "qkv_bias": traits.qkv_bias,
        "o_bias": traits.o_bias,
        "qk_norm": traits.qk_norm,
        "qk_norm_all_heads": traits.qk_norm_all_heads,
        "attention_softcap": traits.attention_softcap,
        "logits_softcap": traits.logits_softcap,
        "n_experts": traits.n_experts,
        "n_experts_used": traits.n_experts_used,
        "experts_normalized": traits.experts_normalized,
        "requires": (KEY_BIAS,) if traits.qkv_bias and not traits.qk_norm else (),
    }


def folded_multipliers(traits: Traits) -> dict[str, Any]:
    """For ``extra``: what the rows of parts were multiplied by, for adapters, whose products need the same. Empty if nothing was.
    (A multiplier for each row is of fused matrices alone, which these adapters do not change.)"""
    scales = {part: traits.folds[part].scale for part in FOLDED_PARTS if part in traits.folds}
    folded = {part: scale for part, scale in scales.items() if isinstance(scale, float)}
    return {"folded": folded} if folded and len(folded) == len(scales) else {}


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
    ) -> None:
        self._reader, self._shapes = reader, reader.shapes
        self._parts, self._kind = parts, kind
        self._folds, self._config = folds, config
        self._interleaved = half_split_order(config.head_dim) if interleaved else None
        self.taken: set[str] = set()

    def _spelling(self, part: Part) -> str:
        spelling: str = getattr(self._parts[part.name], self._kind)
        return spelling

    def _tensor(self, weight: Weight, part: Part) -> tuple[str, int, int]:
        """(name of the source's tensor that holds ``part`` of ``weight``, the part's first row there, the tensor's rows)."""
        spelling = self._spelling(part)
        name = spelling.format(i=weight.layer, e=weight.expert)
        fused = [one for one in weight.parts if self._spelling(one) == spelling]
        rows = sum(one.rows for one in fused)
        begin = sum(one.rows for one in fused[: fused.index(part)])
        found, shape = self._shapes.get(name), (rows, *weight.shape[1:])
        if part.name == "router":  # a matrix there, a vector in the frozen file
            shape = (self._config.n_experts, self._config.dim)
        if weight.expert is not None and "{e}" not in spelling:
            shape = (self._config.n_experts, *shape)
            begin, rows = begin + weight.expert * rows, self._config.n_experts * rows
        if found is None:
            raise ModelFormatError(f"tensor {name!r} is missing")
        if found != shape:
            raise ModelFormatError(f"tensor {name!r} has shape {list(found)}, the configuration needs {list(shape)}")
        self.taken.add(name)
        return name, begin, rows

    def _order(self, part: Part, fold: Fold) -> Order | None:
        """Of a head's rows, by what the format of the source does to them and by what the architecture does."""
        if self._interleaved is None or part.name not in _ROTATED:
            return fold.order
        return self._interleaved if fold.order is None else self._interleaved[fold.order]

    def _rows(self, weight: Weight, part: Part) -> RowSource:
        name, begin, n_rows = self._tensor(weight, part)
        rows = self._reader.matrix(name)
        if n_rows != part.rows:
            rows = SlicedRows(rows, begin, part.rows)
        fold = self._folds.get(part.name, _NO_FOLD)
        if (order := self._order(part, fold)) is not None:
            rows = ReorderedHeads(rows, order)
        return rows if np.all(fold.scale == 1.0) else ScaledRows(rows, fold.scale)

    def matrix(self, weight: Weight) -> RowSource:
        rows = [self._rows(weight, part) for part in weight.parts]
        if weight.alternating:
            return AlternatingPanels(*rows)
        return rows[0] if len(rows) == 1 else StackedRows(rows)

    def _values(self, name: str, part: Part) -> Float32Array:
        fold = self._folds.get(part.name, _NO_FOLD)
        if part.name == "router":
            return self._reader.matrix(name).read_rows(0, self._config.n_experts).reshape(-1)
        values = self._reader.vector(name)
        if (order := self._order(part, fold)) is not None:
            values = values.reshape(-1, len(order))[:, order].reshape(-1)
        if fold.offset != 0.0 or not np.all(fold.scale == 1.0):
            scale = np.resize(fold.scale, len(values))
            with np.errstate(over="ignore", invalid="ignore"):  # the freezer refuses what is not finite
                values = ((values + np.float32(fold.offset)).astype(np.float64) * scale).astype(np.float32)
        if self._config.key_bias and part.name in _KEY_BIAS_SIDES:
            return split_key_bias(values, self._config.head_dim)[_KEY_BIAS_SIDES[part.name]]
        return values

    def vector(self, weight: Weight) -> Callable[[], Float32Array]:
        parts = [partial(self._values, self._tensor(weight, part)[0], part) for part in weight.parts]
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
    ignored: Collection[str] = (),
) -> SourceModel:
    """Map every tensor of ``reader`` to its frozen place.

    ``rope_tables`` are the frequencies of each RoPE table of the configuration, (head_dim / 2); ``kind`` is the column
    of ``parts`` ("hf" or "gguf"); ``interleaved`` says that q and k rows must be
    put back; ``ignored`` names tensors that were used elsewhere. A missing tensor or a wrong shape
    is a ModelFormatError, a tensor that no part takes an UnsupportedModelError.
    """
    model = SourceModel(name=name, source=source, config=config)
    tensors, tables = _Source(reader, parts, kind, folds or {}, config, interleaved), iter(rope_tables)
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
