"""Int8 weights in panels (csrc/FORMAT.md, sections 3 and 4), in exact float32 arithmetic.

``hadamard``, ``quantize_rows`` and ``to_panels`` are the specification on arrays; ``QuantizedMatrix`` streams a
``RowSource`` through them. ``from_panels`` and ``dequantize`` are the way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ModelFormatError
from .container import pad
from .inventory import GROUP_COLUMNS, PANEL_ROWS

Float32Array = npt.NDArray[np.float32]
Int8Array = npt.NDArray[np.int8]
Float16Array = npt.NDArray[np.float16]

_CHUNK_ELEMENTS = 1 << 20  # 4 MiB of float32: bounds memory
_TRANSFORM_ELEMENTS = 1 << 17  # transformed at a time: twice 512 KiB, which stay in a cache of the second level
_INT8_MAX = np.float32(127)


class RowSource(Protocol):
    """A matrix (rows, columns) that can be read by rows. ``name`` is the source's, for errors."""

    name: str
    rows: int
    columns: int

    def read_rows(self, start: int, stop: int) -> Float32Array:
        """Rows start..stop-1 as float32 (stop - start, columns)."""


def hadamard_exponent(columns: int) -> int:
    """k: rows of so many columns are transformed in blocks of 2^k, the largest power of two that divides them, at most 64."""
    return min((columns & -columns).bit_length(), GROUP_COLUMNS.bit_length()) - 1


def hadamard(rows: Float32Array, exponent: int) -> Float32Array:
    """T of section 4: each block of 2^k columns times the Hadamard matrix, not normalized.

    Float32 (rows, columns), with k = ``hadamard_exponent(columns)`` -> the same shape, times 2^``exponent``. What overflows is
    not finite.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    block = 1 << hadamard_exponent(rows.shape[1])
    blocks = rows.reshape(-1, block)
    transformed = np.empty_like(blocks)
    factor = np.float32(2.0**exponent)
    step = _TRANSFORM_ELEMENTS // block
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(blocks), step):
            x = blocks[start : start + step].T.copy()  # (block, n): a pair of columns is a pair of vectors
            y = np.empty_like(x)
            for h in (1 << stage for stage in range(hadamard_exponent(rows.shape[1]))):
                a, b = x.reshape(-1, 2, h, x.shape[1]).transpose(1, 0, 2, 3)
                sums, differences = y.reshape(-1, 2, h, x.shape[1]).transpose(1, 0, 2, 3)
                np.add(a, b, out=sums)
                np.subtract(a, b, out=differences)
                x, y = y, x
            np.multiply(x.T, factor, out=transformed[start : start + step])
    return transformed.reshape(rows.shape)


def quantize_rows(weights: Float32Array, name: str) -> tuple[Int8Array, Float16Array]:
    """Weights (rows, columns), transformed -> codes (rows, n_groups, 64) and scales (rows, n_groups).

    Columns are padded with zeros. Raises ModelFormatError that names the tensor for a weight that
    is not finite or a scale that overflows f16.
    """
    rows, columns = weights.shape
    k = hadamard_exponent(columns)
    transformed = hadamard(weights, -((k + 1) // 2))
    padded = pad(columns, GROUP_COLUMNS)
    if padded != columns:
        transformed = np.pad(transformed, ((0, 0), (0, padded - columns)))
    groups = transformed.reshape(rows, -1, GROUP_COLUMNS)
    absmax = np.abs(groups).max(axis=2)
    if not np.isfinite(absmax).all():
        row = int(np.argwhere(~np.isfinite(absmax))[0, 0])
        raise ModelFormatError(f"tensor {name!r}: a weight of row {row} of this block is not finite, or too large")
    with np.errstate(over="ignore", under="ignore"):
        scales = (absmax / _INT8_MAX).astype(np.float16)
    if not np.isfinite(scales).all():
        raise ModelFormatError(f"tensor {name!r}: transformed weights up to {absmax.max():g} overflow the f16 scale")
    stored = scales.astype(np.float32)
    # A scale of 0 has codes 0: dividing by infinity gives them without a second pass.
    divisor = np.where(stored == 0, np.float32(np.inf), stored)
    quotients = groups / divisor[:, :, None]
    np.rint(quotients, out=quotients)
    np.clip(quotients, -_INT8_MAX, _INT8_MAX, out=quotients)
    return quotients.astype(np.int8), scales


def to_panels(codes: Int8Array, scales: Float16Array) -> tuple[Int8Array, Float16Array]:
    """(rows, n_groups, 64), (rows, n_groups) -> (panels, n_groups, 16, 16, 4), (panels, n_groups,
    16).

    Rows are padded to whole panels with zero codes and scales.
    """
    rows, n_groups, _ = codes.shape
    missing = -rows % PANEL_ROWS
    if missing:
        codes = np.pad(codes, ((0, missing), (0, 0), (0, 0)))
        scales = np.pad(scales, ((0, missing), (0, 0)))
    panels = codes.reshape(-1, PANEL_ROWS, n_groups, GROUP_COLUMNS // 4, 4)
    return (
        np.ascontiguousarray(panels.transpose(0, 2, 3, 1, 4)),
        np.ascontiguousarray(scales.reshape(-1, PANEL_ROWS, n_groups).transpose(0, 2, 1)),
    )


def from_panels(panels: Int8Array, scales: Float16Array) -> tuple[Int8Array, Float16Array]:
    """The inverse of ``to_panels``; padding rows stay."""
    n_panels, n_groups = panels.shape[:2]
    rows = n_panels * PANEL_ROWS
    return (
        panels.transpose(0, 3, 1, 2, 4).reshape(rows, n_groups, GROUP_COLUMNS),
        scales.reshape(n_panels, n_groups, PANEL_ROWS).transpose(0, 2, 1).reshape(rows, n_groups),
    )


def dequantize(panels: Int8Array, scales: Float16Array, rows: int, columns: int) -> Float32Array:
    """Stored codes and scales -> the weights that they stand for, float32 (rows, columns): code * scale transformed back,
    which is how an embedding row is read. Exact, but for results near the ends of what float32 holds.
    """
    codes, row_scales = from_panels(panels, scales)
    values = codes.astype(np.float32) * row_scales.astype(np.float32)[:, :, None]
    return hadamard(values.reshape(len(codes), -1)[:rows, :columns], -(hadamard_exponent(columns) // 2))


class QuantizedMatrix:
    """Streams the codes of a matrix panel block by panel block and keeps its scales (1/32 of them).

    Iterate once, to the end; then ``scales`` holds f16 (n_panels, n_groups, 16).
    """

    def __init__(self, source: RowSource) -> None:
        n_panels = -(-source.rows // PANEL_ROWS)
        n_groups = -(-source.columns // GROUP_COLUMNS)
        self.source = source
        self.scales: Float16Array = np.zeros((n_panels, n_groups, PANEL_ROWS), np.float16)

    def __iter__(self) -> Iterator[Int8Array]:
        source = self.source
        step = 2 * PANEL_ROWS  # a gate panel and an up panel always come together
        step *= max(1, _CHUNK_ELEMENTS // (step * source.columns))
        for start in range(0, source.rows, step):
            rows = source.read_rows(start, min(start + step, source.rows))
            panels, scales = to_panels(*quantize_rows(rows, source.name))
            first = start // PANEL_ROWS
            self.scales[first : first + len(scales)] = scales
            yield panels
