"""Which of OpenBLAS's kernels NumPy's products use.

OpenBLAS picks its kernels by the processor's family when it is loaded, and on families that it does not know it takes
those of AVX2 although there is AVX-512: half the speed on Zen 5 (OpenBLAS 0.3.31, of NumPy's wheels). Nothing but
OPENBLAS_CORETYPE changes that, and only before NumPy is imported. Other BLAS libraries do not read it.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

VARIABLE = "OPENBLAS_CORETYPE"
NEEDED = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}  # by the kernels named SkylakeX


def kernels_for(cpuinfo: str) -> str | None:
    """Name of the kernels to ask for on the first processor of /proc/cpuinfo's text; None: OpenBLAS knows better.

    Intel's processors it knows; of AMD's those with AVX-512 run what was written for the first Intel ones that had it.
    """
    fields = {}
    for line in cpuinfo.split("\n\n", 1)[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.split()
    amd = fields.get("vendor_id") == ["AuthenticAMD"]
    return "SkylakeX" if amd and set(fields.get("flags", ())) >= NEEDED else None


def choose_kernels() -> None:
    """Set the variable for this process and those it starts, unless it is set or it is too late: NumPy is there already."""
    if VARIABLE in os.environ or "numpy" in sys.modules:
        return
    try:
        kernels = kernels_for(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:  # not Linux
        return
    if kernels:
        os.environ[VARIABLE] = kernels


@functools.cache  # what others load later is not NumPy's
def kernels_in_use() -> str:
    """Libraries and kernels that NumPy's products run on, as far as threadpoolctl tells: results depend on them."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return os.environ.get(VARIABLE, "unknown")
    libraries = (library for library in threadpool_info() if library["user_api"] == "blas")
    names = ("internal_api", "version", "architecture")
    return ", ".join(sorted({" ".join(str(library.get(name)) for name in names) for library in libraries})) or "unknown"
