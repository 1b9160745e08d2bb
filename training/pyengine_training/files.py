"""Writing files so that a crash at any moment leaves either the old state or the new one, and the
safetensors container.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError

Array = NDArray[Any]
MAX_HEADER = 100 << 20

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # widened to float32 on reading
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items() if name != "BF16"}


def package_digest() -> str:
    """SHA-256 of this package's Python files: the same program has the same."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def fsync_directory(path: Path) -> None:
    """Make a rename inside ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A write that fails (a full disk) names no file: it is this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with _naming(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, kinds: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object; CheckpointError names the file when it is missing or damaged. kinds: entries that it must have, and their
    type (or several)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    wrong = [name for name, kind in (kinds or {}).items() if name not in value or not isinstance(value[name], kind)]
    if wrong:
        raise CheckpointError(f"{path} is damaged: {', '.join(wrong)} missing or malformed")
    return value


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; rename it there when the block ends well, remove it otherwise."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with _naming(path):
            yield temporary
            for file in temporary.iterdir():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            fsync_directory(temporary)
            if path.exists():
                shutil.rmtree(path)
            os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(path.parent)


def save_safetensors(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays in the given order. Not atomic by itself: use inside :func:`atomic_directory`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype.newbyteorder("<")],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).data)


@contextmanager
def new_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, Array]]:
    """float32 arrays, zero at first, that are a new file's tensors: what is written to them is in the file.

    The space is taken first, so that a full disk is an OSError and not a signal.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * int(np.prod(shape, dtype=object))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.flush()
        os.posix_fallocate(file.fileno(), file.tell(), offset)
    body = np.memmap(path, np.uint8, "r+", offset=8 + len(text), shape=(offset,))
    yield {
        name: body[slice(*entry["data_offsets"])].view(np.float32).reshape(entry["shape"])
        for name, entry in header.items()
    }
    body.flush()


def load_safetensors(path: Path) -> dict[str, Array]:
    """Name -> array, mapped read-only; BF16 comes back widened to float32. Damage raises CheckpointError."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(f"{path}: the header's length does not fit the file")
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    body = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else b""
    data = np.frombuffer(body, np.uint8) if isinstance(body, bytes) else body
    return {name: _tensor(path, name, entry, data) for name, entry in header.items() if name != "__metadata__"}


def _tensor(path: Path, name: str, entry: Any, data: Array) -> Array:
    """One entry of the header, checked against the file."""
    try:
        kind = entry["dtype"]
        if isinstance(kind, str) and kind not in _DTYPES:
            raise CheckpointError(f"{path}: tensor {name!r} has the type {kind}; the trainer reads {', '.join(_DTYPES)}")
        dtype = _DTYPES[kind]
        shape = tuple(int(n) for n in entry["shape"])
        start, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: tensor {name!r} is described wrongly: {error}") from error
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if min(shape, default=0) < 0 or not 0 <= start <= end <= data.size:
        raise CheckpointError(f"{path}: tensor {name!r} lies outside the file (truncated?)")
    if count * dtype.itemsize != end - start:
        raise CheckpointError(f"{path}: tensor {name!r} has the wrong size for its shape")
    raw: Array = np.frombuffer(data[start:end].tobytes(), dtype).reshape(shape)
    if entry["dtype"] == "BF16":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return raw
