"""From an exception to one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys

from pyengine.cli import EXIT_ERROR, EXIT_USAGE, UsageError, abandon_stdout
from pyengine.cli.terminal import visible, warn
from pyengine.errors import PyEngineError, import_error


class MissingExtraError(PyEngineError, ImportError):
    """An optional part of the installation is needed and not there."""


def sentence(error: BaseException) -> str:
    """What to tell the user, on one line."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    elif isinstance(error, (PyEngineError, OSError, UsageError)):
        text = str(error)
    elif isinstance(error, MemoryError):
        text = "out of memory"
    else:
        text = f"internal error, please report it: {type(error).__name__}: {error} (PYENGINE_TRACEBACK=1 shows where)"
    return " ".join(text.split()) or type(error).__name__


def report(error: Exception) -> int:
    """Print the one line (or the traceback, if PYENGINE_TRACEBACK asks for it) and return the exit code."""
    if isinstance(error, ModuleNotFoundError):
        error = import_error(error)
    if os.environ.get("PYENGINE_TRACEBACK", "") not in ("", "0"):
        import traceback

        sys.stderr.write(visible("".join(traceback.format_exception(error)), keep="\n"))
    try:
        sys.stdout.flush()  # what was said before the error comes before it
    except OSError:  # perhaps this was the error: a disk that is full
        abandon_stdout()
    warn(f"pyengine: error: {sentence(error)}")
    return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR
