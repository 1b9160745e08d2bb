"""Speculation: which tokens to guess ahead, and how many.

A draft changes no byte of any output: its tokens are computed beside the one that is known, each position is sampled with
its own random number as always, and what was sampled counts as far as the guesses were right (docs/speculation.md). So all
that is decided here decides about time alone, and may follow the clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pyengine import fork
from pyengine.errors import OutOfMemoryError
from pyengine.run.request import HIDDEN, LOGITS, GenerationRequest, Request

if TYPE_CHECKING:
    from pyengine import _core
    from pyengine._draft import Drafter, Ngrams
    from pyengine.run.proposer import Proposal, Proposer

# The n-grams of earlier outputs: those of so many tokens, under so many salts, at 3 MB each.
STORE_TOKENS = 1 << 15
MAX_STORES = 16
# Share of the time that looking for guesses in vain may take, and steps that are not looked at for its sake at most.
LOOK_SHARE = 0.005
MAX_SKIP = 16
# Texts at once for which a draft model or head is asked: of more, its choices take longer than they bring, and rows are dear.
MAX_ASKED = 4
# Outputs that a text's own n-grams have room for from the beginning; older ones make room for more.
OUTPUT_TOKENS = 512


class Speculation:
    """Drafts for the requests of one engine. Called under the step lock."""

    def __init__(self) -> None:
        with fork.importing:
            from pyengine import _draft

        self.max_rows = _draft.MAX_ROWS
        # How often n-grams of which kind come true is shared by all texts, whatever their adapter: it is where a text begins, as
        # if seen eight times, and soon outweighed by its own (csrc/draft.c).
        self.stats = _draft.DraftStats()
        self._plan = _draft.plan
        self._choose = _draft.choose
        self._forced_chance = _draft.FORCED_CHANCE
        self._stores: dict[bytes, Ngrams] = {}
        self._n_skip = 0  # steps until it looks again
        self._wants_states = False
        self._n_texts = 0  # that a step could draft for, lately
        self.proposer: Proposer | None = None
        self.max_asked = MAX_ASKED

    def add_model(self, context: _core.Context, n_ctx: int) -> None:
        """From now on a draft model guesses, too."""
        with fork.importing:
            from pyengine.run.draft_model import DraftModel

        self.proposer = DraftModel(context, n_ctx, self.stats)

    def add_head(self, head: _core.DraftHead) -> None:
        """From now on a draft head guesses, too, and requests that start want hidden states beside their logits."""
        with fork.importing:
            from pyengine.run.draft_head import DraftHead

        self.proposer = DraftHead(head, self.stats)
        self._wants_states = True

    def start(self, request: Request) -> None:
        """A request is about to be computed: what its rows must give."""
        if self._wants_states and isinstance(request, GenerationRequest) and request.may_draft:
            request.row_kind = LOGITS | HIDDEN

    def note_state(self, request: GenerationRequest, state: memoryview) -> None:
        """The hidden state (dim) of the row that gave the newest token of a request, which wanted it."""
        if self.proposer is not None and self._n_texts <= self.max_asked:  # of more texts, nobody will ask for it
            self.proposer.note_state(request, state)

    def plan(self, requests: Iterable[Request], n_rows: int) -> dict[int, tuple[int, ...]]:
        """{number of a request: its draft} for requests that decode in a step of n_rows rows without drafts."""
        if n_rows >= self.max_rows:
            self._n_texts = sum(isinstance(one, GenerationRequest) and one.may_draft for one in requests)
            return {}
        if self._n_skip > 0:
            self._n_skip -= 1
            return {}
        began = time.perf_counter()
        drafts, has_asked = self._propose(requests, n_rows)
        if not drafts and not has_asked:  # beside a step of microseconds, looking is not free
            step = self.stats.seconds(n_rows)
            self._n_skip = min(int((time.perf_counter() - began) / (LOOK_SHARE * step)), MAX_SKIP) if step > 0 else 0
        return drafts

    def _propose(self, requests: Iterable[Request], n_rows: int) -> tuple[dict[int, tuple[int, ...]], bool]:
        """The drafts, and whether a proposer was asked for one, which sees itself that it pays."""
        chosen = [one for one in requests if isinstance(one, GenerationRequest) and one.max_draft > 0]
        self._n_texts = len(chosen)
        if not chosen:
            return {}, False
        try:
            drafters = [self._drafter(request) for request in chosen]
        except OutOfMemoryError:
            return {}, False
        forced = [() if request.guide is None else _forced(request) for request in chosen]
        has_asked = False
        if self.proposer is None or len(chosen) > self.max_asked:
            mosts = [request.max_draft for request in chosen]
            guesses = self._plan(self.stats, drafters, mosts, n_rows, forced)
        else:
            guesses, has_asked = self._with_proposer(self.proposer, chosen, drafters, forced, n_rows)
        pairs = zip(chosen, guesses, strict=True)
        return {request.number: _trimmed(request, draft) for request, draft in pairs if draft}, has_asked

    def _with_proposer(
        self,
        proposer: Proposer,
        chosen: list[GenerationRequest],
        drafters: list[Drafter],
        forced: list[tuple[int, ...]],
        n_rows: int,
    ) -> tuple[list[tuple[int, ...]], bool]:
        """Drafts in which the draft model or head may have a part, and whether it was asked. It is not where a grammar leaves no
        choice."""
        proposals: list[Proposal] = [
            [(token, self._forced_chance) for token in tokens[: request.max_draft]] or drafter.propose(request.max_draft)
            for request, drafter, tokens in zip(chosen, drafters, forced, strict=True)
        ]
        free = [i for i, tokens in enumerate(forced) if not tokens]
        improved, has_asked = proposer.improve(
            [chosen[i] for i in free], [drafters[i] for i in free], [proposals[i] for i in free], n_rows
        )
        for i, proposal in zip(free, improved, strict=True):
            proposals[i] = proposal
        _, lengths = self._choose(self.stats, [[chance for _, chance in one] for one in proposals], n_rows)
        drafts = [tuple(token for token, _ in one[:n]) for one, n in zip(proposals, lengths, strict=True)]
        return drafts, has_asked

    def note_step(self, n_rows: int, seconds: float) -> None:
        """A step of n_rows rows, with logits each, took so long; 0 = one of another kind."""
        self.stats.note_step(n_rows, seconds)

    def memory(self) -> int:
        """Bytes that the draft model or head has beside its weights; 0 without one."""
        return 0 if self.proposer is None else self.proposer.memory()

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raises PyEngineError if the draft model's books do not balance. requests: all that may hold something."""
        if self.proposer is not None:
            self.proposer.check_integrity([one for one in requests if isinstance(one, GenerationRequest)])

    def close(self) -> None:
        """The draft model or head goes, and requests that start want no more hidden states for it."""
        self.proposer, self._wants_states = None, False

    def _drafter(self, request: GenerationRequest) -> Drafter:
        """The request's, which has read all that is known of its text."""
        drafter = request.drafter
        if drafter is None:
            from pyengine._draft import Drafter

            prompt, options = request.prompt, request.params.speculative
            store = self._store(request.salt) if options.store else None
            drafter = request.drafter = Drafter(self.stats, prompt, store, n_tokens=len(prompt) + OUTPUT_TOKENS)
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


def _trimmed(request: GenerationRequest, draft: tuple[int, ...]) -> tuple[int, ...]:
    """Without guesses that cannot come, or of which nobody will want to know."""
    if request.guide is not None:
        draft = request.guide.allowed(request.sampler.outputs, draft)
    return until_end(draft, request.output.ends)


def until_end(draft: tuple[int, ...], ends: frozenset[int]) -> tuple[int, ...]:
    """What comes before the first token that ends the text: nothing after it is wanted."""
    for i, token in enumerate(draft):
        if token in ends:
            return draft[:i]
    return draft
