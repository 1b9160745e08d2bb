"""A frozen file taken apart and put together again, with other attachments or another header."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

from pyengine.format.inventory import ATTACHMENTS


class FrozenParts:
    """`parts`: the bytes of every tensor by name, in order; `metadata`, and what else the header says of each."""

    def __init__(self, data: bytes) -> None:
        length = int.from_bytes(data[:8], "little")
        self._entries: dict[str, Any] = json.loads(data[8 : 8 + length])
        self.metadata: dict[str, str] = self._entries.pop("__metadata__")
        body = data[8 + length :]
        self.parts = {name: body[slice(*entry["data_offsets"])] for name, entry in self._entries.items()}

    def attachment(self, name: str) -> bytes:
        return self.parts[name].rstrip(b" \n")

    def build(
        self,
        changes: Mapping[str, bytes] | None = None,
        metadata: Mapping[str, Any] | None = None,
        change_header: Callable[[dict[str, Any]], dict[str, Any]] = lambda header: header,
    ) -> bytes:
        """The file with some parts replaced; attachments are padded, and the header fits them before `change_header` sees it."""
        header: dict[str, Any] = {"__metadata__": self.metadata if metadata is None else metadata}
        body = []
        offset = 0
        for name, content in (self.parts | dict(changes or {})).items():
            if name in ATTACHMENTS:
                content = padded(name, content)
            entry = self._entries[name]
            shape = [len(content)] if name in ATTACHMENTS else entry["shape"]
            header[name] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [offset, offset + len(content)]}
            offset += len(content)
            body.append(content)
        text = json.dumps(change_header(header), separators=(",", ":")).encode()
        text = text.ljust(-(-(len(text) + 8) // 64) * 64 - 8)
        return struct.pack("<Q", len(text)) + text + b"".join(body)


def padded(name: str, content: bytes) -> bytes:
    return content.ljust(max(64, -(-len(content) // 64) * 64), b"\n" if name.endswith(".jinja") else b" ")
