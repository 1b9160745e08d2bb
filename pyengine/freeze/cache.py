"""The cache of frozen models: one file per source, path, size, time and header content included in
its name.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import SystemCallError
from ..format.inventory import FORMAT_VERSION

_HEADER_BYTES = 1 << 20


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


def _fingerprint(path: Path) -> bytes:
    """Path, size, modification time and a hash of the first MiB, where the header is."""
    status = path.stat()
    with open(path, "rb") as file:
        head = hashlib.sha256(file.read(_HEADER_BYTES)).hexdigest()
    return f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0{head}\n".encode()


def cache_path(source: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None) -> Path:
    """The frozen file that belongs to ``source`` as it is now."""
    source = Path(source).resolve()
    files = [source]
    if source.is_dir():
        files = sorted(
            path for path in source.iterdir() if path.suffix in (".json", ".safetensors", ".jinja") and path.is_file()
        )
    if tokenizer is not None:
        files.append(Path(tokenizer).resolve())
    digest = hashlib.sha256(f"format {FORMAT_VERSION}\n{source}\n".encode())
    for path in files:
        digest.update(_fingerprint(path))
    return cache_directory() / f"{source.stem[:80]}-{digest.hexdigest()[:24]}.safetensors"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a cache entry. The lock file stays: removing it would let two holders in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
