"""``python rank_processes.py [SECTION]``: ranks that are processes, whose GPUs are simulated; a JSON line a run.

Without an argument every run of RUNS is compared with the first on its device; with one, gpu_check's section of several ranks
is run on tiny sizes. PYENGINE_NCCL names the library.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent)]

from pyengine_training.backend import cuda as backend_module
from pyengine_training.config import ModelConfig, TrainConfig
from pyengine_training.gpu_check import sections
from pyengine_training.gpu_check.ranks import Run, compare
from pyengine_training.ops.cuda._runtime import use_runtime
from simulated_runtime import SimulatedRuntime

RUNS = [
    Run(1),
    Run(2, "nccl"),
    Run(4, "nccl"),
    Run(2, "nccl", shard_optimizer=True),
    Run(4, "nccl", shard_optimizer=True),
    Run(2, "host", shard_optimizer=True),
    Run(1, device="cpu"),
    Run(4, "nccl", device="cpu", shard_optimizer=True),
]
MODEL = ModelConfig(vocab_size=11, dim=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, hidden_dim=12, max_seq_len=4)
CONFIG = TrainConfig(
    seq_len=4,
    batch_size=4,
    shards=4,
    steps=2,
    warmup_fraction=0.0,
    decay_fraction=0.5,
    quantize_fraction=0.0,
    lr=0.01,
    clip=0.5,
)


def batch(step: int) -> tuple[Any, Any]:
    tokens, targets = sections.chain(CONFIG.batch_size, CONFIG.seq_len, step, MODEL.vocab_size)
    counted = targets.copy()
    counted[step % CONFIG.batch_size, :2] = -1
    return tokens, counted


class Simulated(SimulatedRuntime):
    """One of two GPUs of this machine, a new one in every process."""

    def __init__(self) -> None:
        super().__init__()
        calls = SimpleNamespace(getDeviceCount=lambda: 2)
        self.cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=calls))


def main() -> bool:
    backend_module.MESSAGE = 300  # elements: every rank owns several pieces
    with use_runtime(Simulated()):
        if sys.argv[1:] == ["section"]:
            sizes = {"SMALL": MODEL, "SEQ": 4, "ROWS": 2, "RANKS": 2, "STEPS": 2}
            vars(sections).update(sizes)
            return sections.ranks()
        return compare(RUNS, MODEL, CONFIG, batch, sections.say)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
