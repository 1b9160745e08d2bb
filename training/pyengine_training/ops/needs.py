"""How operations declare the memory that they need from their caller."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Need:
    """One array."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


Needs = dict[str, Need]


def allocate(needs: Mapping[str, Need], empty: Callable[[tuple[int, ...], Any], Any]) -> dict[str, Any]:
    """The arrays, by name."""
    return {name: empty(need.shape, need.dtype) for name, need in needs.items()}


def largest(*several: Needs) -> Needs:
    """Flat needs that serve each of several callers in turn, one at a time."""
    result: Needs = {}
    for needs in several:
        for name, need in needs.items():
            size = max(math.prod(need.shape), math.prod(result[name].shape) if name in result else 0)
            result[name] = Need((size,), need.dtype)
    return result
