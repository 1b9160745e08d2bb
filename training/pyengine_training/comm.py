"""How ranks talk: the seam between one process and several that train one model together.

Ranks are started by MPI (``mpiexec -n 4 pyengine train …``), each with its share of the batch. Nothing above this module
knows how bytes travel, and nothing here adds numbers: the order of every sum is :mod:`.ranks`'s. Arrays of GPUs travel by
:mod:`.backend.cuda_ranks`, which stands on the ranks of this module.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from .errors import ConfigError, Interrupted, MissingLibraryError, RankError, TrainingError
from .supervise import all_have_begun
from .terminal import tell

Array = NDArray[Any]
Message = tuple[int, Array]  # other rank, contiguous array where the rank computes: the host's, or its GPU's


class Comm(Protocol):
    """The ranks of a run. Every rank calls the same methods in the same order."""

    rank: int
    size: int
    threads: int | None  # that a rank of this machine should use; None: what the process may
    local_rank: int  # among the ranks of this machine

    @property
    def host(self) -> Comm:
        """These ranks as they exchange the host's arrays."""

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank, on every rank. Small objects only."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], None]:
        """Start to move arrays; the function returned waits until all of this call's have arrived and left.

        Messages between two ranks arrive in the order in which they were sent.
        """

    def abort(self) -> None:
        """End every rank at once, without waiting for any."""


class NoComm:
    """One rank."""

    rank, size, threads, local_rank = 0, 1, None, 0

    @property
    def host(self) -> Comm:
        """Itself."""
        return self

    def gather(self, value: Any) -> list[Any]:
        """What was given."""
        return [value]

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], None]:
        """There is nobody to send to."""
        assert not sends and not receives
        return lambda: None

    def abort(self) -> None:
        """Nobody else has to end."""


ALONE = NoComm()


class PaperComm:
    """One of so many ranks, without the others: to count what it holds."""

    threads, local_rank = None, 0

    def __init__(self, size: int, rank: int = 0) -> None:
        self.size, self.rank = size, rank

    @property
    def host(self) -> Comm:
        """Itself."""
        return self

    def gather(self, value: Any) -> list[Any]:
        """All say the same."""
        return [value] * self.size

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], None]:
        """Nothing arrives."""
        return lambda: None

    def abort(self) -> None:
        """Nobody else has to end."""


class MpiComm:
    """All ranks of MPI's world, through mpi4py."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._world = MPI.COMM_WORLD.Dup()
        self.rank, self.size = self._world.rank, self._world.size
        self.threads, self.local_rank = self._share_of_the_machine()  # returns when every rank has called it
        all_have_begun()

    @property
    def host(self) -> Comm:
        """Itself."""
        return self

    def _share_of_the_machine(self) -> tuple[int, int]:
        """CPUs that the ranks of this machine may use between them, for each, bound to cores by the launcher or not; and
        which of these ranks this is."""
        neighbours = self._world.Split_type(self._mpi.COMM_TYPE_SHARED)
        allowed = neighbours.allgather(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0})
        share, local_rank = max(1, len(set().union(*allowed)) // neighbours.size), int(neighbours.rank)
        if local_rank == 0:
            _forget_shared_memory()
        neighbours.Free()
        return share, local_rank

    def gather(self, value: Any) -> list[Any]:
        """By pickle."""
        found: list[Any] = self._world.allgather(value)
        return found

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], None]:
        """Non-blocking, straight from and into the arrays."""
        requests = [self._world.Irecv(array.view("u1"), source=rank) for rank, array in receives]
        requests += [self._world.Isend(array.view("u1"), dest=rank) for rank, array in sends]
        return lambda: self._mpi.Request.Waitall(requests)

    def abort(self) -> None:
        """MPI ends every process."""
        self._world.Abort(1)


def _forget_shared_memory() -> None:
    """Remove the name of MPICH's segment, which all ranks of this machine have mapped: where one is killed nobody would."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            name = line.split(maxsplit=5)[-1]
            if name.startswith("/dev/shm/mpich_shm_"):
                Path(name).unlink(missing_ok=True)


def launched_ranks() -> tuple[int, int]:
    """(rank, ranks) that an MPI launcher has started, by its environment; (0, 1) without one."""
    for rank, size in (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")):
        if os.environ.get(size, "").isdigit() and os.environ.get(rank, "").isdigit():
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


def world() -> Comm:
    """MPI's ranks where a launcher has started several, else one. Raises MissingLibraryError without mpi4py."""
    if launched_ranks()[1] == 1:
        return ALONE
    try:
        return MpiComm()
    except (ImportError, RuntimeError) as error:  # mpi4py without a library raises RuntimeError
        raise MissingLibraryError(
            f"several ranks were started, and mpi4py does not work here ({str(error).splitlines()[0]}): "
            "pip install 'pyengine-lm[mpi]'"
        ) from error


@contextlib.contextmanager
def together(comm: Comm) -> Iterator[None]:
    """Every rank leaves the body well, or every rank raises: the error of the lowest rank that has one.

    For errors that a rank can raise while the others do not communicate; elsewhere a rank that fails aborts.
    """
    failure: TrainingError | OSError | None = None
    try:
        yield
    except (TrainingError, OSError) as error:
        failure = error
    if comm.size == 1:
        if failure is not None:
            raise failure
        return
    failures = comm.gather(None if failure is None else str(failure))
    first = next((rank for rank, text in enumerate(failures) if text is not None), None)
    if first is None:
        return
    if failure is not None and first == comm.rank == 0:
        failure.on_all_ranks = True  # type: ignore[union-attr]
        raise failure
    raise RankError(f"rank {first}: {failures[first]}")


@contextlib.contextmanager
def ending_together(comm: Comm) -> Iterator[None]:
    """No rank waits for one that has failed: an error that only this rank has is printed, and ends them all."""
    try:
        yield
    except BaseException as error:
        if comm.size == 1 or isinstance(error, Interrupted) or getattr(error, "on_all_ranks", False):
            raise
        if not isinstance(error, TrainingError | OSError | MemoryError):
            tell(traceback.format_exc(), end="")
        tell(f"pyengine: error: rank {comm.rank}: {error or type(error).__name__}")
        comm.abort()
        raise


def same_everywhere(comm: Comm, facts: dict[str, Any]) -> None:
    """Raise ConfigError, on every rank, for the first fact in which a rank differs from rank 0."""
    everywhere = comm.gather(facts)
    for rank, theirs in enumerate(everywhere):
        for name, wanted in everywhere[0].items():
            if theirs.get(name) != wanted:
                error = ConfigError(f"rank {rank}: its {name} is {theirs.get(name)}, that of rank 0 is {wanted}")
                error.on_all_ranks = True
                raise error
