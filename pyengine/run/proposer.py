"""Proposers: networks that guess what a model will say, and how far they run ahead.

A proposer chooses each guess with the request's own sampler and the random number of that very position. So at any temperature
a guess is right whenever proposer and model agree about what that number chooses, not only where the model is certain.

How far it runs ahead follows from how often its guesses came true and from what its steps cost beside those of the model, both
measured while running; below break-even it rests, and tries again now and then.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyengine.errors import PyEngineError

if TYPE_CHECKING:
    from pyengine._draft import Experience
    from pyengine.run.request import GenerationRequest

# A draft must promise so much more than plain decoding.
LEAST_GAIN = 1.04
# Tokens of a text between two tries of a proposer that does not pay.
REST = 48
# What is believed before anything is known.
FIRST_CHANCE = 0.7
FIRST_DRAFT = 4
# Weight of one more token in running means: of one text, and of all.
RATE = 0.06
SHARED_RATE = 0.01
FIRST_WEIGHT = 8  # FIRST_CHANCE counts like so many guesses
# Weight of one more step's time, if it is shorter than lately and if it is longer: what interrupts a step only lengthens it.
SHORTER_RATE, LONGER_RATE = 0.5, 0.1


class Reading:
    """What a proposer knows of one text. chance: what other texts make likely."""

    def __init__(self, chance: float) -> None:
        self.guessed: tuple[int, tuple[int, ...]] = (0, ())  # the last draft, and the length of the text before it
        self.chance = chance  # that a guess comes true if those before it did
        self.next_try = 0  # length of the text at which it drafts again


class Proposer(ABC):
    """Guesses for the requests of one engine. Called under the step lock.

    experience  the engine's, which knows what steps of the model cost
    """

    def __init__(self, experience: Experience) -> None:
        self.experience = experience
        self.chance = FIRST_CHANCE  # that a guess comes true if those before it did, over all texts
        self._n_learnt = 0  # guesses that it was learnt from
        self._seconds: float | None = None  # that one of its steps takes, lately

    # ------------------------------------------------------------ what each kind does in its own way

    @abstractmethod
    def _prepare(self, request: GenerationRequest) -> bool:
        """Make ready to guess what comes next. Whether that is done: then the request has a reading."""

    @abstractmethod
    def _guess(self, requests: Sequence[GenerationRequest], drafts: Sequence[list[int]]) -> None:
        """One more token of each text, onto its draft: what `_choose` says."""

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

    # ------------------------------------------------------------ a draft

    def propose(self, requests: Sequence[GenerationRequest], n_rows: int, max_rows: int) -> list[tuple[int, ...]]:
        """A draft for each request, () where none pays; all of them together at most max_rows - n_rows tokens."""
        try:
            return self._propose(requests, n_rows, max_rows)
        except PyEngineError:  # no memory, for one: nobody needs a draft
            for request in requests:
                self._rest(request)
            return [()] * len(requests)

    def _propose(
        self, requests: Sequence[GenerationRequest], n_rows: int, max_rows: int
    ) -> list[tuple[int, ...]]:
        drafts: list[list[int]] = [[] for _ in requests]
        ready: list[int] = []
        for i, request in enumerate(requests):
            self._learn(request)
            if self._prepare(request):
                ready.append(i)
        lengths = self._lengths([requests[i] for i in ready], n_rows, max_rows)
        self._run_ahead({i: length for i, length in zip(ready, lengths, strict=True) if length > 0}, requests, drafts)
        for request, draft in zip(requests, drafts, strict=True):
            if request.reading is not None:
                request.reading.guessed = request.n_tokens, tuple(draft)
        return [tuple(draft) for draft in drafts]

    def _run_ahead(
        self, lengths: dict[int, int], requests: Sequence[GenerationRequest], drafts: Sequence[list[int]]
    ) -> None:
        """Up to lengths[i] guesses onto drafts[i]; none behind one that ends the text, or where there is no next guess."""
        running, n = list(lengths), 0
        while running:
            began = time.perf_counter()
            self._guess([requests[i] for i in running], [drafts[i] for i in running])
            self._note_seconds(time.perf_counter() - began)
            n += 1
            for i in running:
                if not drafts[i]:
                    self._rest(requests[i])
            running = [
                i
                for i in running
                if n == len(drafts[i]) < lengths[i] and requests[i].output.ends.isdisjoint(drafts[i][-1:])
            ]

    @staticmethod
    def _choose(request: GenerationRequest, draft: list[int], logits: memoryview) -> int | None:
        """The guess behind a draft: what the request's sampler makes of these logits (vocab_size) at that position. None if
        they are none to choose from, an infinity among them for one."""
        mask = request.masks(draft)[-1]
        try:
            return request.sampler.sample(logits, request.n_tokens + len(draft), mask)[0]
        except PyEngineError:
            return None

    # ------------------------------------------------------------ whether it pays

    def chance_of(self, request: GenerationRequest) -> float:
        """That its next guess at this text comes true."""
        return self.chance if request.reading is None else request.reading.chance

    def _learn(self, request: GenerationRequest) -> None:
        """What became of the last draft."""
        reading = request.reading
        if reading is None:
            return
        begin, draft = reading.guessed
        reading.guessed = 0, ()
        for guess, token in zip(draft, request.tokens(begin, min(begin + len(draft), request.n_tokens)), strict=False):
            reading.chance += RATE * ((guess == token) - reading.chance)
            self._n_learnt += 1
            self.chance += max(SHARED_RATE, 1 / (FIRST_WEIGHT + self._n_learnt)) * ((guess == token) - self.chance)
            if guess != token:
                return

    @staticmethod
    def _rest(request: GenerationRequest) -> None:
        if request.reading is not None:
            request.reading.next_try = request.n_tokens + REST

    def _lengths(self, requests: Sequence[GenerationRequest], n_rows: int, max_rows: int) -> list[int]:
        """How many tokens to guess of each text: as many as make (tokens expected) / (seconds) largest."""
        if not requests:
            return []
        most = min(max(request.max_draft for request in requests), (max_rows - n_rows) // len(requests))
        best = self._best_length(requests, n_rows, most)
        if best == 0:
            for request in requests:
                self._rest(request)
        return [min(best, self._room(request)) for request in requests]

    def _best_length(self, requests: Sequence[GenerationRequest], n_rows: int, most: int) -> int:
        if self._seconds is None:
            return min(FIRST_DRAFT, most)  # to learn what it costs
        n = len(requests)
        readings = [request.reading for request in requests if request.reading is not None]
        chance = sum(reading.chance for reading in readings) / n
        plain = self.experience.seconds(n_rows)
        best, best_gain, expected = 0, LEAST_GAIN, float(n_rows)
        for k in range(1, most + 1):
            expected += n * chance**k
            gain = expected / n_rows * plain / (self.experience.seconds(n_rows + k * n) + k * self._seconds)
            if gain > best_gain:
                best, best_gain = k, gain
        if best == 0:
            for reading in readings:
                reading.chance += 0.25 * (FIRST_CHANCE - reading.chance)  # texts change: it is tried again,
            self._seconds *= 0.75  # and so is a step that may have been interrupted
        return best

    def _note_seconds(self, seconds: float) -> None:
        lately = seconds if self._seconds is None else self._seconds
        rate = SHORTER_RATE if seconds < lately else LONGER_RATE
        self._seconds = lately + rate * (min(seconds, 2 * lately) - lately)
