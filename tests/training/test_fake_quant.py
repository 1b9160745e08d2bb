"""The simulated int8 arithmetic against csrc/FORMAT.md, written here a second time with plain NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training.errors import NotFiniteError
from pyengine_training.ops import cpu as ops
from pyengine_training.ops.cpu.fake_quant import weight_codes

Array = np.ndarray[Any, Any]
f4 = np.float32


def block_of(n: int) -> tuple[int, int, int]:
    """Section 4: b, and floor(k/2) and ceil(k/2) of b = 2^k."""
    k = max(k for k in range(7) if n % 2**k == 0)
    return 2**k, k // 2, (k + 1) // 2


def hadamard_law(x: Array) -> Array:
    """Section 4: T of each row of x (rows, n)."""
    h = 1
    while h < block_of(x.shape[1])[0]:
        pairs = x.reshape(len(x), -1, 2, h)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        x = np.stack([low + high, low - high], 2).reshape(x.shape)
        h *= 2
    return x


def hadamard_matrix(n: int) -> Array:
    """(n, n) float64: T as one matrix, Sylvester's construction along the diagonal."""
    matrix = np.ones((1, 1))
    while len(matrix) < block_of(n)[0]:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return np.kron(np.eye(n // len(matrix)), matrix)


def activations_law(x: Array, group: int) -> tuple[Array, Array]:
    """Section 5 after the Hadamard transform: codes (rows, n) and absmax / 127 (rows, groups), 0 where there is no scale."""
    codes, scales = np.zeros(x.shape, np.int8), []
    for start in range(0, x.shape[1], group):
        part = x[:, start : start + group]
        absmax = np.abs(part).max(axis=1)
        tiny = absmax < f4(2.0**-64)
        inv = f4(127) / np.where(tiny, f4(1), absmax)
        codes[:, start : start + group] = np.where(tiny[:, None], 0, np.rint(part * inv[:, None]))
        scales.append(np.where(tiny, f4(0), absmax / f4(127)))
    return codes, np.stack(scales, 1)


def weights_law(w: Array) -> tuple[Array, Array]:
    """Section 4."""
    w = hadamard_law(w) * f4(2.0 ** -block_of(w.shape[1])[2])
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


def rows_with_edges(n: int, transformed: bool = True) -> Array:
    """Many magnitudes, and rows that sit on the specification's edges once they are transformed."""
    generator = np.random.default_rng(n)
    x = generator.standard_normal((400, n)) * 10.0 ** generator.uniform(-6, 6, (400, 1))
    x = x.astype(f4)
    x[:4] = 0
    x[1, 0] = np.nextafter(f4(2.0**-64), f4(0))  # transformed, a whole block of it: below the limit, scale 0
    x[2, 0] = 2.0**-64  # on it
    x[3] = 127
    x[3, : n // 2] = np.arange(n // 2) % 64 + 0.5  # halves: to even
    if transformed:
        x[3] = hadamard_law(x[3:4])[0] / block_of(n)[0]
    x[4] = -x[3]
    x[5] = np.nextafter(f4(1), f4(2))
    x[6] = -0.0
    x[7, n // 2] = 1e4  # one large value: its block is all alike once transformed
    return x


LENGTHS = (1, 2, 31, 32, 64, 70, 80, 96, 100, 192, 256)


def assert_values(values: Array, x: Array, group: int, block: int, transformed: Array) -> None:
    """Values of x (rows, n) are T(q) times a scale with every power of two that undoes the Hadamard transform."""
    codes, scales = activations_law(transformed, group)
    wide = np.repeat(scales, group, axis=1)[:, : x.shape[1]]
    wanted = (hadamard_law(codes.astype(f4)) if block > 1 else codes) * (wide / f4(block))
    np.testing.assert_array_equal(values, wanted)


@pytest.mark.parametrize("n", LENGTHS)
def test_activation_values(n: int) -> None:
    x = rows_with_edges(n)
    values = x.copy()
    ops.fake_quant_activations(values)
    assert_values(values, x, 64, block_of(n)[0], hadamard_law(x))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("transformed", [True, False])
def test_head_values(n: int, transformed: bool) -> None:
    """Queries and keys, value heads: one group whatever the length."""
    x = rows_with_edges(n, transformed)
    values = x.copy()
    ops.fake_quant_heads(values, transformed)
    assert_values(values, x, n, block_of(n)[0] if transformed else 1, hadamard_law(x) if transformed else x)


@pytest.mark.parametrize("n", LENGTHS)
def test_weight_codes_and_values(n: int) -> None:
    w = rows_with_edges(n)
    w[8] = 1e-8  # the half precision scale becomes subnormal or 0
    w[9] = 3e-9
    codes, scales = weight_codes(w)
    wanted_codes, wanted_scales = weights_law(w)
    np.testing.assert_array_equal(codes, wanted_codes)
    np.testing.assert_array_equal(scales.view(np.uint16), wanted_scales.view(np.uint16))
    values = np.full_like(w, np.nan)
    ops.fake_quant_weights(values, w)
    wide = np.repeat(wanted_scales.astype(f4), 64, axis=1)[:, :n]
    wanted = hadamard_law(wanted_codes.astype(f4) * wide) * f4(2.0 ** -block_of(n)[1])  # the law's embedding row
    np.testing.assert_array_equal(values, wanted)


@pytest.mark.parametrize("n", LENGTHS)
def test_values_are_within_half_a_step_of_what_they_stand_for(n: int) -> None:
    """In the transformed basis, where the codes live: H x is off by at most half of absmax(H x) / 127, and roundings.

    With S the largest sum of magnitudes of a block: T(x) is off by at most 6 stages x 2^-24 S, a code's quotient by 3 x 2^-24
    of 127 steps <= S, and three roundings of each of up to 64 values, added up by H, by 3 x 64 x 2^-24 S: below 2^-16 S.
    """
    x = np.random.default_rng(n).standard_normal((50, n)).astype(f4)
    h = hadamard_matrix(n)
    transformed = x.astype(np.float64) @ h
    absmax = np.abs(np.pad(transformed, ((0, 0), (0, -n % 64)))).reshape(len(x), -1, 64).max(axis=2)
    step = np.repeat(absmax / 127, 64, axis=1)[:, :n]
    rounding = 2.0**-16 * (np.abs(x).astype(np.float64) @ np.abs(h)).max(axis=1, keepdims=True)
    values = x.copy()
    ops.fake_quant_activations(values)
    assert (np.abs(values.astype(np.float64) @ h - transformed) <= step / 2 + rounding).all()
    ops.fake_quant_weights(values, x)
    step *= 1 + 2.0**-11  # a half precision scale
    assert (np.abs(values.astype(np.float64) @ h - transformed) <= step / 2 + rounding).all()


@pytest.mark.parametrize("n", [128, 96, 70])
def test_snapped_weights_have_the_same_codes(n: int) -> None:
    """What is exported with ``snap`` freezes to the file that the masters freeze to."""
    w = np.random.default_rng(5).standard_normal((300, n)).astype(f4)
    snapped = np.empty_like(w)
    ops.fake_quant_weights(snapped, w)
    for ours, again in zip(weight_codes(w), weight_codes(snapped), strict=True):
        np.testing.assert_array_equal(ours, again)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = np.ones((3, 64), f4)
    x[1, 40] = bad
    for quantize in (ops.fake_quant_activations, lambda x: ops.fake_quant_heads(x, True)):
        with pytest.raises(NotFiniteError):
            quantize(x.copy())
    with pytest.raises(NotFiniteError):
        ops.fake_quant_heads(x.copy(), False)
    with pytest.raises(NotFiniteError):
        ops.fake_quant_weights(np.empty_like(x), x)


def test_values_that_are_too_large_once_transformed_are_refused() -> None:
    x = np.full((1, 64), 1e37, f4)  # finite, 64 of them are not
    with pytest.raises(NotFiniteError):
        ops.fake_quant_activations(x.copy())
    ops.fake_quant_heads(x.copy(), False)
    x[:] = 127 * 65520.0 * 1.01 * 8 / 64  # finite, but its scale overflows half precision
    with pytest.raises(NotFiniteError):
        ops.fake_quant_weights(np.empty_like(x), x)
