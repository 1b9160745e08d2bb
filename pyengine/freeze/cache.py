"""The cache of frozen models: a directory of the user's alone, one file for each state of a source.

**Whose it is.** Whoever could put a file there could choose what the user runs: the directory is made with mode 0700, must belong
to the user and is never followed through a symbolic link; entries and their locks are opened inside it in the same way.

**When it is stale.** An entry's name has a digest of the path, inode, size and both times of every file that decides what the
source freezes to. The time of the last status change (ctime) is the one that nobody can set: a file that was altered and
given its old size and modification time is another file here. Nothing of the source is read for that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import SystemCallError, system_errors
from ..format.inventory import FORMAT_VERSION
from ..system import HAS_DIRECTORY_DESCRIPTORS, flags, lock_file

_REVISION = 4  # goes up when a source begins to freeze to other bytes of the same format
_ENTRY = re.compile(r"\.?[\w.-]{1,81}-[0-9a-f]{24}\.safetensors(\.lock|\.[0-9a-f]{16}\.partial)?")
_OPEN = flags("O_NOFOLLOW", "O_NONBLOCK")


def cache_directory() -> Path:
    """$PYENGINE_CACHE, else pyengine/ in the user's cache directory, as XDG or Windows has it. Raises SystemCallError if there is
    none."""
    if own := os.environ.get("PYENGINE_CACHE"):
        return Path(own)
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "pyengine"
    try:
        return Path.home() / ".cache" / "pyengine"
    except RuntimeError:  # neither HOME nor an entry in the list of users
        raise SystemCallError("there is no home directory to keep frozen models in; PYENGINE_CACHE names another") from None


def _identity(path: Path) -> bytes:
    """What changes whenever the file does; a file that is not there has an identity too."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return os.fsencode(path) + b"\0absent\n"
    numbers = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return os.fsencode(path) + f"\0{numbers}\n".encode()


class Origin(NamedTuple):
    """What an entry was frozen from: paths, and the name that it was given."""

    source: str
    tokenizer: str | None
    name: str | None


def cache_path(source: Path, files: Iterable[Path], name: str | None = None) -> Path:
    """The frozen file that belongs to ``source`` as it is now; ``files`` are those that decide what it freezes to."""
    digest = hashlib.sha256(f"format {FORMAT_VERSION}, freezer {_REVISION}\n".encode() + os.fsencode(source))
    for path in files:
        digest.update(_identity(path))
    stem = re.sub(r"[^\w.-]", "_", name or source.stem, flags=re.ASCII)[:80] or "_"
    return cache_directory() / f"{stem}-{digest.hexdigest()[:24]}.safetensors"


class _Directory:
    """The cache directory, open: what is in it is looked up there, and not by its path once more, if the system can do that."""

    def __init__(self, path: Path, fd: int | None) -> None:
        self._path, self._fd = path, fd

    def _name(self, name: str) -> str:
        return name if self._fd is not None else str(self._path / name)

    def open(self, name: str, flags: int) -> int:
        return os.open(self._name(name), flags | _OPEN, 0o600, dir_fd=self._fd)

    def stat(self, name: str) -> os.stat_result:
        return os.stat(self._name(name), dir_fd=self._fd, follow_symlinks=False)

    def unlink(self, name: str) -> None:
        os.unlink(self._name(name), dir_fd=self._fd)

    def names(self) -> list[str]:
        return sorted(os.listdir(self._path if self._fd is None else self._fd))

    def __enter__(self) -> _Directory:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)


def _is_ours(status: os.stat_result) -> bool:
    """Windows has no numbers of users: there, the user's profile is the user's by its access list."""
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()


def _open_directory(path: Path) -> _Directory:
    """The cache directory, made if need be. Raises SystemCallError if it is not the user's alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    except OSError as error:  # a home that may only be read, as services and containers have
        raise SystemCallError(f"the cache {path} cannot be made: {error.strerror}; PYENGINE_CACHE names another") from error
    if path.is_symlink() or not path.is_dir():
        raise SystemCallError(f"the cache {path} is no directory; PYENGINE_CACHE names another")
    if not HAS_DIRECTORY_DESCRIPTORS:
        return _Directory(path, None)
    fd = os.open(path, flags("O_RDONLY", "O_DIRECTORY") | _OPEN)
    try:
        _check_directory(path, fd)
    except BaseException:
        os.close(fd)
        raise
    return _Directory(path, fd)


def _check_directory(path: Path, fd: int) -> None:
    status, remedy = os.fstat(fd), "PYENGINE_CACHE names another"
    if not _is_ours(status):
        raise SystemCallError(f"the cache directory {path} belongs to another user; {remedy}")
    if status.st_mode & 0o022:
        raise SystemCallError(f"others may write to the cache directory {path}: 'chmod 700' it, or {remedy}")
    if status.st_mode & 0o077 and all(map(_ENTRY.fullmatch, os.listdir(fd))):
        os.fchmod(fd, 0o700)  # made by somebody with another umask, and used for nothing else


def _is_entry(directory: _Directory, name: str) -> bool:
    """Whether there is a finished entry of this name. Raises SystemCallError for anything else under it."""
    try:
        status = directory.stat(name)
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(status.st_mode) or not _is_ours(status):
        raise SystemCallError(f"{name} in the cache is not a file of ours; remove it")
    return True


@contextlib.contextmanager
def missing(path: Path, origin: Origin) -> Iterator[bool]:
    """Whether the entry ``path`` has to be made. While it is being made others wait: of several processes one makes it.

    The lock file stays, removing it would let two holders in, and says where the entry comes from. Raises SystemCallError where
    the directory cannot be used, or where somebody else could have put something there.
    """
    with system_errors(), _open_directory(path.parent) as directory:
        if _is_entry(directory, path.name):
            yield False
            return
        with open(directory.open(f".{path.name}.lock", os.O_RDWR | os.O_CREAT), "rb") as lock:
            if not stat.S_ISREG(os.fstat(lock.fileno()).st_mode):
                raise SystemCallError(f".{path.name}.lock in the cache is not a file of ours; remove it")
            lock_file(lock, wait=True)
            is_missing = not _is_entry(directory, path.name)
            if is_missing:
                os.ftruncate(lock.fileno(), 0)
                os.write(lock.fileno(), json.dumps(origin).encode())  # at 0: nothing has been read
            yield is_missing


# -------------------------------------------------------------------- what is in it


class Entry(NamedTuple):
    """A file of the cache. size in bytes; origin None where it is not known (made by an earlier version)."""

    path: Path
    size: int
    origin: Origin | None


def entries() -> list[Entry]:
    """Every frozen model of the cache, by name. Raises SystemCallError for a directory that cannot be used."""
    return [entry for entry in _listing() if entry.path.suffix == ".safetensors"]


def leftovers() -> list[Path]:
    """Files that a freeze left behind when its process was killed; those of one that is at work are not among them."""
    return [entry.path for entry in _listing() if entry.path.suffix == ".partial" and not _is_locked(entry.path)]


def remove(path: Path) -> None:
    """Take an entry out of the cache; processes that have it open keep it. Raises SystemCallError."""
    with system_errors(), _open_directory(path.parent) as directory:
        directory.unlink(path.name)


def _listing() -> list[Entry]:
    path = cache_directory()
    if not path.is_dir():
        return []
    with system_errors(), _open_directory(path) as directory:
        files = {name: directory.stat(name) for name in directory.names() if _ENTRY.fullmatch(name)}
    sizes = {path / name: status.st_size for name, status in files.items() if stat.S_ISREG(status.st_mode)}
    return [Entry(file, size, _origin(file)) for file, size in sizes.items()]


def _lock_of(path: Path) -> Path:
    entry = re.sub(r"\.[0-9a-f]{16}\.partial$", "", path.name).lstrip(".")
    return path.with_name(f".{entry}.lock")


def _origin(path: Path) -> Origin | None:
    """What its lock file says, if it says anything."""
    try:
        with open(os.open(_lock_of(path), os.O_RDONLY | _OPEN), "rb") as lock:
            values = json.loads(lock.read(1 << 16))
    except (OSError, ValueError):
        return None
    plain = isinstance(values, list) and len(values) == 3 and isinstance(values[0], str)
    return Origin(*values) if plain and all(value is None or isinstance(value, str) for value in values) else None


def _is_locked(path: Path) -> bool:
    try:
        with open(os.open(_lock_of(path), os.O_RDWR | _OPEN), "rb") as lock:
            lock_file(lock, wait=False)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
