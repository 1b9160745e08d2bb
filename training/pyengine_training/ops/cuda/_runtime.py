"""What the kernels stand on: arrays, launches and matrix products of one device.

Ops never name a library: they ask :func:`runtime` for it. On a machine with a GPU that is :class:`._gpu.GpuRuntime`;
tests put in one whose arrays are NumPy's and whose threads are simulated.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from ...errors import TrainingError

Array = Any  # a C-contiguous device array: cupy.ndarray on a GPU, numpy.ndarray in the simulator


class DeviceError(TrainingError, RuntimeError):
    """No usable GPU, or a GPU that reported an error; the message says what to do or which kernel it was."""


class Runtime(Protocol):
    """One device. Arrays are C-contiguous; everything runs in order on one stream."""

    kind: str  # of the device: ranks whose devices are of one kind compute the same bits
    place: str  # of the device in its machine
    stream_address: int

    def watch(self, check: Callable[[], None]) -> None:
        """Call ``check`` now and then while the device is waited for, which it ends by raising."""

    def launch(self, kernel: Any, grid: int, block: int, arguments: tuple[Any, ...]) -> None:
        """Start a kernel on (grid,) blocks of (block,) threads."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An uninitialized array."""

    def upload(self, host: Any, out: Array | None = None) -> Array:
        """A NumPy array on the device, in ``out`` where given."""

    def download(self, array: Array) -> Any:
        """A NumPy copy; waits for the device."""

    def fill(self, array: Array, value: float) -> None:
        """Every element = value."""

    def gemm(self, product: Product) -> None:
        """A batch of matrix products, see :class:`Product`."""

    def tensor_floats(self, allowed: bool) -> contextlib.AbstractContextManager[None]:
        """Within the body float32 products may, or may not, round their inputs to TF32 (10 bits) for speed."""

    def synchronize(self) -> None:
        """Wait for the device; raises DeviceError where a kernel failed."""

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """What repeats the launches of ``function`` with one call; the function has run before."""

    @property
    def capturing(self) -> bool:
        """Whether launches are being recorded into a graph, so that nothing may be read back."""


class Product:
    """A batch of row-major products C = op(A) op(B) + beta C over flat arrays.

    op(A) is (m, k), op(B) (k, n), C (m, n); a, b, c are (flat array, first element, row length, distance between
    members of the batch). float32 and bfloat16 (as uint16) may be mixed between C and the inputs; sums are float32.
    """

    __slots__ = ("a", "b", "batch", "beta", "c", "k", "m", "n", "trans_a", "trans_b")

    def __init__(
        self,
        c: tuple[Array, int, int, int],
        a: tuple[Array, int, int, int],
        b: tuple[Array, int, int, int],
        sizes: tuple[int, int, int],
        *,
        trans_a: bool = False,
        trans_b: bool = False,
        beta: float = 0.0,
        batch: int = 1,
    ) -> None:
        self.c, self.a, self.b = c, a, b
        self.m, self.n, self.k = sizes
        self.trans_a, self.trans_b, self.beta, self.batch = trans_a, trans_b, beta, batch


_current: Runtime | None = None


def runtime() -> Runtime:
    """The device in use; the first call looks for a GPU. Raises DeviceError with the way out where there is none."""
    global _current
    if _current is None:
        from ._gpu import GpuRuntime

        _current = GpuRuntime()
    return _current


def open_runtime(local_rank: int) -> Runtime:
    """The device of one of several ranks of this machine, unless one is in use. Raises DeviceError as :func:`runtime` does."""
    global _current
    if _current is None:
        from ._gpu import GpuRuntime

        _current = GpuRuntime(local_rank)
    return _current


@contextlib.contextmanager
def use_runtime(other: Runtime) -> Iterator[Runtime]:
    """Run the body on another device."""
    global _current
    previous, _current = _current, other
    try:
        yield other
    finally:
        _current = previous


class _Kept:
    """Small arrays of one device, by purpose and type, and numbers that were uploaded."""

    def __init__(self) -> None:
        self.arrays: dict[tuple[str, str], Array] = {}
        self.numbers: dict[float, Array] = {}


_kept: weakref.WeakKeyDictionary[Runtime, _Kept] = weakref.WeakKeyDictionary()


def kept(name: str, size: int, dtype: Any, *, zeroed: bool = False) -> Array:
    """The device's own array of this name: always the same few elements; contents are undefined at first, or zero.

    For what does not depend on any shape: flags, knobs, partial sums. It must exist before a graph is recorded.
    """
    device = runtime()
    arrays = _kept.setdefault(device, _Kept()).arrays
    key = name, np.dtype(dtype).str
    if key not in arrays:
        if device.capturing:
            raise DeviceError(f"{name!r} would be allocated inside a graph: run one step before")
        arrays[key] = device.empty((size,), dtype)
        if zeroed:
            device.fill(arrays[key], 0)
    return arrays[key]


def number(value: Any) -> Array:
    """A device array of one float32: the value itself if it is one, else uploaded once for each value."""
    if isinstance(value, float | int | np.generic):
        device = runtime()
        numbers = _kept.setdefault(device, _Kept()).numbers
        key = float(np.float32(value))
        if key not in numbers:
            numbers[key] = device.upload(np.array([value], np.float32))
        return numbers[key]
    return flat(value)


def flat(array: Array) -> Array:
    """A one-dimensional view; refuses arrays that a view cannot flatten (reshape would copy silently)."""
    if not array.flags.c_contiguous:
        raise ValueError(f"an array of shape {array.shape} is not contiguous")
    return array.reshape(-1)
