"""Matrix products by cuBLAS, called on raw pointers.

cuBLAS is column-major: a row-major (m, n) matrix is its column-major (n, m) transpose, so C = op(A) op(B) is asked for
as C^T = op(B)^T op(A)^T, which only swaps the two operands. Sums are float32 throughout; float32 inputs are multiplied as
float32, unless :meth:`Cublas.tensor_floats` allows TF32. The handle works in a workspace of ours, so that recorded graphs
allocate nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

from ._runtime import DeviceError, Product

R_32F, R_16BF, COMPUTE_32F, DEFAULT_ALGORITHM = 0, 14, 68, -1
NO, TRANSPOSE = 0, 1
DEFAULT_MATH, TENSOR_FLOATS = 0, 3  # CUBLAS_DEFAULT_MATH, CUBLAS_TF32_TENSOR_OP_MATH
WORKSPACE_BYTES = 32 << 20  # what NVIDIA advises for compute capability 9

STATUS = {
    1: "not initialized",
    3: "out of memory",
    7: "invalid value",
    8: "architecture mismatch",
    11: "mapping error",
    13: "execution failed",
    14: "internal error",
    15: "not supported",
}


def load_cublas() -> ctypes.CDLL:
    """The library, from the Python packages or the system. Raises DeviceError when there is none."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        path = load_nvidia_dynamic_lib("cublas").abs_path
        return ctypes.CDLL(str(path))
    except Exception as error:  # pathfinder has its own classes, some of them not exported
        raise DeviceError(
            "cuBLAS was not found: pip install nvidia-cublas, or set CUDA_HOME to an installed CUDA toolkit "
            f"({type(error).__name__})"
        ) from error


class Cublas:
    """A handle on one stream. ``pointer(array)`` gives an array's address, ``bytes_of(array)`` its element size."""

    def __init__(
        self,
        library: Any,
        stream: int,
        workspace: int,
        pointer: Callable[[Any], int],
    ) -> None:
        self.library, self.pointer = library, pointer
        self.handle = ctypes.c_void_p()
        self._check("create", library.cublasCreate_v2(ctypes.byref(self.handle)))
        self._check("set stream", library.cublasSetStream_v2(self.handle, ctypes.c_void_p(stream)))
        self._check(
            "set workspace",
            library.cublasSetWorkspace_v2(self.handle, ctypes.c_void_p(workspace), ctypes.c_size_t(WORKSPACE_BYTES)),
        )
        self.math = DEFAULT_MATH
        self._check("set math mode", library.cublasSetMathMode(self.handle, DEFAULT_MATH))

    @contextlib.contextmanager
    def tensor_floats(self, allowed: bool) -> Iterator[None]:
        """Within the body float32 products may round their inputs to TF32; recorded graphs keep what held."""
        before, self.math = self.math, TENSOR_FLOATS if allowed else DEFAULT_MATH
        self._check("set math mode", self.library.cublasSetMathMode(self.handle, self.math))
        try:
            yield
        finally:
            self.math = before
            self._check("set math mode", self.library.cublasSetMathMode(self.handle, before))

    @staticmethod
    def _check(what: str, status: int) -> None:
        if status:
            raise DeviceError(f"cuBLAS: {what}: {STATUS.get(status, 'error')} (status {status})")

    def _matrix(self, part: tuple[Any, int, int, int]) -> tuple[ctypes.c_void_p, int, int, ctypes.c_longlong]:
        """Address, element type, leading dimension and batch stride."""
        array, start, length, stride = part
        address = self.pointer(array) + start * array.dtype.itemsize
        kind = R_16BF if array.dtype.itemsize == 2 else R_32F
        return ctypes.c_void_p(address), kind, length, ctypes.c_longlong(stride)

    def gemm(self, p: Product) -> None:
        """Start the batch of products."""
        if 0 in (p.m, p.n, p.k, p.batch):
            return
        a, type_a, lda, stride_a = self._matrix(p.a)
        b, type_b, ldb, stride_b = self._matrix(p.b)
        c, type_c, ldc, stride_c = self._matrix(p.c)
        if type_a != type_b:
            raise TypeError("cuBLAS multiplies matrices of one type")
        alpha, beta = ctypes.c_float(1.0), ctypes.c_float(p.beta)
        status = self.library.cublasGemmStridedBatchedEx(
            self.handle,
            TRANSPOSE if p.trans_b else NO,
            TRANSPOSE if p.trans_a else NO,
            p.n,
            p.m,
            p.k,
            ctypes.byref(alpha),
            b,
            type_b,
            ldb,
            stride_b,
            a,
            type_a,
            lda,
            stride_a,
            ctypes.byref(beta),
            c,
            type_c,
            ldc,
            stride_c,
            p.batch,
            COMPUTE_32F,
            DEFAULT_ALGORITHM,
        )
        self._check(f"product of ({p.m}, {p.k}) and ({p.k}, {p.n}), batch {p.batch}", status)
