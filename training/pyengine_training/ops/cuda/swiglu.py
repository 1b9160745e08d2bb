"""SwiGLU on fused rows.  gate_up, dgate_up (N, 2 * hidden_dim): gate, then up;  h, dh (N, hidden_dim).

forward   s = 1 / (1 + exp(-gate));  h = gate * s * up                                  written with =
backward  dup = dh * gate * s;  dgate = dh * up * s * (1 + gate * (1 - s))              written with =

One thread for each element of h.
"""

from __future__ import annotations

import math
from typing import Any

from ._intrinsics import load, store
from ._jit import Array, cuda, device, f4, kernel, launch_elements, u4, unsigned
from ._runtime import flat


@device
def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)); exp is kept from overflowing, where approximate division would lose the zero."""
    return f4(1) / (f4(1) + math.exp(min(-x, f4(88))))


@kernel
def swiglu_forward_kernel(h: Any, gate_up: Any, n: int, hidden: int) -> None:
    """h[i]."""
    i = u4(cuda.grid(1))
    if i < n:
        g = i // hidden * hidden + i
        gate = load(gate_up, g)
        store(h, i, gate * sigmoid(gate) * load(gate_up, g + hidden))


@kernel
def swiglu_backward_kernel(dgate_up: Any, dh: Any, gate_up: Any, n: int, hidden: int) -> None:
    """dgate and dup of element i of h."""
    i = u4(cuda.grid(1))
    if i < n:
        g = i // hidden * hidden + i
        gate = load(gate_up, g)
        d = load(dh, i)
        s = sigmoid(gate)
        store(dgate_up, g + hidden, d * gate * s)
        store(dgate_up, g, d * load(gate_up, g + hidden) * s * (f4(1) + gate * (f4(1) - s)))


def swiglu_forward(h: Array, gate_up: Array) -> None:
    """h = silu(gate) * up."""
    launch_elements(
        swiglu_forward_kernel, h.size, flat(h), flat(gate_up), *unsigned(h.size, h.shape[1], addressed=gate_up.size)
    )


def swiglu_backward(dgate_up: Array, dh: Array, gate_up: Array) -> None:
    """Gradients of gate and up."""
    arrays = map(flat, (dgate_up, dh, gate_up))
    launch_elements(swiglu_backward_kernel, dh.size, *arrays, *unsigned(dh.size, dh.shape[1], addressed=gate_up.size))
