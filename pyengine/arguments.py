"""Arguments of the public functions: one way to check a number or a flag, and to show a value in an error message."""

from __future__ import annotations

import math
from numbers import Integral, Real

from pyengine.errors import InvalidArgumentError

MAX_SHOWN = 80
INT32_MAX = 2**31 - 1  # what the core counts tokens with


def shown(value: object) -> str:
    """`repr`, cut to what fits a message. Never raises: an integer of 5,000 digits has no repr in CPython."""
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def integer(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int in low..high; NumPy's integers are integers, bool is none. Raises InvalidArgumentError naming `name`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidArgumentError(f"{name} must be an integer, not {shown(value)}")
    number = int(value)
    if not low <= number <= high:
        raise InvalidArgumentError(f"{name} must be in [{low}, {high}], not {shown(value)}")
    return number


def number(name: str, value: object) -> float:
    """`value` as a float that is no NaN; any real number but bool. Raises InvalidArgumentError naming `name`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidArgumentError(f"{name} must be a number, not {shown(value)}")
    try:
        result = float(value)
    except (OverflowError, ValueError):  # an integer or a fraction beyond what a float holds
        raise InvalidArgumentError(f"{name} is out of range: {shown(value)}") from None
    if math.isnan(result):
        raise InvalidArgumentError(f"{name} must not be NaN")
    return result


def boolean(name: str, value: object) -> bool:
    """`value` if it is a bool. Raises InvalidArgumentError naming `name`."""
    if not isinstance(value, bool):
        raise InvalidArgumentError(f"{name} is True or False, not {shown(value)}")
    return value
