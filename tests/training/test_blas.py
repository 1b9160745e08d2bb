"""Which kernels BLAS is asked for, and when: NumPy reads the variable once, as it is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from pyengine_training.blas import VARIABLE, kernels_for

ZEN5 = "avx2 avx512f avx512dq avx512ifma avx512cd avx512bw avx512vl avx512_bf16"


def cpuinfo(vendor: str, flags: str) -> str:
    """Of two processors, the second of which has nothing."""
    return (
        f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags}\nbugs\t\t:\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    )


@pytest.mark.parametrize(
    ("text", "kernels"),
    [
        (cpuinfo("AuthenticAMD", ZEN5), "SkylakeX"),
        (cpuinfo("AuthenticAMD", "avx avx2 fma"), None),
        (cpuinfo("AuthenticAMD", ZEN5.replace("avx512vl", "")), None),
        (cpuinfo("GenuineIntel", ZEN5), None),
        ("processor\t: 0\nFeatures\t: fp asimd sve\n", None),
        ("", None),
    ],
)
def test_kernels_by_processor(text: str, kernels: str | None) -> None:
    assert kernels_for(text) == kernels


def asked_for(script: str, **given: str) -> str:
    """What a fresh process finds in the variable after the script."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    command = [sys.executable, "-c", f"import os; {script}; print(os.environ.get({VARIABLE!r}))"]
    return subprocess.run(
        command, env={**environment, **given}, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_asked_for_before_numpy_is_there() -> None:
    wanted = "from pathlib import Path; from pyengine_training import blas; f = Path('/proc/cpuinfo'); "
    wanted += "expected = blas.kernels_for(f.read_text()) if f.exists() else None; "
    assert asked_for(f"{wanted}assert os.environ.get(blas.VARIABLE) == expected") in ("SkylakeX", "None")
    assert asked_for("import pyengine_training.model", OPENBLAS_CORETYPE="Haswell") == "Haswell"
    assert asked_for("import numpy, pyengine_training") == "None"
