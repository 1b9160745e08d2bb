"""Chat templates: programs of expressions, filters, tests, loops and macros, and conversations for them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from fuzz import mutations
from fuzz.cases import Case
from fuzz.mutations import words
from fuzz.targets import seeds

from pyengine.text.chat import ChatTemplate

_ATOMS = words("""
messages message messages[0].content messages[-1] bos_token eos_token tools add_generation_prompt x x[0] x[::-1] ns ns.a loop
loop.index 'ab' 'a'*1000 '' '%d' '{0.__class__}' 1 -1 0 3.5 2**9 10**9 [] [1,2] {'a':1} none true range(3) range(10**9)
undefined_thing namespace(a=1) dict(a=1) cycler(1,2) joiner() lipsum() strftime_now('%Y') raise_exception('no') caller() self
super() varargs kwargs
""")
_FILTERS = words("""
abs attr('__class__') batch(2) batch(10**9) capitalize center(10**9) default('x') dictsort escape filesizeformat first float
forceescape format(1) groupby('role') indent(10**9) indent int items join join('a'*10000) last length list lower map('upper')
map(attribute='role') max min pprint random reject rejectattr('a') replace('a','b'*10**6) replace('','x'*1000) reverse round
safe select('string') selectattr('role','equalto','user') slice(2) slice(10**9) sort string striptags sum title tojson
tojson(indent=10**9) trim truncate(5) unique upper urlencode urlize wordcount wordwrap(1) xmlattr nothing
""")
_METHODS = words("""
upper() split() split('') items() keys() append(1) __class__ __init__.__globals__ content lower() title() format(1)
format_map({}) mro() index(1) count('a') strip() update({}) pop() encode() join([1]) ljust(10**9) zfill(10**9) expandtabs(10**9)
translate({97:'b'*10**6}) replace('a','b'*10**6) startswith('a') gi_frame func_code __getitem__(0)
""")
_WHOLE = [
    "",
    "{{",
    "{%",
    "{{ 1/0 }}",
    "\x1b[2J{{ messages }}",
    "{" * 1000,
    "{{ " + "(" * 500,
    "{% raw %}",
    "\ud800",
    "x" * 300_000,
]
_OPERATORS = ["+", "-", "*", "~", "%", "/", "//", "**", "in", "not in", "==", "!=", "<", ">=", "and", "or"]
_TESTS = [
    "defined",
    "none",
    "string",
    "mapping",
    "iterable",
    "sequence",
    "number",
    "divisibleby(0)",
    "odd",
    "in x",
    "callable",
    "nothing",
]


def expression(rng: random.Random, depth: int = 0) -> str:
    kind = rng.randrange(12)
    if depth > 3 or kind < 4:
        return rng.choice(_ATOMS)
    inner = f"({expression(rng, depth + 1)})"
    if kind < 7:
        return f"{inner}|{rng.choice(_FILTERS)}"
    if kind == 7:
        return f"{inner} {rng.choice(_OPERATORS)} ({expression(rng, depth + 1)})"
    if kind == 8:
        return f"{inner}.{rng.choice(_METHODS)}"
    if kind == 9:
        return f"{inner} is {rng.choice(_TESTS)}"
    if kind == 10:
        return f"[{expression(rng, depth + 1)}, {expression(rng, depth + 1)}][{rng.choice(['0', '1:', '-1', 'x'])}]"
    return f"({expression(rng, depth + 1)} if {inner} else {expression(rng, depth + 1)})"


def _filled(pattern: str, *parts: str) -> str:
    """The pattern with each @ replaced by the next part."""
    pieces = pattern.split("@")
    return "".join(piece + part for piece, part in zip(pieces, (*parts, ""), strict=True))


def statement(rng: random.Random, depth: int = 0) -> str:
    kind = rng.randrange(14)
    if depth > 3 or kind < 4:
        return _filled("{{ @ }}", expression(rng))
    value, body, other = expression(rng), statement(rng, depth + 1), statement(rng, depth + 1)
    if kind < 7:
        end = rng.choice(["", "", " if loop", " recursive"])
        return _filled("{% for x in @@ %}@{% else %}@{% endfor %}", value, end, body, other)
    if kind == 7:
        return _filled("{% set x = @ %}@", value, body)
    if kind == 8:
        return _filled("{% if @ %}@{% else %}@{% endif %}", value, body, other)
    if kind == 9:
        return _filled("{% set ns = namespace(a=@) %}{% set ns.a = @ %}@", value, expression(rng), body)
    if kind == 10:
        return _filled("{% macro m(x) %}@{% endmacro %}{{ m(@) }}", body, value)
    if kind == 11:
        return _filled("{% filter @ %}@{% endfilter %}", rng.choice(_FILTERS), body)
    if kind == 12:
        return _filled("{% call m(1) %}@{% endcall %}", body)
    return _filled("{% set x %}@{% endset %}{{ x }}{% generation %}@{% endgeneration %}", body, other)


def template_source(rng: random.Random) -> str:
    """A template, now and then damaged as a text."""
    if rng.random() < 0.1:
        return rng.choice([*_WHOLE, seeds.TEMPLATE])
    source = "{% set x = 'ab' %}{% set ns = namespace(a=1) %}" if rng.random() < 0.9 else ""
    source += "".join(statement(rng) for _ in range(rng.randint(1, 3)))
    if rng.random() < 0.3:
        source = seeds.TEMPLATE.replace("message.content", expression(rng), 1)
    if rng.random() < 0.1:
        at = rng.randrange(len(source))
        source = source[:at] + rng.choice(["{", "}", "%", "'", "(", " ", ""]) + source[at + 1 :]
    return source


def conversation(rng: random.Random) -> Any:
    if rng.random() < 0.7:
        return seeds.MESSAGES
    if rng.random() < 0.5:
        return mutations.mutated(rng, seeds.MESSAGES)
    return [
        {"role": rng.choice(["user", "system", "tool", ""]), "content": mutations.text(rng, ["<|end|>", "<|bos|>"])}
        for _ in range(rng.randrange(4))
    ]


class TemplateTarget:
    name = "template"

    def __init__(self, scratch: Path) -> None:
        self.stage = ""

    def make(self, rng: random.Random) -> Case:
        return Case({"chat_template.jinja": template_source(rng).encode("utf-8", "surrogatepass")}, conversation(rng))

    def run(self, case: Case) -> None:
        source = case.files["chat_template.jinja"].decode("utf-8", "surrogatepass")
        self.stage = "compile"
        template = ChatTemplate(source, bos_token="<|bos|>", eos_token="<|end|>")
        self.stage = "render"
        text = template.render(case.arguments, time_limit=0.5)
        assert isinstance(text, str)
