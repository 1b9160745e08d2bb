"""What a client may send before it is answered, over real sockets: bounded, and let go of in the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from pyengine.serve import connection
from pyengine.serve.app import App
from pyengine.serve.models import Models
from pyengine.serve.server import Runner, listen
from pyengine.serve.settings import Settings

HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def connected(test: Callable[[Callable[[], Awaitable[Streams]]], Awaitable[None]], kind: type[App] = App) -> None:
    """Run a test against a server without models; it gets what connects to it. Nothing that the server is to end stays open."""
    app = kind(Settings(log_format="none"))
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    runner = Runner(app, sock, lambda: Models(()))

    async def main() -> None:
        ready = asyncio.Event()
        running = asyncio.create_task(runner.main(lambda models: ready.set()))
        await ready.wait()
        try:
            await asyncio.wait_for(test(lambda: asyncio.open_connection("127.0.0.1", port)), 120)
        finally:
            runner.stop()
            await running

    asyncio.run(main())


async def answer(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server closes, or resets where it was still sent to."""
    got = b""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            got += data
    return got


TOO_LONG = connection.MAX_HEAD + (1 << 20)  # more than may come at once
FLOODS = {
    "many headers": HEALTH + b"x-a: b\r\n" * TOO_LONG,
    "one header that does not end": HEALTH + b"x-a: " + b"b" * TOO_LONG,
    "a path that does not end": b"GET /" + b"a" * TOO_LONG,
    "headers behind a body": b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n0\r\n"
    + b"x-a: b\r\n" * TOO_LONG,
    "a length of a chunk that does not end": b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    + b"0" * TOO_LONG,
}


@pytest.mark.parametrize("name", FLOODS)
def test_what_comes_without_an_end_is_let_go_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_TIMEOUT", 3600.0)

    async def test(connect: Callable[[], Awaitable[Streams]]) -> None:
        reader, writer = await connect()
        writer.write(FLOODS[name])  # and no end
        assert b" 200 " not in await answer(reader)  # the refusal, unless its connection was reset before we read it
        writer.close()

    connected(test)


def test_a_head_of_the_length_that_is_allowed_is_read_and_a_longer_one_refused() -> None:
    async def test(connect: Callable[[], Awaitable[Streams]]) -> None:
        rest = connection.MAX_HEAD - len(b"/health" b"host" b"localhost" b"connection" b"close" b"x-a")
        for n_bytes, status in ((rest, b"200"), (rest + 1, b"431")):
            reader, writer = await connect()
            writer.write(HEALTH + b"connection: close\r\nx-a: " + b"b" * n_bytes + b"\r\n\r\n")
            assert (await answer(reader)).startswith(b"HTTP/1.1 %s " % status)
            writer.close()

    connected(test)


@pytest.mark.parametrize("hosts", [[], ["localhost", "localhost"], ["localhost", "evil.example"]])
def test_a_request_says_once_for_whom_it_is(hosts: list[str]) -> None:
    """RFC 9112, 3.2. HTTP/1.0 knew no such header."""

    async def test(connect: Callable[[], Awaitable[Streams]]) -> None:
        head = "".join(f"host: {host}\r\n" for host in hosts) + "connection: close\r\n\r\n"
        for version, status in (("1.1", b"400"), ("1.0", b"400" if hosts else b"200")):
            reader, writer = await connect()
            writer.write(f"GET /health HTTP/{version}\r\n{head}".encode())
            got = await answer(reader)
            assert got.split(b" ", 2)[1] == status, got
            assert status == b"200" or b"bad_host" in got
            writer.close()

    connected(test)


def test_requests_before_their_answers_are_bounded() -> None:
    async def test(connect: Callable[[], Awaitable[Streams]]) -> None:
        reader, writer = await connect()
        writer.write((HEALTH + b"\r\n") * 1000)
        assert (await answer(reader)).count(b"HTTP/1.1 200 ") <= connection.MAX_PIPELINED + 1
        writer.close()
        reader, writer = await connect()  # some are answered, in their order
        writer.write((HEALTH + b"\r\n") * connection.MAX_PIPELINED + HEALTH + b"connection: close\r\n\r\n")
        assert (await answer(reader)).count(b"HTTP/1.1 200 ") == connection.MAX_PIPELINED + 1
        writer.close()

    connected(test)


@pytest.mark.parametrize("begun", [b"GET /hea", b"\r\n"])
def test_a_later_request_that_does_not_come_to_an_end_is_let_go_of_too(
    begun: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(connect: Callable[[], Awaitable[Streams]]) -> None:
        reader, writer = await connect()
        writer.write(HEALTH + b"\r\n")
        assert (await reader.readuntil(b'{"status":"ok"}')).startswith(b"HTTP/1.1 200 ")
        monkeypatch.setattr(connection, "HEADER_TIMEOUT", 0.0)
        writer.write(begun)
        assert await answer(reader) == b""
        writer.close()

    connected(test)


def test_the_connection_that_is_idle_for_longest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_TIMEOUT", 3600.0)
    monkeypatch.setattr(connection, "most_connections", lambda: 2)

    async def test(connect: Callable[[], Awaitable[Streams]]) -> None:
        async def asked(request: bytes, answered: bytes) -> Streams:
            reader, writer = await connect()
            writer.write(request)
            await reader.readuntil(answered)
            return reader, writer

        first, second = [await asked(HEALTH + b"\r\n", b'{"status":"ok"}') for _ in range(2)]
        begun = b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n"
        third = await asked(begun, b"100 Continue\r\n\r\n")  # waits for its body
        assert await answer(first[0]) == b""
        fourth = await asked(begun, b"100 Continue\r\n\r\n")
        assert await answer(second[0]) == b""
        fifth = await connect()
        assert await answer(fifth[0]) == b""  # all others are at work
        for reader, writer in (third, fourth):
            writer.write(b"{}")
            assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 ")
        for _, writer in (first, second, third, fourth, fifth):
            writer.close()

    connected(test)


def test_an_upgrade_to_websockets_is_a_request_like_others() -> None:
    async def test(connect: Callable[[], Awaitable[Streams]]) -> None:
        reader, writer = await connect()
        upgrade = b"upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        writer.write(HEALTH + b"connection: upgrade, close\r\n" + upgrade + b"\r\n")
        assert (await reader.readuntil(b'{"status":"ok"}')).startswith(b"HTTP/1.1 200 ")
        writer.close()

    connected(test)


@pytest.mark.parametrize("rest", [HEALTH + b"connection: close\r\n\r\n", b""])
def test_an_upgrade_to_http_2_takes_no_body_from_a_request(rest: bytes) -> None:
    async def test(connect: Callable[[], Awaitable[Streams]]) -> None:
        reader, writer = await connect()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n"
        head += b"expect: 100-continue\r\n"
        for framing, body in (
            (b"content-length: 3\r\n", b"{]}"),
            (b"transfer-encoding: chunked\r\n", b"3\r\n{]}\r\n0\r\n\r\n"),
        ):
            writer.write(head + framing + b"\r\n")
            await reader.readuntil(b"100 Continue\r\n\r\n")
            writer.write(body)
            assert b"at line 1, column 2" in await reader.readuntil(b"}}")  # that of {]}: it was read
        writer.write(HEALTH + b"connection: upgrade\r\nupgrade: h2c\r\n\r\n" + rest)
        assert (await reader.readuntil(b'{"status":"ok"}')).startswith(b"HTTP/1.1 200 ")
        if rest:
            assert (await answer(reader)).startswith(b"HTTP/1.1 200 ")
        writer.close()

    connected(test)


async def _begin(send: Any, data: bytes, *, more: bool) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": data, "more_body": more})


def test_nothing_is_refused_in_the_middle_of_an_answer() -> None:
    class Begins(App):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await _begin(send, b"begun", more=True)
            while (await receive())["type"] != "http.disconnect":
                pass

    async def test(connect: Callable[[], Awaitable[Streams]]) -> None:
        for unreadable in (b"?\r\n\r\n", (HEALTH + b"\r\n") * 100):
            reader, writer = await connect()
            writer.write(HEALTH + b"\r\n")
            await reader.readuntil(b"begun\r\n")
            writer.write(unreadable)
            assert await answer(reader) == b""
            writer.close()

    connected(test, Begins)


def test_the_request_that_is_answered_hears_that_its_client_has_gone_before_others_that_wait() -> None:
    ended = asyncio.Event()

    class Endless(App):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def gone() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass

            waiting = asyncio.ensure_future(gone())
            await _begin(send, b"begun", more=True)
            while not waiting.done():
                await send({"type": "http.response.body", "body": b"more", "more_body": True})
                await asyncio.sleep(0)
            ended.set()

    async def test(connect: Callable[[], Awaitable[Streams]]) -> None:
        reader, writer = await connect()
        writer.write((HEALTH + b"\r\n") * 2)
        await reader.readuntil(b"begun\r\n")
        writer.transport.abort()
        await ended.wait()

    connected(test, Endless)


def test_no_answer_is_lost_to_make_room_and_one_that_took_long_does_not_count_as_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "HEADER_TIMEOUT", 3600.0)
    monkeypatch.setattr(connection, "most_connections", lambda: 3)
    release, large = asyncio.Event(), b"a" * (1 << 25)  # more than sockets hold

    class Answers(App):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/slow":
                await _begin(send, b"begun", more=True)
                await release.wait()
                await send({"type": "http.response.body", "body": b"done"})
            else:
                await _begin(send, large if scope["path"] == "/large" else b"short", more=False)

    async def test(connect: Callable[[], Awaitable[Streams]]) -> None:
        async def asked(path: bytes, answered: bytes) -> Streams:
            reader, writer = await connect()
            writer.write(b"GET %s HTTP/1.1\r\nhost: localhost\r\n\r\n" % path)
            await reader.readuntil(answered)
            return reader, writer

        untaken = await asked(b"/large", b"\r\n\r\n")
        slow = await asked(b"/slow", b"begun\r\n")
        short = await asked(b"/short", b"short\r\n0\r\n\r\n")
        release.set()
        await slow[0].readuntil(b"done\r\n0\r\n\r\n")
        fourth = await connect()
        assert await answer(short[0]) == b""
        await untaken[0].readuntil(b"\r\n")  # the length of the chunk
        assert await untaken[0].readexactly(len(large)) == large
        slow[1].write(HEALTH + b"\r\n")
        await slow[0].readuntil(b"short\r\n0\r\n\r\n")
        for _, writer in (untaken, slow, short, fourth):
            writer.close()

    connected(test, Answers)


def test_a_body_that_goes_on_behind_its_answer_has_longer_than_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(connect: Callable[[], Awaitable[Streams]]) -> None:
        async def asked(streams: Streams) -> None:
            streams[1].write(HEALTH + b"\r\n")
            assert (await streams[0].readuntil(b'{"status":"ok"}')).startswith(b"HTTP/1.1 200 ")

        slow, other = await connect(), await connect()
        await asked(other)
        slow[1].write(b"POST /v1/nothing HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\nabc")
        assert (await slow[0].readuntil(b"}}")).startswith(b"HTTP/1.1 404 ")
        monkeypatch.setattr(connection, "HEADER_TIMEOUT", 0.0)
        slow[1].write(b"def")
        for _ in range(3):  # the server has seen those
            await asked(other)
        slow[1].write(b"ghi")
        await asked(slow)
        for _, writer in (slow, other):
            writer.close()

    connected(test)


@pytest.mark.parametrize("header", [b"", b"connection: close\r\n"])
def test_an_answer_that_is_not_taken_holds_no_connection_for_ever(header: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "TAKE_TIMEOUT", 0.0)
    lost, end = asyncio.Event(), connection.Protocol.connection_lost

    class Large(App):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await _begin(send, b"a" * (1 << 25), more=False)  # more than sockets hold

    def ended(protocol: connection.Protocol, exc: Exception | None) -> None:
        lost.set()
        end(protocol, exc)

    monkeypatch.setattr(connection.Protocol, "connection_lost", ended)

    async def test(connect: Callable[[], Awaitable[Streams]]) -> None:
        _, writer = await connect()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(HEALTH + header + b"\r\n")
        await lost.wait()
        writer.close()

    connected(test, Large)
