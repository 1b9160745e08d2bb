"""MXFP4 of the Open Compute Project's Microscaling formats: 32 values share a power of two, and each has four bits, a sign, two
of exponent and one of mantissa."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ..errors import ModelFormatError, UnsupportedModelError
from ..format.quantize import Float32Array, RowSource
from .packed import StoredTensors
from .sources import FileBytes

Bytes = npt.NDArray[np.uint8]

GROUP = 32  # values that share a scale
_BLOCKS, _SCALES = "_blocks", "_scales"
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-x for x in _MAGNITUDES)], np.float32)  # of the sixteen codes


def _scaled(codes: Bytes, exponents: Bytes) -> Float32Array:
    """codes (..., GROUP) in 0..15 and exponents (...), with a bias of 127 -> (..., GROUP). What overflows becomes infinite, which
    the quantizer refuses."""
    with np.errstate(over="ignore", under="ignore"):
        values: Float32Array = np.ldexp(_VALUES[codes], exponents[..., None].astype(np.int32) - 127)
    return values


class _Rows:
    """A matrix in two tensors: 16 bytes for each group, of two values each, the first in the lower half; and exponents."""

    def __init__(self, name: str, blocks: FileBytes, scales: FileBytes) -> None:
        self.name, self.rows, self.columns = name, blocks.rows, 2 * blocks.row_bytes
        self._blocks, self._scales = blocks, scales

    def read_rows(self, start: int, stop: int) -> Float32Array:
        packed, exponents = self._blocks.read_bytes(start, stop), self._scales.read_bytes(start, stop)
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(stop - start, -1, GROUP)
        return _scaled(codes, exponents).reshape(stop - start, -1)


class Mxfp4Tensors:
    """The tensors of a Hugging Face checkpoint with matrices in MXFP4: ``X_blocks`` (..., rows, groups, 16) and ``X_scales``
    (..., rows, groups) appear as one tensor X (..., rows, columns)."""

    def __init__(self, reader: StoredTensors) -> None:
        self._reader, found = reader, reader.shapes
        self._packed: dict[str, tuple[int, ...]] = {}
        for name in found:
            if not name.endswith(_BLOCKS):
                continue
            base = name.removesuffix(_BLOCKS)
            scales, blocks = found.get(base + _SCALES), found[name]
            if scales is None or blocks != (*scales, GROUP // 2) or len(scales) < 2 or base in found:
                raise ModelFormatError(f"tensor {name!r} has no {base + _SCALES!r} of its shape")
            self._packed[base] = (*scales[:-1], scales[-1] * GROUP)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        hidden = {base + end for base in self._packed for end in (_BLOCKS, _SCALES)}
        return {name: shape for name, shape in self._reader.shapes.items() if name not in hidden} | self._packed

    def matrix(self, name: str) -> RowSource:
        if name not in self._packed:
            return self._reader.matrix(name)
        *outer, columns = self._packed[name]
        halves = []
        for end, values_per_byte in ((_BLOCKS, 2), (_SCALES, GROUP)):
            fd, entry = self._reader.stored(name + end)
            if entry.dtype != "U8":
                raise UnsupportedModelError(f"tensor {name + end!r}: MXFP4 in {entry.dtype} is not implemented, only in U8")
            halves.append(FileBytes(name, fd, entry.begin, math.prod(outer), columns // values_per_byte))
        return _Rows(name, *halves)

    def vector(self, name: str) -> Float32Array:
        return self._reader.vector(name)
