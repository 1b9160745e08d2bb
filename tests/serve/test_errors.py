"""Whatever is wrong with a request: OpenAI's error object with the field's name, and no other request notices."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from pyengine import Engine

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Client, serving

from pyengine.serve import app
from pyengine.serve.fields import Fields

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hello"}]

# (fields beside messages, the param that is blamed)
WRONG_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 1e400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": 2**70}, "top_k"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 2**40}, "max_tokens"),
    ({"max_tokens": 3.5}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 10**6}, "n"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"stop": ["x" * 200_000]}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"logit_bias": {"1000000": 1}}, "logit_bias"),
    ({"bad_token_ids": [10**6]}, "bad_token_ids"),
    ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"min_tokens": 5}, "min_tokens"),
    ({"n": 2, "temperature": 0}, "n"),
    ({"stop": 5}, "stop"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ({"stream": True, "stream_options": {"nonsense": 1}}, "stream_options.nonsense"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"store": True}, "store"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"no_such_field": 1}, "no_such_field"),
    ({"repeat_penalty": 1.1, "repetition_penalty": 1.1}, "repeat_penalty"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
]

LONG = "x" * 100_000
# of /v1/chat/completions and /v1/responses: what their messages quote
QUOTED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": USER, LONG: 1}),
    (CHAT, {"messages": USER, "model": LONG}),
    ("/v1/responses", {"input": [{"type": "function_call_output", "call_id": LONG, "output": "x"}]}),
    (
        "/v1/responses",
        {"input": "x", "tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function", "name": LONG}},
    ),
]

WRONG_MESSAGES: list[tuple[Any, str]] = [
    (None, "messages"),
    ([], "messages"),
    ("Hello", "messages"),
    ({}, "messages"),
    ([5], "messages[0]"),
    ([{}], "messages[0].role"),
    ([{"role": "king", "content": "x"}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "user", "content": [5]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": "x", "color": 1}], "messages[0].color"),
    ([*USER, {"role": "tool", "content": "4", "tool_call_id": "a"}], "messages[1].tool_call_id"),
    ([*USER, {"role": "tool", "content": "4"}], "messages[1].tool_call_id"),
]

WRONG_BODIES: list[bytes] = [
    b"",
    b"Hello",
    b"[1, 2",
    b"[]",
    b"null",
    b'{"messages": 1',
    b"\xff\xfe{}",
    b'{"a": 1, "a": 2}',
    b'{"temperature": NaN}',
    b'{"seed": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b'{"messages": ' + b"[" * 200 + b"]" * 200 + b"}",
]


@pytest.mark.parametrize(("fields", "param"), WRONG_FIELDS, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_refused_by_its_name(chat_model: Path, fields: dict[str, Any], param: str) -> None:
    async def test(client: Client) -> None:
        answer = await client.post(CHAT, {"messages": USER, "max_tokens": 3, **fields})
        assert answer.status == 400, answer.body
        assert (answer.error["param"] or "") == param
        assert answer.error["type"] == "invalid_request_error"
        assert len(answer.error["message"]) < 1000

    serving(chat_model, test)


def test_wrong_messages_and_bodies(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        for messages, param in WRONG_MESSAGES:
            answer = await client.post(CHAT, {"messages": messages})
            assert (answer.status, answer.error["param"]) == (400, param), answer.body
        for body in WRONG_BODIES:
            answer = await client.post(CHAT, body)
            assert answer.status == 400 and answer.error, body[:50]
        surrogate = await client.post(CHAT, b'{"messages":[{"role":"user","content":"\\ud800"}],"max_tokens":1}')
        assert surrogate.status == 200

    serving(chat_model, test)


def test_null_and_neutral_fields_are_as_absent(chat_model: Path) -> None:
    body = {"messages": USER, "max_tokens": 5, "seed": 1}
    neutral = {
        "tools": [], "tool_choice": None, "response_format": {"type": "text"}, "store": False, "n": 1, "stop": None,
        "metadata": {}, "modalities": ["text"], "user": "someone", "service_tier": "auto", "audio": None,
        "prompt_cache_key": "k", "parallel_tool_calls": True, "logit_bias": {}, "top_logprobs": None, "logprobs": False,
    }  # fmt: skip

    async def test(client: Client) -> None:
        plain = await client.post(CHAT, body)
        assert (await client.post(CHAT, {**body, **neutral})).json["choices"] == plain.json["choices"]
        message = plain.json["choices"][0]["message"]  # as clients send it back
        again = [*USER, {**message, "annotations": [], "audio": None, "tool_calls": None}, *USER]
        assert (await client.post(CHAT, {**body, "messages": again})).status == 200

    serving(chat_model, test)


def test_a_prompt_over_the_context_is_refused_with_both_numbers(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        n_ctx = client.app.models.get(None).engine.n_ctx
        for stream in (False, True):
            body = {"prompt": [5] * (n_ctx + 7), "stream": stream}
            answer = await client.post("/v1/completions", body)
            assert (answer.error["param"], answer.error["code"]) == ("prompt", "context_length_exceeded")
            assert str(n_ctx) in answer.error["message"] and str(n_ctx + 7) in answer.error["message"]
        long = [{"role": "user", "content": "a" * 40 * n_ctx}]
        for path in (CHAT, "/tokenize"):  # before it is tokenized
            error = (await client.post(path, {"messages": long})).error
            assert error["code"] == "context_length_exceeded" and "which are at least" in error["message"]

    serving(chat_model, test)


def test_paths_methods_and_models(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        assert (await client.get("/v2/nothing")).status == 404
        elsewhere = [("/completion", "/v1/completions"), ("/v1/v1/chat/completions", CHAT), ("/v1/models/", "/v1/models/")]
        elsewhere += [("/v1/fim/completions", "/v1/completions")]
        for path, meant in elsewhere:
            answer = await client.post(path, {})
            assert answer.status in (404, 405) and (meant in answer.error["message"]), answer.body
        short = await client.post("/chat/completions", {"messages": USER, "max_tokens": 1})
        assert short.status == 200 and (await client.get("/models")).json == (await client.get("/v1/models")).json
        wrong = await client.get(CHAT)
        assert wrong.status == 405 and wrong.headers["allow"] == "POST"
        unknown = await client.post(CHAT, {"messages": USER, "model": "gpt-5"})
        assert unknown.status == 404 and unknown.error["code"] == "model_not_found"
        assert "tiny" in unknown.error["message"] and unknown.error["param"] == "model"
        listed = (await client.get("/v1/models")).json["data"]
        assert [model["id"] for model in listed] == ["tiny"]
        assert (await client.get("/v1/models/tiny")).json == (await client.get("/models/tiny")).json == listed[0]
        assert (await client.get("/v1/models/other")).status == 404
        assert (await client.post("/v1/completions", {"prompt": "a", "suffix": "b"})).error["param"] == "suffix"
        assert (await client.post("/v1/completions", {"prompt": "a", "best_of": 3})).error["param"] == "best_of"
        assert (await client.post("/v1/completions", {"prompt": []})).error["param"] == "prompt"
        assert (await client.post("/v1/completions", {"prompt": [10**9]})).error["param"] == "prompt[0]"
        head = await client.call("HEAD", "/health")
        assert head.status == 200 and head.body == b""

    serving(chat_model, test)


def test_request_ids_are_the_caller_s_or_new(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        given = await client.get("/health", headers={"X-Request-ID": "mine-1"})
        assert given.headers["x-request-id"] == "mine-1"
        evil = await client.get("/health", headers={"x-request-id": "a\r\nset-cookie: b"})
        assert evil.headers["x-request-id"].startswith("req_")
        assert (await client.get("/nothing")).headers["x-request-id"].startswith("req_")

    serving(chat_model, test)


def test_bodies_have_a_limit_and_a_time(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        long = await client.post(CHAT, b" " * 3000)
        assert long.status == 413 and long.headers["connection"] == "close"
        declared = {"content-length": "100000000", "expect": "100-continue"}
        call = client.begin("POST", CHAT, b"", headers=declared, more=True)
        await call.task
        assert call.answer.status == 413
        slow = client.begin("POST", CHAT, b"{", more=True)
        await slow.task
        assert slow.answer.status == 408 and slow.answer.headers["connection"] == "close"
        encoded = await client.post(CHAT, b"\x1f\x8b\x08", headers={"content-encoding": "gzip"})
        assert encoded.status == 415 and "'gzip'" in encoded.error["message"]
        as_it_is = {"content-encoding": "identity"}
        assert (await client.post(CHAT, {"messages": USER, "max_tokens": 2}, headers=as_it_is)).status == 200
        left = client.begin("POST", CHAT, b"{", more=True)
        left.hang_up()
        await left.task
        assert left.answer.status == 0
        assert (await client.post(CHAT, {"messages": USER, "max_tokens": 2})).status == 200

    serving(chat_model, test, max_body_bytes=2000, body_timeout=0.05)


def test_a_long_body_is_checked_in_a_thread(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other request waits for what the event loop does."""
    threads = []

    def read(*arguments: Any) -> Fields:
        threads.append(threading.get_ident())
        return Fields(*arguments)

    monkeypatch.setattr(app, "Fields", read)

    async def test(client: Client) -> None:
        for n, status in ((10, 200), (20_000, 200), (20_000, 400)):
            answer = await client.post("/detokenize", {"tokens": [5] * n if status == 200 else [5] * n + [-1]})
            assert answer.status == status
        assert [thread == threading.get_ident() for thread in threads] == [True, False, False]
        assert answer.error["param"] == "tokens[20000]"

    serving(chat_model, test)


def test_a_full_queue_says_when_to_come_back(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        model = client.app.models.get(None)
        step, held, loop = model.engine.scheduler.step, asyncio.Event(), asyncio.get_running_loop()

        def slow_step() -> bool:
            asyncio.run_coroutine_threadsafe(held.wait(), loop).result()
            return step()

        model.engine.scheduler.step = slow_step  # type: ignore[method-assign]
        body = {"prompt": [5] * 60, "max_tokens": 2}
        first = client.begin("POST", "/v1/completions", body)  # alone it may be longer than the queue
        while not client.app.queue.jobs():
            await asyncio.sleep(0.001)
        refused = await client.post("/v1/completions", body)
        assert refused.status == 429 and refused.error["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1 and int(refused.headers["retry-after-ms"]) >= 1
        small = client.begin("POST", "/v1/completions", {"prompt": [5] * 10, "max_tokens": 2})
        while len(client.app.queue.jobs()) < 2:
            await asyncio.sleep(0.001)
        held.set()
        await asyncio.gather(first.task, small.task)
        assert first.answer.status == small.answer.status == 200

    serving(chat_model, test, max_queue_tokens=70)


def test_starting_and_draining(chat_model: Path) -> None:
    from pyengine.serve.app import App
    from pyengine.serve.settings import Settings

    async def starting() -> None:
        client = Client(App(Settings(log_format="none")))
        health = await client.get("/health")
        assert health.status == 503 and health.json == {"status": "starting"}
        early = await client.post(CHAT, {"messages": USER})
        assert early.status == 503 and "retry-after" in early.headers

    asyncio.run(starting())

    async def draining(client: Client) -> None:
        running = client.begin("POST", CHAT, {"messages": USER, "max_tokens": 300, "ignore_eos": True, "stream": True})
        await running.until(lambda answer: len(answer.writes) > 2)
        client.app.drain()
        assert (await client.get("/health")).json == {"status": "draining"}
        late = await client.post(CHAT, {"messages": USER})
        assert late.status == 503 and late.error["code"] == "shutting_down" and "retry-after" in late.headers
        client.app.abort_all()  # its time is over
        await running.task
        events = running.answer.body.decode().split("\n\n")
        assert running.answer.is_complete
        assert (
            "[DONE]" in events[-2] or json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
        )

    serving(chat_model, draining)


def test_an_error_in_the_middle_of_a_stream_is_an_event(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        model = client.app.models.get(None)
        step = model.engine.scheduler.step

        def failing_step() -> bool:
            for job in client.app.queue.jobs():
                if len(job.requests[0].output.pieces) >= 5:  # a step may give several  # type: ignore[attr-defined]
                    job.requests[0].error = RuntimeError("a secret of the inside")
            return step()

        model.engine.scheduler.step = failing_step  # type: ignore[method-assign]
        call = client.begin("POST", CHAT, {"messages": USER, "max_tokens": 30, "ignore_eos": True, "stream": True})
        await call.task
        last = call.answer.body.decode().strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
        assert "secret" not in call.answer.body.decode() and call.answer.is_complete

    serving(chat_model, test)


def test_keys_hosts_and_origins(chat_model: Path) -> None:
    from pyengine.serve.routes import ROUTES

    async def keys(client: Client) -> None:
        for path, methods in ROUTES.items():
            for method in methods:
                answer = await client.call(method, path)
                assert answer.status == (200 if path == "/health" else 401), path
        assert (await client.get("/v1/nothing")).status == 401  # nor does it say which paths there are
        for wrong in ("Bearer", "Bearer ", "Bearer one ", "Bearer onex", "Basic !!!", "Basic \xe9", "Bearer \xe9", "Digest one"):
            expected = 200 if wrong == "Bearer one " else 401
            assert (await client.get("/v1/models", headers={"authorization": wrong})).status == expected, wrong
        assert (await client.get("/v1/models", headers={"authorization": "bearer two"})).status == 200
        basic = {"authorization": "Basic YW55Ym9keTpvbmU="}  # anybody:one
        assert (await client.get("/", headers=basic)).status == 200

    serving(chat_model, keys, api_keys=("one", "two"))

    async def origins(client: Client) -> None:
        good = {"origin": "https://good.example", "host": "localhost:80"}
        answer = await client.get("/v1/models", headers=good)
        assert answer.status == 200 and answer.headers["access-control-allow-origin"] == "https://good.example"
        assert "retry-after-ms" in answer.headers["access-control-expose-headers"]
        for evil in ("https://evil.example", "http://[", "\xe9"):
            answer = await client.get("/v1/models", headers={**good, "origin": evil})
            assert answer.status == 403 and answer.error["code"] == "origin_refused"
        same = await client.get("/v1/models", headers={"origin": "http://localhost:80", "host": "localhost:80"})
        assert same.status == 200 and "access-control-allow-origin" not in same.headers
        asked = {**good, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = await client.call("OPTIONS", CHAT, headers=asked)
        assert preflight.status == 204 and preflight.headers["access-control-allow-headers"] == "authorization"
        rebound = await client.get("/v1/models", headers={"host": "evil.example"})
        assert rebound.status == 403 and rebound.error["code"] == "unknown_host"

    serving(chat_model, origins, cors_origins=("https://good.example",), hosts=("localhost",))


def test_callers_with_other_keys_share_no_cached_beginning(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        body = {"prompt": [5] * 200, "max_tokens": 2, "seed": 1}

        async def cached(key: str, **more: Any) -> int:
            headers = {"authorization": f"Bearer {key}"}
            answer = await client.post("/v1/completions", {**body, **more}, headers=headers)
            n: int = answer.json["usage"]["prompt_tokens_details"]["cached_tokens"]
            return n

        assert [await cached("one"), await cached("one"), await cached("two")] == [0, 199, 0]
        assert [await cached("one", cache_salt="a"), await cached("two", cache_salt="a")] == [0, 0]
        assert await cached("two", cache_salt="a") == 199

    serving(chat_model, test, api_keys=("one", "two"))


def test_tokenize_and_detokenize_are_the_tokenizer_s(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(client: Client) -> None:
        with Engine(chat_model) as engine:
            ids = engine.tokenize("Hello wörld")
            chat = engine.chat_ids(USER)
        for name in ("content", "prompt"):
            assert (await client.post("/tokenize", {name: "Hello wörld"})).json["tokens"] == ids
        assert (await client.post("/tokenize", {"messages": USER})).json["tokens"] == chat
        pieces = (await client.post("/tokenize", {"content": "Hello", "with_pieces": True})).json["tokens"]
        assert "Hello" in "".join(entry["piece"] for entry in pieces)
        back = await client.post("/detokenize", {"tokens": ids, "skip_special_tokens": True})
        assert back.json["content"] == "Hello wörld"
        assert (await client.post("/tokenize", {})).status == 400
        main, threads = threading.get_ident(), []

        def dumps(value: Any) -> bytes:
            threads.append(threading.get_ident())
            return json.dumps(value).encode()

        monkeypatch.setattr("pyengine.serve.tokens.dumps", dumps)  # a text may be a million tokens, and others wait for the loop
        assert (await client.post("/tokenize", {"content": "Hello", "with_pieces": True})).json["tokens"] == pieces
        assert (await client.post("/detokenize", {"tokens": ids})).json["content"] == "Hello wörld"
        assert len(threads) == 2 and main not in threads
        assert (await client.post("/detokenize", {"tokens": [1, "x"]})).error["param"] == "tokens[1]"
        assert (await client.post("/tokenize", {"content": "a", "prompt": "b"})).error["param"] == "prompt"

    serving(chat_model, test)


def test_metrics_count_what_was_done(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        answer = await client.post(CHAT, {"messages": USER, "max_tokens": 4, "ignore_eos": True})
        text = (await client.get("/metrics")).body.decode()
        assert 'vllm:request_success_total{finished_reason="length",model_name="tiny"} 1.0' in text
        assert 'vllm:generation_tokens_total{model_name="tiny"} 4.0' in text
        prompt = answer.json["usage"]["prompt_tokens"]
        assert f'vllm:prompt_tokens_total{{model_name="tiny"}} {prompt}.0' in text
        assert 'vllm:time_to_first_token_seconds_count{model_name="tiny"} 1.0' in text
        assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in text
        assert 'vllm:request_prompt_tokens_bucket{le="+Inf",model_name="tiny"} 1.0' in text
        assert 'vllm:request_generation_tokens_sum{model_name="tiny"} 4.0' in text
        assert 'pyengine:http_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text

    serving(chat_model, test)


def test_requests_are_counted_by_their_model(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        may_step = threading.Event()
        scheduler = client.app.models.get(None).engine.scheduler
        step = scheduler.step
        scheduler.step = lambda: may_step.wait() and step()  # type: ignore[method-assign]
        assert client.app.queue.counts() == {}
        call = client.begin("POST", CHAT, {"messages": USER, "max_tokens": 4, "n": 3, "temperature": 1})
        try:
            while not client.app.queue.jobs():
                await asyncio.sleep(0.001)
            assert client.app.queue.counts() == {"tiny": (3, 0)}
            assert (await client.get("/props")).json["requests_waiting"] == 3
        finally:
            may_step.set()
        await call.task
        assert client.app.queue.counts() == {}

    serving(chat_model, test)


def test_paths_that_clients_make_up_add_no_metric(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        for path in ("/v1/models/one", "/models/two", "/three", "/v1/models/a/b"):
            assert (await client.get(path)).status == 404
        await client.post("/completions", {"prompt": "a", "max_tokens": 1})
        text = (await client.get("/metrics")).body.decode()
        counted = [line for line in text.splitlines() if line.startswith("pyengine:http_requests_total")]
        assert sorted(counted) == [
            'pyengine:http_requests_total{path="/v1/completions",status="200"} 1.0',
            'pyengine:http_requests_total{path="/v1/models/{id}",status="404"} 3.0',
            'pyengine:http_requests_total{path="other",status="404"} 1.0',
        ]

    serving(chat_model, test)


def test_an_error_does_not_send_back_all_that_came(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        for path, body in QUOTED:
            answer = await client.post(path, body)
            assert answer.status in (400, 404) and "xxx" in answer.error["message"]
            assert len(answer.body) < 5000

    serving(chat_model, test)
