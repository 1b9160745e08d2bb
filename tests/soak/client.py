"""HTTP, as far as it is needed, and what of an answer can be compared."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any


class Connection:
    """One connection of a client. Whatever does not come within PATIENCE is a TimeoutError."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, method: str, path: str, body: bytes = b"") -> None:
        self.writer.write(request_bytes(method, path, body))

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split(" ")[1]), headers

    async def body(self, headers: dict[str, str], pause: Callable[[], Awaitable[None]] | None = None) -> bytes:
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        parts: list[bytes] = []
        while True:
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            part = (await self.reader.readexactly(size + 2))[:-2]
            if not part:
                return b"".join(parts)
            parts.append(part)
            if pause is not None:
                await pause()

    def close(self, *, hard: bool = False) -> None:
        if hard:  # RST: what was sent and what has come is lost
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.close()


def request_bytes(method: str, path: str, body: bytes) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def essence(answer: Any) -> Any:
    """What of an answer depends on its request alone."""
    if isinstance(answer, list):
        return [essence(one) for one in answer]
    if not isinstance(answer, dict):
        return answer
    left_out = (
        "id",
        "call_id",
        "created",
        "created_at",
        "timings",
        "cached_tokens",
        "prompt_tokens_details",
        "input_tokens_details",
        "input_tokens",  # /v1/messages: those that were not cached
        "cache_read_input_tokens",
    )
    return {name: essence(one) for name, one in answer.items() if name not in left_out}


def streamed(path: str, data: bytes) -> Any:
    """The texts that a stream's events make, in the order of `texts`. Raises ValueError for one that is not whole."""
    events = [line.removeprefix(b"data: ") for line in data.split(b"\n") if line.startswith(b"data: ")]
    if path == "/v1/responses":
        last = json.loads(events[-1])
        if last["type"] not in ("response.completed", "response.incomplete"):
            raise ValueError(last)
        return texts(path, last["response"])
    if path == "/v1/messages":
        *deltas, ended, last = [json.loads(one) for one in events[1:]]
        if last["type"] != "message_stop":
            raise ValueError(last)
        said = [one["delta"]["text"] for one in deltas if one["type"] == "content_block_delta"]
        return [["".join(said), "", ended["delta"]["stop_reason"]]]
    if events[-1] != b"[DONE]":
        raise ValueError(events[-1])
    out: dict[int, list[str]] = {}
    for choice in (choice for event in events[:-1] for choice in json.loads(event)["choices"]):
        said = out.setdefault(choice["index"], ["", "", ""])
        delta = choice.get("delta", choice)
        said[0] += delta.get("content") or delta.get("text") or ""
        for part in delta.get("tool_calls", ()):
            said[1] += part["function"].get("name", "") + part["function"]["arguments"]
        said[2] = choice["finish_reason"] or said[2]
    return [out[i] for i in sorted(out)]


def texts(path: str, answer: Any) -> Any:
    """[text, calls, reason] of each output of a whole answer."""
    if path == "/v1/responses":
        parts = [part["text"] for item in answer["output"] for part in item.get("content", ())]
        calls = [item["name"] + item["arguments"] for item in answer["output"] if "arguments" in item]
        return [["".join(parts), "".join(calls), answer["status"]]]
    if path == "/v1/messages":
        return [["".join(block["text"] for block in answer["content"]), "", answer["stop_reason"]]]
    out = []
    for choice in answer["choices"]:
        message = choice.get("message", choice)
        calls = [call["function"]["name"] + call["function"]["arguments"] for call in message.get("tool_calls", ())]
        out.append([message.get("content") or message.get("text") or "", "".join(calls), choice["finish_reason"]])
    return out
