"""argparse with errors of one line, like all others of the command line, and types that know their range."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Wrong usage ends the process with 2 and one line on stderr."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pyengine: error: {message} ('{self.prog} --help' tells more)\n")


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option: an integer, no smaller than ``least``."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; it must be at least {least}")
        return value

    return whole_number


def number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """The type of an option: a finite number from ``low`` (above: not itself) to ``high``."""

    def real_number(text: str) -> float:
        value = float(text)
        if not low <= value <= high or math.isinf(value) or (above and value == low):
            wanted = f"{'above' if above else 'from'} {low:g}" + ("" if high == math.inf else f", at most {high:g}")
            raise argparse.ArgumentTypeError(f"{text} is out of range: expected a number {wanted}")
        return value

    return real_number
