"""The engine's int8 arithmetic, simulated in float32: the same Hadamard transform, groups, scales and rounding as csrc/FORMAT.md.

hadamard     T(x): a row in blocks of b = 2^k values, b the largest power of two that divides its length, at most 64,
             each times the Hadamard matrix of b: for h = 1, 2, 4, ... b / 2, for all i with i & h == 0,
             (x[i], x[i + h]) = (x[i] + x[i + h], x[i] - x[i + h]). It is undone by T / b, since T(T(x)) = b x.

weights      w = T(row) 2^-ceil(k/2), groups of 64 along the input; scale = f16(absmax / 127);
             q = clamp(rint(w / scale), -127, 127);                                   value = T(q) scale 2^-floor(k/2)
activations  x = T(row), groups of 64, or one group a head; queries and keys are transformed, value heads are not (b = 1);
             q = rint(x (127 / absmax)); absmax < 2^-64 gives codes 0;               value = T(q) (absmax / 127) 2^-k

probabilities  w = p (value scale), groups of 32 keys from the row's first one: q = rint(w (127 / max w)), 0 where max w < 2^-64;
             value = q (max w / 127) / (value scale), so that its product with a value is that of the codes with both scales

forward      replaces a row by the values that its codes stand for, in the basis that it came in: products stay plain products
backward     straight through: dx = dy. With scales from the absolute maximum nothing is clipped, so no mask is needed;
             scales count as constants, and T and its inverse cancel. Products in the backward see what the forward's saw.

T(q) is a whole number below 2^13 and a half precision scale has 11 bits, so a weight's value is exact, T(q scale) to the bit,
and so is the Hadamard transform of such values: weights that are replaced by their values have the same codes again.

Kernels are exact (no relaxed float semantics), rounding is half to even. Half precision scales are rounded by NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import NotFiniteError
from ._jit import Array, bits_from_float, exact_inline, exact_kernel, f4, float_from_bits

GROUP = 64  # values that share a scale, where a head is not one group
PROBABILITY_GROUP = 32  # keys of a row that share a scale
MOST = 64  # values that are transformed together
TINY = f4(2.0**-64)
INF_BITS = np.int32(0x7F800000)
MAGNITUDE = np.int32(0x7FFFFFFF)
u8 = np.uint64  # indices that need no check for negative ones: with it loops over them stay scalar


def hadamard_block(n: int) -> int:
    """b: how many values of a row of n are transformed together."""
    return min(MOST, n & -n)


def code_factor(block: int) -> float:
    """2^-ceil(k/2) for a block of 2^k values."""
    return float(2.0 ** -(block.bit_length() // 2))


def value_factor(block: int) -> float:
    """2^-floor(k/2): with ``code_factor`` 1 / block."""
    return 1 / (block * code_factor(block))


# ---- the Hadamard transform ----


@exact_inline
def _three_stages(x: Array, i: Any, h: Any) -> None:
    """Stages h, 2h and 4h on x[i], x[i + h], ... x[i + 7h], in registers."""
    i1, i2, i3 = i + h, i + u8(2) * h, i + u8(3) * h
    i4, i5, i6, i7 = i + u8(4) * h, i + u8(5) * h, i + u8(6) * h, i + u8(7) * h
    x0, x1, x2, x3, x4, x5, x6, x7 = x[i], x[i1], x[i2], x[i3], x[i4], x[i5], x[i6], x[i7]
    x0, x1, x2, x3 = x0 + x1, x0 - x1, x2 + x3, x2 - x3
    x4, x5, x6, x7 = x4 + x5, x4 - x5, x6 + x7, x6 - x7
    x0, x2, x1, x3 = x0 + x2, x0 - x2, x1 + x3, x1 - x3
    x4, x6, x5, x7 = x4 + x6, x4 - x6, x5 + x7, x5 - x7
    x[i], x[i1], x[i2], x[i3] = x0 + x4, x1 + x5, x2 + x6, x3 + x7
    x[i4], x[i5], x[i6], x[i7] = x0 - x4, x1 - x5, x2 - x6, x3 - x7


@exact_kernel
def _hadamard(x: Array, start: Any, end: Any, block: Any) -> None:
    """T(x[start:end]) in place, x (n,) float32, in blocks that divide its length; 1 leaves it as it is."""
    if block == u8(64):  # the usual one: loops of constant length
        for first in range(start, end, u8(64)):
            for i in range(u8(8)):
                _three_stages(x, first + u8(8) * i, u8(1))
            for i in range(u8(8)):
                _three_stages(x, first + i, u8(8))
        return
    h = u8(1)
    if block >= u8(8):
        for i in range(start, end, u8(8)):
            _three_stages(x, i, u8(1))
        h = u8(8)
    while h < block:
        for first in range(start, end, u8(2) * h):
            for i in range(first, first + h):
                x[i], x[i + h] = x[i] + x[i + h], x[i] - x[i + h]
        h *= u8(2)


@exact_kernel
def _absmax_bits(x: Array, start: Any, end: Any) -> Any:
    """Bits of the largest magnitude in x[start:end]: an integer maximum, as the engine's, which an infinity or NaN wins."""
    top = np.int32(0)
    for i in range(start, end):
        top = max(top, bits_from_float(x[i]) & MAGNITUDE)
    return top


# ---- activations -------------------------------------------------------------------------------------------------


@exact_kernel
def _fake_quant_activations(x: Array, group: Any, block: Any) -> Any:
    """x (rows, n) in place; returns the largest bit pattern seen, so that the caller can refuse infinities."""
    worst = np.int32(0)
    for r in range(x.shape[0]):
        row = x[r]
        n = u8(row.size)
        for start in range(u8(0), n, group):
            end = min(n, start + group)
            _hadamard(row, start, end, block)
            top = _absmax_bits(row, start, end)
            worst = max(worst, top)
            absmax = float_from_bits(top)
            if absmax < TINY:
                for i in range(start, end):
                    row[i] = f4(0)
                continue
            inv = f4(127) / absmax
            for i in range(start, end):
                row[i] = np.rint(row[i] * inv)
            _hadamard(row, start, end, block)
            step = absmax / f4(127) * (f4(1) / f4(block))
            for i in range(start, end):
                row[i] *= step
    return worst


def _in_groups(x: Array, group: int, block: int) -> None:
    if _fake_quant_activations(x, u8(group), u8(block)) >= INF_BITS:
        raise NotFiniteError("an activation is infinite or NaN")


def fake_quant_activations(x: Array) -> None:
    """Round x (rows, n) float32, the input of a product, to what the engine's int8 codes stand for, in place.

    Raises NotFiniteError when a value is infinite or NaN, or becomes so where it is transformed.
    """
    _in_groups(x, GROUP, hadamard_block(x.shape[1]))


def fake_quant_heads(x: Array, transformed: bool) -> None:
    """The same for heads, x (rows, head_dim), each with one scale: queries and keys are transformed, values are not."""
    _in_groups(x, x.shape[1], hadamard_block(x.shape[1]) if transformed else 1)


# ---- probabilities -----------------------------------------------------------------------------------------------


def value_scales(v: Array) -> Array:
    """What the codes of value heads, v (n_keys, head_dim) from ``fake_quant_heads``, are multiplied by, (n_keys,)."""
    scales: Array = np.abs(v).max(axis=-1) / f4(127)
    return scales


@exact_kernel
def fake_quant_probabilities(p: Array, scales: Array, starts: Array, n_rep: int, first: int, key: int) -> None:
    """Rows of probabilities p (n, n_keys) in place, 0 outside of what they see; row i is position first + i // n_rep, column 0 is
    key; scales (n_keys,) of the values. starts as in attention.py: an engine's document begins at a group's first key."""
    for i in range(p.shape[0]):
        position = first + i // n_rep
        end = position + 1 - key
        for start in range(starts[position] - key, end, PROBABILITY_GROUP):
            stop = min(end, start + PROBABILITY_GROUP)
            top = f4(0)
            for j in range(start, stop):
                top = max(top, p[i, j] * scales[j])
            inv = f4(127) / top if top >= TINY else f4(0)
            step = top / f4(127)
            for j in range(start, stop):
                code = np.rint(p[i, j] * scales[j] * inv)
                p[i, j] = code * step / scales[j] if code > f4(0) else f4(0)


# ---- weights -----------------------------------------------------------------------------------------------------


@exact_kernel
def _transform_weights(out: Array, absmax: Array, w: Array, block: Any, factor: Any) -> None:
    """out (rows, n) = T(w) * factor, and the largest magnitudes of its groups, absmax (rows, n_groups)."""
    for r in range(w.shape[0]):
        row = out[r]
        row[:] = w[r]
        n = u8(row.size)
        for start in range(u8(0), n, u8(GROUP)):
            end = min(n, start + u8(GROUP))
            _hadamard(row, start, end, block)
            for i in range(start, end):
                row[i] *= factor
            absmax[r, start // u8(GROUP)] = float_from_bits(_absmax_bits(row, start, end))


def _transformed_weights(out: Array, w: Array) -> Array:
    """out = the transformed w, both (rows, n) float32; returns the float16 scales (rows, ceil(n / 64))."""
    absmax = np.empty((w.shape[0], -(-w.shape[1] // GROUP)), np.float32)
    block = hadamard_block(w.shape[1])
    _transform_weights(out, absmax, w, u8(block), f4(code_factor(block)))
    with np.errstate(over="ignore", invalid="ignore"):
        scales = (absmax / f4(127)).astype(np.float16)
    if not np.isfinite(scales).all():
        raise NotFiniteError("a weight is infinite, NaN, or too large for a half precision scale")
    return scales


@exact_kernel
def _quantize_weights(w: Array, scales: Array) -> None:
    """The transformed w (rows, n) in place: codes, in float32; scales (rows, n_groups) float32."""
    for r in range(w.shape[0]):
        row = w[r]
        n = u8(row.size)
        for start in range(u8(0), n, u8(GROUP)):
            end = min(n, start + u8(GROUP))
            scale = scales[r, start // u8(GROUP)]
            if scale == f4(0):
                for i in range(start, end):
                    row[i] = f4(0)
                continue
            for i in range(start, end):
                row[i] = min(max(np.rint(row[i] / scale), f4(-127)), f4(127))


@exact_kernel
def _weight_values(codes: Array, scales: Array, block: Any, factor: Any) -> None:
    """T(q) * scale * factor in place of the codes q (rows, n), in float32; scales (rows, n_groups) float32."""
    for r in range(codes.shape[0]):
        row = codes[r]
        n = u8(row.size)
        for start in range(u8(0), n, u8(GROUP)):
            end = min(n, start + u8(GROUP))
            _hadamard(row, start, end, block)
            for i in range(start, end):
                row[i] *= scales[r, start // u8(GROUP)] * factor


def _values(codes: Array, scales: Array) -> None:
    block = hadamard_block(codes.shape[1])
    _weight_values(codes, scales, u8(block), f4(value_factor(block)))


def fake_quant_weights(out: Array, w: Array) -> None:
    """out = the float32 values that w's int8 codes and half precision scales stand for; both (rows, n) float32."""
    scales = _transformed_weights(out, w).astype(np.float32)
    _quantize_weights(out, scales)
    _values(out, scales)


def weight_codes(w: Array) -> tuple[Array, Array]:
    """int8 codes (rows, n) and float16 scales (rows, ceil(n / 64)) of w (rows, n) float32: the frozen file's, before panels."""
    codes = np.empty_like(w)
    scales = _transformed_weights(codes, w)
    _quantize_weights(codes, scales.astype(np.float32))
    return codes.astype(np.int8), scales


def weight_values(codes: Array, scales: Array) -> Array:
    """The float32 values (rows, n) that ``weight_codes`` stand for."""
    values = codes.astype(np.float32, order="C")
    _values(values, scales.astype(np.float32, order="C"))
    return values
