"""Distillation: a student learns from a teacher's distributions, computed on the same batches or read from a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from .arena import Arena
from .config import ModelConfig, TrainConfig
from .errors import ConfigError
from .model import Worker


class Distillation:
    """A teacher of one shard's size, and how much it counts; the teacher reads the same tokens."""

    def __init__(self, teacher: Worker, params: Arena, config: TrainConfig) -> None:
        self.teacher, self.params = teacher, params
        self.alpha, self.tau = config.distill_alpha, config.distill_tau


@dataclass(frozen=True)
class SoftTargets:
    """Of some rows: ids (rows, seq_len, k) and probs (rows, seq_len, k + 1), see :mod:`.ops.cpu.topk_kl`."""

    ids: NDArray[Any]
    probs: NDArray[Any]

    def __getitem__(self, rows: slice) -> SoftTargets:
        return SoftTargets(self.ids[rows], self.probs[rows])


@dataclass(frozen=True)
class CachedDistillation:
    """As Distillation, where a cache has the teacher's part."""

    targets: SoftTargets
    alpha: float
    tau: float
    teacher: None = None


AnyDistillation = Distillation | CachedDistillation


def check_teacher(teacher: ModelConfig, student: ModelConfig, seq_len: int) -> None:
    """Raise ConfigError unless the student can learn from the teacher."""
    if teacher.vocab_size != student.vocab_size:
        raise ConfigError(
            f"the teacher's vocabulary ({teacher.vocab_size}) is not the student's ({student.vocab_size}): "
            "train the student with the teacher's tokenizer"
        )
    if teacher.max_seq_len < seq_len:
        raise ConfigError("seq_len exceeds the teacher's max_seq_len")
