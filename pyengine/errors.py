"""One exception class per ``pe_status`` code, plus those that never leave Python.

Every class derives from :class:`PyEngineError` and, where a user would expect one, from a builtin: code that catches
``ValueError`` or ``MemoryError`` keeps working.
"""

from __future__ import annotations


class PyEngineError(Exception):
    """Base of everything that pyengine raises on purpose."""


class InvalidArgumentError(PyEngineError, ValueError):
    """An argument is out of range or contradicts another."""


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


class SystemCallError(PyEngineError, OSError):
    """The operating system refused something (threads, mapping)."""


class UnsupportedISAError(PyEngineError, ValueError):
    """PYENGINE_ISA names an instruction set that does not exist or that this CPU lacks."""


class TemplateError(PyEngineError, ValueError):
    """A chat template is missing, invalid, too large, too slow, or does something that the sandbox forbids."""


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
