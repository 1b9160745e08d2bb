"""/api, ollama's form: the same answers as those of the other forms, a line of JSON for each piece, and its clients' words."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Answer, Client, serving
from serve.scripted import scripted
from serve.test_responses import ONE
from serve.test_server import server

from pyengine.results import Piece
from pyengine.run.jobs import Job
from pyengine.run.request import GenerationRequest
from pyengine.serve import work
from pyengine.serve.errors import HTTPError
from pyengine.serve.fields import Fields
from pyengine.serve.ollama_fields import CHAT as CHAT_FIELDS
from pyengine.serve.ollama_fields import messages_of
from pyengine.serve.rows import MAX_INPUTS

CHAT, GENERATE = "/api/chat", "/api/generate"
USER = {"role": "user", "content": "Hello"}
SAMPLED: dict[str, Any] = {"seed": 3, "temperature": 0.8, "top_k": 20, "repeat_penalty": 1.1}
HELLO: dict[str, Any] = {"messages": [USER], "options": {**SAMPLED, "num_predict": 12}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def lines(answer: Answer) -> list[Any]:
    """Of a stream: each line is one object, and the last one alone is done."""
    assert answer.status == 200 and answer.headers["content-type"] == "application/x-ndjson", answer.body
    assert answer.body.endswith(b"\n")
    found = [json.loads(line) for line in answer.body.decode().splitlines()]
    assert [one["done"] for one in found] == [False] * (len(found) - 1) + [True]
    return found


def untimed(value: dict[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in value.items() if not name.endswith("_duration") and name != "created_at"}


def test_a_chat_is_that_of_the_other_form_whole_and_streamed(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        other = (await client.post("/v1/chat/completions", {"messages": [USER], "max_tokens": 12, **SAMPLED})).json
        whole = await client.post(CHAT, {**HELLO, "stream": False, "model": "tiny:latest"})
        assert untimed(whole.json) == {
            "model": "tiny",
            "message": {"role": "assistant", "content": other["choices"][0]["message"]["content"]},
            "done": True,
            "done_reason": other["choices"][0]["finish_reason"],
            "prompt_eval_count": other["usage"]["prompt_tokens"],
            "eval_count": other["usage"]["completion_tokens"],
        }
        assert all(isinstance(whole.json[f"{name}_duration"], int) for name in ("total", "load", "prompt_eval", "eval"))
        streamed = lines(await client.post(CHAT, HELLO))
        text = "".join(one["message"]["content"] for one in streamed)
        assert untimed({**streamed[-1], "message": {"role": "assistant", "content": text}}) == untimed(whole.json)

    serving(chat_model, test)


def test_a_text_goes_through_the_template_or_not(chat_model: Path) -> None:
    options = {**SAMPLED, "num_predict": 8}

    async def test(client: Client) -> None:
        said = [{"role": "system", "content": "Be brief"}, USER]
        chat = (await client.post(CHAT, {"messages": said, "options": options, "stream": False})).json
        body = {"prompt": "Hello", "system": "Be brief", "options": options}
        whole = (await client.post(GENERATE, {**body, "stream": False})).json
        assert whole["response"] == chat["message"]["content"] and "message" not in whole
        assert "".join(one["response"] for one in lines(await client.post(GENERATE, body))) == whole["response"]
        raw = (await client.post(GENERATE, {"prompt": "Hello", "raw": True, "options": options, "stream": False})).json
        other = (await client.post("/v1/completions", {"prompt": "Hello", "max_tokens": 8, **SAMPLED})).json
        assert raw["response"] == other["choices"][0]["text"]

    serving(chat_model, test)


def test_calls_come_whole_and_are_answered_in_their_order(
    tool_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, ONE + ONE)
    body = {"messages": [USER], "tools": [WEATHER], "options": {"num_predict": 400}}

    async def test(client: Client) -> None:
        whole = (await client.post(CHAT, {**body, "stream": False})).json
        calls = whole["message"]["tool_calls"]
        assert [call["function"]["index"] for call in calls] == [0, 1]
        assert {call["function"]["name"] for call in calls} == {"weather"}
        assert all(isinstance(call["function"]["arguments"], dict) for call in calls)
        streamed = lines(await client.post(CHAT, body))
        assert [call for one in streamed for call in one["message"].get("tool_calls", ())] == calls
        first, second = ({"role": "tool", "content": text, "tool_name": "weather"} for text in ("wet", "dry"))
        said = [USER, whole["message"], first, second]
        answer = await client.post(CHAT, {**body, "messages": said, "stream": False})
        assert answer.status == 200, answer.body
        for wrong, param in (
            ([*said, first], "messages[4].role"),
            ([USER, whole["message"], {**first, "tool_name": "other"}], "messages[2].role"),
            ([{**USER, "tool_calls": calls}], "messages[0].tool_calls"),
        ):
            answer = await client.post(CHAT, {**body, "messages": wrong})
            assert (answer.status, answer.json["param"]) == (400, param), answer.body

    serving(tool_model("qwen", ()), test)


def test_a_result_answers_the_first_call_that_waits_for_it() -> None:
    """At random, beside a plain list of what waits. Ids may come again."""
    rng = random.Random(4)
    for _ in range(300):
        waiting: list[tuple[str, str]] = []
        said: list[dict[str, Any]] = []
        wanted: list[tuple[str, str] | None] = []
        while None not in wanted and len(said) < 12:
            if rng.random() < 0.4:
                calls = [(rng.choice("12345"), rng.choice("ab")) for _ in range(rng.randrange(1, 4))]
                for id_, tool in calls:
                    waiting = [one for one in waiting if one[0] != id_] + [(id_, tool)]
                functions = [{"id": id_, "function": {"name": tool, "arguments": {}}} for id_, tool in calls]
                said.append({"role": "assistant", "tool_calls": functions})
            else:
                given = {"tool_call_id": rng.choice((None, "1", "2")), "tool_name": rng.choice((None, "a", "b"))}
                keys = tuple(given.values())
                fitting = (one for one in waiting if all(key in (None, own) for key, own in zip(keys, one, strict=True)))
                wanted.append(next(fitting, None))
                waiting = [one for one in waiting if one != wanted[-1]]
                said.append({"role": "tool", **given})
        fields = Fields({"messages": said}, CHAT_FIELDS).take("messages")
        if None in wanted:
            with pytest.raises(HTTPError, match=rf"messages\[{len(said) - 1}\]\.role is \"tool\", and no call waits"):
                messages_of(fields)
        else:
            results = [one for one in messages_of(fields) if one["role"] == "tool"]
            assert [(one["tool_call_id"], one["name"]) for one in results] == wanted


def test_fields_are_taken_or_refused_by_name(chat_model: Path) -> None:
    taken: list[tuple[str, Any]] = [
        ("keep_alive", "5m"), ("keep_alive", -1), ("think", False), ("format", ""), ("stream", None), ("logprobs", False),
        ("options", {"num_ctx": 8192, "num_predict": -1, "seed": -1, "use_mmap": True, "stop": ["x"], "repeat_last_n": 64}),
        ("options", {"mirostat": 0, "mirostat_tau": 5.0, "num_thread": 4, "top_k": 0, "num_predict": 1}),
    ]  # fmt: skip
    refused: list[tuple[str, Any, str]] = [
        ("format", "xml", "format"), ("think", True, "think"), ("think", "much", "think"), ("images", [], "images"),
        ("keep_alive", [], "keep_alive"), ("truncate", True, "truncate"), ("logprobs", True, "logprobs"),
        ("options", {"num_predict": 0}, "options.num_predict"), ("options", {"num_ctx": "x"}, "options.num_ctx"),
        ("options", {"temperature": -1}, "options.temperature"), ("options", {"mirostat": 2}, "options.mirostat"),
        ("options", {"repeat_last_n": -2}, "options.repeat_last_n"), ("options", {"nonsense": 1}, "options.nonsense"),
        ("messages", [{**USER, "images": ["AAAA"]}], "messages[0].images"), ("tools", [WEATHER], "tools"),
        ("messages", [{"role": "king"}], "messages[0].role"), ("model", "other", "model"), ("nonsense", 1, "nonsense"),
    ]  # fmt: skip

    async def test(client: Client) -> None:
        for name, value in taken:
            answer = await client.post(CHAT, {"messages": [USER], "options": {"num_predict": 1}, name: value})
            assert lines(answer)[-1]["done"], answer.body
        for name, value, param in refused:
            answer = await client.post(CHAT, {**HELLO, name: value})
            assert answer.status == (404 if name == "model" else 400), (name, value, answer.body)
            assert set(answer.json) == {"error", "param", "code"} and answer.json["param"] == param, answer.body
            assert isinstance(answer.json["error"], str)
        for body, param in (
            ({"raw": True, "system": "x"}, "system"), ({"context": [1]}, "context"), ({"suffix": "x"}, "suffix"),
            ({"template": "x"}, "template"), ({"prompt": "x" * 600}, "prompt"), ({"raw": True, "think": True}, "think"),
        ):  # fmt: skip
            answer = await client.post(GENERATE, {"prompt": "x", **body})
            assert (answer.status, answer.json["param"]) == (400, param), answer.body

    serving(chat_model, test)


def test_an_answer_keeps_its_schema(chat_model: Path) -> None:
    pytest.importorskip("llguidance", reason="the extra guide is not installed")
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}

    async def test(client: Client) -> None:
        answer = (await client.post(CHAT, {"messages": [USER], "stream": False, "format": schema})).json
        assert set(json.loads(answer["message"]["content"])) == {"a"} and answer["done_reason"] == "stop"
        wrong = await client.post(CHAT, {"messages": [USER], "format": {"type": "nonsense"}})
        assert (wrong.status, wrong.json["param"]) == (400, "format")

    serving(chat_model, test)


def test_models_are_told_as_clients_ask_for_them(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        (card,) = (await client.get("/api/tags")).json["models"]
        (running,) = (await client.get("/api/ps")).json["models"]
        assert card["name"] == card["model"] == running["name"] == "tiny" and card["size"] == chat_model.stat().st_size
        assert running["context_length"] == 512 and len(card["digest"]) == 64 and card["digest"] == running["digest"]
        shown = (await client.post("/api/show", {"model": "tiny"})).json
        family = shown["model_info"]["general.architecture"]
        assert shown["model_info"][f"{family}.context_length"] == 512 and "completion" in shown["capabilities"]
        assert (await client.post("/api/show", {"name": "tiny"})).json == shown
        assert (await client.post("/api/show", {"model": "none"})).status == 404
        for path, way in (("/api/pull", "those of the command line"), ("/api/embeddings", "there is /api/embed")):
            answer = await client.post(path, {"model": "none"})
            assert answer.status == 404 and way in answer.json["error"]
        assert (await client.get("/api/version")).json["version"]
        for path, empty in ((CHAT, {"messages": []}), (CHAT, {}), (GENERATE, {}), (GENERATE, {"prompt": ""})):
            loaded = (await client.post(path, {"model": "tiny", **empty})).json
            assert loaded["done"] and loaded["done_reason"] == "load"

    serving(chat_model, test)


def test_a_model_whose_file_has_gone_is_still_told_of(chat_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "gone.safetensors"
    shutil.copy(chat_model, path)

    async def test(client: Client) -> None:
        path.unlink()
        for one in ("/api/tags", "/api/ps"):
            (card,) = (await client.get(one)).json["models"]
            assert card["size"] == chat_model.stat().st_size

    serving(path, test)


def test_vectors_are_those_of_the_other_form(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        other = (await client.post("/v1/embeddings", {"input": ["a", "bc"], "dimensions": 8})).json
        vectors = [one["embedding"] for one in other["data"]]
        for texts, wanted in ((["a", "bc"], vectors), ("a", vectors[:1])):
            answer = await client.post("/api/embed", {"model": "tiny", "input": texts, "dimensions": 8})
            assert answer.json["embeddings"] == wanted
        assert (await client.post("/api/embed", {"input": "a", "dimensions": 10**6})).json["param"] == "dimensions"
        assert (await client.post("/api/embed", {"input": []})).json["param"] == "input"
        many = await client.post("/api/embed", {"input": ["a"] * (MAX_INPUTS + 1)})
        assert (many.status, many.json["param"]) == (400, "input")

    serving(chat_model, test)


def test_a_silent_stream_shows_life_and_an_error_is_its_last_line(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read(*_: Any) -> Any:
        yield []
        raise RuntimeError("no more")

    monkeypatch.setattr(work, "read", read)

    async def test(client: Client) -> None:
        answer = await client.post(CHAT, HELLO)
        silence, error = (json.loads(line) for line in answer.body.splitlines())
        assert silence["message"]["content"] == "" and silence["done"] is False
        assert "internal error" in error["error"]

    serving(chat_model, test)


def test_the_package_of_ollama_talks(chat_model: Path) -> None:
    ollama: Any = pytest.importorskip("ollama", reason="the package ollama is not installed")
    with (
        server("-m", f"mine={chat_model}", "--log-format", "none") as (_, port),
        ollama.Client(host=f"http://127.0.0.1:{port}") as client,
    ):
        options = {"num_predict": 6, "seed": 1}
        whole = client.chat(model="mine", messages=[USER], options=options)
        streamed = list(client.chat(model="mine", messages=[USER], options=options, stream=True))
        assert "".join(one.message.content for one in streamed) == whole.message.content
        assert streamed[-1].done_reason == whole.done_reason == "length" and whole.eval_count == 6
        text = client.generate(model="mine", prompt="Hello", options=options)
        assert text.response == whole.message.content
        assert [one.model for one in client.list().models] == ["mine"]
        assert [one.model for one in client.ps().models] == ["mine"]
        assert "completion" in client.show("mine").capabilities
        assert len(client.embed(model="mine", input=["a", "b"]).embeddings) == 2
        with pytest.raises(ollama.ResponseError) as caught:
            client.chat(model="other", messages=[USER])
        assert caught.value.status_code == 404 and "other" in caught.value.error


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_error_before_the_first_look_is_told(chat_model: Path, monkeypatch: pytest.MonkeyPatch, is_stream: bool) -> None:
    """A penalty under which logits overflow ends the request in its first step, whose end the reader may have missed."""
    read, finish = work.read, work.finish

    async def late_read(job: Job, interval: float) -> AsyncIterator[list[tuple[int, list[Piece]]]]:
        await job.wait(lambda: job.is_done)
        async for news in read(job, interval):
            yield news

    async def late_finish(job: Job) -> list[GenerationRequest]:
        await job.wait(lambda: job.is_done)
        return await finish(job)

    monkeypatch.setattr(work, "read", late_read)
    monkeypatch.setattr(work, "finish", late_finish)

    async def test(client: Client) -> None:
        options = {"repeat_penalty": 1e-45, "num_predict": 3, "temperature": 0.7}
        answer = await client.post(CHAT, {"messages": [USER], "options": options, "stream": is_stream})
        assert "overflows under the penalties" in json.loads(answer.body.splitlines()[-1])["error"]

    serving(chat_model, test)
