"""The matrix products' mapping to cuBLAS: a column-major library in NumPy that reads the very pointers it is given."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")
pytest.importorskip("numba_cuda", reason="the CUDA kernels need numba-cuda: extra [cuda]")

from numpy.lib.stride_tricks import as_strided
from pyengine_training.ops.cuda._cublas import WORKSPACE_BYTES, Cublas
from pyengine_training.ops.cuda._runtime import DeviceError, Product
from simulated_intrinsics import from_bf16, to_bf16
from simulated_runtime import SimulatedRuntime

Array = Any


class FortranLibrary:
    """cublasGemmStridedBatchedEx by its documentation: column-major, leading dimensions, raw addresses."""

    def __init__(self) -> None:
        self.status = 0
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cublas"):
            raise AttributeError(name)

        def call(*_arguments: Any) -> int:
            self.calls.append(name)
            return self.status

        return call

    @staticmethod
    def _matrix(address: Any, kind: int, rows: int, cols: int, ld: int, batch: int, stride: Any) -> Array:
        """(batch, rows, cols) of column-major matrices at an address."""
        assert ld >= rows, "leading dimension shorter than a column"
        dtype = np.dtype({0: np.float32, 14: np.uint16}[kind])
        last = (batch - 1) * stride.value + (cols - 1) * ld + rows
        flat = np.ctypeslib.as_array((ctypes.c_uint8 * (last * dtype.itemsize)).from_address(address.value))
        size = dtype.itemsize
        return as_strided(flat.view(dtype), (batch, rows, cols), (stride.value * size, size, ld * size))

    def cublasGemmStridedBatchedEx(
        self, _handle: Any, op_a: int, op_b: int, m: int, n: int, k: int, alpha: Any,
        a: Any, type_a: int, lda: int, stride_a: Any, b: Any, type_b: int, ldb: int, stride_b: Any,
        beta: Any, c: Any, type_c: int, ldc: int, stride_c: Any, batch: int, compute: int, algorithm: int,
    ) -> int:  # fmt: skip
        assert (compute, algorithm, type_a) == (68, -1, type_b)
        left = self._matrix(a, type_a, *((m, k) if op_a == 0 else (k, m)), lda, batch, stride_a)
        right = self._matrix(b, type_b, *((k, n) if op_b == 0 else (n, k)), ldb, batch, stride_b)
        out = self._matrix(c, type_c, m, n, ldc, batch, stride_c)
        x, y, z = (from_bf16(v) if v.dtype == np.uint16 else v for v in (left, right, out))
        x = x if op_a == 0 else x.swapaxes(1, 2)
        y = y if op_b == 0 else y.swapaxes(1, 2)
        result = alpha._obj.value * (x @ y) + (beta._obj.value * z if beta._obj.value else 0)
        out[...] = to_bf16(result) if type_c == 14 else result
        return self.status


def handle(library: FortranLibrary) -> Cublas:
    return Cublas(library, 0x10, 0x1000, lambda array: int(array.ctypes.data))


def test_the_handle_gets_stream_workspace_and_plain_float32() -> None:
    library = FortranLibrary()
    handle(library)
    assert library.calls == ["cublasCreate_v2", "cublasSetStream_v2", "cublasSetWorkspace_v2", "cublasSetMathMode"]
    assert WORKSPACE_BYTES >= 32 << 20


@pytest.mark.parametrize("trans_a", [False, True])
@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("narrow", ["", "ab", "abc"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_products_are_the_simulated_runtimes(trans_a: bool, trans_b: bool, narrow: str, beta: float) -> None:
    """Offsets, gaps at the end of rows, gaps between members of the batch."""
    m, n, k, batch = 3, 5, 7, 2
    generator = np.random.default_rng(1)

    def part(name: str, rows: int, cols: int) -> tuple[Array, int, int, int]:
        start, length = 4, cols + 2
        stride = rows * length + 3
        flat = generator.standard_normal(start + batch * stride).astype(np.float32)
        return to_bf16(flat) if name in narrow else flat, start, length, stride

    a = part("a", *((k, m) if trans_a else (m, k)))
    b = part("b", *((n, k) if trans_b else (k, n)))
    c = part("c", m, n)
    results = []
    for run in (handle(FortranLibrary()).gemm, SimulatedRuntime().gemm):
        out = c[0].copy()
        run(Product((out, *c[1:]), a, b, (m, n, k), trans_a=trans_a, trans_b=trans_b, beta=beta, batch=batch))
        results.append(from_bf16(out) if "c" in narrow else out)
    assert not np.array_equal(results[0], from_bf16(c[0]) if "c" in narrow else c[0])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5 if "c" not in narrow else 1e-2)


def test_a_status_is_an_error_that_names_the_product() -> None:
    library = FortranLibrary()
    cublas = handle(library)
    library.status = 15
    x = np.zeros(6, np.float32)
    product = Product((x, 0, 2, 0), (x, 0, 3, 0), (x, 0, 2, 0), (2, 2, 3))
    with pytest.raises(DeviceError, match=r"product of \(2, 3\) and \(3, 2\).*not supported"):
        cublas.gemm(product)
    with pytest.raises(TypeError, match="one type"):
        cublas.gemm(Product((x, 0, 2, 0), (x.view(np.uint16), 0, 3, 0), (x, 0, 2, 0), (2, 2, 3)))


def test_tensor_floats_are_a_mode_that_ends() -> None:
    """The mode is set and set back, also when the body fails."""
    modes: list[int] = []

    class Library(FortranLibrary):
        def cublasSetMathMode(self, _handle: Any, mode: int) -> int:
            modes.append(mode)
            return 0

    products = Cublas(Library(), 0, 0, lambda _array: 0)
    with pytest.raises(RuntimeError), products.tensor_floats(True), products.tensor_floats(False):
        raise RuntimeError
    assert modes == [0, 3, 0, 3, 0]
