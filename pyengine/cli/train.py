"""`pyengine train`: a door to the trainer, which is a package of its own and needs numba."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from pyengine.cli import UsageError
from pyengine.cli.errors import MissingExtraError


def run(argv: list[str]) -> int:
    """Everything after `train` goes to the trainer as it is, but for the commands that have doors of their own."""
    if argv[:1] == ["runs"]:
        raise UsageError("runs are compared by a command of its own: pyengine runs FOLDER ('pyengine runs --help' tells more)")
    if argv[:1] == ["cost"]:
        raise UsageError("the cost sheet is a command of its own: pyengine cost RUN ('pyengine cost --help' tells more)")
    if find_spec("pyengine_training") is None or find_spec("numba") is None:
        raise MissingExtraError("training needs numba, which is not installed: pip install 'pyengine-lm[train]'")
    code: int = import_module("pyengine_training.__main__").main(argv)
    return code
