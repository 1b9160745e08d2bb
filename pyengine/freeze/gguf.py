"""GGUF v2 and v3: a checked header parser, tensors by rows, and the mapping to frozen names.

The parser is ours because it must be fast on large vocabularies and because GGUF files are hostile
until checked: caps first, every length against the bytes that remain, no product that can wrap.
Only the block formats' arithmetic comes from the ``gguf`` package, which is imported when the first
quantized block is read.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ModelFormatError, UnsupportedModelError
from ..files import open_regular
from ..format.quantize import Float32Array, RowSource
from .sources import FLOAT_CONVERTERS, FileRows

MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_STRING_BYTES = 16 << 20
MAX_NAME_BYTES = 256
MAX_ARRAY_LENGTH = 1 << 24
MAX_ALIGNMENT = 1 << 16
MAX_DIMENSION = 1 << 40

_SCALARS = {
    0: ("<B", "u1"), 1: ("<b", "i1"), 2: ("<H", "<u2"), 3: ("<h", "<i2"), 4: ("<I", "<u4"),
    5: ("<i", "<i4"), 6: ("<f", "<f4"), 7: ("<?", "u1"), 10: ("<Q", "<u8"), 11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9


class BlockType(NamedTuple):
    """A type of ggml: how many values are stored together, and in how many bytes."""

    name: str
    items: int  # values per block
    nbytes: int  # bytes per block


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
}


class GGUFTensor(NamedTuple):
    """Where a tensor lies in the file."""

    name: str
    type: BlockType
    shape: tuple[int, ...]  # outermost first: (rows, columns)
    offset: int  # absolute, in bytes
    nbytes: int


class _Cursor:
    """Bounds-checked little-endian reading."""

    def __init__(self, data: Any, end: int) -> None:
        self.data = data
        self.end = end
        self.at = 0

    def need(self, n: int, what: str) -> None:
        if n > self.end - self.at:
            raise ModelFormatError(f"truncated GGUF: {what} needs {n} bytes at {self.at}, the file has {self.end}")

    def scalar(self, code: str, what: str) -> Any:
        size = struct.calcsize(code)
        self.need(size, what)
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += size
        return value

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        length = self.scalar("<Q", what)
        if length > limit:
            raise ModelFormatError(f"GGUF: {what} claims {length} bytes, at most {limit} are allowed")
        self.need(length, what)
        text: bytes = self.data[self.at : self.at + length]
        self.at += length
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            raise ModelFormatError(f"GGUF: {what} is not UTF-8") from None

    def array(self, what: str) -> list[Any] | npt.NDArray[Any]:
        kind = self.scalar("<I", what)
        length = self.scalar("<Q", what)
        if length > MAX_ARRAY_LENGTH:
            raise ModelFormatError(f"GGUF: {what} claims {length} elements, too many")
        if kind == _STRING:
            self.need(8 * length, what)
            return self._strings(length, what)
        if kind not in _SCALARS:
            raise ModelFormatError(f"GGUF: {what} is an array of unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind][1])
        self.need(length * dtype.itemsize, what)
        values = np.frombuffer(self.data[self.at : self.at + length * dtype.itemsize], dtype)
        self.at += values.nbytes
        return values.astype(bool) if kind == _BOOL else values

    def _strings(self, length: int, what: str) -> list[str]:
        """The loop that vocabularies go through: hundreds of thousands of short strings."""
        data, at, end = self.data, self.at, self.end
        unpack = struct.Struct("<Q").unpack_from
        strings: list[str] = []
        append = strings.append
        try:
            for _ in range(length):
                (size,) = unpack(data, at)
                at += 8
                if size > end - at or size > MAX_STRING_BYTES:
                    raise ModelFormatError(f"GGUF: a string of {what} claims {size} bytes")
                append(data[at : at + size].decode("utf-8"))
                at += size
        except struct.error:
            raise ModelFormatError(f"truncated GGUF: {what} runs over the end") from None
        except UnicodeDecodeError:
            raise ModelFormatError(f"GGUF: string {len(strings)} of {what} is not UTF-8") from None
        self.at = at
        return strings

    def value(self, what: str) -> Any:
        kind = self.scalar("<I", what)
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise ModelFormatError(f"GGUF: {what} has unknown type {kind}")
        return self.scalar(_SCALARS[kind][0], what)


def _parse_tensor(cursor: _Cursor) -> tuple[str, BlockType, tuple[int, ...], int, int]:
    name = cursor.string("a tensor name", MAX_NAME_BYTES)
    n_dims = cursor.scalar("<I", f"tensor {name!r}")
    if not 1 <= n_dims <= 4:
        raise ModelFormatError(f"GGUF: tensor {name!r} has {n_dims} dimensions, not 1..4")
    dims = [cursor.scalar("<Q", f"tensor {name!r}") for _ in range(n_dims)]
    if any(not 1 <= size <= MAX_DIMENSION for size in dims):
        raise ModelFormatError(f"GGUF: tensor {name!r} has bad dimensions {dims}")
    kind = cursor.scalar("<I", f"tensor {name!r}")
    offset = cursor.scalar("<Q", f"tensor {name!r}")
    if kind not in BLOCK_TYPES:
        raise UnsupportedModelError(f"tensor {name!r}: GGML type {kind} is not implemented")
    block = BLOCK_TYPES[kind]
    if dims[0] % block.items:
        raise ModelFormatError(f"GGUF: tensor {name!r} has rows of {dims[0]}, not whole blocks of {block.items}")
    nbytes = block.nbytes * (dims[0] // block.items)
    for size in dims[1:]:
        nbytes *= size  # Python integers: nothing wraps
    return name, block, tuple(reversed(dims)), offset, nbytes


class GGUFFile:
    """Header of a GGUF file: ``metadata`` (key -> value, arrays as lists or NumPy arrays) and
    ``tensors``.

    Everything is checked on construction; weights are read later, by rows (``matrix``, ``vector``).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = open_regular(self.path)
        try:
            size = os.fstat(self._file.fileno()).st_size
            if size < 24:
                raise ModelFormatError(f"{size} bytes: not a GGUF file")
            # Mapped while it is parsed: only the header's pages are touched.
            with mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ) as data:
                self._parse(_Cursor(data, size))
        except BaseException as error:
            self._file.close()
            if isinstance(error, (ModelFormatError, UnsupportedModelError)):
                raise type(error)(f"{self.path.name}: {error}") from None
            raise

    def _parse(self, cursor: _Cursor) -> None:
        cursor.need(4, "the magic")
        if cursor.data[:4] != b"GGUF":
            raise ModelFormatError("not a GGUF file")
        cursor.at = 4
        self.version = cursor.scalar("<I", "the version")
        if self.version not in (2, 3):
            if self.version and self.version & 0xFFFF == 0:
                raise UnsupportedModelError("big-endian GGUF is not implemented")
            raise UnsupportedModelError(f"GGUF version {self.version} is not implemented (2 and 3 are)")
        n_tensors = cursor.scalar("<Q", "the tensor count")
        n_keys = cursor.scalar("<Q", "the key count")
        if n_tensors > MAX_TENSORS or n_keys > MAX_KEYS:
            raise ModelFormatError(f"GGUF claims {n_tensors} tensors and {n_keys} keys, too many")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = cursor.string("a metadata key", 65_535)
            if key in self.metadata:
                raise ModelFormatError(f"GGUF: key {key!r:.200} occurs twice")
            self.metadata[key] = cursor.value(f"key {key!r:.200}")
        self._place_tensors([_parse_tensor(cursor) for _ in range(n_tensors)], cursor)

    def _place_tensors(self, infos: list[tuple[str, BlockType, tuple[int, ...], int, int]], cursor: _Cursor) -> None:
        """Resolve the relative offsets and check the ranges: aligned, inside the file, disjoint."""
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or (alignment & (alignment - 1)):
            raise ModelFormatError(f"GGUF: general.alignment {alignment!r:.80} is not sane")
        start = -(-cursor.at // alignment) * alignment
        self.tensors: dict[str, GGUFTensor] = {}
        for name, block, shape, offset, nbytes in infos:
            if name in self.tensors:
                raise ModelFormatError(f"GGUF: tensor {name!r} occurs twice")
            if offset % alignment or start + offset + nbytes > cursor.end:
                raise ModelFormatError(
                    f"GGUF: tensor {name!r} ({nbytes} bytes at {offset}) is not aligned or not "
                    f"inside the file of {cursor.end} bytes"
                )
            self.tensors[name] = GGUFTensor(name, block, shape, start + offset, nbytes)
        end, before = start, ""
        for tensor in sorted(self.tensors.values(), key=lambda t: t.offset):
            if tensor.offset < end:
                raise ModelFormatError(f"GGUF: tensors {before!r} and {tensor.name!r} overlap")
            end, before = tensor.offset + tensor.nbytes, tensor.name

    # -- TensorReader

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def matrix(self, name: str) -> RowSource:
        tensor = self.tensors[name]
        rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        row_bytes = tensor.nbytes // rows
        convert = FLOAT_CONVERTERS.get(tensor.type.name) or _Dequantizer(tensor.type.name)
        return FileRows(name, self._file.fileno(), tensor.offset, (rows, columns), row_bytes, convert)

    def vector(self, name: str) -> Float32Array:
        return self.matrix(name).read_rows(0, 1).reshape(-1)

    def close(self) -> None:
        self._file.close()


class _Dequantizer:
    """Rows of GGML blocks -> float32, by the format authors' own code."""

    def __init__(self, block_type: str) -> None:
        self._type = block_type

    def __call__(self, data: npt.NDArray[np.uint8]) -> Float32Array:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        with np.errstate(invalid="ignore", over="ignore"):  # a bad scale is found by the quantizer
            return dequantize(data, GGMLQuantizationType[self._type]).astype(np.float32, copy=False)
