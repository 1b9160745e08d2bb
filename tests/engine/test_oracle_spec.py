"""The float32 specification (reference/spec_ops.py, spec_f32.py) against exact arithmetic, and its blocks against the
float64 oracle."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from engine.test_equalities import CONFIG, GOLDEN_LOGITS, TOKENS, Integers, make_model, tiny_tensors
from numpy.typing import NDArray
from reference import fixtures, frozen_reader, spec_ops
from reference.oracle import Oracle, hadamard_exponent, kl_divergence, visible
from reference.spec_f32 import Spec
from reference.spec_ops import fmaf

from pyengine import _core
from pyengine.format.config import FrozenConfig, same_layers

f32 = np.float32


# ---------------------------------------------------------------------- arithmetic


def rounded(exact: Fraction) -> np.float32:
    """The float32 nearest to an exact number, ties to even: by search among the neighbours, in
    rational arithmetic."""
    near = f32(float(exact))
    candidates = [np.nextafter(near, f32(-np.inf)), near, np.nextafter(near, f32(np.inf))]

    def key(x: np.float32) -> tuple[Fraction, int]:
        return abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1

    return min(candidates, key=key)


def test_fmaf_is_rounded_once() -> None:
    """(1 + 2^-23)(1 - 2^-23) 2^-24 + (1 + 2^-23) lies just below a tie; via float64 it would land
    on the tie and go up."""
    a, b, c = f32(1 + 2.0**-23), f32((1 - 2.0**-23) * 2.0**-24), f32(1 + 2.0**-23)
    assert f32(np.float64(a) * np.float64(b) + np.float64(c)) == f32(1 + 2.0**-22)  # twice rounded
    assert fmaf(a, b, c) == f32(1 + 2.0**-23)


def test_fmaf_equals_rational_arithmetic() -> None:
    """Random operands, a third of them nearly cancelling, some products and sums subnormal."""
    rng = np.random.default_rng(0)
    n = 3000
    a = (rng.standard_normal(n) * 2.0 ** rng.integers(-70, 40, n)).astype(f32)
    b = (rng.standard_normal(n) * 2.0 ** rng.integers(-70, 40, n)).astype(f32)
    c = (rng.standard_normal(n) * 2.0 ** rng.integers(-140, 40, n)).astype(f32)
    c[::3] = -(a * b)[::3]
    c[1::3] = (a * b)[1::3] * f32(2.0**24)
    got = fmaf(a, b, c)
    for i in range(n):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        assert got[i] == rounded(exact), (a[i], b[i], c[i])


def test_exp_is_accurate_and_clamped() -> None:
    x = np.concatenate([np.linspace(-87, 88, 50_001), [0.0, -0.0]]).astype(f32)
    relative = spec_ops.exp(x).astype(np.float64) / np.exp(x.astype(np.float64)) - 1
    assert np.abs(relative).max() < 1.2e-7
    assert spec_ops.exp(f32(0)) == 1
    assert spec_ops.exp(f32(-87.01)) == 0
    assert spec_ops.exp(f32(300)) == spec_ops.exp(f32(88))


def test_gelu_is_the_normal_distributions() -> None:
    """To a rounding or two of float32 of the argument, in both tails."""
    x = np.concatenate([np.linspace(-9, 9, 20_001), [-1e30, -88.0, 88.0, 1e30]]).astype(f32)
    exact = np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.astype(np.float64)])
    with np.errstate(over="ignore"):  # z * z
        error = np.abs(spec_ops.gelu(x) - exact)
    assert (error <= 2.0**-22 * np.maximum(np.abs(exact), 0.25)).all()
    assert spec_ops.gelu(f32(0)) == 0


def test_xielu_is_smooth_at_zero() -> None:
    x, curve = np.array([-20.0, -1.0, -1e-3, 0.0, 1e-3, 2.0], f32), np.array([0.75, 1.25, 0.5], f32)
    exact = [1.25 * (math.expm1(v) - v) + 0.5 * v if v < 0 else 0.75 * v * v + 0.5 * v for v in x.astype(np.float64)]
    assert np.abs(spec_ops.xielu(x, curve) - exact).max() < 2e-6


def test_lanes_and_tree_have_the_written_order() -> None:
    """Sixteen lanes ascending, then 8, 4, 2, 1, spelled out in scalars; another order gives other
    bits."""
    x = np.random.default_rng(1).standard_normal(1000).astype(f32)
    lanes = [f32(0)] * 16
    for i, value in enumerate(x):
        lanes[i % 16] = lanes[i % 16] + value
    for width in (8, 4, 2, 1):
        lanes = [lanes[i] + lanes[i + width] for i in range(width)]
    assert spec_ops.sum_lanes(x) == lanes[0]
    assert spec_ops.sum_lanes(x) != spec_ops.sum_lanes(x[::-1].copy())


# ---------------------------------------------------------------------- quantizers and products


def test_activation_scales_carry_their_share_of_the_factor() -> None:
    """k = 1: a key's scale is halved, an activation's is not. k = 3: a quarter and a half. By hand."""
    x = f32([[3, 1]])  # transformed: 4, 2
    codes, scales = spec_ops.quantize_transformed(x)
    assert codes[0, 0, :3].tolist() == [127, 64, 0] and codes.shape == (1, 1, 64)  # 63.5 goes to even
    assert scales[0, 0] == f32(4) / f32(127)
    codes, scales = spec_ops.quantize_transformed(x, 2, key=True)
    assert codes.tolist() == [[[127, 64]]] and scales[0, 0] == f32(4) / f32(127) / 2
    eight = np.eye(1, 8, 2, dtype=f32) * f32(254)  # the third column of the matrix of 8
    for key, factor in ((False, 0.5), (True, 0.25)):
        codes, scales = spec_ops.quantize_transformed(eight, 8, key=key)
        assert (codes[0, 0] == 127 * np.array([1, 1, -1, -1, 1, 1, -1, -1])).all()
        assert scales[0, 0] == f32(2 * factor)


def test_tiny_activations_are_zero_after_their_transform() -> None:
    """The bound of 2^-64 is one of the transformed values."""
    x = np.full((1, 4), 2.0**-66, f32)
    assert spec_ops.quantize_transformed(x)[1][0, 0] == f32(2.0**-64) / f32(127) / 2
    assert spec_ops.quantize_transformed(x / f32(2))[1][0, 0] == 0
    assert spec_ops.quantize(x, 4)[1][0, 0] == 0


@pytest.mark.parametrize("n", [1, 2, 8, 24, 64, 96, 100, 128, 576])
def test_where_codes_are_exact_a_product_is_that_of_the_values(n: int) -> None:
    """Rows whose transformed values are codes, with 127 in each group: products and scores lose nothing by it."""
    rng = np.random.default_rng(n)
    c = rng.integers(-127, 128, (5, n)).astype(f32)
    c[:, ::64] = 127
    x = spec_ops.hadamard(c) / f32(2 ** hadamard_exponent(n))
    assert np.array_equal(spec_ops.hadamard(x), c)
    exact = x.astype(np.float64) @ x.astype(np.float64).T
    weights = spec_ops.Matrix.quantize(x)
    product = spec_ops.matmul(*spec_ops.quantize_transformed(x), weights)
    assert np.abs(product - exact).max() <= 2.0**-23 * np.abs(exact).max()
    (q, q_scales), (k, k_scales) = (spec_ops.quantize_transformed(x, n, key=key) for key in (False, True))
    scores = spec_ops.scores_int8((q[:, 0], q_scales[:, 0]), (k[:, 0], k_scales[:, 0]), f32(1))
    assert np.abs(scores - exact).max() <= 2.0**-23 * np.abs(exact).max()


# ---------------------------------------------------------------------- chunked attention


@pytest.mark.parametrize("window", [0, 5, 300])
def test_chunks_combine_to_a_softmax(window: int) -> None:
    """600 positions: three chunks, some wholly out of the window. float32 sums of 600: 2^-24 * 25 *
    a few."""
    rng = np.random.default_rng(2)
    scores = (3 * rng.standard_normal((600, 600))).astype(f32)
    v = (rng.integers(1, 128, (600, 16)) * rng.choice([-1, 1], (600, 16))).astype(f32)
    v_scales = rng.uniform(0.5, 1, 600).astype(f32)
    seen = visible(600, window)
    masked = np.where(seen, scores.astype(np.float64), -np.inf)
    p = np.exp(masked - masked.max(axis=1, keepdims=True))
    terms = v_scales[:, None].astype(np.float64) * v
    wanted = p @ terms / p.sum(axis=1, keepdims=True)
    scale = p @ np.abs(terms) / p.sum(axis=1, keepdims=True)
    error = np.abs(spec_ops.attend(scores, seen, v_scales[:, None] * v, None)[0] - wanted) / scale
    assert error.max() < 2.0**-24 * 25 * 4
    # An int8 cache: every weight is wrong by at most half a code, which is 1 / 127 of the largest one of its group.
    weights = np.pad(p * v_scales, [(0, 0), (0, 8)]).reshape(600, -1, 32)
    half_codes = np.repeat(weights.max(axis=2) / 254, 32, axis=1)[:, :600] * seen
    bound = half_codes @ np.abs(v) / p.sum(axis=1, keepdims=True)
    error = np.abs(spec_ops.attend(scores, seen, v, v_scales)[0] - wanted)
    assert (error < 1.001 * bound + 2.0**-24 * 100 * scale).all() and error.max() > 2.0**-24 * 1000


def test_weights_of_values_by_hand() -> None:
    """Two groups of weights, exp(0) and exp(-88) = 0 times scales of powers of two: 127, 64 (of 63.5), 32 (of 31.75) and 0 of
    the first group; the second lies below 2^-64 and gives nothing."""
    scores = np.full((1, 40), -88, f32)
    scores[0, [0, 1, 2, 33]] = 0
    v_scales = np.ones(40, f32)
    v_scales[[1, 2, 33]] = 0.5, 0.25, 2.0**-65
    v = np.tile(f32([[1, -2]]), (40, 1))
    o, codes = spec_ops.attend(scores, np.ones((1, 40), bool), v, v_scales)
    assert codes.shape == (1, 2, 32) and codes[0, 0, :4].tolist() == [127, 64, 32, 0] and not codes[0, 1].any()
    assert o.tolist() == [[f32(223) * (f32(1) / f32(127)) / f32(4), f32(-446) * (f32(1) / f32(127)) / f32(4)]]


# ---------------------------------------------------------------------- blocks


@pytest.mark.parametrize("name", fixtures.names())
def test_blocks_agree(name: str) -> None:
    """Each block, fed the oracle's own input: every code is the oracle's, but for ties of its values (oracle.TIE), and
    with the same codes every row is the same to 1e-5 of its norm."""
    fixture = fixtures.load(name)
    config, weights = fixtures.canonical_config(fixture), fixtures.canonical_weights(fixture)
    oracle, spec = Oracle(config, weights, quantized=True), Spec(config, weights)
    x = oracle.embed(fixture.token_ids)
    for layer in range(config["n_layers"]):
        x = x.astype(f32)
        got = spec.block(layer, x)
        trace = oracle.block(layer, x.astype(np.float64), got)
        differing = [key for key in got if key.endswith("_codes") and not np.array_equal(got[key], trace[key])]
        assert not differing
        wanted = trace["out"]
        error = np.linalg.norm(got["out"] - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        assert error.max() < 1e-5
        x = wanted
    last = x.astype(f32)
    kl = kl_divergence(oracle.head(last.astype(np.float64)), spec.head(last))
    assert kl.max() < 1e-3


def spec_logits(config: FrozenConfig, tokens: list[int]) -> NDArray[np.float32]:
    """What csrc/FORMAT.md makes of the tensors of ``tiny_tensors``."""
    document = config.to_document()
    stored = {
        name: array.view(np.float16).reshape(-1) if name.endswith(".scales") else array
        for name, array in tiny_tensors(Integers(1), config)
    }
    logits: NDArray[np.float32] = Spec(document, frozen_reader.weights_of(stored, document)).logits(tokens)
    return logits


def test_golden_logits_are_those_of_the_specification() -> None:
    """The engine's golden hash is what csrc/FORMAT.md says, and not only what the engine did when it was recorded."""
    assert hashlib.sha256(spec_logits(CONFIG, TOKENS).tobytes()).hexdigest() == GOLDEN_LOGITS


@pytest.mark.parametrize("window", [0, 1, 37])
@pytest.mark.parametrize(
    ("dim", "hidden_dim", "head_dim"), [(73, 51, 2), (1, 1, 18), (34, 66, 48), (96, 3, 80), (20, 130, 512)]
)
def test_widths_of_every_kind_follow_the_specification(dim: int, hidden_dim: int, head_dim: int, window: int) -> None:
    """Blocks of 1 to 64 in rows, of 2 to 64 in heads; heads that fill their padding, and heads that do not."""
    shape = {"dim": dim, "hidden_dim": hidden_dim, "head_dim": head_dim}
    config = replace(CONFIG, **shape, layers=same_layers(2, window=window))
    context, tokens = _core.Context(make_model(config=config)), TOKENS[:70]
    sequence = context.sequence_new()
    context.forward(tokens, [sequence] * len(tokens), bytes([1]) * len(tokens))
    got = [bytes(context.logits(row)) for row in range(len(tokens))]
    assert got == [row.tobytes() for row in spec_logits(config, tokens)]


@cache
def cache_losses(name: str) -> tuple[float, float]:
    """Mean KL from the plain oracle of the specification with a float32 cache, and with an int8 one."""
    fixture = fixtures.load(name)
    config, weights = fixtures.canonical_config(fixture), fixtures.canonical_weights(fixture)
    plain = Oracle(config, weights, quantized=False).logits(fixture.token_ids)
    specs = (Spec(config, weights, kv_dtype=kv_dtype) for kv_dtype in ("f32", "int8"))
    float32, int8 = (float(kl_divergence(plain, spec.logits(fixture.token_ids)).mean()) for spec in specs)
    return float32, int8


@pytest.mark.parametrize("name", fixtures.names())
def test_float32_cache_is_as_near_as_int8(name: str) -> None:
    """Where the cache's share of the noise is small, chance may turn it by some per cent."""
    float32, int8 = cache_losses(name)
    assert 1e-5 < float32 < 1.2 * int8


def test_float32_cache_is_nearer_than_int8() -> None:
    """The reference KV dtype takes a part of the quantization away."""
    losses = np.array([cache_losses(name) for name in fixtures.names()])
    assert (losses[:, 0] < losses[:, 1]).mean() > 0.6
    assert losses[:, 0].sum() < losses[:, 1].sum()
