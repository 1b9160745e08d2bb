"""Holes over HTTP: /infill in llama.cpp's form, and the suffix of /v1/completions and /api/generate."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Answer, Client, serving
from serve.conftest import TURNS, make_chat_model

from pyengine import Engine

MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
INFILL, TEXT, GENERATE = "/infill", "/v1/completions", "/api/generate"
PREFIX, LINE, SUFFIX = "def add(a, b):\n", "    return ", "\n\nprint(add(1, 2))\n"
HOLE = {"input_prefix": PREFIX, "prompt": LINE, "input_suffix": SUFFIX}
GREEDY: dict[str, Any] = {"temperature": 0, "n_predict": 8}


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with the tokens of Qwen2.5-Coder."""
    return make_chat_model(tmp_path_factory.mktemp("coder"), TURNS, MARKS)


def events(answer: Answer) -> list[Any]:
    """llama.cpp's own form has no [DONE]."""
    return [json.loads(line.removeprefix("data: ")) for line in answer.body.decode().strip().split("\n\n")]


def filled(coder: Path, prefix: str = PREFIX + LINE, suffix: str = SUFFIX, **options: Any) -> Any:
    with Engine(coder, n_threads=1) as engine:
        return engine.infill(prefix, suffix, **{"temperature": 0, "max_tokens": 8, **options})


def test_every_endpoint_fills_as_the_engine_does(coder: Path) -> None:
    wanted = filled(coder)
    asked = {"prompt": PREFIX + LINE, "suffix": SUFFIX, "temperature": 0, "max_tokens": 8}
    ollama = {"prompt": PREFIX + LINE, "suffix": SUFFIX, "options": {"temperature": 0, "num_predict": 8}}

    async def test(client: Client) -> None:
        answer = (await client.post(INFILL, {**HOLE, **GREEDY})).json
        assert answer["content"] == wanted.text and answer["stop"] is True
        assert answer["tokens_evaluated"] == wanted.timings.prompt_tokens
        assert (answer["tokens_predicted"], answer["stop_type"], answer["truncated"]) == (8, "limit", False)
        streamed = events(await client.post(INFILL, {**HOLE, **GREEDY, "stream": True}))
        assert "".join(one["content"] for one in streamed) == wanted.text
        assert [one["stop"] for one in streamed] == [False] * (len(streamed) - 1) + [True]
        assert (streamed[-1]["tokens_predicted"], streamed[-1]["stop_type"]) == (8, "limit")
        completed = (await client.post(TEXT, asked)).json
        assert completed["choices"][0]["text"] == wanted.text
        assert completed["usage"]["prompt_tokens"] == wanted.timings.prompt_tokens
        both = (await client.post(TEXT, {**asked, "prompt": [PREFIX + LINE, "x"]})).json["choices"]
        assert both[0]["text"] == wanted.text and len(both) == 2
        chunks = (await client.post(TEXT, {**asked, "stream": True})).events
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == wanted.text
        generated = (await client.post(GENERATE, {**ollama, "stream": False})).json
        assert generated["response"] == wanted.text and generated["prompt_eval_count"] == wanted.timings.prompt_tokens
        lines = (await client.post(GENERATE, {**ollama, "raw": True})).body.decode().splitlines()
        assert "".join(json.loads(line)["response"] for line in lines) == wanted.text

    serving(coder, test)


def test_the_end_of_a_prompt_is_healed(tmp_path: Path) -> None:
    """In front of a hole, and without one; its text is not repeated."""
    coder, prefix = make_chat_model(tmp_path, TURNS, MARKS[:3]), "def catch"  # its only long token is "he"
    with Engine(coder, n_threads=1) as engine:
        options: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "token_healing": True}
        wanted, plain = engine.infill(prefix, SUFFIX, **options), engine.generate(prefix, **options)
        assert plain.timings.prompt_tokens == len(engine.prompt_ids(prefix)) - 1

    async def test(client: Client) -> None:
        hole = {"input_prefix": prefix, "input_suffix": SUFFIX, "token_healing": True, **GREEDY}
        answer = (await client.post(INFILL, hole)).json
        assert (answer["content"], answer["tokens_evaluated"]) == (wanted.text, wanted.timings.prompt_tokens)
        assert events(await client.post(INFILL, {**hole, "stream": True}))[0]["tokens_evaluated"] == answer["tokens_evaluated"]
        completed = (await client.post(TEXT, {"prompt": prefix, "suffix": SUFFIX, **options})).json
        assert completed["choices"][0]["text"] == wanted.text
        completed = (await client.post(TEXT, {"prompt": prefix, "echo": True, **options})).json
        assert completed["choices"][0]["text"] == prefix + plain.text
        assert completed["usage"]["prompt_tokens"] == plain.timings.prompt_tokens
        for more in ({"logprobs": 1}, {"use_beam_search": True}):
            refused = await client.post(TEXT, {"prompt": prefix, **options, **more})
            assert (refused.status, refused.error["param"]) == (400, "token_healing")

    serving(coder, test)


def test_an_empty_suffix_is_none_where_it_may_be_left_out(coder: Path) -> None:
    """/infill is for holes, and one at the end of a file is a hole, too."""

    async def test(client: Client) -> None:
        asked = {"prompt": PREFIX, "temperature": 0, "max_tokens": 8}
        with_suffix, without = [(await client.post(TEXT, {**asked, **more})).json for more in ({"suffix": ""}, {})]
        assert with_suffix["choices"] == without["choices"] and with_suffix["usage"] == without["usage"]
        at_end = (await client.post(INFILL, {"input_prefix": PREFIX, "input_suffix": "", **GREEDY})).json
        assert at_end["tokens_evaluated"] > without["usage"]["prompt_tokens"]

    serving(coder, test)


def test_other_files_are_told_and_what_editors_send_is_taken(coder: Path) -> None:
    extra = [{"filename": "util.py", "text": "def g(): pass\n"}, {"text": "y = 1\n"}]
    files = [("util.py", "def g(): pass\n"), ("tmp", "y = 1\n")]
    wanted = filled(coder, files=files, top_k=40, top_p=0.99, seed=3, temperature=1)
    vscode = {  # llama.vscode 0.0.40
        **HOLE, "input_extra": extra, "n_predict": 8, "top_k": 40, "top_p": 0.99, "stream": False,
        "samplers": ["top_k", "top_p", "infill"], "cache_prompt": True, "n_indent": 4, "t_max_prompt_ms": 500,
        "t_max_predict_ms": 2500,
    }  # fmt: skip
    vim = {  # llama.vim
        **HOLE, "id_slot": 0, "input_extra": extra, "stop": [], "n_predict": 8, "n_indent": 4, "top_k": 40, "top_p": 0.99,
        "samplers": ["top_k", "top_p", "infill"], "stream": False, "cache_prompt": True, "t_max_prompt_ms": 500,
        "t_max_predict_ms": 1000,
        "response_fields": ["content", "timings/prompt_n", "timings/predicted_n", "truncated", "tokens_cached", "no/such"],
    }  # fmt: skip
    ahead = {
        "input_prefix": "", "input_suffix": "", "input_extra": extra, "prompt": "", "n_predict": 0, "samplers": [],
        "temperature": 0.0, "stream": False, "cache_prompt": True, "t_max_prompt_ms": 1, "t_max_predict_ms": 1,
        "id_slot": 0, "response_fields": [""],
    }  # fmt: skip

    async def test(client: Client) -> None:
        assert (await client.post(INFILL, ahead)).json == {}
        nothing = (await client.post(INFILL, {**ahead, "response_fields": []})).json
        assert (nothing["content"], nothing["tokens_predicted"]) == ("", 0)
        (last,) = events(await client.post(INFILL, {**ahead, "response_fields": None, "stream": True}))
        assert (last["content"], last["stop"]) == ("", True)
        answer = (await client.post(INFILL, {**vscode, "seed": 3, "temperature": 1})).json
        assert answer["content"] == wanted.text and answer["generation_settings"]["n_ctx"] == 512
        assert answer["timings"]["cache_n"] > 20  # the other files, computed ahead
        chosen = (await client.post(INFILL, {**vim, "seed": 3, "temperature": 1})).json
        assert set(chosen) == set(vim["response_fields"]) - {"no/such"}  # type: ignore[call-overload]
        assert chosen["content"] == wanted.text and chosen["timings/predicted_n"] == 8

    serving(coder, test)


def test_a_grammar_holds_nobody_up(coder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance", reason="the extra guide is not installed")
    threads, guide = [], Engine.guide

    def noted(engine: Engine, wanted: Any) -> Any:
        threads.append(threading.current_thread().name)
        return guide(engine, wanted)

    async def test(client: Client) -> None:
        monkeypatch.setattr(Engine, "guide", noted)
        answer = (await client.post(INFILL, {**HOLE, **GREEDY, "structured_outputs": {"regex": "a+"}})).json
        assert set(answer["content"]) == {"a"} and threads == ["pyengine-aside"]

    serving(coder, test)


def test_how_a_filling_ended_is_told(coder: Path) -> None:
    with Engine(coder, n_threads=1) as engine:
        mark, letter = engine.tokenizer.special_tokens["<|file_sep|>"], engine.tokenize("q", add_bos=False)[0]

    async def test(client: Client) -> None:
        asked = {**HOLE, **GREEDY}
        at_mark = (await client.post(INFILL, {**asked, "logit_bias": {str(mark): 1e6}})).json
        assert (at_mark["content"], at_mark["stop_type"], at_mark["stopping_word"]) == ("", "eos", "")
        at_word = (await client.post(INFILL, {**asked, "logit_bias": {str(letter): 1e6}, "stop": ["qq"]})).json
        assert (at_word["content"], at_word["stop_type"], at_word["stopping_word"]) == ("", "word", "qq")
        body = {"prompt": "a", "suffix": "b", "max_tokens": 8, "logit_bias": {str(mark): 1e6}, "logprobs": 1}
        (choice,) = (await client.post(TEXT, body)).json["choices"]
        assert (choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"]) == ("", "stop", [])
        found = (await client.post(TEXT, {"prompt": "a", "suffix": "b", "max_tokens": 4, "n": 2, "use_beam_search": True})).json
        assert len(found["choices"]) == 2

    serving(coder, test)


def test_what_a_model_or_a_hole_cannot_be_is_refused_by_name(coder: Path, chat_model: Path) -> None:
    wrong: list[tuple[str, dict[str, Any], str]] = [
        (INFILL, {"input_suffix": "b"}, "input_prefix"), (INFILL, {"input_prefix": "a"}, "input_suffix"),
        (INFILL, {**HOLE, "input_extra": [{"filename": "a"}]}, "input_extra[0].text"),
        (INFILL, {**HOLE, "input_extra": "a"}, "input_extra"), (INFILL, {**HOLE, "n_predict": -2}, "n_predict"),
        (INFILL, {**HOLE, "id_slot": "a"}, "id_slot"), (INFILL, {**HOLE, "n": 2}, "n"),
        (INFILL, {**HOLE, "n_probs": 1}, "n_probs"), (INFILL, {**HOLE, "lora": [{"id": 0, "scale": 0.5}]}, "lora"),
        (INFILL, {**HOLE, "nonsense": 1}, "nonsense"),
        (INFILL, {**HOLE, "input_prefix": "x" * 600}, "input_suffix"), (INFILL, {**HOLE, "mirostat": 2}, "mirostat"),
        (TEXT, {"prompt": "a", "suffix": "b", "echo": True}, "echo"), (TEXT, {"prompt": [1], "suffix": "b"}, "suffix"),
        (TEXT, {"prompt": "a", "suffix": 5}, "suffix"), (TEXT, {"prompt": "a", "suffix": "b" * 600}, "suffix"),
    ]  # fmt: skip

    async def test(client: Client) -> None:
        for path, body, param in wrong:
            answer = await client.post(path, body)
            assert (answer.status, answer.error["param"]) == (400, param), (body, answer.body)
        for more, param in (({"system": "x"}, "system"), ({"think": True}, "think")):
            answer = await client.post(GENERATE, {"prompt": "a", "suffix": "b", **more})
            assert (answer.status, answer.json["param"]) == (400, param), answer.body
        assert "insert" in (await client.post("/api/show", {"model": "tiny"})).json["capabilities"]
        assert (await client.get("/props")).json["has_infill"] is True

    async def cannot(client: Client) -> None:
        for path, body, param in ((INFILL, HOLE, "input_suffix"), (TEXT, {"prompt": "a", "suffix": "b"}, "suffix")):
            answer = await client.post(path, body)
            assert (answer.status, answer.error["param"]) == (400, param), answer.body
            assert "does not fill in the middle" in answer.error["message"] and "<|fim_prefix|>" in answer.error["message"]
        answer = await client.post(GENERATE, {"prompt": "a", "suffix": "b"})
        assert (answer.status, answer.json["param"]) == (400, "suffix")
        assert "insert" not in (await client.post("/api/show", {"model": "tiny"})).json["capabilities"]
        assert (await client.get("/props")).json["has_infill"] is False

    serving(coder, test)
    serving(chat_model, cannot)
