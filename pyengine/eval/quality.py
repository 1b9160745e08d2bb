"""What int8 costs on a text: the engine against the source of its file in float32, teacher-forced.

For each position of every window both give the distribution of the next token. The divergence KL(float32 || engine) is of these;
the negative log-likelihoods are of the token that really follows, and their difference is paired position by position, and so is
its standard error; the most probable tokens are compared where float32's two best logits are more than CLEAR_MARGIN apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from pyengine.errors import InvalidArgumentError
from pyengine.freeze.float_forward import FloatForward, TokenIds
from pyengine.run.request import Caller
from pyengine.run.stream import run_all

if TYPE_CHECKING:
    from pyengine.engine import Engine
    from pyengine.freeze.sources import SourceModel

WINDOW = 512  # positions
SMALLEST_WINDOW = 3  # a standard error takes two differences
CLEAR_MARGIN = 0.5
LOGITS_BYTES = 64 << 20  # of float32's logits at a time; the head is read once for each such block

Progress = Callable[[int, int, str], None]
Row = npt.NDArray[np.float32]  # logits (vocab_size)


class Quality(NamedTuple):
    """Divergences and negative log-likelihoods are in nats a token. ``agreement`` is the share of the ``n_clear`` positions where
    float32 has a clear winner that is the engine's too, None if there are none such."""

    n_windows: int
    n_positions: int
    kl_mean: float
    kl_max: float
    nll_float32: float
    nll_difference: float  # engine - float32
    nll_stderr: float  # of the difference, paired
    agreement: float | None
    n_clear: int


def window_length(n_tokens: int, n_ctx: int) -> int:
    """Positions of a window, where n_tokens are to be used of a text and the context holds n_ctx. Raises InvalidArgumentError."""
    length = min(WINDOW, n_tokens, n_ctx)
    if length < SMALLEST_WINDOW:
        raise InvalidArgumentError(f"windows of {length} tokens are too short to compare anything; at least {SMALLEST_WINDOW}")
    return length


def cut_windows(tokens: Sequence[int], length: int, bos: int | None) -> TokenIds:
    """The whole windows of a text, token ids (n_windows, length), each beginning with ``bos`` if there is one."""
    body = length if bos is None else length - 1
    n_windows = len(tokens) // body
    windows = np.array(tokens[: n_windows * body], np.int64).reshape(n_windows, body)
    return windows if bos is None else np.insert(windows, 0, bos, axis=1)


def measure(model: SourceModel, engine: Engine, windows: TokenIds, progress: Progress | None = None) -> Quality:
    """Compare the engine with the open source that its file was frozen from, on token ids (n_windows, length).

    progress(done, total, what) is called after each layer and each block of logits. Raises ModelFormatError for a source that is
    damaged or overflows float32, ContextFullError for windows that do not fit the engine's context.
    """
    n_layers, n_windows, length = model.config.n_layers, *windows.shape
    block = max(1, LOGITS_BYTES // (4 * model.config.vocab_size))
    blocks = [(w, range(a, min(a + block, length))) for w in range(n_windows) for a in range(0, length, block)]
    total = n_layers + len(blocks)

    def report(done: int, what: str) -> None:
        if progress is not None:
            progress(done, total, what)

    forward, tally = FloatForward(model), _Tally()
    states = forward.states(windows, lambda layer: report(layer, f"layer {layer} of {n_layers}"))
    for n, (w, positions) in enumerate(blocks, 1):
        reference = forward.logits(states[w, positions.start : positions.stop])
        tally.add_block(engine, [int(token) for token in windows[w]], positions, reference)
        report(n_layers + n, f"logits of window {w + 1} of {n_windows}")
    return tally.quality(n_windows)


def _log_softmax(logits: Row) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    log_probabilities: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return log_probabilities


class _Position(NamedTuple):
    kl: float
    nll: tuple[float, float] | None  # float32's and the engine's, of the token that follows if one does
    agrees: bool | None  # None where float32 has no clear winner


def _compare(reference: Row, other: Row, following: int | None) -> _Position:
    p, q = _log_softmax(reference), _log_softmax(other)
    second, first = np.partition(reference, -2)[-2:] if len(reference) > 1 else (-np.inf, reference[0])
    return _Position(
        kl=float((np.exp(p) * (p - q)).sum()),
        nll=None if following is None else (-float(p[following]), -float(q[following])),
        agrees=bool(reference.argmax() == other.argmax()) if first - second > CLEAR_MARGIN else None,
    )


class _Tally:
    """What was found at each position, of one window after the other."""

    def __init__(self) -> None:
        self._found: list[_Position] = []

    def add_block(self, engine: Engine, tokens: list[int], positions: range, reference: npt.NDArray[np.float32]) -> None:
        """float32's logits (len(positions), vocab_size) at these positions of a window, against the engine's, a row at a time."""
        found: dict[int, _Position] = {}  # by position: a row may come again after an exception

        def take(position: int, logits: memoryview) -> None:
            following = tokens[position + 1] if position + 1 < len(tokens) else None
            found[position] = _compare(reference[position - positions.start], np.asarray(logits), following)

        caller = Caller()  # the scheduler knows it weakly
        requests = engine.rows_requests(caller, tokens[: positions.stop], list(positions), take)
        for request in requests:
            request.keep = True  # the window's next block begins alike
        run_all(engine.scheduler, requests)
        self._found += [found[position] for position in positions]

    def quality(self, n_windows: int) -> Quality:
        kl = np.array([one.kl for one in self._found])
        nll = np.array([one.nll for one in self._found if one.nll is not None])  # (n, 2)
        agrees = [one.agrees for one in self._found if one.agrees is not None]
        difference = nll[:, 1] - nll[:, 0]
        return Quality(
            n_windows=n_windows,
            n_positions=len(kl),
            kl_mean=float(kl.mean()),
            kl_max=float(kl.max()),
            nll_float32=float(nll[:, 0].mean()),
            nll_difference=float(difference.mean()),
            nll_stderr=float(difference.std(ddof=1) / np.sqrt(len(difference))),
            agreement=sum(agrees) / len(agrees) if agrees else None,
            n_clear=len(agrees),
        )
