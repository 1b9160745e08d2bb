"""Lists of functions that are functions: llama-cpp-python's, and so what its users hand over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

from pyengine.sampling import LogitsProcessor as LogitsProcessor
from pyengine.sampling import StoppingCriteria as StoppingCriteria

_F = TypeVar("_F")
Callables: TypeAlias = _F | Sequence[_F] | None


class LogitsProcessorList(list[LogitsProcessor]):
    """Each is given what the one before it returned, or changed in place."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        for processor in self:
            returned = processor(input_ids, scores)
            scores = scores if returned is None else returned
        return scores


class StoppingCriteriaList(list[StoppingCriteria]):
    """Met when one of them is."""

    def __call__(self, input_ids: Any, logits: Any) -> bool:
        return any(criterion(input_ids, logits) for criterion in self)
