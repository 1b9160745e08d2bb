"""A draft model: a smaller model of the same vocabulary guesses what the larger one will say.

It runs ahead in the same step loop, with keys and values of its own: before a step it computes what became known of each text,
then one token after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyengine.errors import PyEngineError
from pyengine.run.proposer import DraftState, Proposer

if TYPE_CHECKING:
    from pyengine import _core
    from pyengine._draft import DraftStats
    from pyengine.run.acceptance import SharedAcceptance
    from pyengine.run.request import GenerationRequest

# Tokens of a text that the draft model computes in one step at most, so that nobody waits long for it.
MAX_CATCH_UP = 256


class ModelState(DraftState):
    """How far the draft model has come with one text."""

    def __init__(self, shared: SharedAcceptance, sequence: _core.Sequence) -> None:
        super().__init__(shared)
        self.sequence = sequence
        self.n_sure = sequence.length  # of its tokens: a beginning of the text


def _sequence(request: GenerationRequest) -> _core.Sequence:
    assert isinstance(request.draft_state, ModelState)
    return request.draft_state.sequence


class DraftModel(Proposer):
    """Guesses of a draft model.

    context     of the draft model, whose vocabulary is the engine's
    n_ctx       positions of that context
    """

    def __init__(self, context: _core.Context, n_ctx: int, stats: DraftStats) -> None:
        super().__init__(stats)
        self.context = context
        self.n_ctx = n_ctx

    def _prepare(self, request: GenerationRequest) -> bool:
        """Compute what is known of the text but for its last token. Whether that is done, and there is room for a guess."""
        n = request.n_tokens
        if n >= self.n_ctx or request.max_draft == 0:
            return False
        state = request.draft_state
        if state is None:
            sequence = self.context.sequence_match(request.tokens(0, n - 1), request.salt)
            state = request.draft_state = ModelState(self.acceptance(request), sequence)
        assert isinstance(state, ModelState)
        # Guesses that it computed, perhaps wrong ones, lie behind what is sure; also after an exception, wherever it came.
        held = state.sequence.tokens()[state.n_sure :]
        known = request.tokens(state.n_sure, n - 1)
        n_same = next((i for i, (a, b) in enumerate(zip(held, known, strict=False)) if a != b), min(len(held), len(known)))
        state.n_sure += n_same
        if n_same < len(held):
            state.sequence.truncate(state.n_sure)
            state.n_sure = state.sequence.length  # less, where a window has slid on
        missing = list(request.tokens(state.n_sure, min(n - 1, state.n_sure + MAX_CATCH_UP)))
        if len(missing) > 1:  # a single one is computed together with the last
            self.context.forward(missing, [state.sequence] * len(missing), bytes(len(missing)))
            state.n_sure += len(missing)
        return state.n_sure >= n - 2

    def _room(self, request: GenerationRequest) -> int:
        return min(request.max_draft, self.n_ctx - request.n_tokens)

    def _guess(
        self, requests: Sequence[GenerationRequest], drafts: Sequence[list[int]]
    ) -> list[tuple[int, float] | None]:
        tokens: list[int] = []
        sequences: list[_core.Sequence] = []
        wants = bytearray()
        for request, draft in zip(requests, drafts, strict=True):
            sequence = _sequence(request)
            new = draft[-1:] or list(request.tokens(sequence.length, request.n_tokens))
            tokens += new
            sequences += [sequence] * len(new)
            wants += bytes(len(new) - 1) + b"\1"
        self.context.forward(tokens, sequences, wants)
        guesses = []
        for row, (request, draft) in enumerate(zip(requests, drafts, strict=True)):
            with memoryview(self.context.logits(row)) as logits:
                guesses.append(self._choose(request, draft, logits))
        return guesses

    def memory(self) -> int:
        """Bytes of its keys, values and scratch."""
        return sum(self.context.memory().values())

    def check_integrity(self, requests: Sequence[GenerationRequest]) -> None:
        """Raises PyEngineError if its sequences are not those of `requests`."""
        self.context.check()
        n_held = sum(request.draft_state is not None for request in requests)
        if self.context.cache_stats()["n_sequences"] != n_held:
            raise PyEngineError(f"the draft model has sequences for other texts than the {n_held} that it reads")
