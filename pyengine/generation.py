"""The loop: feed tokens -> forward -> sample -> text, for any number of prompts at once.

A `Branch` is one sequence of the KV cache and the tokens that it has yet to be fed; a `Sample` is one output in progress.
A prompt starts as one branch with its n samples and splits after its first forward. Each step is one ragged forward over
all branches: prompts that start, prompts that decode, side by side.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pyengine._sampler import Sampler
from pyengine.errors import CancelledError, ContextFullError, OutOfMemoryError
from pyengine.results import FinishReason, Generation, Piece, Timings, TokenLogprob
from pyengine.text.decoder import IncrementalDecoder
from pyengine.text.stops import StopMatcher

if TYPE_CHECKING:
    from pyengine.engine import Engine
    from pyengine.sampling import ResolvedParams

# Branches that decode together. More would still be correct; their KV pages are what costs.
MAX_BRANCHES = 64


class Sample:
    """One output in progress: its sampler, its decoder, and what has been said so far."""

    def __init__(self, engine: Engine, prompt: Sequence[int], params: ResolvedParams, index: int) -> None:
        self.prompt = prompt
        self.params = params
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.cached_tokens = 0
        self.started = self.first_token_at = self.last_token_at = time.monotonic()
        self._end_ids = () if params.ignore_eos else engine.eos_token_ids
        self._n_ctx = engine.n_ctx
        self._sampler = Sampler(params, engine.vocab_size, end_ids=self._end_ids, sample_index=index)
        if params.repetition_penalty != 1.0:
            self._sampler.accept_prompt(array("i", prompt))
        self._decoder = IncrementalDecoder(
            engine.tokenizer, skip_special_tokens=params.skip_special_tokens, continuation=True
        )
        self._stops = StopMatcher(params.stop, include_stop_str=params.include_stop_str_in_output)

    def advance(self, logits: memoryview) -> Piece:
        """Sample the next token from its logits (vocab_size) and say what it adds to the text."""
        token, logprob, top = self._sampler.sample(logits, len(self.prompt) + len(self.tokens))
        self._sampler.accept(token)
        self.last_token_at = time.monotonic()
        if not self.tokens:
            self.first_token_at = self.last_token_at
        self.tokens.append(token)
        entry = None
        if self.logprobs is not None and logprob is not None:
            entry = TokenLogprob(token, logprob, tuple(top or ()))
            self.logprobs.append(entry)
        return Piece(self._text_of(token), token, entry, self._result_if_finished())

    def stop(self, reason: FinishReason) -> Piece:
        """End the output from outside."""
        text = self._finish(reason)
        return Piece(text, None, None, self._result_if_finished())

    def _text_of(self, token: int) -> str:
        """Text that is certain after `token`; finishes the sample if the token or the text ends it."""
        params = self.params
        if token in self._end_ids or token in params.stop_token_ids:
            self.stop_reason = token if token in params.stop_token_ids else None
            return self._finish("stop")
        text = self._stops.push(self._decoder.push(token))
        self.text += text
        if self._stops.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self._stops.matched
        elif len(self.tokens) == params.max_tokens or len(self.prompt) + len(self.tokens) >= self._n_ctx:
            text += self._finish("length")
        return text

    def _finish(self, reason: FinishReason) -> str:
        """Flush what the decoder and the stop matcher held back."""
        text = self._stops.push(self._decoder.finish())
        if self._stops.matched is None:
            text += self._stops.finish()
            self.finish_reason = reason
        else:
            self.finish_reason, self.stop_reason = "stop", self._stops.matched
        self.text += text
        return text

    def _result_if_finished(self) -> Generation | None:
        if self.finish_reason is None:
            return None
        timings = Timings(
            len(self.prompt),
            self.cached_tokens,
            len(self.tokens),
            self.first_token_at - self.started,
            self.last_token_at - self.started,
        )
        return Generation(
            self.text, self.tokens, self.finish_reason, self.stop_reason, self.params.seed, self.logprobs, timings
        )


class Branch:
    """A sequence, the tokens in it and the tokens that it needs before its samples can go on."""

    def __init__(self, sequence: int, held: list[int], feed: Sequence[int], samples: list[Sample]) -> None:
        self.sequence = sequence
        self.held = held
        self.feed = feed
        self.samples = samples


class Run:
    """Prompts on their way through an engine. Iterate with `step` until it returns None; `close` in any case."""

    def __init__(self, engine: Engine, prompts: Iterable[Sequence[int]], params: ResolvedParams) -> None:
        self._engine = engine
        self._params = params
        self._deadline = None if params.timeout is None else time.monotonic() + params.timeout
        self._waiting: deque[list[Sample]] = deque()
        self._branches: list[Branch] = []
        self.samples: list[Sample] = []
        for prompt in prompts:
            if len(prompt) > engine.n_ctx:
                raise ContextFullError(f"the prompt has {len(prompt)} tokens, the context holds {engine.n_ctx}")
            group = [Sample(engine, prompt, params, index) for index in range(params.n)]
            self._waiting.append(group)
            self.samples.extend(group)

    def step(self) -> list[tuple[Sample, Piece]] | None:
        """One forward and one token for every active sample; None when all have finished."""
        with self._engine.locked():
            if not self._waiting and not self._branches:
                return None
            self._admit()
            try:
                self._forward()
            except CancelledError:
                return [(sample, sample.stop("timeout")) for sample in self._abandon()]
            return self._sample()

    def close(self) -> None:
        """Give the sequences of unfinished samples back."""
        with self._engine.locked_unless_closed() as is_open:
            if is_open:
                self._abandon()

    def _admit(self) -> None:
        """Start waiting prompts while there is room; a prompt with n samples will need n branches."""
        cache = self._engine.prefix_cache
        n_active = sum(len(branch.samples) for branch in self._branches)
        while self._waiting and (n_active == 0 or n_active + len(self._waiting[0]) <= MAX_BRANCHES):
            samples = self._waiting.popleft()
            prompt = samples[0].prompt
            sequence, n_cached = cache.take(prompt)
            for sample in samples:
                sample.cached_tokens = n_cached
            self._branches.append(Branch(sequence, list(prompt[:n_cached]), prompt[n_cached:], samples))
            n_active += len(samples)

    def _forward(self) -> None:
        tokens: list[int] = []
        sequences: list[int] = []
        want_logits = bytearray()
        for branch in self._branches:
            tokens += branch.feed
            sequences += [branch.sequence] * len(branch.feed)
            want_logits += bytes(len(branch.feed) - 1) + b"\1"
        context, cache = self._engine.context, self._engine.prefix_cache
        try:
            context.forward(tokens, sequences, want_logits, deadline=self._deadline)
        except OutOfMemoryError:
            if not cache.clear():  # then there are pages to be had
                raise
            context.forward(tokens, sequences, want_logits, deadline=self._deadline)
        for branch in self._branches:
            branch.held += branch.feed
            branch.feed = ()

    def _sample(self) -> list[tuple[Sample, Piece]]:
        pieces: list[tuple[Sample, Piece]] = []
        branches: list[Branch] = []
        for row, branch in enumerate(self._branches):
            with memoryview(self._engine.context.logits(row)) as logits:
                for sample in branch.samples:
                    pieces.append((sample, sample.advance(logits)))
            branches += self._split(branch)
        self._branches = branches
        return pieces

    def _split(self, branch: Branch) -> list[Branch]:
        """One branch for each sample that goes on. The first keeps the sequence, the others fork it."""
        going_on = [sample for sample in branch.samples if sample.finish_reason is None]
        if not going_on:
            self._engine.prefix_cache.put(branch.held, branch.sequence)
            return []
        context = self._engine.context
        branches = [
            Branch(
                context.sequence_fork(branch.sequence, len(branch.held)),
                list(branch.held),
                sample.tokens[-1:],
                [sample],
            )
            for sample in going_on[1:]
        ]
        branch.samples, branch.feed = going_on[:1], going_on[0].tokens[-1:]
        return [branch, *branches]

    def _abandon(self) -> list[Sample]:
        """Let go of everything unfinished and return its samples. What was computed stays useful to later prompts."""
        unfinished = [sample for branch in self._branches for sample in branch.samples]
        unfinished += [sample for group in self._waiting for sample in group]
        for branch in self._branches:
            self._engine.prefix_cache.put(branch.held, branch.sequence)
        self._branches.clear()
        self._waiting.clear()
        return unfinished
