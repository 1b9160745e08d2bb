"""The engine's int8 arithmetic, simulated in float32: the same groups, scales and rounding as csrc/FORMAT.md.

weights      groups of 64 along the input; scale = f16(absmax / 127); q = clamp(rint(w / scale), -127, 127)
activations  groups of 32 (a value head is one group); scale = absmax / 127; q = rint(x * (127 / absmax));
             absmax < 2^-64 gives scale 0 and codes 0

forward      replaces x by q * scale
backward     straight through: dx = dy, as on the CPU.

A few lanes of a warp for each group, WIDTH elements for each of them. The kernels are exact: IEEE division and
multiplication and rounding half to even are single instructions, and nothing is fused, so codes and scales equal the CPU's
bit for bit. Values must be float32: rounding them to bfloat16 first would change the codes.

A value that is not finite, or a weight scale that overflows half precision, sets a flag on the device. The functions
raise NotFiniteError at once, which waits for the device; inside :func:`deferred_checks` the caller asks later.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import float32

from ...errors import NotFiniteError
from ..cpu.fake_quant import ACTIVATION_GROUP, WEIGHT_GROUP
from ._intrinsics import bits_of_float as bits
from ._intrinsics import div_rn, float_of_bits, half_bits, mul_rn, rint, round_half, store
from ._jit import FULL, WARP, Array, cuda, exact_device, exact_kernel, f4, i8, launch_elements, u4, unsigned
from ._runtime import flat, kept, runtime
from ._vectors import WIDTH, aligned, pieces, read, write

TINY = f4(2.0**-64)
INF_BITS = np.int32(0x7F800000)
MAGNITUDE = np.int32(0x7FFFFFFF)
i4 = np.int32


@exact_device
def group_bounds(n: int, group: int, groups: int, n_groups: int, lanes: int) -> Any:
    """Of this thread's group: its index, first element and the one after its last; lanes of a warp share a group.

    A group past the last is empty, so that all lanes of a warp stay for the warp's operations.
    """
    index = i8(u4(cuda.grid(1)) // lanes)
    row = i8(u4(index) // groups)
    start = row * i8(n) + i8(u4(index) % groups) * i8(group)
    end = min(start + i8(group), (row + i8(1)) * i8(n))
    if index >= n_groups:
        start = i8(0)
        end = i8(0)
    return index, start, end


@exact_device
def group_absmax(x: Any, start: int, end: int, lanes: int, whole: bool) -> Any:
    """Bits of the largest magnitude in [start, end), in every lane: an integer maximum, as the engine takes it."""
    values = cuda.local.array(WIDTH, float32)
    top = i4(0)
    c = start + i8(cuda.threadIdx.x % lanes) * WIDTH
    while c < end:
        read(values, x, c, end, whole)
        for e in range(WIDTH):
            top = max(top, i4(bits(values[e]) & MAGNITUDE))
        c += i8(lanes) * WIDTH
    distance = lanes // 2
    while distance > 0:
        top = max(top, cuda.shfl_xor_sync(FULL, top, distance))
        distance //= 2
    return top


@exact_device
def put(out: Any, codes: Any, q: Any, scale: Any, at: int, end: int, want_codes: bool, whole: bool) -> None:
    """Codes as they are, or the values that they stand for."""
    if want_codes:
        for e in range(WIDTH):
            if at + e < end:
                store(codes, at + e, np.int8(q[e]))
    else:
        for e in range(WIDTH):
            q[e] = mul_rn(q[e], scale)
        write(out, at, end, q, whole)


@exact_kernel
def activations_kernel(
    out: Any, codes: Any, scales: Any, flag: Any, x: Any,
    n: int, group: int, groups: int, n_groups: int, lanes: int, want_codes: bool, whole: bool,
) -> None:  # fmt: skip
    """Codes and scales, or the values that they stand for into ``out`` (may be x)."""
    index, start, end = group_bounds(n, group, groups, n_groups, lanes)
    top = group_absmax(x, start, end, lanes, whole)
    if top >= INF_BITS:
        store(flag, 0, np.int32(1))
    absmax = float_of_bits(top)
    scale = f4(0)
    inv = f4(0)
    if absmax >= TINY:
        scale = div_rn(absmax, f4(127))
        inv = div_rn(f4(127), absmax)
    lane = i8(cuda.threadIdx.x % lanes)
    q = cuda.local.array(WIDTH, float32)
    c = start + lane * WIDTH
    while c < end:
        read(q, x, c, end, whole)
        for e in range(WIDTH):
            q[e] = rint(mul_rn(q[e], inv))
        put(out, codes, q, scale, c, end, want_codes, whole)
        c += i8(lanes) * WIDTH
    if want_codes and lane == 0 and start < end:
        store(scales, index, scale)


@exact_kernel
def weights_kernel(
    out: Any, codes: Any, scales: Any, flag: Any, w: Any,
    n: int, group: int, groups: int, n_groups: int, lanes: int, want_codes: bool, whole: bool,
) -> None:  # fmt: skip
    """Codes and half precision scales (as bits), or the values that they stand for."""
    index, start, end = group_bounds(n, group, groups, n_groups, lanes)
    ratio = div_rn(float_of_bits(group_absmax(w, start, end, lanes, whole)), f4(127))
    scale = round_half(ratio)
    if bits(scale) >= INF_BITS:
        store(flag, 0, np.int32(1))
    lane = i8(cuda.threadIdx.x % lanes)
    q = cuda.local.array(WIDTH, float32)
    c = start + lane * WIDTH
    while c < end:
        read(q, w, c, end, whole)
        for e in range(WIDTH):
            code = f4(0)
            if scale > f4(0):
                code = min(max(rint(div_rn(q[e], scale)), f4(-127)), f4(127))
            q[e] = code
        put(out, codes, q, scale, c, end, want_codes, whole)
        c += i8(lanes) * WIDTH
    if want_codes and lane == 0 and start < end:
        store(scales, index, half_bits(ratio))


_deferred = False


@contextlib.contextmanager
def deferred_checks() -> Iterator[None]:
    """Within the body nothing waits for the device; call :func:`raise_if_not_finite` afterwards."""
    global _deferred
    previous, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = previous


def raise_if_not_finite(what: str) -> None:
    """NotFiniteError if a kernel has seen an infinity or NaN since the last call; waits for the device."""
    flag = kept("not_finite", 1, np.int32, zeroed=True)
    if int(runtime().download(flag)[0]):
        runtime().fill(flag, 0)
        raise NotFiniteError(what)


def _run(function: Any, x: Array, out: Array | None, coded: tuple[Array, Array] | None, group: int) -> None:
    """Launch on x (rows, n): values into ``out``, or codes and scales into ``coded``."""
    rows, n = x.shape
    if x.dtype != np.float32:
        raise TypeError(f"fake-quantization takes float32, not {x.dtype}")
    groups = -(-n // group)
    scale_type = np.float32 if function is activations_kernel else np.int16
    codes = flat(coded[0]) if coded else kept("no_codes", 1, np.int8)
    scales = flat(coded[1]) if coded else kept("no_scales", 1, scale_type)
    values = flat(out) if out is not None else kept("no_values", 1, np.float32)
    flag = kept("not_finite", 1, np.int32, zeroed=True)
    lanes = min(WARP, 1 << (pieces(min(group, n)) - 1).bit_length())
    sizes = unsigned(n, group, groups, rows * groups, lanes, addressed=max(x.size, rows * groups * lanes))
    whole = aligned(x, *([] if out is None else [out]), width=n if group >= n else math.gcd(n, group))
    arguments = values, codes, scales, flag, flat(x), *sizes, coded is not None, whole
    launch_elements(function, -(-rows * groups * lanes // WARP) * WARP, *arguments)


def fake_quant_activations(x: Array, group: int = ACTIVATION_GROUP) -> None:
    """Round x (rows, n) float32 to what the engine's int8 codes stand for, in place.

    Raises NotFiniteError when a value is infinite or NaN.
    """
    _run(activations_kernel, x, x, None, group)
    if not _deferred:
        raise_if_not_finite("an activation is infinite or NaN")


def activation_codes(x: Array, group: int = ACTIVATION_GROUP) -> tuple[Array, Array]:
    """int8 codes (rows, n) and float32 scales (rows, ceil(n / group)) of x (rows, n) float32."""
    codes = runtime().empty(x.shape, np.int8)
    scales = runtime().empty((x.shape[0], -(-x.shape[1] // group)), np.float32)
    _run(activations_kernel, x, None, (codes, scales), group)
    raise_if_not_finite("an activation is infinite or NaN")
    return codes, scales


BAD_WEIGHT = "a weight is infinite, NaN, or too large for a half precision scale"


def fake_quant_weights(out: Array, w: Array) -> None:
    """out = the float32 values that w's int8 codes and half precision scales stand for; both (rows, n) float32."""
    _run(weights_kernel, w, out, None, WEIGHT_GROUP)
    if not _deferred:
        raise_if_not_finite(BAD_WEIGHT)


def weight_codes(w: Array) -> tuple[Array, Array]:
    """int8 codes (rows, n) and float16 scales (rows, ceil(n / 64)): what the frozen file holds, before its panels."""
    codes = runtime().empty(w.shape, np.int8)
    scales = runtime().empty((w.shape[0], -(-w.shape[1] // WEIGHT_GROUP)), np.int16)
    _run(weights_kernel, w, None, (codes, scales), WEIGHT_GROUP)
    raise_if_not_finite(BAD_WEIGHT)
    return codes, scales.view(np.float16)


def weight_scales(w: Array, scratch: Array | None = None) -> Array:
    """float16 scales (rows, ceil(n / 64)) of w (rows, n) float32. Raises NotFiniteError when one overflows."""
    return weight_codes(w)[1]
