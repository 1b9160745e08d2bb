"""Proposers: networks that guess what a model will say, beside the n-grams, and how far they run ahead.

A proposer makes each guess with the request's own sampler, and knows the random number of that very position. A draft model draws
with it: at any temperature its guess is right whenever both models agree about what that number chooses, not only where the
model is certain. A draft head, which is less sure than the model, guesses the likeliest token, and believes it less where the
number lies beyond that token's probability.

Guess by guess the likelier one is taken, the proposer's or the n-grams', and n-grams go on where the proposer stops. Asking it
has a price, its steps. What an answer brings, the expected speed with it against the one with n-grams alone, is kept by kind of
position; where that is less than the price nothing is asked, but for a try now and then (acceptance.py).
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from pyengine import fork
from pyengine.errors import PyEngineError
from pyengine.run.acceptance import SharedAcceptance, TextAcceptance, guess_bucket, place, relation

if TYPE_CHECKING:
    from pyengine import _core
    from pyengine._draft import Drafter, DraftStats
    from pyengine.run.request import GenerationRequest

# Guesses with their chances that they come true if those before them did.
Proposal = list[tuple[int, float]]

# What is believed of the next guess before anything is known of this text, and weight of one more guess in that running mean.
FIRST_CHANCE = 0.4
CHANCE_RATE = 0.06
# Weight of one more step's time, if it is shorter than lately and if it is longer: what interrupts a step only lengthens it.
SHORTER_RATE, LONGER_RATE = 0.5, 0.1


class Guess(NamedTuple):
    """A guess of the proposer, and what was drafted at its position."""

    bucket: int  # acceptance.guess_bucket
    token: int
    drafted: int


class DraftState:
    """What a proposer keeps of one text. shared: what it knows of texts like it."""

    def __init__(self, shared: SharedAcceptance) -> None:
        self.acceptance = TextAcceptance(shared)
        self.chance = FIRST_CHANCE  # of its guesses lately, as far as is known
        self.pending: list[Guess] = []  # of which nothing was learnt so far
        self.pending_at = 0  # length of the text before the first of them
        self.asked_after: int | None = None  # the token before the first of its guesses, if nothing was learnt of that one


class Proposer(ABC):
    """Guesses for the requests of one engine. Called under the step lock.

    stats  the engine's, which knows what steps of the model cost
    """

    def __init__(self, stats: DraftStats) -> None:
        with fork.importing:
            from pyengine import _draft

        self.stats = stats
        self._choose_lengths = _draft.choose
        self.new_builder = DraftBuilder
        self._plain = SharedAcceptance()  # of texts without an adapter
        self._adapted: WeakKeyDictionary[_core.Adapter, SharedAcceptance] = WeakKeyDictionary()
        # What one of its steps takes, lately: the first of a draft, which finds its weights in no cache, with all that an answer
        # costs beside its steps; and later ones.
        self._seconds: list[float | None] = [None, None]

    # ------------------------------------------------------------ what each kind does in its own way

    @abstractmethod
    def _prepare(self, request: GenerationRequest) -> bool:
        """Make ready to guess what comes next. Whether that is done."""

    @abstractmethod
    def _guess(
        self, requests: Sequence[GenerationRequest], drafts: Sequence[list[int]]
    ) -> list[tuple[int, float] | None]:
        """What comes after each text and its draft: what `_choose` says."""

    @abstractmethod
    def memory(self) -> int:
        """Bytes that it has beside its weights."""

    def _room(self, request: GenerationRequest) -> int:
        """Guesses that are of use at most."""
        return request.max_draft

    def note_state(self, request: GenerationRequest, state: memoryview) -> None:
        """The model's final hidden state, float32 (dim), at the position whose logits gave the newest token of the text."""

    def check_integrity(self, requests: Sequence[GenerationRequest]) -> None:
        """Raises PyEngineError if its books do not balance. requests: all that may hold something."""

    # ------------------------------------------------------------ proposals

    def improve(
        self, requests: Sequence[GenerationRequest], drafters: Sequence[Drafter], ngrams: list[Proposal], n_rows: int
    ) -> tuple[list[Proposal], bool]:
        """Proposals that are likelier than those of the n-grams, for a step of n_rows rows without them; and whether anything was
        asked for their sake. drafters[i]: the n-grams of requests[i]."""
        places = [self._place(request, one) for request, one in zip(requests, ngrams, strict=True)]
        asked = [i for i, request in enumerate(requests) if self._is_asked(request, places[i])]
        began = time.perf_counter()
        try:
            asked = [i for i in asked if self._prepare(requests[i])]
            if not asked:
                return ngrams, False
            builders = {i: self.new_builder(requests[i], drafters[i], ngrams[i], places[i]) for i in asked}
            later = self._run_ahead(list(builders.values()), n_rows)
        except PyEngineError:  # no memory, for one: nobody needs a draft
            for i in asked:
                state = requests[i].draft_state
                if state is not None:
                    state.acceptance.suspend(requests[i].n_tokens)
            return ngrams, True
        proposals = [builders[i].proposal() if i in builders else one for i, one in enumerate(ngrams)]
        first = self._note_seconds(False, time.perf_counter() - began - later)
        self._note_gain(list(builders.values()), ngrams, proposals, n_rows, first + later)
        return proposals, True

    def _place(self, request: GenerationRequest, ngrams: Proposal) -> int:
        """acceptance.place of its newest position."""
        state, n = request.draft_state, request.n_tokens
        if state is not None:
            self._learn(request, state)
        acceptance = self.acceptance(request) if state is None else state.acceptance
        (token,) = request.tokens(n - 1, n)
        return place(ngrams, acceptance.first_chance(token, request.salt), request.sampler.random(n))

    def _is_asked(self, request: GenerationRequest, place: int) -> bool:
        state = request.draft_state
        if state is None:  # it would have to read the text first
            return self.acceptance(request).is_worth_reading(place, len(request.sampler.outputs))
        return state.acceptance.asks(place, request.n_tokens)

    def _run_ahead(self, builders: list[DraftBuilder], n_rows: int) -> float:
        """Lengthen each draft as far as pays. The seconds that all steps but the first took."""
        running, n, spent = builders, 0, 0.0
        while running:
            began = time.perf_counter()
            guesses = self._guess([one.request for one in running], [one.tokens for one in running])
            for builder, guess in zip(running, guesses, strict=True):
                builder.add(guess)
            n += 1
            if n > 1:
                seconds = time.perf_counter() - began
                self._note_seconds(True, seconds)
                spent += seconds
            running = [one for one in running if one.is_open and n < self._room(one.request)]
            running = [one for one in running if self._goes_on(one, len(running), n_rows)]
        for builder in builders:
            state = builder.draft_state
            n = state.pending_at = builder.request.n_tokens
            state.pending, (state.asked_after,) = builder.guesses, builder.request.tokens(n - 1, n)
            if not builder.guesses:
                state.acceptance.suspend(builder.request.n_tokens)
        return spent

    @staticmethod
    def _choose(
        request: GenerationRequest,
        draft: list[int],
        logits: memoryview,
        ids: Sequence[int] | None = None,
        *,
        likeliest: bool = False,
    ) -> tuple[int, float] | None:
        """The guess behind a draft, and its probability: what the request's sampler makes of these logits, of the tokens `ids`
        (None = all), at that position (Sampler.guess). None if they are none to choose from, an infinity among them for one."""
        masks = request.masks(draft)
        if masks is not None and len(masks) <= len(draft):
            return None
        mask = None if masks is None else masks[-1]
        position = request.n_tokens + len(draft)
        try:
            return request.sampler.guess(logits, position, mask, ids, likeliest=likeliest)  # type: ignore[arg-type]
        except PyEngineError:
            return None

    # ------------------------------------------------------------ whether it pays

    def acceptance(self, request: GenerationRequest) -> SharedAcceptance:
        """Of all texts with the request's adapter: another one makes another model of it."""
        if request.adapter is None:
            return self._plain
        found = self._adapted.get(request.adapter)
        if found is None:
            found = self._adapted[request.adapter] = SharedAcceptance()
        return found

    @staticmethod
    def _learn(request: GenerationRequest, state: DraftState) -> None:
        """What became of its guesses, drafted or not, as far as is known."""
        begin, pending = state.pending_at, state.pending
        truth = request.tokens(begin, min(begin + len(pending), request.n_tokens))
        if pending and truth and state.asked_after is not None:
            state.acceptance.learn_first(state.asked_after, request.salt, pending[0].token == truth[0])
            state.asked_after = None
        for (bucket, guess, drafted), token in zip(pending, truth, strict=False):
            state.acceptance.learn(bucket, guess == token)
            state.chance += CHANCE_RATE * ((guess == token) - state.chance)
            if drafted != token:
                state.pending = []
                return
        state.pending, state.pending_at = pending[len(truth) :], begin + len(truth)

    def _goes_on(self, builder: DraftBuilder, n_running: int, n_rows: int) -> bool:
        """Whether one more guess is expected to bring more than its step and its row cost."""
        rows = n_rows + len(builder.tokens)
        cost = self.stats.seconds(rows)
        row = max(0.0, self.stats.seconds(rows + 1) - cost)
        price = ((self._seconds[1] or self._seconds[0] or 0.0) / n_running + row) * n_rows
        return builder.reached * builder.draft_state.chance * cost > price * builder.expected

    def _note_gain(
        self, builders: list[DraftBuilder], ngrams: list[Proposal], proposals: list[Proposal], n_rows: int, spent: float
    ) -> None:
        """What the answers brought is shared out among those who asked."""
        without, _ = self._choose_lengths(self.stats, [[chance for _, chance in one] for one in ngrams], n_rows)
        gain, lengths = self._choose_lengths(self.stats, [[chance for _, chance in one] for one in proposals], n_rows)
        step = self.stats.seconds(n_rows + sum(lengths))
        if step <= 0.0:
            return  # nothing is known so far
        net_gain = (gain - without - math.log1p(spent / step)) * n_rows / len(builders)
        for builder in builders:
            builder.draft_state.acceptance.shared.note_gain(builder.place, net_gain)

    def _note_seconds(self, is_later: bool, seconds: float) -> float:
        """A step took so long; what such steps take lately."""
        known = self._seconds[is_later]
        lately = seconds if known is None else known
        rate = SHORTER_RATE if seconds < lately else LONGER_RATE
        self._seconds[is_later] = lately = lately + rate * (min(seconds, 2 * lately) - lately)
        return lately


class DraftBuilder:
    """A draft on its way: of each position the likelier guess, the proposer's or the n-grams'. place: of its first one."""

    def __init__(self, request: GenerationRequest, drafter: Drafter, ngrams: Proposal, place: int) -> None:
        assert request.draft_state is not None
        self.request = request
        self.draft_state = request.draft_state
        self.ngrams = ngrams
        self.place = place
        self.guesses: list[Guess] = []
        self.tokens: list[int] = []
        self.reached = 1.0  # the chance that all of it comes true
        self.expected = 1.0  # tokens of a step with it
        self.is_open = True  # something may come behind it
        self._chances: list[float] = []
        self._drafter = drafter
        self._is_ngrams = True  # so far these are the n-grams' own guesses

    def add(self, guess: tuple[int, float] | None) -> None:
        """The proposer's guess, with its probability; None = it has none."""
        if guess is None:
            self.is_open = False
            return
        ngram = self._ngram()
        token, bucket = guess[0], guess_bucket(guess[1], relation(guess[0], ngram))
        chance = self._chance(bucket)
        if ngram is not None and ngram[0] == token:
            chance = max(chance, ngram[1])
        elif ngram is not None and ngram[1] > chance:
            token, chance = ngram
        self._is_ngrams = self._is_ngrams and ngram is not None and ngram[0] == token
        self.guesses.append(Guess(bucket, guess[0], token))
        self.tokens.append(token)
        self._chances.append(chance)
        self.reached *= chance
        self.expected += self.reached
        self.is_open = token not in self.request.output.ends

    def _chance(self, bucket: int) -> float:
        return self.draft_state.acceptance.chance(bucket)

    def _ngram(self) -> tuple[int, float] | None:
        """The n-grams' guess behind it."""
        n = len(self.tokens)
        if self._is_ngrams and n < len(self.ngrams):
            return self.ngrams[n]
        found = self._drafter.propose(1, self.tokens)
        return found[0] if found else None

    def proposal(self) -> Proposal:
        """The draft, and what n-grams guess behind it; or theirs alone, if more of it is expected to come true."""
        whole = list(zip(self.tokens, self._chances, strict=True))
        if self.is_open:
            whole += self._drafter.propose(self.request.max_draft - len(whole), self.tokens)
        return whole if _expected(whole) > _expected(self.ngrams) else self.ngrams


def _expected(proposal: Proposal) -> float:
    """Guesses of it that are expected to come true."""
    reached, expected = 1.0, 0.0
    for _, chance in proposal:
        reached *= chance
        expected += reached
    return expected
