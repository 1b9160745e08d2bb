"""Requests to the server: bodies of every endpoint changed anywhere, other methods, paths and headers."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from pathlib import Path
from typing import Any

from fuzz import mutations
from fuzz.cases import Case
from fuzz.targets import seeds
from fuzz.targets.template import conversation
from serve.client import Client, serving

from pyengine.freeze import freeze

_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 3}},
    "required": ["a"],
    "additionalProperties": False,
}
_FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": _SCHEMA, "strict": True}}
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": _SCHEMA}}
_FLAT_TOOL = {"type": "function", "name": "f", "description": "d", "parameters": _SCHEMA, "strict": True}
_CALLED = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": "b"}', "status": "completed"}
_RESULT = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "d"}]}
_USE = {"type": "tool_use", "id": "c", "name": "f", "input": {"a": "b"}}
_USED = {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "d"}], "is_error": False}
_ANTHROPIC = {
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}, _USE]},
        {"role": "user", "content": [_USED, {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]},
    ],
    "system": [{"type": "text", "text": "s"}],
    "tools": [{"name": "f", "input_schema": _SCHEMA}],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    "output_config": {"format": {"type": "json_schema", "schema": _SCHEMA}},
}
_OLLAMA = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "b"}}}]},
    {"role": "tool", "content": "d", "tool_name": "f"},
]
_OPTIONS = {"temperature": 0.7, "top_k": 5, "seed": -1, "num_predict": 3, "stop": ["x"], "repeat_last_n": 64}
_SAMPLING = {"temperature": 0.7, "top_p": 0.9, "seed": 1, "max_tokens": 3, "stop": ["x"], "logit_bias": {"5": -1}} | {
    "dry_multiplier": 0.8, "dry_sequence_breakers": ["\n", "ab"], "xtc_probability": 0.5, "no_repeat_ngram_size": 3,
    "bad_words": ["a"],
}  # fmt: skip
_CHAT = {"messages": seeds.MESSAGES, "max_tokens": 3}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        _CHAT | _SAMPLING,
        _CHAT | {"logprobs": True, "top_logprobs": 2, "n": 2, "frequency_penalty": 0.1},
        _CHAT | {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        _CHAT | {"tools": [_TOOL], "tool_choice": "required"},
        _CHAT | {"response_format": _FORMAT},
        _CHAT | {"response_format": {"type": "json_object", "schema": _SCHEMA}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_completion_tokens": 2},
        {
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a <|end|>"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
            "max_tokens": 2,
        },
        _CHAT | {"grammar": 'root ::= (item "." | start)+  # a\nitem ::= [a-z\\u0041]{1,2}\nstart ::= "\\x41\\""'},
    ],
    "/v1/completions": [
        {"prompt": "hi", **_SAMPLING},
        {"prompt": ["a", "b"], "max_tokens": 2, "echo": True, "logprobs": 2},
        {"prompt": [1, 2, 3], "max_tokens": 2, "stream": True},
    ],
    "/v1/responses": [
        {"input": "hi", "max_output_tokens": 2},
        {"input": seeds.MESSAGES, "max_output_tokens": 2, "stream": True},
        {
            "input": [{"role": "user", "content": "hi"}, _CALLED, _RESULT],
            "max_output_tokens": 2,
            "metadata": {"a": "b"},
        },
        {
            "input": "hi",
            "max_output_tokens": 2,
            "tools": [_FLAT_TOOL],
            "tool_choice": {"type": "function", "name": "f"},
        },
        {"input": [{"type": "item_reference", "id": "msg_1"}], "previous_response_id": "resp_1", "store": True},
    ],
    "/v1/messages": [
        {"messages": seeds.MESSAGES, "max_tokens": 2, "stop_sequences": ["x"], "stream": True},
        {**_ANTHROPIC, "max_tokens": 2},
        {**_ANTHROPIC, "max_tokens": 2, "tool_choice": {"type": "none"}, "metadata": {"user_id": "u"}},
    ],
    "/v1/messages/count_tokens": [_ANTHROPIC],
    "/v1/responses/input_tokens": [{"input": "hi", "instructions": "s", "tools": [_FLAT_TOOL], "tool_choice": "required"}],
    "/v1/embeddings": [{"input": ["hi", [1, 2]], "dimensions": 3, "encoding_format": "base64", "pooling": "mean"}],
    "/v1/rerank": [{"query": "hi", "documents": ["a", {"text": "b"}], "top_n": 1, "truncate": True, "max_tokens_per_doc": 3}],
    "/api/chat": [
        {"messages": seeds.MESSAGES, "options": {**_OPTIONS, "num_ctx": 512, "mirostat": 0}, "keep_alive": "5m"},
        {"messages": _OLLAMA, "tools": [_TOOL], "options": {"num_predict": 3}, "stream": False, "think": False},
        {"messages": [{"role": "user", "content": "hi"}], "format": _SCHEMA, "options": {"num_predict": 3}},
    ],
    "/api/generate": [
        {"prompt": "hi", "system": "s", "format": "json", "options": _OPTIONS},
        {"prompt": "hi", "raw": True, "stream": False, "options": _OPTIONS},
    ],
    "/api/embed": [{"input": ["hi", "b"], "dimensions": 3, "options": {"num_thread": 1}}],
    "/api/show": [{"model": "tiny", "verbose": True}],
    "/infill": [{"input_prefix": "a", "input_suffix": "b", "input_extra": [{"filename": "c", "text": "d"}], "n_predict": 2}],
    "/tokenize": [{"content": "hi <|end|>", "add_special": True, "with_pieces": True}],
    "/detokenize": [{"tokens": [1, 2, 257]}],
}
_OTHER_PATHS = ["/", "/health", "/metrics", "/props", "/v1/models", "/v1/models/tiny", "/v1/models/", "/x", ""]
_OTHER_PATHS += ["/api/tags", "/api/ps", "/api/pull"] + [
    f"/v1/responses/resp_1{more}" for more in ("", "?cache_salt=a", "/input_items?limit=2&order=asc&after=b")
]
_HEADER_VALUES = ["http://[", "//[", "null", "Basic \xe9", "Basic !", "Bearer \xff", "gzip", "100-continue", "-1", "9" * 30]
_HEADERS = ["authorization", "origin", "host", "content-type", "content-length", "x-request-id", "expect", "content-encoding"]
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "num_predict", "n_predict", "n", "best_of")
_MOST = dict.fromkeys(_LIMITS, 4)
_REQUESTS = 10  # of a case: a server's start is most of its time


class ServeTarget:
    name = "serve"

    def __init__(self, scratch: Path) -> None:
        self.stage = ""
        source = seeds.write_files(scratch / "hf", seeds.hf_files())
        self._path = freeze(source, scratch / "m.safetensors", overwrite=True)
        self._raised: list[BaseException] = []
        handler = logging.Handler()
        handler.emit = self._note  # type: ignore[method-assign]
        logging.getLogger("pyengine").addHandler(handler)

    def _note(self, record: logging.LogRecord) -> None:
        """The application logs what it did not expect, and answers 500."""
        if record.exc_info and record.exc_info[1] is not None:
            self._raised.append(record.exc_info[1])

    def make(self, rng: random.Random) -> Case:
        return Case({}, [self._request(rng) for _ in range(_REQUESTS)])

    def _request(self, rng: random.Random) -> dict[str, Any]:
        path = rng.choice(list(BODIES))
        body = mutations.mutated(rng, rng.choice(BODIES[path]), rng.choice([0, 1, 1, 2, 3]))
        if isinstance(body, dict) and "messages" in body and rng.random() < 0.2:
            body["messages"] = conversation(rng)
        data = json.dumps(_bounded(body)).encode()
        if rng.random() < 0.1:
            data = mutations.mutated_bytes(rng, data)
        if rng.random() < 0.05:
            path = rng.choice(_OTHER_PATHS)
        return {
            "method": rng.choice(["GET", "HEAD", "OPTIONS", "PUT", "x", ""]) if rng.random() < 0.05 else "POST",
            "path": path,
            "body": data,
            "headers": {rng.choice(_HEADERS): self._header(rng) for _ in range(rng.choice([0, 0, 0, 1, 3]))},
        }

    @staticmethod
    def _header(rng: random.Random) -> str:
        return rng.choice(_HEADER_VALUES) if rng.random() < 0.5 else _latin(mutations.value(rng))

    def run(self, case: Case) -> None:
        self._raised.clear()
        serving(self._path, lambda client: self._send_all(client, case.arguments))

    async def _send_all(self, client: Client, requests: list[dict[str, Any]]) -> None:
        for request in requests:
            self.stage = f"{request['method']} {request['path']}"
            call = client.call(request["method"], request["path"], request["body"], headers=request["headers"])
            answer = await asyncio.wait_for(call, 60)
            if self._raised:
                raise self._raised[0]
            assert 200 <= answer.status < 500 or answer.status == 503, answer.body[:500]


def _bounded(body: Any) -> Any:
    """Wishes for very much are granted for a little: they are no faults, they only take long."""
    for part in (body, body.get("options")) if isinstance(body, dict) else ():
        for name, most in _MOST.items():
            if isinstance(part, dict) and type(part.get(name)) in (int, float) and part[name] > most:
                part[name] = most
    return body


def _latin(value: Any) -> str:
    return str(value)[:2000].encode("latin-1", "replace").decode("latin-1")
