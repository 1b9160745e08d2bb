"""AsyncEngine: the engine for programs that run an event loop, over the jobs of `run/jobs.py`."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from pyengine.engine import Engine, Message, Prompt, holes_of, sampling_params
from pyengine.errors import InvalidArgumentError, PyEngineError
from pyengine.run.jobs import Job, Stepper
from pyengine.run.request import GenerationRequest, Request
from pyengine.text.prompts import is_batch

if TYPE_CHECKING:
    from concurrent.futures import Executor

    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Unpack  # typing's own from Python 3.11 on

    from pyengine.embeddings import Pooled
    from pyengine.reranking import Ranking
    from pyengine.results import BeamHypothesis, Generation, Piece, RankedDocument, Score
    from pyengine.run.beam_search import BeamSearch
    from pyengine.sampling import SamplingParams
    from pyengine.sampling_options import BeamOptions, SamplingOptions

T = TypeVar("T")

# asyncio.to_thread imports it when first called: too late for a fork under way, which would let go of a lock it has not taken.
importlib.import_module("concurrent.futures.thread")


class AsyncStream(AsyncIterator["Piece"]):
    """The pieces of one output, as they come, for one task at a time. Ends with `close`, with its last piece, with any exception
    (cancellation included), or when nobody holds it any more."""

    def __init__(self, engine: AsyncEngine, make: Callable[[Job], Sequence[GenerationRequest]]) -> None:
        self._engine = engine
        self._make = make
        self._job: Job | None = None
        self._is_closed = False
        self._is_read = False  # a task waits for a piece

    async def __anext__(self) -> Piece:
        if self._is_closed:
            raise StopAsyncIteration
        if self._is_read:
            raise PyEngineError("another task waits for the next piece of this stream")
        try:
            self._is_read = True
            if self._job is None:
                self._job = await self._engine.prepare(self._make)
                if self._is_closed:  # by another task
                    raise StopAsyncIteration
                self._engine.stepper.add(self._job)
            (request,) = self._job.requests
            assert isinstance(request, GenerationRequest)
            await self._job.wait(lambda: request.has_news)
            if self._is_closed:  # by another task
                raise StopAsyncIteration
            piece = request.take()
        except BaseException:
            self.close()
            raise
        finally:
            self._is_read = False
        if piece.result is not None:
            self.close()
        return piece

    def close(self) -> None:
        """End it; what is left is not computed. From any thread; waits for nothing."""
        self._is_closed = True
        if self._job is not None:
            self._job.close()

    async def aclose(self) -> None:
        """`close`, for contextlib.aclosing."""
        self.close()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class AsyncEngine:
    """An `Engine` whose methods are awaited. Any number of event loops, in any threads, may share one.

    model, options   as for Engine; or an Engine, which goes on working for synchronous callers, too

    Cancelling a task that waits here, or closing a stream, ends its computation at once, be it in the middle of a prompt.
    Results, parameters and exceptions are those of Engine.
    """

    def __init__(self, model: str | os.PathLike[str] | Engine | None = None, **options: Any) -> None:
        if isinstance(model, Engine) and options:
            raise InvalidArgumentError(f"an engine that is open has its options already ({', '.join(options)})")
        self._owned = not isinstance(model, Engine)
        self.engine = model if isinstance(model, Engine) else Engine(model, **options)
        self.stepper = Stepper(self.engine.scheduler)

    # ------------------------------------------------------------ jobs

    async def prepare(self, make: Callable[[Job], Sequence[Request]], executor: Executor | None = None) -> Job:
        """A job with the requests of make(job), not started. `make` runs in another thread, of `executor` or of the loop: it may
        tokenize a long text."""
        job = Job(self.stepper)
        job.requests = await job.loop.run_in_executor(executor, make, job)
        return job

    async def start(self, make: Callable[[Job], Sequence[Request]]) -> Job:
        """A job that is computed from now on."""
        job = await self.prepare(make)
        self.stepper.add(job)
        return job

    async def _run(self, make: Callable[[Job], Sequence[Request]]) -> Sequence[Request]:
        """The requests of make(job), done. Raises the first error of one of them."""
        job = await self.start(make)
        try:
            await job.wait(lambda: job.is_done)
        finally:
            job.close()
        for request in job.requests:
            if request.error is not None:
                raise request.error
        return job.requests

    # ------------------------------------------------------------ text

    @overload
    async def generate(  # type: ignore[overload-overlap]
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        parse_special: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation: ...
    @overload
    async def generate(
        self,
        prompt: Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        *,
        parse_special: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Generation]: ...
    async def generate(
        self,
        prompt: Prompt | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        *,
        parse_special: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | list[Generation]:
        """See Engine.generate."""
        chosen = sampling_params(params, options)
        many = is_batch(prompt)
        prompts: Any = prompt if many else [prompt]
        engine = self.engine

        def make(job: Job) -> Sequence[Request]:
            resolved = engine.resolve(chosen)
            ids = [engine.prompt_ids(item, parse_special=parse_special) for item in prompts]
            return engine.requests(job, ids, resolved, adapter=adapter, cache_salt=cache_salt)

        results = [one.result for one in await self._run(make) if isinstance(one, GenerationRequest)]
        return results if many or len(results) > 1 else results[0]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        parse_special: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """See Engine.stream. What a prompt is refused for is raised with the first piece: it is tokenized then."""
        return self._stream(
            lambda: self.engine.prompt_ids(prompt, parse_special=parse_special),
            sampling_params(params, options),
            adapter,
            cache_salt,
        )

    def _stream(
        self,
        ids: Callable[[], list[int]],
        params: SamplingParams,
        adapter: str | None,
        cache_salt: str | None,
        *,
        ending: Callable[[SamplingParams], SamplingParams] = lambda params: params,
    ) -> AsyncStream:
        """ids, ending: called in another thread; the latter may add to what ends the output."""
        if params.n not in (None, 1):
            raise InvalidArgumentError(f"a stream has one sample, n is {params.n}; use generate")
        engine = self.engine

        def make(job: Job) -> list[GenerationRequest]:
            resolved = engine.resolve(ending(params))
            return engine.requests(job, [ids()], resolved, adapter=adapter, cache_salt=cache_salt, interactive=True)

        return AsyncStream(self, make)

    async def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        continue_final_message: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation:
        """See Engine.chat."""
        chosen = sampling_params(params, options)
        ids = await asyncio.to_thread(self.engine.chat_ids, messages, continue_final_message=continue_final_message)
        return await self.generate(ids, chosen, adapter=adapter, cache_salt=cache_salt)

    def chat_stream(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        continue_final_message: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """The answer of `chat` as a stream."""
        chosen = sampling_params(params, options)

        def ids() -> list[int]:
            return self.engine.chat_ids(messages, continue_final_message=continue_final_message)

        return self._stream(ids, chosen, adapter, cache_salt)

    @overload
    async def infill(  # type: ignore[overload-overlap]
        self,
        prefix: str,
        suffix: str,
        params: SamplingParams | None = None,
        *,
        files: Sequence[tuple[str, str]] = (),
        filename: str = "",
        repository: str = "",
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation: ...
    @overload
    async def infill(
        self,
        prefix: Sequence[str],
        suffix: Sequence[str],
        params: SamplingParams | None = None,
        *,
        files: Sequence[tuple[str, str]] = (),
        filename: str = "",
        repository: str = "",
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Generation]: ...
    async def infill(
        self,
        prefix: str | Sequence[str],
        suffix: str | Sequence[str],
        params: SamplingParams | None = None,
        *,
        files: Sequence[tuple[str, str]] = (),
        filename: str = "",
        repository: str = "",
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | list[Generation]:
        """See Engine.infill."""
        chosen = sampling_params(params, options)
        engine = self.engine

        def asked() -> tuple[list[list[int]], SamplingParams]:
            ids = [
                engine.infill_ids(*hole, files=files, filename=filename, repository=repository)
                for hole in holes_of(prefix, suffix)
            ]
            return ids, engine.infill_params(chosen)

        ids, ending = await asyncio.to_thread(asked)
        prompt: Any = ids[0] if isinstance(prefix, str) else ids
        filled: Generation | list[Generation] = await self.generate(prompt, ending, adapter=adapter, cache_salt=cache_salt)
        return filled

    def infill_stream(
        self,
        prefix: str,
        suffix: str,
        params: SamplingParams | None = None,
        *,
        files: Sequence[tuple[str, str]] = (),
        filename: str = "",
        repository: str = "",
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """The filling of `infill` as a stream. What it is refused for is raised with the first piece."""

        def ids() -> list[int]:
            return self.engine.infill_ids(prefix, suffix, files=files, filename=filename, repository=repository)

        return self._stream(ids, sampling_params(params, options), adapter, cache_salt, ending=self.engine.infill_params)

    async def score(
        self,
        text: Prompt,
        *,
        parse_special: bool = False,
        start: int = 0,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> Score:
        """See Engine.score."""
        scores: list[Score] = []

        def make(job: Job) -> Sequence[Request]:
            score, requests = self.engine.score_requests(
                job, text, parse_special=parse_special, start=start, adapter=adapter, cache_salt=cache_salt
            )
            scores.append(score)
            return requests

        await self._run(make)
        return scores[0]

    async def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        pooling: Literal["mean", "last"] | None = None,
        prompt_name: str | None = None,
        normalize: bool = True,
        parse_special: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> npt.NDArray[np.float32]:
        """See Engine.embed."""
        made: list[Pooled] = []

        def make(job: Job) -> Sequence[Request]:
            pooled, requests = self.engine.embed_requests(
                job,
                texts,
                pooling=pooling,
                prompt_name=prompt_name,
                parse_special=parse_special,
                adapter=adapter,
                cache_salt=cache_salt,
            )
            made.extend(pooled)
            return requests

        await self._run(make)
        from pyengine.embeddings import vectors

        return vectors(made, normalize=normalize)

    async def rerank(
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
        """See Engine.rerank."""
        from pyengine.reranking import checked_top_n

        top_n = checked_top_n(top_n)
        made: list[Ranking] = []

        def make(job: Job) -> Sequence[Request]:
            ranking, requests = self.engine.rerank_requests(
                job,
                query,
                documents,
                instruction=instruction,
                max_tokens_per_doc=max_tokens_per_doc,
                truncate=truncate,
                adapter=adapter,
                cache_salt=cache_salt,
            )
            made.append(ranking)
            return requests

        await self._run(make)
        return made[0].results(top_n)

    async def beam_search(self, prompt: Prompt, **options: Unpack[BeamOptions]) -> list[BeamHypothesis]:
        """See Engine.beam_search."""
        searches: list[BeamSearch] = []

        def make(job: Job) -> Sequence[Request]:
            search, requests = self.engine.beam_requests(job, prompt, **options)
            searches.append(search)
            return requests

        await self._run(make)
        return searches[0].results

    # ------------------------------------------------------------ life

    def close(self) -> None:
        """Waits for the step that is running, so at most some milliseconds; closes the engine if this object opened it."""
        if self._owned:
            self.engine.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)
