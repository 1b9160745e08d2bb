"""The engine's int8 arithmetic, simulated in float32: the same Hadamard transform, groups, scales and rounding as csrc/FORMAT.md.

The formulas are those of ops/cpu/fake_quant.py. A few lanes of a warp have a group, WIDTH neighbours each: of the transform's
stages 1, 2 and 4 are among a lane's own values, 8, 16 and 32 exchange values with the lane 1, 2 and 4 away. All lanes take part
in every exchange, those without values too.

The kernels are exact: every operation is one IEEE instruction, and nothing is fused, so values equal the CPU's bit for bit. They
must be float32: rounding them to bfloat16 first would change the codes.

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
from ..cpu.fake_quant import GROUP, INF_BITS, MAGNITUDE, TINY, code_factor, hadamard_block, value_factor
from ._intrinsics import add_rn, div_rn, float_of_bits, mul_rn, rint, round_half, store, sub_rn
from ._intrinsics import bits_of_float as bits
from ._jit import FULL, WARP, Array, cuda, exact_device, exact_kernel, f4, i8, launch_elements, u4, unsigned
from ._runtime import flat, kept, runtime
from ._vectors import WIDTH, aligned, pieces, read, write

i4 = np.int32


# ---- what both kernels are made of -------------------------------------------------------------------------------


@exact_device
def group_bounds(n: int, group: int, groups: int, n_groups: int, lanes: int) -> Any:
    """Of this thread's group: its first element and the one after its last; lanes of a warp share a group.

    A group past the last is empty, so that all lanes of a warp stay for the warp's operations.
    """
    index = i8(u4(cuda.grid(1)) // lanes)
    row = i8(u4(index) // groups)
    start = row * i8(n) + i8(u4(index) % groups) * i8(group)
    end = min(start + i8(group), (row + i8(1)) * i8(n))
    if index >= n_groups:
        start = i8(0)
        end = i8(0)
    return start, end


@exact_device
def own_stage(x: Any, h: int) -> None:
    """One stage of the Hadamard transform, on a lane's own x (WIDTH,): pairs (e, e + h) for every e with e & h == 0."""
    for pair in range(WIDTH // 2):
        e = pair + (pair & -h)
        low = x[e]
        high = x[e + h]
        x[e] = add_rn(low, high)
        x[e + h] = sub_rn(low, high)


@exact_device
def shared_stage(x: Any, distance: int) -> None:
    """The stage WIDTH * distance: the other value of each pair lies in the lane ``distance`` away, at the same place."""
    sign = f4(1)
    if cuda.threadIdx.x & distance:
        sign = f4(-1)  # this lane has the second value of the pair: other - own
    for e in range(WIDTH):
        other = cuda.shfl_xor_sync(FULL, x[e], distance)
        x[e] = add_rn(other, mul_rn(x[e], sign))


@exact_device
def hadamard(x: Any, block: int) -> None:
    """T in blocks of so many values, x (WIDTH,) in each lane; a block of 1 is left as it is."""
    if block > 1:
        own_stage(x, 1)
    if block > 2:
        own_stage(x, 2)
    if block > 4:
        own_stage(x, 4)
    distance = 1
    while distance * WIDTH < block:
        shared_stage(x, distance)
        distance *= 2


@exact_device
def magnitude_bits(x: Any) -> Any:
    """Bits of the largest magnitude of a lane's x: an integer maximum, as the engine takes it."""
    top = i4(0)
    for e in range(WIDTH):
        top = max(top, i4(bits(x[e]) & MAGNITUDE))
    return top


@exact_device
def group_maximum(top: int, lanes: int) -> Any:
    """The largest of the group's lanes, in every one of them."""
    distance = lanes // 2
    while distance > 0:
        top = max(top, cuda.shfl_xor_sync(FULL, top, distance))
        distance //= 2
    return top


# ---- kernels -----------------------------------------------------------------------------------------------------


@exact_kernel
def activations_kernel(
    x: Any, flag: Any, n: int, group: int, groups: int, n_groups: int, lanes: int, block: int, whole: bool
) -> None:
    """x (rows, n) in place: what its codes stand for. A group that has more values than its lanes hold is read twice."""
    start, end = group_bounds(n, group, groups, n_groups, lanes)
    at = start + i8(cuda.threadIdx.x % lanes) * WIDTH
    held = i8(lanes) * WIDTH
    steps = (i8(group) + held - i8(1)) // held  # the same in all lanes, as the Hadamard transform's exchanges need
    values = cuda.local.array(WIDTH, float32)
    top = i4(0)
    for step in range(steps):
        read(values, x, at + step * held, end, whole)
        hadamard(values, block)
        top = max(top, magnitude_bits(values))
    top = group_maximum(top, lanes)
    if top >= INF_BITS:
        store(flag, 0, i4(1))
    absmax = float_of_bits(top)
    inv = f4(0)
    unit = f4(0)
    if absmax >= TINY:
        inv = div_rn(f4(127), absmax)
        unit = mul_rn(div_rn(absmax, f4(127)), div_rn(f4(1), f4(block)))
    for step in range(steps):
        if steps > 1:
            read(values, x, at + step * held, end, whole)
            hadamard(values, block)
        for e in range(WIDTH):
            values[e] = rint(mul_rn(values[e], inv))
        hadamard(values, block)
        for e in range(WIDTH):
            values[e] = mul_rn(values[e], unit)
        write(x, at + step * held, end, values, whole)


@exact_kernel
def weights_kernel(
    out: Any, flag: Any, w: Any,
    n: int, group: int, groups: int, n_groups: int, lanes: int, block: int, code_factor: Any, value_factor: Any, whole: bool,
) -> None:  # fmt: skip
    """out (rows, n) = what w's codes and half precision scales stand for."""
    start, end = group_bounds(n, group, groups, n_groups, lanes)
    at = start + i8(cuda.threadIdx.x % lanes) * WIDTH
    values = cuda.local.array(WIDTH, float32)
    read(values, w, at, end, whole)
    hadamard(values, block)
    for e in range(WIDTH):
        values[e] = mul_rn(values[e], code_factor)
    scale = round_half(div_rn(float_of_bits(group_maximum(magnitude_bits(values), lanes)), f4(127)))
    if bits(scale) >= INF_BITS:
        store(flag, 0, i4(1))
    divisor = scale
    if scale == f4(0):
        divisor = f4(np.inf)  # all codes 0
    for e in range(WIDTH):
        values[e] = min(max(rint(div_rn(values[e], divisor)), f4(-127)), f4(127))
    hadamard(values, block)
    unit = mul_rn(scale, value_factor)
    for e in range(WIDTH):
        values[e] = mul_rn(values[e], unit)
    write(out, at, end, values, whole)


# ---- launches ----------------------------------------------------------------------------------------------------


_deferred = False


def _flag() -> Array:
    return kept("not_finite", 1, np.int32, zeroed=True)


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
    flag = _flag()
    if int(runtime().download(flag)[0]):
        runtime().fill(flag, 0)
        raise NotFiniteError(what)


def _layout(x: Array, group: int, block: int, *others: Array) -> tuple[int, tuple[Any, ...], bool]:
    """Threads, the kernels' sizes, and whether vectors of x (rows, n) and others like it may be moved whole."""
    rows, n = x.shape
    if x.dtype != np.float32:
        raise TypeError(f"fake-quantization takes float32, not {x.dtype}")
    group = min(group, n)
    groups = -(-n // group)
    lanes = min(WARP, 1 << (pieces(group) - 1).bit_length())
    threads = -(-rows * groups * lanes // WARP) * WARP
    sizes = unsigned(n, group, groups, rows * groups, lanes, block, addressed=max(x.size, threads))
    return threads, sizes, aligned(x, *others, width=n if group == n else math.gcd(n, group))


def _in_groups(x: Array, group: int, block: int) -> None:
    threads, sizes, whole = _layout(x, group, block)
    launch_elements(activations_kernel, threads, flat(x), _flag(), *sizes, whole)
    if not _deferred:
        raise_if_not_finite("an activation is infinite or NaN")


def fake_quant_activations(x: Array) -> None:
    """Round x (rows, n) float32, the input of a product, to what the engine's int8 codes stand for, in place.

    Raises NotFiniteError when a value is infinite or NaN, or becomes so where it is transformed.
    """
    _in_groups(x, GROUP, hadamard_block(x.shape[1]))


def fake_quant_heads(x: Array, transformed: bool) -> None:
    """The same for heads, x (rows, head_dim), each with one scale: queries and keys are transformed, values are not."""
    _in_groups(x, x.shape[1], hadamard_block(x.shape[1]) if transformed else 1)


BAD_WEIGHT = "a weight is infinite, NaN, or too large for a half precision scale"


def fake_quant_weights(out: Array, w: Array) -> None:
    """out = the float32 values that w's int8 codes and half precision scales stand for; both (rows, n) float32."""
    block = hadamard_block(w.shape[1])
    threads, sizes, whole = _layout(w, GROUP, block, out)
    factors = f4(code_factor(block)), f4(value_factor(block))
    launch_elements(weights_kernel, threads, flat(out), _flag(), flat(w), *sizes, *factors, whole)
    if not _deferred:
        raise_if_not_finite(BAD_WEIGHT)
