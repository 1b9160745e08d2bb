"""pyengine: run Llama-family language models as frozen int8 tensors on a CPU, bit for bit the same everywhere.

    import pyengine
    engine = pyengine.Engine("model.safetensors")
    print(engine.generate("Once upon a time", max_tokens=64).text)

Importing the package loads nothing heavy; each name below is imported when it is first used.
"""

from __future__ import annotations

from pyengine.errors import (
    CancelledError,
    ContextFullError,
    HubError,
    InvalidArgumentError,
    ModelFormatError,
    NotFiniteError,
    OutOfMemoryError,
    PyEngineError,
    SystemCallError,
    TemplateError,
    UnknownParameterError,
    UnsupportedISAError,
    UnsupportedModelError,
)

__version__ = "0.1.0"

_LAZY = {
    "AsyncEngine": "pyengine.async_engine",
    "BeamHypothesis": "pyengine.results",
    "Engine": "pyengine.engine",
    "Generation": "pyengine.results",
    "LoadedAdapter": "pyengine.adapters",
    "Piece": "pyengine.results",
    "RankedDocument": "pyengine.results",
    "Score": "pyengine.results",
    "SamplingParams": "pyengine.sampling",
    "StructuredOutputs": "pyengine.sampling",
    "freeze": "pyengine.freeze",
}

TYPE_CHECKING = False  # what type checkers take for true; to import `typing` takes longer than all else here
if TYPE_CHECKING:
    from typing import Any

    from pyengine.adapters import LoadedAdapter as LoadedAdapter
    from pyengine.async_engine import AsyncEngine as AsyncEngine
    from pyengine.engine import Engine as Engine
    from pyengine.freeze import freeze as freeze
    from pyengine.results import BeamHypothesis as BeamHypothesis
    from pyengine.results import Generation as Generation
    from pyengine.results import Piece as Piece
    from pyengine.results import RankedDocument as RankedDocument
    from pyengine.results import Score as Score
    from pyengine.sampling import SamplingParams as SamplingParams
    from pyengine.sampling import StructuredOutputs as StructuredOutputs

__all__ = [
    "AsyncEngine",
    "BeamHypothesis",
    "CancelledError",
    "ContextFullError",
    "Engine",
    "Generation",
    "HubError",
    "InvalidArgumentError",
    "LoadedAdapter",
    "ModelFormatError",
    "NotFiniteError",
    "OutOfMemoryError",
    "Piece",
    "PyEngineError",
    "RankedDocument",
    "SamplingParams",
    "Score",
    "StructuredOutputs",
    "SystemCallError",
    "TemplateError",
    "UnknownParameterError",
    "UnsupportedISAError",
    "UnsupportedModelError",
    "freeze",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        try:
            return getattr(import_module(_LAZY[name]), name)
        except ModuleNotFoundError as error:
            from pyengine.errors import import_error

            raise import_error(error) from error
    raise AttributeError(f"module 'pyengine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
