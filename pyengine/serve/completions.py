"""/v1/completions: prompts as they are, several at a time if need be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pyengine.arguments import INT32_MAX
from pyengine.engine import Prompt
from pyengine.errors import InvalidArgumentError
from pyengine.results import Piece
from pyengine.run.jobs import Job
from pyengine.run.request import Request
from pyengine.serve import neutral, payload
from pyengine.serve.answer import Call, Choice, answer
from pyengine.serve.beams import BEAMS, beams_of
from pyengine.serve.errors import bad_request, told_of
from pyengine.serve.exchange import Exchange
from pyengine.serve.fields import BOOLEAN, STRING, Fields, Table, integer, needed
from pyengine.serve.prompts import CALLER, PROMPTS, note_user, prompts_of
from pyengine.serve.sampling import SAMPLING, asked_by, parameter, sampling_params
from pyengine.serve.stream import STREAM, stream_options

if TYPE_CHECKING:
    from pyengine.serve.app import App

MAX_PROMPTS = 1024


@dataclass(kw_only=True)
class CompletionCall(Call):
    """echo_only     nothing is generated, the prompts alone come back (max_tokens 0)
    suffix        what follows a hole, and a prompt is the text before it; None: prompts go on
    suffix_field  where the request has it
    files         (name, text) of other files that help to fill the hole

    Raises HTTPError if there is a suffix and the model does not fill in the middle."""

    prompts: list[Prompt]
    echo: bool = False
    echo_only: bool = False
    suffix: str | None = None
    suffix_field: str = "suffix"
    files: list[tuple[str, str]] = field(default_factory=list)
    id: str = field(default_factory=lambda: payload.new_id("cmpl-"))
    kind = chunk_kind = "text_completion"
    ids: list[list[int]] = field(default_factory=list)  # of each prompt
    # of each prompt's tokens: (token, its log-probability, the most probable ones)
    prompt_logprobs: list[list[tuple[int, float | None, Sequence[tuple[int, float]]]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.suffix is not None:
            with told_of(self.suffix_field):
                self.params = self.model.engine.infill_params(self.params)

    def make(self, job: Job) -> Sequence[Request]:
        """The requests for the engine; in a thread. Log-probabilities of prompts come first."""
        requests: list[Request] = []
        for prompt in self.prompts:
            with told_of("prompt" if self.suffix is None else self.suffix_field):
                ids = self._prompt_ids(prompt)
            self.ids.append(ids)
            if self.echo and self.params.logprobs is not None:
                requests += self._score(job, ids, self.params.logprobs)
        if not self.echo_only:
            requests += self.requests(job, self.ids)
        return requests

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        engine = self.model.engine
        if self.suffix is None:
            return engine.prompt_ids(prompt)
        if not isinstance(prompt, str):
            raise InvalidArgumentError(f"with {self.suffix_field} a prompt is text, not token ids")
        return engine.infill_ids(prompt, self.suffix, files=self.files)

    def _score(self, job: Job, ids: list[int], n_top: int) -> Sequence[Request]:
        from pyengine._sampler import logprobs

        entries: list[tuple[int, float | None, Sequence[tuple[int, float]]]] = [(token, None, ()) for token in ids]
        self.prompt_logprobs.append(entries)

        def take(position: int, logits: memoryview) -> None:
            token = ids[position + 1]
            entries[position + 1] = (token, *logprobs(logits, token, n_top))

        positions = list(range(len(ids) - 1))
        engine, adapter = self.model.engine, self.model.adapter
        return engine.rows_requests(job, ids, positions, take, adapter=adapter, cache_salt=self.cache_salt)

    def choice(self, index: int) -> TextChoice:
        return TextChoice(self, index // (self.params.n or 1))

    def prompt_text(self, number: int) -> str:
        prompt = self.prompts[number]
        return prompt if isinstance(prompt, str) else self.model.engine.detokenize(prompt, skip_special_tokens=False)

    def logprobs(
        self, number: int, pieces: Sequence[Piece], *, offset: int = 0, with_prompt: bool = True
    ) -> dict[str, Any] | None:
        """Of a prompt, if it is echoed, and of an output. `offset`: characters before them."""
        said = self.said(pieces)
        if said is None:
            return None
        tokenizer = self.model.engine.tokenizer
        before = self.prompt_logprobs[number] if self.echo and with_prompt else []
        if before and isinstance(self.prompts[number], str) and before[0][0] == tokenizer.bos_id:
            offset -= len(payload.token_string(tokenizer, before[0][0]))  # a token that the text does not spell
        entries = [*before, *((one.token, one.logprob, one.top) for one in said)]
        return payload.text_logprobs(entries, tokenizer, offset)


class TextChoice(Choice):
    """An output of the number-th prompt."""

    last: ClassVar = {"text": ""}

    def __init__(self, call: CompletionCall, number: int) -> None:
        self._call = call
        self._number = number
        self._offset = 0  # characters so far
        self._must_echo = call.echo

    def whole(self, text: str, pieces: Sequence[Piece]) -> dict[str, Any]:
        before = self._call.prompt_text(self._number) if self._call.echo else ""
        return {"text": before + text, "logprobs": self._call.logprobs(self._number, pieces)}

    def push(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        parts = [self._echo()] if self._must_echo else []
        text = "".join(piece.text for piece in pieces)
        logprobs = self._call.logprobs(self._number, pieces, offset=self._offset, with_prompt=False)
        self._offset += len(text)
        if text or (logprobs is not None and logprobs["tokens"]):
            parts.append({"text": text, "logprobs": logprobs})
        return parts

    def _echo(self) -> dict[str, Any]:
        """The prompt, before the first token: its log-probabilities are known by then."""
        self._must_echo = False
        text = self._call.prompt_text(self._number)
        self._offset = len(text)
        return {"text": text, "logprobs": self._call.logprobs(self._number, [])}


FIELDS: Table = {
    "prompt": needed(PROMPTS),
    **CALLER,
    **STREAM,
    **SAMPLING,
    **BEAMS,
    "suffix": STRING,  # "": the prompt is continued, as without
    "echo": BOOLEAN,
    "max_tokens": integer(0, INT32_MAX),  # 0: the prompt alone comes back
    "logprobs": parameter("logprobs"),
    "token_healing": parameter("token_healing"),
    **neutral.COMPLETIONS,
    **neutral.OTHERS,
}


def parse(app: App, exchange: Exchange, fields: Fields) -> CompletionCall:
    """Every field is honoured or refused by name. Raises HTTPError."""
    model = app.models.get(fields.take("model"))
    prompts = prompts_of(fields.take("prompt"), model)
    beams = beams_of(fields, model)
    given: dict[str, Any] = {}
    suffix = fields.take("suffix") or None
    echo, stream, max_tokens = fields.take("echo"), stream_options(fields), fields.take("max_tokens")
    if echo and suffix is not None:
        raise bad_request("echo is not supported with suffix: what the model reads is more than the prompt", "echo")
    if max_tokens == 0:
        if not echo:
            raise bad_request("max_tokens is 0, which asks for nothing unless echo is true", "max_tokens")
        if stream is not None:
            raise bad_request("max_tokens is 0: there is nothing to stream", "stream")
        if beams is not None:
            raise bad_request("max_tokens is 0: there is nothing to search", "use_beam_search")
    elif max_tokens is not None:
        given["max_tokens"] = max_tokens
    if fields.has("logprobs"):
        given["logprobs"] = fields.take("logprobs")
    if fields.take("token_healing"):
        if given.get("logprobs") is not None:
            why = "its first tokens begin in the prompt"
            raise bad_request(f"token_healing is not supported with logprobs: {why}", "token_healing")
        given["token_healing"] = True
    note_user(exchange, fields)
    call = CompletionCall(
        model=model,
        stream=stream,
        cache_salt=app.cache_salt(exchange, fields),
        prompts=prompts,
        suffix=suffix,
        echo=echo,
        echo_only=max_tokens == 0,
        asked=asked_by(fields),
        beams=beams,
        params=sampling_params(fields, model, given),
    )
    fields.end()
    n = call.params.n or 1
    if len(prompts) * n > MAX_PROMPTS:
        raise bad_request(f"{len(prompts)} prompts and n = {n} are more than {MAX_PROMPTS} outputs", "prompt")
    return call


async def completions(app: App, exchange: Exchange) -> None:
    call = parse(app, exchange, await app.fields(exchange, FIELDS))
    if not call.echo_only:
        await answer(app, exchange, call)
        return
    async with app.job(exchange, call.model, call.make) as job:
        await app.finish(exchange, call.model, job)
        await exchange.reply_json(_echo_only(call))


def _echo_only(call: CompletionCall) -> dict[str, Any]:
    n = sum(map(len, call.ids))
    choices = [
        {
            "index": number,
            "text": call.prompt_text(number),
            "logprobs": call.logprobs(number, []),
            "finish_reason": "length",
        }
        for number in range(len(call.prompts))
    ]
    usage = {
        "prompt_tokens": n,
        "completion_tokens": 0,
        "total_tokens": n,
        "prompt_tokens_details": {"cached_tokens": 0},  # the logits of each are wanted
    }
    return {**call.head(call.kind), "choices": choices, "usage": usage}
