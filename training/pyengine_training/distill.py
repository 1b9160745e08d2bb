"""Distillation: a student learns from a teacher's distributions, computed on the same batches."""

from __future__ import annotations

from .arena import Arena
from .config import ModelConfig, TrainConfig
from .errors import ConfigError
from .model import Worker


class Distillation:
    """A teacher of one shard's size, and how much it counts; the teacher reads the same tokens."""

    def __init__(self, teacher: Worker, params: Arena, config: TrainConfig) -> None:
        self.teacher, self.params = teacher, params
        self.alpha, self.tau = config.distill_alpha, config.distill_tau


def check_teacher(teacher: ModelConfig, student: ModelConfig, seq_len: int) -> None:
    """Raise ConfigError unless the student can learn from the teacher."""
    if teacher.vocab_size != student.vocab_size:
        raise ConfigError(
            f"the teacher's vocabulary ({teacher.vocab_size}) is not the student's ({student.vocab_size}): "
            "train the student with the teacher's tokenizer"
        )
    if teacher.max_seq_len < seq_len:
        raise ConfigError("seq_len exceeds the teacher's max_seq_len")
