"""How fast the machine would let a test of `pyengine bench` be: weights read once a forward, products at the int8 peak."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pyengine.errors import UnsupportedISAError

if TYPE_CHECKING:
    from pyengine.engine import Engine

READ_SECONDS, INT8_SECONDS = 0.1, 0.05  # of one measurement


class Work(NamedTuple):
    """What one forward is asked for: so many rows through the layers, of which so many want logits."""

    n_rows: int
    n_logits: int


class Bound(NamedTuple):
    """The nearest limit of a test: which one ("read" or "int8"), and the tokens per second that it allows."""

    limit: str
    tokens_per_second: float


class Roofline:
    """Limits of this machine for one engine, measured afresh each time, because neighbours move them.

    The read probe reads the very bytes that a forward reads, as they are mapped: not the embeddings where the output matrix is
    another one, for of these it reads a row a token.
    """

    def __init__(self, engine: Engine) -> None:
        from pyengine.format.inventory import inventory

        self.n_threads, self.isa = engine.n_threads, engine.isa
        file = engine._file
        self.config = file.config
        read = [file.weights[name] for w in inventory(self.config) if w.use != "row" for name in w.stored()]
        begin, end = read[0][0], read[-1][0] + read[-1][1]
        self.weights = memoryview(file.buffer)[begin:end]

    def close(self) -> None:
        """Let go of the map, without which the engine cannot close its file."""
        self.weights.release()

    def read_bandwidth(self) -> float:
        """Bytes per second."""
        from pyengine import _probe

        return _probe.read_bandwidth(self.weights, self.n_threads, READ_SECONDS)

    def int8_peak(self) -> float | None:
        """Multiply-accumulates per second; None if the probe does not know this kernel table."""
        from pyengine import _probe

        try:
            return _probe.int8_peak(self.isa, self.n_threads, INT8_SECONDS)
        except UnsupportedISAError:
            return None

    def _macs(self, work: Work) -> int:
        from pyengine.format.inventory import count_macs

        return count_macs(self.config, *work)

    def nearest(self, work: Work) -> str:
        """Which limit binds: "read" or "int8"."""
        peak = self.int8_peak()
        read_seconds = self.weights.nbytes / self.read_bandwidth()
        return "int8" if peak is not None and self._macs(work) / peak > read_seconds else "read"

    def bound(self, work: Work, limit: str) -> Bound:
        """Measure that limit once."""
        peak = self.int8_peak() if limit == "int8" else None
        if peak is not None:
            return Bound("int8", work.n_rows * peak / self._macs(work))
        return Bound("read", work.n_rows * self.read_bandwidth() / self.weights.nbytes)
