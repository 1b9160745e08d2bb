"""Documents, ordered by how well they answer a query: one prompt for each (text/rerank.py), and of its last logits two.

All documents of a call share the batch, and their prompts' common beginning, which is computed once: the first document's request
keeps its keys and values, and the others wait for them. A document's score does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pyengine._sampler import exp
from pyengine.arguments import INT32_MAX, boolean, integer, shown
from pyengine.errors import ContextFullError, InvalidArgumentError
from pyengine.results import RankedDocument
from pyengine.run.request import Caller, RowsRequest
from pyengine.run.stream import run_all
from pyengine.scoring import Scoring


class Ranking:
    """Scores of documents in the making.

    n_tokens  of each document's prompt
    """

    def __init__(self, documents: Sequence[str], true_id: int, false_id: int | None) -> None:
        self._documents = documents
        self._tokens = true_id, false_id
        self._scores = [0.0] * len(documents)
        self.n_tokens: list[int] = []

    def take(self, index: int, _: int, logits: memoryview) -> None:
        """The logits (vocab_size) behind a document's prompt."""
        true_id, false_id = self._tokens
        odds = logits[true_id] - (0.0 if false_id is None else logits[false_id])
        rest = exp(-abs(odds))
        self._scores[index] = 1.0 / (1.0 + rest) if odds >= 0 else rest / (1.0 + rest)

    def results(self, top_n: int | None = None) -> list[RankedDocument]:
        """Once all are taken: the best first, of equal ones the one that was named first; top_n of them, None = all."""
        order = sorted(range(len(self._scores)), key=lambda index: -self._scores[index])
        return [RankedDocument(index, self._scores[index], self._documents[index]) for index in order[:top_n]]


class Reranking(Scoring):
    """The part of an `Engine` that ranks."""

    def rerank_requests(
        self,
        caller: Caller,
        query: str,
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        max_tokens_per_doc: int | None = None,
        truncate: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> tuple[Ranking, list[RowsRequest]]:
        """Scores in the making, and what completes them when it is computed. Raises what `rerank` raises."""
        _check_texts(query, documents, instruction)
        if max_tokens_per_doc is not None:
            integer("max_tokens_per_doc", max_tokens_per_doc, 1, INT32_MAX)
        boolean("truncate", truncate)
        reranker = self.reranker
        ranking = Ranking(list(documents), reranker.true_id, reranker.false_id)
        requests: list[RowsRequest] = []
        for index, document in enumerate(documents):
            try:
                ids = reranker.ids(
                    query, document, instruction, n_ctx=self.n_ctx, max_tokens=max_tokens_per_doc, truncate=truncate
                )
            except ContextFullError as error:
                raise ContextFullError(f"documents[{index}]: {error}") from None
            ranking.n_tokens.append(len(ids))
            requests += self.rows_requests(
                caller,
                ids,
                [len(ids) - 1],
                partial(ranking.take, index),
                adapter=adapter,
                cache_salt=cache_salt,
                keep=index == 0,
            )
        return ranking, requests

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        top_n: int | None = None,
        max_tokens_per_doc: int | None = None,
        truncate: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> list[RankedDocument]:
        """Documents, the ones that answer `query` best first, each with its place in `documents` and its score: the probability
        of yes where the model may say yes or no. Of equal ones the first named comes first.

        instruction         what the query is for; None = to retrieve passages that answer a web search query
        top_n               so many of them; None = all
        max_tokens_per_doc  so much of each document is read; None = all
        truncate            and as much as fits the context, instead of an error
        Models: Qwen3-Reranker and those whose files sentence-transformers made of a causal model (docs/models.md); any chat model
        may be asked. A score does not depend on the other documents. Raises InvalidArgumentError if the model cannot be asked,
        with what is missing, ContextFullError for a document that does not fit, TemplateError, NotFiniteError."""
        top_n = checked_top_n(top_n)
        caller = Caller()
        ranking, requests = self.rerank_requests(
            caller,
            query,
            documents,
            instruction=instruction,
            max_tokens_per_doc=max_tokens_per_doc,
            truncate=truncate,
            adapter=adapter,
            cache_salt=cache_salt,
        )
        run_all(self._scheduler, requests)
        return ranking.results(top_n)


def checked_top_n(top_n: object) -> int | None:
    """Raises InvalidArgumentError for what is no number of documents."""
    return None if top_n is None else integer("top_n", top_n, 1, INT32_MAX)


def _check_texts(query: object, documents: object, instruction: object) -> None:
    if not isinstance(query, str):
        raise InvalidArgumentError(f"query must be text, not {shown(query)}")
    if instruction is not None and not isinstance(instruction, str):
        raise InvalidArgumentError(f"instruction must be text, not {shown(instruction)}")
    if not isinstance(documents, (list, tuple)) or not all(isinstance(document, str) for document in documents):
        raise InvalidArgumentError(f"documents is a list of texts, not {shown(documents)}")
