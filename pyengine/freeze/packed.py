"""Hugging Face checkpoints that were quantized before: the rows of float32 that their tensors stand for.

Four layouts of a linear layer ``m`` with a weight (n, k), as their authors' tools write them. Codes are int4 or int8, if nothing
else is said:

scaled   m.weight (n, k) FP8 or int8; m.weight_scale or m.weight_scale_inv: one for all, for a row, for a group of
         columns, or for a block of both (DeepSeek's and Qwen's FP8, compressed-tensors)
packed   m.weight_packed (n, k / per word), m.weight_scale (n, groups), m.weight_shape; perhaps m.weight_zero_point,
         packed downwards, and m.weight_g_idx (compressed-tensors)
GPTQ     m.qweight (k / per word, n), m.qzeros (groups, n / per word), m.scales (groups, n), m.g_idx (k): column -> group
AWQ      m.qweight (k, n / 8), m.qzeros (groups, n / 8), m.scales (groups, n): int4; the eight of a word are the
         columns 0 2 4 6 1 3 5 7

A word is an int32 with the first code in its lowest bits. Every weight is scale * (code - zero), in float32. Scales of
activations and of a KV cache say how somebody else's arithmetic rounds; ours has its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ModelFormatError, UnsupportedModelError
from ..format.container import DTYPE_BYTES, SafetensorsEntry
from ..format.quantize import Float32Array, RowSource
from ..system import read_at
from .fields import Fields
from .sources import FLOAT_CONVERTERS, FileRows

Groups = npt.NDArray[np.int64]  # (columns): the group that a column of weights belongs to

_METHODS = ("fp8", "compressed-tensors", "gptq", "awq")
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision", "dense")
_OF_ACTIVATIONS = (
    "input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale", "k_scale", "v_scale",
    "input_global_scale", "q_scale", "prob_scale",
)  # fmt: skip
_AWQ_COLUMNS = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # of the eight codes in a word
_WORD_BITS = 32


class StoredTensors(Protocol):
    """A reader that also says where a tensor lies as it is stored."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def stored(self, name: str) -> tuple[int, SafetensorsEntry]:
        """The file's descriptor, and dtype, shape and offsets."""

    def matrix(self, name: str) -> RowSource: ...

    def vector(self, name: str) -> Float32Array: ...


# ---------------------------------------------------------------------------- codes


def _float8_values(exponent_bits: int, mantissa_bits: int, bias: int) -> Float32Array:
    """(256) what each byte of a float of 8 bits stands for; the two with nothing but ones, E4M3's NaN, are NaN."""
    byte = np.arange(256)
    mantissa = (byte & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    exponent = (byte >> mantissa_bits) & ((1 << exponent_bits) - 1)
    magnitude = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - float(bias)))
    values = np.where(byte & 128, -magnitude, magnitude)
    if mantissa_bits == 2:  # E5M2 has infinities and more NaNs, as IEEE 754 has them
        values[exponent == 31] = np.nan
    values[(byte & 127) == 127] = np.nan
    return values.astype(np.float32)


_E4M3, _E5M2 = _float8_values(4, 3, 7), _float8_values(5, 2, 15)


def _int8_rows(data: npt.NDArray[np.uint8]) -> Float32Array:
    return data.view(np.int8).astype(np.float32)


_CODE_CONVERTERS = {"F8_E4M3": lambda data: _E4M3[data], "F8_E5M2": lambda data: _E5M2[data], "I8": _int8_rows}


def _unpack(words: npt.NDArray[np.uint32], bits: int, axis: int) -> npt.NDArray[np.uint8]:
    """Codes along an axis, 32 / bits for each word; the lowest bits first."""
    shifts = np.arange(0, _WORD_BITS, bits, dtype=np.uint32)
    shifts = shifts.reshape(-1, *[1] * (words.ndim - axis - 1))
    codes = (np.expand_dims(words, axis + 1) >> shifts) & np.uint32((1 << bits) - 1)
    shape = list(words.shape)
    shape[axis] *= len(shifts)
    unpacked: npt.NDArray[np.uint8] = codes.astype(np.uint8).reshape(shape)
    return unpacked


# ---------------------------------------------------------------------------- reading


class _Tensor:
    """A stored tensor of at most two dimensions, read by rows or columns."""

    def __init__(self, reader: StoredTensors, name: str, dtypes: Iterable[str]) -> None:
        self.name = name
        self._fd, entry = reader.stored(name)
        self.dtype, self.shape, self._begin = entry.dtype, entry.shape, entry.begin
        if self.dtype not in dtypes:
            raise UnsupportedModelError(f"tensor {name!r}: dtype {self.dtype} is not implemented there")
        if len(self.shape) > 2 or 0 in self.shape:
            raise ModelFormatError(f"tensor {name!r}: shape {list(self.shape)} is not that of a quantized layer")

    def expect(self, shape: tuple[int, ...]) -> None:
        if self.shape != shape:
            raise ModelFormatError(f"tensor {self.name!r}: shape {list(self.shape)} should be {list(shape)}")

    def columns(self, first: int, last: int) -> npt.NDArray[np.uint8]:
        """Bytes (rows, of these columns)."""
        size, (rows, columns) = DTYPE_BYTES[self.dtype], self.shape
        if (first, last) == (0, columns):
            return self._bytes(0, rows * columns * size).reshape(rows, -1)
        width = (last - first) * size
        out = np.empty((rows, width), np.uint8)
        for row in range(rows):
            out[row] = self._bytes((row * columns + first) * size, width)
        return out

    def words(self, first: int, last: int) -> npt.NDArray[np.uint32]:
        """Words (rows, of these columns)."""
        return self.columns(first, last).view("<u4")

    def floats(self, first: int, last: int) -> Float32Array:
        """Values (rows, of these columns)."""
        return FLOAT_CONVERTERS[self.dtype](self.columns(first, last))

    def integers(self) -> npt.NDArray[np.int64]:
        """All of a vector of I32 or I64."""
        data = self._bytes(0, math.prod(self.shape) * DTYPE_BYTES[self.dtype])
        return data.view("<i4" if self.dtype == "I32" else "<i8").astype(np.int64)

    def rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Bytes (rows start to stop, all columns)."""
        row_bytes = self.shape[1] * DTYPE_BYTES[self.dtype]
        return self._bytes(start * row_bytes, (stop - start) * row_bytes).reshape(stop - start, -1)

    def _bytes(self, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        data = bytearray()
        while len(data) < n_bytes:  # pread gives at most 2 GiB at once
            more = read_at(self._fd, n_bytes - len(data), self._begin + offset + len(data))
            if not more:
                raise ModelFormatError(f"tensor {self.name!r}: the file ends inside it")
            data += more
        return np.frombuffer(data, np.uint8)


class ScaledRows:
    """Codes of a byte, times a scale for each block of ``block`` (rows, columns)."""

    def __init__(self, codes: FileRows, scales: _Tensor, block: tuple[int, int]) -> None:
        self.name, self.rows, self.columns = codes.name, codes.rows, codes.columns
        self._codes, self._scales, self._block = codes, scales, block

    def read_rows(self, start: int, stop: int) -> Float32Array:
        rows, (height, width) = self._codes.read_rows(start, stop), self._block
        first, last = start // height, -(-stop // height)
        scales = FLOAT_CONVERTERS[self._scales.dtype](self._scales.rows(first, last))  # (blocks, blocks of columns)
        scales = scales[np.arange(start, stop) // height - first]
        for column in range(scales.shape[1]):
            with np.errstate(over="ignore", invalid="ignore"):  # the quantizer refuses what is not finite
                rows[:, column * width : (column + 1) * width] *= scales[:, column, None]
        return rows


class PackedRows:
    """compressed-tensors' packed codes: along the rows, signed by an offset."""

    def __init__(self, codes: _Tensor, scales: _Tensor, zeros: _Tensor | None, groups: Groups, columns: int) -> None:
        self.name, self.rows, self.columns = codes.name, codes.shape[0], columns
        self._codes, self._scales, self._zeros, self._groups = codes, scales, zeros, groups
        self._bits = _WORD_BITS * codes.shape[1] // _whole_words(columns, codes)

    def read_rows(self, start: int, stop: int) -> Float32Array:
        words = self._codes.rows(start, stop).view("<u4")
        codes = _unpack(words, self._bits, 1)[:, : self.columns].astype(np.float32)
        scales = FLOAT_CONVERTERS[self._scales.dtype](self._scales.rows(start, stop))
        if self._zeros is None:
            codes -= np.float32(1 << (self._bits - 1))
        else:  # packed downwards: a word holds the zeros of several rows
            per_word = _WORD_BITS // self._bits
            first, last = start // per_word, -(-stop // per_word)
            zeros = _unpack(self._zeros.rows(first, last).view("<u4"), self._bits, 0)
            codes -= zeros[start - first * per_word : stop - first * per_word, self._groups]
        with np.errstate(over="ignore", invalid="ignore"):
            codes *= scales[:, self._groups]
        return codes


class TransposedRows:
    """GPTQ's and AWQ's words, whose columns are our rows.

    ``down``: a word holds codes of one column (GPTQ), else of one row (AWQ). What is stored of a zero is zero - ``zero_offset``.
    """

    def __init__(
        self,
        codes: _Tensor,
        zeros: _Tensor,
        scales: _Tensor,
        groups: Groups,
        bits: int,
        *,
        down: bool,
        zero_offset: int,
    ) -> None:
        self.name, self.rows, self.columns = codes.name, scales.shape[1], len(groups)
        self._codes, self._zeros, self._scales, self._groups = codes, zeros, scales, groups
        self._bits, self._down, self._zero_offset = bits, down, zero_offset

    def _side_by_side(self, tensor: _Tensor, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Codes (rows of the tensor, columns start to stop) of words that hold neighbours in a row."""
        per_word = _WORD_BITS // self._bits
        first, last = start // per_word, -(-stop // per_word)
        codes = _unpack(tensor.words(first, last), self._bits, 1)
        if not self._down:
            eights = codes.reshape(len(codes), -1, 8)
            codes = eights[:, :, np.argsort(_AWQ_COLUMNS)].reshape(codes.shape)
        return codes[:, start - first * per_word : stop - first * per_word]

    def read_rows(self, start: int, stop: int) -> Float32Array:
        if self._down:
            codes = _unpack(self._codes.words(start, stop), self._bits, 0)
        else:
            codes = self._side_by_side(self._codes, start, stop)
        zeros = self._side_by_side(self._zeros, start, stop) + np.uint8(self._zero_offset)
        zeros &= np.uint8((1 << self._bits) - 1)  # GPTQ's tools store zero - 1 in as many bits
        scales = self._scales.floats(start, stop)  # (groups, rows)
        rows: Float32Array = codes.T.astype(np.float32)
        rows -= zeros.T[:, self._groups]
        with np.errstate(over="ignore", invalid="ignore"):
            rows *= scales.T[:, self._groups]
        return rows


# ---------------------------------------------------------------------------- layers


def _whole_words(columns: int, codes: _Tensor) -> int:
    """How many codes the words of a row have room for. Raises ModelFormatError unless they are as many as columns need, of 4 or 8
    bits."""
    for bits in (4, 8):
        if codes.shape[1] == -(-columns * bits // _WORD_BITS):
            return codes.shape[1] * _WORD_BITS // bits
    raise ModelFormatError(f"tensor {codes.name!r}: {codes.shape[1]} words a row are not {columns} codes of 4 or 8 bits")


def _groups_of(columns: int, n_groups: int, name: str) -> Groups:
    """(columns) of equal groups in order."""
    if n_groups < 1 or columns % n_groups:
        raise ModelFormatError(f"tensor {name!r}: {n_groups} groups for {columns} columns")
    return np.arange(columns) // (columns // n_groups)


def _listed_groups(index: _Tensor, columns: int, n_groups: int) -> Groups:
    """(columns) as a tensor says. Raises ModelFormatError."""
    index.expect((columns,))
    groups = index.integers()
    if groups.min() < 0 or groups.max() >= n_groups:
        raise ModelFormatError(f"tensor {index.name!r}: a group is not in 0..{n_groups - 1}")
    return groups


class PackedTensors:
    """A reader whose quantized layers look as if they were floats: ``m.weight`` (n, k), and nothing of what it is made of.

    ``settings`` is config.json's quantization_config. Raises UnsupportedModelError for a layout that is not here,
    ModelFormatError for tensors that do not belong together.
    """

    def __init__(self, reader: StoredTensors, settings: Fields) -> None:
        self._reader = reader
        method = settings.text("quant_method", "")
        if method not in _METHODS:
            raise UnsupportedModelError(
                f"weights quantized by {method or 'an unnamed method'!r:.80} are not implemented, only by "
                f"{', '.join(_METHODS)} and mxfp4"
            )
        self._settings, self._method = settings, method
        if method == "compressed-tensors" and settings.text("format", "dense") not in _FORMATS:
            raise UnsupportedModelError(f"compressed-tensors' format {settings.text('format')!r:.80} is not implemented")
        if method == "awq" and settings.text("version", "gemm").lower() != "gemm":
            raise UnsupportedModelError(f"AWQ's version {settings.text('version')!r:.80} is not implemented, only gemm")
        self._names = set(reader.shapes)
        self._layers: dict[str, RowSource] = {}  # m.weight -> its rows
        self._hidden: set[str] = set()
        for name in sorted(self._names):
            module, _, last = name.rpartition(".")
            if last in _OF_ACTIVATIONS:
                self._hidden.add(name)
            elif last in ("weight_scale", "weight_scale_inv") and f"{module}.weight" in self._names:
                self._add(module, self._scaled(module, name), last)
            elif last == "weight_packed":
                self._add(module, self._packed(module), last, "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
            elif last == "qweight":
                self._add(module, self._transposed(module), last, "qzeros", "scales", "g_idx")

    def _add(self, module: str, rows: RowSource, *parts: str) -> None:
        rows.name = f"{module}.weight"
        self._layers[rows.name] = rows
        self._hidden.update(f"{module}.{part}" for part in parts)

    # -- layouts

    def _tensor(self, name: str, *dtypes: str) -> _Tensor:
        if name not in self._names:
            raise ModelFormatError(f"tensor {name!r} of a quantized layer is missing")
        return _Tensor(self._reader, name, dtypes)

    def _optional(self, name: str, *dtypes: str) -> _Tensor | None:
        return self._tensor(name, *dtypes) if name in self._names else None

    def _scaled(self, module: str, scale: str) -> RowSource:
        fd, entry = self._reader.stored(f"{module}.weight")
        codes, scales = self._tensor(f"{module}.weight", *_CODE_CONVERTERS), self._tensor(scale, *FLOAT_CONVERTERS)
        if f"{module}.weight_zero_point" in self._names:
            self._symmetric(module, entry.dtype)
        rows, columns = codes.shape if len(codes.shape) == 2 else (0, 0)
        if not rows:
            raise ModelFormatError(f"tensor {codes.name!r}: shape {list(codes.shape)} is not that of a matrix")
        found = FileRows(codes.name, fd, entry.begin, (rows, columns), columns, _CODE_CONVERTERS[entry.dtype])
        if len(scales.shape) < 2:  # one for all, or one for each row
            scales.shape = (math.prod(scales.shape), 1)
        n, k = scales.shape
        block = self._block()
        if block is not None and (n, k) == (-(-rows // block[0]), -(-columns // block[1])):
            return ScaledRows(found, scales, block)
        if n in (1, rows) and columns % k == 0:
            return ScaledRows(found, scales, (rows // n, columns // k))
        raise ModelFormatError(f"tensor {scale!r}: {n} x {k} scales for {rows} x {columns} weights")

    def _symmetric(self, module: str, dtype: str) -> None:
        """int8 with zeros that are all 0, which tools store as well. Raises UnsupportedModelError for others."""
        name = f"{module}.weight_zero_point"
        fd, entry = self._reader.stored(name)
        zeros = read_at(fd, entry.end - entry.begin, entry.begin)
        if any(zeros):
            raise UnsupportedModelError(f"tensor {name!r}: zero points of {dtype} weights are not implemented")
        self._hidden.add(name)

    def _block(self) -> tuple[int, int] | None:
        """(rows, columns) that share a scale, where the configuration says so."""
        block = self._settings.raw("weight_block_size")
        groups = self._settings.table("config_groups", {})
        for group in groups.values():
            weights = group.get("weights") if isinstance(group, dict) else None
            block = block or (weights.get("block_structure") if isinstance(weights, dict) else None)
        if block is None:
            return None
        if not isinstance(block, list) or len(block) != 2 or any(type(x) is not int or not 1 <= x < 1 << 31 for x in block):
            raise ModelFormatError(f"quantization_config: a block of {block!r:.80}")
        return block[0], block[1]

    def _packed(self, module: str) -> RowSource:
        codes = self._tensor(f"{module}.weight_packed", "I32")
        scales = self._tensor(f"{module}.weight_scale", *FLOAT_CONVERTERS)
        shape = self._tensor(f"{module}.weight_shape", "I32", "I64")
        shape.expect((2,))
        rows, columns = (int(size) for size in shape.integers())
        if len(codes.shape) != 2 or rows != codes.shape[0] or columns < 1 or len(scales.shape) != 2 or scales.shape[0] != rows:
            raise ModelFormatError(f"tensor {codes.name!r}: its shape, its scales' and weight_shape do not belong together")
        n_groups = scales.shape[1]
        index = self._optional(f"{module}.weight_g_idx", "I32", "I64")
        groups = _groups_of(columns, n_groups, scales.name) if index is None else _listed_groups(index, columns, n_groups)
        zeros = self._optional(f"{module}.weight_zero_point", "I32")
        if zeros is not None:
            per_word = _whole_words(columns, codes) // codes.shape[1]
            zeros.expect((-(-rows // per_word), n_groups))
        return PackedRows(codes, scales, zeros, groups, columns)

    def _transposed(self, module: str) -> RowSource:
        down = self._method == "gptq"
        bits = self._settings.integer("bits") if down else self._settings.integer("bits", 4)
        if bits not in ((2, 4, 8) if down else (4,)):
            raise UnsupportedModelError(f"{self._method} with {bits!r:.80} bits is not implemented")
        per_word = _WORD_BITS // bits
        codes, zeros = (self._tensor(f"{module}.{part}", "I32") for part in ("qweight", "qzeros"))
        scales = self._tensor(f"{module}.scales", *FLOAT_CONVERTERS)
        if len(codes.shape) != 2 or len(scales.shape) != 2:
            raise ModelFormatError(f"tensor {codes.name!r}: not a matrix")
        n_groups, rows = scales.shape
        columns = codes.shape[0] * (per_word if down else 1)
        codes.expect((columns // per_word, rows) if down else (columns, rows // per_word))
        zeros.expect((n_groups, rows // per_word))
        if rows % per_word:
            raise ModelFormatError(f"tensor {codes.name!r}: {rows} columns are no whole words of {bits} bits")
        index = self._optional(f"{module}.g_idx", "I32", "I64") if down else None
        groups = _groups_of(columns, n_groups, scales.name) if index is None else _listed_groups(index, columns, n_groups)
        offset = int(down and self._settings.text("checkpoint_format", "gptq") != "gptq_v2")
        return TransposedRows(codes, zeros, scales, groups, bits, down=down, zero_offset=offset)

    # -- TensorReader

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {name: shape for name, shape in self._reader.shapes.items() if name not in self._hidden}
        return shapes | {name: (rows.rows, rows.columns) for name, rows in self._layers.items()}

    def matrix(self, name: str) -> RowSource:
        return self._layers[name] if name in self._layers else self._reader.matrix(name)

    def vector(self, name: str) -> Float32Array:
        return self._reader.vector(name)
