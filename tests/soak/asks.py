"""What clients ask for, right and wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

JSON_SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"enum": [1, 2, 3]}}}
JSON_SCHEMA |= {"required": ["name", "n"], "additionalProperties": False}
FUNCTION = {"name": "note", "parameters": JSON_SCHEMA}
BEGINNINGS = (
    "Once upon a time there was a little girl", "The dog saw a big red ball and", "One day, Tom and his mom went", "x",
)  # fmt: skip


@dataclass(frozen=True)
class Ask:
    path: str
    body: dict[str, Any]

    @property
    def can_stream(self) -> bool:
        return self.path != "/v1/embeddings" and self.body.get("max_tokens") != 0


def asks(rng: random.Random) -> list[Ask]:
    """The requests whose answers are known: every endpoint, short and long, with what a request may have."""
    out: list[Ask] = []
    for i in range(24):
        text = " ".join(rng.choice(BEGINNINGS) for _ in range(rng.choice((1, 1, 3, 12))))
        base: dict[str, Any] = {"seed": i, "temperature": rng.choice((0, 0.8, 1.5)), "cache_salt": rng.choice("ab")}
        n_tokens = rng.choice((1, 5, 30, 120))
        more: dict[str, Any] = rng.choice(
            ({}, {"n": 3, "temperature": 1}, {"stop": ["the", "."]}, {"repetition_penalty": 1.3}, {"ignore_eos": True})
        )
        messages = [{"role": "user", "content": text}]
        out.append(Ask("/v1/completions", {**base, **more, "prompt": text, "max_tokens": n_tokens, "logprobs": 2}))
        out.append(Ask("/v1/chat/completions", {**base, **more, "messages": messages, "max_tokens": n_tokens}))
        out.append(Ask("/v1/responses", {**base, "input": text, "max_output_tokens": n_tokens}))
        out.append(Ask("/v1/messages", {**base, "messages": messages, "max_tokens": n_tokens}))
    out.append(Ask("/v1/completions", {"prompt": list(BEGINNINGS), "max_tokens": 20, "seed": 1}))
    out.append(Ask("/v1/completions", {"prompt": BEGINNINGS[0], "max_tokens": 0, "echo": True, "logprobs": 0}))
    out.append(Ask("/v1/embeddings", {"input": list(BEGINNINGS)}))
    if find_spec("llguidance") is not None:
        base = {"seed": 3, "temperature": 1}
        tool, flat = {"type": "function", "function": FUNCTION}, {"type": "function", **FUNCTION}
        schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": JSON_SCHEMA}}
        chat = {**base, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 150}
        out.append(Ask("/v1/chat/completions", {**chat, "response_format": schema}))
        out.append(Ask("/v1/chat/completions", {**chat, "tools": [tool], "tool_choice": "required"}))
        responses = {**base, "input": "Hi", "max_output_tokens": 150}
        out.append(Ask("/v1/responses", {**responses, "tools": [flat], "tool_choice": "required"}))
    return out


WRONG: list[tuple[str, str, bytes, tuple[int, ...]]] = [  # method, path, body, statuses that are right
    ("POST", "/v1/completions", b"", (400,)),
    ("POST", "/v1/completions", b"nonsense", (400,)),
    ("POST", "/v1/completions", b"[]", (400,)),
    ("POST", "/v1/completions", b"\xff\xfe", (400,)),
    ("POST", "/v1/completions", b"[" * 100_000, (400,)),
    ("POST", "/v1/completions", b'{"prompt": "a", "prompt": "b"}', (400,)),
    ("POST", "/v1/completions", b'{"prompt": "a", "max_tokens": -1}', (400,)),
    ("POST", "/v1/completions", b'{"prompt": "a", "max_tokens": 1e99}', (400,)),
    ("POST", "/v1/completions", b'{"prompt": "a", "temperature": NaN}', (400,)),
    ("POST", "/v1/completions", b'{"prompt": "a", "n": 100000000}', (400,)),
    ("POST", "/v1/completions", b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", (400,)),
    ("POST", "/v1/completions", b'{"prompt": [-1]}', (400,)),
    ("POST", "/v1/completions", b'{"prompt": "' + b"word " * 200_000 + b'"}', (400,)),
    ("POST", "/v1/completions", b'{"prompt": "a", "model": "nobody"}', (404,)),
    ("POST", "/v1/completions", b'{"prompt": "a", "stop": [' + b'"x",' * 9_999 + b'"y"]}', (400,)),
    ("POST", "/v1/completions", b'{"prompt": "\\ud800", "max_tokens": 1}', (200, 400)),
    ("POST", "/v1/completions", b'{"prompt": "a", "structured_outputs": {"regex": "("}}', (400,)),
    ("POST", "/v1/completions", b" " * (5 << 20), (413,)),
    ("POST", "/v1/chat/completions", b'{"messages": []}', (400,)),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]}', (400,)),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', (400,)),
    ("POST", "/v1/responses", b'{"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}', (400,)),
    ("POST", "/v1/messages", b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', (400,)),
    ("POST", "/v1/messages/count_tokens", b'{"messages": [{"role": "user", "content": 5}]}', (400,)),
    ("POST", "/v1/embeddings", b'{"input": []}', (400,)),
    ("GET", "/v1/completions", b"", (405,)),
    ("GET", "/nowhere", b"", (404,)),
    ("PATCH", "/v1/models", b"{}", (405,)),
    ("GET", "/v1/models/nobody", b"", (404,)),
    ("GET", "/v1/responses/nobody", b"", (404,)),
    ("DELETE", "/v1/responses/nobody", b"", (404,)),
    ("GET", "/v1/responses/nobody/input_items?limit=x", b"", (400,)),
    ("POST", "/v1/responses", b'{"input": "a", "previous_response_id": "nobody"}', (400,)),
    ("POST", "/v1/completions", b'{"prompt": "a", "grammar": "root ::= other"}', (400,)),
]
LOOKS = ("/health", "/metrics", "/props", "/v1/models", "/openapi.json", "/")
GARBAGE = (
    b"\x16\x03\x01\x02\x00",
    b"GET\r\n\r\n",
    b"\r\n" * 50,
    b"POST / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nA" + b"a" * 70_000,
)
