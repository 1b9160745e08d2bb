"""A draft head: a small network in the model's own file guesses from the model's final hidden state.

It reads no text and has no keys and values. The forward that gives a text its newest token gives the hidden state at that
position, too (`note_state`); from there the head goes on by itself, one small step a guess. A state that an exception loses is
missed until the next step of the model, and no longer.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyengine.run.proposer import DraftState, Proposer

if TYPE_CHECKING:
    from pyengine import _core
    from pyengine._draft import DraftStats
    from pyengine.run.acceptance import SharedAcceptance
    from pyengine.run.request import GenerationRequest


class HeadState(DraftState):
    """Hidden states of one text, float32 (dim)."""

    def __init__(self, shared: SharedAcceptance) -> None:
        super().__init__(shared)
        self.known: tuple[int, array[float]] = (0, array("f"))  # the model's, and the length of the text that it belongs to
        self.ahead = array("f")  # the head's own, after the guesses so far


def _state(request: GenerationRequest) -> HeadState:
    assert isinstance(request.draft_state, HeadState)
    return request.draft_state


class DraftHead(Proposer):
    """Guesses of a draft head."""

    def __init__(self, head: _core.DraftHead, stats: DraftStats) -> None:
        super().__init__(stats)
        self.head = head

    def note_state(self, request: GenerationRequest, state: memoryview) -> None:
        if request.draft_state is None:
            request.draft_state = HeadState(self.acceptance(request))
        _state(request).known = request.n_tokens, array("f", state.tobytes())

    def _prepare(self, request: GenerationRequest) -> bool:
        if request.max_draft == 0 or request.draft_state is None:
            return False
        own = _state(request)
        n, own.ahead = own.known
        return n == request.n_tokens

    def _guess(
        self, requests: Sequence[GenerationRequest], drafts: Sequence[list[int]]
    ) -> list[tuple[int, float] | None]:
        states = array("f")
        tokens: list[int] = []
        for request, draft in zip(requests, drafts, strict=True):
            states += _state(request).ahead
            tokens += draft[-1:] or request.tokens(request.n_tokens - 1, request.n_tokens)
        head, dim = self.head, self.head.model.dim
        failed = head.step(tokens, states)
        guesses: list[tuple[int, float] | None] = []
        with memoryview(head) as logits:
            for row, (request, draft) in enumerate(zip(requests, drafts, strict=True)):
                _state(request).ahead = states[row * dim : (row + 1) * dim]
                with logits[row * head.stride : row * head.stride + len(head.vocab)] as known:
                    guesses.append(None if failed[row] else self._choose(request, draft, known, head.vocab, likeliest=True))
        return guesses

    def memory(self) -> int:
        """Bytes of its scratch."""
        return self.head.memory()
