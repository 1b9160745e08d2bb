"""One optimizer step over the arenas: Muon for the blocks' matrices, AdamW for embeddings, output
layer and norms.

Muon's momentum lives in the same arena as AdamW's first moment. Work is handed out by tensor (Muon)
and by slice (AdamW): each element's arithmetic is its own, so the bits do not depend on the number
of threads.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arena import Arena, block_matrices
from .config import ModelConfig, TrainConfig
from .ops import cpu as ops
from .ops.cpu.grad_norm import BLOCK
from .ops.needs import allocate, largest
from .threads import run_all

Array = NDArray[Any]
SLICE = 1 << 18


def schedule(config: TrainConfig, step: int) -> float:
    """Factor on the learning rates at step (from 0): linear warmup, constant, then decay to (almost) zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if step < config.decay_start:
        return 1.0
    progress = (step - config.decay_start + 0.5) / max(1, config.decay_steps)
    if config.decay_shape == "cosine":
        return float(0.5 * (1 + np.cos(np.pi * progress)))
    return 1 - progress


class Optimizer:
    """Moments, and the update of ``params`` from ``grads``."""

    def __init__(self, model: ModelConfig, config: TrainConfig, params: Arena, pool: ThreadPoolExecutor) -> None:
        self.model, self.config, self.params, self.pool = model, config, params, pool
        self.m, self.v = params.like(), params.like()
        self._partial = np.zeros(-(-params.flat.size // BLOCK), np.float64)
        self._scratch: queue.LifoQueue[dict[str, Array]] = queue.LifoQueue()  # one for each thread of the pool
        needs = [
            ops.muon_scratch(last - first, shape[1], np.float32)
            for name, shape in params.shapes.items()
            for first, last in (block_matrices(name, model) if config.optimizer == "muon" else [])
        ]
        for _ in range(pool._max_workers if needs else 0):
            self._scratch.put(allocate(largest(*needs), ops.empty))

    def grad_norm(self, grads: Arena) -> float:
        """Global norm, float64 over fixed blocks."""
        n, partial = grads.flat.size, self._partial
        half = len(partial) // 2

        def part(first: int, last: int) -> Callable[[], object]:
            g = grads.flat[first * BLOCK : min(n, last * BLOCK)]
            return lambda: ops.sum_of_squares(partial[first:last], g, BLOCK)

        run_all(self.pool, [part(0, half), part(half, len(partial))] if half else [part(0, 1)])
        return float(np.sqrt(partial.sum()))

    def step(self, grads: Arena, step: int, factor: float, norm: float) -> None:
        """Update params in place at step (from 0), grads having this norm; factor: the schedule's."""
        scale = ops.clip_coefficient(norm, self.config.clip)
        run_all(self.pool, self._tasks(grads, step, factor, scale))

    def _tasks(self, grads: Arena, step: int, factor: float, scale: float) -> Sequence[Callable[[], object]]:
        tasks: list[Callable[[], object]] = []
        for name in self.params.shapes:
            ranges = block_matrices(name, self.model) if self.config.optimizer == "muon" else []
            for first, last in ranges:
                tasks.append(self._muon(name, slice(first, last), grads, factor, scale))
            if not ranges:
                tasks.extend(self._adamw(name, grads, step, factor, scale))
        return tasks

    def _muon(self, name: str, rows: slice, grads: Arena, factor: float, scale: float) -> Callable[[], object]:
        c = self.config
        arrays = [a[name][rows] for a in (self.params, grads, self.m)]
        options = {"momentum": c.muon_momentum, "weight_decay": c.weight_decay, "grad_scale": scale}

        def update() -> None:
            scratch = self._scratch.get()
            try:
                ops.muon_update(*arrays, lr=c.muon_lr * factor, scratch=scratch, **options)
            finally:
                self._scratch.put(scratch)

        return update

    def _adamw(self, name: str, grads: Arena, step: int, factor: float, scale: float) -> list[Callable[[], object]]:
        c = self.config
        decay = c.weight_decay if self.params[name].ndim > 1 else 0.0
        flat = [a[name].reshape(-1) for a in (self.params, grads, self.m, self.v)]

        def part(start: int) -> Callable[[], object]:
            p, g, m, v = (a[start : start + SLICE] for a in flat)
            return lambda: ops.adamw_update(
                p,
                g,
                m,
                v,
                step=step + 1,
                lr=c.lr * factor,
                beta1=c.beta1,
                beta2=c.beta2,
                eps=c.eps,
                weight_decay=decay,
                grad_scale=scale,
            )

        return [part(start) for start in range(0, flat[0].size, SLICE)]
