"""The runtime of a real GPU: arrays by cupy, launches by numba-cuda, products by cuBLAS, all on one stream.

Launches bind each array once: a descriptor of (address, length, type) is kept and used again, because making one from
a cupy array costs tens of microseconds. A whole step is recorded once into a CUDA graph and then started with one call.

Errors of kernels arrive late, at the next wait. With PYENGINE_CUDA_SYNC=1 every launch waits, and the message names the
kernel exactly; without it, it names the last ones that were started. PYENGINE_CUDA_GRAPHS=0 records nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ._runtime import Array, DeviceError, Product

INSTALL = "pip install 'pyengine-lm[cuda]'"
OLDEST_DRIVER = 12020  # CUDA 12.2
OLDEST_CAPABILITY = (8, 0)  # bfloat16 conversion and tensor cores
NOT_READY = 600  # cudaErrorNotReady
POLL = 5e-5  # seconds
ADVICE = "use a smaller --batch-size, more --shards, or --recompute block"


def _numba_config() -> Any:
    from numba import config

    return config


def _libraries() -> tuple[Any, Any]:
    """numba.cuda and cupy. Raises DeviceError that says what to install."""
    if _numba_config().ENABLE_CUDASIM:
        raise DeviceError("NUMBA_ENABLE_CUDASIM is set: this is numba's simulator, not a GPU; unset it")
    try:
        import numba_cuda  # numba has an older module of its own under the name numba.cuda
        from numba import cuda
    except ImportError as error:
        raise DeviceError(f"--device cuda needs numba-cuda: {INSTALL}") from error
    if not hasattr(np, "row_stack"):  # numba-cuda 0.30 names it, NumPy 2.5 dropped it: no kernel would compile
        raise DeviceError(
            f"numba-cuda {numba_cuda.__version__} cannot compile with NumPy {np.__version__}: pip install 'numpy<2.5'"
        )
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(f"--device cuda needs cupy: {INSTALL}") from error
    if "numba_cuda" not in Path(cuda.__file__).parts:  # a .pth file makes numba.cuda that package; Python reads it in few folders
        raise DeviceError(
            f"--device cuda finds numba's own CUDA module ({cuda.__file__}) and not that of numba-cuda, which is installed "
            "outside of this environment: pip install --ignore-installed --no-deps numba-cuda"
        )
    return cuda, cupy


def _check_driver(cuda: Any, cupy: Any) -> None:
    """Raise DeviceError unless there is a driver, new enough, and a GPU."""
    error = cuda.cuda_error() if hasattr(cuda, "cuda_error") else None
    if error is not None:
        raise DeviceError(
            "no NVIDIA driver is usable here; nvidia-smi should list a GPU, and a container needs --gpus all. "
            f"The driver's word: {' '.join(str(error).split())}"
        )
    try:
        version, count = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.getDeviceCount()
    except Exception as problem:  # cupy raises its own classes
        raise DeviceError(f"CUDA does not start: {problem}") from problem
    if version < OLDEST_DRIVER:
        raise DeviceError(
            f"the NVIDIA driver supports CUDA {version // 1000}.{version % 1000 // 10}, "
            f"{OLDEST_DRIVER // 1000}.{OLDEST_DRIVER % 1000 // 10} is needed: update the driver"
        )
    if count < 1:
        raise DeviceError("the driver finds no GPU (is CUDA_VISIBLE_DEVICES empty?)")


def _check_device(cuda: Any) -> None:
    """Raise DeviceError unless the current GPU is new enough."""
    capability = cuda.get_current_device().compute_capability
    if tuple(capability[:2]) < OLDEST_CAPABILITY:
        raise DeviceError(
            f"the GPU has compute capability {capability[0]}.{capability[1]}; 8.0 or newer is needed for bfloat16"
        )


class GpuRuntime:
    """A GPU of this machine. Constructing it raises DeviceError, with the way out, where there is no usable one."""

    def __init__(self, local_rank: int = 0) -> None:
        """local_rank: among the ranks of this machine, to whom the GPUs are dealt out in turn."""
        from ._cublas import WORKSPACE_BYTES, Cublas, load_cublas

        self.cuda, self.cupy = _libraries()
        _check_driver(self.cuda, self.cupy)
        number = local_rank % self.cupy.cuda.runtime.getDeviceCount()
        self.cupy.cuda.Device(number).use()
        self.cuda.select_device(number)
        _check_device(self.cuda)
        self.kind = str(self.cuda.get_current_device().name)
        self.place = str(self.cupy.cuda.runtime.deviceGetPCIBusId(number))
        # Everything runs on one stream: no waiting when an array changes hands. Small grids are meant.
        config = _numba_config()
        config.CUDA_ARRAY_INTERFACE_SYNC = False
        config.CUDA_LOW_OCCUPANCY_WARNINGS = 0
        self.capturing = False
        self.wait_always = os.environ.get("PYENGINE_CUDA_SYNC") == "1"
        self._check: Callable[[], None] | None = None
        self.stream = self.cupy.cuda.Stream(non_blocking=True)
        self.stream_address = int(self.stream.ptr)
        self._numba_stream = self.cuda.external_stream(self.stream.ptr)
        self._recent: deque[str] = deque(maxlen=4)
        self._workspace = self.empty((WORKSPACE_BYTES,), np.uint8)
        self._cublas = Cublas(load_cublas(), self.stream.ptr, self._workspace.data.ptr, lambda x: int(x.data.ptr))
        self._bound: dict[tuple[int, int, str], Any] = {}

    # ---- memory --------------------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Raises DeviceError when the GPU's memory is full."""
        with self._told():
            try:
                with self.stream:
                    return self.cupy.empty(shape, dtype)
            except self.cupy.cuda.memory.OutOfMemoryError as error:
                free, total = self.memory()
                raise DeviceError(
                    f"out of GPU memory: {np.dtype(dtype).itemsize * int(np.prod(shape)):,} bytes wanted, "
                    f"{free:,} of {total:,} free; {ADVICE}"
                ) from error

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the GPU. What cupy has kept of arrays that are gone is given back first: an earlier trainer of
        this process, which measured a step, takes nothing from the next one."""
        self.cupy.get_default_memory_pool().free_all_blocks()
        free, total = self.cupy.cuda.runtime.memGetInfo()
        return int(free), int(total)

    def upload(self, host: Any, out: Array | None = None) -> Array:
        host = np.ascontiguousarray(host)
        if out is None:
            out = self.empty(host.shape, host.dtype)
        with self._told(), self.stream:
            out.set(host, stream=self.stream)
        self.synchronize()  # the host array may go away
        return out

    def download(self, array: Array) -> Any:
        self.synchronize()
        with self._told():
            return array.get(stream=self.stream)

    def fill(self, array: Array, value: float) -> None:
        if array.size == 0:
            return
        with self._told(), self.stream:
            if value == 0:
                array.data.memset_async(0, array.nbytes, self.stream)
            else:
                array.fill(value)

    # ---- work ----------------------------------------------------------------------------------------------------

    def _argument(self, value: Any) -> Any:
        """What numba takes for an argument; arrays become descriptors without an owner, made once."""
        if not isinstance(value, self.cupy.ndarray):
            return value
        key = value.data.ptr, value.size, value.dtype.char
        found = self._bound.get(key)
        if found is None:
            interface = dict(value.__cuda_array_interface__)
            interface["stream"] = None
            found = self.cuda.from_cuda_array_interface(interface, owner=None, sync=False)
            self._bound[key] = found
        return found

    def launch(self, kernel: Any, grid: int, block: int, arguments: tuple[Any, ...]) -> None:
        name = kernel.py_func.__name__
        self._recent.append(name)
        try:
            kernel[grid, block, self._numba_stream](*map(self._argument, arguments))
            if self.wait_always and not self.capturing:
                self.stream.synchronize()
        except DeviceError:
            raise
        except Exception as error:  # numba's and cupy's many classes
            raise DeviceError(f"kernel {name} (grid {grid}, block {block}): {error}") from error

    def gemm(self, product: Product) -> None:
        self._recent.append("cuBLAS")
        self._cublas.gemm(product)
        if self.wait_always and not self.capturing:
            self.synchronize()

    def tensor_floats(self, allowed: bool) -> contextlib.AbstractContextManager[None]:
        return self._cublas.tensor_floats(allowed)

    def watch(self, check: Callable[[], None]) -> None:
        self._check = check

    def _is_busy(self) -> bool:
        """Whether the stream has work left, and no error: cupy's Stream.done is False then, too, and would stay so."""
        return bool(self.cupy.cuda.runtime.streamQuery(self.stream_address) == NOT_READY)

    def synchronize(self) -> None:
        with self._told():
            while self._check is not None and self._is_busy():
                self._check()
                time.sleep(POLL)
            self.stream.synchronize()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """An error of the device reaches whatever is called next: as a DeviceError that says what had been started."""
        try:
            yield
        except DeviceError:
            raise
        except Exception as error:  # cupy's many classes
            raise DeviceError(
                f"the GPU reports: {error}; started last: {', '.join(self._recent)}. "
                "PYENGINE_CUDA_SYNC=1 names the kernel exactly"
            ) from error

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record what ``function`` launches into a graph; returns what starts it. The function must have run before."""
        if os.environ.get("PYENGINE_CUDA_GRAPHS") == "0":
            return function
        try:
            graph = self._capture(function)
        except Exception as error:  # DeviceError too: it says which kernel, but not that it was being recorded
            raise DeviceError(
                f"a step could not be recorded: {error}. PYENGINE_CUDA_GRAPHS=0 launches it piece by piece"
            ) from error

        def start() -> None:
            self._recent.append("a recorded step")
            with self._told():
                graph.launch(self.stream)

        return start

    def _capture(self, function: Callable[[], None]) -> Any:
        with self.stream:
            self.capturing = True
            try:
                self.stream.begin_capture()
                try:
                    function()
                finally:
                    graph = self.stream.end_capture()
            finally:
                self.capturing = False
        return graph
