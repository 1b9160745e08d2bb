"""Writing a frozen file: streamed, checksummed, visible under its name only when whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import InvalidArgumentError
from .config import FrozenConfig
from .container import ALIGNMENT, StoredTensor, build_header, pad
from .inventory import (
    ATTACHMENTS,
    EXTRA_PREFIX,
    FORMAT_VERSION,
    GOLDEN_BYTES,
    stored_draft_tensors,
    stored_tensors,
)
from .whole_file import WholeFile

GoldenCallback = Callable[[str], "bytes | None"]


def _attachment_bytes(name: str, content: bytes) -> bytes:
    """Content padded to 64 bytes in a way that stripping it keeps what the text means."""
    if name.endswith(".jinja"):
        if content.endswith(b"\n\n"):
            # Jinja drops one final newline and the reader strips them all: keep the others with a
            # comment.
            content = content[:-1] + b"{# #}"
        return content.ljust(pad(max(len(content), 1), ALIGNMENT), b"\n")
    return content.ljust(pad(max(len(content), 1), ALIGNMENT), b" ")


def _checksums_json(sums: dict[str, str]) -> bytes:
    return json.dumps(sums, indent=0).encode()


class FrozenWriter:
    """Write the tensors of ``stored_tensors(config)``, then ``extra`` ones, in that order, each as a stream of chunks.

        with FrozenWriter(path, config, attachments, name="...", source="...") as writer:
            for name in writer.names:
                writer.write(name, chunks_of(name))

    ``extra``: name -> what is stored, a draft head's tensors among them if the configuration has one.
    A clean exit of the block writes the attachments, asks ``golden`` (called with the path of the
    complete temporary file) for the content of golden.json, and puts the file into its place
    (``WholeFile``).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: FrozenConfig,
        attachments: dict[str, bytes],
        *,
        name: str,
        source: str,
        generator: str = "pyengine",
        extra: Mapping[str, StoredTensor] | None = None,
        golden: GoldenCallback | None = None,
        overwrite: bool = False,
    ) -> None:
        self._out = WholeFile(Path(path), overwrite=overwrite)
        self._golden = golden
        if unknown := set(attachments) - set(ATTACHMENTS[1:-2]):
            raise InvalidArgumentError(f"unknown attachment {sorted(unknown)[0]!r}")
        if "tokenizer.json" not in attachments:
            raise InvalidArgumentError("the attachment tokenizer.json is missing")
        extra = dict(extra or {})
        if strange := [one for one in extra if not one.startswith(EXTRA_PREFIX)]:
            raise InvalidArgumentError(f"the extra tensor {strange[0]!r} has a name without {EXTRA_PREFIX!r}")
        if not stored_draft_tensors(config).items() <= extra.items():
            raise InvalidArgumentError("the configuration has a draft head, and its tensors are not among the extra ones")
        weights = stored_tensors(config) | extra
        self.names = list(weights)
        attachments = {"config.json": config.to_json().encode(), **attachments, "golden.json": b"{}"}
        self._attachments = {r: _attachment_bytes(r, attachments[r]) for r in ATTACHMENTS if r in attachments}
        self._attachments["golden.json"] = b"{}".ljust(GOLDEN_BYTES)
        self._tensors = weights | {
            r: StoredTensor("U8", (len(content),), len(content)) for r, content in self._attachments.items()
        }
        zeros = dict.fromkeys(self._tensors, "0" * 64)
        size = len(_attachment_bytes("checksums.json", _checksums_json(zeros)))
        self._tensors["checksums.json"] = StoredTensor("U8", (size,), size)
        self._header = build_header(
            self._tensors,
            {
                "format": "pyengine",
                "format_version": FORMAT_VERSION,
                "name": name,
                "source": source,
                "generator": generator,
            },
        )
        self.total_bytes = len(self._header) + sum(s.nbytes for s in self._tensors.values())
        self._sums: dict[str, str] = {}
        self._next = 0
        self.bytes_written = len(self._header)

    def __enter__(self) -> FrozenWriter:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._out)
            self._out.file.write(self._header)
            stack.pop_all()  # nothing went wrong: __exit__ ends it
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._out.__exit__(kind, error, trace)
            return
        with contextlib.ExitStack() as stack:
            stack.push(self._out)
            self._finish()

    def write(self, name: str, chunks: Iterable[Any]) -> None:
        """Append a tensor from buffers that together have its size, or less by under 64 bytes of padding."""
        if self._next >= len(self.names) or self.names[self._next] != name:
            raise InvalidArgumentError(f"tensor {name!r} is not the next one in the file")
        digest = hashlib.sha256()
        nbytes = self._tensors[name].nbytes
        done = 0
        for chunk in chunks:
            with memoryview(chunk) as view:
                done += view.nbytes
                self._out.file.write(view)
                digest.update(view)
        if not 0 <= nbytes - done < ALIGNMENT:
            raise InvalidArgumentError(f"tensor {name!r} needs {nbytes} bytes, {done} were given")
        padding = bytes(nbytes - done)
        self._out.file.write(padding)
        digest.update(padding)
        self._sums[name] = digest.hexdigest()
        self._next += 1
        self.bytes_written += nbytes

    def _write_tail(self) -> None:
        """Attachments and checksums, from wherever the weights end."""
        for name, content in self._attachments.items():
            self._out.file.write(content)
            self._sums[name] = hashlib.sha256(content).hexdigest()
        self._out.file.write(_attachment_bytes("checksums.json", _checksums_json(self._sums)))
        self._out.file.flush()

    def _finish(self) -> None:
        if self._next != len(self.names):
            raise InvalidArgumentError(f"tensor {self.names[self._next]!r} was not written")
        tail = self._out.file.tell()
        self._write_tail()
        golden = self._golden(str(self._out.temporary)) if self._golden else None
        if golden is not None:
            if len(golden) > GOLDEN_BYTES:
                raise InvalidArgumentError(f"golden.json has {len(golden)} > {GOLDEN_BYTES} bytes")
            self._attachments["golden.json"] = golden.ljust(GOLDEN_BYTES)
            self._out.file.seek(tail)
            self._write_tail()
