"""Calls as a model writes them, as a grammar: what an answer is held to when a call is forced.

It is the format of the model's own template, with its special tokens, so a model writes what it was trained to write; only
names and arguments are held to the tools. What a grammar allows, call_forms.py reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pyengine.run.guide import JSON_STYLE
from pyengine.serve.call_forms import Form, NamedForm, ObjectForm, TagForm, types_of

if TYPE_CHECKING:
    from pyengine.serve.calls import Syntax

MAX_CALLS = 16  # that an answer which must call may make

Special = Mapping[str, int]  # {text: id} of special tokens


def call_grammar(
    syntax: Syntax, tools: Mapping[str, Any], special: Special, *, only_one: bool, otherwise: Any = None
) -> str | None:
    """In Lark's notation as llguidance has it: calls of `tools` ({name: schema of the arguments}), and nothing else; or JSON of
    the schema `otherwise`. None if a schema says what this format cannot be held to."""
    rules = []
    for i, (name, schema) in enumerate(tools.items()):
        written = _FORMS[syntax.form](i, name, schema, syntax, special)
        if written is None:
            return None
        rules += written
    before, after = (_spelled(text, special) for text in syntax.around_all)
    before_each, after_each = (_spelled(text, special) for text in syntax.around_each)
    n_more = 0 if only_one or syntax.joint is None else MAX_CALLS - 1
    more = f" ({_spelled(syntax.joint or '', special)} call){{0,{n_more}}}" if n_more else ""
    names = " | ".join(f"call_{i}" for i in range(len(tools)))
    if otherwise is not None:
        rules.append(f"answer: {_json(otherwise)}")
    start = "start: calls" + ("" if otherwise is None else " | answer")
    calls = f"calls: {before} call{more} {after}"
    return "\n".join([start, calls, f"call: {before_each} ({names}) {after_each}", *rules, _TEXT])


def _spelled(text: str, special: Special) -> str:
    """Text, in which special tokens are such. A space behind one is the model's choice: vocabularies differ in that."""
    marks = [re.escape(mark) for mark in sorted((one for one in special if one in text), key=len, reverse=True)]
    parts = re.split(f"({'|'.join(marks)})( ?)", text) if marks else [text]
    # text, mark, space, text, mark, space, ..., text
    out = []
    for i, part in enumerate(parts):
        if part:
            out.append(f"<[{special[part]}]>" if i % 3 == 1 else '" "?' if i % 3 == 2 else _literal(part))
    return " ".join(out)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json(schema: Any) -> str:
    if isinstance(schema, str):  # it is JSON already
        return f"%json {schema}"
    styled = {"x-guidance": JSON_STYLE, **schema} if isinstance(schema, Mapping) else schema
    return f"%json {json.dumps(styled)}"


# -------------------------------------------------------------------- one call of one tool, in each form


def _object(i: int, name: str, schema: Any, syntax: Syntax, special: Special) -> list[str]:
    # In the words of JSON, one by one: llguidance reads the longest word, so one of them all could not become another object.
    words = ("{", '"name"', ": ", json.dumps(name), ", ", json.dumps(syntax.arguments), ": ")
    head = " ".join(_literal(word) for word in words)
    return [f'call_{i}: {head} arguments_{i} "}}"', f"arguments_{i}: {_json(schema)}"]


def _named(i: int, name: str, schema: Any, syntax: Syntax, special: Special) -> list[str]:
    id_ = f"({_spelled('[CALL_ID]', special)} /[a-zA-Z0-9]{{9}}/)?" if "[CALL_ID]" in special else ""
    return [
        f"call_{i}: {_literal(name)} {id_} {_spelled('[ARGS]', special)} arguments_{i}",
        f"arguments_{i}: {_json(schema)}",
    ]


_ANNOTATIONS = frozenset(("title", "description", "default", "examples", "deprecated", "$comment", "$schema", "$id"))
_DEFINITIONS = ("$defs", "definitions")
_OF_TAGS = _ANNOTATIONS.union(("type", "properties", "required", "additionalProperties"), _DEFINITIONS)
_OF_TEXT = _ANNOTATIONS.union(("type", "enum", "const", "minLength", "maxLength"))
_END = "\n</parameter>\n"
_NO_END = r"~/(?s:.*)<\/parameter>(?s:.*)/"
_TEXT = f"TEXT: (/(?s:.*)/ & {_NO_END}) {_literal(_END)}"


def _tags(i: int, name: str, schema: Any, syntax: Syntax, special: Special) -> list[str] | None:
    """Parameters come in the order of the schema, those that are not required may be missing."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not _OF_TAGS.issuperset(schema) or not isinstance(properties, dict) or not isinstance(required, list):
        return None
    if any(key not in properties for key in required) or any(re.search(r"[\s>]", key) or not key for key in properties):
        return None
    definitions = {key: schema[key] for key in _DEFINITIONS if key in schema}
    rules, uses = [], []
    for j, (key, one) in enumerate(properties.items()):
        value = _value(one, definitions, f"TEXT_{i}_{j}")
        if value is None:
            return None
        rules += [f"parameter_{i}_{j}: {_literal(f'<parameter={key}>' + chr(10))} {value[0]}", *value[1:]]
        uses.append(f"parameter_{i}_{j}" + ("" if key in required else "?"))
    return [f'call_{i}: {_literal(f"<function={name}>" + chr(10))} {" ".join(uses)} "</function>"', *rules]


def _value(schema: Any, definitions: Mapping[str, Any], terminal: str) -> list[str] | None:
    """A parameter's value and its end; then rules that this needs. None for strings of a kind that is not followed here."""
    types = types_of(schema)
    if types == {"string"}:
        return _text(schema, terminal)
    if types == {"string", "null"} and "enum" not in schema and _is_plain(schema):
        return ["TEXT"]  # null is the text "null"
    styled = {**schema, **definitions} if isinstance(schema, dict) else schema
    return [f"({_json(styled)}) {_literal(_END)}"]


def _text(schema: Mapping[str, Any], terminal: str) -> list[str] | None:
    if not _OF_TEXT.issuperset(schema):
        return None
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if choices is not None:
        if any("</parameter>" in one for one in choices):
            return None
        return [f"({' | '.join(_literal(one) for one in choices)}) {_literal(_END)}"]
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if (least, most) == (0, ""):
        return ["TEXT"]
    if not isinstance(least, int) or not isinstance(most, (int, str)):
        return None
    return [terminal, f"{terminal}: (/(?s:.{{{least},{most}}})/ & {_NO_END}) {_literal(_END)}"]


def _is_plain(schema: Mapping[str, Any]) -> bool:
    """Whether a schema says nothing but types."""
    if not _ANNOTATIONS.union(("type", "anyOf", "oneOf")).issuperset(schema):
        return False
    return all(_is_plain(one) for name in ("anyOf", "oneOf") for one in schema.get(name, ()))


_FORMS: dict[type[Form], Callable[[int, str, Any, Syntax, Special], list[str] | None]] = {
    ObjectForm: _object,
    NamedForm: _named,
    TagForm: _tags,
}
