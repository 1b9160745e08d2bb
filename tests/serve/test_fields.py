"""Every field that OpenAI's client can send, and what other clients and routers write unasked: taken, or refused by name."""

from __future__ import annotations

import asyncio
import typing
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Client, serving
from serve.conftest import TURNS, make_chat_model

from pyengine.serve.openapi import BODIES

CHAT, TEXT, RESPONSES, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"
PROMPT: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    TEXT: {"prompt": "Hi", "max_tokens": 1},
    RESPONSES: {"input": "Hi", "max_output_tokens": 1},
    EMBEDDINGS: {"input": "Hi"},
}
SAMPLED: dict[str, tuple[list[Any], list[Any]]] = {  # values that are taken, values that are refused
    "temperature": ([0, 1, 0.3, 2], [-1, "1", True]),
    "top_p": ([1, 0.5], [0, 2]),
    "user": (["someone"], [5]),
}
PENALTIES: dict[str, tuple[list[Any], list[Any]]] = {
    "frequency_penalty": ([0, -2, 2.0], ["x"]),
    "presence_penalty": ([0, 1], ["x"]),
    "logit_bias": ([{}, {"5": -100}], [{"x": 1}, 5]),
    "n": ([1, 2], [0]),
    "seed": ([0, 1234, -1, -(2**63), 2**63 - 1], [-(2**63) - 1, 2**64, 1.5]),
    "stop": (["x", ["x", "y"], []], [5, [""]]),
    "stream_options": ([], [{"include_usage": True}]),
}
STORED: dict[str, tuple[list[Any], list[Any]]] = {
    "metadata": ([{}, {"a": "b"}], [{"a": 5}, 5]),
    "moderation": ([], [{"model": "m"}]),
    "parallel_tool_calls": ([True, False], ["yes"]),
    "prompt_cache_key": (["k"], [5]),
    "prompt_cache_options": ([{"mode": "implicit"}], [5]),
    "prompt_cache_retention": (["in_memory", "24h"], [5]),
    "safety_identifier": (["k"], [5]),
    "service_tier": (["auto", "default"], ["priority", "flex"]),
    "store": ([False], [True]),
}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
# of OpenAI's Python package 3.57: every parameter of `create`
FIELDS: dict[str, dict[str, tuple[list[Any], list[Any]]]] = {
    CHAT: {
        **SAMPLED, **PENALTIES, **STORED,
        "messages": ([], [[], 5]),
        "model": (["tiny"], [5]),
        "audio": ([], [{"voice": "alloy", "format": "wav"}]),
        "function_call": (["none", "auto"], [{"name": "f"}]),
        "functions": ([[]], [[FUNCTION]]),
        "logprobs": ([True, False], [3]),
        "max_completion_tokens": ([], [3]),  # beside max_tokens
        "max_tokens": ([2], [0]),
        "modalities": ([["text"]], [["text", "audio"]]),
        "prediction": ([{"type": "content", "content": "Hi"}], [5]),
        "reasoning_effort": (["none"], ["medium", 5]),  # of a template that knows no effort
        "response_format": ([{"type": "text"}], [{"type": "xml"}]),
        "tool_choice": (["none", "auto"], ["required", {"type": "custom", "custom": {"name": "f"}}]),
        "tools": ([[]], [[{"type": "custom", "custom": {"name": "f"}}]]),
        "top_logprobs": ([], [2]),  # without logprobs
        "verbosity": (["medium"], ["low"]),
        "web_search_options": ([], [{}]),
    },
    TEXT: {
        **SAMPLED, **PENALTIES,
        "prompt": ([], [[], 5]),
        "model": (["tiny"], [5]),
        "best_of": ([1], [2]),
        "echo": ([True, False], ["yes"]),
        "logprobs": ([0, 2], [-1, True]),
        "max_tokens": ([2], [-1]),
        "suffix": ([""], ["x"]),
    },
    RESPONSES: {
        **SAMPLED, **STORED,
        "store": ([True, False], [5]),
        "input": ([], [[], 5]),
        "model": (["tiny"], [5]),
        "access_programs": ([], [{}]),
        "background": ([False], [True]),
        "background_options": ([{}], [{"a": 1}]),
        "context_management": ([[]], [[{"type": "compaction"}]]),
        "conversation": ([], ["conv_1"]),
        "image": ([], [{}]),
        "include": ([[], ["reasoning.encrypted_content"]], [["message.output_text.logprobs"]]),
        "instructions": (["Be brief"], [5]),
        "max_output_tokens": ([2], [0]),
        "max_tool_calls": ([], [1]),
        "previous_response_id": ([], ["resp_1"]),
        "prompt": ([], [{"id": "p"}]),
        "reasoning": ([{}, {"effort": "none", "summary": "auto"}, {"effort": None}], [{"effort": "high"}, {"mode": "pro"}]),
        "stream_options": ([{}, {"include_obfuscation": False}], [{"include_obfuscation": True}]),
        "text": ([{"format": {"type": "text"}, "verbosity": "medium"}], [{"verbosity": "high"}]),
        "tool_choice": (["none", "auto"], ["required", {"type": "web_search"}]),
        "tools": ([[]], [[{"type": "web_search"}]]),
        "top_logprobs": ([0], [3]),
        "truncation": (["disabled"], ["auto"]),
    },
    EMBEDDINGS: {
        "input": ([], [[], 5]),
        "model": (["tiny"], [5]),
        "dimensions": ([4], [0]),
        "encoding_format": (["float", "base64"], ["int8"]),
        "user": (["someone"], [5]),
    },
}  # fmt: skip
# As they come from routers and from the clients of other servers.
UNASKED: list[tuple[str, dict[str, Any]]] = [
    (
        CHAT,  # sglang-router 0.3, vllm-router 0.1
        {
            "logprobs": False, "stream": False, "no_stop_trim": False, "ignore_eos": False, "continue_final_message": False,
            "skip_special_tokens": True, "separate_reasoning": True, "stream_reasoning": True,
            "return_hidden_states": False, "include_reasoning": True,
        },
    ),
    (
        TEXT,
        {
            "stream": False, "echo": False, "no_stop_trim": False, "ignore_eos": False, "skip_special_tokens": True,
            "return_hidden_states": False,
        },
    ),
    (RESPONSES, {"stream": None, "top_p": 1.0, "priority": 0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}),
    (
        CHAT,  # vLLM's
        {
            "use_beam_search": False, "length_penalty": 1.0, "spaces_between_special_tokens": True, "echo": False,
            "add_special_tokens": False, "return_tokens_as_token_ids": False, "request_id": "x", "guided_json": None,
        },
    ),
    (
        CHAT,  # llama.cpp's
        {
            "cache_prompt": True, "id_slot": -1, "timings_per_token": False, "reasoning_format": "auto", "mirostat": 0,
            "dynatemp_range": 0, "dynatemp_exponent": 1, "xtc_probability": 0, "xtc_threshold": 0.1, "dry_multiplier": 0,
            "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": -1, "dry_sequence_breakers": ["\n", ":", '"', "*"],
            "dry_range": 0, "top_n_sigma": -1, "repeat_last_n": 64, "n_predict": -1, "repeat_penalty": 1.0,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_of_openai_s_is_taken_or_refused_by_name(chat_model: Path, path: str) -> None:
    assert set(FIELDS[path]) <= set(BODIES[path])

    async def test(client: Client) -> None:
        for name, (taken, refused) in FIELDS[path].items():
            for value in (*taken, None):
                body = PROMPT[path] | {name: value}
                if value is None and BODIES[path][name].is_needed:
                    continue
                answer = await client.post(path, body)
                assert answer.status == 200, (name, value, answer.body)
            for value in refused:
                answer = await client.post(path, PROMPT[path] | {name: value})
                assert answer.status == 400, (name, value, answer.body)
                param = answer.error["param"]
                blamed = "max_tokens" if name == "max_completion_tokens" else name
                assert param.split(".")[0].split("[")[0] == blamed, (name, value, answer.body)

    serving(chat_model, test)


def test_what_is_written_unasked_changes_nothing(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        for path, fields in UNASKED:
            body = PROMPT[path] | {"seed": 1}
            plain, answer = await asyncio.gather(client.post(path, body), client.post(path, body | fields))
            assert answer.status == 200, answer.body
            key = "output" if path == RESPONSES else "choices"
            first, second = ([dict(one, id=0) for one in one_answer.json[key]] for one_answer in (plain, answer))
            assert first == second

    serving(chat_model, test)


def test_a_field_that_is_almost_one_says_which(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        for name, words in (
            ("max_token", "did you mean 'max_tokens'?"),
            ("guided_json", "use structured_outputs.json"),
            ("lora", "an adapter is asked for by its name, as model"),
            ("n_predict", "use max_tokens"),
            ("guided_grammar", "structured_outputs.grammar"),
        ):
            answer = await client.post(CHAT, PROMPT[CHAT] | {name: "x"})
            assert (answer.status, answer.error["param"]) == (400, name) and words in answer.error["message"]

    serving(chat_model, test)


TYPED = [
    (CHAT, "openai.types.chat.completion_create_params", "CompletionCreateParamsBase"),
    (TEXT, "openai.types.completion_create_params", "CompletionCreateParamsBase"),
    (RESPONSES, "openai.types.responses.response_create_params", "ResponseCreateParamsBase"),
    (EMBEDDINGS, "openai.types.embedding_create_params", "EmbeddingCreateParams"),
]


@pytest.mark.skipif(find_spec("openai") is None, reason="the package openai is not installed")
@pytest.mark.parametrize(("path", "module", "name"), TYPED)
def test_the_table_has_every_field_of_the_package(path: str, module: str, name: str) -> None:
    typed = typing.get_type_hints(getattr(import_module(module), name))
    assert set(typed) - set(FIELDS[path]) == set()


# -------------------------------------------------------------------- effort

EFFORTS = [  # what the template looks at, the effort that is asked for, the variable as the template has it
    ("reasoning_effort", "low", "low"),
    ("reasoning_effort", "none", "none"),
    ("enable_thinking", "none", "False"),
    ("enable_thinking", "low", "True"),
    ("enable_thinking", None, "unset"),
]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(variable: str) -> Path:
        if variable not in made:
            shown = f"{{{{ {variable} if {variable} is defined else 'unset' }}}}"
            made[variable] = make_chat_model(tmp_path_factory.mktemp("thinker"), shown + TURNS)
        return made[variable]

    return make


@pytest.mark.parametrize(("variable", "effort", "wanted"), EFFORTS)
def test_effort_is_told_to_a_template_that_knows_it(
    thinker: Callable[[str], Path], variable: str, effort: str | None, wanted: str
) -> None:
    async def test(client: Client) -> None:
        engine = client.app.models.get(None).engine
        prompt = engine.tokenize(f"{wanted}[user]Hi\n[assistant]")
        for path, fields in ((CHAT, {"reasoning_effort": effort}), (RESPONSES, {"reasoning": {"effort": effort}})):
            answer = await client.post(path, PROMPT[path] | fields)
            assert answer.status == 200, answer.body
            usage = answer.json["usage"]
            assert usage["input_tokens" if path == RESPONSES else "prompt_tokens"] == len(prompt)
        said = {
            "reasoning_effort": "high",
            "chat_template_kwargs": {variable: "x"},
        }  # the variable itself is more exact
        answer = await client.post(CHAT, PROMPT[CHAT] | said)
        assert answer.json["usage"]["prompt_tokens"] == len(engine.tokenize("x[user]Hi\n[assistant]"))

    serving(thinker(variable), test)
