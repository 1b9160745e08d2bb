"""Tensors of safetensors files by name, for whatever reads such files: a directory's weights, an adapter's."""

from __future__ import annotations

import io
import math
from pathlib import Path

from ..errors import ModelFormatError, UnsupportedModelError
from ..files import open_regular
from ..format.container import MAX_HEADER_BYTES, SafetensorsEntry, parse_safetensors_header
from ..format.quantize import Float32Array, RowSource
from .sources import FLOAT_CONVERTERS, FileRows


class SafetensorsReader:
    """The tensors of one or many safetensors files, read by rows."""

    def __init__(self, paths: list[Path]) -> None:
        self._files: list[io.FileIO] = []
        self._entries: dict[str, tuple[int, SafetensorsEntry]] = {}
        try:
            for path in paths:
                self._add(path)
        except BaseException:
            self.close()
            raise

    def _add(self, path: Path) -> None:
        file = open_regular(path)
        self._files.append(file)
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
        length = min(int.from_bytes(start, "little"), size, MAX_HEADER_BYTES)
        try:
            header = parse_safetensors_header(start + file.read(length), size)
        except ModelFormatError as error:
            raise ModelFormatError(f"{path.name}: {error}") from None
        for name, entry in header.entries.items():
            if name in self._entries:
                raise ModelFormatError(f"{path.name}: tensor {name!r} is in another shard too")
            self._entries[name] = (file.fileno(), entry)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, (_, entry) in self._entries.items()}

    def stored(self, name: str) -> tuple[int, SafetensorsEntry]:
        """The file's descriptor, and dtype, shape and offsets."""
        return self._entries[name]

    def matrix(self, name: str) -> RowSource:
        fd, entry = self.stored(name)
        if entry.dtype not in FLOAT_CONVERTERS:
            raise UnsupportedModelError(f"tensor {name!r}: dtype {entry.dtype} is not implemented")
        rows, columns = math.prod(entry.shape[:-1]), math.prod(entry.shape[-1:])  # of experts, all under each other
        row_bytes = (entry.end - entry.begin) // rows
        return FileRows(name, fd, entry.begin, (rows, columns), row_bytes, FLOAT_CONVERTERS[entry.dtype])

    def vector(self, name: str) -> Float32Array:
        return self.matrix(name).read_rows(0, 1).reshape(-1)

    def close(self) -> None:
        for file in self._files:
            file.close()
