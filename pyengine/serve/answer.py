"""What chat and text completions have in common: a request for outputs, and its answer, whole or streamed."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pyengine.serve import beams, payload, work
from pyengine.serve.beams import Beams
from pyengine.serve.exchange import Exchange, dumps, event
from pyengine.serve.sampling import Asked, told_of_output
from pyengine.serve.stream import StreamOptions

if TYPE_CHECKING:
    from pyengine.results import BeamHypothesis, Generation, Piece, TokenLogprob
    from pyengine.run.beam_search import BeamSearch
    from pyengine.run.jobs import Job
    from pyengine.run.request import GenerationRequest, Request
    from pyengine.sampling import SamplingParams
    from pyengine.serve.app import App
    from pyengine.serve.models import ServedModel


@dataclass(kw_only=True)
class Call(ABC):
    """A request that was understood.

    stream  None if its answer is wanted whole
    asked   where params.structured_outputs comes from
    beams   None if its outputs are sampled
    """

    model: ServedModel
    params: SamplingParams
    stream: StreamOptions | None
    cache_salt: str | None
    id: str
    asked: Asked = ()
    beams: Beams | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    kind: ClassVar[str]  # of answers, as OpenAI calls them
    chunk_kind: ClassVar[str]

    @abstractmethod
    def make(self, job: Job) -> Sequence[Request]:
        """The requests for the engine; in a thread."""

    @property
    def given(self) -> Sequence[Sized]:
        """Texts and token ids that `make` reads, where their number has no bound."""
        return ()

    @abstractmethod
    def choice(self, index: int) -> Choice:
        """The index-th output, before its first token."""

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": payload.FINGERPRINT,
        }

    def requests(self, job: Job, prompts: Sequence[list[int]], **options: Any) -> Sequence[Request]:
        """For the engine, of prompts as token ids."""
        engine = self.model.engine
        with told_of_output(engine, self.asked):
            if self.beams is not None:
                return self.beams.requests(self.model, job, prompts, self.params, cache_salt=self.cache_salt, **options)
            return engine.requests(
                job,
                prompts,
                engine.resolve(self.params),
                adapter=self.model.adapter,
                cache_salt=self.cache_salt,
                interactive=self.stream is not None,
                **options,
            )

    def said(self, pieces: Sequence[Piece]) -> list[TokenLogprob] | None:
        """Log-probabilities of the tokens that are part of the text; None if none are wanted."""
        if self.params.logprobs is None:
            return None
        ends = (*self.model.engine.eos_token_ids, *(self.params.stop_token_ids or ()))
        return payload.said(pieces, ends)


class Choice(ABC):
    """One output on its way into an answer. Parts are what stands in `choices` beside index and reasons."""

    last: ClassVar[dict[str, Any]]  # the part of a stream's last chunk, which has the reasons

    @abstractmethod
    def whole(self, text: str, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The part of an answer that is whole; pieces: none of a beam."""

    def begin(self) -> list[dict[str, Any]]:
        """Parts of a stream before its first token."""
        return []

    @abstractmethod
    def push(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """Parts of a stream."""

    def finish_reason(self, result: Generation | BeamHypothesis) -> str:
        return payload.finish_reason(result)


async def answer(app: App, exchange: Exchange, call: Call) -> None:
    async with app.job(exchange, call.model, call.make, call.params, call.given) as job:
        if call.beams is not None:
            await app.finish(exchange, call.model, job)
            searches = work.searches(job)
            n_tokens = sum(search.timings.generated_tokens for search in searches)
            body = await work.unless_short(work.LONG + 1, n_tokens, lambda: dumps(_found(call, searches)))
            await exchange.reply(200, body, b"application/json")
        elif call.stream is None:
            requests = await app.finish(exchange, call.model, job)
            body = await work.made_of(requests, lambda: dumps(_whole(call, requests)))
            await exchange.reply(200, body, b"application/json")
        else:
            await _stream(app, exchange, call, job)


def _reasons(choice: Choice, result: Generation | BeamHypothesis) -> dict[str, Any]:
    return {"finish_reason": choice.finish_reason(result), "stop_reason": payload.stop_reason(result)}


def _whole(call: Call, requests: list[GenerationRequest]) -> dict[str, Any]:
    choices = []
    for index, request in enumerate(requests):
        choice = call.choice(index)
        part = choice.whole(request.result.text, request.output.pieces)
        choices.append({"index": index, **part, **_reasons(choice, request.result)})
    return {
        **call.head(call.kind),
        "choices": choices,
        "usage": payload.usage(requests),
        "timings": payload.timings(requests[0].result.timings),
        "seed": requests[0].result.seed,
    }


def _found(call: Call, searches: list[BeamSearch]) -> dict[str, Any]:
    """The answer of searches. A prompt has `n` indices, also where fewer beams were found."""
    choices = []
    for number, search in enumerate(searches):
        for index, beam in enumerate(search.results, number * (call.params.n or 1)):
            choice = call.choice(index)
            scores = {"cumulative_logprob": beam.cumulative_logprob, "score": beam.score}
            choices.append({"index": index, **choice.whole(beam.text, ()), **_reasons(choice, beam), **scores})
    return {
        **call.head(call.kind),
        "choices": choices,
        "usage": beams.usage(searches),
        "timings": payload.timings(searches[0].timings),
    }


async def _stream(app: App, exchange: Exchange, call: Call, job: Job) -> None:
    assert call.stream is not None
    choices = [call.choice(index) for index in range(len(work.generations(job)))]
    head = call.head(call.chunk_kind)
    so_far = None
    if call.stream.include_usage:
        head["usage"] = None  # in every chunk but the last
    if call.stream.continuous_usage_stats:
        head["usage"] = so_far = payload.begun_usage(work.generations(job))

    def chunk(index: int, part: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": index, "logprobs": None, "finish_reason": None, **part}
        return event({**head, "choices": [choice], **more})

    def part(index: int, pieces: list[Piece]) -> bytes:
        choice, result = choices[index], pieces[-1].result
        if so_far is not None:
            n_tokens = sum(piece.token is not None for piece in pieces)
            so_far["completion_tokens"] += n_tokens
            so_far["total_tokens"] += n_tokens
        out = b"".join(chunk(index, one) for one in choice.push(pieces))
        if result is not None:
            last = {**choice.last, **_reasons(choice, result)}
            out += chunk(index, last, timings=payload.timings(result.timings), seed=result.seed)
        return out

    first = b"".join(chunk(index, one) for index, choice in enumerate(choices) for one in choice.begin())
    requests = await app.stream(exchange, call.model, job, first, part)
    last = b""
    if call.stream.include_usage:
        last = event({**head, "choices": [], "usage": payload.usage(requests)})
    await exchange.end(last + b"data: [DONE]\n\n")
