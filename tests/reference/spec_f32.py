"""The engine's forward pass in float32 NumPy, made of the operations in spec_ops.py: a model run here and a model run by any
kernel table must give the same bytes. Nothing is imported from the project.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .oracle import GROUP, hadamard_exponent, is_convolution, layer_field, visible
from .spec_ops import (
    CURVES,
    F32,
    GATES,
    Array,
    LowRank,
    Matrix,
    Weight,
    attend,
    convolve,
    dots,
    exp,
    f32,
    fmaf,
    hadamard,
    key_bias_scores,
    matmul,
    quantize,
    quantize_transformed,
    rmsnorm,
    rope,
    route,
    scores_f32,
    scores_int8,
    softcap,
    xielu,
)

Trace = dict[str, Array]


class Spec:
    """The engine's forward pass. Names, shapes and traces are those of oracle.Oracle.

    A matrix is a float array, quantized here, or a Matrix that was read from a frozen file. adapter: what it adds to matrices, by
    their names ("layers.0.wq").
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, Weight],
        *,
        kv_dtype: str = "int8",
        adapter: Mapping[str, LowRank] | None = None,
    ) -> None:
        self.adapter = adapter or {}
        self.config = config
        self.kv_dtype = kv_dtype
        self.matrices: dict[str, Matrix] = {}
        self.vectors: dict[str, F32] = {}
        for name, w in weights.items():
            if isinstance(w, Matrix):
                self.matrices[name] = w
            elif w.ndim == 2:
                self.matrices[name] = Matrix.quantize(w)
            else:
                self.vectors[name] = w.astype(f32)

    def _norm(self, name: str, x: F32) -> F32:
        return rmsnorm(x, self.vectors[name], self.config["norm_eps"])

    def _norm_if_there(self, name: str, x: F32) -> F32:
        return self._norm(name, x) if name in self.vectors else x

    def _inv_freq(self, layer: int) -> F32:
        return self.vectors[f"rope.{layer_field(self.config, 'rope', layer)}.inv_freq"]

    def _linear(self, layer: int, name: str, x: tuple[Array, F32]) -> F32:
        y = matmul(*x, self.matrices[f"layers.{layer}.{name}"])
        bias = self.vectors.get(f"layers.{layer}.{name}.bias")
        return y if bias is None else y + bias

    def _adapted(self, layer: int, name: str, x: tuple[Array, F32], x_float: F32) -> F32:
        """_linear of x, quantized from x_float, and what the adapter adds."""
        y, product = self._linear(layer, name, x), self.adapter.get(f"layers.{layer}.{name}")
        return y if product is None else product.product(x_float) + y

    def _add(self, layer: int, name: str, norm: str, x: F32, branch: tuple[Array, F32], branch_float: F32) -> F32:
        """x and what a matrix makes of `branch`, normed if there is such a norm; without one the adapter's share comes last."""
        if f"layers.{layer}.{norm}" in self.vectors:
            return self._norm(f"layers.{layer}.{norm}", self._adapted(layer, name, branch, branch_float)) + x
        y, product = self._linear(layer, name, branch) + x, self.adapter.get(f"layers.{layer}.{name}")
        return y if product is None else product.product(branch_float) + y

    def _quantize_input(self, trace: Trace, name: str, x: F32) -> tuple[Array, F32]:
        codes, scales = quantize_transformed(x)
        trace[name + "_codes"] = codes
        return codes, scales

    def _attention(self, layer: int, trace: Trace, q: F32, k: F32, v: F32) -> F32:
        """q (n_tokens, n_heads, head_dim), k and v (n_tokens, n_kv_heads, head_dim) -> like q."""
        n_tokens, n_heads, head_dim = q.shape
        seen = visible(n_tokens, layer_field(self.config, "window", layer))
        c, cap = f32(1) / np.sqrt(f32(head_dim)), self.config.get("attention_softcap", 0)
        q_codes, q_scales = quantize_transformed(q, head_dim)
        k_codes, k_scales = quantize_transformed(k, head_dim, key=True)
        v_codes, v_scales = quantize(v, head_dim)
        trace.update(q_codes=q_codes, k_codes=k_codes, v_codes=v_codes)
        key_bias = self.vectors.get(f"layers.{layer}.key_bias")
        sinks = self.vectors.get(f"layers.{layer}.sinks", [None] * n_heads)
        out, p_codes = np.zeros_like(q), []
        for head in range(n_heads):
            kv = head // (n_heads // k.shape[1])
            if self.kv_dtype == "f32":
                scores = softcap(scores_f32(q[:, head], k[:, kv], c), cap)
                out[:, head], _ = attend(scores, seen, v[:, kv], None, sinks[head])
            else:
                q_head = q_codes[:, head, 0], q_scales[:, head, 0]
                scores = scores_int8(q_head, (k_codes[:, kv, 0], k_scales[:, kv, 0]), c)
                if key_bias is not None:
                    bias = key_bias.reshape(-1, head_dim)[kv]
                    scores = key_bias_scores(scores, q[:, head], bias, self._inv_freq(layer), c)
                scores = softcap(scores, cap)
                v_head = v_codes[:, kv, 0].astype(f32)
                out[:, head], codes = attend(scores, seen, v_head, v_scales[:, kv, 0], sinks[head])
                p_codes.append(codes)
        if p_codes:
            trace["p_codes"] = np.stack(p_codes)
        return out

    def block(self, layer: int, x: F32) -> Trace:
        """x (n_tokens, dim) float32 at positions 0.. -> the intermediates of Oracle.block."""
        cfg, trace = self.config, Trace(x=x)
        trace["attention_normed"] = xn = self._norm_if_there(f"layers.{layer}.attention_norm", x)
        x_q = self._quantize_input(trace, "attention_normed", xn)
        is_conv = is_convolution(cfg, layer)
        trace["attention"] = o = self._convolved(layer, trace, x_q) if is_conv else self._attended(layer, trace, x_q, xn)
        o_q = self._quantize_input(trace, "attention", o)
        if layer_field(cfg, "norm", layer) == "rmsnorm_parallel":
            h = self._hidden(layer, trace, "", x_q, xn)
            mlp = self._linear(layer, "w_down", self._quantize_input(trace, "h", h)) + x
            trace.update(ffn_normed=xn, ffn_normed_codes=x_q[0], out=self._linear(layer, "wo", o_q) + mlp)
            return trace
        trace["x_attention"] = x = self._add(layer, "conv_out" if is_conv else "wo", "post_attention_norm", x, o_q, o)

        trace["ffn_normed"] = xn = self._norm_if_there(f"layers.{layer}.ffn_norm", x)
        x_q = self._quantize_input(trace, "ffn_normed", xn)
        if cfg.get("n_experts"):
            branch = self._experts(layer, trace, xn, x_q)
            trace["out"] = self._norm_if_there(f"layers.{layer}.post_ffn_norm", branch) + x
            return trace
        h = self._hidden(layer, trace, "", x_q, xn)
        trace["out"] = self._add(layer, "w_down", "post_ffn_norm", x, self._quantize_input(trace, "h", h), h)
        return trace

    def _convolved(self, layer: int, trace: Trace, x_q: tuple[Array, F32]) -> F32:
        """What a convolution makes of normed rows, (n_tokens, dim)."""
        b, c, value = np.split(self._linear(layer, "conv_in", x_q), 3, axis=1)
        trace["u"] = u = b * value
        return c * convolve(u, self.vectors[f"layers.{layer}.taps"].reshape(-1, u.shape[1]))

    def _attended(self, layer: int, trace: Trace, x_q: tuple[Array, F32], xn: F32) -> F32:
        """What attention makes of normed rows xn (n_tokens, dim), quantized x_q: (n_tokens, q_dim)."""
        cfg, n_tokens, head_dim = self.config, len(xn), self.config["head_dim"]
        trace["q"] = q = self._adapted(layer, "wq", x_q, xn).reshape(n_tokens, -1, head_dim)
        trace["k"] = k = self._adapted(layer, "wk", x_q, xn).reshape(n_tokens, -1, head_dim)
        trace["v"] = v = self._adapted(layer, "wv", x_q, xn).reshape(n_tokens, -1, head_dim)
        if cfg.get("qk_norm_all_heads"):
            q = self._norm(f"layers.{layer}.q_norm", q.reshape(n_tokens, -1)).reshape(q.shape)
            k = self._norm(f"layers.{layer}.k_norm", k.reshape(n_tokens, -1)).reshape(k.shape)
        elif cfg["qk_norm"] and not cfg.get("qk_norm_after_rope"):
            q = self._norm(f"layers.{layer}.q_norm", q)
            k = self._norm(f"layers.{layer}.k_norm", k)
        if self.kv_dtype == "f32" and (key_bias := self.vectors.get(f"layers.{layer}.key_bias")) is not None:
            k = k + key_bias.reshape(-1, head_dim)
        inv_freq = self._inv_freq(layer)
        q, k = rope(q, inv_freq), rope(k, inv_freq)
        if cfg.get("qk_norm_after_rope"):
            q, k = self._norm(f"layers.{layer}.q_norm", q), self._norm(f"layers.{layer}.k_norm", k)
        trace["q_rope"], trace["k_rope"] = q, k
        return self._attention(layer, trace, q, k, v).reshape(n_tokens, -1)

    def _hidden(self, layer: int, trace: Trace, prefix: str, x_q: tuple[Array, F32], xn: F32) -> F32:
        """What the activation of an MLP gives, (n_tokens, hidden_dim)."""
        activation = layer_field(self.config, "activation", layer)
        trace[f"{prefix}up"] = up = self._adapted(layer, f"{prefix}w_up", x_q, xn)
        if activation == "xielu":
            trace[f"{prefix}h"] = xielu(up, self.vectors[f"layers.{layer}.xielu"])
        elif activation in CURVES:
            trace[f"{prefix}h"] = CURVES[activation](up)
        else:
            trace[f"{prefix}gate"] = gate = self._adapted(layer, f"{prefix}w_gate", x_q, xn)
            trace[f"{prefix}h"] = GATES[activation](gate, up)
        return trace[f"{prefix}h"]

    def _add_shared(self, layer: int, trace: Trace, xn: F32, x_q: tuple[Array, F32], total: F32) -> F32:
        h_q = self._quantize_input(trace, "shared.h", self._hidden(layer, trace, "shared.", x_q, xn))
        weight = np.ones(len(xn), f32)
        if self.config.get("shared_gated"):
            weight = f32(1) / (f32(1) + exp(-dots(xn, self.vectors[f"layers.{layer}.shared_router"][None])[:, 0]))
        return fmaf(weight[:, None], self._linear(layer, "shared.w_down", h_q), total)

    def _experts(self, layer: int, trace: Trace, xn: F32, x_q: tuple[Array, F32]) -> F32:
        """xn (n_tokens, dim) and its codes -> what the experts of each row give, (n_tokens, dim)."""
        cfg, n_tokens = self.config, len(xn)
        router = self.vectors[f"layers.{layer}.router"].reshape(cfg["n_experts"], -1)
        bias = self.vectors.get(f"layers.{layer}.router.bias")
        taken, weights = route(xn, router, bias, cfg["n_experts_used"], cfg.get("experts_normalized", False))
        gate_of, total = GATES[layer_field(cfg, "activation", layer)], np.zeros_like(xn)
        slots = np.cumsum(taken, axis=1) - 1  # of a taken expert: how many the row took before it
        n_groups = -(-cfg["hidden_dim"] // GROUP)
        trace["h_codes"] = codes = np.zeros((n_tokens, cfg["n_experts_used"], n_groups, GROUP), np.int8)
        for e in range(cfg["n_experts"]):
            rows = np.flatnonzero(taken[:, e])
            x_rows = x_q[0][rows], x_q[1][rows]
            gate, up = (self._linear(layer, f"experts.{e}.{name}", x_rows) for name in ("w_gate", "w_up"))
            h_q = quantize_transformed(gate_of(gate, up))
            codes[rows, slots[rows, e]] = h_q[0]
            total[rows] = fmaf(weights[rows, e, None], self._linear(layer, f"experts.{e}.w_down", h_q), total[rows])
        return self._add_shared(layer, trace, xn, x_q, total) if cfg.get("shared_hidden_dim") else total

    def embed(self, token_ids: ArrayLike) -> F32:
        """(n_tokens) -> (n_tokens, dim): code * scale, transformed back."""
        w, ids, dim = self.matrices["tok_embeddings"], np.asarray(token_ids), self.config["dim"]
        values = w.codes[ids].astype(f32) * w.scales[ids][:, :, None]
        return hadamard(values.reshape(len(ids), -1)[:, :dim]) * f32(2.0 ** -(hadamard_exponent(dim) // 2))

    def hidden_states(self, token_ids: ArrayLike) -> list[F32]:
        """The input of layer 0, then the output of every layer: n_layers + 1 of (n_tokens, dim)."""
        states = [self.embed(token_ids)]
        for layer in range(self.config["n_layers"]):
            states.append(self.block(layer, states[-1])["out"])
        return states

    def head(self, x: F32) -> F32:
        """The last layer's output (n_tokens, dim) -> logits (n_tokens, vocab_size)."""
        x_q = self._quantize_input({}, "normed", self._norm("norm", x))
        tied = self.config["tie_embeddings"]
        logits = matmul(*x_q, self.matrices["tok_embeddings" if tied else "output"])
        logits = logits + self.vectors["output.bias"] if "output.bias" in self.vectors else logits
        return softcap(logits, self.config.get("logits_softcap", 0))

    def logits(self, token_ids: ArrayLike) -> F32:
        """(n_tokens) ids at positions 0.. -> (n_tokens, vocab_size) float32."""
        return self.head(self.hidden_states(token_ids)[-1])
