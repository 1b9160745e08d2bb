"""Clients that go away, at any moment and in any manner, stop their work and cost the others nothing."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Call, Client, serving

from pyengine.sampling import MAX_DRAFT

COMPLETIONS = "/v1/completions"
LONG: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 450, "ignore_eos": True, "seed": 1, "temperature": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_stops_its_request(chat_model: Path, stream: bool) -> None:
    async def test(client: Client) -> None:
        call = client.begin("POST", COMPLETIONS, {**LONG, "stream": stream})
        while not (jobs := client.app.queue.jobs()) or not jobs[0].requests[0].sampler.outputs:  # type: ignore[attr-defined]
            await asyncio.sleep(0)
        call.hang_up()
        await call.task
        assert jobs[0].is_closed
        n_tokens = len(jobs[0].requests[0].sampler.outputs)  # type: ignore[attr-defined]
        assert (await client.post(COMPLETIONS, {**LONG, "max_tokens": 30})).status == 200
        one_step = 1 + MAX_DRAFT  # tokens that the step under way may bring
        assert len(jobs[0].requests[0].sampler.outputs) <= n_tokens + one_step < 450  # type: ignore[attr-defined]
        assert client.app.metrics.aborted._value.get() == 1

    serving(chat_model, test)


def test_a_client_that_takes_nothing_pauses_its_request_and_is_let_go(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        watching = asyncio.ensure_future(client.app.watch_writers())
        call = client.begin("POST", COMPLETIONS, {**LONG, "stream": True})
        await call.until(lambda answer: len(answer.writes) > 2)
        call.can_write.clear()
        (job,) = client.app.queue.jobs()
        assert (await client.post(COMPLETIONS, {**LONG, "max_tokens": 100})).status == 200
        await call.task
        assert job.is_closed and not call.answer.is_complete
        watching.cancel()

    serving(chat_model, test, write_timeout=0.2)


@pytest.mark.parametrize("n_calls", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_ends_beside_each_other(chat_model: Path, n_calls: int) -> None:
    """Every answer that is completed is the one of the request alone."""
    rng = random.Random(5)
    bodies = [{**LONG, "prompt": [3 + i % 40] * rng.choice((2, 30, 300)), "max_tokens": 3 + 7 * i} for i in range(8)]

    async def one(client: Client, i: int, alone: list[Any]) -> int:
        number, stream = rng.randrange(len(bodies)), rng.random() < 0.6
        call: Call
        if rng.random() < 0.1:
            call = client.begin("POST", COMPLETIONS, rng.choice((b"{", b"[]", b"\xff", b"{}")))
            await call.task
            assert call.answer.status == 400
            return 0
        call = client.begin("POST", COMPLETIONS, {**bodies[number], "stream": stream})
        if rng.random() < 0.5:
            for _ in range(rng.choice((0, 1, 5, 40))):
                await asyncio.sleep(0)
            call.hang_up()
        await call.task
        if not call.answer.is_complete:
            return 0
        if stream:
            text = "".join(c["text"] for e in call.answer.events for c in e["choices"])
        else:
            text = call.answer.json["choices"][0]["text"]
        assert text == alone[number]
        return 1

    async def test(client: Client) -> None:
        alone = [(await client.post(COMPLETIONS, body)).json["choices"][0]["text"] for body in bodies]
        done = 0
        for begin in range(0, n_calls, 20):
            done += sum(await asyncio.gather(*(one(client, i, alone) for i in range(begin, begin + 20))))
        assert 0 < done < n_calls

    serving(chat_model, test)
