"""The model as two lists: the forward, and the backward in mirror order.

One :class:`Worker` runs one shard of the batch on one thread: parameters are shared and read-only,
activations, scratch and gradients are its own. N = rows of the shard * sequence length.

With ``quantize`` on, every value that the engine quantizes goes through the same rounding here:
embedding rows and matrices (the caller passes the fake-quantized parameters), the inputs of all
five products, q and k per head after RoPE, v per head, probabilities before they meet v. What the
engine transforms before it quantizes comes back in its own basis, so products here are plain ones.
Gradients pass straight through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import arena as arenas
from .arena import Arena
from .config import ModelConfig
from .errors import DataError
from .ops import cpu as cpu_ops
from .ops.cpu.dpo import dpo_forward_backward
from .ops.cpu.topk_kl import cross_entropy_topk_forward_backward
from .ops.needs import Needs, allocate

if TYPE_CHECKING:
    from .distill import AnyDistillation
    from .lora import Adapters, LoraConfig
    from .preference import Preference

Array = NDArray[Any]


@dataclass
class BlockState:
    """What one block keeps for its backward. B rows of T tokens, N = B * T."""

    xn1: Array  # (N, dim): the normed input, which wqkv multiplies
    inv_rms1: Array  # (N,)
    heads: dict[str, Array]  # of QK-norm, where the model has it: raw (B, T, n_heads + n_kv_heads, head_dim), inv_rms of each
    q: Array  # (B, n_kv_heads, T, n_rep, head_dim), rotated
    k: Array  # (B, n_kv_heads, T, head_dim), rotated
    v: Array  # (B, n_kv_heads, T, head_dim)
    lse: Array  # (B, n_kv_heads, T * n_rep): log-sum-exp of the scores
    att: Array  # (N, q_dim): what attention gives, which wo multiplies
    x_mid: Array  # (N, dim): the residual stream between attention and feed-forward
    xn2: Array  # (N, dim): normed, which w_gate_up multiplies
    inv_rms2: Array  # (N,)
    gate_up: Array  # (N, 2 * hidden_dim)
    h: Array  # (N, hidden_dim): silu(gate) * up, which w_down multiplies


class Worker:
    """Activations, scratch and gradients for one shard of ``rows`` sequences of ``seq_len`` tokens.

    recompute: "none" keeps everything; "activations" makes norm outputs and SwiGLU outputs again in
    the backward; "block" keeps only each block's input and reruns the block. Gradients are bitwise
    equal in all three. adapters: what is trained instead of the parameters; gradients are theirs, before their scale.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        seq_len: int,
        *,
        recompute: str = "none",
        training: bool = True,
        dtype: Any = np.float32,
        ops: Any = cpu_ops,
        adapters: Adapters | None = None,
    ) -> None:
        self.config, self.rows, self.seq_len, self.dtype = config, rows, seq_len, dtype
        self.ops, self.wide = ops, ops.wide_dtype(dtype)
        # logits are made, turned into gradients and used up this many rows at a time
        self.loss_rows = ops.loss_rows(config.vocab_size)
        self.recompute, self.adapters = recompute if training else "block", adapters
        c, n = config, rows * seq_len
        cos, sin = self.ops.rope_tables(seq_len, c.head_dim, c.rope_theta)
        self.cos, self.sin = ops.upload(cos.astype(self.wide)), ops.upload(sin.astype(self.wide))
        self.scale = self.wide(1 / np.sqrt(np.float32(c.head_dim)))
        self.eps = self.wide(c.norm_eps)
        n_states = c.n_layers if self.recompute != "block" else 1
        # the residual stream (N, dim): xs[i] enters block i, the last leaves the last one
        self.xs = [self._new(n, c.dim) for _ in range(c.n_layers + 1 if training else 2)]
        # xn1, xn2, h of all blocks, where these are made again instead of kept
        self._shared = (self._new(n, c.dim), self._new(n, c.dim), self._new(n, c.hidden_dim))
        self.states = [self._block_state() for _ in range(n_states)]
        self.qkv = self._new(*self._qkv_shape())
        self.o = self._new(*self._q_shape())
        self.xn_final = self._new(n, c.dim)
        self.inv_rms_final = allocate(ops.rmsnorm_state(n, self.wide), ops.empty)["inv_rms"]
        self.loss = self._new_wide(n)
        self.logits = self._new(min(n, self.loss_rows), c.vocab_size)
        self.starts = ops.zeros((rows, seq_len), np.int64)  # every position sees its whole row
        self.seen_from = self.starts
        self.scratch = allocate(self._scratch_needs(training), ops.empty)
        if training:
            self._allocate_backward()

    # ---- buffers -------------------------------------------------------------------------------------------------

    def _new(self, *shape: int) -> Array:
        buffer: Array = self.ops.empty(shape, self.dtype)
        return buffer

    def _scratch_needs(self, training: bool) -> Needs:
        """Working memory of the operations of a forward, and of a backward when training."""
        needs: Needs = self.ops.attention_scratch(self._q_shape(), self.dtype, training)
        if training:
            needs = needs | self.ops.rmsnorm_scratch(self.config.dim)
            needs = needs | self.ops.embedding_scratch(self.rows * self.seq_len, self.config.vocab_size)
            needs = needs | (self.ops.qk_norm_scratch(self.config.head_dim) if self.config.qk_norm else {})
        return needs

    def _new_wide(self, *shape: int) -> Array:
        buffer: Array = self.ops.empty(shape, self.wide)
        return buffer

    def _q_shape(self) -> tuple[int, ...]:
        c = self.config
        return self.rows, c.n_kv_heads, self.seq_len, c.n_rep, c.head_dim

    def _kv_shape(self) -> tuple[int, ...]:
        return self.rows, self.config.n_kv_heads, self.seq_len, self.config.head_dim

    def _qkv_shape(self) -> tuple[int, ...]:
        c = self.config
        return self.rows, self.seq_len, c.n_heads + 2 * c.n_kv_heads, c.head_dim

    def _qk_norm_state(self) -> Needs:
        if not self.config.qk_norm:
            return {}
        needs: Needs = self.ops.qk_norm_state(self._qkv_shape(), self.config.n_kv_heads, self.dtype, self.wide)
        return needs

    def _block_state(self) -> BlockState:
        c, n = self.config, self.rows * self.seq_len
        own = self.recompute == "none"
        xn1, xn2, h = self._shared
        norm = self.ops.rmsnorm_state(n, self.wide)
        state = [allocate(needs, self.ops.empty) for needs in (norm, norm)]
        attention = allocate(self.ops.attention_state(self._q_shape(), self.wide), self.ops.empty)
        return BlockState(
            xn1=self._new(n, c.dim) if own else xn1,
            inv_rms1=state[0]["inv_rms"],
            heads=allocate(self._qk_norm_state(), self.ops.empty),
            q=self._new(*self._q_shape()),
            k=self._new(*self._kv_shape()),
            v=self._new(*self._kv_shape()),
            lse=attention["lse"],
            att=self._new(n, c.q_dim),
            x_mid=self._new(n, c.dim),
            xn2=self._new(n, c.dim) if own else xn2,
            inv_rms2=state[1]["inv_rms"],
            gate_up=self._new(n, 2 * c.hidden_dim),
            h=self._new(n, c.hidden_dim) if own else h,
        )

    def _allocate_backward(self) -> None:
        c, n = self.config, self.rows * self.seq_len
        shapes = self.adapters.values.shapes if self.adapters else arenas.parameter_shapes(c)
        self.grads = Arena(shapes, self.wide, self.ops.zeros)
        # dx: of the residual stream, which every part of a block adds to; dxn: of a norm's output; the rest as without d
        self.dx, self.dxn = self._new(n, c.dim), self._new(n, c.dim)
        self.dh, self.dgate_up = self._new(n, c.hidden_dim), self._new(n, 2 * c.hidden_dim)
        self.datt, self.do = self._new(n, c.q_dim), self._new(*self._q_shape())
        self.dq = self._new(*self._q_shape())
        self.dk, self.dv = self._new(*self._kv_shape()), self._new(*self._kv_shape())
        self.dqkv = self._new(*self.qkv.shape)
        if self.adapters:
            rank = self.adapters.config.r
            self.thin, self.dthin = self._new(n, rank), self._new(n, rank)
            self.unused = self._new_wide(max(c.dim, c.head_dim))
        else:
            self.doutput = self._new_wide(c.vocab_size if n > self.loss_rows else 0, c.dim)

    # ---- forward -------------------------------------------------------------------------------------------------

    def forward(self, params: Arena, tokens: Array, quantize: bool = False, starts: Array | None = None) -> None:
        """tokens (rows, seq_len) int64 -> self.xn_final (N, dim), the output layer's input.

        starts (rows, seq_len) int64: the first position that each position sees, its document's; None: its row's.
        """
        self.seen_from = self.starts if starts is None else starts
        self.ops.embedding_forward(self.xs[0], params["tok_embeddings"], tokens.ravel())
        for layer in range(self.config.n_layers):
            x, y = self._block_io(layer)
            self._block_forward(params, layer, x, y, quantize)
        self._final_norm(params, self._block_io(self.config.n_layers - 1)[1], quantize)

    def _block_io(self, layer: int) -> tuple[Array, Array]:
        """Input and output of a block; when not training two buffers take turns."""
        n = len(self.xs)
        return self.xs[layer % n], self.xs[(layer + 1) % n]

    def _state(self, layer: int) -> BlockState:
        return self.states[layer if len(self.states) > 1 else 0]

    def _block_forward(self, params: Arena, layer: int, x: Array, y: Array, quantize: bool) -> None:
        """One block: x (N, dim) -> y (N, dim), in the order that _block_backward undoes.

        x_mid = x + attention(rope(norm(x) wqkv^T)) wo^T;  y = x_mid + swiglu(norm(x_mid) w_gate_up^T) w_down^T
        """
        p, s, n = f"layers.{layer}.", self._state(layer), x.shape[0]
        self.ops.rmsnorm_forward(s.xn1, s.inv_rms1, x, params[p + "attention_norm"], self.eps)
        self._fake_quant(s.xn1, quantize)
        self.ops.linear_forward(self.qkv.reshape(n, -1), s.xn1, params[p + "wqkv"])
        if s.heads:
            norms = params[p + "q_norm"], params[p + "k_norm"]
            self.ops.qk_norm_forward(self.qkv, s.heads["raw"], s.heads["inv_rms"], *norms, self.eps)
        self.ops.qkv_rope_forward(s.q, s.k, s.v, self.qkv, self.cos, self.sin)
        if quantize:
            for heads, transformed in ((s.q, True), (s.k, True), (s.v, False)):
                self.ops.fake_quant_heads(heads.reshape(-1, self.config.head_dim), transformed)
        self.ops.attention_forward(self.o, s.lse, s.q, s.k, s.v, self.seen_from, self.scale, self.scratch, quantize)
        self.ops.merge_heads(s.att.reshape(self.rows, self.seq_len, -1, self.config.head_dim), self.o)
        self._fake_quant(s.att, quantize)
        self.ops.linear_forward(s.x_mid, s.att, params[p + "wo"])
        self.ops.rmsnorm_residual_forward(s.xn2, s.inv_rms2, s.x_mid, x, params[p + "ffn_norm"], self.eps)
        self._fake_quant(s.xn2, quantize)
        self.ops.linear_forward(s.gate_up, s.xn2, params[p + "w_gate_up"])
        self.ops.swiglu_forward(s.h, s.gate_up)
        self._fake_quant(s.h, quantize)
        self.ops.linear_forward(y, s.h, params[p + "w_down"])
        self.ops.add(y, s.x_mid)

    def _final_norm(self, params: Arena, x: Array, quantize: bool) -> None:
        self.ops.rmsnorm_forward(self.xn_final, self.inv_rms_final, x, params["norm"], self.eps)
        self._fake_quant(self.xn_final, quantize)

    def _fake_quant(self, x: Array, quantize: bool) -> None:
        if quantize:
            self.ops.fake_quant_activations(x)

    def output_matrix(self, params: Arena) -> Array:
        """(vocab_size, dim): the embedding table itself when tied."""
        return params["tok_embeddings" if self.config.tie_embeddings else "output"]

    def evaluate(
        self, params: Arena, tokens: Array, targets: Array, quantize: bool, starts: Array | None = None
    ) -> Array:
        """Loss per token (rows, seq_len), 0 where the target is negative; valid until the next call."""
        self.forward(params, tokens, quantize, starts)
        self._losses(params, targets.ravel())
        return self.loss.reshape(tokens.shape)

    def _losses(self, params: Arena, flat: Array) -> None:
        """Of what the forward has left, into self.loss; flat (N,): targets."""
        for rows in self.counted(flat, self.loss):
            hidden, loss = self.xn_final[rows], self.loss[rows]
            logits = self.logits[: len(loss)]
            self.ops.linear_forward(logits, hidden, self.output_matrix(params))
            self.ops.cross_entropy_forward(loss, logits, flat[rows])
            _put(self.loss, rows, loss)

    def counted(self, targets: Array, *results: Array) -> list[slice] | list[Array]:
        """The rows of targets (N,) that count, at most loss_rows together: only of these are there logits. Where some do not
        count, the results (N, ...) are set to 0, and the rows are indices: ``x[rows]`` is a copy then, which :func:`_put` puts
        back."""
        n, rows = self.loss_rows, self.ops.counted_rows(targets)
        if rows is None:
            return [slice(start, min(targets.size, start + n)) for start in range(0, targets.size, n)]
        for result in results:
            self.ops.fill(result, 0)
        return [rows[start : start + n] for start in range(0, rows.size, n)]

    # ---- backward ------------------------------------------------------------------------------------------------

    def forward_backward(
        self,
        params: Arena,
        tokens: Array,
        targets: Array,
        inv: float,
        quantize: bool = False,
        distillation: AnyDistillation | None = None,
        starts: Array | None = None,
        preference: Preference | None = None,
    ) -> float:
        """Gradients of the summed loss times ``inv`` into self.grads (overwritten); returns that
        loss.

        tokens, targets (rows, seq_len) int64; a negative target does not count. inv = 1 / targets
        counted in the whole batch. params holds fake-quantized values when quantize is set. With a preference (host arrays
        only) the loss is that of ops.cpu.dpo, one a row, and inv = 1 / pairs in the whole batch.
        """
        self.gradients(params, tokens, targets, self.wide(inv), quantize, distillation, starts, preference)
        return float(self.ops.total(self.loss)) * inv

    def gradients(
        self,
        params: Arena,
        tokens: Array,
        targets: Array,
        inv: Any,
        quantize: bool = False,
        distillation: AnyDistillation | None = None,
        starts: Array | None = None,
        preference: Preference | None = None,
    ) -> None:
        """As forward_backward, but the losses stay in self.loss: nothing is read back."""
        self.ops.fill(self.grads.flat, 0)
        self.forward(params, tokens, quantize, starts)
        if distillation is not None and distillation.teacher is not None:
            distillation.teacher.forward(distillation.params, tokens, starts=starts)
        weights = None if preference is None else self._preference_weights(params, targets, preference)
        self._output_forward_backward(params, targets.ravel(), inv, distillation, weights)
        last = self._block_io(self.config.n_layers - 1)[1]
        self.ops.fill(self.dx, 0)
        self._norm_backward(params, "norm", last, self.inv_rms_final)
        for layer in reversed(range(self.config.n_layers)):
            x, y = self._block_io(layer)
            if self.recompute == "block":
                self._block_forward(params, layer, x, y, quantize)
            elif self.recompute == "activations":
                self._recompute_activations(params, layer, x, quantize)
            self._block_backward(params, layer, x)
        if not self.adapters:
            self.ops.embedding_backward(self.grads["tok_embeddings"], self.dx, tokens.ravel(), self.scratch)

    def _preference_weights(self, params: Arena, targets: Array, preference: Preference) -> Array:
        """Losses of pairs into self.loss, each at its row's first position; returns the weights (N,) of the gradients.

        A weight depends on both answers, so all losses come before the first gradient: the output layer runs twice.
        """
        self._losses(params, targets.ravel())
        losses, weights = np.empty(self.rows, self.wide), np.empty(targets.shape, self.wide)
        nll = self.loss.reshape(targets.shape)
        dpo_forward_backward(losses, weights, nll, targets, self.seen_from, preference.reference, preference.beta)
        nll[...] = 0
        nll[:, 0] = losses
        return weights.ravel()

    def _output_forward_backward(
        self, params: Arena, targets: Array, inv: Any, distillation: AnyDistillation | None, weights: Array | None
    ) -> None:
        """Output layer, loss, and their backward, at most loss_rows rows together; leaves the gradient of xn_final in dxn.

        weights (N,): of each target's gradient, where self.loss is there already; None: 1, and it is not.
        """
        w = self.output_matrix(params)
        results = (self.dxn, self.loss) if weights is None else (self.dxn,)
        for number, rows in enumerate(self.counted(targets, *results)):
            hidden, loss, dhidden = self.xn_final[rows], self.loss[rows], self.dxn[rows]
            logits = self.logits[: len(loss)]
            self.ops.linear_forward(logits, hidden, w)
            if weights is not None:
                self.ops.cross_entropy_forward_backward(np.empty_like(loss), logits, targets[rows], inv)
                logits *= weights[rows][:, None]
            elif distillation is None:
                self.ops.cross_entropy_forward_backward(loss, logits, targets[rows], inv)
            else:
                self._distill(rows, loss, logits, targets[rows], inv, distillation)
            if not self.adapters:
                self._output_gradient(logits, hidden, first=number == 0)
            self.ops.linear_backward_input(dhidden, logits, w)
            _put(self.loss, rows, loss)
            _put(self.dxn, rows, dhidden)

    def _output_gradient(self, dlogits: Array, hidden: Array, *, first: bool) -> None:
        """The output matrix's gradient: of the first rows written, of later ones added."""
        dw = self.output_matrix(self.grads)
        self.ops.linear_backward_weight(dw if first else self.doutput, dlogits, hidden)
        if not first:
            self.ops.add(dw, self.doutput)

    def _distill(
        self, rows: slice | Array, loss: Array, logits: Array, targets: Array, inv: Any, d: AnyDistillation
    ) -> None:
        """Mixed loss of some rows into loss, and its gradient over their logits."""
        alpha, tau = self.wide(d.alpha), self.wide(d.tau)
        if d.teacher is None:
            ids, probs = (x.reshape(self.loss.size, -1)[rows] for x in (d.targets.ids, d.targets.probs))
            if int(ids.max()) >= logits.shape[1]:  # the loop below checks no index
                raise DataError(f"a teacher's cache names token {ids.max()} of {logits.shape[1]}: it is damaged")
            probs = probs.astype(self.dtype)
            cross_entropy_topk_forward_backward(loss, logits, ids, probs, targets, alpha, tau, inv)
            return
        teacher = d.teacher
        wanted = teacher.logits[: len(loss)]
        self.ops.linear_forward(wanted, teacher.xn_final[rows], teacher.output_matrix(d.params))
        self.ops.cross_entropy_kl_forward_backward(loss, logits, wanted, targets, alpha, tau, inv)

    def _recompute_activations(self, params: Arena, layer: int, x: Array, quantize: bool) -> None:
        """The buffers that blocks share in recompute mode "activations", made again from what was
        kept.
        """
        p, s = f"layers.{layer}.", self._state(layer)
        self.ops.rmsnorm_forward(s.xn1, s.inv_rms1, x, params[p + "attention_norm"], self.eps)
        self._fake_quant(s.xn1, quantize)
        self.ops.rmsnorm_forward(s.xn2, s.inv_rms2, s.x_mid, params[p + "ffn_norm"], self.eps)
        self._fake_quant(s.xn2, quantize)
        self.ops.swiglu_forward(s.h, s.gate_up)
        self._fake_quant(s.h, quantize)

    def _block_backward(self, params: Arena, layer: int, x: Array) -> None:
        """self.dx: gradient of the block's output -> gradient of its input, mirror order of _block_forward.

        A residual y = x_mid + f(x_mid) has dx_mid = dy + f'(dy): dx stays as it is, and the norm's backward adds f'(dy) to it.
        Of a product y = x w^T come dw = dy^T x and dx = dy w.
        """
        p, s, n = f"layers.{layer}.", self._state(layer), x.shape[0]
        # y = x_mid + h w_down^T;  h = swiglu(gate_up);  gate_up = xn2 w_gate_up^T;  xn2 = norm(x_mid)
        self._weight_gradient(p + "w_down", self.dx, s.h)
        self.ops.linear_backward_input(self.dh, self.dx, params[p + "w_down"])
        self.ops.swiglu_backward(self.dgate_up, self.dh, s.gate_up)
        self._weight_gradient(p + "w_gate_up", self.dgate_up, s.xn2)
        self.ops.linear_backward_input(self.dxn, self.dgate_up, params[p + "w_gate_up"])
        self._norm_backward(params, p + "ffn_norm", s.x_mid, s.inv_rms2)
        # x_mid = x + att wo^T;  att = attention(q, k, v)
        self._weight_gradient(p + "wo", self.dx, s.att)
        self.ops.linear_backward_input(self.datt, self.dx, params[p + "wo"])
        self.ops.split_heads(self.do, self.datt.reshape(self.rows, self.seq_len, -1, self.config.head_dim))
        inputs = self.do, s.q, s.k, s.v, s.att, s.lse, self.seen_from
        self.ops.attention_backward(self.dq, self.dk, self.dv, *inputs, self.scale, self.scratch)
        # q, k, v = rope(qk_norm(qkv));  qkv = xn1 wqkv^T;  xn1 = norm(x)
        self.ops.qkv_rope_backward(self.dqkv, self.dq, self.dk, self.dv, self.cos, self.sin)
        if s.heads:
            kept, norms = (s.heads["raw"], s.heads["inv_rms"]), [p + "q_norm", p + "k_norm"]
            grads, weights = [self._norm_gradient(name) for name in norms], [params[name] for name in norms]
            self.ops.qk_norm_backward(self.dqkv, *grads, *kept, *weights, self.scratch)
        dqkv = self.dqkv.reshape(n, -1)
        self._weight_gradient(p + "wqkv", dqkv, s.xn1)
        self.ops.linear_backward_input(self.dxn, dqkv, params[p + "wqkv"])
        self._norm_backward(params, p + "attention_norm", x, s.inv_rms1)

    def _weight_gradient(self, name: str, dy: Array, x: Array) -> None:
        """Of a matrix, y = x w^T, into grads; or of its adapters, before their scale (:mod:`.lora`)."""
        if not self.adapters:
            self.ops.linear_backward_weight(self.grads[name], dy, x)
            return
        for module, rows in self.adapters.parts[name]:
            a, b = self.adapters.pair(self.adapters.values, module)
            da, db = self.adapters.pair(self.grads, module)
            self.ops.linear_forward(self.thin, x, a)
            self.ops.linear_backward_weight(db, dy[:, rows], self.thin)
            self.ops.linear_backward_input(self.dthin, dy[:, rows], b)
            self.ops.linear_backward_weight(da, self.dthin, x)

    def _norm_gradient(self, name: str) -> Array:
        """Where the gradient of a norm's weight belongs; beside adapters nobody reads it."""
        if self.adapters:
            size = self.config.head_dim if name.endswith(("q_norm", "k_norm")) else self.config.dim
            return self.unused[:size]
        return self.grads[name]

    def _norm_backward(self, params: Arena, name: str, x: Array, inv_rms: Array) -> None:
        """From dxn, the gradient of a norm's output, into dx and the gradient of its weight."""
        self.ops.rmsnorm_backward(self.dx, self._norm_gradient(name), self.dxn, x, params[name], inv_rms, self.scratch)


def _put(x: Array, rows: slice | Array, values: Array) -> None:
    """x[rows] = values, a copy of them; a slice was no copy."""
    if not isinstance(rows, slice):
        x[rows] = values


def fake_quantize_parameters(out: Arena, params: Arena, names: list[str] | None = None) -> None:
    """out = the values that the frozen file's codes and scales stand for; norms are copied."""
    for name in names if names is not None else list(params.shapes):
        if params[name].ndim == 1:
            out[name][...] = params[name]
        else:
            cpu_ops.fake_quant_weights(out[name], params[name])


def activation_bytes(
    config: ModelConfig, rows: int, seq_len: int, recompute: str, lora: LoraConfig | None = None
) -> int:
    """Roughly what one Worker holds, gradients included, in bytes (float32)."""
    c, n = config, rows * seq_len
    per_block = n * (2 * c.q_dim + 2 * c.kv_dim + 2 * c.hidden_dim + c.dim)
    per_block += n * (c.q_dim + c.kv_dim) if c.qk_norm else 0
    kept = n * (2 * c.dim + c.hidden_dim)
    blocks = c.n_layers if recompute != "block" else 1
    own = c.n_layers if recompute == "none" else 1
    backward = n * (4 * c.dim + 3 * c.hidden_dim + 5 * c.q_dim + 4 * c.kv_dim)
    gradients = lora.n_params(c) if lora else c.n_params() + c.vocab_size * c.dim
    output = min(n, cpu_ops.loss_rows(c.vocab_size)) * c.vocab_size
    q_shape = rows, c.n_kv_heads, seq_len, c.n_rep, c.head_dim
    scratch = sum(need.nbytes for need in cpu_ops.attention_scratch(q_shape, np.float32, True).values())
    stream = n * c.dim * (c.n_layers + 1)
    floats = blocks * per_block + own * kept + backward + output + stream
    return 4 * (floats + gradients) + scratch
