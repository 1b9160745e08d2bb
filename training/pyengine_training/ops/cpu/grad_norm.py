"""Global gradient norm and clipping.

norm = sqrt(sum of squares over every gradient);  coefficient = min(1, max_norm / (norm + 1e-6))
Sums run in float64 over fixed blocks of the flat arena, so the result does not depend on who computed which block.
"""

from __future__ import annotations

from typing import Any

from ._jit import Array, f4, kernel

BLOCK = 1 << 16


@kernel
def sum_of_squares(partial: Array, g: Array, block: int) -> None:
    """partial[b] = sum of g^2 over block b of the flat array g; partial (ceil(len(g) / block),) float64."""
    for b in range(partial.size):
        total = 0.0
        end = min(g.size, (b + 1) * block)
        start = b * block
        while start < end:  # short float32 sums, added up in float64: precise and still vectorized
            stop = min(end, start + 1024)
            short: Any = f4(0)
            for i in range(start, stop):
                short += g[i] * g[i]
            total += short
            start = stop
        partial[b] = total


def clip_coefficient(norm: float, max_norm: float) -> float:
    """The factor that brings a gradient of this norm down to max_norm; 1 when it is smaller or max_norm is 0."""
    if max_norm <= 0:
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))
