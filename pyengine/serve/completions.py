"""/v1/completions: prompts as they are, several at a time if need be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyengine.async_engine import Job
from pyengine.engine import Prompt
from pyengine.results import Piece
from pyengine.run.request import GenerationRequest, Request
from pyengine.serve import payload
from pyengine.serve.errors import bad_request
from pyengine.serve.exchange import Exchange, event
from pyengine.serve.fields import Fields
from pyengine.serve.models import ServedModel
from pyengine.serve.prompts import note_user, prompts_of
from pyengine.serve.sampling import checked, sampling_params
from pyengine.serve.stream import StreamOptions, stream_options

if TYPE_CHECKING:
    from pyengine.sampling import SamplingParams
    from pyengine.serve.app import App

MAX_PROMPTS = 1024


@dataclass
class CompletionCall:
    """A request that was understood. echo_only: nothing is generated, the prompts alone come back (max_tokens 0)."""

    model: ServedModel
    prompts: list[Prompt]
    params: SamplingParams
    echo: bool
    echo_only: bool
    stream: StreamOptions | None
    cache_salt: str | None
    id: str = field(default_factory=lambda: payload.new_id("cmpl-"))
    created: int = field(default_factory=lambda: int(time.time()))
    ids: list[list[int]] = field(default_factory=list)  # of each prompt
    # of each prompt's tokens: (token, its log-probability, the most probable ones)
    prompt_logprobs: list[list[tuple[int, float | None, Sequence[tuple[int, float]]]]] = field(default_factory=list)

    def make(self, job: Job) -> Sequence[Request]:
        """The requests for the engine; in a thread. Log-probabilities of prompts come first."""
        engine = self.model.engine
        resolved = engine.resolve(self.params)
        requests: list[Request] = []
        for prompt in self.prompts:
            ids = engine.prompt_ids(prompt)
            self.ids.append(ids)
            if self.echo and self.params.logprobs is not None:
                requests += self._score(job, ids, self.params.logprobs)
        if not self.echo_only:
            requests += engine.requests(
                job, self.ids, resolved, cache_salt=self.cache_salt, interactive=self.stream is not None
            )
        return requests

    def _score(self, job: Job, ids: list[int], n_top: int) -> Sequence[Request]:
        from pyengine._sampler import logprobs

        entries: list[tuple[int, float | None, Sequence[tuple[int, float]]]] = [(token, None, ()) for token in ids]
        self.prompt_logprobs.append(entries)

        def take(position: int, logits: memoryview) -> None:
            token = ids[position + 1]
            entries[position + 1] = (token, *logprobs(logits, token, n_top))

        positions = list(range(len(ids) - 1))
        return self.model.engine.rows_requests(job, ids, positions, take, cache_salt=self.cache_salt)

    def head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": payload.FINGERPRINT,
        }

    def prompt_text(self, number: int) -> str:
        prompt = self.prompts[number]
        return prompt if isinstance(prompt, str) else self.model.engine.detokenize(prompt, skip_special_tokens=False)


def parse(app: App, exchange: Exchange, fields: Fields) -> CompletionCall:
    """Every field is honoured or refused by name. Raises HTTPError."""
    model = app.models.get(fields.string("model"))
    prompts = prompts_of(fields, "prompt", model)
    echo = fields.boolean("echo")
    given: dict[str, Any] = {}
    echo_only = False
    max_tokens = fields.integer("max_tokens", least=0)
    if max_tokens == 0:
        if not echo:
            raise bad_request("max_tokens is 0, which asks for nothing unless echo is true", "max_tokens")
        if fields.take("stream"):
            raise bad_request("max_tokens is 0: there is nothing to stream", "stream")
        echo_only = True
    elif max_tokens is not None:
        given["max_tokens"] = checked("max_tokens", "max_tokens", max_tokens)
    logprobs = fields.integer("logprobs", least=0)
    if logprobs is not None:
        given["logprobs"] = checked("logprobs", "logprobs", logprobs)
    stream = stream_options(fields)
    salt = app.cache_salt(exchange, fields)
    fields.refuse("suffix", "these models do not fill in the middle", "")
    fields.refuse("best_of", "samples are not ranked; use n", 1)
    fields.refuse("store", "nothing is stored here", False)
    note_user(exchange, fields)
    params = sampling_params(fields, model, given)
    fields.end()
    if len(prompts) * (params.n or 1) > MAX_PROMPTS:
        raise bad_request(
            f"{len(prompts)} prompts and n = {params.n or 1} are more than {MAX_PROMPTS} outputs", "prompt"
        )
    return CompletionCall(model, prompts, params, echo, echo_only, stream, salt)


async def completions(app: App, exchange: Exchange) -> None:
    call = parse(app, exchange, await app.fields(exchange))
    exchange.notes["model"] = call.model.name
    job = await app.queue.submit(call.model, call.make)
    try:
        if call.stream is None:
            await exchange.reply_json(_whole(call, await app.finish(exchange, call.model, job)))
        else:
            await _stream(app, exchange, call, job)
    finally:
        job.close()


def _whole(call: CompletionCall, requests: list[GenerationRequest]) -> dict[str, Any]:
    if call.echo_only:
        n = sum(map(len, call.ids))
        choices = [_echo(call, number) for number in range(len(call.prompts))]
        return {
            **call.head(),
            "choices": choices,
            "usage": {"prompt_tokens": n, "completion_tokens": 0, "total_tokens": n},
        }
    return {
        **call.head(),
        "choices": [_choice(call, index, request) for index, request in enumerate(requests)],
        "usage": payload.usage(requests),
        "timings": payload.timings(requests[0].result),
        "seed": requests[0].result.seed,
    }


def _echo(call: CompletionCall, number: int) -> dict[str, Any]:
    return {
        "index": number,
        "text": call.prompt_text(number),
        "logprobs": _logprobs(call, number, []),
        "finish_reason": "length",
    }


def _choice(call: CompletionCall, index: int, request: GenerationRequest) -> dict[str, Any]:
    result = request.result
    number = index // (call.params.n or 1)
    return {
        "index": index,
        "text": (call.prompt_text(number) if call.echo else "") + result.text,
        "logprobs": _logprobs(call, number, request.output.pieces),
        "finish_reason": payload.finish_reason(result),
        "stop_reason": payload.stop_reason(result),
    }


def _logprobs(
    call: CompletionCall, number: int, pieces: Sequence[Piece], *, offset: int = 0, with_prompt: bool = True
) -> dict[str, Any] | None:
    if call.params.logprobs is None:
        return None
    engine = call.model.engine
    ends = (*engine.eos_token_ids, *(call.params.stop_token_ids or ()))
    entries = [(one.token, one.logprob, one.top) for one in payload.said(pieces, ends)]
    before = call.prompt_logprobs[number] if call.echo and with_prompt else []
    if before and isinstance(call.prompts[number], str) and before[0][0] == engine.tokenizer.bos_id:
        offset -= len(payload.token_string(engine.tokenizer, before[0][0]))  # a token that the text does not spell
    return payload.text_logprobs([*before, *entries], engine.tokenizer, offset)


async def _stream(app: App, exchange: Exchange, call: CompletionCall, job: Job) -> None:
    assert call.stream is not None
    n = call.params.n or 1
    head = call.head()
    if call.stream.include_usage:
        head["usage"] = None
    offsets: dict[int, int] = {}  # characters of each choice so far
    echoed: set[int] = set()

    def chunk(index: int, text: str, logprobs: Any = None, **more: Any) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None, **more}
        return event({**head, "choices": [choice]})

    def echo(index: int) -> bytes:
        """The prompt, before the first token of a choice: its log-probabilities are known by then."""
        echoed.add(index)
        text = call.prompt_text(index // n)
        offsets[index] = len(text)
        return chunk(index, text, _logprobs(call, index // n, []))

    def part(index: int, pieces: list[Piece]) -> bytes:
        out = echo(index) if call.echo and index not in echoed else b""
        text = "".join(piece.text for piece in pieces)
        offset = offsets.get(index, 0)
        logprobs = _logprobs(call, index // n, pieces, offset=offset, with_prompt=False)
        offsets[index] = offset + len(text)
        result = pieces[-1].result
        if text or (logprobs is not None and logprobs["tokens"]):
            out += chunk(index, text, logprobs)
        if result is not None:
            reasons = {"finish_reason": payload.finish_reason(result), "stop_reason": payload.stop_reason(result)}
            end = {**head, "choices": [{"index": index, "text": "", "logprobs": None, **reasons}]}
            out += event({**end, "timings": payload.timings(result), "seed": result.seed})
        return out

    requests = await app.stream(exchange, call.model, job, b"", part)
    last = event({**head, "choices": [], "usage": payload.usage(requests)}) if call.stream.include_usage else b""
    await exchange.end(last + b"data: [DONE]\n\n")
