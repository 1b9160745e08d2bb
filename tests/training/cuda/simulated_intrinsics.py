"""What each instruction of ``ops/cuda/_intrinsics.py`` does, in NumPy, for the simulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from simulator import Simulator

f4, u4 = np.float32, np.uint32


def to_bf16(x: Any) -> Any:
    """float32 -> bfloat16 bits as uint16, half to even, NaN kept; scalars and arrays."""
    bits = np.asarray(x, f4).view(u4)
    rounded = ((bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)[()]


def from_bf16(bits: Any) -> Any:
    """bfloat16 bits -> float32; scalars and arrays."""
    return (np.asarray(bits).astype(u4) << u4(16)).view(f4)[()]


def _index(array: Any, index: Any) -> int:
    i = int(index)
    if array.ndim != 1:
        raise IndexError(f"load and store take flat arrays, not shape {array.shape}")
    if not 0 <= i < array.size:
        raise IndexError(f"element {i} of an array of {array.size}")
    return i


def load(array: Any, index: Any) -> Any:
    value = array[_index(array, index)]
    return from_bf16(value) if array.dtype == np.uint16 else value


def store(array: Any, index: Any, value: Any) -> None:
    array[_index(array, index)] = to_bf16(f4(value)) if array.dtype == np.uint16 else value


def bits_of_float(x: Any) -> Any:
    return np.asarray(x, f4).view(u4)[()]


def float_of_bits(bits: Any) -> Any:
    return np.asarray(bits, u4).view(f4)[()]


def div_rn(a: Any, b: Any) -> Any:
    return f4(a) / f4(b)


def add_rn(a: Any, b: Any) -> Any:
    return f4(a) + f4(b)


def sub_rn(a: Any, b: Any) -> Any:
    return f4(a) - f4(b)


def mul_rn(a: Any, b: Any) -> Any:
    return f4(a) * f4(b)


def rint(x: Any) -> Any:
    return np.rint(f4(x))


def round_half(x: Any) -> Any:
    return f4(np.float16(x))


def pack_bf16(low: Any, high: Any) -> Any:
    return u4(int(to_bf16(f4(low))) | int(to_bf16(f4(high))) << 16)


def load_pair(array: Any, index: Any) -> Any:
    assert array.dtype == np.uint16 and index % 2 == 0, "pairs start at even elements"
    return u4(int(array[_index(array, index)]) | int(array[_index(array, index + 1)]) << 16)


def _eight(array: Any, index: Any) -> Any:
    """array[index:index + 8], which has to lie where a GPU can reach it with accesses of 16 bytes."""
    first = _index(array, index)
    _index(array, index + 7)
    if (array.ctypes.data + first * array.itemsize) % 16:
        raise IndexError(f"misaligned address: element {first} of {array.dtype}")
    return array[first : first + 8]


def load8(values: Any, array: Any, index: Any) -> None:
    found = _eight(array, index)
    values[...] = from_bf16(found) if array.dtype == np.uint16 else found


def store8(array: Any, index: Any, values: Any) -> None:
    _eight(array, index)[...] = to_bf16(values) if array.dtype == np.uint16 else values


def _pair(bits: Any) -> Any:
    """The two bfloat16 of a uint32, low half first."""
    low, high = np.uint16(int(bits) & 0xFFFF), np.uint16(int(bits) >> 16)
    return np.array([from_bf16(low), from_bf16(high)], f4)


def mma_bf16(simulator: Simulator, *fragments: Any) -> tuple[Any, ...]:
    """The warp's D = A B + C; the layout is in the instruction's docstring."""
    lane = simulator.thread.index % 32
    values = simulator.exchange("mma_bf16", 0xFFFFFFFF, fragments)
    if "product" not in values:  # the first of the warp multiplies for all
        a, b = np.zeros((16, 16), f4), np.zeros((16, 8), f4)
        for other, (a0, a1, a2, a3, b0, b1, *_) in values.items():
            g, t = other // 4, other % 4
            a[g, 2 * t : 2 * t + 2] = _pair(a0)
            a[g + 8, 2 * t : 2 * t + 2] = _pair(a1)
            a[g, 2 * t + 8 : 2 * t + 10] = _pair(a2)
            a[g + 8, 2 * t + 8 : 2 * t + 10] = _pair(a3)
            b[2 * t : 2 * t + 2, g] = _pair(b0)
            b[2 * t + 8 : 2 * t + 10, g] = _pair(b1)
        values["product"] = a @ b
    d = values["product"]
    g, t = lane // 4, lane % 4
    c0, c1, c2, c3 = fragments[6:]
    return c0 + d[g, 2 * t], c1 + d[g, 2 * t + 1], c2 + d[g + 8, 2 * t], c3 + d[g + 8, 2 * t + 1]


TWINS: dict[str, Callable[..., Any]] = {
    "load": load,
    "store": store,
    "bf16_bits": to_bf16,
    "bits_of_float": bits_of_float,
    "float_of_bits": float_of_bits,
    "add_rn": add_rn,
    "sub_rn": sub_rn,
    "div_rn": div_rn,
    "mul_rn": mul_rn,
    "rint": rint,
    "round_half": round_half,
    "pack_bf16": pack_bf16,
    "load_pair": load_pair,
    "load8": load8,
    "store8": store8,
}


def twin(simulator: Simulator, name: str) -> Callable[..., Any]:
    """The twin of an instruction, bound to a simulator where it needs the other lanes."""
    if name == "mma_bf16":
        return lambda *fragments: mma_bf16(simulator, *fragments)
    return TWINS[name]
