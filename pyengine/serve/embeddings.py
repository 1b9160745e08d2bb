"""/v1/embeddings: one vector for each input."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyengine.serve import payload, work
from pyengine.serve.errors import bad_request, told_of
from pyengine.serve.exchange import Exchange, dumps
from pyengine.serve.fields import Fields, Table, integer, needed, one_of
from pyengine.serve.prompts import CALLER, PROMPTS, note_user, prompts_of

if TYPE_CHECKING:
    from pyengine.embeddings import Pooled
    from pyengine.engine import Prompt
    from pyengine.run.jobs import Job
    from pyengine.run.request import Request, RowsRequest
    from pyengine.serve.app import App
    from pyengine.serve.models import ServedModel

MAX_INPUTS = 2048  # as OpenAI's


@dataclass
class EmbeddingsCall:
    """A request that was understood.

    seconds  from its start in the engine to the last vector
    """

    model: ServedModel
    prompts: list[Prompt]
    pooling: str | None
    is_base64: bool
    dimensions: int | None
    cache_salt: str | None
    pooled: list[Pooled] = field(default_factory=list)
    requests: Sequence[RowsRequest] = ()
    started: float = 0.0
    seconds: float = 0.0

    def make(self, job: Job) -> Sequence[Request]:
        """The requests for the engine; in a thread."""
        self.started = time.monotonic()
        with told_of("input"):
            self.pooled, self.requests = self.model.engine.embed_requests(
                job,
                self.prompts,
                pooling=self.pooling,
                parse_special=False,
                adapter=self.model.adapter,
                cache_salt=self.cache_salt,
            )
        return self.requests

    async def finish(self, app: App, exchange: Exchange, job: Job) -> None:
        """Wait for all vectors, and count what they took. Raises the first error of one of its requests."""
        await work.finish(job)
        self.seconds = time.monotonic() - self.started
        app.metrics.note_prompt(self.model.name, self.n_tokens, self.n_cached)
        exchange.notes["prompt"], exchange.notes["cached"] = self.n_tokens, self.n_cached

    @property
    def n_tokens(self) -> int:
        return sum(len(one.tokens) for one in self.pooled)

    @property
    def n_cached(self) -> int:
        return sum(request.n_cached for request in self.requests)

    def values(self) -> list[Any]:
        """A vector for each prompt, as JSON has it; in a thread, since many vectors are long."""
        from pyengine.embeddings import vectors

        rows = vectors(self.pooled, normalize=True, dimensions=self.dimensions)
        return [
            base64.b64encode(row.astype("<f4").tobytes()).decode() if self.is_base64 else row.tolist() for row in rows
        ]

    def body(self) -> bytes:
        """The answer; in a thread."""
        return dumps(
            {
                "object": "list",
                "data": [{"object": "embedding", "index": i, "embedding": one} for i, one in enumerate(self.values())],
                "model": self.model.name,
                "usage": {"prompt_tokens": self.n_tokens, "total_tokens": self.n_tokens},
                "timings": payload.prompt_timings(self.n_cached, self.n_tokens - self.n_cached, self.seconds),
            }
        )


FIELDS: Table = {
    "input": needed(PROMPTS),
    **CALLER,
    "encoding_format": one_of("float", "base64", default="float"),
    "dimensions": integer(1),
    "pooling": one_of("mean", "last"),
}


def most_dimensions(dimensions: int | None, model: ServedModel) -> int | None:
    """`dimensions`, if the model's vectors have so many. Raises HTTPError."""
    dim = model.engine.config["dim"]
    if dimensions is not None and dimensions > dim:
        raise bad_request(f"dimensions is {dimensions}, the vectors of {model.name} have {dim}", "dimensions")
    return dimensions


def checked_number(n: int) -> None:
    """Raises HTTPError for more inputs than a request may have: each is a sequence of its own."""
    if n > MAX_INPUTS:
        raise bad_request(f"{n} inputs, at most {MAX_INPUTS}", "input")


def parse(app: App, exchange: Exchange, fields: Fields) -> EmbeddingsCall:
    """Every field is honoured or refused by name. Raises HTTPError."""
    model = app.models.get(fields.take("model"))
    prompts = prompts_of(fields.take("input"), model)
    checked_number(len(prompts))
    is_base64 = fields.take("encoding_format") == "base64"
    dimensions = most_dimensions(fields.take("dimensions"), model)
    note_user(exchange, fields)
    salt = app.cache_salt(exchange, fields)
    call = EmbeddingsCall(model, prompts, fields.take("pooling"), is_base64, dimensions, salt)
    fields.end()
    return call


async def embeddings(app: App, exchange: Exchange) -> None:
    call = parse(app, exchange, await app.fields(exchange, FIELDS))
    async with app.job(exchange, call.model, call.make, given=call.prompts) as job:
        await call.finish(app, exchange, job)
    await exchange.reply(200, await asyncio.to_thread(call.body), b"application/json")
