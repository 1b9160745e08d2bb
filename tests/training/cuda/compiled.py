"""Kernels compiled for a real device without having one: PTX by NVVM, and its registers by ptxas."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from numba import cuda, typeof, types

Array = Any
COMPUTE_CAPABILITY = (9, 0)


class RecordingRuntime:
    """Notes every launch's kernel, argument types and block size, and runs nothing."""

    capturing = False

    def __init__(self) -> None:
        self.launches: dict[tuple[Any, Any], int] = {}

    def launch(self, kernel: Any, grid: int, block: int, arguments: tuple[Any, ...]) -> None:
        key = kernel, types.void(*map(_type, arguments))
        self.launches[key] = max(block, self.launches.get(key, 0))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return np.zeros(shape, dtype)

    def upload(self, host: Any, out: Any = None) -> Array:
        return np.array(host) if out is None else out

    def download(self, array: Array) -> Any:
        return np.zeros_like(array)

    def fill(self, array: Array, value: float) -> None:
        array.fill(value)

    def gemm(self, product: Any) -> None:
        return

    def tensor_floats(self, allowed: bool) -> Any:
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        return

    def memory(self) -> tuple[int, int]:
        return 1 << 40, 1 << 40

    def record(self, function: Any) -> Any:
        return function


def _type(value: Any) -> Any:
    """The type that a launch on a GPU gives an argument."""
    if isinstance(value, np.ndarray):
        return types.Array(typeof(value).dtype, 1, "C")
    return typeof(value)


def ptx(kernel: Any, signature: Any) -> str:
    """PTX of a kernel with the options that it was decorated with.

    Device functions are compiled for "the current device" whatever the kernel is compiled for, so there has to be one.
    """
    device = SimpleNamespace(compute_capability=COMPUTE_CAPABILITY)
    with mock.patch("numba.cuda.dispatcher.get_current_device", lambda: device):
        text, _ = cuda.compile_ptx(
            kernel.py_func,
            signature,
            cc=COMPUTE_CAPABILITY,
            fastmath=bool(kernel.targetoptions.get("fastmath")),
        )
    return str(text)


@dataclass(frozen=True)
class Usage:
    """What ptxas says of an entry."""

    registers: int
    spill_bytes: int
    stack_bytes: int  # local arrays that did not become registers
    shared_bytes: int


def usage(text: str, folder: Path) -> Usage:
    """Assemble for sm_90 and read the report."""
    source = folder / "kernel.ptx"
    source.write_text(text)
    command = ["ptxas", "-v", "-arch=sm_90", "-o", str(folder / "kernel.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return Usage(
        registers=int(_number(r"Used (\d+) registers", done.stderr)),
        spill_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)),
        stack_bytes=int(_number(r"(\d+) bytes stack frame", done.stderr)),
        shared_bytes=int(_number(r"(\d+) bytes smem", done.stderr)),
    )


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group(1) if found else "0"


def float64_lines(text: str) -> Iterator[str]:
    """Instructions on float64: a constant has crept in."""
    return (line.strip() for line in text.splitlines() if ".f64" in line)
