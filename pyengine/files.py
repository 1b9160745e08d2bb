"""Opening files that strangers may have made: the one way in for everything that reads a model.

Where a model file is expected there may be a FIFO, whose open would wait for ever, a device, whose open may do something, a
socket or a directory; or a Git LFS pointer, a line of text that stands for a file which was never fetched.
"""

from __future__ import annotations

import io
import mmap
import os
import stat

from pyengine import system
from pyengine.errors import InvalidArgumentError, ModelFormatError, system_errors

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# No waiting for a writer, and no terminal of our own.
_FLAGS = system.flags("O_RDONLY", "O_NONBLOCK", "O_NOCTTY")

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LFS_POINTER_BYTES = 1024  # pointers are smaller, as their specification says
_MAX_SAFETENSORS_HEADER = 100_000_000  # as in the reference implementation


def path_of(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> str:
    """A path as a string. Raises InvalidArgumentError for what is none, or none that a system call could take."""
    try:
        text = os.fsdecode(path)
        if b"\0" not in os.fsencode(text):
            return text
    except TypeError:
        raise InvalidArgumentError(f"a path is a string or os.PathLike, not {type(path).__name__}") from None
    except UnicodeEncodeError:
        pass
    raise InvalidArgumentError(f"{path!r:.200} is no path")


def _check_regular(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "of an unknown kind")
        raise ModelFormatError(f"{path}: not a regular file ({kind})")


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a regular file for reading, unbuffered, without ever waiting.

    Raises ModelFormatError for anything else and for Git LFS pointers, MissingFileError and its like as `open` raises theirs,
    InvalidArgumentError for what is no path.
    """
    path = path_of(path)
    with system_errors():
        _check_regular(path, os.stat(path))  # before: opening a device can do something already
        fd = os.open(path, _FLAGS)
        try:
            status = os.fstat(fd)
            _check_regular(path, status)  # and after: by then the name may have meant another file
            if status.st_size < _LFS_POINTER_BYTES and system.read_at(fd, 64, 0).startswith(_LFS_POINTER):
                raise ModelFormatError(
                    f"{path}: a Git LFS pointer and not the file itself; fetch it with 'git lfs pull'"
                )
            return io.FileIO(fd)
        except BaseException:
            os.close(fd)
            raise


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """The whole content of a file of at most `limit` bytes. Raises what open_regular does, ModelFormatError for a larger one."""
    with open_regular(path) as file, system_errors():
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > limit else file.read(size + 1)
    if max(size, len(data)) > limit:
        raise ModelFormatError(f"{os.fspath(path)}: larger than {limit} bytes")
    return data


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as safetensors do: the length of a header, and a header. Raises what open_regular does."""
    with open_regular(path) as file, system_errors():
        head = system.read_at(file.fileno(), 9, 0)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_SAFETENSORS_HEADER


def read_aligned(file: io.FileIO) -> mmap.mmap:
    """The content of a file that open_regular opened in an anonymous map: nobody can change it any more, and it begins on a page,
    which the core counts on. Raises ModelFormatError for an empty file, and for one that shrinks while it is read."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise ModelFormatError("an empty file")
    buffer = mmap.mmap(-1, size)
    with memoryview(buffer) as view:
        done = 0
        while done < size and (n := file.readinto(view[done : done + (1 << 28)])):
            done += n
    if done < size:
        raise ModelFormatError(f"shrank to {done} bytes while it was read")
    return buffer
