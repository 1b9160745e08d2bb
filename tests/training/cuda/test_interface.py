"""The two back ends' operations have the same names and signatures, and both trainers' back ends the protocol's."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

pytest.importorskip("numba_cuda", reason="the CUDA kernels need numba-cuda: extra [cuda]")

from pyengine_training.backend import Backend
from pyengine_training.backend.cpu import CpuBackend
from pyengine_training.backend.cuda import CudaBackend
from pyengine_training.ops import cpu, cuda


def parameters(function: Any) -> list[str]:
    """Names, in order; a kernel of Numba's shows its Python function's."""
    return list(inspect.signature(getattr(function, "py_func", function)).parameters)


@pytest.mark.parametrize("name", cpu.__all__)
def test_operations_are_called_alike(name: str) -> None:
    assert parameters(getattr(cuda, name)) == parameters(getattr(cpu, name))


def test_cuda_has_only_its_own_beside_them() -> None:
    assert {name for name in set(cuda.__all__) - set(cpu.__all__) if not name.startswith("flash_")} == {"copy"}


@pytest.mark.parametrize("backend", [CpuBackend, CudaBackend])
def test_back_ends_are_driven_alike(backend: Any) -> None:
    methods = {name: value for name, value in vars(Backend).items() if not name.startswith("_")}
    assert len(methods) >= 9
    for name, wanted in methods.items():
        if inspect.isfunction(wanted):
            assert parameters(getattr(backend, name)) == parameters(wanted), name
