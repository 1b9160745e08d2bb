"""The section of several ranks: processes of this machine, which need neither MPI nor a launcher.

Small objects go through pipes; arrays of GPUs travel as they do in a run: by NCCL where every rank has a GPU of its own, and
through the host, also where ranks share one.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from ..comm import ALONE, Comm
from ..config import ModelConfig, TrainConfig
from ..data import ValidationBatch
from ..device import Device, make_trainer
from ..supervise import die_with

PATIENCE = 300.0  # seconds until a rank gives up another, which may be compiling


class PipeComm:
    """:class:`..comm.Comm` of processes forked from one: a pipe between any two. Values travel by pickle."""

    threads = None

    def __init__(self, rank: int, pipes: Sequence[Sequence[Connection | None]]) -> None:
        self.rank = self.local_rank = rank
        self.size, self._pipes = len(pipes), pipes[rank]
        self.host: Comm = self
        self._sender = ThreadPoolExecutor(1)  # in order, and not in the way of what is received meanwhile

    def _pipe(self, rank: int) -> Connection:
        pipe = self._pipes[rank]
        assert pipe is not None
        return pipe

    def _send(self, rank: int, value: Any) -> Future[None]:
        return self._sender.submit(self._pipe(rank).send, value)

    def _receive(self, rank: int) -> Any:
        if not self._pipe(rank).poll(PATIENCE):
            raise TimeoutError(f"rank {self.rank} waited for rank {rank} for {PATIENCE:g} s")
        return self._pipe(rank).recv()

    def gather(self, value: Any) -> list[Any]:
        """Each to each."""
        sent = [self._send(rank, value) for rank in range(self.size) if rank != self.rank]
        found = [value if rank == self.rank else self._receive(rank) for rank in range(self.size)]
        for future in sent:
            future.result()
        return found

    def exchange(self, sends: Sequence[Any], receives: Sequence[Any]) -> Callable[[], None]:
        """Arrays of the host."""
        sent = [self._send(rank, array) for rank, array in sends]

        def wait() -> None:
            for rank, array in receives:
                array[...] = self._receive(rank)
            for future in sent:
                future.result()

        return wait

    def abort(self) -> None:
        """The others find this one's pipes closed."""
        os._exit(1)


def on_processes(size: int, work: Callable[[PipeComm], Any]) -> list[Any]:
    """work(comm) on so many processes, which are forked from this one: it must not have used a GPU yet. Their results, by rank.

    Raises RuntimeError where one of them fails, whose traceback is on stderr then; the others, who may wait for it in a library
    that has no end of patience, are killed.
    """
    pipes: list[list[Connection | None]] = [[None] * size for _ in range(size)]
    for a in range(size):
        for b in range(a):
            pipes[a][b], pipes[b][a] = Pipe()
    results = [Pipe(duplex=False) for _ in range(size)]
    children, parent = [], os.getpid()
    for rank in range(size):
        child = os.fork()
        if child == 0:
            die_with(parent)
            _in_child(rank, pipes, results, work)
        children.append(child)
    for ends in ([end for row in pipes for end in row], [end for _, end in results]):
        for end in ends:
            if end is not None:
                end.close()
    found: dict[int, Any] = {}
    waiting = {receiver: rank for rank, (receiver, _) in enumerate(results)}
    while waiting:
        for receiver in wait(list(waiting)):
            rank = waiting.pop(receiver)  # type: ignore[arg-type]
            try:
                found[rank] = results[rank][0].recv()
            except EOFError:  # its exit code says the rest
                for other in waiting.values():
                    os.kill(children[other], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise RuntimeError(f"ranks ended with the exit codes {codes}")
    return [found[rank] for rank in range(size)]


def _in_child(
    rank: int,
    pipes: list[list[Connection | None]],
    results: list[tuple[Connection, Connection]],
    work: Callable[[PipeComm], Any],
) -> None:
    """Work, tell the result, and end."""
    code = 1
    try:
        for other, row in enumerate(pipes):  # an end that nobody else holds closes with its rank
            for end in row if other != rank else []:
                if end is not None:
                    end.close()
        for other, (_, result) in enumerate(results):
            if other != rank:
                result.close()
        results[rank][1].send(work(PipeComm(rank, pipes)))
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@dataclass(frozen=True)
class Run:
    """Ranks of one run. by: "nccl", "host", or "" for one."""

    ranks: int
    by: str = ""
    device: str = "cuda"
    shard_optimizer: bool = False

    def connect(self, control: Comm) -> Comm:
        """The ranks as they exchange arrays."""
        Device(self.device).require(control.local_rank)
        if control.size == 1:
            return ALONE
        if self.device == "cpu" and self.by != "nccl":
            return control
        from ..backend import cuda_ranks

        return cuda_ranks.connect(control, "mpi" if self.by == "host" else None)


def train(
    control: Comm, *, run: Run, model: ModelConfig, config: TrainConfig, batch: Callable[[int], tuple[Any, Any]]
) -> dict[str, Any]:
    """What one rank finds in all steps of a tiny run: their numbers, and SHA-256s of what a checkpoint would hold."""
    comm = run.connect(control)
    more: dict[str, Any] = {"threads": 1, "comm": comm, "shard_optimizer": run.shard_optimizer}
    trainer = make_trainer(model, config, device=Device(run.device), **more)
    trainer.initialize()
    steps, seconds = [], []
    for number in range(config.steps):
        began = time.monotonic()
        step = trainer.step(*batch(number))
        seconds.append(time.monotonic() - began)
        steps.append([step.loss, step.grad_norm, step.quantized])
    moments = [np.zeros(trainer.backend.moments_size, np.float32) for _ in range(2)]
    trainer.backend.save_moments(*(moments if comm.rank == 0 else (None, None)))
    tokens, targets = batch(config.steps)
    rows = trainer.backend.shard_rows
    parts = [slice(first, first + rows) for first in range(0, len(tokens), rows)]
    held_out = [ValidationBatch(tokens[p], targets[p], targets[p] >= 0, np.arange(rows)) for p in parts]
    validation = trainer.validate(held_out, tokens.size).loss
    parameters = trainer.params.flat.copy()
    trainer.close()
    return {
        "same": {
            "steps": steps,
            "validation": validation,
            "parameters": _digest(parameters),
            "moments": control.gather(_digest(*moments))[0],
        },
        "ms": round(1e3 * float(np.median(seconds[1:])), 2),
    }


def _digest(*arrays: Any) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def compare(
    runs: Sequence[Run],
    model: ModelConfig,
    config: TrainConfig,
    batch: Callable[[int], tuple[Any, Any]],
    say: Callable[..., None],
) -> bool:
    """Whether all ranks of all runs on one kind of device find what the first of these runs does; a line a run."""
    wanted: dict[str, Any] = {}
    ok = True
    for run in runs:
        what = {"ranks": run.ranks, "by": run.by, "device": run.device, "sharded": run.shard_optimizer}
        try:
            found = on_processes(run.ranks, partial(train, run=run, model=model, config=config, batch=batch))
        except RuntimeError as error:  # a finding, and the others still count
            say(**what, error=str(error), ok=False)
            ok = False
            continue
        first = wanted.setdefault(run.device, found[0]["same"])
        same = all(rank["same"] == first for rank in found)
        say(**what, ms=found[0]["ms"], losses=[loss for loss, _, _ in found[0]["same"]["steps"]], ok=same)
        ok = ok and same
    return ok
