"""Ranks that are processes of this machine, whose GPUs are simulated; small objects go through pipes.

    python rank_processes.py LIBRARY FOLDER

trains a tiny model on ranks that exchange arrays through LIBRARY, an NCCL, or through the host, and prints what each rank of
each of RUNS found: a JSON object, run -> ranks.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent)]

import numpy as np
from pyengine_training.backend import cuda as backend_module
from pyengine_training.backend.cuda_ranks import NcclComm, StagedComm
from pyengine_training.checkpoint import hf_config, hf_tensors
from pyengine_training.config import ModelConfig, TrainConfig
from pyengine_training.data import ValidationBatch
from pyengine_training.device import Device, make_trainer
from pyengine_training.files import save_safetensors, write_json
from pyengine_training.ops.cuda._nccl import Nccl
from pyengine_training.ops.cuda._runtime import use_runtime
from pyengine_training.trainer import Trainer
from simulated_runtime import SimulatedRuntime

# run -> ranks, device, how arrays travel, whether the optimizer is sharded
RUNS: dict[str, tuple[int, str, str, bool]] = {
    "gpu 1": (1, "cuda", "", False),
    "gpu 2": (2, "cuda", "nccl", False),
    "gpu 4": (4, "cuda", "nccl", False),
    "gpu host": (2, "cuda", "host", False),
    "cpu 1": (1, "cpu", "", False),
    "cpu 4": (4, "cpu", "nccl", False),
    "cpu 2 sharded": (2, "cpu", "nccl", True),
    "cpu 4 sharded": (4, "cpu", "nccl", True),
}
PATIENCE = 60.0  # seconds until a rank gives up another
MODEL = ModelConfig(
    vocab_size=11, dim=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, hidden_dim=12, max_seq_len=4
)
CONFIG = TrainConfig(
    seq_len=4, batch_size=4, shards=4, steps=2, warmup_fraction=0.0, decay_fraction=0.5, lr=0.01, clip=0.5
)


class PipeComm:
    """:class:`pyengine_training.comm.Comm` of forked processes: one pipe between any two."""

    threads, local_rank = 1, 0

    def __init__(self, rank: int, pipes: list[list[Connection | None]]) -> None:
        self.rank, self.size, self._pipes = rank, len(pipes), pipes[rank]

    def _receive(self, rank: int) -> Any:
        pipe = self._pipes[rank]
        assert pipe is not None
        if not pipe.poll(PATIENCE):
            raise TimeoutError(f"rank {self.rank} waited for rank {rank}")
        return pipe.recv()

    def _send(self, rank: int, value: Any) -> None:
        pipe = self._pipes[rank]
        assert pipe is not None
        pipe.send(value)

    def gather(self, value: Any) -> list[Any]:
        others = [rank for rank in range(self.size) if rank != self.rank]
        for rank in others:
            self._send(rank, value)
        return [value if rank == self.rank else self._receive(rank) for rank in range(self.size)]

    def exchange(self, sends: Sequence[Any], receives: Sequence[Any]) -> Callable[[], None]:
        for rank, array in sends:
            self._send(rank, array)

        def wait() -> None:
            for rank, array in receives:
                array[...] = self._receive(rank)

        return wait

    def abort(self) -> None:
        os._exit(1)


def on_processes(size: int, work: Callable[[PipeComm], Any]) -> list[Any]:
    """work(comm) on so many forked processes; their results. RuntimeError where one fails, after its traceback."""
    pipes: list[list[Connection | None]] = [[None] * size for _ in range(size)]
    for a in range(size):
        for b in range(a):
            pipes[a][b], pipes[b][a] = Pipe()
    results = [Pipe(duplex=False) for _ in range(size)]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                results[rank][1].send(work(PipeComm(rank, pipes)))
                code = 0
            finally:
                if code:
                    sys.excepthook(*sys.exc_info())
                    sys.stderr.flush()
                os._exit(code)
        children.append(child)
    for _, sender in results:
        sender.close()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise RuntimeError(f"exit codes {codes}")
    return [receiver.recv() for receiver, _ in results]


def batch(seed: int) -> tuple[Any, Any]:
    tokens = np.random.default_rng(seed).integers(0, MODEL.vocab_size, (CONFIG.batch_size, CONFIG.seq_len + 1))
    targets = tokens[:, 1:].copy()
    targets[seed % CONFIG.batch_size, :2] = -1
    return tokens[:, :-1], targets


def checkpoint_digest(trainer: Trainer, folder: Path) -> str:
    """Of the arrays of a checkpoint that rank 0 writes."""

    def write_model(target: Path) -> None:
        write_json(target / "config.json", hf_config(trainer.model, 0, 0))
        save_safetensors(target / "model.safetensors", hf_tensors(trainer.params, trainer.model))

    trainer.save(folder, "data", write_model)
    names = ("model.safetensors", "optimizer.safetensors")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def train(control: PipeComm, library: str, how: tuple[str, str, bool], folder: Path) -> dict[str, Any]:
    """A step of the trunk, in bfloat16 on a GPU, and one that simulates int8, a checkpoint and a validation."""
    device, kind, shard_optimizer = how
    backend_module.MESSAGE = 300  # elements: every rank owns several pieces
    with use_runtime(SimulatedRuntime()):
        comm: Any = control
        if control.size > 1:
            comm = StagedComm(control) if kind == "host" else NcclComm(control, Nccl(ctypes.CDLL(library), PATIENCE))
        more: dict[str, Any] = {"threads": 1, "comm": comm, "shard_optimizer": shard_optimizer}
        trainer = make_trainer(MODEL, CONFIG, device=Device(device), **more)
        trainer.initialize()
        steps = [trainer.step(*batch(step)) for step in range(CONFIG.steps)]
        tokens, targets = batch(9)
        rows = [slice(i, i + 1) for i in range(2)]
        held_out = [ValidationBatch(tokens[r], targets[r], targets[r] >= 0, np.arange(1)) for r in rows]
        found = {
            "steps": [[step.loss, step.grad_norm, step.quantized] for step in steps],
            "checkpoint": checkpoint_digest(trainer, folder),
            "validation": trainer.validate(held_out, 33).loss,
        }
        trainer.close()
        return found


if __name__ == "__main__":
    shared_library, where = sys.argv[1:]
    found = {}
    for name, (n_ranks, *how) in RUNS.items():
        found[name] = on_processes(n_ranks, partial(train, library=shared_library, how=how, folder=Path(where) / name))
    print(json.dumps(found))
