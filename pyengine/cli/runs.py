"""`pyengine runs`: training runs beside one another. The trainer knows its run folders, and reading them needs no numba."""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from pyengine.errors import PyEngineError


def _trainer(module: str) -> Any:
    if find_spec("pyengine_training") is None:
        raise PyEngineError(
            "runs are read by the training half, which this installation lacks: pip install 'pyengine-lm[train]'"
        )
    return import_module(f"pyengine_training.{module}")


def parser() -> argparse.ArgumentParser:
    """The trainer's."""
    made: argparse.ArgumentParser = _trainer("runs").parser()
    return made


def run(argv: list[str]) -> int:
    """Everything goes to the trainer as it is."""
    code: int = _trainer("__main__").main(["runs", *argv])
    return code
