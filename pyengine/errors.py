"""One exception class per ``pe_status`` code, plus those that never leave Python.

Every class derives from :class:`PyEngineError` and, where a user would expect one, from a builtin: code that catches
``ValueError`` or ``MemoryError`` keeps working.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


class PyEngineError(Exception):
    """Base of everything that pyengine raises on purpose."""


class InvalidArgumentError(PyEngineError, ValueError):
    """An argument is out of range or contradicts another."""


class UnknownParameterError(InvalidArgumentError, TypeError):
    """A keyword that no function of ours takes; the message has the nearest one."""


class OutOfMemoryError(PyEngineError, MemoryError):
    """An allocation failed."""


class ModelFormatError(PyEngineError, ValueError):
    """A model file is damaged, truncated, hostile or not of a kind that we read."""


class UnsupportedModelError(PyEngineError, ValueError):
    """A well-formed model of an architecture, tensor, activation, RoPE or tokenizer type that is not implemented."""


class ContextFullError(PyEngineError, ValueError):
    """The tokens do not fit the context; the message has the numbers."""


class NotFiniteError(PyEngineError, ArithmeticError):
    """An infinity or NaN appeared in the computation: the weights are damaged or out of range."""


class CancelledError(PyEngineError):
    """The call was ended from outside (deadline or interrupt) before it finished."""


class BusyError(PyEngineError):
    """Others of the same kind are at work, and no more are begun meanwhile: the same call may succeed later."""


class SystemCallError(PyEngineError, OSError):
    """The operating system refused something (threads, mapping, files)."""


class MissingFileError(SystemCallError, FileNotFoundError):
    """There is no file of this name."""


class ExistingFileError(SystemCallError, FileExistsError):
    """There is a file of this name already."""


class ForbiddenFileError(SystemCallError, PermissionError):
    """The file may not be read or written."""


class HubError(PyEngineError, OSError):
    """A model could not be fetched: what the hub refuses or does not have, a connection, a full disk."""


class UnsupportedISAError(PyEngineError, ValueError):
    """PYENGINE_ISA names an instruction set that does not exist or that this CPU lacks."""


class TemplateError(PyEngineError, ValueError):
    """A chat template is missing, invalid, too large, too slow, or does something that the sandbox forbids."""


class NotBuiltError(PyEngineError, ImportError):
    """The compiled modules are not there: Python has found a checkout, and not the package that is installed."""


# The order is that of enum pe_status in csrc/pyengine.h; a test walks it.
STATUS_ERRORS: dict[int, type[PyEngineError]] = {
    1: InvalidArgumentError,
    2: OutOfMemoryError,
    3: ModelFormatError,
    4: ContextFullError,
    5: NotFiniteError,
    6: CancelledError,
    7: SystemCallError,
    8: UnsupportedISAError,
}

_SYSTEM_ERRORS: dict[type[OSError], type[SystemCallError]] = {
    FileNotFoundError: MissingFileError,
    FileExistsError: ExistingFileError,
    PermissionError: ForbiddenFileError,
}


@contextmanager
def system_errors() -> Iterator[None]:
    """What the system refuses inside this block leaves as the PyEngineError that stands for it, errno and file name kept."""
    try:
        yield
    except PyEngineError:
        raise
    except MemoryError as error:
        raise OutOfMemoryError(*error.args) from error
    except OSError as error:
        kind = next((ours for builtin, ours in _SYSTEM_ERRORS.items() if isinstance(error, builtin)), SystemCallError)
        raise kind(error.errno, error.strerror or str(error), error.filename) from error


def import_error(error: ModuleNotFoundError) -> ImportError:
    """What to raise for a module that is missing: where it is a compiled one of ours, a NotBuiltError that says why."""
    if not (error.name or "").startswith("pyengine._"):
        return error
    return NotBuiltError(
        f"{os.path.dirname(__file__)} is not built ({error.name} is missing): Python has found a checkout instead of the package "
        "that is installed, because it was started there; start it in another directory"
    )
