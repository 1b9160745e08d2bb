"""The state of a training run and one step of it, on any back end; the loop around it is in :mod:`.train`."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checkpoint as checkpoints
from .arena import Arena, initialize
from .backend import Backend, StepInputs
from .checkpoint import TrainingState
from .comm import same_everywhere
from .config import ModelConfig, TrainConfig
from .data import ValidationBatch
from .distill import SoftTargets
from .errors import ConfigError, NotFiniteError
from .optimizer import schedule
from .preference import Preference
from .threads import Beside
from .validation import Validation, summarize

Array = NDArray[Any]


@dataclass(frozen=True)
class StepResult:
    """What one step reports. loss: nats per token."""

    loss: float
    grad_norm: float
    lr_factor: float
    quantized: bool


def check_sizes(model: ModelConfig, config: TrainConfig) -> None:
    """Raise ConfigError where a run cannot train the model."""
    if config.seq_len > model.max_seq_len:
        raise ConfigError(f"seq_len ({config.seq_len}) exceeds the model's max_seq_len ({model.max_seq_len})")


class Trainer:
    """Counters and schedule of a run over a back end that has the numbers; :func:`.device.make_trainer` makes both."""

    def __init__(self, model: ModelConfig, config: TrainConfig, backend: Backend) -> None:
        self.model, self.config, self.backend = model, config, backend
        self.state = TrainingState()

    @property
    def params(self) -> Arena:
        """The float32 masters, on the host."""
        return self.backend.params

    @property
    def grads(self) -> Arena:
        """The last gradient, on the host."""
        return self.backend.grads

    def close(self) -> None:
        """Stop the back end's threads."""
        self.backend.close()

    def initialize(self) -> None:
        """Fresh parameters from the seed: the same on every back end."""
        initialize(self.params, self.model, self.config.seed)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def gradients(self, tokens: Array, targets: Array, starts: Array | None = None, *, quantize: bool = False) -> float:
        """Mean loss over the counted targets; its gradient into ``grads``.

        tokens, targets (n * rows of a shard, seq_len) int64; a negative target does not count.
        """
        inputs = StepInputs(self.state.step, max(1, _counted(targets)), quantize, starts=starts)
        return self.backend.gradients(tokens, targets, inputs)

    def step(
        self, tokens: Array, targets: Array, starts: Array | None = None, more: Preference | SoftTargets | None = None
    ) -> StepResult:
        """One optimizer step on one batch. Raises NotFiniteError, with parameters untouched, for a bad loss.

        starts, like tokens: the first position that each position sees, where documents are kept from each other.
        more: where a row is a pair of answers, or has a cached teacher's soft targets.
        """
        step = self.state.step
        quantize, factor, counted = self.config.quantized(step), schedule(self.config, step), _counted(targets)
        try:
            preference = more if isinstance(more, Preference) else None
            soft = more if isinstance(more, SoftTargets) else None
            share = max(1, counted) if preference is None else len(tokens)
            inputs = StepInputs(step, share, quantize, factor, preference, soft, starts)
            loss, norm = self.backend.step(tokens, targets, inputs)
        except NotFiniteError as error:
            named = NotFiniteError(f"step {step}: {error}")
            named.on_all_ranks = error.on_all_ranks
            raise named from error
        if not (math.isfinite(loss) and math.isfinite(norm)):
            grads = self.grads
            bad = [name for name in grads.shapes if not np.isfinite(grads[name]).all()]
            error = NotFiniteError(
                f"step {step}: loss {loss}, gradient norm {norm}; not finite in the gradients of "
                f"{', '.join(bad[:4]) or 'no tensor'}. Lower the learning rate or warm up longer."
            )
            error.on_all_ranks = True  # they all have the same numbers
            raise error
        before = self.state
        self.state = replace(
            before, step=step + 1, tokens=before.tokens + counted, position=before.position + tokens.size
        )
        return StepResult(loss, norm, factor, quantize)

    def validate(self, batches: Iterable[ValidationBatch], n_bytes: int, quantize: bool = False) -> Validation:
        """Loss and bits per byte over whole documents of n_bytes bytes."""
        return summarize(self.backend.validation_sums(batches, quantize), n_bytes)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def save(
        self,
        folder: Path,
        data_fingerprint: str,
        write_model: Callable[[Path], None],
        *,
        then: Callable[[], None] = lambda: None,
        beside: Beside | None = None,
    ) -> None:
        """Write a checkpoint of everything, and call ``then``: rank 0 does, with the others' help; all leave when it is there.

        beside: writes it, and calls ``then``, from a copy of the moments while steps go on, which write_model must not depend on;
        what goes wrong there it raises later. Raises RankError where a rank's parameters are no longer rank 0's.
        """
        comm = self.backend.comm
        same_everywhere(comm, {"parameters' checksum": zlib.crc32(self.params.flat) if comm.size > 1 else 0})
        if comm.rank > 0:
            self.backend.save_moments(None, None)
        else:
            size, fill = self.backend.moments_size, self.backend.save_moments
            if beside is not None:
                # zeros, as a new file: gaps between pieces stay 0
                copies = np.zeros(size, np.float32), np.zeros(size, np.float32)
                fill(*copies)
                fill = partial(_fill, copies)
            state = replace(self.state)  # the loop writes into its own

            def write() -> None:
                args = self.model, self.config, size, fill, state, data_fingerprint, write_model
                checkpoints.save_checkpoint(folder, *args)
                then()

            write() if beside is None else beside.start(write)
        comm.gather(None)

    def restore(self, folder: Path) -> dict[str, Any]:
        """Parameters, moments and counters of a checkpoint; returns its state.json."""
        values = checkpoints.read_state(folder, checkpoints.STATE)
        adapters = self.backend.adapters
        checkpoints.load_parameters(Path(adapters.config.base) if adapters else folder, self.params, self.model)
        if adapters:
            adapters.begin(self.config.seed)
            adapters.load_state(folder)
        self.backend.load_moments(*checkpoints.load_moments(folder, self.backend.moments_size))
        self.state = TrainingState(
            int(values["step"]),
            int(values["tokens"]),
            float(values["seconds"]),
            values.get("best_validation"),
            values.get("joules"),
            checkpoints.reader_position(values),
        )
        return values


def _fill(copies: tuple[Array, Array], m: Array, v: Array) -> None:
    m[...], v[...] = copies


def _counted(targets: Array) -> int:
    return int((targets >= 0).sum())
