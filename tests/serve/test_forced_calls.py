"""Forced calls in the model's own format: what a grammar lets through is calls of the tools, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
pytest.importorskip("llguidance", reason="the extra guide is not installed")

from serve.client import Client, serving

from pyengine import Engine
from pyengine.serve.call_grammars import MAX_CALLS, call_grammar
from pyengine.serve.calls import OBJECT, SYNTAXES, CallReader, Syntax, message_of

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
SPECIAL = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
BY_NAME = {syntax.name: syntax for syntax in (*SYNTAXES, OBJECT)}


def schema(**properties: Any) -> dict[str, Any]:
    required = [name for name, one in properties.items() if not one.pop("optional", False)]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


WEATHER = schema(
    day={"enum": [1, 2, 3]}, place={"type": "string", "maxLength": 6}, hot={"type": "boolean", "optional": True}
)
NOTE = schema(note={"enum": ["a\nb", '"c"', "1"]})
TOOLS = {"weather": WEATHER, "note": NOTE, "nothing": schema()}

# format, special tokens, an answer, its calls; None: what the grammar does not let through
W1 = {"day": 2, "place": "x"}
NOTE_1 = ("note", {"note": "1"})
OBJECT_1 = '{"name": "weather", "arguments": {"day": 2, "place": "x"}}'
N1, NOTHING = '{"name": "note", "arguments": {"note": "1"}}', '{"name": "nothing", "arguments": {}}'
TAGS_1 = (
    "<tool_call>\n<function=weather>\n<parameter=day>\n2\n</parameter>\n<parameter=place>\nx\n</parameter>\n"
    "</function>\n</tool_call>"
)
TAGS_2 = "<tool_call>\n<function=note>\n<parameter=note>\na\nb\n</parameter>\n</function>\n</tool_call>"
TAGS_3 = "<tool_call>\n<function=nothing>\n</function>\n</tool_call>"
ANSWERS: list[tuple[str, str, list[tuple[str, Any]] | None]] = [
    ("Hermes", f"<tool_call>\n{OBJECT_1}\n</tool_call>", [("weather", W1)]),
    ("Hermes", f"<tool_call>\n{N1}\n</tool_call>\n<tool_call>\n{NOTHING}\n</tool_call>", [NOTE_1, ("nothing", {})]),
    ("Hermes", OBJECT_1, None),
    ("Hermes", f"<tool_call>\n{OBJECT_1.replace('2', '4')}\n</tool_call>", None),
    ("Hermes", f"Well: <tool_call>\n{OBJECT_1}\n</tool_call>", None),
    ("Mistral", f"[TOOL_CALLS] [{OBJECT_1}, {N1}]", [("weather", W1), NOTE_1]),
    ("Mistral", f"[TOOL_CALLS][{OBJECT_1}]", [("weather", W1)]),
    ("Mistral", f"[{OBJECT_1}]", None),
    ("Mistral v11", '[TOOL_CALLS]weather[ARGS]{"day": 2, "place": "x"}', [("weather", W1)]),
    ("Mistral v11", "[TOOL_CALLS]nothing[ARGS]{}[TOOL_CALLS]nothing[ARGS]{}", [("nothing", {})] * 2),
    ("Mistral v11", "[TOOL_CALLS]nothing{}", None),
    ("Llama 3", OBJECT_1.replace("arguments", "parameters"), [("weather", W1)]),
    ("Llama 3", OBJECT_1, None),
    ("Qwen3-Coder", TAGS_1, [("weather", W1)]),
    ("Qwen3-Coder", f"{TAGS_2}\n{TAGS_3}", [("note", {"note": "a\nb"}), ("nothing", {})]),
    ("Qwen3-Coder", TAGS_1.replace("\nx\n", "\n1234567\n"), None),
    ("Qwen3-Coder", TAGS_1.replace("\n2\n", "\n4\n"), None),
]  # fmt: skip


@pytest.fixture(scope="module")
def engine(tool_model: Callable[..., Path]) -> Any:
    """A model with the special tokens of all formats."""
    with Engine(tool_model("mistral", SPECIAL)) as opened:
        yield opened


def grammar(engine: Engine, syntax: Syntax, tools: dict[str, Any], *, only_one: bool = False) -> str:
    text = call_grammar(syntax, tools, engine.tokenizer.special_tokens, only_one=only_one)
    assert text is not None
    return text


def lets_through(engine: Engine, text: str, answer: str) -> bool:
    """Whether a model may write the answer and then end; its special tokens are such."""
    from pyengine.sampling import StructuredOutputs

    guide = engine.guide(StructuredOutputs(grammar=text))
    tokens = engine.tokenize(answer, add_bos=False, parse_special=True)
    for n in range(len(tokens) + 1):
        token = tokens[n] if n < len(tokens) else engine.eos_token_ids[0]
        if not guide.masks(tokens[:n])[0][token // 32] >> token % 32 & 1:
            return False
    return True


def read(syntax: Syntax, tools: dict[str, Any], text: str) -> tuple[str, list[tuple[str, Any]]]:
    reader = CallReader(syntax, tools)
    content, calls = message_of(reader.push(text) + reader.finish())
    return content, [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


@pytest.mark.parametrize(("name", "answer", "calls"), ANSWERS)
def test_a_format_s_grammar_is_its_calls(engine: Engine, name: str, answer: str, calls: Any) -> None:
    syntax = BY_NAME[name]
    assert lets_through(engine, grammar(engine, syntax, TOOLS), answer) == (calls is not None)
    if calls is not None:
        assert read(syntax, TOOLS, answer) == ("", calls)
        assert lets_through(engine, grammar(engine, syntax, TOOLS, only_one=True), answer) == (len(calls) == 1)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.name)
def test_whatever_a_model_writes_is_calls_of_the_schemas(engine: Engine, syntax: Syntax) -> None:
    """Of a model that knows nothing: random tokens, as far as the grammar goes."""
    wanted = {"grammar": grammar(engine, syntax, TOOLS)}
    for seed in range(12):
        result = engine.generate(
            "x", max_tokens=3500, temperature=1.0, seed=seed, structured_outputs=wanted, skip_special_tokens=False
        )
        assert result.finish_reason == "stop"
        content, calls = read(syntax, TOOLS, result.text)
        assert content == "" and 1 <= len(calls) <= (1 if syntax.joint is None else MAX_CALLS)
        for name, arguments in calls:
            properties = TOOLS[name]["properties"]
            assert set(TOOLS[name]["required"]) <= set(arguments) <= set(properties)
            for key, value in arguments.items():
                if "enum" in properties[key]:
                    assert value in properties[key]["enum"]
                else:
                    assert isinstance(value, bool) if key == "hot" else len(value) <= 6


# A parameter's schema, a value as its tags hold it, the value; None: it is not let through.
VALUES: list[tuple[Any, str, Any]] = [
    ({"type": "string"}, "two\nlines </parameter", "two\nlines </parameter"),
    ({"type": "string"}, "\nx\n", "\nx\n"),
    ({"type": "string", "minLength": 2}, "a", None),
    ({"type": "string", "minLength": 2}, "ab", "ab"),
    ({"const": "é"}, "é", "é"),
    ({"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}, "plain", "plain"),
    ({"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}, "null", None),
    ({"type": ["integer", "string"]}, "5", 5),
    ({"type": ["integer", "string"]}, '"5"', "5"),
    ({"enum": ["a", 1]}, '"a"', "a"),
    ({"$ref": "#/$defs/A"}, '{"b": [1, 2]}', {"b": [1, 2]}),
    ({"type": "array", "items": {"type": "integer"}}, "[1, 2]", [1, 2]),
    ({"type": "array", "items": {"type": "integer"}}, "[true]", None),
    ({"type": "number", "minimum": 3}, "2", None),
    ({"type": "number", "minimum": 3}, "3.5", 3.5),
]
DEFINITIONS = {"A": schema(b={"type": "array", "items": {"type": "integer"}})}


@pytest.mark.parametrize(("one", "value", "wanted"), VALUES)
def test_values_between_tags(engine: Engine, one: Any, value: str, wanted: Any) -> None:
    syntax, tools = BY_NAME["Qwen3-Coder"], {"f": {**schema(p=dict(one)), "$defs": DEFINITIONS}}
    answer = f"<tool_call>\n<function=f>\n<parameter=p>\n{value}\n</parameter>\n</function>\n</tool_call>"
    is_let_through = lets_through(engine, grammar(engine, syntax, tools), answer)
    if wanted is None and value != "null":
        assert not is_let_through
    else:
        assert is_let_through and read(syntax, tools, answer) == ("", [("f", {"p": wanted})])


OTHER = [
    {"type": "object", "anyOf": [schema()]},
    {"type": "object", "required": ["a"]},
    schema(a={"type": "string", "pattern": "^a+$"}),
    {"type": "object", "properties": {"a b": {}}},
    schema(a={"enum": ["</parameter>"]}),
]


@pytest.mark.parametrize("one", OTHER)
def test_what_tags_cannot_be_held_to_is_left_to_objects(engine: Engine, one: Any) -> None:
    assert call_grammar(BY_NAME["Qwen3-Coder"], {"f": one}, {}, only_one=True) is None
    assert call_grammar(BY_NAME["Hermes"], {"f": one}, {}, only_one=True) is not None


# -------------------------------------------------------------------- by the server

ASKED = [{"type": "function", "function": {"name": name, "parameters": one}} for name, one in TOOLS.items()]
FLAT = [{"type": "function", **tool["function"]} for tool in ASKED]
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}],
    "tools": ASKED,
    "temperature": 1,
    "max_tokens": 3500,
}
NAMED = {"type": "function", "function": {"name": "nothing"}}


@pytest.mark.parametrize(
    ("template", "special"),
    [("qwen", ()), ("mistral", SPECIAL), ("mistral_named", SPECIAL), ("qwen_coder", ()), ("llama", SPECIAL), ("xml", ())],
)  # fmt: skip
def test_a_forced_call_is_the_answer(tool_model: Callable[..., Path], template: str, special: tuple[str, ...]) -> None:
    async def test(client: Client) -> None:
        for choice, parallel, names in (
            ("required", True, set(TOOLS)),
            ("required", False, set(TOOLS)),
            (NAMED, True, {"nothing"}),
        ):
            body = {**BODY, "tool_choice": choice, "parallel_tool_calls": parallel, "n": 3, "seed": 7}
            answer = await client.post(CHAT, body)
            assert answer.status == 200, answer.body
            streamed = (await client.post(CHAT, {**body, "stream": True})).events
            for one in answer.json["choices"]:
                calls = one["message"]["tool_calls"]
                assert one["finish_reason"] == "tool_calls" and one["message"]["content"] is None
                assert {call["function"]["name"] for call in calls} <= names
                assert len(calls) == 1 or (choice == "required" and parallel)
                parts = [part for event in streamed for part in event["choices"] if part["index"] == one["index"]]
                deltas = [delta for part in parts for delta in part["delta"].get("tool_calls", [])]
                for i, call in enumerate(calls):
                    text = "".join(delta["function"]["arguments"] for delta in deltas if delta["index"] == i)
                    assert text == call["function"]["arguments"]

    serving(tool_model(template, special), test)


@pytest.mark.parametrize("template", ["qwen", "qwen_coder", "xml"])
def test_schemas_that_refer_to_their_own_definitions(tool_model: Callable[..., Path], template: str) -> None:
    """As Pydantic writes nested models."""
    nested = {**schema(place={"$ref": "#/$defs/Place"}), "$defs": {"Place": schema(lat={"enum": [1]})}}
    tools = [{"type": "function", "function": {"name": name, "parameters": nested}} for name in ("f", "g")]

    async def test(client: Client) -> None:
        answer = await client.post(
            CHAT, {**BODY, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
        )
        assert answer.status == 200, answer.body
        (call,) = answer.json["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"place": {"lat": 1}}

    serving(tool_model(template, ()), test)


def test_of_allowed_tools_others_are_not_told_of(tool_model: Callable[..., Path]) -> None:
    names = [{"type": "function", "function": {"name": "note"}}]
    some = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": names}}
    flat = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "note"}]}

    async def test(client: Client) -> None:
        answer = await client.post(CHAT, {**BODY, "tool_choice": some, "seed": 1})
        assert answer.status == 200, answer.body
        calls = answer.json["choices"][0]["message"]["tool_calls"]
        assert {call["function"]["name"] for call in calls} == {"note"}
        alone = await client.post(CHAT, {**BODY, "tools": ASKED[1:2], "tool_choice": "required", "seed": 1})
        assert alone.json["usage"] == answer.json["usage"] | {
            "prompt_tokens_details": alone.json["usage"]["prompt_tokens_details"]
        }
        some["allowed_tools"]["mode"] = "auto"  # type: ignore[index]
        free = await client.post(CHAT, {**BODY, "tool_choice": some, "max_tokens": 3})
        assert free.json["usage"]["prompt_tokens"] == alone.json["usage"]["prompt_tokens"]
        body = {"input": "Hi", "tools": FLAT, "temperature": 1, "seed": 1, "max_output_tokens": 2000}
        response = (await client.post(RESPONSES, {**body, "tool_choice": flat})).json
        assert {item["name"] for item in response["output"]} == {"note"} and response["tool_choice"] == flat
        wrong = {**some, "allowed_tools": {"mode": "auto", "tools": [{**NAMED, "function": {"name": "f"}}]}}
        refused = await client.post(CHAT, {**BODY, "tool_choice": wrong})
        assert refused.error["param"] == "tool_choice.allowed_tools.tools[0].function.name"

    serving(tool_model("qwen", ()), test)


# -------------------------------------------------------------------- an answer of a schema, or calls

ANSWER = schema(mood={"enum": ["good", "bad"]})
EITHER: list[tuple[str, str, bool]] = [
    ("Hermes", '{"mood": "bad"}', True),
    ("Hermes", f"<tool_call>\n{OBJECT_1}\n</tool_call>", True),
    ("Hermes", '{"mood": "no"}', False),
    ("Hermes", f'{{"mood": "bad"}}<tool_call>\n{OBJECT_1}\n</tool_call>', False),
    ("Llama 3", OBJECT_1.replace("arguments", "parameters"), True),
    ("Llama 3", '{"mood": "good"}', True),
    ("object", '{"mood": "good"}', True),
    ("object", OBJECT_1, True),
    ("Mistral v11", "[TOOL_CALLS]nothing[ARGS]{}", True),
]


@pytest.mark.parametrize(("name", "answer", "is_one"), EITHER)
def test_a_grammar_of_either(engine: Engine, name: str, answer: str, is_one: bool) -> None:
    special = engine.tokenizer.special_tokens
    for otherwise in (ANSWER, json.dumps(ANSWER)):
        text = call_grammar(BY_NAME[name], TOOLS, special, only_one=False, otherwise=otherwise)
        assert text is not None
    text = call_grammar(BY_NAME[name], TOOLS, special, only_one=False, otherwise=ANSWER)
    assert text is not None and lets_through(engine, text, answer) == is_one


def test_tools_and_a_response_format_together(tool_model: Callable[..., Path]) -> None:
    """As agents ask that have tools and a type of their last word: the model may call, or answer in that form."""
    json_schema = {"name": "answer", "schema": ANSWER}
    formats = {"type": "json_schema", "json_schema": json_schema}
    flat = {"format": {"type": "json_schema", **json_schema}}

    async def test(client: Client) -> None:
        seen = set()
        for seed in range(8):
            body = {**BODY, "response_format": formats, "n": 4, "seed": seed, "max_tokens": 900}
            body["parallel_tool_calls"] = False
            answer = await client.post(CHAT, body)
            assert answer.status == 200, answer.body
            for choice in answer.json["choices"]:
                message, reason = choice["message"], choice["finish_reason"]
                is_call = reason == "tool_calls"
                assert is_call == (message["content"] is None) == bool(message.get("tool_calls")) and reason != "length"
                if not is_call:
                    assert json.loads(message["content"])["mood"] in ("good", "bad")
                seen.add(is_call)
        assert seen == {True, False}
        forced = await client.post(CHAT, {**BODY, "response_format": formats, "tool_choice": "required", "seed": 1})
        assert forced.json["choices"][0]["finish_reason"] == "tool_calls"
        body = {"input": "Hi", "tools": FLAT, "text": flat, "seed": 1, "temperature": 1, "max_output_tokens": 900}
        (item, *_) = (await client.post(RESPONSES, body)).json["output"]
        assert item["type"] == "function_call" or json.loads(item["content"][0]["text"])["mood"] in ("good", "bad")

    serving(tool_model("qwen", ()), test)


def test_tags_that_cannot_be_held_to_a_schema_and_a_response_format(tool_model: Callable[..., Path]) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": OTHER[2]}}]

    async def test(client: Client) -> None:
        answer = await client.post(CHAT, {**BODY, "tools": tools, "response_format": {"type": "json_object"}})
        assert (answer.status, answer.error["param"]) == (400, "tools")

    serving(tool_model("qwen_coder", ()), test)
