"""Which kernels BLAS has is its own choice, or the user's; a checkpoint says which they were."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training import checkpoint
from pyengine_training.blas import kernels_in_use


def test_importing_the_trainer_leaves_the_environment_alone() -> None:
    """OpenBLAS knows its processors: a choice made here could be a worse one, and would reach processes that others start."""
    script = "import os; before = dict(os.environ); import pyengine_training.model; assert dict(os.environ) == before"
    given = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    subprocess.run([sys.executable, "-c", script], env=given, check=True)


def test_kernels_are_told_of_blas_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl", reason="which tells them")
    found = [
        {"user_api": "openmp", "internal_api": "openmp", "version": None},
        {"user_api": "blas", "internal_api": "openblas", "version": "0.3.31", "architecture": "Haswell"},
    ]
    monkeypatch.setattr(threadpoolctl, "threadpool_info", lambda: found)
    assert kernels_in_use.__wrapped__() == "openblas 0.3.31 Haswell"
    found.pop()  # a BLAS that it does not know
    assert kernels_in_use.__wrapped__() == "unknown"


def test_a_checkpoint_says_which_kernels_made_it() -> None:
    assert checkpoint.environment()["blas"] == kernels_in_use()
