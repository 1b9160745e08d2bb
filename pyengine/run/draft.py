"""Speculation: which tokens to guess ahead, and how many.

A draft changes no byte of any output: its tokens are computed beside the one that is known, each position is sampled with
its own random number as always, and what was sampled counts as far as the guesses were right (docs/speculation.md). So all
that is decided here decides about time alone, and may follow the clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyengine.errors import OutOfMemoryError

if TYPE_CHECKING:
    from pyengine._draft import Drafter, Ngrams
    from pyengine.run.request import GenerationRequest

# The n-grams of earlier outputs: those of so many tokens, under so many salts. At most 8 MB each.
STORE_TOKENS = 1 << 15
MAX_STORES = 16
# Outputs that a text's own n-grams have room for from the beginning; older ones make room for more.
OUTPUT_TOKENS = 512


class Speculation:
    """Drafts for the requests of one engine. Called under the step lock."""

    def __init__(self) -> None:
        from pyengine import _draft

        self.max_rows = _draft.MAX_ROWS
        self.experience = _draft.Experience()
        self._plan = _draft.plan
        self._stores: dict[bytes, Ngrams] = {}

    def plan(self, requests: Sequence[GenerationRequest], n_rows: int) -> list[tuple[int, ...]]:
        """A draft, maybe empty, for each of the requests, that decode in a step of n_rows rows."""
        drafts: list[tuple[int, ...]] = [()] * len(requests)
        chosen = [i for i, request in enumerate(requests) if request.max_draft > 0]
        if not chosen or n_rows >= self.max_rows:
            return drafts
        try:
            drafters = [self._drafter(requests[i]) for i in chosen]
        except OutOfMemoryError:
            return drafts
        planned = self._plan(self.experience, drafters, [requests[i].max_draft for i in chosen], n_rows)
        for i, draft in zip(chosen, planned, strict=True):
            if draft:
                drafts[i] = until_end(draft, requests[i].output.ends)
        return drafts

    def note_step(self, n_rows: int, seconds: float) -> None:
        """A step of n_rows rows, with logits each, took so long."""
        self.experience.note_step(n_rows, seconds)

    def _drafter(self, request: GenerationRequest) -> Drafter:
        drafter = request.drafter
        if drafter is None:
            from pyengine._draft import Drafter

            store = self._store(request.salt) if request.params.speculative.store else None
            n_tokens = len(request.prompt) + OUTPUT_TOKENS
            drafter = request.drafter = Drafter(self.experience, request.prompt, store, n_tokens=n_tokens)
        drafter.read(request.sampler.outputs)
        return drafter

    def _store(self, salt: bytes) -> Ngrams:
        """The n-grams of outputs under this salt. Callers with different salts learn nothing of one another."""
        store = self._stores.get(salt)
        if store is None:
            from pyengine._draft import Ngrams

            while len(self._stores) >= MAX_STORES:
                self._stores.pop(next(iter(self._stores)))
            store = self._stores[salt] = Ngrams(STORE_TOKENS)
        return store


def until_end(draft: tuple[int, ...], ends: frozenset[int]) -> tuple[int, ...]:
    """What comes before the first token that ends the text: nothing after it is wanted."""
    for i, token in enumerate(draft):
        if token in ends:
            return draft[:i]
    return draft
