"""SwiGLU on fused rows.  gate_up, dgate_up (N, 2 * hidden_dim): gate, then up;  h, dh (N, hidden_dim).

forward   s = 1 / (1 + exp(-gate));  h = gate * s * up                                  written with =
backward  dup = dh * gate * s;  dgate = dh * up * s * (1 + gate * (1 - s))              written with =
"""

from __future__ import annotations

from ._jit import Array, exp, f4, kernel


@kernel
def swiglu_forward(h: Array, gate_up: Array) -> None:
    """h = silu(gate) * up."""
    n_rows, hidden = h.shape
    for i in range(n_rows):
        gates, ups, out = gate_up[i, :hidden], gate_up[i, hidden:], h[i]
        for f in range(hidden):
            gate = gates[f]
            out[f] = gate / (f4(1) + exp(-gate)) * ups[f]


@kernel
def swiglu_backward(dgate_up: Array, dh: Array, gate_up: Array) -> None:
    """Gradients of gate and up."""
    n_rows, hidden = dh.shape
    for i in range(n_rows):
        gates, ups = gate_up[i, :hidden], gate_up[i, hidden:]
        dgates, dups, d = dgate_up[i, :hidden], dgate_up[i, hidden:], dh[i]
        for f in range(hidden):
            gate = gates[f]
            s = f4(1) / (f4(1) + exp(-gate))
            dups[f] = d[f] * gate * s
            dgates[f] = d[f] * ups[f] * s * (f4(1) + gate * (f4(1) - s))
