"""Which kernels BLAS has is its own choice, or the user's; a checkpoint says which they were."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training import blas, checkpoint
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


@pytest.mark.parametrize(
    ("held", "chosen", "said"),
    [
        ("Haswell", "SkylakeX", "to its AVX2 kernels, where it would take those for AVX-512 here: unset it (measured"),
        ("Nehalem", "Zen", "to its SSE kernels, where it would take those for AVX2 here: unset it"),
        ("Haswell", "Zen", ""),  # the same ones
        ("SkylakeX", "Haswell", ""),
        ("Haswell", "NEOVERSEN1", ""),  # of kernels that are not known nothing is said
        ("", "SkylakeX", ""),  # no OpenBLAS
    ],
)
def test_a_variable_that_holds_openblas_back_is_named(
    held: str, chosen: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blas, "_architecture", lambda environment: held if blas.CORETYPE in environment else chosen)
    monkeypatch.setenv(blas.CORETYPE, held or "Haswell")
    found = blas.hints()
    assert [said in line and f"{blas.CORETYPE}={held} " in line for line in found] == [True] * bool(said)
    monkeypatch.delenv(blas.CORETYPE)
    assert blas.hints() == []


def test_openblas_is_asked_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process has was chosen when NumPy was loaded; a variable that is set later counts in the next one."""
    threadpoolctl = pytest.importorskip("threadpoolctl", reason="which tells them")
    if not any(library["internal_api"] == "openblas" for library in threadpoolctl.threadpool_info()):
        pytest.skip("NumPy has another BLAS")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("a processor whose kernels have other names")
    assert blas._architecture({**os.environ, blas.CORETYPE: "Nehalem"}) == "Nehalem"
