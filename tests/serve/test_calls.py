"""Calls in a model's text: what is a call, what stays content, and the same however the text is cut."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from pyengine.serve.call_forms import types_of
from pyengine.serve.calls import OBJECT, SYNTAXES, CallReader, Syntax, message_of, syntax_of
from pyengine.serve.json_scan import ObjectScanner

HERMES, CODER, MISTRAL, NAMED, LLAMA = SYNTAXES
TOOLS: dict[str, Any] = {
    "f": {
        "type": "object",
        "properties": {"s": {"type": "string"}, "n": {"type": "integer"}, "m": {"type": ["string", "null"]}},
    },
    "get_weather": {"type": "object"},
}
TEMPLATES = Path(__file__).parent.parent / "text" / "templates"

# syntax, text, content, [(name, arguments)]
Case = tuple[Syntax, str, str, list[tuple[str, str]]]
F = '{"name": "f", "arguments": {"a": 1}}'


def tagged(**values: str) -> str:
    """A call of f with these parameters, as Qwen3-Coder writes it."""
    return (
        "<function=f>\n" + "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items()) + "</function>"
    )


G, G_JSON = tagged(s='S\u00e3o\n"P"\\', n="-3", x="[1]"), '{"s": "S\u00e3o\\n\\"P\\"\\\\", "n": -3, "x": [1]}'
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
    (NAMED, '[TOOL_CALLS]f[ARGS]{"a": 1}', "", [("f", '{"a": 1}')]),
    (
        NAMED,
        'Well.\n[TOOL_CALLS]f[ARGS] {"a": "}"}[TOOL_CALLS]get_weather[ARGS]{}\n',
        "Well.",
        [("f", '{"a": "}"}'), ("get_weather", "{}")],
    ),
    (NAMED, '[TOOL_CALLS]f[CALL_ID]a1b2c3d4e[ARGS]{"a": 1}', "", [("f", '{"a": 1}')]),
    (NAMED, '[TOOL_CALLS] f[ARGS]{"a": 1} Done.', " Done.", [("f", '{"a": 1}')]),
    (CODER, "<tool_call>\n<function=f>\n</function>\n</tool_call>", "", [("f", "{}")]),
    (
        CODER,
        f"I look.\n\n<tool_call>\n{G}\n</tool_call>\n<tool_call>\n{G}\n</tool_call>",
        "I look.",
        [("f", G_JSON)] * 2,
    ),
    (CODER, f"Well. {G}\n</tool_call> Done.", "Well. Done.", [("f", G_JSON)]),  # the opening forgotten
    (CODER, f"<tool_call>{G}{G}", "", [("f", G_JSON)] * 2),
    (CODER, tagged(s="\n\n"), "", [("f", '{"s": "\\n\\n"}')]),
    (CODER, tagged(s="</para</parameter<b>\n</a>"), "", [("f", '{"s": "</para</parameter<b>\\n</a>"}')]),
    (CODER, "<function=f><parameter=s></parameter></function>", "", [("f", '{"s": ""}')]),
    (
        CODER,
        "<function=f><parameter=s>a b\n</parameter><parameter=n>\n5</parameter></function>",
        "",
        [("f", '{"s": "a b", "n": 5}')],
    ),
    (CODER, tagged(s="5", n="5"), "", [("f", '{"s": "5", "n": 5}')]),  # by the schema, as far as it says
    (CODER, tagged(n="five"), "", [("f", '{"n": "five"}')]),
    (CODER, tagged(n='"5"'), "", [("f", '{"n": "\\"5\\""}')]),
    (CODER, tagged(n="5.0"), "", [("f", '{"n": 5.0}')]),
    (CODER, tagged(m="5"), "", [("f", '{"m": "5"}')]),
    (CODER, tagged(m="None"), "", [("f", '{"m": null}')]),
    (CODER, tagged(x="True"), "", [("f", '{"x": true}')]),
    (CODER, tagged(x='{"a": [1,  2]}'), "", [("f", '{"x": {"a": [1,  2]}}')]),
    (CODER, tagged(x='{"a": 1, "a": 2}'), "", [("f", '{"x": "{\\"a\\": 1, \\"a\\": 2}"}')]),
    (CODER, tagged(x="1e999"), "", [("f", '{"x": "1e999"}')]),
    (CODER, tagged(x=" a "), "", [("f", '{"x": " a "}')]),
    (CODER, tagged(**{'"\u00e9': "1"}), "", [("f", '{"\\"\u00e9": 1}')]),
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
    (NAMED, f"{F} [TOOL_CALL] [TOOL_CALLS][{F}]"),
    (NAMED, "[TOOL_CALLS]"),
    (NAMED, "[TOOL_CALLS]f"),
    (NAMED, "[TOOL_CALLS]unknown[ARGS]{}"),
    (NAMED, "[TOOL_CALLS]f{}"),
    (NAMED, "[TOOL_CALLS]f[ARGS][1]"),
    (NAMED, "[TOOL_CALLS]f[ARGS]  "),
    (NAMED, "[TOOL_CALLS]f[CALL_ID]a[CALL_ID]"),
    (NAMED, "[TOOL_CALLS]f[CALL_ID]a-b[ARGS]{}"),
    (NAMED, "[TOOL_CALLS]f[CALL_ID]" + "a" * 1000),
    (CODER, f"1 < 2, <tool_call, <function, {F}"),
    (CODER, f"<tool_call>{F}</tool_call>"),
    (CODER, f"```json\n{F}\n```"),
    (CODER, "<tool_call>\n<function=unknown>\n</function>"),
    (CODER, "<tool_call>\n<function=f"),
    (CODER, "<tool_call>\n<function=f >\n</function>"),
    (CODER, "<function=f\n>" + " " * 1000),
]


def read(syntax: Syntax, pieces: list[str], **options: Any) -> tuple[str, list[tuple[str, str]], bool]:
    """(content, [(name, arguments)], whether a call was read to its end), from deltas that keep the protocol's rules."""
    reader = CallReader(syntax, TOOLS, **options)
    deltas = [delta for piece in pieces for delta in reader.push(piece)] + reader.finish()
    begun = 0
    for delta in deltas:
        assert len(delta) == 1 and delta.get("content") != ""
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                assert part["index"] == begun and part["type"] == "function" and part["function"]["name"] in TOOLS
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
        F, '{"name": "f", "parameters": {', '"a": ', '"b"', "1", "true", "[1]", "f", "[CALL_ID]", "[ARGS]",
        "<function=f>", "<function=", "</function>", "<parameter=", "<parameter=s>", "<parameter=x>", "</parameter>", ">",
    ]  # fmt: skip
    rng = random.Random(5)
    for syntax, _ in itertools.product((*SYNTAXES, OBJECT), range(2000)):
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


@pytest.mark.parametrize(
    ("text", "arguments", "rest"),
    [
        ("<function=f>\nso<parameter=s>", "{", "\nso<parameter=s>"),
        ("<function=f><parameter=s>a</parameter>,<parameter=n>", '{"s": "a"', ",<parameter=n>"),
        ("<function=f><parameter=s>a</parameter><parameter=s>b</parameter>", '{"s": "a"', "<parameter=s>b</parameter>"),
        ("<function=f><parameter=>b", "{", "<parameter=>b"),
        ("<function=f><parameter=" + "k" * 300, "{", "<parameter=" + "k" * 300),
        ("<function=f>" + " " * 300 + "</function>", "{", " " * 300 + "</function>"),
    ],
)
def test_tags_that_break_off_leave_the_rest_as_content(text: str, arguments: str, rest: str) -> None:
    for pieces in ([text], list(text)):
        assert read(CODER, pieces) == (rest, [("f", arguments)], False)


def test_a_value_of_tags_comes_as_it_is_written_if_it_can_only_be_text() -> None:
    reader = CallReader(CODER, TOOLS)

    def parts(text: str) -> list[str]:
        return [call["function"]["arguments"] for delta in reader.push(text) for call in delta["tool_calls"]]

    assert parts("<tool_call><function=f") == []
    assert parts("><parameter=s>\na") == ['{"s": "a']
    assert parts('"b\n') == ['\\"b'] and parts("\nc</param") == ["\\n\\nc"] and parts("eter>") == ['"']
    assert parts("<parameter=n>1") == [', "n": '] and parts("2</parameter>") == ["12"] and not reader.has_call
    assert parts("</function>") == ["}"] and reader.has_call


def test_values_between_tags_are_those_that_were_written() -> None:
    """Texts and JSON of any kind, written as templates write them, cut anywhere."""
    rng = random.Random(8)
    parts = [
        "\n",
        " ",
        '"',
        "\\",
        "<",
        "/",
        "</parameter",
        ">",
        "</function>",
        "<parameter=s>",
        "{",
        "1",
        "true",
        "\u00e9",
        "\x00",
    ]
    for _ in range(500):
        text = "".join(rng.choice(parts) for _ in range(rng.randrange(8)))
        if "</parameter>" in text:
            continue  # which ends the value: the format has no other way to say it
        other = rng.choice([1, -2.5, True, False, None, [], {"a": [text]}, [1, "b"]])
        written = (
            json.dumps(other) if isinstance(other, (list, dict)) else str(other)
        )  # True, None: as Jinja shows them
        if "</parameter>" in written:
            continue
        call = tagged(s=text, x=written)
        at = rng.randrange(len(call))
        content, calls, is_whole = read(CODER, [call[:at], call[at:]])
        assert (content, is_whole) == ("", True) and json.loads(calls[0][1]) == {"s": text, "x": other}, call


def test_a_number_of_too_many_digits_stays_text() -> None:
    digits = "1" * 5000
    assert read(CODER, [tagged(x=digits)]) == ("", [("f", f'{{"x": "{digits}"}}')], True)


def test_types_are_those_of_which_the_schema_says_so() -> None:
    every = types_of({})
    assert (
        every
        == types_of(None)
        == types_of(True)
        == types_of({"type": 5})
        == types_of({"type": [{}]})
        == types_of({"enum": []})
    )
    assert types_of({"type": "string"}) == types_of({"enum": ["a", "b"]}) == types_of({"const": "a"}) == {"string"}
    assert types_of({"anyOf": [{"type": "integer"}, {"type": "null"}]}) == types_of({"type": ["integer", "null"]})
    assert types_of({"enum": [1, None, [], 2.5]}) == {"integer", "number", "null", "array"}
    assert types_of({"oneOf": [{"$ref": "#/$defs/a"}]}) == every
    nested: Any = {"type": "string"}
    for _ in range(100):
        nested = {"anyOf": [nested]}
    assert types_of(nested) == every


def test_arguments_come_as_they_are_written() -> None:
    reader = CallReader(HERMES, TOOLS)
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
    assert syntax_of("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}") is NAMED
    assert syntax_of("{{ '<tool_call>\\n<function=' + call.name + '>\\n' }}{{ '<parameter=' + key + '>\\n' }}") is CODER
    assert syntax_of("<tool_call>\n<function=example>") is None
    assert syntax_of("<seed:tool_call>\n<function=example>\n<parameter=x>") is None
    assert syntax_of(template["chatml"]) is None
    for syntax in SYNTAXES:  # the reader counts on it
        assert syntax.opening[0] not in syntax.opening[1:] and (syntax.bare or "{")[0] not in syntax.bare[1:]
    for syntax in (MISTRAL, NAMED):
        assert len(syntax.new_id()) == 9 and syntax.new_id().isalnum()  # its template insists


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
