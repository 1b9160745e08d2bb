"""The optimizer's part of a step on a GPU: units of the flat arena, their moments, and the launches that update them.

A unit is what is launched together: the same matrix of several layers for Muon, a tensor or a slice of one for AdamW. Its moments
lie behind one another in two flat arrays, Muon's first one only. With a sharded optimizer every unit has one rank that keeps
and updates it; it makes the very launches that a rank alone would make, so that the bits are its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arena import ALIGN, Arena, block_matrices
from ..comm import Comm
from ..config import ModelConfig, TrainConfig
from ..model import Array
from ..ops import cuda as ops
from ..ops.cuda import adamw, muon
from ..ops.cuda._runtime import runtime
from ..ops.needs import allocate, largest
from ..ranks import Piece, owners

BATCH = 1 << 26  # elements that Muon works on at once: two copies of them are its working memory


@dataclass(frozen=True)
class Unit:
    """pieces: of the arena, alike where ``matrices`` says how many there are and where."""

    pieces: tuple[Piece, ...]
    matrices: muon.Matrices | None = None

    @property
    def shape(self) -> tuple[int, int] | None:
        """Of its matrices; None: AdamW's."""
        return self.pieces[0].shape

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def state(self) -> int:
        return sum(piece.state for piece in self.pieces)

    @property
    def work(self) -> float:
        return sum(piece.work for piece in self.pieces)


def muon_batches(arena: Arena, model: ModelConfig) -> list[muon.Matrices]:
    """All that Muon updates: the same matrix of every layer together, as many layers at once as BATCH elements hold."""
    found: dict[tuple[str, int, int], list[int]] = {}  # role, rows, columns -> where each layer's begins
    for name, shape in arena.shapes.items():
        for begin, end in block_matrices(name, model):
            role = f"{name.split('.')[-1]} {begin}"
            found.setdefault((role, end - begin, shape[1]), []).append(arena.offsets[name] + begin * shape[1])
    batches = []
    for (_, rows, cols), places in found.items():
        at_once = max(1, BATCH // (rows * cols))
        stride = places[1] - places[0] if len(places) > 1 else 0  # layers are alike
        for first in range(0, len(places), at_once):
            count = min(at_once, len(places) - first)
            batches.append(muon.Matrices(rows, cols, places[first], stride, count))
    return batches


def cut_units(arena: Arena, model: ModelConfig, config: TrainConfig, slice_size: int | None) -> list[Unit]:
    """All parameters; slice_size: elements of AdamW's units, whole tensors without one."""
    units = []
    if config.optimizer == "muon":
        for m in muon_batches(arena, model):
            starts = [m.first + i * m.stride for i in range(m.count)]
            units.append(Unit(tuple(Piece(start, start + m.n, (m.rows, m.cols), True) for start in starts), m))
    for name, shape in arena.shapes.items():
        if config.optimizer == "muon" and block_matrices(name, model):
            continue
        first, last = arena.offsets[name], arena.offsets[name] + int(np.prod(shape))
        for start in range(first, last, slice_size or last - first):
            stop = last if slice_size is None else min(last, start + slice_size)
            units.append(Unit((Piece(start, stop, None, len(shape) > 1),)))
    return units


class CudaOptimizer:
    """Moments of this rank's units, and their update from the knobs of :mod:`..ops.cuda.adamw`."""

    def __init__(
        self, arena: Arena, model: ModelConfig, config: TrainConfig, comm: Comm, products: Any, slice_size: int | None
    ) -> None:
        """products: type of Muon's; slice_size: elements of AdamW's units where ranks share the state, None: each has all."""
        self.config, self.comm, self.sharded = config, comm, slice_size is not None
        self.units = cut_units(arena, model, config, slice_size)
        self.ranks = owners(self.units, comm.size) if self.sharded else [comm.rank] * len(self.units)
        self.mine = [unit for unit, rank in zip(self.units, self.ranks, strict=True) if rank == comm.rank]
        self._m = self._storage(self.mine)
        self._v = self._storage([unit for unit in self.mine if unit.matrices is None])
        needs = [muon.batch_scratch(unit.matrices, products) for unit in self.mine if unit.matrices is not None]
        self._scratch = allocate(largest(*needs), ops.empty)

    @staticmethod
    def _storage(units: list[Unit]) -> dict[Unit, Array]:
        """One array, cut up, each part aligned."""
        ends = np.cumsum([-(-unit.size // ALIGN) * ALIGN for unit in units], dtype=int)
        flat = ops.zeros(int(ends[-1]) if units else 0, np.float32)
        starts = [0, *ends[:-1].tolist()]
        return {unit: flat[start : start + unit.size] for unit, start in zip(units, starts, strict=False)}

    def pieces(self, size: int) -> tuple[list[Piece], list[int]]:
        """All units in pieces of at most so many elements, and the rank of each: what ranks with a sharded optimizer exchange."""
        found, ranks = [], []
        for unit, rank in zip(self.units, self.ranks, strict=True):
            for whole in unit.pieces:
                cut = range(whole.start, whole.stop, size)
                found += [Piece(start, min(start + size, whole.stop), None, False) for start in cut]
                ranks += [rank] * len(cut)
        return found, ranks

    def launch(self, params: Array, grads: Array, knobs: Array) -> None:
        """Update this rank's units of flat params from flat grads."""
        c = self.config
        for unit in self.mine:
            if unit.matrices is not None:
                arrays = params, grads, self._m[unit]
                options: dict[str, Any] = {"momentum": c.muon_momentum, "weight_decay": c.weight_decay}
                muon.muon_update_by_knobs(*arrays, knobs, unit.matrices, scratch=self._scratch, **options)
                continue
            (piece,) = unit.pieces
            part = slice(piece.start, piece.stop)
            options = {"beta1": c.beta1, "beta2": c.beta2, "eps": c.eps}
            options["weight_decay"] = c.weight_decay if piece.decays else 0.0
            adamw.adamw_update_by_knobs(params[part], grads[part], self._m[unit], self._v[unit], knobs, **options)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, m: Array | None, v: Array | None) -> None:
        """Fill rank 0's flat host arrays; other ranks pass None."""
        for unit, rank in zip(self.units, self.ranks, strict=True):
            self._collect(unit, rank, self._m, m)
            if unit.matrices is None:
                self._collect(unit, rank, self._v, v)
            elif v is not None:
                for piece in unit.pieces:
                    v[piece.start : piece.stop] = 0

    def _collect(self, unit: Unit, rank: int, stored: dict[Unit, Array], out: Array | None) -> None:
        """out = the values of a unit that ``rank`` keeps, through the hosts."""
        host = self.comm.host
        if out is not None:
            values = runtime().download(stored[unit]) if rank == host.rank else np.empty(unit.size, np.float32)
            if rank != host.rank:
                host.exchange([], [(rank, values)])()
            for piece, part in zip(unit.pieces, _parts(unit, values), strict=True):
                out[piece.start : piece.stop] = part
        elif self.sharded and rank == host.rank:
            host.exchange([(0, runtime().download(stored[unit]))], [])()

    def load(self, m: Array, v: Array) -> None:
        """Take this rank's part of two flat host arrays."""
        for stored, source in ((self._m, m), (self._v, v)):
            for unit, values in stored.items():
                runtime().upload(np.concatenate([source[p.start : p.stop] for p in unit.pieces]), values)


def _parts(unit: Unit, values: Array) -> list[Array]:
    """Of the unit's pieces, which lie behind one another."""
    ends = np.cumsum([piece.size for piece in unit.pieces])
    return [values[end - piece.size : end] for piece, end in zip(unit.pieces, ends, strict=True)]
