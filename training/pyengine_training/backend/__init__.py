"""Where a run's numbers live and are computed: the protocol that :class:`..trainer.Trainer` drives.

:class:`.cpu.CpuBackend` works on threads of this process, :class:`.cuda.CudaBackend` on one GPU; :mod:`..device` chooses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from ..arena import Arena
from ..comm import Comm
from ..data import ValidationBatch
from ..distill import SoftTargets
from ..lora import Adapters
from ..preference import PairBatch, Preference

Array = NDArray[Any]


@dataclass(frozen=True)
class StepInputs:
    """What one step is given beside its rows."""

    step: int  # from 0
    counted: int  # targets that share the mean of the loss
    quantize: bool = False  # simulate the engine's int8
    lr_factor: float = 1.0  # of the schedule
    preference: Preference | None = None  # of pairs, one a row; counted are pairs then
    soft: SoftTargets | None = None  # of a cached teacher
    starts: Array | None = None  # (rows, seq_len) int64: first position that each position sees; None: its row's


class Backend(Protocol):
    """Parameters, gradients, moments and the work on them. Arrays that cross this interface are the host's.

    tokens and targets are (rows, seq_len) int64, rows a multiple of ``shard_rows``; a negative target does not count.
    The same inputs give the same bits, whatever the number of threads and ranks. Every rank calls the same methods.
    """

    comm: Comm
    threads: int
    shard_rows: int  # rows of one shard
    adapters: Adapters | None  # where these are trained instead of the parameters

    @property
    def params(self) -> Arena:
        """The float32 masters, which the caller may read and write."""

    @property
    def grads(self) -> Arena:
        """The gradient of the last :meth:`gradients` or :meth:`step`: of the parameters, or of the adapters."""

    def gradients(self, tokens: Array, targets: Array, inputs: StepInputs) -> float:
        """Mean loss over the counted targets, in nats; its gradient into ``grads``."""

    def step(self, tokens: Array, targets: Array, inputs: StepInputs) -> tuple[float, float]:
        """Loss and gradient norm of one optimizer step; parameters and moments stay as they were unless both are finite.

        Raises NotFiniteError, likewise with everything as it was, where int8 cannot represent a value.
        """

    def weights(self, quantize: bool) -> Arena:
        """The parameters that products see: the masters, or the values that their int8 codes stand for."""

    def validation_sums(self, batches: Iterable[ValidationBatch] | Iterable[PairBatch], quantize: bool) -> Array:
        """(batches, 4) float64, see :func:`..validation.batch_sums`; in float32 arithmetic."""

    @property
    def moments_size(self) -> int:
        """Elements of each moment, in the layout of what is trained."""

    def save_moments(self, m: Array | None, v: Array | None) -> None:
        """Fill rank 0's flat arrays of moments_size elements with the optimizer's moments; other ranks pass None."""

    def load_moments(self, m: Array, v: Array) -> None:
        """Take the moments from two flat arrays."""

    def close(self) -> None:
        """Stop the threads."""
