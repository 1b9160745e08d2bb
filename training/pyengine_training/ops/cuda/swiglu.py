"""SwiGLU on fused rows.  gate_up, dgate_up (N, 2 * hidden_dim): gate, then up;  h, dh (N, hidden_dim).

forward   s = 1 / (1 + exp(-gate));  h = gate * s * up                                  written with =
backward  dup = dh * gate * s;  dgate = dh * up * s * (1 + gate * (1 - s))              written with =

One thread for WIDTH elements of h.
"""

from __future__ import annotations

import math
from typing import Any

from numba import float32

from ._jit import Array, cuda, device, f4, i8, kernel, launch_elements, u4, unsigned
from ._runtime import flat
from ._vectors import WIDTH, aligned, pieces, read, write


@device
def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)); exp is kept from overflowing, where approximate division would lose the zero."""
    return f4(1) / (f4(1) + math.exp(min(-x, f4(88))))


@kernel
def swiglu_forward_kernel(h: Any, gate_up: Any, whole: bool, n: int, hidden: int, parts: int) -> None:
    """Part i of the rows of h."""
    i = u4(cuda.grid(1))
    if i >= n:
        return
    row = i8(i // parts)
    width = i8(hidden)
    c = i8(i % parts) * WIDTH
    gates = row * width * 2
    gate = cuda.local.array(WIDTH, float32)
    up = cuda.local.array(WIDTH, float32)
    read(gate, gate_up, gates + c, gates + width, whole)
    read(up, gate_up, gates + width + c, gates + width * 2, whole)
    for e in range(WIDTH):
        up[e] *= gate[e] * sigmoid(gate[e])
    write(h, row * width + c, (row + i8(1)) * width, up, whole)


@kernel
def swiglu_backward_kernel(
    dgate_up: Any, dh: Any, gate_up: Any, whole: bool, n: int, hidden: int, parts: int
) -> None:
    """dgate and dup of part i of the rows of h."""
    i = u4(cuda.grid(1))
    if i >= n:
        return
    row = i8(i // parts)
    width = i8(hidden)
    c = i8(i % parts) * WIDTH
    gates = row * width * 2
    gate = cuda.local.array(WIDTH, float32)
    up = cuda.local.array(WIDTH, float32)
    d = cuda.local.array(WIDTH, float32)
    read(gate, gate_up, gates + c, gates + width, whole)
    read(up, gate_up, gates + width + c, gates + width * 2, whole)
    read(d, dh, row * width + c, (row + i8(1)) * width, whole)
    for e in range(WIDTH):
        s = sigmoid(gate[e])
        dup = d[e] * gate[e] * s
        gate[e] = d[e] * up[e] * s * (f4(1) + gate[e] * (f4(1) - s))
        up[e] = dup
    write(dgate_up, gates + c, gates + width, gate, whole)
    write(dgate_up, gates + width + c, gates + width * 2, up, whole)


def _launch(function: Any, h: Array, arrays: tuple[Array, ...]) -> None:
    rows, hidden = h.shape
    n = rows * pieces(hidden)
    whole = aligned(*arrays, width=hidden)
    sizes = unsigned(n, hidden, pieces(hidden), addressed=2 * h.size)
    launch_elements(function, n, *map(flat, arrays), whole, *sizes)


def swiglu_forward(h: Array, gate_up: Array) -> None:
    """h = silu(gate) * up."""
    _launch(swiglu_forward_kernel, h, (h, gate_up))


def swiglu_backward(dgate_up: Array, dh: Array, gate_up: Array) -> None:
    """Gradients of gate and up."""
    _launch(swiglu_backward_kernel, dh, (dgate_up, dh, gate_up))
