"""Where weights come from: rows of float32, whatever file, dtype and row order they lie in.

A frozen matrix is made of rows read from a ``RowSource`` a chunk at a time, so freezing never holds
a whole matrix. Stacking (q, k, v), alternating by panel (gate, up), taking a fused matrix apart, putting
the rows of heads in order and scaling are row sources themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..errors import ModelFormatError
from ..format.config import FrozenConfig
from ..format.container import pad
from ..format.inventory import PANEL_ROWS
from ..format.quantize import Float32Array, RowSource
from ..system import read_at

_BLOCK_ELEMENTS = 1 << 22  # 16 MiB of weights


class FileBytes:
    """Rows of ``row_bytes`` bytes that lie one after the other in a file.

    Read with ``pread`` and not mapped: pages of a map count as this process's memory.
    """

    def __init__(self, name: str, fd: int, offset: int, rows: int, row_bytes: int) -> None:
        self.name, self.rows, self.row_bytes = name, rows, row_bytes
        self._fd, self._offset = fd, offset

    def read_bytes(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """(stop - start, row_bytes)."""
        wanted = (stop - start) * self.row_bytes
        data = read_at(self._fd, wanted, self._offset + start * self.row_bytes)
        while len(data) < wanted:  # pread gives at most 2 GiB at once
            at = self._offset + start * self.row_bytes + len(data)
            more = read_at(self._fd, wanted - len(data), at)
            if not more:
                raise ModelFormatError(f"tensor {self.name!r}: the file ends inside it")
            data += more
        return np.frombuffer(data, np.uint8).reshape(stop - start, -1)


class FileRows(FileBytes):
    """The same as rows of float32; ``convert`` turns uint8 (rows, row_bytes) into them."""

    def __init__(
        self,
        name: str,
        fd: int,
        offset: int,
        shape: tuple[int, int],
        row_bytes: int,
        convert: Callable[[npt.NDArray[np.uint8]], Float32Array],
    ) -> None:
        super().__init__(name, fd, offset, shape[0], row_bytes)
        self.columns = shape[1]
        self._convert = convert

    def read_rows(self, start: int, stop: int) -> Float32Array:
        return self._convert(self.read_bytes(start, stop))


def f32_rows(data: npt.NDArray[np.uint8]) -> Float32Array:
    return data.view("<f4").astype(np.float32, copy=False)


def f16_rows(data: npt.NDArray[np.uint8]) -> Float32Array:
    return data.view("<f2").astype(np.float32)


def bf16_rows(data: npt.NDArray[np.uint8]) -> Float32Array:
    """BF16 is the upper half of a float32."""
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)


FLOAT_CONVERTERS = {"F32": f32_rows, "F16": f16_rows, "BF16": bf16_rows}


def row_blocks(source: RowSource) -> Iterator[tuple[int, Float32Array]]:
    """(first row, rows (n, columns)) of a matrix, a few megabytes at a time; n is a multiple of two panels, as alternating ones
    need, but for the last."""
    step = 2 * PANEL_ROWS
    step *= max(1, _BLOCK_ELEMENTS // (step * source.columns))
    for start in range(0, source.rows, step):
        yield start, source.read_rows(start, min(start + step, source.rows))


def _names(parts: Sequence[RowSource]) -> str:
    """Of the tensors that hold the parts: one tensor may hold several."""
    return " + ".join(dict.fromkeys(part.name for part in parts))


class StackedRows:
    """One matrix after the other: (q, k, v) -> wqkv."""

    def __init__(self, parts: Sequence[RowSource]) -> None:
        self.name = _names(parts)
        self.rows = sum(part.rows for part in parts)
        self.columns = parts[0].columns
        self._parts = parts

    def read_rows(self, start: int, stop: int) -> Float32Array:
        pieces, offset = [], 0
        for part in self._parts:
            a, b = max(start - offset, 0), min(stop - offset, part.rows)
            if a < b:
                pieces.append(part.read_rows(a, b))
            offset += part.rows
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class AlternatingPanels:
    """Gate panel 0, up panel 0, gate panel 1, …; each matrix padded to whole panels."""

    def __init__(self, gate: RowSource, up: RowSource) -> None:
        self.name = _names((gate, up))
        self.rows = 2 * pad(gate.rows, PANEL_ROWS)
        self.columns = gate.columns
        self._gate, self._up = gate, up

    def read_rows(self, start: int, stop: int) -> Float32Array:
        """``start`` and ``stop`` must be multiples of two panels."""
        a, b = start // 2, stop // 2
        panels = (b - a) // PANEL_ROWS
        out = np.zeros((panels, 2, PANEL_ROWS, self.columns), np.float32)
        for side, part in enumerate((self._gate, self._up)):
            rows = part.read_rows(a, min(b, part.rows))
            full = len(rows) // PANEL_ROWS
            split = full * PANEL_ROWS
            out[:full, side] = rows[:split].reshape(full, PANEL_ROWS, self.columns)
            if split < len(rows):
                out[full, side, : len(rows) - split] = rows[split:]
        return out.reshape(-1, self.columns)


def alternating_panels(gate: Float32Array, up: Float32Array) -> Float32Array:
    """The same of two vectors (n): (2 pad(n, 16))."""
    panels = [np.pad(part, (0, -len(part) % PANEL_ROWS)).reshape(-1, 1, PANEL_ROWS) for part in (gate, up)]
    return np.concatenate(panels, axis=1).reshape(-1)


Order = npt.NDArray[np.intp]  # (head_dim): where row i of a head lies in the source


def half_split_order(head_dim: int) -> Order:
    """Of a head with interleaved RoPE pairs (2j, 2j + 1), as GGUF has it."""
    order: Order = np.arange(head_dim).reshape(head_dim // 2, 2).T.reshape(-1)
    return order


class ReorderedHeads:
    """Rows of q or k, the rows of every head in another order."""

    def __init__(self, source: RowSource, order: Order) -> None:
        self.name, self.rows, self.columns = source.name, source.rows, source.columns
        self._source, self._head_dim = source, len(order)
        starts = np.arange(0, source.rows, self._head_dim)
        self._order = (starts[:, None] + order).reshape(-1)

    def read_rows(self, start: int, stop: int) -> Float32Array:
        first = start // self._head_dim * self._head_dim
        heads = self._source.read_rows(first, pad(stop, self._head_dim))
        rows: Float32Array = heads[self._order[start:stop] - first]
        return rows


class PickedRows:
    """Some rows of a matrix, ascending; those that lie close together are read together."""

    _GAP = 64  # rows that are read for nothing rather than left out

    def __init__(self, source: RowSource, index: npt.NDArray[np.intp]) -> None:
        self.name, self.rows, self.columns = source.name, len(index), source.columns
        self._source, self._index = source, index

    def read_rows(self, start: int, stop: int) -> Float32Array:
        wanted = self._index[start:stop]
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > self._GAP) + 1)
        return np.concatenate([self._source.read_rows(int(run[0]), int(run[-1]) + 1)[run - run[0]] for run in runs])


class LastMatrix:
    """Of matrices that are read whole for any part of them, the one that was read last. One for all of a model's: weights are
    made one after the other, each in pieces, and no two matrices are held."""

    def __init__(self) -> None:
        self._key: tuple[str, int] | None = None
        self._rows: Float32Array | None = None

    def read(self, source: RowSource, start: int, stop: int) -> Float32Array:
        """The source's rows; not to be written to."""
        key = source.name, start
        if self._rows is None or self._key != key:
            self._rows = None  # its memory is what the next one needs
            self._rows, self._key = source.read_rows(start, stop), key
        return self._rows


class TransposedRows:
    """The columns of matrices (``n_inputs``, outputs) that lie one under the other, each of which is read whole: once, if its
    columns are asked for before another's."""

    def __init__(self, source: RowSource, n_inputs: int, last: LastMatrix) -> None:
        self.name, self.rows, self.columns = source.name, source.rows // n_inputs * source.columns, n_inputs
        self._source, self._n_outputs, self._last = source, source.columns, last

    def read_rows(self, start: int, stop: int) -> Float32Array:
        pieces = []
        for which in range(start // self._n_outputs, (stop - 1) // self._n_outputs + 1):
            whole = self._last.read(self._source, which * self.columns, (which + 1) * self.columns)
            first = which * self._n_outputs
            pieces.append(whole[:, max(start - first, 0) : stop - first].T)
        return np.ascontiguousarray(np.concatenate(pieces))


class SlicedRows:
    """Rows of one part of a fused matrix."""

    def __init__(self, source: RowSource, begin: int, rows: int) -> None:
        self.name, self.rows, self.columns = source.name, rows, source.columns
        self._source, self._begin = source, begin

    def read_rows(self, start: int, stop: int) -> Float32Array:
        return self._source.read_rows(self._begin + start, self._begin + stop)


class ScaledRows:
    """Rows times ``scale``: a number, or one for each row of a head; in float64, rounded once."""

    def __init__(self, source: RowSource, scale: float | npt.NDArray[np.float64]) -> None:
        self.name, self.rows, self.columns = source.name, source.rows, source.columns
        self._source, self._scales = source, np.atleast_1d(scale)

    def read_rows(self, start: int, stop: int) -> Float32Array:
        rows = self._source.read_rows(start, stop).astype(np.float64)
        scales = self._scales[np.arange(start, start + len(rows)) % len(self._scales)]
        with np.errstate(over="ignore", invalid="ignore"):  # the quantizer refuses what is not finite
            scaled: Float32Array = (rows * scales[:, None]).astype(np.float32)
        return scaled


class ScaledColumns:
    """Columns times the gain of the norm before the matrix, (columns), which is read with the first rows; likewise in float64."""

    def __init__(self, source: RowSource, gain: Callable[[], Float32Array]) -> None:
        self.name, self.rows, self.columns = source.name, source.rows, source.columns
        self._source, self._gain = source, gain
        self._scales: npt.NDArray[np.float64] | None = None

    def read_rows(self, start: int, stop: int) -> Float32Array:
        if self._scales is None:
            self._scales = self._gain().astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # the quantizer refuses what is not finite
            scaled: Float32Array = (self._source.read_rows(start, stop) * self._scales).astype(np.float32)
        return scaled


class NormedRows:
    """Rows divided by the root of their mean square and ``eps``: an RMSNorm without weights; likewise in float64."""

    def __init__(self, source: RowSource, eps: float) -> None:
        self.name, self.rows, self.columns = source.name, source.rows, source.columns
        self._source, self._eps = source, eps

    def read_rows(self, start: int, stop: int) -> Float32Array:
        rows = self._source.read_rows(start, stop).astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # the quantizer refuses what is not finite
            normed: Float32Array = (rows / np.sqrt(np.mean(rows * rows, axis=1, keepdims=True) + self._eps)).astype(np.float32)
        return normed


class CenteredRows:
    """Rows without their means: vectors whose elements add up to 0. In float64, rounded once."""

    def __init__(self, source: RowSource) -> None:
        self.name, self.rows, self.columns = source.name, source.rows, source.columns
        self._source = source

    def read_rows(self, start: int, stop: int) -> Float32Array:
        rows = self._source.read_rows(start, stop)
        with np.errstate(over="ignore", invalid="ignore"):  # the quantizer refuses what is not finite
            centered: Float32Array = (rows - np.mean(rows, axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
        return centered


class CenteredColumns:
    """A matrix whose products have elements that add up to 0: every column without its mean, likewise.

    The source is read twice."""

    def __init__(self, source: RowSource) -> None:
        self.name, self.rows, self.columns = source.name, source.rows, source.columns
        self._source = source
        self._mean: npt.NDArray[np.float64] | None = None

    def read_rows(self, start: int, stop: int) -> Float32Array:
        with np.errstate(over="ignore", invalid="ignore"):  # the quantizer refuses what is not finite
            if self._mean is None:
                sums = [np.sum(rows, axis=0, dtype=np.float64) for _, rows in row_blocks(self._source)]
                self._mean = np.sum(sums, axis=0) / self.rows
            centered: Float32Array = (self._source.read_rows(start, stop) - self._mean).astype(np.float32)
        return centered


@dataclass
class SourceModel:
    """What a reader hands to the freezer: frozen names (without .codes / .scales) -> weights.

    ``vectors`` are functions so that nothing is read before its turn; attachments are the file's JSON
    and text.
    """

    name: str
    source: str
    config: FrozenConfig
    matrices: dict[str, RowSource] = field(default_factory=dict)
    vectors: dict[str, Callable[[], Float32Array]] = field(default_factory=dict)
    attachments: dict[str, bytes] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None
