"""What operating systems do not have in common, as far as this package needs it: flags, reads at an offset, locks, syncing.

Linux and macOS have what POSIX says. Windows has no flock, no pread and no descriptors of directories, and does not remove or
replace a file that somebody has open.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:
    fcntl = None


def flags(*names: str) -> int:
    """These flags of os.open, of which a system may not have some; files are bytes and are not handed to other programs."""
    total = 0
    for name in (*names, "O_CLOEXEC", "O_NOINHERIT", "O_BINARY"):
        total |= getattr(os, name, 0)
    return total


HAS_DIRECTORY_DESCRIPTORS = os.open in os.supports_dir_fd
REMOVES_OPEN_FILES = os.name != "nt"

_seeking = threading.Lock()


def read_at(fd: int, n_bytes: int, offset: int) -> bytes:
    """What os.pread says: up to n_bytes from there, without a look at where the descriptor stands. Threads may share it."""
    if hasattr(os, "pread"):
        return os.pread(fd, n_bytes, offset)
    with _seeking:
        stood = os.lseek(fd, 0, os.SEEK_CUR)
        try:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.read(fd, min(n_bytes, 1 << 30))
        finally:
            os.lseek(fd, stood, os.SEEK_SET)


def lock_file(file: IO[Any], *, wait: bool) -> None:
    """Hold the file alone until it is closed. Raises BlockingIOError if somebody else holds it and wait is False.

    Where a system has no such locks, nothing is held: two processes may then do the same work, and the later one's stays.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    elif sys.platform == "win32":
        _lock_file_on_windows(file.fileno(), wait)


def sync_directory(path: Path) -> None:
    """Make sure that a file which was renamed into the directory is there after a power failure; NTFS has a journal for that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    directory = os.open(path, flags("O_RDONLY", "O_DIRECTORY"))
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def replace_open(file: IO[Any], temporary: Path, path: Path) -> None:
    """Rename the temporary file, which `file` has open and locked, to `path`; closes it first where that has to be."""
    if not REMOVES_OPEN_FILES:
        file.close()
    os.replace(temporary, path)


def remove_if_unlocked(file: IO[Any], path: Path) -> None:
    """Delete the file at `path`, which `file` has open, unless somebody holds it. Raises OSError; closes `file`."""
    with contextlib.closing(file):
        lock_file(file, wait=False)
        if REMOVES_OPEN_FILES:
            path.unlink()
    if not REMOVES_OPEN_FILES:
        path.unlink()


def machine_memory() -> int:
    """The machine's memory, in bytes."""
    if sys.platform == "win32":
        return _machine_memory_on_windows()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory() -> int:
    """The most memory that this process has had, mapped files included, in bytes."""
    if sys.platform == "win32":
        return _peak_memory_on_windows()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


if sys.platform == "win32":
    import ctypes
    import errno
    import msvcrt

    class _Overlapped(ctypes.Structure):
        """OVERLAPPED: here, the place of the lock."""

        _fields_ = (
            ("internal", ctypes.c_size_t),
            ("internal_high", ctypes.c_size_t),
            ("offset", ctypes.c_uint32),
            ("offset_high", ctypes.c_uint32),
            ("event", ctypes.c_void_p),
        )

    _FAIL_IMMEDIATELY, _EXCLUSIVE = 1, 2
    _ERROR_LOCK_VIOLATION = 33
    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    _kernel32.LockFileEx.argtypes = (
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, ctypes.POINTER(_Overlapped),
    )

    def _lock_file_on_windows(fd: int, wait: bool) -> None:
        """One byte far behind every end: what is locked on Windows, others cannot read."""
        place = _Overlapped(offset_high=0x7FFFFFFF)
        how = _EXCLUSIVE | (0 if wait else _FAIL_IMMEDIATELY)
        if not _kernel32.LockFileEx(msvcrt.get_osfhandle(fd), how, 0, 1, 0, ctypes.byref(place)):
            error = ctypes.get_last_error()
            if error == _ERROR_LOCK_VIOLATION:
                raise BlockingIOError(errno.EAGAIN, "another process has locked the file")
            raise ctypes.WinError(error)

    class _MemoryCounters(ctypes.Structure):
        """PROCESS_MEMORY_COUNTERS."""

        _fields_ = (
            ("n_bytes", ctypes.c_uint32),
            ("n_page_faults", ctypes.c_uint32),
            ("peak", ctypes.c_size_t),
            ("others", ctypes.c_size_t * 7),
        )

    _kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    _kernel32.K32GetProcessMemoryInfo.argtypes = (ctypes.c_void_p, ctypes.POINTER(_MemoryCounters), ctypes.c_uint32)

    def _peak_memory_on_windows() -> int:
        counters = _MemoryCounters(n_bytes=ctypes.sizeof(_MemoryCounters))
        if not _kernel32.K32GetProcessMemoryInfo(_kernel32.GetCurrentProcess(), ctypes.byref(counters), counters.n_bytes):
            raise ctypes.WinError(ctypes.get_last_error())
        return int(counters.peak)

    class _MemoryStatus(ctypes.Structure):
        """MEMORYSTATUSEX."""

        _fields_ = (
            ("n_bytes", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            ("total", ctypes.c_uint64),
            ("others", ctypes.c_uint64 * 6),
        )

    def _machine_memory_on_windows() -> int:
        status = _MemoryStatus(n_bytes=ctypes.sizeof(_MemoryStatus))
        if not _kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
            raise ctypes.WinError(ctypes.get_last_error())
        return int(status.total)
