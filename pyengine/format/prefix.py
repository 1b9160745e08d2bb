"""A file of computed keys and values: the beginning of prompts, computed once and read by whoever asks next.

An ordinary safetensors file:

    __metadata__  format "pyengine-prefix", format_version, model (what the keys and values depend on: `model_digest`), kv_dtype,
                  layout (parts of a page, as of n_ctx), sha256 of the tensors
    keys_values   U8 (n_bytes): csrc/kv_snapshot.h
    tokens        I32 (n_tokens)

By the promise of csrc/FORMAT.md section 9 they are the bytes that a forward would write, on any machine. The file comes from
strangers like any other: whoever lets one in trusts its maker with what the model has read, and with no more.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import sys
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import InvalidArgumentError, ModelFormatError, system_errors
from ..files import open_regular, path_of, read_aligned
from .container import ALIGNMENT, SafetensorsHeader, StoredTensor, build_header, pad, parse_safetensors_header
from .inventory import FORMAT_VERSION
from .kv import KvLayout
from .reader import FrozenFile
from .whole_file import WholeFile

FORMAT = "pyengine-prefix"
VERSION = "1"


def model_digest(file: FrozenFile) -> str:
    """What stands for a model: the version of the arithmetic, its shape, and its tensors' checksums as the file gives them.

    A file whose tensors are others than it says is damaged, which `pyengine verify` finds; to hash all weights at every start
    would take longer than most prefixes save."""
    digest = hashlib.sha256(FORMAT_VERSION.encode())
    for name in ("config.json", "checksums.json"):
        content = file.attachment(name) or b""
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


class PrefixKey(NamedTuple):
    """What keys and values are only good for: a model, a type of cache, and parts of pages of this size."""

    model: str
    kv_dtype: str
    layout: KvLayout

    def metadata(self) -> dict[str, str]:
        layout = ",".join(map(str, self.layout))
        return {"format": FORMAT, "format_version": VERSION, "model": self.model, "kv_dtype": self.kv_dtype, "layout": layout}


def _digest(tokens: bytes, keys_values: memoryview | bytearray) -> str:
    digest = hashlib.sha256(tokens)
    digest.update(keys_values)
    return digest.hexdigest()


def _little_endian(tokens: array[int]) -> array[int]:
    """int32 as the file has them, or back."""
    if sys.byteorder == "big":
        tokens = array("i", tokens)
        tokens.byteswap()
    return tokens


def write_prefix(path: str | os.PathLike[str], key: PrefixKey, tokens: array[int], keys_values: bytearray) -> None:
    """Write a file, visible under its name only when whole; one that is there is replaced. Raises what `open` raises."""
    path = path_of(path)
    ids = _little_endian(tokens).tobytes()
    stored = {
        "keys_values": StoredTensor("U8", (len(keys_values),), len(keys_values)),
        "tokens": StoredTensor("I32", (len(tokens),), len(ids)),
    }
    header = build_header(stored, key.metadata() | {"sha256": _digest(ids, keys_values)})
    with system_errors(), WholeFile(Path(path), overwrite=True) as out:
        out.file.writelines((header, keys_values, ids))


def _check_key(metadata: Mapping[str, str], key: PrefixKey) -> None:
    wanted = key.metadata()
    if metadata.get("format") != FORMAT:
        raise ModelFormatError("not a file of keys and values (Engine.save_prefix writes one)")
    if metadata.get("format_version") != VERSION:
        raise ModelFormatError(f"version {metadata.get('format_version')!r:.80}, this version of pyengine reads {VERSION!r}")
    for name, what in (("model", "another model"), ("kv_dtype", "another kv_dtype"), ("layout", "an engine with another n_ctx")):
        if metadata.get(name) != wanted[name]:
            raise InvalidArgumentError(f"was computed with {what}: save it anew")


class Prefix(NamedTuple):
    """tokens (n) int32; keys_values bytes, aligned to 64, valid while the file is open."""

    tokens: array[int]
    keys_values: memoryview


def _parse(buffer: mmap.mmap, header: SafetensorsHeader, key: PrefixKey) -> Prefix:
    _check_key(header.metadata, key)
    if list(header.entries) != ["keys_values", "tokens"] or header.data_start % ALIGNMENT:
        raise ModelFormatError("needs the tensors keys_values and tokens, and no others, from a multiple of 64 bytes on")
    data, ids = header.entries["keys_values"], header.entries["tokens"]
    n_tokens = (ids.end - ids.begin) // 4
    if data.dtype != "U8" or ids.dtype != "I32" or n_tokens == 0 or data.end != pad(data.end, ALIGNMENT):
        raise ModelFormatError("needs keys_values of U8 and 1 or more tokens of I32")
    tokens = _little_endian(array("i", buffer[ids.begin : ids.end]))
    with memoryview(buffer) as whole:
        return Prefix(tokens, whole[data.begin : data.end])


@contextlib.contextmanager
def read_prefix(path: str | os.PathLike[str], key: PrefixKey) -> Iterator[Prefix]:
    """Read a file and check all of it but the numbers in keys_values.

    Raises ModelFormatError for what is no such file, or damaged, InvalidArgumentError for one that does not belong to `key`, and
    what ``open_regular`` does."""
    path = path_of(path)
    with open_regular(path) as file:
        try:
            with system_errors():
                buffer = read_aligned(file)
            with buffer:
                header = parse_safetensors_header(buffer, len(buffer))
                prefix = _parse(buffer, header, key)
                with prefix.keys_values:
                    if header.metadata.get("sha256") != _digest(_little_endian(prefix.tokens).tobytes(), prefix.keys_values):
                        raise ModelFormatError("damaged: its checksum is another")
                    yield prefix
        except (ModelFormatError, InvalidArgumentError) as error:
            raise type(error)(f"{path}: {error}") from None
