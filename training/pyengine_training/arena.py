"""Flat, padded storage for parameters, gradients and moments.

One array holds every tensor, each starting on a 128-byte boundary and the whole padded to a
multiple of PAD elements, so that optimizers, norms, sums and later shards over ranks work on flat
slices, and nothing is allocated after the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig

ALIGN = 32  # elements
PAD = 1024

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Name -> shape of every parameter, in the order of the forward pass. Matrices are (out, in)."""
    c = config
    shapes: Shapes = {"tok_embeddings": (c.vocab_size, c.dim)}
    for i in range(c.n_layers):
        shapes[f"layers.{i}.attention_norm"] = (c.dim,)
        shapes[f"layers.{i}.wqkv"] = (c.q_dim + 2 * c.kv_dim, c.dim)
        if c.qk_norm:
            shapes[f"layers.{i}.q_norm"] = shapes[f"layers.{i}.k_norm"] = (c.head_dim,)
        shapes[f"layers.{i}.wo"] = (c.dim, c.q_dim)
        shapes[f"layers.{i}.ffn_norm"] = (c.dim,)
        shapes[f"layers.{i}.w_gate_up"] = (2 * c.hidden_dim, c.dim)
        shapes[f"layers.{i}.w_down"] = (c.dim, c.hidden_dim)
    shapes["norm"] = (c.dim,)
    if not c.tie_embeddings:
        shapes["output"] = (c.vocab_size, c.dim)
    return shapes


def touched_zeros(size: int, dtype: Any) -> NDArray[Any]:
    """Zeroed host memory, every page touched now: first touches are slow, and later would be in a step."""
    flat = np.empty(size, dtype)
    flat.fill(0)
    return flat


def layout_only(size: int, dtype: Any) -> NDArray[Any]:
    """One element seen everywhere: for an arena whose layout is wanted and not its memory."""
    return np.broadcast_to(np.zeros(1, dtype), (size,))


class Arena:
    """A flat array with named, shaped views: ``arena["layers.0.wo"]`` is a view into
    ``arena.flat``.
    """

    def __init__(self, shapes: Shapes, dtype: Any = np.float32, zeros: Callable[..., Any] = touched_zeros) -> None:
        self.shapes, self._zeros = shapes, zeros
        self.offsets: dict[str, int] = {}
        size = 0
        for name, shape in shapes.items():
            self.offsets[name] = size
            size += -(-math.prod(shape) // ALIGN) * ALIGN
        self.flat: NDArray[Any] = zeros(-(-size // PAD) * PAD, dtype)
        self.views = {name: self._view(name) for name in shapes}

    def _view(self, name: str) -> NDArray[Any]:
        start = self.offsets[name]
        shape = self.shapes[name]
        return self.flat[start : start + math.prod(shape)].reshape(shape)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.views[name]

    def like(self) -> Arena:
        """A zeroed arena of the same layout."""
        return Arena(self.shapes, self.flat.dtype, self._zeros)

    def copy(self) -> Arena:
        """An arena of the same layout and values."""
        other = self.like()
        other.flat[...] = self.flat
        return other


def initialize(params: Arena, config: ModelConfig, seed: int) -> None:
    """Normal weights of std 0.02 (embedding) and 0.5 / sqrt(inputs); outputs into the residual
    stream are scaled down by sqrt(2 n_layers); norms are 1. Each tensor draws from its own stream,
    so sizes elsewhere do not move it.
    """
    for index, (name, shape) in enumerate(params.shapes.items()):
        view = params[name]
        if len(shape) == 1:
            view.fill(1)
            continue
        std = 0.02 if name in ("tok_embeddings", "output") else 0.5 / math.sqrt(shape[1])
        if name.endswith(("wo", "w_down")):
            std /= math.sqrt(2 * config.n_layers)
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, index]))
        view[...] = generator.standard_normal(shape, dtype=np.float32) * np.float32(std)


def block_matrices(name: str, config: ModelConfig) -> list[tuple[int, int]]:
    """Row ranges of the matrices fused in a block parameter (q|k|v, gate|up), or the whole of it;
    [] for the rest.

    These are what Muon orthogonalizes, each apart.
    """
    if name.endswith("wqkv"):
        q, kv = config.q_dim, config.kv_dim
        return [(0, q), (q, q + kv), (q + kv, q + 2 * kv)]
    if name.endswith("w_gate_up"):
        return [(0, config.hidden_dim), (config.hidden_dim, 2 * config.hidden_dim)]
    if name.endswith("wo") or name.endswith("w_down"):
        return [(0, config.dim)]
    return []
