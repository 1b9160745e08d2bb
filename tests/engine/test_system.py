"""What a system may lack: the package works without it, and what cannot be done is refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pyengine import system

# In a process of its own: Python as if the system had neither these modules nor these names, which Windows does not have.
POORER = """
import os, signal, sys
for name in ("fcntl", "resource", "termios", "readline", "pwd", "grp"):
    sys.modules[name] = None  # an import raises ModuleNotFoundError
for name in (
    "pread", "pwrite", "geteuid", "getuid", "fchmod", "fork", "register_at_fork", "sched_getaffinity", "sched_setaffinity",
    "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC",
):
    if hasattr(os, name):
        delattr(os, name)
os.supports_dir_fd.clear()
for name in ("SIGCHLD", "SIGPROF", "SIGALRM", "setitimer", "pthread_sigmask"):
    if hasattr(signal, name):
        delattr(signal, name)
"""


def run_poorer(code: str, cwd: Path) -> list[str]:
    """The lines that the code prints there."""
    environment = {**os.environ, "PYENGINE_CACHE": str(cwd / "cache")}
    command = [sys.executable, "-I", "-c", POORER + textwrap.dedent(code)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_text_is_the_same_on_a_system_that_lacks_these(tmp_path: Path) -> None:
    import pyengine

    code = """
    import pyengine
    with pyengine.Engine() as engine:
        print(engine.generate("Once upon a time", max_tokens=16, temperature=0.8, seed=7).text.encode())
    """
    with pyengine.Engine() as engine:
        here = engine.generate("Once upon a time", max_tokens=16, temperature=0.8, seed=7).text
    assert run_poorer(code, tmp_path) == [str(here.encode())]


def test_the_cache_of_models_does_without_descriptors_of_directories(tmp_path: Path) -> None:
    """An entry is made once, is listed with where it came from, and is removed."""
    code = """
    from pathlib import Path
    from pyengine.freeze import cache
    source = Path("model.bin")
    source.write_bytes(b"weights")
    origin = cache.Origin("model.bin", None, None)
    path = cache.cache_path(source, [source])
    for _ in range(2):
        with cache.missing(path, origin) as is_missing:
            print(is_missing)
            path.write_bytes(b"frozen")
    print([(entry.path == path, entry.size, entry.origin == origin) for entry in cache.entries()])
    cache.remove(path)
    print(cache.entries())
    """
    assert run_poorer(code, tmp_path) == ["True", "False", "[(True, 6, True)]", "[]"]


def test_serve_with_processes_is_refused_where_processes_cannot_be_pinned(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    code = """
    import contextlib, io
    from pyengine.cli import main
    with contextlib.redirect_stderr(io.StringIO()) as said:
        print(main(["serve", "--processes", "2", "--port", "0"]))
    print("needs an operating system that pins processes to CPUs" in said.getvalue())
    """
    lines = run_poorer(code, tmp_path)
    assert lines[0] != "0" and lines[1:] == ["True"]


def test_reads_at_an_offset_leave_the_place_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    with path.open("rb") as file:
        assert file.read(3) == b"\0\1\2"
        stood = os.lseek(file.fileno(), 0, os.SEEK_CUR)
        with_pread = [system.read_at(file.fileno(), n, at) for n, at in ((4, 10), (9, 95), (1, 100))]
        monkeypatch.delattr(os, "pread", raising=False)
        without = [system.read_at(file.fileno(), n, at) for n, at in ((4, 10), (9, 95), (1, 100))]
        assert without == with_pread == [bytes(range(10, 14)), bytes(range(95, 100)), b""]
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == stood


def test_a_locked_file_is_neither_locked_again_nor_removed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with path.open("rb") as first:
        system.lock_file(first, wait=False)
        with path.open("rb") as second, pytest.raises(BlockingIOError):
            system.lock_file(second, wait=False)
        with pytest.raises(BlockingIOError):
            system.remove_if_unlocked(path.open("rb"), path)
        assert path.exists()
    system.remove_if_unlocked(path.open("rb"), path)
    assert not path.exists()


@pytest.mark.parametrize("removes_open_files", [True, False])
def test_an_open_file_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removes_open_files: bool) -> None:
    monkeypatch.setattr(system, "REMOVES_OPEN_FILES", removes_open_files)
    temporary, path = tmp_path / "temporary", tmp_path / "file"
    path.write_bytes(b"old")
    with temporary.open("w+b") as file:
        file.write(b"new")
        file.flush()
        system.replace_open(file, temporary, path)
        system.sync_directory(tmp_path)
        assert file.closed is not removes_open_files
    assert path.read_bytes() == b"new" and not temporary.exists()
    system.remove_if_unlocked(path.open("rb"), path)
    assert not path.exists()


def test_memory_is_what_a_machine_has() -> None:
    assert 1 << 20 < system.peak_memory() <= system.machine_memory()
