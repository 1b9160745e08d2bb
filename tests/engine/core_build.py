"""The C core built by CMake with the flags that it is shipped with, for tests that look at what the compiler made of it."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def need(*programs: str) -> None:
    """Skip the test when one of them is not installed."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def gcc_version() -> str:
    """Like "12.2.0". Skips the test when gcc is missing, or is clang by another name."""
    need("gcc")
    described = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True).stdout
    if "Free Software Foundation" not in described:
        pytest.skip(f"gcc is {described.splitlines()[0]}")
    return subprocess.run(["gcc", "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()


@functools.cache
def _configured() -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    directory = tempfile.TemporaryDirectory(prefix="pyengine-core-")  # goes away with the process
    command = ["cmake", "-S", str(REPOSITORY), "-B", directory.name, "-DCMAKE_BUILD_TYPE=Release"]
    command += ["-DCMAKE_C_COMPILER=gcc", "-DPYENGINE_PYTHON=OFF", "-DPYENGINE_TESTS=ON"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Path(directory.name), directory


def build(target: str) -> Path:
    """Build one target with gcc; returns the build directory. Skips the test without cmake or gcc."""
    need("cmake", "gcc")
    if not (REPOSITORY / "CMakeLists.txt").exists():
        pytest.skip("these are not the sources")
    directory = _configured()[0]
    built = subprocess.run(
        ["cmake", "--build", str(directory), "--target", target, "--parallel", "2"], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return directory
