"""The simulated int8 arithmetic against csrc/FORMAT.md, written here a second time with plain NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training.errors import NotFiniteError
from pyengine_training.ops import cpu as ops

Array = np.ndarray[Any, Any]
f4 = np.float32


def activations_law(x: Array, group: int) -> tuple[Array, Array]:
    """Section 5: codes (rows, n) and scales (rows, groups)."""
    codes, scales = np.zeros(x.shape, np.int8), []
    for start in range(0, x.shape[1], group):
        part = x[:, start : start + group]
        absmax = np.abs(part).max(axis=1)
        tiny = absmax < f4(2.0**-64)
        scale = np.where(tiny, f4(0), absmax / f4(127))
        inv = f4(127) / np.where(tiny, f4(1), absmax)
        quotient = np.rint(part * inv[:, None])
        codes[:, start : start + group] = np.where(tiny[:, None], 0, quotient)
        scales.append(scale)
    return codes, np.stack(scales, 1)


def weights_law(w: Array) -> tuple[Array, Array]:
    """Section 4."""
    codes, scales = np.zeros(w.shape, np.int8), []
    for start in range(0, w.shape[1], 64):
        part = w[:, start : start + 64]
        scale = (np.abs(part).max(axis=1) / f4(127)).astype(np.float16)
        wide = scale.astype(f4)
        with np.errstate(divide="ignore", invalid="ignore"):
            q = np.rint(part / wide[:, None])
        codes[:, start : start + 64] = np.where(wide[:, None] == 0, 0, np.clip(q, -127, 127))
        scales.append(scale)
    return codes, np.stack(scales, 1)


def rows_with_edges(n: int) -> Array:
    """Many magnitudes, and rows that sit on the specification's edges."""
    generator = np.random.default_rng(n)
    x = generator.standard_normal((400, n)) * 10.0 ** generator.uniform(-6, 6, (400, 1))
    x = x.astype(f4)
    x[0] = 0
    x[1] = 2.0**-65  # below the limit: scale 0
    x[2] = 2.0**-64  # on it
    x[3] = 127
    x[3, : n // 2] = np.arange(n // 2) + 0.5  # halves: to even
    x[4] = -x[3]
    x[5] = np.nextafter(f4(1), f4(2))
    x[6] = -0.0
    return x


@pytest.mark.parametrize("n, group", [(1, 32), (31, 32), (32, 32), (80, 32), (256, 32), (64, 64)])
def test_activation_codes_and_values(n: int, group: int) -> None:
    x = rows_with_edges(n)
    codes, scales = ops.activation_codes(x, group)
    wanted_codes, wanted_scales = activations_law(x, group)
    np.testing.assert_array_equal(codes, wanted_codes)
    np.testing.assert_array_equal(scales, wanted_scales)
    values = x.copy()
    ops.fake_quant_activations(values, group)
    wide = np.repeat(wanted_scales, group, axis=1)[:, :n]
    np.testing.assert_array_equal(values, wanted_codes.astype(f4) * wide)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 192])
def test_weight_codes_and_values(n: int) -> None:
    w = rows_with_edges(n)
    w[7] = 1e-8  # the half precision scale becomes subnormal or 0
    w[8] = 3e-9
    codes, scales = ops.weight_codes(w)
    wanted_codes, wanted_scales = weights_law(w)
    np.testing.assert_array_equal(codes, wanted_codes)
    np.testing.assert_array_equal(scales.view(np.uint16), wanted_scales.view(np.uint16))
    values = np.full_like(w, np.nan)
    ops.fake_quant_weights(values, w)
    wide = np.repeat(wanted_scales.astype(f4), 64, axis=1)[:, :n]
    np.testing.assert_array_equal(values, wanted_codes.astype(f4) * wide)


def test_snapped_weights_have_the_same_codes() -> None:
    """What is exported with ``snap`` freezes to the file that the masters freeze to."""
    w = np.random.default_rng(5).standard_normal((300, 128)).astype(f4)
    snapped = np.empty_like(w)
    ops.fake_quant_weights(snapped, w)
    for ours, again in zip(ops.weight_codes(w), ops.weight_codes(snapped), strict=True):
        np.testing.assert_array_equal(ours, again)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = np.ones((3, 64), f4)
    x[1, 40] = bad
    with pytest.raises(NotFiniteError):
        ops.fake_quant_activations(x.copy())
    with pytest.raises(NotFiniteError):
        ops.weight_codes(x)
    x[1, 40] = 127 * 65520.0 * 1.01  # finite, but its scale overflows half precision
    with pytest.raises(NotFiniteError):
        ops.fake_quant_weights(np.empty_like(x), x)
