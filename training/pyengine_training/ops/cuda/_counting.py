"""A device that only counts: how much memory a list of launches needs, found by going through it.

Arrays are the host's, never touched, so their pages do not exist; kernels and products do nothing. What a back end would
allocate on a GPU, in the same order and with the same lifetimes, it allocates here.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from ._runtime import Array, Product


class CountingRuntime:
    """:class:`._runtime.Runtime` whose ``peak`` is the most bytes that were held at once."""

    capturing = False
    kind = place = "paper"
    stream_address = 0

    def __init__(self) -> None:
        self.held = self.peak = 0

    def watch(self, check: Callable[[], None]) -> None:
        return

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        made = np.empty(shape, dtype)
        self.held += made.nbytes
        self.peak = max(self.peak, self.held)
        weakref.finalize(made, self._gone, made.nbytes)
        return made

    def _gone(self, n_bytes: int) -> None:
        self.held -= n_bytes

    def upload(self, host: Any, out: Array | None = None) -> Array:
        return self.empty(host.shape, host.dtype) if out is None else out

    def download(self, array: Array) -> Any:
        return np.zeros(array.shape, array.dtype)

    def launch(self, kernel: Any, grid: int, block: int, arguments: tuple[Any, ...]) -> None:
        return

    def gemm(self, product: Product) -> None:
        return

    def fill(self, array: Array, value: float) -> None:
        return

    def tensor_floats(self, allowed: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        return

    def memory(self) -> tuple[int, int]:
        return 1 << 60, 1 << 60

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        return function
