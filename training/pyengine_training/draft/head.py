"""The draft head: a recurrent network over the target's last hidden state, and its gradients.

B guesses are made at once, K steps far. Rows are stacked by step: row i * B + b is step i of guess b.

s_0 (B, dim): the target's final hidden state whose logits gave the newest token; e_i (B, dim): embedding rows of token i, the
newest known one first, then (in training) those that really came. dim = d, hidden_dim = m, V = draft vocabulary.

forward    a = rmsnorm(e_i) * g_token;  c = rmsnorm(s_i) * g_state                  w_in (d, 2d) = [w_token, w_state]
           u = s_i + a @ w_token^T + c @ w_state^T
           n = rmsnorm(u) * g_mlp;  h = silu(n @ w_gate^T) * (n @ w_up^T)           w_gate_up (2m, d)
           s_{i+1} = u + h @ w_down^T                                               w_down (d, m)
           z = rmsnorm(s_{i+1}) * g_out;  logits = z @ output^T                     output (V, d)
loss       sum over i of weight_i * mean KL(q_i || softmax(logits_i)), q_i: the target's distribution within the draft vocabulary

backward   dz = dlogits @ output;  ds = ds_{i+1} + rmsnorm'(dz)                     ds_{K} = 0
           dh = ds @ w_down;  dn = swiglu'(dh) @ w_gate_up;  du = ds + rmsnorm'(dn)
           ds_i = du + rmsnorm'(du @ w_state);  the gradient of e_i is not needed: embeddings are the target's
           weights see the sums over steps, one product of the stacked rows each:
           doutput = dlogits^T @ z;  dw_down = ds^T @ h;  dw_gate_up = dgate_up^T @ n;  dw_in = du^T @ [a, c]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arena import Arena, Shapes
from ..ops import cpu as ops
from ..ops.cpu.topk_kl import cross_entropy_topk_forward_backward

Array = NDArray[Any]


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of a head, and how many steps it is trained over. step_decay: weight of a step, over that of the one before."""

    dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    n_steps: int = 4
    step_decay: float = 0.8

    def weights(self) -> list[float]:
        """Of the steps in the loss; they sum to 1."""
        powers = [self.step_decay**i for i in range(self.n_steps)]
        return [power / sum(powers) for power in powers]


def head_shapes(config: HeadConfig) -> Shapes:
    """Name -> shape of every parameter. Matrices are (out, in)."""
    d, m = config.dim, config.hidden_dim
    return {
        "token_norm": (d,),
        "state_norm": (d,),
        "w_in": (d, 2 * d),
        "mlp_norm": (d,),
        "w_gate_up": (2 * m, d),
        "w_down": (d, m),
        "output_norm": (d,),
        "output": (config.vocab_size, d),
    }


def initialize_head(params: Arena, config: HeadConfig, output_rows: Array, state_rms: float, seed: int) -> None:
    """A head that adds nothing at first and reads the target's own output rows (V, d): its first guess is the token before.

    state_rms: of the target's hidden states, which the output norm restores, so that logits begin in the target's scale.
    """
    for name in ("token_norm", "state_norm", "mlp_norm"):
        params[name].fill(1)
    params["output_norm"].fill(state_rms)
    params["output"][...] = output_rows
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 7, 0]))
    gate_up = params["w_gate_up"]
    gate_up[...] = generator.standard_normal(gate_up.shape, dtype=np.float32) * np.float32(0.5 / math.sqrt(config.dim))
    params["w_in"].fill(0)
    params["w_down"].fill(0)


@dataclass(frozen=True)
class Batch:
    """B guesses of K steps. hidden (B, d); embeddings (K, B, d); ids (K, B, k) and probs (K, B, k + 1) as the op topk_kl has
    them; valid (K, B) bool: whether a sequence goes on so far."""

    hidden: Array
    embeddings: Array
    ids: Array
    probs: Array
    valid: Array

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(self.hidden[rows], *(x[:, rows] for x in (self.embeddings, self.ids, self.probs, self.valid)))


class HeadWorker:
    """Buffers for ``rows`` guesses, the forward and the backward. dtype: float64 is for checking gradients."""

    def __init__(self, config: HeadConfig, rows: int, dtype: Any = np.float32) -> None:
        self.config, self.rows, self.dtype = config, rows, dtype
        c, n = config, config.n_steps * rows  # n: K * B, steps under one another
        self.states = np.zeros((config.n_steps + 1, rows, c.dim), dtype)  # s_0 ... s_K
        # names as in the formulas; d: a gradient; inv: 1 / rms of the norms' inputs; with _: of one step
        self.a, self.c, self.u, self.n, self.z, self.dz = np.zeros((6, n, c.dim), dtype)
        self.gate_up, self.dgate_up = np.zeros((2, n, 2 * c.hidden_dim), dtype)
        self.h = np.zeros((n, c.hidden_dim), dtype)
        self.inv = {name: np.zeros(n, dtype) for name in ("token", "state", "mlp", "output")}
        self.ds, self.du = np.zeros((2, n, c.dim), dtype)
        self.logits = np.zeros((n, c.vocab_size), dtype)
        self.loss = np.zeros(n, dtype)
        self._row, self._dn, self._unused = np.zeros((3, rows, c.dim), dtype)
        self._dh = np.zeros((rows, c.hidden_dim), dtype)

    def _step(self, i: int) -> slice:
        return slice(i * self.rows, (i + 1) * self.rows)

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _forward_step(self, params: Arena, i: int, e: Array) -> None:
        """Formulas above; e (B, d)."""
        at, d, eps = self._step(i), self.config.dim, self.dtype(self.config.norm_eps)
        s, out, inv = self.states[i], self.states[i + 1], self.inv
        a, c, u, n = self.a[at], self.c[at], self.u[at], self.n[at]
        ops.rmsnorm_forward(a, inv["token"][at], e, params["token_norm"], eps)
        ops.rmsnorm_forward(c, inv["state"][at], s, params["state_norm"], eps)
        ops.linear_forward(u, a, params["w_in"][:, :d])
        ops.linear_forward(self._row, c, params["w_in"][:, d:])
        u += self._row
        u += s
        ops.rmsnorm_forward(n, inv["mlp"][at], u, params["mlp_norm"], eps)
        ops.linear_forward(self.gate_up[at], n, params["w_gate_up"])
        ops.swiglu_forward(self.h[at], self.gate_up[at])
        ops.linear_forward(out, self.h[at], params["w_down"])
        out += u
        ops.rmsnorm_forward(self.z[at], inv["output"][at], out, params["output_norm"], eps)

    def _backward_step(self, params: Arena, grads: Arena, i: int, e: Array, later: Array) -> None:
        """``later`` (B, d) is ds_{i+1} of the steps behind on entry, ds_i on return."""
        at, d, inv = self._step(i), self.config.dim, self.inv
        s, out, ds, du = self.states[i], self.states[i + 1], self.ds[at], self.du[at]
        ds[...] = later
        ops.rmsnorm_backward(ds, grads["output_norm"], self.dz[at], out, params["output_norm"], inv["output"][at], {})
        ops.linear_backward_input(self._dh, ds, params["w_down"])
        ops.swiglu_backward(self.dgate_up[at], self._dh, self.gate_up[at])
        ops.linear_backward_input(self._dn, self.dgate_up[at], params["w_gate_up"])
        du[...] = ds
        ops.rmsnorm_backward(du, grads["mlp_norm"], self._dn, self.u[at], params["mlp_norm"], inv["mlp"][at], {})
        later[...] = du
        ops.linear_backward_input(self._row, du, params["w_in"][:, d:])
        ops.rmsnorm_backward(later, grads["state_norm"], self._row, s, params["state_norm"], inv["state"][at], {})
        ops.linear_backward_input(self._row, du, params["w_in"][:, :d])
        self._unused.fill(0)
        ops.rmsnorm_backward(
            self._unused, grads["token_norm"], self._row, e, params["token_norm"], inv["token"][at], {}
        )

    # ---- all of them -------------------------------------------------------------------------------------------------

    def forward(self, params: Arena, batch: Batch) -> None:
        """Fill ``logits`` (K * B, V)."""
        self.states[0] = batch.hidden
        for i in range(self.config.n_steps):
            self._forward_step(params, i, np.ascontiguousarray(batch.embeddings[i], self.dtype))
        ops.linear_forward(self.logits, self.z, params["output"])

    def forward_backward(self, params: Arena, grads: Arena, batch: Batch, counts: Array) -> Array:
        """Sums of the KL divergence by step, float64 (K,); grads are written. counts (K,): valid rows of the whole batch."""
        self.forward(params, batch)
        for i, weight in enumerate(self.config.weights()):
            at, t = self._step(i), self.dtype
            ids = np.ascontiguousarray(batch.ids[i], np.int64)
            probs = np.ascontiguousarray(batch.probs[i], t)
            targets = np.where(batch.valid[i], 0, -1)  # the label itself does not count: alpha is 1
            inv = t(weight / max(1, int(counts[i])))
            cross_entropy_topk_forward_backward(self.loss[at], self.logits[at], ids, probs, targets, t(1), t(1), inv)
        self._backward(params, grads, np.asarray(batch.embeddings))
        sums: Array = self.loss.reshape(self.config.n_steps, -1).sum(axis=1, dtype=np.float64)
        return sums

    def _backward(self, params: Arena, grads: Arena, embeddings: Array) -> None:
        """From ``logits``, which hold their gradient; ``grads`` are written."""
        for name in ("token_norm", "state_norm", "mlp_norm", "output_norm"):
            grads[name].fill(0)
        ops.linear_backward_input(self.dz, self.logits, params["output"])
        later = np.zeros((self.rows, self.config.dim), self.dtype)  # ds_{i+1}, from the steps behind
        for i in reversed(range(self.config.n_steps)):
            self._backward_step(params, grads, i, np.ascontiguousarray(embeddings[i], self.dtype), later)
        d = self.config.dim
        ops.linear_backward_weight(grads["output"], self.logits, self.z)
        ops.linear_backward_weight(grads["w_down"], self.ds, self.h)
        ops.linear_backward_weight(grads["w_gate_up"], self.dgate_up, self.n)
        ops.linear_backward_weight(grads["w_in"][:, :d], self.du, self.a)
        ops.linear_backward_weight(grads["w_in"][:, d:], self.du, self.c)
