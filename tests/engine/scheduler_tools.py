"""What tests of the scheduler have in common: prompts, and a context that notes what every forward was given."""

from __future__ import annotations

import random
from typing import Any

from pyengine import Engine

SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 11, "ignore_eos": True}


def text(seed: int, n: int) -> list[int]:
    return [3 + random.Random(seed * 1000 + i).randrange(50) for i in range(n)]


class Recorder:
    """A context that notes what every forward was given: (tokens, of how many sequences)."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.steps: list[tuple[int, int]] = []

    def forward(self, tokens: list[int], sequences: list[Any], wants: bytes, **options: Any) -> bytes:
        self.steps.append((len(tokens), len({id(sequence) for sequence in sequences})))
        failed: bytes = self._context.forward(tokens, sequences, wants, **options)
        return failed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def record(engine: Engine) -> Recorder:
    recorder = Recorder(engine._scheduler.context)
    engine._scheduler.context = recorder  # type: ignore[assignment]
    return recorder
