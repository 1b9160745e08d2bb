"""The container, an ordinary safetensors file (csrc/FORMAT.md, section 1): its header, parsed and built.

The file comes from strangers: caps come first, arithmetic is checked, and every range lies inside the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import ModelFormatError
from .strict_json import parse_json_object

ALIGNMENT = 64

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 65_536
MAX_NAME_BYTES = 256

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


def pad(n: int, multiple: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // multiple) * multiple


# ---------------------------------------------------------------------------- parsing


class SafetensorsEntry(NamedTuple):
    """What the header says of a tensor: it lies within the file, and its bytes are those of dtype and shape."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # absolute offsets in the file
    end: int


class SafetensorsHeader(NamedTuple):
    """A checked header. Data begin at data_start, an absolute offset."""

    metadata: dict[str, str]
    entries: dict[str, SafetensorsEntry]  # in the order of the header
    data_start: int


def _checked_entry(name: str, raw: Any, data_start: int, data_bytes: int) -> SafetensorsEntry:
    label = f"tensor {name!r:.280}"
    if not 1 <= len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES:
        raise ModelFormatError(f"{label}: the name must have 1..{MAX_NAME_BYTES} bytes")
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelFormatError(f"{label}: needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ModelFormatError(f"{label}: unknown dtype {dtype!r:.80}")
    if not isinstance(shape, list) or len(shape) > 8:
        raise ModelFormatError(f"{label}: shape must be a list of at most 8 sizes")
    nbytes = DTYPE_BYTES[dtype]
    for size in shape:
        if type(size) is not int or not 0 <= size < 1 << 48:
            raise ModelFormatError(f"{label}: bad size in shape: {size!r:.80}")
        nbytes *= size
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        raise ModelFormatError(f"{label}: data_offsets must be two integers")
    begin, end = offsets
    if not 0 <= begin <= end <= data_bytes:
        raise ModelFormatError(f"{label}: bytes {begin}..{end} lie outside the file's {data_bytes} data bytes")
    if end - begin != nbytes:
        raise ModelFormatError(f"{label}: its shape needs {nbytes} bytes, it has {end - begin}")
    return SafetensorsEntry(dtype, tuple(shape), data_start + begin, data_start + end)


def parse_safetensors_header(buffer: Any, file_bytes: int) -> SafetensorsHeader:
    """Parse and check the header of any safetensors file.

    ``buffer`` is a slice-able view of at least the header's bytes. Checked: the caps, JSON without
    duplicate keys, dtype, shape against size, every range inside the file, no hole, no overlap,
    nothing after the last tensor.
    """
    if file_bytes < 8:
        raise ModelFormatError(f"the file has {file_bytes} bytes: not a safetensors file")
    header_bytes = int.from_bytes(buffer[:8], "little")
    if not 2 <= header_bytes <= MAX_HEADER_BYTES:
        raise ModelFormatError(f"header length {header_bytes} is not in 2..{MAX_HEADER_BYTES}: not a safetensors file")
    data_start = 8 + header_bytes
    if data_start > file_bytes:
        raise ModelFormatError(f"truncated: the header ends at {data_start} of {file_bytes} bytes")
    document = parse_json_object(bytes(buffer[8:data_start]), "safetensors header")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ModelFormatError("__metadata__ must map strings to strings")
    if len(document) > MAX_TENSORS:
        raise ModelFormatError(f"{len(document)} tensors, at most {MAX_TENSORS} are allowed")
    data_bytes = file_bytes - data_start
    entries = {name: _checked_entry(name, raw, data_start, data_bytes) for name, raw in document.items()}
    cursor = data_start
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != cursor:
            kind = "overlaps the tensor before it" if entry.begin < cursor else "leaves a hole"
            raise ModelFormatError(f"tensor {name!r} {kind}: begins at {entry.begin}, not {cursor}")
        cursor = entry.end
    if cursor != file_bytes:
        raise ModelFormatError(f"the tensors end at {cursor}, the file at {file_bytes} bytes")
    return SafetensorsHeader(metadata, entries, data_start)


# ---------------------------------------------------------------------------- building


class StoredTensor(NamedTuple):
    """A tensor as it is stored: safetensors dtype, shape, size in bytes; padding to 64 bytes is part of all three."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def vector_tensor(n: int, dtype: str) -> StoredTensor:
    """n values, then zeros up to a multiple of 64 bytes."""
    item = DTYPE_BYTES[dtype]
    nbytes = pad(n * item, ALIGNMENT)
    return StoredTensor(dtype, (nbytes // item,), nbytes)


def build_header(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> bytes:
    """The file's bytes up to its first tensor; the tensors follow one another in the order given."""
    document: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        document[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(document, separators=(",", ":")).encode()
    text = text.ljust(pad(len(text) + 8, ALIGNMENT) - 8, b" ")
    if len(text) > MAX_HEADER_BYTES:
        raise ModelFormatError(f"the header would have {len(text)} bytes")
    return len(text).to_bytes(8, "little") + text
