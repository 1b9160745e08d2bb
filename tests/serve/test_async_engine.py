"""AsyncEngine: the engine's bytes from any number of loops, and work that ends when nobody waits for it."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import pyengine
from pyengine import AsyncEngine, Engine, SamplingParams
from pyengine.async_engine import AsyncStream
from pyengine.results import Generation
from pyengine.run.beam_search import Rules
from pyengine.run.jobs import Job, Stepper
from pyengine.run.request import MAX_UNREAD, GenerationRequest, Request

SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 11, "ignore_eos": True}


def text(seed: int, n: int) -> list[int]:
    return [3 + (seed * 7919 + i * i) % 50 for i in range(n)]


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[Engine]:
    with Engine(tiny_model) as engine:
        yield engine
        gc.collect()
        assert engine.check_integrity()["n_sequences"] == 0


async def until(condition: Callable[[], bool]) -> None:
    """What is to happen does happen; the test's timeout is the only clock."""
    while not condition():
        await asyncio.sleep(0.001)


def test_answers_are_those_of_the_engine(engine: Engine) -> None:
    prompts = [text(i, 5 + 20 * i) for i in range(6)]
    expected = [engine.generate(prompt, max_tokens=12, **SAMPLED).tokens for prompt in prompts]
    one = AsyncEngine(engine)

    async def main() -> None:
        together = await asyncio.gather(*(one.generate(prompt, max_tokens=12, **SAMPLED) for prompt in prompts))
        assert [result.tokens for result in together if isinstance(result, Generation)] == expected
        batch = await one.generate(prompts, max_tokens=12, **SAMPLED)
        assert isinstance(batch, list) and [result.tokens for result in batch] == expected
        pieces = [piece async for piece in one.stream(prompts[3], max_tokens=12, **SAMPLED)]
        assert [piece.token for piece in pieces] == expected[3]
        assert pieces[-1].result is not None and pieces[-1].result.tokens == expected[3]
        samples = await one.generate(prompts[0], n=3, max_tokens=4, **SAMPLED)
        assert isinstance(samples, list) and len(samples) == 3
        assert await one.score(prompts[2]) == engine.score(prompts[2])
        options: Any = {"beam_width": 3, "n": 3, "max_tokens": 6, "length_penalty": 0.5, "ignore_eos": True}
        beams = await asyncio.gather(*(one.beam_search(prompt, **options) for prompt in prompts))
        assert beams == [engine.beam_search(prompt, **options) for prompt in prompts]

    asyncio.run(main())


def test_loops_and_synchronous_callers_share_the_steps(engine: Engine) -> None:
    expected = {i: engine.generate(text(i, 30), max_tokens=20, **SAMPLED).tokens for i in range(9)}
    one, got = AsyncEngine(engine), {}

    async def read(i: int) -> None:
        got[i] = [piece.token async for piece in one.stream(text(i, 30), max_tokens=20, **SAMPLED)]

    async def loop(numbers: range) -> None:
        await asyncio.gather(*map(read, numbers))

    def synchronous(numbers: range) -> None:
        for i in numbers:
            got[i] = engine.generate(text(i, 30), max_tokens=20, **SAMPLED).tokens

    threads = [threading.Thread(target=lambda n=n: asyncio.run(loop(n))) for n in (range(3), range(3, 6))]
    threads.append(threading.Thread(target=synchronous, args=(range(6, 9),)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def one_request(engine: Engine, seed: int) -> Callable[[Job], Sequence[Request]]:
    return lambda job: engine.requests(job, [text(seed, 20)], engine.resolve(SamplingParams(max_tokens=8)))


def test_a_job_that_another_caller_ends_while_the_thread_looks_is_told(engine: Engine) -> None:
    one = AsyncEngine(engine)

    async def main() -> None:
        job = await one.prepare(one_request(engine, 1))
        me = threading.get_ident()

        def ready() -> bool:
            is_ready = job.is_done
            if threading.get_ident() != me:  # after its look, and before it does anything with the answer
                engine.scheduler.wait(lambda: job.is_done)
            return is_ready

        reader = asyncio.create_task(job.wait(ready))
        await asyncio.sleep(0)  # it waits
        one.stepper.add(job)
        await asyncio.wait_for(reader, 60)
        job.close()

    asyncio.run(main())


def test_a_job_that_comes_and_ends_while_the_thread_leaves_is_told(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = AsyncEngine(engine)
    scheduler, wait = engine.scheduler, engine.scheduler.wait

    async def main() -> None:
        first = await one.prepare(one_request(engine, 1))
        second = await one.prepare(one_request(engine, 2))
        reader = asyncio.create_task(second.wait(lambda: second.is_done))
        await asyncio.sleep(0)  # it waits

        def and_then_another(ready: Callable[[], bool]) -> None:
            wait(ready)
            one.stepper.add(second)
            wait(lambda: second.is_done)

        monkeypatch.setattr(scheduler, "wait", and_then_another)
        one.stepper.add(first)
        await asyncio.wait_for(reader, 60)
        first.close()
        second.close()

    asyncio.run(main())


def test_a_job_is_closed_from_any_thread(engine: Engine) -> None:
    """Its loop may be asleep. (In debug mode asyncio raises if it is touched from another thread.)"""
    one = AsyncEngine(engine)

    async def main() -> None:
        job = await one.prepare(one_request(engine, 1))
        reader = asyncio.create_task(job.wait(lambda: False))
        await asyncio.sleep(0)  # it waits
        await asyncio.to_thread(job.close)
        assert not await reader

    asyncio.run(main(), debug=True)


def test_a_job_closed_while_it_is_added_is_not_computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    one, add = AsyncEngine(engine), engine.scheduler.add

    async def main() -> None:
        job = await one.prepare(one_request(engine, 1))

        def closed(requests: Sequence[Request]) -> None:
            job.close()
            add(requests)

        monkeypatch.setattr(engine.scheduler, "add", closed)
        one.stepper.add(job)
        assert not engine.scheduler._requests and not one.stepper._jobs

    asyncio.run(main())


def test_a_job_that_cannot_be_added_is_not_computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its exception holds it."""
    one = AsyncEngine(engine)

    def refuse() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(one.stepper, "ensure_running", refuse)

    async def main() -> None:
        with pytest.raises(RuntimeError, match="new thread") as caught:
            await one.generate(text(1, 8), **SAMPLED)
        assert not engine.scheduler._requests, caught

    asyncio.run(main())


def test_a_question_that_raises_is_its_own_tasks_matter(engine: Engine) -> None:
    one = AsyncEngine(engine)

    async def main() -> None:
        job = await one.prepare(one_request(engine, 1))
        me = threading.get_ident()

        def ready() -> bool:
            if threading.get_ident() != me:
                raise MemoryError
            return job.is_done

        reader = asyncio.create_task(job.wait(ready))
        await asyncio.sleep(0)
        one.stepper.add(job)
        assert isinstance(await one.generate(text(1, 8), max_tokens=3, **SAMPLED), Generation)
        assert await reader
        job.close()

    asyncio.run(main())


def test_errors_are_told_though_telling_fails(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stepping thread does not end before those who wait know why."""
    one, deliver = AsyncEngine(engine), Stepper._deliver
    errors = [MemoryError("the first"), MemoryError("the second")]

    def fails(stepper: Stepper) -> bool:
        if errors:
            raise errors.pop(0)
        return deliver(stepper)

    monkeypatch.setattr(Stepper, "_deliver", fails)

    async def main() -> None:
        with pytest.raises(MemoryError):
            await asyncio.wait_for(one.generate(text(1, 8), max_tokens=3, **SAMPLED), 60)

    asyncio.run(main())


def test_a_stream_closed_while_it_is_prepared_is_not_computed(engine: Engine) -> None:
    one, made = AsyncEngine(engine), []

    def make(job: Job) -> list[GenerationRequest]:
        stream.close()
        made.extend(engine.requests(job, [text(1, 20)], engine.resolve(SamplingParams())))
        return made

    stream = AsyncStream(one, make)

    async def main() -> None:
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert not made[0].is_started and not engine.scheduler._requests

    asyncio.run(main())


def test_a_stream_is_read_by_one_task_at_a_time(engine: Engine) -> None:
    one = AsyncEngine(engine)

    async def main() -> None:
        stream = one.stream(text(1, 8), max_tokens=4, **SAMPLED)
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(pyengine.PyEngineError, match="another task waits"):
            await anext(stream)
        await first
        assert len([piece async for piece in stream]) == 3

    asyncio.run(main())


@pytest.mark.parametrize("how", ["close", "cancel", "let go", "error"])
def test_a_stream_that_ends_early_is_not_computed_on(engine: Engine, how: str) -> None:
    one = AsyncEngine(engine)

    async def read(stream: Any, n: int) -> None:
        for _ in range(n):
            await anext(stream)

    async def main() -> None:
        stream = one.stream(text(1, 8), max_tokens=400, **SAMPLED)
        await read(stream, 2)
        (request,) = stream._job.requests
        if how == "close":
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        elif how == "cancel":
            task = asyncio.create_task(read(stream, 400))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "error":
            stream._job.requests[0].output.pieces.clear()
            request.error = RuntimeError("of this request alone")
            request.n_taken = 0
            with pytest.raises(RuntimeError, match="of this request alone"):
                await anext(stream)
        del stream
        gc.collect()
        await until(lambda: request.sequence is None)
        n_pieces = len(request.output.pieces)
        await one.generate(text(2, 8), max_tokens=20, **SAMPLED)
        assert len(request.output.pieces) == n_pieces
        await until(lambda: one.stepper._thread is None)

    asyncio.run(main())


def test_a_stream_ends_with_its_block(engine: Engine) -> None:
    async def main() -> None:
        async with AsyncEngine(engine).stream(text(1, 8), max_tokens=100, **SAMPLED) as stream:
            await anext(stream)
        assert [piece async for piece in stream] == [] and stream._job.is_closed

    asyncio.run(main())


def test_a_stream_that_nobody_reads_pauses_and_no_thread_spins(engine: Engine) -> None:
    one = AsyncEngine(engine)

    async def main() -> None:
        stream = one.stream(text(1, 8), max_tokens=100, **SAMPLED)
        await anext(stream)
        (request,) = stream._job.requests
        await until(lambda: one.stepper._thread is None)
        # it may have paused before the first piece was read, and nobody has asked for more since
        assert len(request.output.pieces) - request.n_taken >= MAX_UNREAD - 1 and not request.is_done
        rest = [piece.token async for piece in stream]
        assert len(rest) == 99

    asyncio.run(main())


class Held:
    """A context whose forward of many tokens takes until somebody cancels it."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.is_held = threading.Event()
        self.cancelled = threading.Event()

    def forward(self, tokens: list[int], *rest: Any, **options: Any) -> bytes:
        if len(tokens) < 50:
            out: bytes = self._context.forward(tokens, *rest, **options)
            return out
        self.is_held.set()
        self.cancelled.wait()
        raise pyengine.CancelledError("cancelled")

    def cancel(self) -> None:
        self.cancelled.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


@pytest.mark.parametrize("how", ["generate", "stream", "beam_search"])
def test_cancelling_ends_a_prefill(engine: Engine, how: str) -> None:
    """The forward itself ends: were it not cancelled, this would wait for ever. And the loop goes on meanwhile."""
    one = AsyncEngine(engine)
    held = Held(engine.scheduler.context)
    engine.scheduler.context = held  # type: ignore[assignment]

    async def main() -> None:
        stream = one.stream(text(1, 300), **SAMPLED)
        work: dict[str, Callable[[], Awaitable[Any]]] = {
            "generate": lambda: one.generate(text(1, 300), **SAMPLED),
            "stream": lambda: anext(stream),
            "beam_search": lambda: one.beam_search(text(1, 300)),
        }
        task = asyncio.ensure_future(work[how]())
        await until(held.is_held.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(held.cancelled.is_set)
        assert isinstance(await one.generate(text(1, 8), max_tokens=3, **SAMPLED), Generation)

    asyncio.run(main())
    engine.scheduler.context = held._context


def test_a_search_can_go_on_until_it_is_done(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while another caller carries it to its next step: the stepping thread, which looks then, must not leave."""
    one, step, seen = AsyncEngine(engine), Rules.step, []

    async def main() -> None:
        job = await one.prepare(lambda job: engine.beam_requests(job, text(1, 8), max_tokens=4, ignore_eos=True)[1])

        def seen_from_outside(*args: Any) -> Any:
            seen.append(job.can_go_on)
            return step(*args)

        monkeypatch.setattr(Rules, "step", seen_from_outside)
        engine.scheduler.add(job.requests)
        engine.scheduler.wait(lambda: job.is_done)
        assert seen == [True] * 4 and not job.can_go_on

    asyncio.run(main())


def test_a_search_that_is_cancelled_is_not_computed_on(engine: Engine) -> None:
    """In the middle of its beams: the step that runs is the last one."""
    one, forward = AsyncEngine(engine), engine.scheduler.context.forward
    is_held, go_on, n_steps = threading.Event(), threading.Event(), 0

    class Context(Held):
        def forward(self, *args: Any, **options: Any) -> bytes:
            nonlocal n_steps
            n_steps += 1
            if n_steps == 5:
                is_held.set()
                go_on.wait()
            out: bytes = forward(*args, **options)
            return out

    context = Context(engine.scheduler.context)
    engine.scheduler.context = context  # type: ignore[assignment]

    async def main() -> None:
        task = asyncio.create_task(one.beam_search(text(1, 8), ignore_eos=True))
        await until(is_held.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        await until(lambda: one.stepper._thread is None)

    asyncio.run(main())
    assert n_steps == 5
    engine.scheduler.context = context._context


def test_refusals_and_ends(engine: Engine, tiny_model: Path) -> None:
    one = AsyncEngine(engine)

    async def main() -> None:
        with pytest.raises(TypeError, match="temprature"):
            await one.generate("a", temprature=1)
        with pytest.raises(pyengine.ContextFullError, match="the context holds"):
            await one.generate([5] * (engine.n_ctx + 1))
        with pytest.raises(pyengine.ContextFullError, match="the context holds"):
            await anext(one.stream([5] * (engine.n_ctx + 1)))
        with pytest.raises(pyengine.InvalidArgumentError, match="one sample"):
            one.stream("a", n=2, temperature=1)
        with pytest.raises(pyengine.InvalidArgumentError, match="beam_width"):
            await one.beam_search("a", beam_width=33)
        with pytest.raises(TypeError, match="beams"):
            await one.beam_search("a", beams=4)  # type: ignore[call-arg]
        with pytest.raises(pyengine.InvalidArgumentError, match="n_ctx"):
            AsyncEngine(engine, n_ctx=5)
        late = await one.generate(text(1, 8), timeout=1e-9)
        assert isinstance(late, Generation) and late.finish_reason == "timeout"
        async with AsyncEngine(tiny_model, n_ctx=300) as own:
            stream = own.stream(text(1, 8), **SAMPLED)
            await anext(stream)
        with pytest.raises(pyengine.PyEngineError, match="closed"):
            async for _ in stream:
                pass
        with pytest.raises(pyengine.PyEngineError, match="closed"):
            await own.generate("a")

    asyncio.run(main())


def test_a_step_that_fails_ends_those_who_wait_and_no_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    one = AsyncEngine(engine)

    def step() -> bool:
        monkeypatch.undo()
        raise RuntimeError("in the step")

    async def main() -> None:
        monkeypatch.setattr(engine.scheduler, "step", step)
        with pytest.raises(RuntimeError, match="in the step"):
            await one.generate(text(1, 8), max_tokens=3, **SAMPLED)
        assert isinstance(await one.generate(text(1, 8), max_tokens=3, **SAMPLED), Generation)

    asyncio.run(main())


def test_a_loop_that_is_gone_takes_its_work_with_it(engine: Engine) -> None:
    one, kept = AsyncEngine(engine), []

    async def main() -> None:
        stream = one.stream(text(1, 8), max_tokens=500, **SAMPLED)
        kept.append(stream)
        await anext(stream)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    engine.generate(text(2, 8), max_tokens=5, **SAMPLED)
    kept.clear()
    gc.collect()
