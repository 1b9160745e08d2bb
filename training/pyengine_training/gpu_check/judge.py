"""Judging a case: the back end under test beside the CPU's float32, against the CPU's float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ops import cpu
from .cases import Array, Case


def to_bf16(x: Array) -> Array:
    """bfloat16 bits as uint16, half to even, of finite float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    """float32 of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def poisoned_bf16(x: Array) -> Array:
    """to_bf16 that keeps NaN."""
    return np.where(np.isnan(x), np.uint16(0x7FC0), to_bf16(x))


@dataclass(frozen=True)
class Outcome:
    """Errors relative to the oracle's norm, the worst output of a case; exact: bits equal to the CPU's float32."""

    name: str
    error: float
    cpu_error: float
    exact: bool
    ok: bool


def is_narrow(case: Case, name: str) -> bool:
    """Whether an array becomes bfloat16 in the case's bfloat16 form."""
    return case.arrays[name].dtype == np.float32 and name not in case.wide


def check(
    case: Case,
    ops: Any,
    *,
    bf16: bool = False,
    upload: Callable[[Array], Any] = np.copy,
    download: Callable[[Any], Array] = np.asarray,
) -> Outcome:
    """Run a case on ``ops`` and judge it."""
    rounded = {
        name: from_bf16(poisoned_bf16(x)) if bf16 and is_narrow(case, name) else x for name, x in case.arrays.items()
    }
    single = {name: x.copy() for name, x in rounded.items()}
    case.run(cpu, single)
    double = {name: x.astype(np.float64) if x.dtype == np.float32 else x.copy() for name, x in rounded.items()}
    oracle = single if case.exact else double
    if not case.exact:
        case.run(cpu, double)
    device = {}
    for name, x in rounded.items():
        narrow = bf16 and is_narrow(case, name)
        device[name] = upload(poisoned_bf16(x) if narrow else x)
    case.run(ops, device)
    worst, worst_cpu, exact = 0.0, 0.0, True
    for name in case.outputs:
        got = download(device[name])
        got = from_bf16(got) if bf16 and is_narrow(case, name) else got
        exact = exact and bool(np.array_equal(got, single[name]))
        wanted = oracle[name].astype(np.float64)
        norm = float(np.linalg.norm(wanted.ravel())) or 1.0
        error = float(np.linalg.norm((got - wanted).ravel())) / norm
        worst = max(worst, error if np.isfinite(error) else np.inf)
        worst_cpu = max(worst_cpu, float(np.linalg.norm((single[name] - wanted).ravel())) / norm)
    bound = BF16_TOLERANCE if bf16 else max(case.tolerance, 4 * worst_cpu)
    ok = exact if case.exact and not bf16 else worst <= bound
    return Outcome(case.name, worst, worst_cpu, exact, ok)


BF16_TOLERANCE = 2.0**-7  # half a unit in the last place is 2^-9; intermediate results are rounded too
