"""A client of the ASGI application without sockets, and what judges every stream by the protocol's rules."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from pyengine import Engine
from pyengine.serve.app import App
from pyengine.serve.models import Models, ServedModel
from pyengine.serve.settings import Settings


class Answer:
    """What came back."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.writes: list[bytes] = []
        self.is_complete = False

    @property
    def body(self) -> bytes:
        return b"".join(self.writes)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        assert set(self.json) == {"error"}
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        return error

    @property
    def events(self) -> list[Any]:
        """The data of every event; checks that the stream ends with [DONE] and holds whole UTF-8."""
        lines = [line for line in self.body.decode("utf-8").split("\n\n") if line and not line.startswith(":")]
        assert lines[-1] == "data: [DONE]", self.body[-600:]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    @property
    def named_events(self) -> list[Any]:
        """The data of every event of a stream whose events have names, which are the data's types."""
        out = []
        for block in self.body.decode().strip().split("\n\n"):
            name, data = block.split("\n")
            out.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {out[-1]['type']}"
        return out


class Client:
    """Calls an App as a server would. `call` waits for the answer; `begin` gives a call that can be hung up."""

    def __init__(self, app: App) -> None:
        self.app = app

    def begin(
        self, method: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None, more: bool = False
    ) -> Call:
        return Call(self.app, method, path, body, headers or {}, more)

    async def call(self, method: str, path: str, body: Any = None, **options: Any) -> Answer:
        call = self.begin(method, path, body, **options)
        await call.task
        return call.answer

    async def post(self, path: str, body: Any, **options: Any) -> Answer:
        return await self.call("POST", path, body, **options)

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.call("GET", path, **options)


class Call:
    def __init__(self, app: App, method: str, path: str, body: Any, headers: dict[str, str], more: bool) -> None:
        self.answer = Answer()
        self.received: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.can_write = asyncio.Event()
        self.can_write.set()
        self.news = asyncio.Event()
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.received.put_nowait({"type": "http.request", "body": data, "more_body": more})
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()],
            "client": ("127.0.0.1", 1),
            "extensions": {"pyengine.abort": self.hang_up},
        }
        self.task = asyncio.ensure_future(app(scope, self.received.get, self._send))  # type: ignore[arg-type]

    async def _send(self, message: Any) -> None:
        await self.can_write.wait()
        if message["type"] == "http.response.start":
            assert self.answer.status == 0
            self.answer.status = message["status"]
            self.answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            assert self.answer.status and not self.answer.is_complete
            self.answer.writes.append(message.get("body", b""))
            self.answer.is_complete = not message.get("more_body", False)
        self.news.set()

    def hang_up(self) -> None:
        self.received.put_nowait({"type": "http.disconnect"})
        self.can_write.set()

    async def until(self, ready: Callable[[Answer], bool]) -> None:
        """What the server is to write, it writes; the test's timeout is the only clock."""
        while not ready(self.answer):
            self.news.clear()
            await self.news.wait()


def serving(
    model: Path,
    test: Callable[[Client], Coroutine[Any, Any, None]],
    *,
    adapters: Mapping[str, Path] | None = None,
    **settings: Any,
) -> None:
    """Run a test against a server of one model, called "tiny", and its adapters; nothing may be left of its requests."""
    with Engine(model, max_sequences=8) as engine:
        for name, path in (adapters or {}).items():
            engine.load_adapter(path, name=name)
        app = App(Settings(log_format="none", **settings))
        app.start(Models([ServedModel("tiny", engine)]))

        async def main() -> None:
            await asyncio.wait_for(test(Client(app)), 120)
            assert not app.exchanges and not app.queue.jobs()
            while engine.check_integrity()["n_sequences"]:
                await asyncio.sleep(0.001)

        asyncio.run(main())
