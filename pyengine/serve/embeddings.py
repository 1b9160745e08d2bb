"""/v1/embeddings: one vector for each input."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyengine.serve.errors import bad_request, told_of
from pyengine.serve.exchange import Exchange, dumps
from pyengine.serve.fields import STRING, Fields, Table, integer, needed, one_of
from pyengine.serve.prompts import CALLER, PROMPTS, note_user, prompts_of
from pyengine.serve.rows import RowsCall, checked_number

if TYPE_CHECKING:
    from pyengine.embeddings import Pooled
    from pyengine.engine import Prompt
    from pyengine.run.jobs import Job
    from pyengine.run.request import RowsRequest
    from pyengine.serve.app import App
    from pyengine.serve.models import ServedModel

# What others call the inputs of a search, and the prompts that models have for them.
_INPUT_TYPES = {
    "search_query": ("query",),
    "search_document": ("document", "passage"),
    "passage": ("document",),
    "document": ("passage",),
}


@dataclass
class EmbeddingsCall(RowsCall):
    """A request that was understood."""

    model: ServedModel
    prompts: list[Prompt]
    pooling: str | None
    is_base64: bool
    dimensions: int | None
    cache_salt: str | None
    prompt_name: str | None = None
    pooled: list[Pooled] = field(default_factory=list)

    def make_rows(self, job: Job) -> Sequence[RowsRequest]:
        with told_of("input"):
            self.pooled, requests = self.model.engine.embed_requests(
                job,
                self.prompts,
                pooling=self.pooling,
                prompt_name=self.prompt_name,
                parse_special=False,
                adapter=self.model.adapter,
                cache_salt=self.cache_salt,
            )
        return requests

    @property
    def n_tokens(self) -> int:
        return sum(len(one.tokens) for one in self.pooled)

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
                **self.counts(),
            }
        )


FIELDS: Table = {
    "input": needed(PROMPTS),
    **CALLER,
    "encoding_format": one_of("float", "base64", default="float"),
    "dimensions": integer(1),
    "pooling": one_of("mean", "last"),
    "input_type": STRING,
    "prompt_name": STRING,
}


def most_dimensions(dimensions: int | None, model: ServedModel) -> int | None:
    """`dimensions`, if the model's vectors have so many. Raises HTTPError."""
    dim = model.engine.config["dim"]
    if dimensions is not None and dimensions > dim:
        raise bad_request(f"dimensions is {dimensions}, the vectors of {model.name} have {dim}", "dimensions")
    return dimensions


def _prompt_name(fields: Fields, model: ServedModel) -> str | None:
    """Which of the model's prompts is asked for, by its name or by what the inputs are. Raises HTTPError."""
    from pyengine.embeddings import known_prompts

    name: str | None = fields.take("prompt_name")
    kind: str | None = fields.take("input_type")
    if kind is None:
        return name  # the engine knows which there are
    if name is not None:
        raise bad_request("prompt_name and input_type say the same; give one", "input_type")
    known = known_prompts(model.engine.config.get("extra", {}))
    found = next((one for one in (kind, *_INPUT_TYPES.get(kind, ())) if one in known), None)
    if found is None:
        listed = ", ".join(known) or "none; leave it out"
        raise bad_request(f"{model.name} has no prompt for input_type {kind[:80]!r}; its prompts are: {listed}", "input_type")
    return found


def parse(app: App, exchange: Exchange, fields: Fields) -> EmbeddingsCall:
    """Every field is honoured or refused by name. Raises HTTPError."""
    model = app.models.get(fields.take("model"))
    prompts = prompts_of(fields.take("input"), model)
    checked_number(len(prompts), "input")
    is_base64 = fields.take("encoding_format") == "base64"
    dimensions = most_dimensions(fields.take("dimensions"), model)
    note_user(exchange, fields)
    salt = app.cache_salt(exchange, fields)
    name = _prompt_name(fields, model)
    call = EmbeddingsCall(model, prompts, fields.take("pooling"), is_base64, dimensions, salt, name)
    fields.end()
    return call


async def embeddings(app: App, exchange: Exchange) -> None:
    call = parse(app, exchange, await app.fields(exchange, FIELDS))
    async with app.job(exchange, call.model, call.make) as job:
        await call.finish(app, exchange, job)
    await exchange.reply(200, await asyncio.to_thread(call.body), b"application/json")
