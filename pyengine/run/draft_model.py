"""A draft model: a smaller model of the same vocabulary guesses what the larger one will say.

It runs ahead in the same step loop, with keys and values of its own: before a step it computes what became known of each text,
then one token after the other, and each guess is chosen by the request's own sampler, with the random number of that very
position. So at any temperature a guess is right whenever the two models agree about what that number chooses, not only where the
larger one is certain.

How far it runs ahead follows from how often its guesses came true and from what its steps cost beside those of the large model,
both measured while running; below break-even it rests, and tries again now and then.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyengine.errors import PyEngineError

if TYPE_CHECKING:
    from pyengine import _core
    from pyengine._draft import Experience
    from pyengine.run.request import GenerationRequest

# Tokens of a text that the draft model computes in one step at most, so that nobody waits long for it.
MAX_CATCH_UP = 256
# A draft must promise so much more than plain decoding.
LEAST_GAIN = 1.04
# Tokens of a text between two tries of a draft model that does not pay.
REST = 48
# What is believed of a text before it is known.
FIRST_CHANCE = 0.7
FIRST_DRAFT = 4
# Weight of one more token, or step, in running means.
RATE = 0.06


class Reading:
    """How far the draft model has come with one text."""

    def __init__(self, sequence: _core.Sequence) -> None:
        self.sequence = sequence
        self.n_sure = 0  # of its tokens: a beginning of the text
        self.guessed: tuple[int, tuple[int, ...]] = (0, ())  # the last draft, and the length of the text before it
        self.chance = FIRST_CHANCE  # that a guess comes true if those before it did
        self.next_try = 0  # length of the text at which it drafts again


class DraftModel:
    """Guesses for the requests of one engine. Called under the step lock.

    context     of the draft model, whose vocabulary is the engine's
    n_ctx       positions of that context
    experience  the engine's, which knows what steps of the large model cost
    """

    def __init__(self, context: _core.Context, n_ctx: int, experience: Experience) -> None:
        self.context = context
        self.n_ctx = n_ctx
        self.experience = experience
        self._seconds: float | None = None  # that one of its steps takes, lately

    def propose(self, requests: Sequence[GenerationRequest], n_rows: int, max_rows: int) -> list[tuple[int, ...]]:
        """A draft for each request, () where none pays; all of them together at most max_rows - n_rows tokens."""
        try:
            return self._propose(requests, n_rows, max_rows)
        except PyEngineError:  # no memory, an infinity: nobody needs a draft
            for request in requests:
                self._rest(request)
            return [()] * len(requests)

    def _propose(
        self, requests: Sequence[GenerationRequest], n_rows: int, max_rows: int
    ) -> list[tuple[int, ...]]:
        drafts: list[list[int]] = [[] for _ in requests]
        running: list[int] = []
        for i, request in enumerate(requests):
            self._learn(request)
            if self._catch_up(request):
                running.append(i)
        lengths = self._lengths([requests[i] for i in running], n_rows, max_rows)
        left = dict(zip(running, lengths, strict=True))
        while running := [
            i for i in running if left[i] > len(drafts[i]) and requests[i].output.ends.isdisjoint(drafts[i][-1:])
        ]:
            began = time.perf_counter()
            self._guess([requests[i] for i in running], [drafts[i] for i in running])
            self._note_seconds(time.perf_counter() - began)
        for request, draft in zip(requests, drafts, strict=True):
            if request.reading is not None:
                request.reading.guessed = request.n_tokens, tuple(draft)
        return [tuple(draft) for draft in drafts]

    def _learn(self, request: GenerationRequest) -> None:
        """What became of the last draft."""
        reading = request.reading
        if reading is None:
            return
        begin, draft = reading.guessed
        reading.guessed = 0, ()
        for guess, token in zip(draft, request.tokens(begin, min(begin + len(draft), request.n_tokens)), strict=False):
            reading.chance += RATE * ((guess == token) - reading.chance)
            if guess != token:
                return

    def _catch_up(self, request: GenerationRequest) -> bool:
        """Compute what is known of the text but for its last token. Whether that is done, and there is room for a guess."""
        n = request.n_tokens
        if n >= self.n_ctx or request.max_draft == 0:
            return False
        reading = request.reading
        if reading is None:
            sequence = self.context.sequence_match(request.tokens(0, n - 1), request.salt)
            reading = request.reading = Reading(sequence)
            reading.n_sure = sequence.length
        if n < reading.next_try:
            return False
        # Guesses that it computed, perhaps wrong ones, lie behind what is sure; also after an exception, wherever it came.
        held = reading.sequence.tokens()[reading.n_sure :]
        known = request.tokens(reading.n_sure, n - 1)
        n_same = next((i for i, (a, b) in enumerate(zip(held, known, strict=False)) if a != b), min(len(held), len(known)))
        reading.n_sure += n_same
        if n_same < len(held):
            reading.sequence.truncate(reading.n_sure)
            reading.n_sure = reading.sequence.length  # less, where a window has slid on
        missing = list(request.tokens(reading.n_sure, min(n - 1, reading.n_sure + MAX_CATCH_UP)))
        if len(missing) > 1:  # a single one is computed together with the last
            self.context.forward(missing, [reading.sequence] * len(missing), bytes(len(missing)))
            reading.n_sure += len(missing)
        return reading.n_sure >= n - 2

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
        return [min(best, request.max_draft, self.n_ctx - request.n_tokens) for request in requests]

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
                reading.chance += 0.25 * (FIRST_CHANCE - reading.chance)  # texts change: it is tried again
        return best

    def _guess(self, requests: Sequence[GenerationRequest], drafts: Sequence[list[int]]) -> None:
        """One more token of each text, onto its draft."""
        tokens: list[int] = []
        sequences: list[_core.Sequence] = []
        wants = bytearray()
        for request, draft in zip(requests, drafts, strict=True):
            assert request.reading is not None
            sequence = request.reading.sequence
            new = draft[-1:] or list(request.tokens(sequence.length, request.n_tokens))
            tokens += new
            sequences += [sequence] * len(new)
            wants += bytes(len(new) - 1) + b"\1"
        self.context.forward(tokens, sequences, wants)
        for row, (request, draft) in enumerate(zip(requests, drafts, strict=True)):
            with memoryview(self.context.logits(row)) as logits:
                mask = request.masks(draft)[-1]
                draft.append(request.sampler.sample(logits, request.n_tokens + len(draft), mask)[0])

    def _note_seconds(self, seconds: float) -> None:
        self._seconds = seconds if self._seconds is None else self._seconds + RATE * (seconds - self._seconds)

    def memory(self) -> int:
        """Bytes of its keys, values and scratch."""
        return sum(self.context.memory().values())

    def check_integrity(self, requests: Sequence[GenerationRequest]) -> None:
        """Raises PyEngineError if its sequences are not those of `requests`."""
        self.context.check()
        n_held = sum(request.reading is not None for request in requests)
        if self.context.cache_stats()["n_sequences"] != n_held:
            raise PyEngineError(f"the draft model has sequences for other texts than the {n_held} that it reads")
