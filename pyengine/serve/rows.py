"""What embeddings and rankings share: requests that take rows of texts, and are done when all have them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyengine.serve import payload, work
from pyengine.serve.errors import bad_request

if TYPE_CHECKING:
    from pyengine.run.jobs import Job
    from pyengine.run.request import Request, RowsRequest
    from pyengine.serve.app import App
    from pyengine.serve.exchange import Exchange
    from pyengine.serve.models import ServedModel

MAX_INPUTS = 2048  # as OpenAI's


def checked_number(n: int, field: str) -> None:
    """Raises HTTPError for more texts than a request may have: each is a sequence of its own."""
    if n > MAX_INPUTS:
        raise bad_request(f"{n} {field if field.endswith('s') else f'{field}s'}, at most {MAX_INPUTS}", field)


class RowsCall(ABC):
    """A request that was understood. seconds: from its start in the engine to the last row."""

    model: ServedModel
    requests: Sequence[RowsRequest] = ()
    started: float = 0.0
    seconds: float = 0.0

    def make(self, job: Job) -> Sequence[Request]:
        """The requests for the engine; in a thread."""
        self.started = time.monotonic()
        self.requests = self.make_rows(job)
        return self.requests

    @abstractmethod
    def make_rows(self, job: Job) -> Sequence[RowsRequest]:
        """Raises HTTPError."""

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """Of all texts."""

    @property
    def n_cached(self) -> int:
        return sum(request.n_cached for request in self.requests)

    async def finish(self, app: App, exchange: Exchange, job: Job) -> None:
        """Wait for all rows, and count what they took. Raises the first error of one of its requests."""
        await work.finish(job)
        self.seconds = time.monotonic() - self.started
        app.metrics.note_prompt(self.model.name, self.n_tokens, self.n_cached)
        exchange.notes["prompt"], exchange.notes["cached"] = self.n_tokens, self.n_cached

    def counts(self) -> dict[str, Any]:
        """What an answer says of the work."""
        return {
            "usage": {"prompt_tokens": self.n_tokens, "total_tokens": self.n_tokens},
            "timings": payload.prompt_timings(self.n_cached, self.n_tokens - self.n_cached, self.seconds),
        }
