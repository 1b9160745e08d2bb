"""Calls in a model's text: what is a call, what stays content, and the same however the text is cut."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from pyengine.serve.calls import OBJECT, SYNTAXES, CallReader, Syntax, message_of, syntax_of
from pyengine.serve.json_scan import ObjectScanner

HERMES, MISTRAL, LLAMA = SYNTAXES
NAMES = ("f", "get_weather")
TEMPLATES = Path(__file__).parent.parent / "text" / "templates"

# syntax, text, content, [(name, arguments)]
Case = tuple[Syntax, str, str, list[tuple[str, str]]]
F = '{"name": "f", "arguments": {"a": 1}}'
CALLS: list[Case] = [
    (HERMES, f"<tool_call>\n{F}\n</tool_call>", "", [("f", '{"a": 1}')]),
    (HERMES, f"<tool_call>{F}</tool_call>", "", [("f", '{"a": 1}')]),
    (HERMES, f"I look.\n<tool_call>\n{F}\n</tool_call>\n", "I look.", [("f", '{"a": 1}')]),
    (HERMES, f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{F}\n</tool_call>", "", [("f", '{"a": 1}')] * 2),
    (HERMES, f"a <tool_call>{F}</tool_call> b <tool_call>{F}", "a b", [("f", '{"a": 1}')] * 2),
    (HERMES, f"<tool_call>\n{F}", "", [("f", '{"a": 1}')]),
    (HERMES, f"<tool_call>\n{F[:-1]}\n</tool_call>", "", [("f", '{"a": 1}')]),  # the last brace forgotten
    (HERMES, '<tool_call>{"name": "f", "arguments": {}}</tool_call>', "", [("f", "{}")]),
    (HERMES, '<tool_call>{"arguments": {"a":[1, "}"]}, "name": "f"}</tool_call>', "", [("f", '{"a": [1, "}"]}')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    (
        HERMES,
        '<tool_call>{"name": "get_weather", "arguments": {"city": "S\u00e3o \\"P\\" {\\u0061}", "n": [{}, -1e3]}}</tool_call>',
        "",
        [("get_weather", '{"city": "S\u00e3o \\"P\\" {\\u0061}", "n": [{}, -1e3]}')],
    ),
    (HERMES, F, "", [("f", '{"a": 1}')]),
    (HERMES, f"{F}, {F}", "", [("f", '{"a": 1}')] * 2),
    (HERMES, f"\n```json\n{F}\n```\n", "", [("f", '{"a": 1}')]),
    (HERMES, f"```json\n{F}\n``` Done.", " Done.", [("f", '{"a": 1}')]),
    (MISTRAL, f"[TOOL_CALLS] [{F}]", "", [("f", '{"a": 1}')]),
    (MISTRAL, f"[TOOL_CALLS][{F}, {F}]", "", [("f", '{"a": 1}')] * 2),
    (MISTRAL, f"Well. [TOOL_CALLS]{F}", "Well.", [("f", '{"a": 1}')]),
    (MISTRAL, f'[TOOL_CALLS][{F[:-1]}, "id": "abcdefghi"}}]', "", [("f", '{"a": 1}')]),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (LLAMA, '\n\n{"type": "function", "name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (LLAMA, f"<|python_tag|>{F}", "", [("f", '{"a": 1}')]),
    (LLAMA, f"I look. <|python_tag|>{F}; {F}", "I look.", [("f", '{"a": 1}')] * 2),
    (LLAMA, f"{F}; {F}\n{F}", "", [("f", '{"a": 1}')] * 3),
    (OBJECT, F, "", [("f", '{"a": 1}')]),
]
CONTENT: list[tuple[Syntax, str]] = [
    (HERMES, ""),
    (HERMES, " \n "),
    (HERMES, "1 < 2, <tool, <tool_call, a <tool_call"),
    (HERMES, f"So: {F}"),
    (HERMES, f"So:\n```json\n{F}\n```"),
    (HERMES, "```json\n[1]\n```"),
    (HERMES, "````json"),
    (HERMES, "```python\nf()\n```"),
    (HERMES, "<tool_call>"),
    (HERMES, "<tool_call>\n{"),
    (HERMES, "<tool_call>f(a=1)</tool_call>"),
    (HERMES, "<tool_call>{'name': 'f'}</tool_call>"),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{"}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": 1' + "0" * 5000 + "}</tool_call>"),
    (HERMES, '<tool_call>{"name": "f", "name": "f", "arguments": 1}</tool_call>'),
    (HERMES, '<tool_call>{"arguments": {"a": 1e999}, "name": "f"}</tool_call>'),  # an infinity, which JSON cannot say
    (HERMES, '<tool_call>{"id": {"name": "f", "arguments": {}}}</tool_call>'),
    (HERMES, "<tool_call>" + '{"id": ' * 100 + F),
    (HERMES, " " * 1000 + "<tool_call>" + " " * 1000),
    (MISTRAL, f"{F} [TOOL_CALL] [TOOL_CALLS][[{F}]"),
    (MISTRAL, "[TOOL_CALLS] []"),
    (LLAMA, '{"type": "object", "value": 3}'),
    (LLAMA, '{"answer": {"name": "f", "parameters": {}}}'),
    (LLAMA, f"So: {F}"),
    (LLAMA, '<|python_tag|>brave_search.call(query="x")'),
    (OBJECT, '{"name": "f", "argu'),
]


def read(syntax: Syntax, pieces: list[str], **options: Any) -> tuple[str, list[tuple[str, str]], bool]:
    """(content, [(name, arguments)], whether a call was read to its end), from deltas that keep the protocol's rules."""
    reader = CallReader(syntax, NAMES, **options)
    deltas = [delta for piece in pieces for delta in reader.push(piece)] + reader.finish()
    begun = 0
    for delta in deltas:
        assert len(delta) == 1 and delta.get("content") != ""
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                assert part["index"] == begun and part["type"] == "function" and part["function"]["name"] in NAMES
                begun += 1
            else:
                assert part["index"] == begun - 1 and part["function"]["arguments"]
    content, calls = message_of(deltas)
    assert len({call["id"] for call in calls}) == len(calls)
    return content, [(c["function"]["name"], c["function"]["arguments"]) for c in calls], reader.has_call


@pytest.mark.parametrize(("syntax", "text", "content", "calls"), CALLS)
def test_calls_are_read_alike_however_the_text_is_cut(
    syntax: Syntax, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert read(syntax, [text]) == (content, calls, True)
    assert read(syntax, list(text)) == (content, calls, True)
    for at in range(1, len(text)):
        assert read(syntax, [text[:at], text[at:]]) == (content, calls, True)
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize(("syntax", "text"), CONTENT)
def test_what_is_no_call_stays_content_to_the_last_character(syntax: Syntax, text: str) -> None:
    for pieces in ([text], list(text), [text[: len(text) // 2], text[len(text) // 2 :]]):
        assert read(syntax, pieces) == (text, [], False)


@pytest.mark.parametrize(("syntax", "text", "content", "calls"), CALLS)
def test_a_text_that_is_cut_anywhere_loses_nothing_of_its_calls(
    syntax: Syntax, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    """Each prefix gives prefixes of the content (plus what is not yet a call) and of the calls."""
    for end in range(len(text)):
        prefix = text[:end]
        said, begun, is_whole = read(syntax, [prefix])
        assert any(said[:k] == content[:k] and prefix.endswith(said[k:]) for k in range(len(said) + 1)), prefix
        assert len(begun) <= len(calls)
        for (name, arguments), (whole_name, whole) in zip(begun, calls, strict=False):
            assert name == whole_name and whole.startswith(arguments)
        assert is_whole == any(one == two for one, two in zip(begun, calls, strict=False))


def test_pieces_and_whole_agree_on_random_texts() -> None:
    parts = [
        "```json", "```",
        "<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[", "]", "<|python_tag|>", ";", ",", "{", "}", "\n", " ", "x",
        F, '{"name": "f", "parameters": {', '"a": ', '"b"', "1", "true", "[1]",
    ]  # fmt: skip
    rng = random.Random(5)
    for syntax, _ in itertools.product((HERMES, MISTRAL, LLAMA, OBJECT), range(2000)):
        text = "".join(rng.choice(parts) for _ in range(rng.randrange(1, 12)))
        whole = read(syntax, [text])
        cuts = sorted(rng.sample(range(len(text) + 1), min(3, len(text))))
        assert read(syntax, [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]) == whole, text
        if not whole[1]:
            assert whole[0] == text


def test_arguments_that_break_off_are_given_as_far_as_they_are_json_and_the_rest_is_content() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1, b}}</tool_call>'
    for pieces in ([text], list(text)):
        assert read(HERMES, pieces) == ("b}}</tool_call>", [("f", '{"a": 1, ')], False)


def test_arguments_come_as_they_are_written() -> None:
    reader = CallReader(HERMES, NAMES)
    assert reader.push("Wait.<tool_call>\n") == [{"content": "Wait."}]
    assert reader.push('{"name": "f", "argum') == []
    (first,) = reader.push('ents": {"ci')
    (call,) = first["tool_calls"]
    assert (call["index"], call["type"], call["function"]) == (0, "function", {"name": "f", "arguments": '{"ci'})
    assert reader.push('ty"') == [{"tool_calls": [{"index": 0, "function": {"arguments": 'ty"'}}]}]
    assert not reader.has_call
    assert reader.push(": 1}}") == [{"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}]
    assert reader.has_call and reader.push("\n</tool_call>") == [] and reader.finish() == []


def test_one_call_only() -> None:
    text = f"a<tool_call>{F}</tool_call>b<tool_call>{F}</tool_call>"
    assert read(HERMES, list(text), only_one=True) == ("a", [("f", '{"a": 1}')], True)


def test_the_template_says_how_calls_are_written() -> None:
    template = {path.stem: path.read_text() for path in TEMPLATES.glob("*.jinja")}
    assert syntax_of(template["qwen2.5"]) is HERMES
    assert syntax_of(template["llama3.2"]) is LLAMA
    assert syntax_of("{{ '[TOOL_CALLS] [' }}") is MISTRAL
    assert syntax_of("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}") is None
    assert syntax_of("<tool_call>\n<function=example>") is None
    assert syntax_of(template["chatml"]) is None
    for syntax in SYNTAXES:  # the reader counts on it
        assert syntax.opening[0] not in syntax.opening[1:]
    assert len(MISTRAL.new_id()) == 9 and MISTRAL.new_id().isalnum()  # its template insists


def test_the_scanner_is_of_one_mind_with_json() -> None:
    """Where it says that an object ends, json finds one; what json reads, it follows to the end."""
    parts = [*'"a\\{}[],:1-.e0 \n', "true", "null", '"a":', "u00"]
    rng = random.Random(1)
    n_objects = 0
    for _ in range(20000):
        text = "{" + "".join(rng.choice(parts) for _ in range(rng.randrange(10)))
        scanner, end = ObjectScanner(), None
        for i, char in enumerate(text):
            if not scanner.push(char):
                break
            if scanner.depth == 0:
                end = i + 1
                break
        try:
            _, wanted = json.JSONDecoder().raw_decode(text)
        except ValueError:
            wanted = None
        assert end == wanted, text
        n_objects += end is not None
    assert n_objects > 500
