"""Eight elements a thread: what keeps a kernel that only moves data at the memory's speed.

A thread holds WIDTH neighbours in a local array of float32, which loops of constant length keep in registers:

    x = cuda.local.array(WIDTH, float32)
    read(x, array, at, end, aligned)
    for e in range(WIDTH):
        x[e] = ...
    write(array, at, end, x, aligned)

``aligned`` is decided on the host by :func:`aligned`: every vector begins at a multiple of 16 bytes, so one or two
instructions move it. Where that is not so (a row of odd length, a view into the middle of an array), and at the end of an
array, the same calls go element by element.
"""

from __future__ import annotations

from typing import Any

from ._intrinsics import load, load8, store, store8
from ._jit import Array, exact_device, f4, launch_elements

WIDTH = 8  # elements: 16 bytes of bfloat16
BYTES = 16  # of the widest access


@exact_device
def read(values: Any, array: Any, at: int, end: int, whole: bool) -> None:
    """values[:] = array[at:at + WIDTH]; 0 from ``end`` on, which is not touched. whole: what :func:`aligned` said."""
    if whole and at + WIDTH <= end:
        load8(values, array, at)
    else:
        for e in range(WIDTH):
            value = f4(0)
            if at + e < end:
                value = load(array, at + e)
            values[e] = value


@exact_device
def write(array: Any, at: int, end: int, values: Any, whole: bool) -> None:
    """array[at:at + WIDTH] = values[:]; nothing from ``end`` on."""
    if whole and at + WIDTH <= end:
        store8(array, at, values)
    else:
        for e in range(WIDTH):
            if at + e < end:
                store(array, at + e, values[e])


def address(array: Array) -> int:
    """Of an array's first element, on the device or in a simulated one."""
    return int(array.data.ptr if hasattr(array.data, "ptr") else array.ctypes.data)


def aligned(*arrays: Array, width: int = WIDTH) -> bool:
    """Whether vectors of all arrays begin at multiples of 16 bytes; width: of rows (or heads) that begin with a vector."""
    return width % WIDTH == 0 and all(address(array) % BYTES == 0 for array in arrays)


def pieces(width: int) -> int:
    """Vectors of a row, the last maybe not full."""
    return -(-width // WIDTH)


def launch_vectors(function: Any, n: int, *arguments: Any) -> None:
    """One thread for each WIDTH of n elements; the kernel guards with ``at < n`` itself."""
    launch_elements(function, pieces(n), *arguments)


__all__ = ["WIDTH", "aligned", "launch_vectors", "pieces", "read", "write"]
