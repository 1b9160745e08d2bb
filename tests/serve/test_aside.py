"""Requests that last long by what they are given: they wait for each other, and nobody else for them."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Client, serving

from pyengine import Engine
from pyengine.run.guide import Guide
from pyengine.serve.models import ServedModel

MESSAGES = [{"role": "user", "content": "Hello"}]
TEXT: dict[str, Any] = {"prompt": "Hello", "max_tokens": 3, "seed": 1}
# What is asked, and what of it lasts.
LONG: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "tokenize": ("/tokenize", {"content": "Hello"}, Engine, "tokenize"),
    "detokenize": ("/detokenize", {"tokens": [5]}, Engine, "detokenize"),
    "count_tokens": ("/v1/messages/count_tokens", {"messages": MESSAGES}, ServedModel, "chat_ids"),
    "a grammar": ("/v1/completions", {**TEXT, "structured_outputs": {"regex": "a+"}}, Guide, "check"),
}
MORE = 40  # than there are threads of an event loop on any machine: at most 32


@pytest.mark.parametrize("name", LONG)
def test_others_are_answered_meanwhile(chat_model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, body, owner, method = LONG[name]
    if name == "a grammar":
        pytest.importorskip("llguidance", reason="the extra guide is not installed")
    go_on, work = threading.Event(), getattr(owner, method)

    def slowly(*args: Any, **options: Any) -> Any:
        go_on.wait()
        return work(*args, **options)

    async def test(client: Client) -> None:
        ids = {**TEXT, "prompt": [5, 6, 7]}
        before = await client.post("/v1/completions", ids)
        with monkeypatch.context() as patched:
            patched.setattr(owner, method, slowly)
            calls = [asyncio.ensure_future(client.post(path, body)) for _ in range(MORE)]
            for _ in range(50):  # they all have come as far as they come
                await asyncio.sleep(0)
            assert (await client.post("/v1/completions", ids)).json["choices"] == before.json["choices"]
            assert (await client.get("/metrics")).status == 200
            assert not any(call.done() for call in calls)
            go_on.set()
            assert [answer.status for answer in await asyncio.gather(*calls)] == [200] * MORE

    serving(chat_model, test)
