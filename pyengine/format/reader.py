"""Open a frozen file.

``FrozenFile.open`` validates everything before anything uses the file, and reads nothing but its header and its ``config.json``:
this is the start-up path, so it imports neither numpy nor the tokenizer and takes milliseconds. The file comes from strangers;
whatever is wrong with it is a ``ModelFormatError`` that says what and where.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator

from ..errors import ModelFormatError, UnsupportedModelError, system_errors
from ..files import open_regular, path_of, read_aligned
from .config import FrozenConfig
from .container import ALIGNMENT, SafetensorsEntry, StoredTensor, parse_safetensors_header
from .inventory import (
    ATTACHMENTS,
    EXTRA_PREFIX,
    FORMAT_VERSION,
    MAX_ATTACHMENT_BYTES,
    REQUIRED_ATTACHMENTS,
    Weight,
    draft_inventory,
    inventory,
)
from .strict_json import parse_json_object


def _check_attachments(entries: dict[str, SafetensorsEntry], names: list[str]) -> None:
    order = [name for name in ATTACHMENTS if name in entries]
    if missing := [name for name in REQUIRED_ATTACHMENTS if name not in entries]:
        raise ModelFormatError(f"tensor {missing[0]!r} is missing")
    if names != order:
        raise ModelFormatError(f"the attachments are out of order: {', '.join(names)}")
    for name in names:
        entry = entries[name]
        size = entry.end - entry.begin
        if entry.dtype != "U8" or len(entry.shape) != 1 or size % ALIGNMENT or not size:
            raise ModelFormatError(f"attachment {name!r} must be U8, 1-D, a multiple of 64 bytes")
        if size > MAX_ATTACHMENT_BYTES:
            raise ModelFormatError(f"attachment {name!r} has {size} bytes, more than {MAX_ATTACHMENT_BYTES}")


def _check_tensors(entries: dict[str, SafetensorsEntry], weights: Iterable[Weight]) -> dict[str, str]:
    """Compare with what is needed: names, dtypes, shapes. Returns name -> kind of the weights' tensors."""
    kinds = {}
    for weight in weights:
        for name, needed in weight.stored().items():
            kinds[name] = weight.kind
            if name not in entries:
                raise ModelFormatError(f"tensor {name!r} is missing")
            if entries[name][:2] != needed[:2]:
                raise ModelFormatError(
                    f"tensor {name!r} is {entries[name].dtype} {list(entries[name].shape)}, the configuration needs "
                    f"{needed.dtype} {list(needed.shape)}"
                )
    return kinds


def _check_weights(entries: dict[str, SafetensorsEntry], config: FrozenConfig) -> dict[str, str]:
    """Compare with the inventory: its tensors, in its order, and no others. Returns name -> kind of them."""
    kinds = _check_tensors(entries, inventory(config))
    others = [name for name in entries if name not in kinds and name not in ATTACHMENTS]
    if strange := [name for name in others if not name.startswith(EXTRA_PREFIX)]:
        raise ModelFormatError(f"unknown tensor {strange[0]!r} for this configuration")
    attachments = [name for name in entries if name in ATTACHMENTS]
    if list(entries) != [*kinds, *others, *attachments]:
        raise ModelFormatError("the tensors are not in the order of the format")
    return kinds


class FrozenFile:
    """A validated frozen file. Use as a context manager or call ``close``.

    config         its configuration
    metadata       strings of its header: name, source, generator
    buffer         its bytes, from a page boundary on; views taken from it stay valid until they are released
    tensors        name -> (offset, size) in bytes of ``buffer``, every tensor; offsets are multiples of 64
    weights        name -> (offset, size, kind) of the inventory's
    draft_weights  the same of the draft head's; empty where there is none
    extra          name -> what is stored, of extra tensors
    """

    def __init__(self, path: str, buffer: mmap.mmap) -> None:
        """Validate ``buffer``; ``open`` is the usual way in."""
        header = parse_safetensors_header(buffer, len(buffer))
        entries = header.entries
        if header.metadata.get("format") != "pyengine":
            raise ModelFormatError("not a frozen pyengine file; of a Hugging Face model, name the directory that holds it")
        version = header.metadata.get("format_version")
        if version != FORMAT_VERSION:
            raise ModelFormatError(
                f"format_version {version!r:.80}, this version of pyengine reads {FORMAT_VERSION!r}: "
                "freeze the model again from its source, or use the version that wrote it"
            )
        if header.data_start % ALIGNMENT:
            raise ModelFormatError("the tensors do not start on a multiple of 64 bytes")
        cursor = header.data_start
        for name, entry in entries.items():
            if entry.begin != cursor or (entry.end - cursor) % ALIGNMENT:
                raise ModelFormatError(f"tensor {name!r} is out of order or not padded to 64 bytes")
            cursor = entry.end
        _check_attachments(entries, [name for name in entries if name in ATTACHMENTS])
        self.path = path
        self.buffer = buffer
        self.metadata = header.metadata
        self.tensors = {name: (e.begin, e.end - e.begin) for name, e in entries.items()}
        self.extra = {
            name: StoredTensor(e.dtype, e.shape, e.end - e.begin) for name, e in entries.items() if name.startswith(EXTRA_PREFIX)
        }
        self.config = FrozenConfig.from_json(self.attachment("config.json") or b"")
        kinds = _check_weights(entries, self.config)
        self.weights = {name: (*self.tensors[name], kind) for name, kind in kinds.items()}
        kinds = _check_tensors(entries, draft_inventory(self.config))
        self.draft_weights = {name: (*self.tensors[name], kind) for name, kind in kinds.items()}

    @classmethod
    def open(cls, path: str | os.PathLike[str], use_mmap: bool = True) -> FrozenFile:
        """Map (or, with ``use_mmap=False``, copy) and validate a file.

        A file that is truncated while it is mapped kills the process with SIGBUS: a copy is immune.
        Raises ModelFormatError for whatever is wrong with the content, UnsupportedModelError for what it needs and this version
        does not know, and what ``open_regular`` does.
        """
        path = path_of(path)
        with open_regular(path) as file, system_errors():
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise ModelFormatError(f"{path}: {size} bytes: not a frozen pyengine file")
            try:
                buffer = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if use_mmap else read_aligned(file)
            except ModelFormatError as error:
                raise ModelFormatError(f"{path}: {error}") from None
        try:
            return cls(path, buffer)
        except (ModelFormatError, UnsupportedModelError) as error:
            buffer.close()
            raise type(error)(f"{path}: {error}") from None

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights, without extra tensors and attachments."""
        return sum(size for _, size, _ in self.weights.values())

    @property
    def draft_bytes(self) -> int:
        """Bytes of the draft head's weights; 0 without one."""
        return sum(size for _, size, _ in self.draft_weights.values())

    def attachment(self, name: str) -> bytes | None:
        """The bytes of a JSON or text attachment without its padding, or None when the file has none."""
        if name not in self.tensors or name not in ATTACHMENTS:
            return None
        offset, size = self.tensors[name]
        return bytes(self.buffer[offset : offset + size]).rstrip(b"\n" if name.endswith(".jinja") else b" ")

    def check_codes(self) -> None:
        """Refuse code -128, which the format does not have. Reads every weight: not part of ``open``."""
        for name, (offset, size) in self.tensors.items():
            if name.endswith(".codes") and self.buffer.find(b"\x80", offset, offset + size) >= 0:
                raise ModelFormatError(f"{self.path}: tensor {name!r} holds the code -128")

    def close(self) -> None:
        # When somebody still holds a view, the map goes with the last view.
        with contextlib.suppress(BufferError):
            self.buffer.close()

    def __enter__(self) -> FrozenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def verify_checksums(frozen: FrozenFile) -> Iterator[tuple[str, bool]]:
    """Yield (tensor name, whether its SHA-256 is the one on file) for every tensor but checksums.json."""
    import hashlib

    sums = parse_json_object(frozen.attachment("checksums.json") or b"", "checksums.json")
    with memoryview(frozen.buffer) as view:
        for name, (offset, size) in frozen.tensors.items():
            if name != "checksums.json":
                with view[offset : offset + size] as part:
                    yield name, hashlib.sha256(part).hexdigest() == sums.get(name)
