"""A run that has so many minutes: how many steps fit, measured before the first one and judged anew while it runs.

A plan only ever shrinks. The schedule is a function of the number of steps: with fewer of them the decay begins earlier, or goes
on faster, and ends with the run, whatever slows the machine down.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .config import TrainConfig

OVERHEAD = 1.03  # validation, samples and checkpoints take a few per cent
TRUSTED = 0.05  # of the budget: what the first steps take says little
MARGIN = 0.01  # of what is left: a plan that fits barely would be changed again by the next step


@dataclass(frozen=True)
class Budget:
    """seconds: of all steps of the run, the first of which is step ``first``; plain, quantized: seconds of a step without and
    with fake-quantization, as they were measured before it; before: seconds that a parent's steps took."""

    seconds: float
    plain: float
    quantized: float
    before: float = 0.0
    first: int = 0

    @classmethod
    def of(cls, config: TrainConfig, first: int) -> Budget | None:
        """That of a run's configuration, which has one if ``stored`` put it there."""
        values = config.extra.get("budget")
        return None if values is None else cls(**values, first=first)

    def stored(self) -> dict[str, Any]:
        """For :attr:`TrainConfig.extra`."""
        names = ("seconds", "plain", "quantized", "before")
        return {"budget": {name: getattr(self, name) for name in names}}

    def _work(self, config: TrainConfig, begin: int, end: int) -> float:
        """What steps begin..end - 1 take on the machine as it was measured, in seconds."""
        first_quantized = config.steps - config.quantized_steps
        quantized = max(0, end - max(begin, first_quantized))
        return (end - begin - quantized) * self.plain + quantized * self.quantized

    def steps_at_first(self, config: TrainConfig) -> int:
        """How many fit, from the share of ``config`` that trains with fake-quantization; 0 if not even one does."""
        share = config.quantized_steps / config.steps
        mean = (1 - share) * self.plain + share * self.quantized
        return int(self.seconds / (mean * OVERHEAD))

    def steps(self, config: TrainConfig, step: int, elapsed: float) -> int:
        """How many steps the run has in all, ``config.steps`` or fewer, where it took ``elapsed`` seconds up to step ``step``."""
        if elapsed < TRUSTED * self.seconds or step <= self.first:
            return config.steps
        pace = elapsed / self._work(config, self.first, step)
        left = self.seconds - elapsed

        def fits(steps: int, seconds: float) -> bool:
            return pace * self._work(replace(config, steps=steps), step, steps) <= seconds

        if fits(config.steps, left):
            return config.steps
        fewest, most = step, config.steps  # fewest fits, or nothing does
        while most - fewest > 1:
            middle = (fewest + most) // 2
            fewest, most = (middle, most) if fits(middle, (1 - MARGIN) * left) else (fewest, middle)
        return fewest
