"""What several ranks add up and share, in an order that does not depend on how many there are.

The gradient of a batch is the sum over its shards by one fixed binary tree, ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)),
wherever the shards were computed. Shards and ranks are powers of two and a rank has consecutive shards, so a rank's own
sum is a subtree (:class:`ShardSum`), and the ranks' sums are the tree's upper levels (:func:`reduce_pieces`).

The flat arena is cut into pieces, what the optimizer updates as a whole: a matrix of Muon's, a slice of AdamW's. Each
piece has an owner. A reduction sends every rank's part of a piece to its owner, who adds the parts; the owners then send
out either the sums (and every rank updates everything) or, when the optimizer is sharded, the updated parameters. Either
way each rank sends and receives about twice the arena, as a ring would.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .arena import Arena, block_matrices
from .comm import Comm, Message
from .config import ModelConfig, TrainConfig
from .errors import ConfigError
from .threads import run_all

Array = NDArray[Any]
SLICE = 1 << 18  # elements of one of AdamW's pieces, and of what one task adds up


# ---- pieces ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of the flat arena. shape: of a matrix that Muon updates; None: AdamW's."""

    start: int
    stop: int
    shape: tuple[int, int] | None
    decays: bool  # matrices are pulled towards zero, norms are not

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def state(self) -> int:
        """Elements of the optimizer's state: Muon has one moment, AdamW two."""
        return self.size * (1 if self.shape else 2)

    @property
    def work(self) -> float:
        """Multiply-adds of an orthogonalization, roughly; 0 for AdamW."""
        if self.shape is None:
            return 0.0
        side = min(self.shape)
        return 5.0 * (2 * self.size * side + side**3)


def cut(params: Arena, model: ModelConfig, config: TrainConfig) -> list[Piece]:
    """All parameters, in the arena's order."""
    pieces = []
    for name, shape in params.shapes.items():
        first = params.offsets[name]
        ranges = block_matrices(name, model) if config.optimizer == "muon" else []
        for begin, end in ranges:
            start, stop = first + begin * shape[1], first + end * shape[1]
            pieces.append(Piece(start, stop, (end - begin, shape[1]), True))
        if not ranges:
            last = first + int(np.prod(shape))
            for start in range(first, last, SLICE):
                pieces.append(Piece(start, min(last, start + SLICE), None, len(shape) > 1))
    return pieces


def slices(total: int, size: int) -> list[Piece]:
    """A flat array of ``total`` elements in equal pieces, where what the optimizer updates together does not matter."""
    return [Piece(start, min(start + size, total), None, False) for start in range(0, total, size)]


class Owned(Protocol):
    """What one rank has: a piece, or several that are updated together."""

    @property
    def shape(self) -> tuple[int, int] | None: ...

    @property
    def size(self) -> int: ...

    @property
    def state(self) -> int: ...

    @property
    def work(self) -> float: ...


def owners(pieces: Sequence[Owned], size: int) -> list[int]:
    """The rank of each piece: Muon's matrices balanced by work, then AdamW's slices by what state a rank has."""
    result = [0] * len(pieces)
    work, state = [0.0] * size, [0] * size
    for matrices in (True, False):
        chosen = [i for i, piece in enumerate(pieces) if (piece.shape is not None) == matrices]
        for index in sorted(chosen, key=lambda i: (-pieces[i].work, -pieces[i].size, i)):
            rank = min(range(size), key=lambda r: (work[r], state[r], r) if matrices else (state[r], r))
            result[index] = rank
            work[rank] += pieces[index].work
            state[rank] += pieces[index].state
    return result


def check_ranks(size: int, config: TrainConfig) -> None:
    """Raise ConfigError unless so many ranks can share the batch."""
    message = ""
    if size & (size - 1):
        message = f"{size} ranks: it must be a power of two, for the sum over shards is a binary tree"
    elif size > config.shards:
        message = f"{size} ranks and {config.shards} shards: give --shards {size} or more, or start fewer ranks"
    if message:
        error = ConfigError(message)
        error.on_all_ranks = True
        raise error


# ---- sums --------------------------------------------------------------------------------------------------------


class ShardSum:
    """The sum of ``count`` shards' gradients by the tree, taken in as waves of shards are done.

    A binary counter: shard i ends as many subtrees as it has trailing ones, and their sums are added to it; what
    remains is kept at that level until its neighbour comes. Within a wave it stays where it is.
    """

    def __init__(self, total: Array, count: int, pool: ThreadPoolExecutor) -> None:
        self.total, self.count, self.pool = total, count, pool
        self._levels: list[Array] = []

    def add(self, first: int, wave: Sequence[Array]) -> None:
        """Gradients of the shards first, first + 1, …; they are overwritten. The last shard leaves the sum in total."""
        kept: list[tuple[int, int]] = []  # (shard, level) whose sum outlives the wave
        for shard in range(first, first + len(wave)):
            level = trailing_ones(shard)
            if shard + (1 << level) >= first + len(wave) and shard + 1 < self.count:
                kept.append((shard, level))
        while kept and len(self._levels) <= max(level for _, level in kept):
            self._levels.append(np.empty_like(self.total))
        tasks = [self._slice(first, wave, start) for start in range(0, self.total.size, SLICE)]
        run_all(self.pool, tasks)

    def _slice(self, first: int, wave: Sequence[Array], start: int) -> Callable[[], None]:
        part = slice(start, start + SLICE)

        def run() -> None:
            at_level: dict[int, Array] = {}
            for shard, gradient in enumerate(wave, first):
                sum_of = gradient[part]
                level = trailing_ones(shard)
                for below in range(level):
                    sum_of += at_level.pop(below) if below in at_level else self._levels[below][part]
                if shard + 1 == self.count:
                    self.total[part] = sum_of
                elif shard + (1 << level) < first + len(wave):
                    at_level[level] = sum_of
                else:
                    self._levels[level][part] = sum_of

        return run


def trailing_ones(n: int) -> int:
    """Of n in binary: how many subtrees shard n completes."""
    return (~n & (n + 1)).bit_length() - 1


Add = Callable[[Array, Array], object]  # first += second


def add_tree(parts: Sequence[Array], into: Array, add: Add) -> None:
    """``into``, one of the parts, = their sum by the binary tree; the others are overwritten. A power of two of them.

    Which of two takes the sum does not change it, and so a rank's own part can.
    """
    while len(parts) > 1:
        pairs = [(b, a) if b is into else (a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        for sum_of, other in pairs:
            add(sum_of, other)
        parts = [sum_of for sum_of, _ in pairs]


class Exchange:
    """Reduction and distribution of pieces of flat arrays between their owners and everybody.

    ranks: the owner of each piece, where it matters. empty, add: of the arrays' device.
    """

    def __init__(
        self,
        comm: Comm,
        pieces: Sequence[Piece],
        ranks: Sequence[int] | None = None,
        *,
        empty: Callable[..., Array] = np.empty,
        add: Add = operator.iadd,
    ) -> None:
        self.comm, self.pieces, self._add = comm, pieces, add
        ranks = owners(pieces, comm.size) if ranks is None else ranks
        self.owned = [[p for p, rank in zip(pieces, ranks, strict=True) if rank == r] for r in range(comm.size)]
        self.mine = self.owned[comm.rank]
        self._others = [rank for rank in range(comm.size) if rank != comm.rank]
        largest = max((piece.size for piece in self.mine), default=0)
        shape = (2, len(self._others), largest) if self._others else (0, 0, 0)
        self._received = empty(shape, np.float32)  # two rounds' parts of the other ranks

    @property
    def _rounds(self) -> range:
        return range(max(len(owned) for owned in self.owned) if self._others else 0)

    def _start(self, flat: Array, number: int) -> Callable[[], None]:
        """Send this rank's parts of every owner's piece of the round; receive the others' of its own."""
        sends: list[Message] = []
        for rank in self._others:
            if number < len(self.owned[rank]):
                piece = self.owned[rank][number]
                sends.append((rank, flat[piece.start : piece.stop]))
        receives: list[Message] = []
        if number < len(self.mine):
            size = self.mine[number].size
            buffers = self._received[number % 2]
            receives = [(rank, buffer[:size]) for rank, buffer in zip(self._others, buffers, strict=True)]
        return self.comm.exchange(sends, receives)

    def reduce(self, flat: Array) -> None:
        """flat's pieces of this rank = the sum of all ranks' by the tree; the others' are then undefined.

        While a round is added up, the next one travels.
        """
        waits = {0: self._start(flat, 0)} if self._rounds else {}
        for number in self._rounds:
            if number + 1 in self._rounds:
                waits[number + 1] = self._start(flat, number + 1)
            waits.pop(number)()
            if number < len(self.mine):
                piece = self.mine[number]
                own = flat[piece.start : piece.stop]
                parts = [buffer[: piece.size] for buffer in self._received[number % 2]]
                parts.insert(self.comm.rank, own)
                add_tree(parts, own, self._add)

    def distribute(self, flat: Array) -> None:
        """Every owner's pieces of flat, on every rank."""
        pending: list[Callable[[], None]] = []
        for number in self._rounds:
            sends: list[Message] = []
            if number < len(self.mine):
                piece = self.mine[number]
                sends = [(rank, flat[piece.start : piece.stop]) for rank in self._others]
            receives: list[Message] = []
            for rank in self._others:
                if number < len(self.owned[rank]):
                    piece = self.owned[rank][number]
                    receives.append((rank, flat[piece.start : piece.stop]))
            pending.append(self.comm.exchange(sends, receives))
            if len(pending) > 4:
                pending.pop(0)()
        for wait in pending:
            wait()

    def collect(self, values: Callable[[Piece], Array], out: Array | None) -> None:
        """Rank 0's ``out`` (flat) = each owner's values of its pieces; the other ranks pass None."""
        for rank, owned in enumerate(self.owned):
            for piece in owned:
                if rank == 0 and self.comm.rank == 0 and out is not None:
                    out[piece.start : piece.stop] = values(piece)
                elif self.comm.rank == rank:
                    self.comm.exchange([(0, np.ascontiguousarray(values(piece)))], [])()
                elif self.comm.rank == 0 and out is not None:
                    part = np.empty(piece.size, np.float32)
                    self.comm.exchange([], [(rank, part)])()
                    out[piece.start : piece.stop] = part
