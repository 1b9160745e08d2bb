"""The Llama family in float64 NumPy, once plain and once with the quantization of csrc/FORMAT.md.

The oracle imports neither half of the project: what it shares with the engine is the page FORMAT.md
and nothing else.

    plain = Oracle(config, weights, quantized=False)  # what transformers computes, in float64
    spec = Oracle(config, weights, quantized=True)  # the specification's int8 codes, float64 around them

Weights are named as in FORMAT.md section 2 but before fusion: ``layers.I.wq``, ``wk``, ``wv``,
``w_gate``, ``w_up`` and their ``.bias`` stand alone, and a matrix is one (rows = outputs, columns =
inputs) float array. ``config`` is the attachment ``config.json``: the same keys, in any mapping.

In quantized mode every value that the engine would hold as codes is transformed, rounded to those codes,
multiplied back and transformed back in float64. The int32 dot products of the specification are exact and so, to 1e-15, are
float64 products of dequantized values; hence the two differ only by float32 rounding, and by the
codes that such a rounding flips. A flipped code moves everything after it, so a comparison gives ``block`` the
codes of the other side, which are taken where a value lies within TIE of the middle between two codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
Trace = dict[str, Array]  # the intermediates of one block, by name; see Oracle.block

GROUP = 64  # columns of a weight row, or activations, that share a scale; and the most that are transformed together
CHUNK = 256  # positions that share a softmax maximum
PROBABILITY_GROUP = 32  # positions whose probabilities share a scale
SMALLEST_ABSMAX = 2.0**-64  # a group below this has codes 0
TIE = 1e-3  # of a code: the error of a float32 value, about 2^-22 of the largest, is 127 * 2^-22 of a code


def hadamard_exponent(n: int) -> int:
    """k: rows of n values are transformed in blocks of 2^k."""
    return next(k for k in range(6, -1, -1) if n % 2**k == 0)


@cache
def hadamard_matrix(k: int) -> Array:
    """(2^k, 2^k) float64: 1 where i & j has an even number of ones, else -1."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(2**k)] for i in range(2**k)])


def hadamard(x: Array) -> Array:
    """T of FORMAT.md section 4 along the last axis, (..., n) float64: a product with the matrix."""
    k = hadamard_exponent(x.shape[-1])
    return (x.reshape(*x.shape[:-1], -1, 2**k) @ hadamard_matrix(k)).reshape(x.shape)


def hadamard_f32(x: ArrayLike) -> Array:
    """The same in float32, with each addition in its place: one after the other, as the page has it."""
    x = np.array(x, dtype=np.float32)
    n = x.shape[-1]
    b = 2 ** hadamard_exponent(n)
    h = 1
    while h < b:
        for i in range(n):
            if i % b & h == 0:
                x[..., i], x[..., i + h] = x[..., i] + x[..., i + h], x[..., i] - x[..., i + h]
        h *= 2
    return x


def quantize_weight(w: ArrayLike) -> tuple[Array, Array]:
    """FORMAT.md section 4, in float32 as it says, so that these codes are the file's own.

    w (rows, columns) -> codes (rows, n_groups, 64) int8 and scales (rows, n_groups) float32, each
    a widened f16.
    """
    rows, columns = np.shape(w)
    padded = np.zeros((rows, -columns % GROUP + columns), dtype=np.float32)
    padded[:, :columns] = hadamard_f32(w) / np.float32(2 ** ((hadamard_exponent(columns) + 1) // 2))
    groups = padded.reshape(rows, -1, GROUP)
    absmax = np.abs(groups).max(axis=2)
    scales = (absmax / np.float32(127)).astype(np.float16).astype(np.float32)
    if not np.isfinite(scales).all():
        raise ValueError("a weight is not finite, or its scale overflows f16")
    divisor = np.where(scales == 0, np.float32(np.inf), scales)  # w / inf = 0: codes 0
    codes = np.clip(np.rint(groups / divisor[:, :, None]), -127, 127)
    return codes.astype(np.int8), scales


def dequantize_codes(codes: Array, scales: Array, columns: int) -> Array:
    """Codes (rows, n_groups, 64) and scales (rows, n_groups) of weights -> what they mean, (rows, columns) float64."""
    values = codes * scales[:, :, None].astype(np.float64)
    return hadamard(values.reshape(len(codes), -1)[:, :columns]) / 2 ** (hadamard_exponent(columns) // 2)


def dequantize_weight(w: ArrayLike) -> Array:
    """(rows, columns) -> what its codes mean, (rows, columns) float64."""
    return dequantize_codes(*quantize_weight(w), np.shape(w)[1])


def quantize(x: Array, group: int, others: Array | None = None) -> tuple[Array, Array]:
    """FORMAT.md section 5 along the last axis, in float64, of values that are transformed already and without the powers of two.

    x (..., n) -> codes (..., n_groups, group) int8 and scales (..., n_groups) float64; n is padded
    with zeros. Of the codes ``others``, those are taken that a value was within TIE of.
    """
    n = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % group)])
    groups = padded.reshape(*x.shape[:-1], -1, group)
    absmax = np.abs(groups).max(axis=-1)
    absmax = np.where(absmax < SMALLEST_ABSMAX, 0.0, absmax)
    inverse = np.divide(127.0, absmax, out=np.zeros_like(absmax), where=absmax > 0)
    quotients = groups * inverse[..., None]
    codes = np.rint(quotients)
    if others is not None:
        codes = np.where(np.abs(quotients - others) < 0.5 + TIE, others, codes)
    return codes.astype(np.int8), absmax / 127.0


def rmsnorm(x: Array, w: Array, eps: float) -> Array:
    """x (..., n), w (n) -> (..., n)."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * w


def silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def gelu(x: Array) -> Array:
    return 0.5 * x * np.vectorize(math.erfc)(-x / np.sqrt(2.0))


def xielu(x: Array, above: float, below: float, slope: float) -> Array:
    return slope * x + np.where(x > 0, above * x * x, below * (np.expm1(np.minimum(x, 0.0)) - x))


def swiglu_clamped(gate: Array, up: Array) -> Array:
    gate = np.minimum(gate, 7.0)
    return gate / (1.0 + np.exp(-1.702 * gate)) * (np.clip(up, -7.0, 7.0) + 1.0)


CURVES = {"gelu_tanh": gelu_tanh, "gelu": gelu, "relu2": lambda x: np.maximum(x, 0.0) ** 2}
GATES = {
    "swiglu": lambda gate, up: silu(gate) * up,
    "geglu_tanh": lambda gate, up: gelu_tanh(gate) * up,
    "swiglu_clamped": swiglu_clamped,
}


def softcap(x: Array, cap: float) -> Array:
    """0 = none."""
    return cap * np.tanh(x / cap) if cap else x


def rope(x: Array, inv_freq: Array) -> Array:
    """Rotate pairs (i, i + head_dim / 2). x (n_tokens, n_heads, head_dim) at positions 0.. -> the
    same shape.

    The angle is a float32 product, in the specification and in transformers alike; everything after it is
    float64.
    """
    positions = np.arange(len(x), dtype=np.float32)
    angle = (positions[:, None] * inv_freq.astype(np.float32)).astype(np.float64)
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def layer_field(config: Mapping[str, Any], name: str, layer: int) -> Any:
    """An entry of config.json's "layers": one value for all layers, or a list."""
    value = config["layers"][name]
    return value[layer] if isinstance(value, list) else value


def is_convolution(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer has a convolution in attention's place."""
    return "mixer" in config["layers"] and layer_field(config, "mixer", layer) == "short_conv"


def visible(n_tokens: int, window: int) -> Array:
    """(n_tokens, n_tokens) bool: whether query i sees position j."""
    i, j = np.arange(n_tokens)[:, None], np.arange(n_tokens)[None, :]
    return (j <= i) & ((j > i - window) if window else True)


def log_softmax(logits: Array) -> Array:
    """(..., n) -> float64 log probabilities."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl_divergence(reference: Array, other: Array) -> Array:
    """KL(reference || other) in nats of logits (n, vocab_size) -> (n)."""
    p, q = log_softmax(reference), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(axis=-1)


class Oracle:
    """A forward pass whose every intermediate can be read."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Array], *, quantized: bool) -> None:
        self.config = config
        self.quantized = quantized
        self.weights: dict[str, Array] = {}
        for name, w in weights.items():
            is_code = quantized and w.ndim == 2
            self.weights[name] = dequantize_weight(w) if is_code else w.astype(np.float64)

    # ------------------------------------------------------------------ pieces

    def _through_codes(self, trace: Trace, name: str, x: Array, group: int = GROUP) -> Array:
        """x as its readers see it. Quantized mode leaves the codes in trace[name + "_codes"], and follows those that it finds
        there as ``quantize`` says."""
        if not self.quantized:
            return x
        codes, scales = quantize(hadamard(x), group, trace.get(name + "_codes"))
        trace[name + "_codes"] = codes
        values = (codes * scales[..., None]).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
        return hadamard(values) / 2 ** hadamard_exponent(x.shape[-1])

    def _linear(self, layer: int, name: str, x: Array) -> Array:
        """x (n_tokens, columns) -> (n_tokens, rows), with the bias if the model has one."""
        y = x @ self.weights[f"layers.{layer}.{name}"].T
        bias = self.weights.get(f"layers.{layer}.{name}.bias")
        return y if bias is None else y + bias

    def _norm(self, name: str, x: Array) -> Array:
        return rmsnorm(x, self.weights[name], self.config["norm_eps"])

    def _norm_if_there(self, name: str, x: Array) -> Array:
        return self._norm(name, x) if name in self.weights else x

    def _attention(self, layer: int, trace: Trace, q: Array, k: Array, v: Array) -> Array:
        """q (n_tokens, n_heads, any), k (n_tokens, n_kv_heads, any) and v (n_tokens, n_kv_heads, head_dim), which has no codes
        yet -> (n_tokens, n_heads, head_dim). In quantized mode also v_codes and p_codes (n_heads, n_tokens, n_groups, 32)."""
        n_tokens, n_heads, _ = q.shape
        n_rep = n_heads // k.shape[1]
        k = np.repeat(k, n_rep, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, k, optimize=True) / np.sqrt(v.shape[-1])
        scores = softcap(scores, self.config.get("attention_softcap", 0))
        seen = visible(n_tokens, layer_field(self.config, "window", layer))
        scores = np.where(seen, scores, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights, v = self._weights_of_values(trace, scores, v, n_rep) if self.quantized else (p, v)
        v = np.repeat(v, n_rep, axis=1)
        total = p.sum(axis=-1, keepdims=True)
        if (sinks := self.weights.get(f"layers.{layer}.sinks")) is not None:  # a score more in each row, without a value
            total = total + np.exp(sinks[:, None, None] - scores.max(axis=-1, keepdims=True))
        out = np.einsum("hij,jhd->hid", weights, v, optimize=True) / total
        return out.transpose(1, 0, 2)

    def _weights_of_values(self, trace: Trace, scores: Array, v: Array, n_rep: int) -> tuple[Array, Array]:
        """scores (n_heads, n_tokens, n_tokens), masked, and v (n_tokens, n_kv_heads, head_dim) -> the codes of v, and what
        each is multiplied by: exp(score - maximum) times the scale of v, quantized by groups in chunks of their own maxima."""
        n = scores.shape[-1]
        trace["v_codes"], v_scales = quantize(v, v.shape[-1], trace.get("v_codes"))
        v_scales = np.repeat(v_scales[..., 0].T, n_rep, axis=0)[:, None, :]
        others, codes, weights = trace.get("p_codes"), [], []
        for begin in range(0, n, CHUNK):
            part = scores[..., begin : begin + CHUNK]
            m = np.maximum(part.max(axis=-1, keepdims=True), -1e300)  # finite where nothing is seen, too
            groups = slice(begin // PROBABILITY_GROUP, (begin + CHUNK) // PROBABILITY_GROUP)
            w = np.exp(part - m) * v_scales[..., begin : begin + CHUNK]
            chunk_codes, scales = quantize(w, PROBABILITY_GROUP, None if others is None else others[..., groups, :])
            codes.append(chunk_codes)
            rounded = (chunk_codes * scales[..., None]).reshape(*w.shape[:-1], -1)[..., : w.shape[-1]]
            weights.append(rounded * np.exp(m - scores.max(axis=-1, keepdims=True)))
        trace["p_codes"] = np.concatenate(codes, axis=-2)
        return np.concatenate(weights, axis=-1), trace["v_codes"][:, :, 0].astype(np.float64)

    # ------------------------------------------------------------------ the pass

    def block(self, layer: int, x: Array, codes: Trace | None = None) -> Trace:
        """x (n_tokens, dim) at positions 0.. -> every intermediate of the layer, "out" being its
        output.

        attention_normed, q, k, v, q_rope, k_rope (of a convolution u), attention, x_attention, ffn_normed, gate, up, h,
        out; in quantized mode also the int8 codes
        {attention_normed,q,k,v,p,attention,ffn_normed,h}_codes. ``codes``: a trace whose codes are followed at ties.
        """
        others = {name: array for name, array in (codes or {}).items() if name.endswith("_codes")}
        cfg, trace = self.config, Trace(x=x, **others)
        trace["attention_normed"] = xn = self._norm_if_there(f"layers.{layer}.attention_norm", x)
        xn = self._through_codes(trace, "attention_normed", xn)
        is_conv = is_convolution(cfg, layer)
        trace["attention"] = o = self._convolved(layer, trace, xn) if is_conv else self._attended(layer, trace, xn)
        o = self._linear(layer, "conv_out" if is_conv else "wo", self._through_codes(trace, "attention", o))
        trace["x_attention"] = x = x + self._norm_if_there(f"layers.{layer}.post_attention_norm", o)

        parallel = layer_field(cfg, "norm", layer) == "rmsnorm_parallel"
        xn = trace["attention_normed"] if parallel else self._norm_if_there(f"layers.{layer}.ffn_norm", x)
        trace["ffn_normed"] = xn_exact = xn
        xn = self._through_codes(trace, "ffn_normed", xn)
        if cfg.get("n_experts"):
            branch = self._experts(layer, trace, xn_exact, xn)
            trace["out"] = x + self._norm_if_there(f"layers.{layer}.post_ffn_norm", branch)
            return trace
        h = self._through_codes(trace, "h", self._hidden(layer, trace, "", xn))
        trace["out"] = x + self._norm_if_there(f"layers.{layer}.post_ffn_norm", self._linear(layer, "w_down", h))
        return trace

    def _convolved(self, layer: int, trace: Trace, xn: Array) -> Array:
        """What a convolution makes of normed rows (n_tokens, dim), like them."""
        b, c, value = np.split(self._linear(layer, "conv_in", xn), 3, axis=1)
        trace["u"] = u = b * value
        taps = self.weights[f"layers.{layer}.taps"].reshape(-1, u.shape[1])
        before = np.concatenate([np.zeros_like(taps[1:]), u])  # zeros before position 0
        return c * sum(tap * before[k : k + len(u)] for k, tap in enumerate(taps))

    def _attended(self, layer: int, trace: Trace, xn: Array) -> Array:
        """What attention makes of normed rows (n_tokens, dim): (n_tokens, q_dim)."""
        cfg, n_tokens, head_dim = self.config, len(xn), self.config["head_dim"]
        trace["q"] = q = self._linear(layer, "wq", xn).reshape(n_tokens, -1, head_dim)
        trace["k"] = k = self._linear(layer, "wk", xn).reshape(n_tokens, -1, head_dim)
        trace["v"] = v = self._linear(layer, "wv", xn).reshape(n_tokens, -1, head_dim)
        if cfg.get("qk_norm_all_heads"):
            q = self._norm(f"layers.{layer}.q_norm", q.reshape(n_tokens, -1)).reshape(q.shape)
            k = self._norm(f"layers.{layer}.k_norm", k.reshape(n_tokens, -1)).reshape(k.shape)
        elif cfg["qk_norm"] and not cfg.get("qk_norm_after_rope"):
            q = self._norm(f"layers.{layer}.q_norm", q)
            k = self._norm(f"layers.{layer}.k_norm", k)
        inv_freq = self.weights[f"rope.{layer_field(cfg, 'rope', layer)}.inv_freq"]
        q, k = rope(q, inv_freq), rope(k, inv_freq)
        if cfg.get("qk_norm_after_rope"):
            q, k = self._norm(f"layers.{layer}.q_norm", q), self._norm(f"layers.{layer}.k_norm", k)
        trace["q_rope"], trace["k_rope"] = q, k
        q_exact, q = q, self._through_codes(trace, "q", q, head_dim)
        k = self._through_codes(trace, "k", k, head_dim)
        if (bias := self.weights.get(f"layers.{layer}.key_bias")) is not None:  # no codes come near it
            bias = rope(np.broadcast_to(bias.reshape(-1, head_dim), k.shape), inv_freq)
            q, k = np.concatenate([q, q_exact], axis=-1), np.concatenate([k, bias], axis=-1)
        return self._attention(layer, trace, q, k, v).reshape(n_tokens, -1)

    def _hidden(self, layer: int, trace: Trace, prefix: str, xn: Array) -> Array:
        """What the activation of an MLP gives, (n_tokens, hidden_dim)."""
        activation = layer_field(self.config, "activation", layer)
        trace[f"{prefix}up"] = up = self._linear(layer, f"{prefix}w_up", xn)
        if activation == "xielu":
            trace[f"{prefix}h"] = xielu(up, *self.weights[f"layers.{layer}.xielu"])
        elif activation in CURVES:
            trace[f"{prefix}h"] = CURVES[activation](up)
        else:
            trace[f"{prefix}gate"] = gate = self._linear(layer, f"{prefix}w_gate", xn)
            trace[f"{prefix}h"] = GATES[activation](gate, up)
        return trace[f"{prefix}h"]

    def _shared_expert(self, layer: int, trace: Trace, xn_exact: Array, xn: Array) -> Array:
        h = self._through_codes(trace, "shared.h", self._hidden(layer, trace, "shared.", xn))
        y = self._linear(layer, "shared.w_down", h)
        if not self.config.get("shared_gated"):
            return y
        return y / (1.0 + np.exp(-xn_exact @ self.weights[f"layers.{layer}.shared_router"]))[:, None]

    def _experts(self, layer: int, trace: Trace, xn_exact: Array, xn: Array) -> Array:
        """The router sees xn_exact (n_tokens, dim), the experts xn -> (n_tokens, dim)."""
        cfg = self.config
        logits = xn_exact @ self.weights[f"layers.{layer}.router"].reshape(cfg["n_experts"], -1).T
        logits = logits + self.weights.get(f"layers.{layer}.router.bias", 0.0)
        p = np.exp(log_softmax(logits))
        taken = np.argsort(-logits, axis=1, kind="stable")[:, : cfg["n_experts_used"]]
        total = np.take_along_axis(p, taken, axis=1).sum(axis=1) if cfg.get("experts_normalized") else np.ones(len(p))
        gate_of, out, codes = GATES[layer_field(cfg, "activation", layer)], np.zeros_like(xn), []
        for t, row in enumerate(xn):
            others = trace["h_codes"][t] if "h_codes" in trace else ()
            row_codes: Trace = {f"{slot}_codes": array for slot, array in enumerate(others)}
            for slot, e in enumerate(sorted(taken[t])):
                gate, up = (self._linear(layer, f"experts.{e}.{name}", row) for name in ("w_gate", "w_up"))
                h = self._through_codes(row_codes, str(slot), gate_of(gate, up))
                out[t] += p[t, e] / total[t] * self._linear(layer, f"experts.{e}.w_down", h)
            codes.append(list(row_codes.values()))
        if self.quantized:
            trace["h_codes"] = np.array(codes)
        return out + self._shared_expert(layer, trace, xn_exact, xn) if cfg.get("shared_hidden_dim") else out

    def embed(self, token_ids: ArrayLike) -> Array:
        """(n_tokens) -> (n_tokens, dim), the rows of the embedding as the file holds them."""
        return self.weights["tok_embeddings"][np.asarray(token_ids)]

    def hidden_states(self, token_ids: ArrayLike) -> list[Array]:
        """The input of layer 0, then the output of every layer: n_layers + 1 of (n_tokens, dim)."""
        states = [self.embed(token_ids)]
        for layer in range(self.config["n_layers"]):
            states.append(self.block(layer, states[-1])["out"])
        return states

    def head(self, x: Array) -> Array:
        """The last layer's output (n_tokens, dim) -> logits (n_tokens, vocab_size)."""
        xn = self._through_codes({}, "normed", self._norm("norm", x))
        tied = self.config["tie_embeddings"]
        logits = xn @ self.weights["tok_embeddings" if tied else "output"].T + self.weights.get("output.bias", 0.0)
        return softcap(logits, self.config.get("logits_softcap", 0))

    def logits(self, token_ids: ArrayLike) -> Array:
        """(n_tokens) ids at positions 0.. -> (n_tokens, vocab_size) float64."""
        return self.head(self.hidden_states(token_ids)[-1])
