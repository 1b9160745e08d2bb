"""A run that has so many minutes: how many steps fit, measured before the first one and judged anew while it runs.

The schedule is a function of the number of steps: with fewer of them the decay begins earlier, or goes on faster, and ends
with the run, whatever slows the machine down. Where it becomes faster again before the decay has begun, steps come back, at
most as many as the first plan had; from then on they only become fewer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .config import TrainConfig

OVERHEAD = 1.03  # validation, samples and checkpoints take a few per cent
TRUSTED = 0.05  # of the budget: what the first steps take says little
MARGIN = 0.01  # of what is left: a plan that fits barely would be changed again by the next step
GAIN = 0.05  # of the steps that are left: fewer than these are not worth another plan


def change(before: int, steps: int) -> str:
    """Of a run's number of steps, for people."""
    speed, fitting = ("faster", "more") if steps > before else ("slower", "fewer")
    return f"the machine is {speed} than it was: {fitting} steps than {before:,} fit"


@dataclass(frozen=True)
class Budget:
    """seconds: of all steps of the run, the first of which is step ``first``; plain, quantized: seconds of a step without and
    with fake-quantization, as they were measured before it; before: seconds that a parent's steps took;
    planned: the run's steps by its first plan."""

    seconds: float
    plain: float
    quantized: float
    before: float = 0.0
    planned: int = 0
    first: int = 0

    @classmethod
    def of(cls, config: TrainConfig, first: int) -> Budget | None:
        """That of a run's configuration, which has one if ``stored`` put it there."""
        values = config.extra.get("budget")
        return None if values is None else cls(**values, first=first)

    def stored(self) -> dict[str, Any]:
        """For :attr:`TrainConfig.extra`."""
        names = ("seconds", "plain", "quantized", "before", "planned")
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
        """How many steps the run has in all, where it took ``elapsed`` seconds up to step ``step``: ``config.steps``, fewer, or,
        between warmup and decay, more."""
        if elapsed < TRUSTED * self.seconds or step <= self.first:
            return config.steps
        pace = elapsed / self._work(config, self.first, step)
        left = self.seconds - elapsed

        def fits(steps: int, seconds: float) -> bool:
            return pace * self._work(replace(config, steps=steps), step, steps) <= seconds

        def most(fewest: int, too_many: int) -> int:
            """The most that fit; fewest do, or nothing does."""
            while too_many - fewest > 1:
                middle = (fewest + too_many) // 2
                fewest, too_many = (middle, too_many) if fits(middle, (1 - MARGIN) * left) else (fewest, middle)
            return fewest

        if not fits(config.steps, left):
            return most(step, config.steps)
        first_plan = replace(config, steps=max(self.planned, config.steps))
        if not first_plan.warmup_steps <= step < config.decay_start:
            return config.steps
        more = most(config.steps, first_plan.steps + 1)
        return more if more - config.steps > GAIN * (config.steps - step) else config.steps
