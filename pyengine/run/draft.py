"""Speculation: which tokens to guess ahead, and how many.

A draft changes no byte of any output: its tokens are computed beside the one that is known, each position is sampled with
its own random number as always, and what was sampled counts as far as the guesses were right (docs/speculation.md). So all
that is decided here decides about time alone, and may follow the clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pyengine.errors import OutOfMemoryError
from pyengine.run.request import GenerationRequest, Request

if TYPE_CHECKING:
    from pyengine._draft import Drafter, Ngrams

# The n-grams of earlier outputs: those of so many tokens, under so many salts, at 3 MB each.
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

    def plan(self, requests: Iterable[Request], n_rows: int) -> dict[int, tuple[int, ...]]:
        """{number of a request: its draft} for requests that decode in a step of n_rows rows without drafts."""
        if n_rows >= self.max_rows:
            return {}
        chosen = [one for one in requests if isinstance(one, GenerationRequest) and one.max_draft > 0]
        if not chosen:
            return {}
        try:
            drafters = [self._drafter(request) for request in chosen]
        except OutOfMemoryError:
            return {}
        mosts = [request.max_draft for request in chosen]
        drafts = self._plan(self.experience, drafters, mosts, n_rows, [_forced(request) for request in chosen])
        return {
            request.number: _sensible(request, draft)
            for request, draft in zip(chosen, drafts, strict=True)
            if draft
        }

    def note_step(self, n_rows: int, seconds: float) -> None:
        """A step of n_rows rows, with logits each, took so long."""
        self.experience.note_step(n_rows, seconds)

    def _drafter(self, request: GenerationRequest) -> Drafter:
        """The request's, which has read all that is known of its text."""
        drafter = request.drafter
        if drafter is None:
            from pyengine._draft import Drafter

            prompt, options = request.prompt, request.params.speculative
            store = self._store(request.salt) if options.store else None
            drafter = request.drafter = Drafter(self.experience, prompt, store, n_tokens=len(prompt) + OUTPUT_TOKENS)
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


def _forced(request: GenerationRequest) -> tuple[int, ...]:
    """What a grammar leaves no choice about."""
    return () if request.guide is None else request.guide.forced(request.sampler.outputs)


def _sensible(request: GenerationRequest, draft: tuple[int, ...]) -> tuple[int, ...]:
    """Without guesses that cannot come, or of which nobody will want to know."""
    if request.guide is not None:
        draft = tuple(request.guide.allowed(request.sampler.outputs, draft))
    return until_end(draft, request.output.ends)


def until_end(draft: tuple[int, ...], ends: frozenset[int]) -> tuple[int, ...]:
    """What comes before the first token that ends the text: nothing after it is wanted."""
    for i, token in enumerate(draft):
        if token in ends:
            return draft[:i]
    return draft
