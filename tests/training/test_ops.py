"""Every op's backward against central differences of its forward, in float64, on the kernels that
train.

A scalar is made of each output by a fixed random weighting; its gradient by the op must equal the
differences at every input element (the inputs are small), to 1e-6 of the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training.ops import cpu as ops
from pyengine_training.ops.needs import Needs, allocate

Array = np.ndarray[Any, Any]
H = 1e-5


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def assert_gradient(loss: Callable[[], float], x: Array, analytic: Array) -> None:
    """Central differences of loss() with respect to every element of x, which loss reads."""
    numeric = np.empty_like(x)
    for index in np.ndindex(x.shape):
        keep = x[index]
        x[index] = keep + H
        up = loss()
        x[index] = keep - H
        down = loss()
        x[index] = keep
        numeric[index] = (up - down) / (2 * H)
    scale = np.abs(numeric).max() + 1e-12
    np.testing.assert_allclose(analytic / scale, numeric / scale, atol=1e-6)


def memory(needs: Needs) -> dict[str, Any]:
    """Scratch whose old contents would show."""
    return allocate(needs, lambda shape, dtype: np.full(shape, np.nan, dtype))


def test_embedding() -> None:
    table, cot, tokens = normal(7, 5), normal(6, 5, seed=1), np.array([3, 0, 3, 6, 1, 3])
    x = np.empty((6, 5))

    def loss() -> float:
        ops.embedding_forward(x, table, tokens)
        return float((x * cot).sum())

    dtable = np.zeros_like(table)
    ops.embedding_backward(dtable, cot, tokens, {})
    assert_gradient(loss, table, dtable)


def test_linear() -> None:
    x, w, cot = normal(5, 7), normal(3, 7, seed=1), normal(5, 3, seed=2)
    y = np.empty((5, 3))

    def loss() -> float:
        ops.linear_forward(y, x, w)
        return float((y * cot).sum())

    dx, dw = np.full_like(x, np.nan), np.full_like(w, np.nan)
    ops.linear_backward_input(dx, cot, w)
    ops.linear_backward_weight(dw, cot, x)
    assert_gradient(loss, x, dx)
    assert_gradient(loss, w, dw)


@pytest.mark.parametrize("n", [1, 7, 16, 33])
def test_rmsnorm(n: int) -> None:
    x, w, cot = normal(4, n), normal(n, seed=1), normal(4, n, seed=2)
    y, inv_rms = np.empty_like(x), np.empty(4)

    def loss() -> float:
        ops.rmsnorm_forward(y, inv_rms, x, w, 1e-3)
        return float((y * cot).sum())

    loss()
    before = normal(4, n, seed=3)  # dx and dw are added to
    dx, dw = before.copy(), np.ones(n)
    ops.rmsnorm_backward(dx, dw, cot, x, w, inv_rms, {})
    assert_gradient(loss, x, dx - before)
    assert_gradient(loss, w, dw - 1)


def test_rmsnorm_with_residual_is_addition_then_norm() -> None:
    x, residual, w = normal(3, 9), normal(3, 9, seed=1), normal(9, seed=2)
    wanted, inv_wanted = np.empty_like(x), np.empty(3)
    ops.rmsnorm_forward(wanted, inv_wanted, x + residual, w, 1e-5)
    y, inv_rms, total = np.empty_like(x), np.empty(3), x.copy()
    ops.rmsnorm_residual_forward(y, inv_rms, total, residual, w, 1e-5)
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_allclose(y, wanted, rtol=1e-12)
    np.testing.assert_allclose(inv_rms, inv_wanted, rtol=1e-12)


@pytest.mark.parametrize("n_rep", [1, 3])
def test_qk_norm(n_rep: int) -> None:
    batch, n_kv, seq, head_dim = 2, 2, 3, 5
    x = normal(batch, seq, n_kv * (n_rep + 2), head_dim)
    weights, cot = [1 + normal(head_dim, seed=s) / 4 for s in (1, 2)], normal(*x.shape, seed=3)
    state = memory(ops.qk_norm_state(x.shape, n_kv, np.float64, np.float64))
    kept = state["raw"], state["inv_rms"]

    def loss() -> float:
        qkv = x.copy()
        ops.qk_norm_forward(qkv, *kept, *weights, 1e-3)
        np.testing.assert_array_equal(qkv[:, :, -n_kv:], x[:, :, -n_kv:])  # values stay as they are
        return float((qkv * cot).sum())

    loss()
    dx, (dq, dk) = cot.copy(), np.ones((2, head_dim))  # in place; dq and dk are added to
    ops.qk_norm_backward(dx, dq, dk, *kept, *weights, {})
    assert_gradient(loss, x, dx)
    for w, dw in zip(weights, (dq, dk), strict=True):
        assert_gradient(loss, w, dw - 1)


@pytest.mark.parametrize("n_rep", [1, 3])
def test_rope(n_rep: int) -> None:
    batch, n_kv, seq, head_dim = 2, 2, 5, 6
    qkv = normal(batch, seq, n_kv * (n_rep + 2), head_dim)
    q = np.empty((batch, n_kv, seq, n_rep, head_dim))
    k, v = np.empty((2, batch, n_kv, seq, head_dim))
    cos, sin = (t.astype(np.float64) for t in ops.rope_tables(seq, head_dim, 100.0))
    cq, ck, cv = normal(*q.shape, seed=1), normal(*k.shape, seed=2), normal(*v.shape, seed=3)

    def loss() -> float:
        ops.qkv_rope_forward(q, k, v, qkv, cos, sin)
        return float((q * cq).sum() + (k * ck).sum() + (v * cv).sum())

    dqkv = np.full_like(qkv, np.nan)
    ops.qkv_rope_backward(dqkv, cq, ck, cv, cos, sin)
    assert_gradient(loss, qkv, dqkv)


def test_rope_tables_turn_pairs_by_the_angle() -> None:
    cos, sin = ops.rope_tables(9, 8, 10000.0)
    angle = np.arange(9)[:, None] / 10000.0 ** (np.arange(4) / 4)
    np.testing.assert_allclose(cos, np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angle), atol=1e-6)


@pytest.mark.parametrize("seq, n_rep", [(1, 2), (5, 1), (7, 2)])
def test_attention(seq: int, n_rep: int) -> None:
    batch, n_kv, head_dim, scale = 2, 2, 4, 0.5
    q = normal(batch, n_kv, seq, n_rep, head_dim)
    k, v = (normal(batch, n_kv, seq, head_dim, seed=s) for s in (1, 2))
    cot = normal(*q.shape, seed=3)
    o, lse = np.empty_like(q), np.empty((batch, n_kv, seq * n_rep))
    scratch = memory(ops.attention_scratch(q.shape, np.float64, True))
    starts = np.stack([np.zeros(seq, np.int64), np.arange(seq) // 2 * 2])  # a whole row, and documents of two

    def loss() -> float:
        ops.attention_forward(o, lse, q, k, v, starts, scale, scratch)
        return float((o * cot).sum())

    loss()
    dq, dk, dv = np.full_like(q, np.nan), np.full_like(k, np.nan), np.full_like(v, np.nan)
    ops.attention_backward(dq, dk, dv, cot, q, k, v, o, lse, starts, scale, scratch)
    for x, dx in ((q, dq), (k, dk), (v, dv)):
        assert_gradient(loss, x, dx)


@pytest.mark.parametrize("quantize", [False, True])
def test_documents_in_a_row_attend_as_if_alone(quantize: bool) -> None:
    """Three documents behind one another, across tiles, and each by itself."""
    n_rep, head_dim, ends = 2, 8, (100, 230, 300)
    seq = ends[-1]
    q, cot = (normal(1, 1, seq, n_rep, head_dim, seed=s) for s in (0, 3))
    k, v = (normal(1, 1, seq, head_dim, seed=s) for s in (1, 2))

    def run(part: slice, starts: Any) -> list[Any]:
        length = part.stop - part.start
        mine = [np.ascontiguousarray(x[:, :, part]) for x in (q, k, v, cot)]
        o, lse = np.empty_like(mine[0]), np.empty((1, 1, length * n_rep))
        scratch = memory(ops.attention_scratch(o.shape, np.float64, True))
        ops.attention_forward(o, lse, *mine[:3], starts, 0.3, scratch, quantize)
        grads = [np.empty_like(x) for x in mine[:3]]
        ops.attention_backward(*grads, mine[3], *mine[:3], o, lse, starts, 0.3, scratch)
        return [o, *grads]

    begins = (0, *ends[:-1])
    starts = np.concatenate([np.full(end - begin, begin) for begin, end in zip(begins, ends, strict=True)])[None]
    together = run(slice(0, seq), starts)
    for begin, end in zip(begins, ends, strict=True):
        alone = run(slice(begin, end), np.zeros((1, end - begin), np.int64))
        for got, wanted in zip(together, alone, strict=True):
            np.testing.assert_allclose(got[:, :, begin:end], wanted, rtol=1e-9, atol=1e-12)


def test_attention_tiles_equal_one_softmax() -> None:
    """A sequence longer than a tile, against the plain formula."""
    seq, n_rep, head_dim = 300, 2, 8
    q = normal(1, 1, seq, n_rep, head_dim)
    k, v = (normal(1, 1, seq, head_dim, seed=s) for s in (1, 2))
    o, lse = np.empty_like(q), np.empty((1, 1, seq * n_rep))
    starts = np.zeros((1, seq), np.int64)
    ops.attention_forward(o, lse, q, k, v, starts, 0.3, memory(ops.attention_scratch(q.shape, np.float64, False)))
    scores = np.einsum("trd,sd->rts", q[0, 0], k[0, 0]) * 0.3
    scores[:, np.triu(np.ones((seq, seq), bool), 1)] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    wanted = np.einsum("rts,sd->trd", p, v[0, 0])
    np.testing.assert_allclose(o[0, 0], wanted, rtol=1e-9, atol=1e-12)


def test_rounded_probabilities_are_codes_times_scales() -> None:
    """Over two tiles: p times the values' scales in groups of 32 keys of a document, as codes of 7 bits, times the codes of v."""
    seq, n_rep, head_dim, ends = 200, 2, 8, (70, 200)
    q, k = normal(1, 1, seq, n_rep, head_dim), normal(1, 1, seq, head_dim, seed=1)
    v_codes = np.random.default_rng(2).integers(-127, 128, (seq, head_dim))
    v_codes[:, 3] = 127
    scales = np.abs(normal(seq, seed=3))
    scales[5] = 0
    v = (v_codes * scales[:, None])[None, None]
    o, lse = np.empty_like(q), np.empty((1, 1, seq * n_rep))
    starts = np.where(np.arange(seq) < ends[0], 0, ends[0])[None]
    scratch = memory(ops.attention_scratch(q.shape, np.float64, False))
    ops.attention_forward(o, lse, q, k, v, starts, 3.0, scratch, True)
    for t in range(seq):
        keys = np.arange(starts[0, t], t + 1)
        scores = q[0, 0, t] @ k[0, 0, keys].T * 3.0
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        wanted = np.zeros((n_rep, head_dim))
        for group in range(0, len(keys), 32):
            weights = p[:, group : group + 32] * scales[keys[group : group + 32]]
            most = weights.max(axis=1, keepdims=True)
            wanted += np.rint(weights / most * 127) @ v_codes[keys[group : group + 32]] * most / 127
        np.testing.assert_allclose(o[0, 0, t], wanted / p.sum(axis=1, keepdims=True), rtol=1e-9, atol=1e-12)


def test_heads_are_a_permutation() -> None:
    o = normal(2, 3, 4, 2, 5)
    rows, back = np.empty((2, 4, 6, 5)), np.empty_like(o)
    ops.merge_heads(rows, o)
    np.testing.assert_array_equal(rows, o.transpose(0, 2, 1, 3, 4).reshape(rows.shape))
    ops.split_heads(back, rows)
    np.testing.assert_array_equal(back, o)


def test_swiglu() -> None:
    gate_up, cot, h = normal(3, 14), normal(3, 7, seed=1), np.empty((3, 7))

    def loss() -> float:
        ops.swiglu_forward(h, gate_up)
        return float((h * cot).sum())

    dgate_up = np.full_like(gate_up, np.nan)
    ops.swiglu_backward(dgate_up, cot, gate_up)
    assert_gradient(loss, gate_up, dgate_up)


def test_cross_entropy() -> None:
    logits, targets, losses = 3 * normal(5, 11), np.array([0, 10, -1, 4, 4]), np.empty(5)

    def loss() -> float:
        ops.cross_entropy_forward(losses, logits, targets)
        return float(losses.sum() / 4)

    value = loss()
    assert losses[2] == 0
    gradient = logits.copy()
    ops.cross_entropy_forward_backward(losses, gradient, targets, 0.25)
    assert losses.sum() / 4 == pytest.approx(value, rel=1e-12)
    assert_gradient(loss, logits, gradient)


@pytest.mark.parametrize("alpha, tau", [(0.0, 1.0), (0.3, 2.0), (1.0, 0.7)])
def test_distillation_loss(alpha: float, tau: float) -> None:
    logits, teacher = 2 * normal(4, 9), 2 * normal(4, 9, seed=1)
    targets, losses = np.array([1, -1, 8, 0]), np.empty(4)

    def loss() -> float:
        scratch = logits.copy()
        ops.cross_entropy_kl_forward_backward(losses, scratch, teacher, targets, alpha, tau, 0.5)
        return float(losses.sum() * 0.5)

    gradient = logits.copy()
    ops.cross_entropy_kl_forward_backward(losses, gradient, teacher, targets, alpha, tau, 0.5)
    assert_gradient(loss, logits, gradient)


def test_distillation_loss_is_the_textbook_formula() -> None:
    logits, teacher, targets = normal(2, 6), normal(2, 6, seed=1), np.array([2, 5])
    alpha, tau = 0.3, 2.0
    losses = np.empty(2)
    scratch = logits.copy()
    ops.cross_entropy_kl_forward_backward(losses, scratch, teacher, targets, alpha, tau, 1.0)

    def log_softmax(x: Array) -> Array:
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    hard = -log_softmax(logits)[[0, 1], targets]
    p, q = log_softmax(logits / tau), log_softmax(teacher / tau)
    kl = (np.exp(q) * (q - p)).sum(-1)
    np.testing.assert_allclose(losses, (1 - alpha) * hard + alpha * tau**2 * kl, rtol=1e-10)


def test_adamw_is_the_textbook_formula() -> None:
    p, g = normal(50), normal(50, seed=1)
    m, v = np.zeros(50), np.zeros(50)
    wanted, wm, wv = p.copy(), np.zeros(50), np.zeros(50)
    for step in (1, 2, 3):
        ops.adamw_update(
            p, g, m, v, step=step, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8,
            weight_decay=0.2, grad_scale=0.5,
        )  # fmt: skip
        wm = 0.9 * wm + 0.1 * 0.5 * g
        wv = 0.95 * wv + 0.05 * (0.5 * g) ** 2
        update = wm / (1 - 0.9**step) / (np.sqrt(wv / (1 - 0.95**step)) + 1e-8)
        wanted -= 0.1 * (update + 0.2 * wanted)
    np.testing.assert_allclose(p, wanted, rtol=1e-10)


@pytest.mark.parametrize("shape", [(24, 24), (10, 40), (40, 10)])
def test_muon_step_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    p, m = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    g = normal(*shape).astype(np.float32)
    scratch = memory(ops.muon_scratch(*shape, np.float32))
    ops.muon_update(p, g, m, lr=1.0, momentum=0.95, weight_decay=0.0, grad_scale=1.0, scratch=scratch)
    singular = np.linalg.svd(p, compute_uv=False) / max(1.0, shape[0] / shape[1]) ** 0.5
    assert singular.min() > 0.3 and singular.max() < 1.3
    direction = np.linalg.svd(g, full_matrices=False)
    assert np.sum(-p * (direction[0] @ direction[2])) > 0.7 * np.abs(singular).sum()


def test_grad_norm_of_any_length() -> None:
    for n in (1, 1023, 70_001):
        g = normal(n).astype(np.float32)
        partial = np.empty(-(-n // 65536))
        ops.sum_of_squares(partial, g, 65536)
        assert partial.sum() == pytest.approx(float((g.astype(np.float64) ** 2).sum()), rel=1e-6)
    assert ops.clip_coefficient(0.5, 1.0) == 1
    assert ops.clip_coefficient(4.0, 1.0) == pytest.approx(0.25, rel=1e-6)
    assert ops.clip_coefficient(4.0, 0.0) == 1


def test_float32_exponential_is_close_to_libm() -> None:
    """Through cross-entropy with a zero logit: loss = log(1 + exp(x))."""
    x = np.linspace(-30, 30, 4001).astype(np.float32)
    logits = np.stack([np.zeros_like(x), x], 1)
    losses = np.empty(len(x), np.float32)
    ops.cross_entropy_forward(losses, logits, np.zeros(len(x), np.int64))
    np.testing.assert_allclose(losses, np.logaddexp(0, x.astype(np.float64)), rtol=3e-6, atol=1e-6)
