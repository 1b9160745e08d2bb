"""Which device a run trains on: the one place that chooses between back ends."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from .arena import Arena
from .backend.cpu import CpuBackend, cpu_bytes
from .comm import ALONE, Comm
from .config import ModelConfig, TrainConfig
from .errors import ConfigError, MissingLibraryError, TrainingError
from .lora import LoraConfig
from .ranks import check_ranks
from .trainer import Trainer, check_sizes

DEVICES = ("cpu", "cuda")
PRECISIONS = ("bf16", "float32")
COMMS = ("mpi", "nccl")


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

    @classmethod
    def of(cls, options: Any) -> Device:
        """What parsed options ask for."""
        return cls(options.device, options.precision or PRECISIONS[0])

    def require(self, local_rank: int = 0) -> None:
        """Raise MissingLibraryError or DeviceError, with the way out, unless the device can be used here.

        local_rank: among the ranks of this machine, who take its GPUs in turn.
        """
        if self.name == "cuda":
            _cuda()
            from .ops.cuda._runtime import open_runtime

            open_runtime(local_rank)

    def connect(self, comm: Comm, kind: str | None) -> Comm:
        """MPI's ranks as they exchange arrays of this device, which :meth:`require` has found on each; kind: of ``COMMS``."""
        if self.name == "cpu" or comm.size == 1:
            return comm
        from .backend import cuda_ranks

        return cuda_ranks.connect(comm, kind)

    def memory_bytes(
        self,
        model: ModelConfig,
        config: TrainConfig,
        threads: int,
        ranks: int = 1,
        shard_optimizer: bool = False,
        lora: LoraConfig | None = None,
    ) -> int | None:
        """What a run needs of this device's memory, a teacher apart; None where that cannot be told here."""
        if self.name == "cpu":
            return cpu_bytes(model, config, threads, ranks, shard_optimizer, lora)
        try:
            shared = {"ranks": ranks, "shard_optimizer": shard_optimizer}
            return int(_cuda().device_bytes(model, config, self.precision, **shared))
        except TrainingError:
            return None


CPU = Device()


def make_trainer(
    model: ModelConfig,
    config: TrainConfig,
    *,
    device: Device = CPU,
    threads: int | None = None,
    teacher: tuple[ModelConfig, Arena] | None = None,
    comm: Comm = ALONE,
    shard_optimizer: bool = False,
    lora: LoraConfig | None = None,
) -> Trainer:
    """A trainer on the device.

    Raises MissingLibraryError or DeviceError, with the way out, where there is no usable GPU.
    """
    check_sizes(model, config)
    if device.name == "cpu":
        more = {"comm": comm, "shard_optimizer": shard_optimizer, "lora": lora}
        return Trainer(model, config, CpuBackend(model, config, threads=threads, teacher=teacher, **more))
    if lora is not None:
        raise ConfigError("--device cuda trains whole models; adapters (--lora) are trained on CPUs")
    cuda = _cuda()
    check_ranks(comm.size, config)
    cuda.check_memory(model, config, device.precision, teacher, comm.size, shard_optimizer, comm.rank)
    more = {"threads": threads, "teacher": teacher, "comm": comm, "shard_optimizer": shard_optimizer}
    return Trainer(model, config, cuda.CudaBackend(model, config, precision=device.precision, **more))


def _cuda() -> Any:
    """The module of the back end, which needs numba-cuda."""
    if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"):
        raise ConfigError(
            "NUMBA_ENABLE_CUDASIM is set: that is numba's simulator, not a GPU; unset it, or --device cpu"
        )
    try:
        from .backend import cuda
    except ImportError as error:
        raise MissingLibraryError(
            f"--device cuda needs numba-cuda and cupy ({error}): pip install 'pyengine-lm[cuda]'"
        ) from error
    return cuda


@dataclass(frozen=True)
class Machine:
    """What a run computes with: about processes and devices, not about its result."""

    device: Device = CPU
    threads: int | None = None
    comm: Comm = ALONE
    shard_optimizer: bool = False

    @property
    def waits_for_host(self) -> bool:
        """Whether steps can run elsewhere while the host writes and samples. On a CPU it is the host that trains: copies of
        parameters and moments, 12 bytes a parameter, would buy nothing but the disk's time."""
        return self.device.name != "cpu"

    def trainer(
        self,
        model: ModelConfig,
        config: TrainConfig,
        teacher: tuple[ModelConfig, Arena] | None = None,
        lora: LoraConfig | None = None,
    ) -> Trainer:
        """A trainer on it; see :func:`make_trainer`."""
        more: dict[str, Any] = {"comm": self.comm, "shard_optimizer": self.shard_optimizer, "lora": lora}
        return make_trainer(model, config, device=self.device, threads=self.threads, teacher=teacher, **more)
