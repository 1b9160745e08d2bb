"""Which device a run trains on: the one place that chooses between back ends."""

from __future__ import annotations

import os
from typing import Any

from .arena import Arena
from .config import ModelConfig, TrainConfig
from .errors import ConfigError, TrainingError
from .trainer import Trainer

DEVICES = ("cpu", "cuda")


class MissingLibraryError(TrainingError, ImportError):
    """A library of the chosen device is not installed; the message says which extra has it."""


def make_trainer(
    model: ModelConfig,
    config: TrainConfig,
    *,
    device: str = "cpu",
    precision: str = "bf16",
    threads: int | None = None,
    teacher: tuple[ModelConfig, Arena] | None = None,
) -> Trainer:
    """A trainer on "cpu" (float32) or "cuda" (activations in ``precision``: "bf16" or "float32").

    Raises MissingLibraryError or DeviceError, with the way out, where there is no usable GPU.
    """
    if device not in DEVICES:
        raise ConfigError(f"device is {device!r}; choose from {DEVICES}")
    if device == "cpu":
        return Trainer(model, config, threads=threads, teacher=teacher)
    trainer: Any = _cuda_trainer()
    made: Trainer = trainer(model, config, precision=precision, threads=threads, teacher=teacher)
    return made


def _cuda_trainer() -> Any:
    """The class, whose modules need numba-cuda."""
    if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"):
        raise ConfigError(
            "NUMBA_ENABLE_CUDASIM is set: that is numba's simulator, not a GPU; unset it, or --device cpu"
        )
    try:
        from .cuda_trainer import CudaTrainer
    except ImportError as error:
        raise MissingLibraryError(
            f"--device cuda needs numba-cuda and cupy ({error}): pip install 'pyengine-lm[cuda]'"
        ) from error
    return CudaTrainer
