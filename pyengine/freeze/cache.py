"""The cache of frozen models: a directory of the user's alone, one file for each state of a source.

**Whose it is.** Whoever could put a file there could choose what the user runs: the directory is made with mode 0700, must belong
to the user and is never followed through a symbolic link; entries and their locks are opened inside it in the same way.

**When it is stale.** An entry's name has a digest of the path, inode, size and both times of every file that decides what the
source freezes to. The time of the last status change (ctime) is the one that nobody can set: a file that was altered and
given its old size and modification time is another file here. Nothing of the source is read for that.
"""

from __future__ import annotations

import contextlib
import fcntl
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

_REVISION = 4  # goes up when a source begins to freeze to other bytes of the same format
_ENTRY = re.compile(r"\.?[\w.-]{1,81}-[0-9a-f]{24}\.safetensors(\.lock|\.[0-9a-f]{16}\.partial)?")
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def cache_directory() -> Path:
    """$PYENGINE_CACHE, else pyengine/ in the user's cache directory as XDG has it. Raises SystemCallError if there is none."""
    if own := os.environ.get("PYENGINE_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME", "")
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


def _open_directory(path: Path) -> int:
    """The cache directory, made if need be. Raises SystemCallError if it is not the user's alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    remedy = "PYENGINE_CACHE names another"
    if path.is_symlink() or not path.is_dir():
        raise SystemCallError(f"the cache {path} is no directory; {remedy}")
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _OPEN)
    try:
        status = os.fstat(directory)
        if status.st_uid != os.geteuid():
            raise SystemCallError(f"the cache directory {path} belongs to another user; {remedy}")
        if status.st_mode & 0o022:
            raise SystemCallError(f"others may write to the cache directory {path}: 'chmod 700' it, or {remedy}")
        if status.st_mode & 0o077 and all(map(_ENTRY.fullmatch, os.listdir(directory))):
            os.fchmod(directory, 0o700)  # made by somebody with another umask, and used for nothing else
    except BaseException:
        os.close(directory)
        raise
    return directory


def _is_entry(directory: int, name: str) -> bool:
    """Whether there is a finished entry of this name. Raises SystemCallError for anything else under it."""
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise SystemCallError(f"{name} in the cache is not a file of ours; remove it")
    return True


@contextlib.contextmanager
def missing(path: Path, origin: Origin) -> Iterator[bool]:
    """Whether the entry ``path`` has to be made. While it is being made others wait: of several processes one makes it.

    The lock file stays, removing it would let two holders in, and says where the entry comes from. Raises SystemCallError where
    the directory cannot be used, or where somebody else could have put something there.
    """
    with system_errors():
        directory = _open_directory(path.parent)
        try:
            if _is_entry(directory, path.name):
                yield False
                return
            flags = os.O_RDWR | os.O_CREAT | _OPEN
            with open(os.open(f".{path.name}.lock", flags, 0o600, dir_fd=directory), "rb") as lock:
                if not stat.S_ISREG(os.fstat(lock.fileno()).st_mode):
                    raise SystemCallError(f".{path.name}.lock in the cache is not a file of ours; remove it")
                fcntl.flock(lock, fcntl.LOCK_EX)
                is_missing = not _is_entry(directory, path.name)
                if is_missing:
                    os.ftruncate(lock.fileno(), 0)
                    os.pwrite(lock.fileno(), json.dumps(origin).encode(), 0)
                yield is_missing
        finally:
            os.close(directory)


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
    with system_errors():
        directory = _open_directory(path.parent)
        try:
            os.unlink(path.name, dir_fd=directory)
        finally:
            os.close(directory)


def _listing() -> list[Entry]:
    path = cache_directory()
    if not path.is_dir():
        return []
    with system_errors():
        directory = _open_directory(path)
        try:
            names = [name for name in sorted(os.listdir(directory)) if _ENTRY.fullmatch(name)]
            files = {name: os.stat(name, dir_fd=directory, follow_symlinks=False) for name in names}
        finally:
            os.close(directory)
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
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
