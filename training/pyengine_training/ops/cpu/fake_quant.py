"""The engine's int8 arithmetic, simulated in float32: the same groups, scales and rounding as csrc/FORMAT.md.

weights      groups of 64 along the input; scale = f16(absmax / 127); q = clamp(rint(w / scale), -127, 127)
activations  groups of 32 (a value head is one group); scale = absmax / 127; q = rint(x * (127 / absmax));
             absmax < 2^-64 gives scale 0 and codes 0

forward      replaces x by q * scale
backward     straight through: dx = dy. With scales from the absolute maximum nothing is clipped, so no mask is needed;
             scales count as constants. Products in the backward see the values that the forward's products saw.

Kernels are exact (no relaxed float semantics), rounding is half to even. Half precision scales are rounded by NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import NotFiniteError
from ._jit import Array, exact_kernel, f4, float_from_bits

WEIGHT_GROUP = 64
ACTIVATION_GROUP = 32
TINY = f4(2.0**-64)
INF_BITS = np.int32(0x7F800000)


@exact_kernel
def _group_absmax(absmax: Array, bits: Array, group: int) -> None:
    """absmax (rows, n_groups) float32 from the int32 view of (rows, n) float32: an integer maximum, as the engine's."""
    rows, n = bits.shape
    out = absmax.view(np.int32)
    for i in range(rows):
        for g in range(out.shape[1]):
            top = np.int32(0)
            for c in range(g * group, min(n, (g + 1) * group)):
                top = max(top, bits[i, c] & np.int32(0x7FFFFFFF))
            out[i, g] = top


@exact_kernel
def _fake_quant_activations(x: Array, bits: Array, group: int) -> Any:
    """x (rows, n) in place; returns the largest bit pattern seen, so that the caller can refuse infinities."""
    rows, n = x.shape
    worst = np.int32(0)
    for i in range(rows):
        for start in range(0, n, group):
            end = min(n, start + group)
            top = np.int32(0)
            for c in range(start, end):
                top = max(top, bits[i, c] & np.int32(0x7FFFFFFF))
            worst = max(worst, top)
            absmax = float_from_bits(top)
            if absmax < TINY:
                for c in range(start, end):
                    x[i, c] = f4(0)
                continue
            scale = absmax / f4(127)
            inv = f4(127) / absmax
            for c in range(start, end):
                x[i, c] = np.rint(x[i, c] * inv) * scale
    return worst


def fake_quant_activations(x: Array, group: int = ACTIVATION_GROUP) -> None:
    """Round x (rows, n) float32 to what the engine's int8 codes stand for, in place.

    Raises NotFiniteError when a value is infinite or NaN.
    """
    if _fake_quant_activations(x, x.view(np.int32), group) >= INF_BITS:
        raise NotFiniteError("an activation is infinite or NaN")


@exact_kernel
def _activation_codes(codes: Array, scales: Array, x: Array, group: int) -> None:
    rows, n = x.shape
    for i in range(rows):
        for g in range(scales.shape[1]):
            end = min(n, (g + 1) * group)
            absmax = f4(0)
            for c in range(g * group, end):
                absmax = max(absmax, abs(x[i, c]))
            if absmax < TINY:
                scales[i, g] = f4(0)
                for c in range(g * group, end):
                    codes[i, c] = 0
                continue
            scales[i, g] = absmax / f4(127)
            inv = f4(127) / absmax
            for c in range(g * group, end):
                codes[i, c] = np.int8(np.rint(x[i, c] * inv))


def activation_codes(x: Array, group: int = ACTIVATION_GROUP) -> tuple[Array, Array]:
    """int8 codes (rows, n) and float32 scales (rows, ceil(n / group)) of x (rows, n) float32."""
    codes = np.empty(x.shape, np.int8)
    scales = np.empty((x.shape[0], -(-x.shape[1] // group)), np.float32)
    _activation_codes(codes, scales, x, group)
    return codes, scales


def weight_scales(w: Array, scratch: Array | None = None) -> Array:
    """float16 scales (rows, ceil(n / 64)) of w (rows, n) float32. Raises NotFiniteError when one overflows."""
    n_groups = -(-w.shape[1] // WEIGHT_GROUP)
    absmax = np.empty((w.shape[0], n_groups), np.float32) if scratch is None else scratch
    _group_absmax(absmax, w.view(np.int32), WEIGHT_GROUP)
    absmax /= f4(127)
    with np.errstate(over="ignore", invalid="ignore"):
        scales = absmax.astype(np.float16)
    if not np.isfinite(scales).all():
        raise NotFiniteError("a weight is infinite, NaN, or too large for a half precision scale")
    return scales


@exact_kernel
def _fake_quant_weights(out: Array, w: Array, scales: Array, group: int) -> None:
    rows, n = w.shape
    for i in range(rows):
        for g in range(scales.shape[1]):
            scale = scales[i, g]
            end = min(n, (g + 1) * group)
            if scale == f4(0):
                for c in range(g * group, end):
                    out[i, c] = f4(0)
                continue
            for c in range(g * group, end):
                q = np.rint(w[i, c] / scale)
                out[i, c] = min(max(q, f4(-127)), f4(127)) * scale


def fake_quant_weights(out: Array, w: Array) -> None:
    """out = the float32 values that w's int8 codes and half precision scales stand for; both (rows, n) float32."""
    _fake_quant_weights(out, w, weight_scales(w).astype(np.float32), WEIGHT_GROUP)


def weight_codes(w: Array) -> tuple[Array, Array]:
    """int8 codes (rows, n) and float16 scales (rows, ceil(n / 64)): what the frozen file holds, before its panels."""
    scales = weight_scales(w)
    wide = np.repeat(scales.astype(np.float32), WEIGHT_GROUP, axis=1)[:, : w.shape[1]]
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.rint(w / wide)
    q = np.clip(np.where(wide == 0, f4(0), q), -127, 127)
    return q.astype(np.int8), scales
