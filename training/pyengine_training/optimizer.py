"""One optimizer step over pieces of the flat arena: Muon for the blocks' matrices, AdamW for embeddings, output layer
and norms.

Moments exist for the pieces that are updated here and for no others: all of them, or a rank's share. Muon has one moment,
AdamW two. Each piece's arithmetic is its own, so the bits depend neither on the number of threads nor on who owns it.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import TrainConfig
from .ops import cpu as ops
from .ops.cpu.grad_norm import BLOCK
from .ops.needs import allocate, largest
from .ranks import Piece
from .threads import run_all

Array = NDArray[Any]


def schedule(config: TrainConfig, step: int) -> float:
    """Factor on the learning rates at step (from 0): linear warmup, constant, then decay to (almost) zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if step < config.decay_start:
        return 1.0
    progress = (step - config.decay_start + 0.5) / max(1, config.decay_steps)
    if config.decay_shape == "cosine":
        return float(0.5 * (1 + np.cos(np.pi * progress)))
    return 1 - progress


class Optimizer:
    """Moments of ``pieces``, and the update of flat parameters from flat gradients."""

    def __init__(self, config: TrainConfig, pieces: Sequence[Piece], pool: ThreadPoolExecutor) -> None:
        self.config, self.pieces, self.pool = config, pieces, pool
        # by piece (its size,): mean of the gradient, and of its square, which Muon does not need
        self._m = self._storage(list(pieces))
        self._v = self._storage([piece for piece in pieces if piece.shape is None])
        self._scratch: queue.LifoQueue[dict[str, Array]] = queue.LifoQueue()  # one for each thread of the pool
        needs = [ops.muon_scratch(*piece.shape, np.float32) for piece in pieces if piece.shape]
        for _ in range(pool._max_workers if needs else 0):
            self._scratch.put(allocate(largest(*needs), ops.empty))

    @staticmethod
    def _storage(pieces: list[Piece]) -> dict[Piece, Array]:
        """One array, cut up; every page touched."""
        flat = ops.zeros((sum(piece.size for piece in pieces),), np.float32)
        ends = np.cumsum([piece.size for piece in pieces], dtype=int)
        return {piece: flat[end - piece.size : end] for piece, end in zip(pieces, ends, strict=True)}

    @property
    def state_bytes(self) -> int:
        """Memory of the moments."""
        return 4 * sum(piece.state for piece in self.pieces)

    def moments(self, piece: Piece) -> tuple[Array, Array]:
        """m and v of a piece, flat; v of a matrix that Muon updates is zero and is not kept."""
        return self._m[piece], self._v[piece] if piece in self._v else np.zeros(piece.size, np.float32)

    def load(self, m: Array, v: Array) -> None:
        """Take the pieces' moments from two flat arrays of the whole arena."""
        for stored, source in ((self._m, m), (self._v, v)):
            for piece, values in stored.items():
                values[...] = source[piece.start : piece.stop]

    def squares(self, grads: Array, pieces: Sequence[Piece]) -> dict[int, Array]:
        """By a piece's start: float64 sums of its squares over blocks of BLOCK elements, as the norm adds them up."""
        result = {piece.start: np.empty(-(-piece.size // BLOCK)) for piece in pieces}

        def task(piece: Piece) -> Callable[[], object]:
            return lambda: ops.sum_of_squares(result[piece.start], grads[piece.start : piece.stop], BLOCK)

        run_all(self.pool, [task(piece) for piece in pieces])
        return result

    def step(self, params: Array, grads: Array, step: int, factor: float, norm: float) -> None:
        """Update the pieces of flat params in place at step (from 0); norm: of all gradients; factor: the schedule's."""
        scale = ops.clip_coefficient(norm, self.config.clip)
        make = (self._adamw, self._muon)
        run_all(self.pool, [make[p.shape is not None](p, params, grads, step, factor, scale) for p in self.pieces])

    def _muon(
        self, piece: Piece, params: Array, grads: Array, step: int, factor: float, scale: float
    ) -> Callable[[], object]:
        c, shape = self.config, piece.shape
        assert shape is not None
        part = slice(piece.start, piece.stop)
        arrays = [a.reshape(shape) for a in (params[part], grads[part], self._m[piece])]
        options = {"momentum": c.muon_momentum, "weight_decay": c.weight_decay, "grad_scale": scale}

        def update() -> None:
            scratch = self._scratch.get()
            try:
                ops.muon_update(*arrays, lr=c.muon_lr * factor, scratch=scratch, **options)
            finally:
                self._scratch.put(scratch)

        return update

    def _adamw(
        self, piece: Piece, params: Array, grads: Array, step: int, factor: float, scale: float
    ) -> Callable[[], object]:
        c = self.config
        part = slice(piece.start, piece.stop)
        arrays = params[part], grads[part], self._m[piece], self._v[piece]
        options = {"beta1": c.beta1, "beta2": c.beta2, "eps": c.eps, "grad_scale": scale}
        options["weight_decay"] = c.weight_decay if piece.decays else 0.0
        return lambda: ops.adamw_update(*arrays, step=step + 1, lr=c.lr * factor, **options)


def norm_of(squares: dict[int, Array]) -> float:
    """The gradient's norm: all pieces' sums in the arena's order."""
    return float(np.sqrt(np.concatenate([squares[start] for start in sorted(squares)]).sum()))
