"""A file that appears under its name only when it is whole."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

from .. import system
from ..errors import ModelFormatError
from ..files import open_regular

_PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if hasattr(errno, "EDQUOT") else (errno.ENOSPC, errno.EFBIG)
_LONGEST_NAME = 255 - len(f"..{'0' * 16}{_PARTIAL}")  # bytes; file systems allow 255


def _temporary_prefix(name: str) -> str:
    """How the temporary names of an output begin; its own name is in them if there is room."""
    encoded = os.fsencode(name)
    return f".{name if len(encoded) <= _LONGEST_NAME else hashlib.sha256(encoded).hexdigest()[:32]}."


def _remove_abandoned(directory: Path, prefix: str) -> None:
    """Delete what a killed writer of the same file left: its lock went with it."""
    for path in directory.glob(f"{glob.escape(prefix)}*{_PARTIAL}"):
        with contextlib.suppress(OSError, ModelFormatError):
            system.remove_if_unlocked(open_regular(path), path)


@contextlib.contextmanager
def _terminate_as_exception() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that temporary files go, unless somebody handles it."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    def unwind(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class WholeFile:
    """Write a file beside its place, and put it there at the end.

        with WholeFile(path, overwrite=False) as out:
            out.file.write(...)

    ``file`` is open for reading and writing bytes, and ``temporary`` its path until then. A clean exit of the block syncs and
    renames; any exception, Ctrl-C and SIGTERM included, removes the temporary file, and what a killed process left behind goes
    with the next attempt. Raises IsADirectoryError for a directory, FileExistsError if there is such a file, before and after,
    unless ``overwrite``, and OSError, which names the file to be: nobody has heard of the temporary one, and a full disk says no
    name.
    """

    file: IO[bytes]
    temporary: Path

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        self._path = path
        self._overwrite = overwrite
        self._refuse_existing()

    def _refuse_existing(self) -> None:
        if self._path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "the output is a directory", str(self._path))
        if self._path.exists() and not self._overwrite:
            raise FileExistsError(errno.EEXIST, "the output exists (overwrite=True replaces it)", str(self._path))

    def __enter__(self) -> WholeFile:
        prefix = _temporary_prefix(self._path.name)
        _remove_abandoned(self._path.parent, prefix)
        self._signals = _terminate_as_exception()
        self._signals.__enter__()
        try:
            self._create(prefix)
        except BaseException as error:
            self._discard()
            self._name(error)
            raise
        return self

    def _create(self, prefix: str) -> None:
        """Make the temporary file and lock it against ``_remove_abandoned`` of other writers."""
        flags = system.flags("O_CREAT", "O_EXCL", "O_RDWR")
        while True:
            self.temporary = self._path.with_name(f"{prefix}{secrets.token_hex(8)}{_PARTIAL}")
            self.file = os.fdopen(os.open(self.temporary, flags, 0o666), "w+b")
            system.lock_file(self.file, wait=True)
            if self.temporary.exists():
                return
            self.file.close()  # swept away in the moment before it was locked: once more

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            try:
                if kind is None:
                    self._finish()
            finally:
                self._discard()
        except OSError as failure:
            self._name(failure)
            raise
        self._name(error)

    def _finish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self._refuse_existing()
        system.replace_open(self.file, self.temporary, self._path)
        system.sync_directory(self._path.parent)

    def _name(self, error: BaseException | None) -> None:
        """Let what the system refused of the file name it."""
        if not isinstance(error, OSError):
            return
        is_ours = hasattr(self, "temporary") and error.filename == os.fspath(self.temporary)
        if is_ours or (error.filename is None and error.errno in _FULL):
            error.filename = os.fspath(self._path)

    def _discard(self) -> None:
        """Close, and remove the temporary file unless it has been renamed."""
        try:
            if hasattr(self, "file"):
                self.file.close()
        finally:
            if hasattr(self, "temporary"):
                self.temporary.unlink(missing_ok=True)
            self._signals.__exit__(None, None, None)
