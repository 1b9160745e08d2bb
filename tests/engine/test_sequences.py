"""Objects of the border to C that are closed, or used while another thread computes: an error of ours, never a crash."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator

import pytest
from engine.freeze_models import freeze_fixture

from pyengine import _core
from pyengine.errors import InvalidArgumentError, PyEngineError
from pyengine.format.reader import FrozenFile

N_CTX = 4096

USES: dict[str, Callable[[_core.Sequence], object]] = {
    "length": lambda sequence: sequence.length,
    "tokens": lambda sequence: sequence.tokens(),
    "save": lambda sequence: sequence.save(),
    "truncate": lambda sequence: sequence.truncate(0),
    "accept": lambda sequence: sequence.accept([1]),
    "fork": lambda sequence: sequence.fork(0),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_core.Model]:
    with FrozenFile.open(freeze_fixture("mistral_window", tmp_path_factory.mktemp("model"), N_CTX)) as file:
        yield _core.Model(file.config, file.buffer, file.weights)


@pytest.mark.parametrize("use", USES)
def test_a_closed_sequence_says_so(model: _core.Model, use: str) -> None:
    context = _core.Context(model)
    sequence = context.sequence_new()
    context.forward([1, 2, 3], [sequence] * 3, bytes(3))
    sequence.close()
    with pytest.raises(InvalidArgumentError, match="closed"):
        USES[use](sequence)


def test_a_page_that_is_not_there_has_no_bytes(model: _core.Model) -> None:
    context = _core.Context(model)
    sequence = context.sequence_new()
    context.forward([1, 2, 3], [sequence] * 3, bytes(3))
    assert context.debug_kv_page(sequence, 0, 0, 0) != b""
    for page in (1, 2**55, 2**56, 2**64 - 1):  # times 256 positions the third is 0 again
        assert context.debug_kv_page(sequence, 0, 0, page) == b""


def test_what_no_context_has_made_is_refused(model: _core.Model) -> None:
    context, other = _core.Context(model), _core.Context(model)
    sequence = context.sequence_new()
    context.forward([1, 2], [sequence] * 2, bytes(2))
    with pytest.raises(BufferError, match="no context"):
        memoryview(_core.RowView())  # type: ignore[call-overload]
    for wrong in (None, _core.Sequence(), other.sequence_new()):
        with pytest.raises(InvalidArgumentError, match="closed, or of another context"):
            context.forward([1], [wrong], bytes(1))  # type: ignore[list-item]
    for wrong in (_core.Sequence(), other.sequence_new()):  # whose numbers are those of `sequence`
        with pytest.raises(InvalidArgumentError, match=r"closed|of another context"):
            context.debug_kv_page(wrong, 0, 0, 0)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no timer that interrupts a forward")
def test_nothing_of_a_context_is_looked_at_while_it_computes(model: _core.Model) -> None:
    """A forward moves what they read: its last act may free a page whose tokens somebody copies. A signal handler runs in the
    middle of one, at its first look at the outside world after 20 ms."""
    context = _core.Context(model)
    other = context.sequence_new()
    context.forward([1, 2], [other] * 2, bytes([1, 3]))
    row = context.logits(0)
    looks: dict[str, Callable[[], object]] = {name: functools.partial(use, other) for name, use in USES.items()}
    looks |= {
        "logits": lambda: context.logits(0),
        "hidden": lambda: context.hidden(0),
        "n_logits": lambda: context.n_logits,
        "row": lambda: memoryview(row),
        "page": lambda: context.debug_kv_page(other, 0, 0, 0),
        "stats": context.cache_stats,
    }
    refused: list[str] = []

    def look(*_: object) -> None:
        refused.clear()  # of a look that came before its forward
        for name, use in looks.items():
            try:
                use()
            except (PyEngineError, BufferError):
                refused.append(name)
            except IndexError:  # before the forward: the one before had no rows
                pass

    before = signal.signal(signal.SIGVTALRM, look)
    try:
        n_sequences = 16
        while "stats" not in refused:  # a signal that comes before the forward finds the context idle, one in a short one is late
            opened = [context.sequence_new() for _ in range(n_sequences)]
            sequences = [sequence for sequence in opened for _ in range(N_CTX)]
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.001)
            context.forward([1] * len(sequences), sequences, bytes(len(sequences)))
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            n_sequences = min(2 * n_sequences, 128)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert refused == list(looks)
