"""How the GPUs of several ranks exchange arrays: NCCL from one to another, or MPI through the hosts.

Small objects go through MPI either way, which also starts the ranks and ends them all when one fails.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..comm import Comm, Message, same_everywhere, together
from ..errors import ConfigError
from ..ops.cuda._nccl import Nccl, load_nccl
from ..ops.cuda._runtime import runtime
from ..ops.cuda._vectors import address


class StagedComm:
    """:class:`..comm.Comm` of device arrays, which travel by way of the hosts' memory."""

    def __init__(self, control: Comm) -> None:
        self.control = self.host = control
        self.rank, self.size, self.threads, self.local_rank = _numbers(control)

    def gather(self, value: Any) -> list[Any]:
        return self.control.gather(value)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], None]:
        """The arrays sent are copied to the host first, those received to the device when they are waited for."""
        device = runtime()
        sent = [(rank, device.download(array)) for rank, array in sends]
        received = [(rank, np.empty(array.shape, array.dtype)) for rank, array in receives]
        wait = self.control.exchange(sent, received)

        def finish() -> None:
            wait()
            for (_, host), (_, array) in zip(received, receives, strict=True):
                device.upload(host, array)

        return finish

    def abort(self) -> None:
        self.control.abort()


class NcclComm:
    """:class:`..comm.Comm` of device arrays, which travel from GPU to GPU in the order of the device's one stream."""

    def __init__(self, control: Comm, nccl: Nccl) -> None:
        """Every rank calls it. Raises ConfigError, on all, where two ranks share a GPU or their NCCLs differ."""
        self.control, self.host, self.nccl = control, control, nccl
        self.rank, self.size, self.threads, self.local_rank = _numbers(control)
        device = runtime()
        same_everywhere(control, {"NCCL": nccl.version})
        refuse_shared_gpus(control.gather((socket.gethostname(), device.place)))
        unique_id = control.gather(nccl.unique_id() if self.rank == 0 else b"")[0]
        nccl.connect(self.size, self.rank, unique_id, device.stream_address)
        device.watch(nccl.check)

    def gather(self, value: Any) -> list[Any]:
        self.nccl.check()
        return self.control.gather(value)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], None]:
        """What the device does afterwards comes after the messages, so there is nothing for the host to wait for."""
        parts = ([(rank, address(array), array.nbytes) for rank, array in side] for side in (sends, receives))
        self.nccl.exchange(*parts)
        return lambda: None

    def abort(self) -> None:
        self.control.abort()


def _numbers(control: Comm) -> tuple[int, int, int | None, int]:
    return control.rank, control.size, control.threads, control.local_rank


def refuse_shared_gpus(places: Sequence[tuple[str, str]]) -> None:
    """ConfigError, the same on all ranks, where two of (machine, GPU) by rank are equal."""
    for rank, place in enumerate(places):
        other = places.index(place)
        if other < rank:
            error = ConfigError(
                f"ranks {other} and {rank} have one GPU between them, {place[1]} on {place[0]}, and NCCL wants one each: "
                "start fewer ranks, or give --comm mpi"
            )
            error.on_all_ranks = True
            raise error


def connect(control: Comm, kind: str | None) -> Comm:
    """MPI's ranks as they exchange device arrays: "mpi", through the hosts; "nccl" or None, from GPU to GPU."""
    same_everywhere(control, {"GPU": runtime().kind})
    if kind == "mpi":
        return StagedComm(control)
    with together(control):  # a library that is missing is missing everywhere, as a rule: one rank says so
        nccl = Nccl(load_nccl())
    return NcclComm(control, nccl)
