"""Which device a run trains on: the one place that chooses between back ends."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from .arena import Arena
from .backend.cpu import CpuBackend
from .config import ModelConfig, TrainConfig
from .errors import ConfigError, TrainingError
from .trainer import Trainer, check_sizes

DEVICES = ("cpu", "cuda")
PRECISIONS = ("bf16", "float32")


@dataclass(frozen=True)
class Device:
    """What to train on. precision: of activations on "cuda"; "cpu" trains in float32."""

    name: str = "cpu"
    precision: str = "bf16"

    def __post_init__(self) -> None:
        if self.name not in DEVICES:
            raise ConfigError(f"device is {self.name!r}; choose from {DEVICES}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision is {self.precision!r}; choose from {PRECISIONS}")

    def require(self) -> None:
        """Raise MissingLibraryError or DeviceError, with the way out, unless the device can be used here."""
        if self.name == "cuda":
            _cuda_backend()
            from .ops.cuda._runtime import runtime

            runtime()


CPU = Device()


class MissingLibraryError(TrainingError, ImportError):
    """A library of the chosen device is not installed; the message says which extra has it."""


def make_trainer(
    model: ModelConfig,
    config: TrainConfig,
    *,
    device: Device = CPU,
    threads: int | None = None,
    teacher: tuple[ModelConfig, Arena] | None = None,
) -> Trainer:
    """A trainer on the device.

    Raises MissingLibraryError or DeviceError, with the way out, where there is no usable GPU.
    """
    check_sizes(model, config)
    if device.name == "cpu":
        return Trainer(model, config, CpuBackend(model, config, threads=threads, teacher=teacher))
    backend = _cuda_backend()
    return Trainer(model, config, backend(model, config, precision=device.precision, threads=threads, teacher=teacher))


def _cuda_backend() -> Any:
    """The class, whose modules need numba-cuda."""
    if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"):
        raise ConfigError(
            "NUMBA_ENABLE_CUDASIM is set: that is numba's simulator, not a GPU; unset it, or --device cpu"
        )
    try:
        from .backend.cuda import CudaBackend
    except ImportError as error:
        raise MissingLibraryError(
            f"--device cuda needs numba-cuda and cupy ({error}): pip install 'pyengine-lm[cuda]'"
        ) from error
    return CudaBackend
