"""Plain storage, so that the model's lists of calls need not know whose memory they work on.

dtype is the type of activations; :func:`wide_dtype` that of what stays wider (statistics, losses, gradients of weights).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import Array


def wide_dtype(dtype: Any) -> Any:
    """The type of statistics and sums beside activations of this type."""
    return dtype


def loss_rows(vocab_size: int) -> int:
    """Rows of logits to hold at a time: few enough to stay near the caches, and below 128 MiB of float32."""
    return max(32, min(512, (1 << 25) // vocab_size))


def counted_rows(targets: Array) -> Array | None:
    """Where targets (N,) count, ascending; None: everywhere."""
    rows = np.flatnonzero(targets >= 0)
    return rows if rows.size < targets.size else None


def empty(shape: tuple[int, ...], dtype: Any) -> Array:
    """A new array whose pages have been touched: first touches are slow, and later would be in a step."""
    buffer = np.empty(shape, dtype)
    buffer.fill(0)
    return buffer


def zeros(shape: Any, dtype: Any) -> Array:
    """A zeroed array, pages touched."""
    return empty(shape, dtype)


def upload(host: Array) -> Array:
    """An array of this back end with the host array's values."""
    return host


def fill(x: Array, value: float) -> None:
    """Every element = value."""
    x.fill(value)


def add(y: Array, x: Array) -> None:
    """y += x, element by element."""
    y += x


def total(x: Array) -> float:
    """The sum of all elements, in float64."""
    return float(x.sum(dtype=np.float64))
