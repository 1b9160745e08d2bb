"""Rows of seq_len + 1 tokens out of documents, each row starting at a document's start.

Documents longer than seq_len are cut into pieces that count as documents of their own. An epoch shows every piece whole,
once, in one of two ways:

restart    pieces in random order, one behind another; the piece that a row's end cuts starts the next row again, so its
           beginning is read twice
best-fit   a row begins with a random piece and goes on with the longest that still fits, again and again; only what then
           remains is filled with the beginning of a piece that has its turn later. Almost nothing is read twice

Row r is a pure function of (seed, r).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError

if TYPE_CHECKING:
    from .data import Split

Array = NDArray[Any]


class _Restart:
    """An epoch's rows: the order of the pieces, and the first piece of each row.

    length (pieces,): tokens of each;  width: tokens of a row;  order (pieces,): a random permutation of the pieces
    """

    def __init__(self, length: Array, width: int, order: Array) -> None:
        ends = np.cumsum(length[order])
        rows, piece, total = [], 0, int(ends[-1])
        while piece < len(order):
            rows.append(piece)
            begin = int(ends[piece - 1]) if piece else 0
            if begin + width > total:
                break  # the last row is filled up from the beginning of the order
            last = int(np.searchsorted(ends, begin + width))
            piece = last if ends[last] > begin + width else last + 1
        self._length, self._width, self._order, self._rows = length, width, order, np.asarray(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def parts(self, row: int) -> Iterator[tuple[int, int]]:
        """(piece, its tokens in the row), in order."""
        position, left = int(self._rows[row]), self._width
        while left:
            piece = int(self._order[position % len(self._order)])
            count = min(int(self._length[piece]), left)
            yield piece, count
            left -= count
            position += 1


class _BestFit:
    """An epoch's rows: which pieces, and how many tokens of each.

    As _Restart; shuffle (pieces,): random numbers, whose order is that of the rows. Row i of the filling is entries
    _begin[i] .. _end[i] of _pieces and _counts (entries,), and has place _rows.index(i) in the epoch.
    """

    def __init__(self, length: Array, width: int, order: Array, shuffle: Array) -> None:
        waiting: list[deque[int]] = [deque() for _ in range(width + 1)]  # pieces by length, in the order
        for piece in order.tolist():
            waiting[length[piece]].append(piece)
        lengths = sum(1 << n for n, pieces in enumerate(waiting) if pieces)  # bit n: some piece has n tokens
        used = np.zeros(len(length), bool)
        pieces: list[int] = []
        counts: list[int] = []
        rows = [0]

        def take(piece: int, n: int) -> int:
            nonlocal lengths
            used[piece] = True
            pieces.append(piece)
            counts.append(n)
            if not waiting[n]:
                lengths &= ~(1 << n)
            return n

        for first in order.tolist():
            if used[first]:
                continue
            n = int(length[first])
            waiting[n].popleft()  # the first of its length that is not used; rows are filled from the other end
            left = width - take(first, n)
            while left:
                fitting = lengths & ((2 << left) - 1)
                if not fitting:
                    break
                n = fitting.bit_length() - 1
                left -= take(waiting[n].pop(), n)
            if left:  # the beginning of the shortest that is still waiting; at the end of all, of one seen before
                n = (lengths & -lengths).bit_length() - 1
                while left:
                    piece = waiting[n][0] if lengths else int(order[len(rows) % len(order)])
                    count = min(left, int(length[piece]))
                    pieces.append(piece)
                    counts.append(count)
                    left -= count
            rows.append(len(pieces))
        self._pieces, self._counts = np.asarray(pieces, np.int64), np.asarray(counts, np.int64)
        self._begin, self._end = np.asarray(rows[:-1]), np.asarray(rows[1:])
        self._rows = np.argsort(shuffle[: len(self._begin)], kind="stable")  # late rows have the long pieces

    def __len__(self) -> int:
        return len(self._rows)

    def parts(self, row: int) -> Iterator[tuple[int, int]]:
        """(piece, its tokens in the row), in order."""
        index = self._rows[row]
        part = slice(self._begin[index], self._end[index])
        return zip(self._pieces[part].tolist(), self._counts[part].tolist(), strict=True)


class RowPacker:
    """The rows of one split, epoch after epoch."""

    def __init__(self, split: Split, seq_len: int, seed: int, eos: int | None = None, packing: str = "restart") -> None:
        if split.n_tokens < seq_len + 1:
            raise DataError(
                f"the training text has {split.n_tokens} tokens, fewer than one sequence of "
                f"{seq_len} + 1: give more text or a smaller seq_len"
            )
        self.split, self.width, self.seed, self.eos, self.packing = split, seq_len + 1, seed, eos, packing
        pieces = -(-split.length // seq_len)
        # of each piece (pieces,): its document, where it begins in it, where in the whole split, and how many tokens it has
        self.document = np.repeat(np.arange(len(split.length)), pieces)
        first = np.repeat(np.cumsum(pieces) - pieces, pieces)
        self.offset = (np.arange(len(self.document)) - first) * seq_len
        self.place = (np.cumsum(split.length) - split.length)[self.document] + self.offset
        self.length = np.minimum(split.length[self.document] - self.offset, seq_len)
        self.first_row = [0]  # of each epoch
        self.epochs: dict[int, _Restart | _BestFit] = {}
        self._ended = False

    def _epoch(self, epoch: int) -> _Restart | _BestFit:
        if epoch not in self.epochs:
            generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 1, epoch]))
            order = generator.permutation(len(self.length))
            if len(self.epochs) > 1:
                self.epochs.pop(min(self.epochs))
            if self.packing == "restart":
                self.epochs[epoch] = _Restart(self.length, self.width, order)
            else:
                self.epochs[epoch] = _BestFit(self.length, self.width, order, generator.random(len(order)))
        return self.epochs[epoch]

    def rows_in_epoch(self, epoch: int) -> int:
        return len(self._epoch(epoch))

    def epoch_of(self, row: int) -> int:
        """Which pass over the documents row r belongs to."""
        while self.first_row[-1] <= row:
            self.first_row.append(self.first_row[-1] + self.rows_in_epoch(len(self.first_row) - 1))
        return int(np.searchsorted(self.first_row, row, side="right")) - 1

    def fill(
        self,
        out: Array,
        row: int,
        starts: Array | None = None,
        counted: Array | None = None,
        positions: Array | None = None,
        *,
        whole: bool = False,
    ) -> None:
        """out (seq_len + 1,) int64 = the tokens of row r.

        Beside them, where wanted: starts, the position at which each token's document starts; counted, whether the token
        is to be predicted from what its own document has before it; positions, the token's place in the split, documents
        behind one another (with ``whole``: only of pieces that the row does not cut).
        """
        epoch = self.epoch_of(row)
        filled = 0
        for piece, count in self._epoch(epoch).parts(row - self.first_row[epoch]):
            offset = int(self.offset[piece])
            part = slice(filled, filled + count)
            out[part] = self.split.document(int(self.document[piece]), offset, count)
            if starts is not None:
                starts[part] = filled
            if counted is not None:
                self._count(counted, out, part, piece)
            if positions is not None and not (whole and count < self.length[piece]):
                positions[part] = self.place[piece] + np.arange(count)
            filled += count

    def _count(self, counted: Array, out: Array, part: slice, piece: int) -> None:
        """Which of a piece's tokens count. Its first is no continuation of what lies before, but may be its end."""
        document, offset = int(self.document[piece]), int(self.offset[piece])
        learnt = self.split.learnt(document)
        length = part.stop - part.start
        counted[part] = True if learnt is None else learnt[offset : offset + length]
        ended = self._ended  # by the token that begins the next document, where one token does both
        counted[part.start] = (
            part.start > 0 and ended and out[part.start] == self.eos and out[part.start - 1] != self.eos
        )
        self._ended = offset + int(self.length[piece]) == int(self.split.length[document])
