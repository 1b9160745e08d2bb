"""Which of its BLAS's kernels NumPy's products run on: results depend on them, and the speed does."""

from __future__ import annotations

import functools
import os


@functools.cache  # what others load later is not NumPy's
def kernels_in_use() -> str:
    """Libraries and kernels, as far as threadpoolctl tells. OpenBLAS chooses by the processor, or as OPENBLAS_CORETYPE says."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return os.environ.get("OPENBLAS_CORETYPE", "unknown")
    libraries = (library for library in threadpool_info() if library["user_api"] == "blas")
    names = ("internal_api", "version", "architecture")
    return ", ".join(sorted({" ".join(str(library.get(name)) for name in names) for library in libraries})) or "unknown"
