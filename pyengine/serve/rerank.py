"""/v1/rerank: documents by how well they answer a query, in the form that Jina, Cohere and vLLM share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyengine.arguments import INT32_MAX
from pyengine.serve import payload
from pyengine.serve.errors import bad_request, told_of
from pyengine.serve.exchange import Exchange, dumps
from pyengine.serve.fields import BOOLEAN, STRING, Fields, Kind, Table, integer, kind_of, needed, refused, schema_of
from pyengine.serve.prompts import CALLER, note_user
from pyengine.serve.rows import RowsCall, checked_number

if TYPE_CHECKING:
    from pyengine.reranking import Ranking
    from pyengine.run.jobs import Job
    from pyengine.run.request import RowsRequest
    from pyengine.serve.app import App
    from pyengine.serve.models import ServedModel

_DOCUMENT: Table = {"text": needed(STRING)}


def _read_documents(value: Any, path: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise bad_request(f"{path} must be a list of texts that is not empty, not {kind_of(value)}", path)
    return [_read_document(one, f"{path}[{i}]") for i, one in enumerate(value)]


def _read_document(value: Any, path: str) -> str:
    text: str = Fields(value, _DOCUMENT, path).take("text") if isinstance(value, dict) else STRING.read(value, path)
    return text


DOCUMENTS = Kind(
    {"type": "array", "items": {"anyOf": [STRING.schema, schema_of(_DOCUMENT)]}, "minItems": 1}, _read_documents
)
FIELDS: Table = {
    "query": needed(STRING),
    "documents": needed(DOCUMENTS),
    **CALLER,
    "instruction": STRING,
    "top_n": integer(0, INT32_MAX),  # 0: all, as vLLM has it
    "return_documents": BOOLEAN,
    "max_tokens_per_doc": integer(1, INT32_MAX),
    "truncate": BOOLEAN,
    "truncation": BOOLEAN,  # Jina's name of it
    # what clients of others send
    "truncate_prompt_tokens": refused("use max_tokens_per_doc or truncate"),
    "max_chunks_per_doc": refused("documents are read in one piece; use max_tokens_per_doc", 1),
    "rank_fields": refused("documents are texts", ["text"]),
    "use_activation": refused("a score is a probability", True),
    "priority": refused("requests have no priorities", 0),
}


@dataclass
class RerankCall(RowsCall):
    """A request that was understood."""

    model: ServedModel
    query: str
    documents: list[str]
    instruction: str | None
    top_n: int | None
    is_told: bool  # an answer has the documents, too
    max_tokens_per_doc: int | None
    truncate: bool
    cache_salt: str | None
    ranking: Ranking | None = None

    def make_rows(self, job: Job) -> Sequence[RowsRequest]:
        with told_of("model"):
            _ = self.model.engine.reranker
        with told_of("documents"):
            self.ranking, requests = self.model.engine.rerank_requests(
                job,
                self.query,
                self.documents,
                instruction=self.instruction,
                max_tokens_per_doc=self.max_tokens_per_doc,
                truncate=self.truncate,
                adapter=self.model.adapter,
                cache_salt=self.cache_salt,
            )
        return requests

    @property
    def given(self) -> list[str]:
        """What is read: the query and the instruction once for each document."""
        return [*self.documents, *[self.query, self.instruction or ""] * len(self.documents)]

    @property
    def n_tokens(self) -> int:
        return 0 if self.ranking is None else sum(self.ranking.n_tokens)

    def body(self) -> bytes:
        """The answer; in a thread."""
        assert self.ranking is not None
        results: list[dict[str, Any]] = []
        for one in self.ranking.results(self.top_n):
            told = {"document": {"text": one.document}} if self.is_told else {}
            results.append({"index": one.index, "relevance_score": one.score, **told})
        return dumps({"id": payload.new_id("rerank-"), "model": self.model.name, "results": results, **self.counts()})


def parse(app: App, exchange: Exchange, fields: Fields) -> RerankCall:
    """Every field is honoured or refused by name. Raises HTTPError."""
    model = app.models.get(fields.take("model"))
    documents = fields.take("documents")
    checked_number(len(documents), "documents")
    note_user(exchange, fields)
    call = RerankCall(
        model,
        fields.take("query"),
        documents,
        instruction=fields.take("instruction"),
        top_n=fields.take("top_n") or None,
        is_told=fields.take("return_documents"),
        max_tokens_per_doc=fields.take("max_tokens_per_doc"),
        truncate=any([fields.take("truncate"), fields.take("truncation")]),
        cache_salt=app.cache_salt(exchange, fields),
    )
    fields.end()
    if (n := sum(map(len, call.given))) > (most := app.settings.max_body_bytes):
        raise bad_request(
            f"the query is read for each document: {n:,} characters of {len(documents)} prompts, at most {most:,}; "
            "send fewer documents at once, or a shorter query",
            "documents",
        )
    return call


async def rerank(app: App, exchange: Exchange) -> None:
    call = parse(app, exchange, await app.fields(exchange, FIELDS))
    async with app.job(exchange, call.model, call.make, given=call.given) as job:
        await call.finish(app, exchange, job)
    await exchange.reply(200, await asyncio.to_thread(call.body), b"application/json")
