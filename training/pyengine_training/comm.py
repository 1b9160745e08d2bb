"""How ranks talk: the seam between one process and several that train one model together."""

from __future__ import annotations

from typing import Any, Protocol


class Comm(Protocol):
    """The ranks of a run. Every rank calls the same methods in the same order."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank, on every rank. Small objects only."""


class NoComm:
    """One rank."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """What was given."""
        return [value]
