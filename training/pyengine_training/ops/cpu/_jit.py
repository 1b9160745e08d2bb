"""How kernels are compiled, and the exponential they share.

Kernels run without the GIL on one thread each. ``kernel`` allows the compiler to reorder sums
(vector lanes); ``exact_kernel`` does not, and is what every quantizer uses: its rounding is part of
the file format.

Kernels are written once for float32 and float64: the constants in them are exact in float32 and
widen, so the same code that trains is what finite differences check in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

Array = NDArray[Any]
F = TypeVar("F", bound=Callable[..., Any])
f4 = np.float32


def _compile(function: F, **options: Any) -> F:
    """njit with a disk cache where one can be written, and without where none can.

    The "numpy" error model lets a division by zero give infinity: Python's check for it would keep
    loops scalar.
    """
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        return cast(F, njit(cache=True, **options)(function))
    except RuntimeError:  # no writable place for the cache: read-only installation and home
        return cast(F, njit(**options)(function))


def kernel(function: F) -> F:
    """Compile with relaxed float semantics: reordered sums, fused multiply-adds; inputs must be finite."""
    return _compile(function, fastmath=True)


def exact_kernel(function: F) -> F:
    """Compile with IEEE semantics: every operation rounded as written."""
    return _compile(function)


def exact_inline(function: F) -> F:
    """The same for a part of exact kernels of its file: pasted in before they are compiled, so loops over it become vectors."""
    return _compile(function, inline="always")


@intrinsic
def _float_from_bits(_context: Any, _bits: Any) -> Any:
    """The float32 whose bit pattern is the given int32."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def _bits_from_float(_context: Any, _value: Any) -> Any:
    """The bit pattern of a float32 as int32."""

    def codegen(_ctx: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), codegen


float_from_bits: Any = _float_from_bits  # as kernels call them: one argument
bits_from_float: Any = _bits_from_float


def exp(x: Any) -> Any:
    """e**x inside a kernel: a Cephes polynomial for float32 (1.2e-7 relative, vectorizes), libm for float64."""
    return math.exp(x)


@overload(exp, inline="always", jit_options={"fastmath": True})
def _exp_overload(x: Any) -> Any:
    if not (isinstance(x, types.Float) and x.bitwidth == 32):

        def exp_float64(x: Any) -> Any:
            return np.exp(x)

        return exp_float64

    def exp_float32(x: Any) -> Any:
        x = min(max(x, f4(-87.0)), f4(88.0))
        n = np.floor(x * f4(1.4426950408889634) + f4(0.5))
        # x - n ln 2 in two steps, ln 2 split so that the first is exact
        r = x - n * f4(0.693359375)
        r = r + n * f4(2.12194440e-4)
        p = f4(1.9875691500e-4)
        p = p * r + f4(1.3981999507e-3)
        p = p * r + f4(8.3334519073e-3)
        p = p * r + f4(4.1665795894e-2)
        p = p * r + f4(1.6666665459e-1)
        p = p * r + f4(5.0000001201e-1)
        p = p * r * r + r + f4(1.0)
        return p * float_from_bits((np.int32(n) + np.int32(127)) << np.int32(23))

    return exp_float32
