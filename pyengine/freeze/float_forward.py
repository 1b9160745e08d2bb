"""The forward pass of csrc/FORMAT.md in float32, over the weights of a source as they are before quantization.

What int8 costs is measured against it (eval/quality.py). It streams as freezing does: a matrix is read a block of rows at a time,
multiplied with the positions of all windows, and dropped, so that each weight of a layer is read once however long the text is
and no matrix is ever whole in memory. What grows with the text are activations: 4 * (hidden_dim + 2 q_dim + 4 dim) bytes a
position, or so.

A test holds it to transformers' logits and to the tests' float64 oracle for every architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..errors import ModelFormatError
from ..format.config import PARALLEL, XIELU, FrozenConfig
from ..format.container import pad
from ..format.inventory import PANEL_ROWS
from ..format.quantize import Float32Array, RowSource
from .sources import SourceModel, row_blocks

TokenIds = npt.NDArray[np.int64]


_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _product(x: Float32Array, source: RowSource) -> Float32Array:
    """x (n, columns) times a matrix (rows, columns) -> (n, rows)."""
    out = np.empty((len(x), source.rows), np.float32)
    for start, rows in row_blocks(source):
        out[:, start : start + len(rows)] = x @ rows.T
    return out


def _rmsnorm(x: Float32Array, gain: Float32Array, eps: float) -> Float32Array:
    """x (..., n), gain (n) -> (..., n)."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    normed: Float32Array = x / np.sqrt(mean_square + np.float32(eps)) * gain
    return normed


def _silu(x: Float32Array) -> Float32Array:
    y: Float32Array = x / (np.float32(1) + np.exp(-x))
    return y


def _gelu_tanh(x: Float32Array) -> Float32Array:
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    y: Float32Array = np.float32(0.5) * x * (np.float32(1) + np.tanh(inner))
    return y


def _gelu(x: Float32Array) -> Float32Array:
    y: Float32Array = x * (0.5 * _erfc(x * -math.sqrt(0.5))).astype(np.float32)
    return y


def _relu2(x: Float32Array) -> Float32Array:
    y: Float32Array = np.square(np.maximum(x, np.float32(0)))
    return y


def _xielu(x: Float32Array, curve: Float32Array) -> Float32Array:
    """``curve`` (3): curvatures above 0 and below, slope at 0."""
    above, below = np.maximum(x, np.float32(0)), np.minimum(x, np.float32(0))
    y: Float32Array = curve[0] * above * above + curve[1] * (np.expm1(below) - below) + curve[2] * x
    return y


def _clamped(gate: Float32Array, up: Float32Array) -> Float32Array:
    gate = np.minimum(gate, np.float32(7))
    h: Float32Array = gate / (np.float32(1) + np.exp(np.float32(-1.702) * gate)) * (np.clip(up, -7, 7) + np.float32(1))
    return h


# What becomes of the gate and of what it gates.
_GATES: dict[str, Callable[[Float32Array, Float32Array], Float32Array]] = {
    "swiglu": lambda gate, up: _silu(gate) * up,
    "geglu_tanh": lambda gate, up: _gelu_tanh(gate) * up,
    "swiglu_clamped": _clamped,
}
# The same of a layer without a gate.
_CURVES: dict[str, Callable[[Float32Array], Float32Array]] = {"gelu_tanh": _gelu_tanh, "gelu": _gelu, "relu2": _relu2}


def _softcap(x: Float32Array, cap: float) -> Float32Array:
    return np.float32(cap) * np.tanh(x / np.float32(cap)) if cap else x


def _rotated(x: Float32Array, inv_freq: Float32Array) -> Float32Array:
    """RoPE of pairs (i, i + head_dim / 2): x (n_windows, length, heads, head_dim) at positions 0.. -> the same shape."""
    angle = np.arange(x.shape[1], dtype=np.float32)[:, None] * inv_freq
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]  # (length, 1, head_dim / 2)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _attention(
    q: Float32Array, k: Float32Array, v: Float32Array, seen: npt.NDArray[np.bool_], cap: float, sinks: Float32Array | None
) -> Float32Array:
    """One window: q (length, n_heads, head_dim), k and v (length, n_kv_heads, head_dim), seen (query, position), sinks (n_heads)
    -> (length, n_heads * head_dim)."""
    length, n_heads, head_dim = q.shape
    n_kv_heads = k.shape[1]
    group = n_heads // n_kv_heads
    out = np.empty((length, n_kv_heads, group, head_dim), np.float32)
    for h in range(n_kv_heads):  # the scores of one key head at a time; contiguous matrices, or NumPy would not ask BLAS
        queries = q[:, h * group : (h + 1) * group].transpose(1, 0, 2).reshape(-1, head_dim)
        keys, values = np.ascontiguousarray(k[:, h]), np.ascontiguousarray(v[:, h])
        scores = (queries @ keys.T * np.float32(1 / np.sqrt(head_dim))).reshape(group, length, length)
        scores = np.where(seen, _softcap(scores, cap), np.float32(-np.inf))
        most = scores.max(axis=-1, keepdims=True)
        p = np.exp(scores - most)
        total = p.sum(axis=-1, keepdims=True)
        if sinks is not None:
            total += np.exp(sinks[h * group : (h + 1) * group, None, None] - most)
        p /= total
        out[:, h] = (p.reshape(-1, length) @ values).reshape(group, length, head_dim).transpose(1, 0, 2)
    return out.reshape(length, -1)


def _finite(x: Float32Array) -> Float32Array:
    if not np.isfinite(x).all():
        raise ModelFormatError("the forward pass of the source overflows float32")
    return x


class FloatForward:
    """The float32 forward of an open source over windows of one length, each at positions 0 and on.

    ``states`` is the work of all layers, ``logits`` that of the head for as many rows as one wants at once.
    """

    def __init__(self, model: SourceModel) -> None:
        self._model = model
        self._config: FrozenConfig = model.config

    def states(self, windows: TokenIds, progress: Callable[[int], None] | None = None) -> Float32Array:
        """Token ids (n_windows, length) -> the last layer's output, float32 (n_windows, length, dim). progress(n) is called when
        n layers are done. Raises ModelFormatError if a value is not finite, and for a source that is damaged."""
        with np.errstate(all="ignore"):
            x = self._embedded(windows)
            for layer in range(self._config.n_layers):
                self._layer(layer, x)
                if progress is not None:
                    progress(layer + 1)
        return _finite(x)

    def logits(self, states: Float32Array) -> Float32Array:
        """The last layer's output (n, dim) -> float32 logits (n, vocab_size); reads the head once. Raises like ``states``."""
        head = "tok_embeddings" if self._config.tie_embeddings else "output"
        with np.errstate(all="ignore"):
            normed = _rmsnorm(states, self._model.vectors["norm"](), self._config.norm_eps)
            logits = _product(normed, self._model.matrices[head])
            if self._config.output_bias:
                logits += self._model.vectors["output.bias"]()
            return _finite(_softcap(logits, self._config.logits_softcap))

    def _embedded(self, windows: TokenIds) -> Float32Array:
        embeddings = self._model.matrices["tok_embeddings"]
        ids, inverse = np.unique(windows, return_inverse=True)
        rows = np.concatenate([embeddings.read_rows(int(i), int(i) + 1) for i in ids])
        x: Float32Array = rows[inverse.reshape(windows.shape)]
        return x

    def _vector(self, layer: int, role: str) -> Float32Array | None:
        read = self._model.vectors.get(f"layers.{layer}.{role}")
        return None if read is None else read()

    def _normed(self, layer: int, role: str, x: Float32Array) -> Float32Array:
        """x (..., n) through a norm if the layer has it."""
        gain = self._vector(layer, role)
        return x if gain is None else _rmsnorm(x, gain, self._config.norm_eps)

    def _linear(self, layer: int, role: str, x: Float32Array) -> Float32Array:
        """x (n, columns) -> (n, rows), with the bias if the layer has one."""
        y = _product(x, self._model.matrices[f"layers.{layer}.{role}"])
        bias = self._vector(layer, f"{role}.bias")
        return y if bias is None else y + bias

    def _layer(self, layer: int, x: Float32Array) -> None:
        """x (n_windows, length, dim), the layer's input, becomes its output."""
        rows = x.reshape(-1, x.shape[-1])  # a view
        before = self._normed(layer, "attention_norm", rows)
        is_convolution = self._config.is_convolution(layer)
        mixed = self._convolved(layer, x.shape[1], before) if is_convolution else self._attended(layer, x.shape[1], before)
        added = self._linear(layer, "conv_out" if is_convolution else "wo", mixed)
        rows += self._normed(layer, "post_attention_norm", added)
        normed = before if self._config.layers[layer].norm == PARALLEL else self._normed(layer, "ffn_norm", rows)
        mlp = self._experts(layer, normed) if self._config.n_experts else self._mlp(layer, "", normed, self._config.hidden_dim)
        rows += self._normed(layer, "post_ffn_norm", mlp)

    def _convolved(self, layer: int, length: int, x: Float32Array) -> Float32Array:
        """Normed rows (n_windows * length, dim) -> what a convolution gives, of the same shape."""
        b, c, value = np.split(self._linear(layer, "conv_in", x).reshape(-1, length, 3 * x.shape[1]), 3, axis=2)
        u, y = b * value, np.zeros_like(value)
        taps = self._model.vectors[f"layers.{layer}.taps"]().reshape(-1, x.shape[1])
        for back, tap in enumerate(taps[::-1][:length]):
            y[:, back:] += tap * u[:, : length - back]
        return (c * y).reshape(x.shape)

    def _attended(self, layer: int, length: int, x: Float32Array) -> Float32Array:
        """Normed rows (n_windows * length, dim) -> what attention gives, (n_windows * length, q_dim)."""
        c, spec = self._config, self._config.layers[layer]
        q, k, v = np.split(self._linear(layer, "wqkv", x), [c.q_dim, c.q_dim + c.kv_dim], axis=1)
        if (bias := self._vector(layer, "key_bias")) is not None:
            k = k + bias
        if c.qk_norm_all_heads:
            q, k = self._normed(layer, "q_norm", q), self._normed(layer, "k_norm", k)
        q, k, v = (part.reshape(-1, length, part.shape[1] // c.head_dim, c.head_dim) for part in (q, k, v))
        norm_heads = c.qk_norm and not c.qk_norm_all_heads
        if norm_heads and not c.qk_norm_after_rope:
            q, k = self._normed(layer, "q_norm", q), self._normed(layer, "k_norm", k)
        inv_freq = self._model.vectors[f"rope.{spec.rope}.inv_freq"]()
        q, k = _rotated(q, inv_freq), _rotated(k, inv_freq)
        if c.qk_norm_after_rope:
            q, k = self._normed(layer, "q_norm", q), self._normed(layer, "k_norm", k)
        sinks = self._vector(layer, "sinks")
        i, j = np.ogrid[:length, :length]
        seen = (j <= i) & (j > i - (spec.window or length))
        return np.concatenate([_attention(*one, seen, c.attention_softcap, sinks) for one in zip(q, k, v, strict=True)])

    def _mlp(self, layer: int, prefix: str, x: Float32Array, hidden_dim: int) -> Float32Array:
        """An MLP of a layer, "", or one of its experts, "experts.E." and "shared.": x (n, dim) -> (n, dim)."""
        if not self._config.is_gated(layer):
            return self._linear(layer, f"{prefix}w_down", self._activated(layer, self._linear(layer, f"{prefix}w_up", x)))
        gated = _GATES[self._config.layers[layer].activation]
        h = np.empty((len(x), pad(hidden_dim, PANEL_ROWS)), np.float32)
        bias = self._vector(layer, f"{prefix}w_gate_up.bias")
        for start, rows in row_blocks(self._model.matrices[f"layers.{layer}.{prefix}w_gate_up"]):
            product = x @ rows.T if bias is None else x @ rows.T + bias[start : start + len(rows)]
            panels = product.reshape(len(x), -1, 2, PANEL_ROWS)  # gate and up in turn
            h[:, start // 2 : (start + len(rows)) // 2] = gated(panels[:, :, 0], panels[:, :, 1]).reshape(len(x), -1)
        return self._linear(layer, f"{prefix}w_down", h[:, :hidden_dim])

    def _activated(self, layer: int, x: Float32Array) -> Float32Array:
        """Of a layer without a gate."""
        curve = self._vector(layer, XIELU)
        return _CURVES[self._config.layers[layer].activation](x) if curve is None else _xielu(x, curve)

    def _shared_expert(self, layer: int, x: Float32Array) -> Float32Array:
        """What every row of x (n, dim) takes beside its experts, (n, dim)."""
        y = self._mlp(layer, "shared.", x, self._config.shared_hidden_dim)
        gate = self._vector(layer, "shared_router")
        return y if gate is None else y / (np.float32(1) + np.exp(-(x @ gate)))[:, None]

    def _experts(self, layer: int, x: Float32Array) -> Float32Array:
        """x (n, dim) -> the weighted sum of what each row's experts give, (n, dim). Experts that no row takes are not read."""
        c = self._config
        router = self._model.vectors[f"layers.{layer}.router"]().reshape(c.n_experts, c.dim)
        scores = x @ router.T
        if (bias := self._vector(layer, "router.bias")) is not None:
            scores += bias
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        taken = np.argsort(-scores, axis=1, kind="stable")[:, : c.n_experts_used]  # of equal ones the first
        shares = np.take_along_axis(p, taken, axis=1)
        if c.experts_normalized:
            shares /= shares.sum(axis=1, keepdims=True)
        out = self._shared_expert(layer, x) if c.shared_hidden_dim else np.zeros_like(x)
        for expert in np.unique(taken):
            rows, slots = np.nonzero(taken == expert)
            out[rows] += shares[rows, slots, None] * self._mlp(layer, f"experts.{expert}.", x[rows], c.hidden_dim)
        return out
