"""What training raises on purpose. Messages name the file, the value and what would be accepted."""

from __future__ import annotations

import signal


class TrainingError(Exception):
    """Base of everything that the trainer raises on purpose."""

    on_all_ranks = False  # every rank of the run raises it at the same place


class ConfigError(TrainingError, ValueError):
    """Sizes, knobs or flags that contradict each other or cannot work."""


class DataError(TrainingError, ValueError):
    """Text or token shards that cannot be used: empty, not UTF-8, too short, damaged."""


class CheckpointError(TrainingError, ValueError):
    """A checkpoint that is damaged, of another architecture, or written by a newer version."""


class RunFolderError(TrainingError, FileExistsError):
    """The run folder is already used and nobody asked to resume it."""


class MissingLibraryError(TrainingError, ImportError):
    """A library is needed that is not installed; the message says which extra has it."""


class RankError(TrainingError, RuntimeError):
    """What another rank of the run has raised; the message names the rank."""

    on_all_ranks = True


class NotFiniteError(TrainingError, ArithmeticError):
    """A loss or gradient became infinite or NaN; the message has the step and the tensors."""


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGHUP came; the checkpoint is written."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number
