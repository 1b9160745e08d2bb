"""GGUF models that are split into files, read as one.

Part i of n is named NAME-0000i-of-0000n.gguf and says so in its metadata (``split.no`` counts from 0). The first part has the
model's metadata, each has some of the tensors.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import ModelFormatError
from ..format.quantize import Float32Array, RowSource
from .fields import Fields
from .gguf import GGUFFile, GGUFTensor

_MAX_PARTS = 512  # each is an open file
_NAME = re.compile(r"(.*-)(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def part_paths(path: str | os.PathLike[str]) -> list[Path]:
    """All parts by their names, if this is the name of one; else the path alone."""
    path = Path(path)
    match = _NAME.fullmatch(path.name)
    count = int(match[3]) if match else 0
    if match is None or not 1 <= int(match[2]) <= count <= _MAX_PARTS:
        return [path]
    return [path.with_name(f"{match[1]}{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]


def _place(file: GGUFFile) -> tuple[int, int]:
    """(which part it is, of how many); one that is not split is the first of one."""
    split = Fields(file.metadata, file.path.name)
    count = split.integer("split.count", 1) or 1
    number = split.integer("split.no", 0)
    if not 0 <= number < count:
        raise ModelFormatError(f"{file.path.name}: part {number + 1} of {count} of a split model is none")
    return number, count


class SplitGGUF:
    """The parts of one model, all open; what ``GGUFFile`` is for one file."""

    def __init__(self, parts: list[GGUFFile]) -> None:
        self.path = parts[0].path
        self.metadata = parts[0].metadata
        self.tensors: dict[str, GGUFTensor] = {}
        self._parts = parts
        self._owners: dict[str, GGUFFile] = {}
        for part in parts:
            for name, tensor in part.tensors.items():
                if name in self.tensors:
                    raise ModelFormatError(f"{part.path.name}: tensor {name!r} is in another part too")
                self.tensors[name] = tensor
                self._owners[name] = part
        count = Fields(self.metadata, self.path.name).integer("split.tensors.count", len(self.tensors))
        if count != len(self.tensors):
            raise ModelFormatError(f"{self.path.name}: {len(self.tensors)} tensors in all parts, it claims {count}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def matrix(self, name: str) -> RowSource:
        return self._owners[name].matrix(name)

    def vector(self, name: str) -> Float32Array:
        return self._owners[name].vector(name)

    def close(self) -> None:
        for part in self._parts:
            part.close()


def _open_parts(first: GGUFFile, opened: list[GGUFFile]) -> None:
    """Open the parts that belong to ``first``, whichever it is, into ``opened``, in order."""
    number, count = _place(first)
    paths = part_paths(first.path)
    if len(paths) != count or paths[number].name != first.path.name:
        raise ModelFormatError(
            f"{first.path.name}: part {number + 1} of {count} of a split model; parts are found by their names, "
            f"NAME-{number + 1:05d}-of-{count:05d}.gguf, of at most {_MAX_PARTS}"
        )
    for i, path in enumerate(paths):
        if not path.exists():
            raise ModelFormatError(f"{first.path.name}: part {i + 1} of {count} is missing: {path.name}")
        part = first if i == number else GGUFFile(path)
        opened.append(part)
        if _place(part) != (i, count):
            raise ModelFormatError(f"{path.name}: it is not part {i + 1} of {count} by its metadata")


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile | SplitGGUF:
    """Open a GGUF model, all parts of one that is split; any part may be named. Raises ModelFormatError for a missing one."""
    file = GGUFFile(path)
    opened: list[GGUFFile] = []
    try:
        if _place(file)[1] == 1:
            return file
        _open_parts(file, opened)
        return SplitGGUF(opened)
    except BaseException:
        for part in {id(part): part for part in [file, *opened]}.values():
            part.close()
        raise
