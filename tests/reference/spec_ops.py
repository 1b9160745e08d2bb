"""csrc/FORMAT.md sections 4 to 8 and 11 in float32 NumPy, operation for operation: the specification's second text.

Where oracle.py says what the numbers mean, this file says what their bits are. Every function follows the page's order of
operations; a model's pass is made of them in spec_f32.py. NumPy's float32 +, -, *, / and sqrt are IEEE; the fused multiply-add,
which NumPy lacks, is built below. Nothing is imported from the project.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .oracle import CHUNK, GROUP, PROBABILITY_GROUP, hadamard_exponent, quantize_weight

F32 = NDArray[np.float32]
Array = NDArray[Any]

LANES = 16
f32 = np.float32


# ---------------------------------------------------------------------- arithmetic


def fmaf(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> F32:
    """a * b + c with one rounding, float32, broadcast.

    The product of two float32 is exact in float64. The sum is made in float64 rounded *to odd* (if
    inexact, the neighbour with an odd last bit), which a second rounding to 24 bits cannot tell
    from the exact sum (53 >= 24 + 2); rounding the float64 sum to nearest instead would round twice
    and be wrong about once in 2^29.
    """
    product = np.multiply(a, b, dtype=np.float64)
    c64 = np.asarray(c, dtype=np.float64)
    total = product + c64
    back = total - product  # Knuth's two-sum: total + error is the exact sum
    error = (product - (total - back)) + (c64 - back)
    bits = total.view(np.int64)
    to_odd = np.where((error > 0) == (total > 0), 1, -1)  # away from zero or towards it
    bits = np.where((error != 0) & (bits % 2 == 0), bits + to_odd, bits)
    return bits.view(np.float64).astype(f32)


def exp(x: ArrayLike) -> F32:
    """pe_expf of csrc/kernels/pe_math.h: 2^n * (1 + f + f^2 P(f)), x = n ln 2 + f."""
    x = np.asarray(x, dtype=f32)
    clamped = np.minimum(np.maximum(x, f32(-87)), f32(88))
    n = np.rint(clamped * f32(1.44269504088896341))
    f = fmaf(n, f32(-0.693359375), clamped)
    f = fmaf(n, f32(2.12194440e-4), f)
    p: Array = np.full_like(f, f32(1.9875691500e-4))
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fmaf(p, f, f32(c))
    p = fmaf(p, f * f, f) + f32(1)
    y = (p.view(np.int32) + (n.astype(np.int32) << 23)).view(f32)
    return np.where(x < f32(-87), f32(0), y)


def sum_lanes(terms: F32) -> F32:
    """(..., n) -> (...): 16 lanes, each ascending, then the tree 8, 4, 2, 1; +0 pads n."""
    return _tree(_lanes(terms, lambda a, x: a + x))


def _lanes(x: F32, step: Any) -> F32:
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])
    a = np.zeros((*x.shape[:-1], LANES), dtype=f32)
    for i in range(0, padded.shape[-1], LANES):
        a = step(a, padded[..., i : i + LANES])
    return a


def _tree(a: F32) -> F32:
    for width in (8, 4, 2, 1):
        a = a[..., :width] + a[..., width : 2 * width]
    return a[..., 0]


# ---------------------------------------------------------------------- sections 4 to 7


@dataclass(frozen=True)
class Matrix:
    """A (rows, columns) matrix: codes (rows, n_groups, 64), scales (rows, n_groups)."""

    codes: NDArray[np.int8]
    scales: F32

    @classmethod
    def quantize(cls, w: ArrayLike) -> Matrix:
        return cls(*quantize_weight(w))


Weight = Matrix | F32


def hadamard(x: F32) -> F32:
    """T of section 4 along the last axis, (..., n): all pairs of a stage at once, stage after stage."""
    b = 2 ** hadamard_exponent(x.shape[-1])
    y: F32 = x.astype(f32)
    for h in (2**stage for stage in range(hadamard_exponent(x.shape[-1]))):
        pairs = y.reshape(*x.shape[:-1], -1, b // (2 * h), 2, h)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        y = np.stack([low + high, low - high], axis=-2)
    return y.reshape(x.shape)


def quantize_transformed(x: F32, group: int = GROUP, *, key: bool = False) -> tuple[Array, F32]:
    """Section 5 of activations, queries and keys: transformed, and the scales with their share of the factor."""
    k = hadamard_exponent(x.shape[-1])
    codes, scales = quantize(hadamard(x), group)
    return codes, scales * f32(2.0 ** -((k + 1) // 2 if key else k // 2))


def quantize(x: F32, group: int) -> tuple[Array, F32]:
    """The quantizer of section 5, without transform and without factor. x (..., n) -> codes (..., n_groups, group) int8, scales
    (..., n_groups). n is padded with zeros to whole groups."""
    n = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % group)])
    groups = padded.reshape(*x.shape[:-1], -1, group)
    absmax = np.abs(groups).max(axis=-1)
    zero = absmax < f32(2.0**-64)
    inv = np.where(zero, f32(0), f32(127) / np.where(zero, f32(1), absmax))
    codes = np.rint(groups * inv[..., None]).astype(np.int8)
    return codes, np.where(zero, f32(0), absmax / f32(127))


def matmul(codes: Array, scales: F32, w: Matrix) -> F32:
    """Section 6. Codes (n_tokens, n_groups, 64) and scales (n_tokens, n_groups) of x -> (n_tokens, rows)."""
    acc = np.zeros((len(codes), len(w.codes)), dtype=f32)
    x, rows = codes.astype(f32), w.codes.astype(f32)
    for g in range(w.codes.shape[1]):
        # int32 dot products: all partial sums are below 2^24, exact in float32 in any order
        d = x[:, g] @ rows[:, g].T
        acc = fmaf(d * scales[:, g, None], w.scales[:, g], acc)
    return acc


def rmsnorm(x: F32, w: F32, eps: float) -> F32:
    """x (..., n), w (n) -> (..., n)."""
    ss = _tree(_lanes(x, lambda a, e: fmaf(e, e, a)))
    inv_rms = f32(1) / np.sqrt(ss / f32(x.shape[-1]) + f32(eps))
    return (x * inv_rms[..., None]) * w


def cos_sin(angle: F32) -> tuple[F32, F32]:
    exact = np.asarray(angle, dtype=np.float64)
    return np.cos(exact).astype(f32), np.sin(exact).astype(f32)


def rope(x: F32, inv_freq: F32) -> F32:
    """x (n_tokens, n_heads, head_dim) at positions 0.. -> the same shape."""
    cos, sin = cos_sin(np.arange(len(x), dtype=f32)[:, None, None] * inv_freq)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([fmaf(a, cos, -(b * sin)), fmaf(b, cos, a * sin)], axis=-1)


def swiglu(gate: F32, up: F32) -> F32:
    return (gate * (f32(1) / (f32(1) + exp(-gate)))) * up


def geglu_tanh(gate: F32, up: F32) -> F32:
    z = gate * fmaf(gate * gate, f32(7.1354816272600251e-2), f32(1.5957691216057308))
    return (gate * (f32(1) / (f32(1) + exp(-z)))) * up


def gelu_tanh(up: F32) -> F32:
    return geglu_tanh(up, np.ones_like(up))


def gelu(x: F32) -> F32:
    z = np.maximum(-x, x)
    t, q = f32(1) / fmaf(z, f32(0.28), f32(1)), f32(-0.107845725)
    for c in (0.398108453, -0.25022687, 0.279478847, 0.0633031493, 0.117182028):
        q = fmaf(q, t, f32(c))
    return fmaf(-z, (q * t) * exp((z * z) * f32(-0.5)), np.maximum(x, f32(0)))


def relu2(x: F32) -> F32:
    return np.maximum(x, f32(0)) * np.maximum(x, f32(0))


def xielu(x: F32, curve: F32) -> F32:
    """curve (3): curvatures above 0 and below, slope at 0."""
    above, below = np.maximum(x, f32(0)), np.minimum(x, f32(0))
    return fmaf(curve[0], above * above, fmaf(curve[1], (exp(below) - f32(1)) - below, x * curve[2]))


def swiglu_clamped(gate: F32, up: F32) -> F32:
    gate, up = np.minimum(gate, f32(7)), np.maximum(np.minimum(up, f32(7)), f32(-7))
    return (gate * (f32(1) / (f32(1) + exp(-(gate * f32(1.702)))))) * (up + f32(1))


CURVES = {"gelu_tanh": gelu_tanh, "gelu": gelu, "relu2": relu2}  # of an MLP without a gate
GATES = {"swiglu": swiglu, "geglu_tanh": geglu_tanh, "swiglu_clamped": swiglu_clamped}


def softcap(x: F32, cap: float) -> F32:
    """0 = none."""
    if not cap:
        return x
    e = exp(x * (f32(2) / f32(cap)))
    return f32(cap) * ((e - f32(1)) / (e + f32(1)))


def dots(x: F32, w: F32) -> F32:
    """x (n_tokens, n), w (n_rows, n) -> the 16-lane sums of products, (n_tokens, n_rows)."""
    pad = [(0, 0), (0, -x.shape[1] % LANES)]
    x, w = np.pad(x, pad), np.pad(w, pad)
    a = np.zeros((len(x), len(w), LANES), dtype=f32)
    for i in range(0, x.shape[1], LANES):
        a = fmaf(x[:, None, i : i + LANES], w[None, :, i : i + LANES], a)
    return _tree(a)


def route(x: F32, router: F32, bias: F32 | None, n_used: int, normalized: bool) -> tuple[Array, F32]:
    """x (n_tokens, dim), router (n_experts, dim), bias (n_experts) -> which experts each row takes, and
    their weights, (n_tokens, n_experts)."""
    logits = dots(x, router)
    logits = logits if bias is None else logits + bias
    order = np.argsort(-logits, axis=1, kind="stable")  # ties: the lower index
    taken = np.zeros(logits.shape, bool)
    np.put_along_axis(taken, order[:, :n_used], True, axis=1)
    p = exp(logits - logits.max(axis=1, keepdims=True))
    total = np.zeros(len(x), f32)
    for e in range(len(router)):
        total = np.where(taken[:, e] | (not normalized), total + p[:, e], total)
    return taken, p / total[:, None]


# ---------------------------------------------------------------------- section 11


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a matrix: a (rank, columns), b (rows, rank), float32."""

    a: F32
    b: F32
    scale: float

    def product(self, x: F32) -> F32:
        """x (n_tokens, columns), the row before it is quantized -> (n_tokens, rows)."""
        t = dots(x, self.a) * f32(self.scale)
        d = np.zeros((len(x), len(self.b)), dtype=f32)
        for k in range(len(self.a)):
            d = fmaf(t[:, k, None], self.b[:, k], d)
        return d


# ---------------------------------------------------------------------- section 8


def scores_int8(q: tuple[Array, F32], k: tuple[Array, F32], c: F32) -> F32:
    """One head: codes (n, head_dim) and scales (n) of queries and of keys -> (n_queries, n_keys)."""
    (q_codes, q_scales), (k_codes, k_scales) = q, k
    d = q_codes.astype(f32) @ k_codes.astype(f32).T  # exact, as in matmul: at most 512 products
    return (d * (c * q_scales)[:, None]) * k_scales


def scores_f32(q: F32, k: F32, c: F32) -> F32:
    """One head, float32 KV cache. q (n_queries, head_dim), k (n_keys, head_dim)."""
    acc = np.zeros((len(q), len(k)), dtype=f32)
    for i in range(q.shape[1]):
        acc = fmaf(q[:, i, None], k[None, :, i], acc)
    return c * acc


def key_bias_scores(scores: F32, q: F32, bias: F32, inv_freq: F32, c: F32) -> F32:
    """One head: scores (n_queries, n_keys) of a cache without the keys' bias, with it. q (n_queries, head_dim) after
    RoPE, bias (head_dim)."""
    half, scores = len(bias) // 2, scores.copy()
    for i in range(half):
        x, y, bx, by = q[:, i], q[:, i + half], c * bias[i], c * bias[i + half]
        if bias[i] == 0 and bias[i + half] == 0:
            continue
        u, w = fmaf(x, bx, y * by), fmaf(y, bx, -(x * by))
        for begin in range(0, scores.shape[1], CHUNK):
            keys = slice(begin, min(begin + CHUNK, scores.shape[1]))
            cos, sin = cos_sin(f32(begin) * inv_freq[i])
            u_chunk, w_chunk = fmaf(u, cos, w * sin), fmaf(w, cos, -(u * sin))
            cos, sin = cos_sin(np.arange(keys.stop - begin, dtype=f32) * inv_freq[i])
            with_cos = fmaf(u_chunk[:, None], cos, scores[:, keys])
            scores[:, keys] = fmaf(w_chunk[:, None], sin, with_cos)
    return scores


def attend(scores: F32, seen: Array, v: F32, v_scales: F32 | None, sink: F32 | None = None) -> tuple[F32, Array]:
    """One head: scores and seen (n_queries, n_keys), v (n_keys, head_dim), v_scales (n_keys) or None for a float32 cache, sink ()
    -> (n_queries, head_dim), and the codes of the weights, (n_queries, n_groups, 32)."""
    n_queries = len(scores)
    big_m, big_l = np.zeros((2, n_queries), dtype=f32)
    big_o = np.zeros((n_queries, v.shape[1]), dtype=f32)
    started = np.zeros(n_queries, dtype=bool)
    codes = []
    for begin in range(0, scores.shape[1], CHUNK):
        chunk = slice(begin, begin + CHUNK)
        sees_chunk = seen[:, chunk].any(axis=1)
        m, p = _softmax_chunk(scores[:, chunk], seen[:, chunk])
        el = sum_lanes(p)
        if v_scales is None:
            o = _values_f32(p, v[chunk])
        else:
            chunk_codes, scales = quantize(p * v_scales[chunk], PROBABILITY_GROUP)
            codes.append(chunk_codes)
            o = _values_int8(chunk_codes, scales, v[chunk])
        new_m = np.maximum(big_m, m)
        a, b = exp(big_m - new_m), exp(m - new_m)
        merge, first = started & sees_chunk, ~started & sees_chunk
        big_l = np.select([merge, first], [fmaf(el, b, big_l * a), el], big_l)
        merged = fmaf(o, b[:, None], big_o * a[:, None])
        big_o = np.select([merge[:, None], first[:, None]], [merged, o], big_o)
        big_m = np.select([merge, first], [new_m, m], big_m)
        started |= sees_chunk
    empty = np.zeros((n_queries, 0, PROBABILITY_GROUP), np.int8)
    factor = f32(1) / big_l
    if sink is not None:
        most = np.maximum(big_m, sink)
        share = exp(big_m - most)
        factor = share / fmaf(big_l, share, exp(sink - most))
    return big_o * factor[:, None], np.concatenate([empty, *codes], axis=1)


def _softmax_chunk(scores: F32, seen: Array) -> tuple[F32, F32]:
    """m (n_queries) and p (n_queries, n_keys) of one chunk; of rows that see none of it, nothing is meant."""
    m = np.where(seen, scores, f32(-np.inf)).max(axis=1)
    m = np.where(seen.any(axis=1), m, f32(0))
    return m, np.where(seen, exp(np.where(seen, scores - m[:, None], f32(0))), f32(0))


def _values_int8(codes: Array, scales: F32, v: F32) -> F32:
    """codes (n_queries, n_groups, 32) and scales (n_queries, n_groups) of the weights, v (n_keys, head_dim) as codes ->
    (n_queries, head_dim). d is exact in float32: 32 * 127 * 127 < 2^24."""
    o = np.zeros((len(codes), v.shape[1]), dtype=f32)
    groups = np.pad(v, [(0, -len(v) % PROBABILITY_GROUP), (0, 0)]).reshape(-1, PROBABILITY_GROUP, v.shape[1])
    for g, group in enumerate(groups):
        o = fmaf(codes[:, g].astype(f32) @ group, scales[:, g, None], o)
    return o


def _values_f32(p: F32, v: F32) -> F32:
    """p (n_queries, n_keys), v (n_keys, head_dim) -> (n_queries, head_dim)."""
    o = np.zeros((len(p), v.shape[1]), dtype=f32)
    for j in range(len(v)):
        o = fmaf(p[:, j, None], v[j], o)
    return o


def convolve(u: F32, taps: F32) -> F32:
    """u (n_tokens, dim) at positions 0.., taps (window, dim), the oldest position's first -> (n_tokens, dim)."""
    y = np.zeros_like(u)
    for k, tap in enumerate(taps):
        back = len(taps) - 1 - k
        y[back:] = y[back:] + tap * u[: len(u) - back]
    return y
