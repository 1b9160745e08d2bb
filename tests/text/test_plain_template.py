"""Templates that are evaluated here: to the character what jinja2 writes, in bounded work, whatever they say."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pyengine.errors import TemplateError
from pyengine.text import plain_values, template_syntax
from pyengine.text.plain_template import MAX_SOURCE, parse
from pyengine.text.plain_values import FUEL, NotPlain

# In the manner of the models' own, with the constructs of each.
REAL = {path.stem: path.read_text() for path in (Path(__file__).parent / "templates").glob("*.jinja")}

TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "é <x>", "parameters": {"a": [1, 2.5, None, True]}}}
]
CALL = {"function": {"name": "f", "arguments": {"a": 1, "b": "x"}}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": " Hi "}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nx\n</think>\n\nb"},
        {"role": "user", "content": "<tool_response>c</tool_response>"},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "4"},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "nine", "reasoning_content": "hm"},
    ],
]


def by_jinja2(source: str, context: dict[str, Any]) -> str:
    environment = ImmutableSandboxedEnvironment(**template_syntax.SYNTAX)
    environment.filters["tojson"] = template_syntax.tojson
    environment.globals |= {
        "raise_exception": template_syntax.raise_exception,
        "strftime_now": template_syntax.strftime_now,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's compiler about (none)[1:] and the like
        return environment.from_string(source).render(**context)


def by_us(source: str, context: dict[str, Any]) -> str:
    template = parse(source)
    assert template is not None, "not plain"
    return template.render(context, 1 << 20)


def outcome(render: Any, source: str, context: dict[str, Any]) -> str:
    try:
        return f"text: {render(source, context)}"
    except TemplateError as error:
        return f"refused: {error}"


@pytest.mark.parametrize("name", sorted(REAL))
def test_templates_in_the_manner_of_the_models_are_plain(name):
    for messages, tools, prompt in itertools.product(CONVERSATIONS, (None, TOOLS), (True, False)):
        context = {"messages": messages, "tools": tools, "add_generation_prompt": prompt, "bos_token": "<s>"}
        context |= {"eos_token": "</s>", "builtin_tools": ["search", "code_interpreter"]}
        try:
            ours = outcome(by_us, REAL[name], context)
        except NotPlain:  # jinja2 refuses what the template does with this conversation
            with pytest.raises(Exception, match=r"undefined|must be str|not \"NoneType|None"):
                by_jinja2(REAL[name], context)
            continue
        assert ours == outcome(by_jinja2, REAL[name], context)


# -------------------------------------------------------------------- the language, at random

ATOMS = """messages|m|m.role|m['content']|m.calls|m.none|messages[0]|messages[-1].role|loop.index0|x|ns.a|loop.first|
loop.last|loop.length|nothing|d|d.k|d['items']|n|f|t|none|true|1|0|-1|2.5|''|'a'|'user'|' b '|[]|['a', 1]|
{'k': 'v'}|('a', 'b')|loop.nextitem|loop.previtem.role|messages[1]|d.n"""
BINARY = "+|-|*|//|%|/|~|==|!=|<|>=|in|not in|and|or"
FILTERS = """trim|upper|lower|capitalize|length|default('z')|d('z', true)|tojson|tojson(indent=1)|items|list|first|last|
join('-')|join|replace('a', 'bb')|string|reverse|select|reject('equalto', 'a')|selectattr('role')|
selectattr('role', 'equalto', 'user')|rejectattr('role', '==', 'user')|map(attribute='role')|map('upper')|
select('string')|selectattr('calls', 'defined')|selectattr('content', 'in', 'ab')"""
IS = """defined|undefined|none|string|mapping|number|integer|float|boolean|true|false|iterable|sequence|odd|even|
divisibleby(2)|eq('a')|in(['a', 'user'])|gt(1)|not none|not defined"""
METHODS = """strip()|lstrip('a')|rstrip()|split()|split('a')|startswith('a')|endswith('b')|upper()|lower()|title()|
replace('a', 'x')|find('b')|items()|keys()|get('k')|get('zz', 'no')|join(['a', 'b'])|removeprefix('a')|
splitlines()|isdigit()|capitalize()|strip"""
ACCESSES = ".role|['content']|[0]|[-1]|[1:]|[::-1]|[:2]|.length|['k']|.keys|[9]"


def one_of(listing: str) -> st.SearchStrategy[str]:
    return st.sampled_from([item.strip() for item in listing.split("|")])


def written(form: str, *parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """`form` with each # replaced by one of the parts."""
    pieces = form.split("#")
    return st.tuples(*parts).map(lambda chosen: "".join(itertools.chain(*zip(pieces, (*chosen, ""), strict=True))))


def expressions() -> st.SearchStrategy[str]:
    return st.recursive(
        one_of(ATOMS),
        lambda inner: st.one_of(
            written("(# # #)", inner, one_of(BINARY), inner),
            written("(# | #)", inner, one_of(FILTERS)),
            written("(# is #)", inner, one_of(IS)),
            written("(#).#", inner, one_of(METHODS)),
            written("(#)#", inner, one_of(ACCESSES)),
            written("(# if # else #)", inner, inner, inner),
            written("(not #)", inner),
            written("(-#)", inner),
        ),
        max_leaves=5,
    )


def statements() -> st.SearchStrategy[str]:
    value = expressions()
    simple = st.one_of(
        st.sampled_from(["text", " \n", "{% set x = 'y' %}", "{% break %}", "{% continue %}"]),
        written("{{ # }}", value),
        written("{%- set x = # -%}", value),
        written("{% set ns.a = # %}", value),
        written("{{ p(#) }}", value),
        written("{% if # %}{{ raise_exception('no') }}{% endif %}", value),
    )

    def combine(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        body = st.lists(inner, max_size=3).map("".join)
        return st.one_of(
            written("{% if # %}#{% else %}#{% endif %}", value, body, body),
            written("{% for m in # %}#{% else %}#{% endfor %}", value, body, body),
            written("{% for m in # if # %}#{% endfor %}", value, value, body),
            written("{% for k, v in (#) | items %}{{ k }}#{% endfor %}", value, body),
            written("{% set x %}#{% endset %}", body),
            written("{% generation %}#{% endgeneration %}", body),
        )

    return st.recursive(simple, combine, max_leaves=6)


LANGUAGE_CONTEXT: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": " a\nb ", "calls": [{"k": "v"}], "none": None},
        {"role": "user", "content": None},
    ],
    "d": {"k": "v", "items": [1], "n": {"k": 2}},
    "n": 3,
    "f": 0.5,
    "t": "user",
    "m": {"role": "outer"},
}
PREAMBLE = "{%- macro p(a, b='c') -%}<{{ a }}{{ b }}>{%- endmacro -%}{%- set ns = namespace(a='') -%}"


@settings(max_examples=800, deadline=None)
@given(st.lists(statements(), min_size=1, max_size=4).map("".join))
def test_what_is_plain_is_what_jinja2_writes(body):
    source = PREAMBLE + body
    try:
        template = parse(source)
    except TemplateError:
        with pytest.raises(Exception, match=""):
            by_jinja2(source, LANGUAGE_CONTEXT)
        return
    if template is None:
        return
    try:
        ours = outcome(by_us, source, LANGUAGE_CONTEXT)
    except NotPlain:
        return
    assert ours == outcome(by_jinja2, source, LANGUAGE_CONTEXT)


def test_many_random_templates_are_plain():
    """The comparison above is not about nothing."""
    counts = {"plain": 0, "not": 0}

    @settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @given(expressions())
    def count(expression):
        try:
            by_us(PREAMBLE + "{{ " + expression + " }}", LANGUAGE_CONTEXT)
            counts["plain"] += 1
        except NotPlain:
            counts["not"] += 1

    count()
    assert counts["plain"] > 50, counts


# -------------------------------------------------------------------- scopes


@pytest.mark.parametrize(
    "source",
    [
        "{% set x = 1 %}{% for m in messages %}{{ x }}{% set x = 2 %}{{ x }}{% endfor %}{{ x }}",
        "{% if true %}{% set x = 1 %}{% endif %}{{ x }}{% if false %}{% set y = 1 %}{% endif %}{{ y }}",
        "{{ n }}{% set n = 5 %}{{ n }}",
        "{% for m in messages %}{% for m in m.calls %}{{ m.k }}{{ loop.index }}{% endfor %}{{ m.role }}{{ loop.index }}"
        "{% endfor %}{{ m.role }}",
        "{% set x %}{% set y = 1 %}{{ y }}{% endset %}[{{ x }}{{ y }}]",
        "{% for m in [] %}a{% else %}{% set z = 1 %}{{ z }}{% endfor %}{{ z }}",
        "{% for a, b in d | items %}{{ a }}{{ b if b is string }}{% endfor %}{{ a }}",
        "{% macro g(x) %}{{ x }}{{ n }}{{ f }}{% endmacro %}{% for m in messages %}{{ g(m.role) }}{% endfor %}",
        "{% macro g(x, y=x ~ 'z') %}{{ x }}{{ y }}{% endmacro %}{{ g(1) }}{{ g(1, 2) }}{{ g(y=3, x=4) }}{{ g() }}",
        "{% macro g(i) %}{{ i }}{% if i < 3 %}{{ g(i + 1) }}{% endif %}{% endmacro %}{{ g(0) }}",
        "{% set ns = namespace(a=0) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}{{ ns.b }}",
        "{% for m in messages if m.content %}{{ loop.index }}/{{ loop.length }}{% if loop.last %}!{% endif %}{% endfor %}",
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "{% if range is defined %}{{ range(3) | join }}{% endif %}{% set range = 5 %}{{ range }}",
        "{% for i in range(3) %}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.previtem }}{{ loop.nextitem }}{% endfor %}",
    ],
)
def test_scopes_are_jinja2s(source):
    assert by_us(source, LANGUAGE_CONTEXT) == by_jinja2(source, LANGUAGE_CONTEXT)


@pytest.mark.parametrize(
    "source",
    [
        "{% set x = 1 %}{% macro g() %}{{ x }}{% endmacro %}{{ g() }}",
        "{% for m in messages %}{% macro g() %}a{% endmacro %}{{ g() }}{% endfor %}",
        "{% macro g() %}{{ caller() }}{% endmacro %}{% call g() %}x{% endcall %}",
        "{% macro g() %}{{ varargs }}{% endmacro %}{{ g(1) }}",
        "{% macro g() %}a{% endmacro %}{% macro g() %}b{% endmacro %}{{ g() }}",
        "{% set ns = namespace(a=1) %}{% for m in messages if ns.a %}{% set ns.a = 0 %}{% endfor %}",
        "{% for m in messages if raise_exception('x') %}{% endfor %}",
        "{% for m in messages recursive %}{{ loop(m.calls) }}{% endfor %}",
        "{{ self }}",
        "{% break %}",
        "{% for m in messages %}{% set x %}{% break %}{% endset %}{% endfor %}",
        "{{ x | sort }}",
        "{{ x is callable }}",
        "{{ x.__class__ }}{{ [].append(1) }}",
        "{{ f(*x) }}",
        "{{ 'a'.format(1) }}",
        "{% include 'a' %}",
        "{% filter upper %}a{% endfilter %}",
        "{% set x | upper %}a{% endset %}",
        "{% with a = 1 %}{{ a }}{% endwith %}",
        "{{ 2 ** 3 }}",
        "{{ " + "-" * 100 + "1 }}",
        "{{ " + " + ".join("1" * 100) + " }}",
        "{{ 1" + "0" * 5000 + " }}",
        " " * (MAX_SOURCE + 1),
        "{{ " + "(" * 400 + "1" + ")" * 400 + " }}",
    ],
)
def test_other_templates_are_not_plain(source):
    assert parse(source) is None


# -------------------------------------------------------------------- bounds


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in t * 5 %}x{% endfor %}",
        "{% set ns = namespace(a='aa') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
        "{% set ns = namespace(a='aa') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
        "{% set ns = namespace(a=['a']) %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
        "{% set ns = namespace(a='aa') %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] | join %}{% endfor %}",
        "{% set ns = namespace(a='aa') %}{% for i in range(60) %}{% set ns.a = ns.a.replace('a', ns.a) %}{% endfor %}",
        "{% set ns = namespace(a='aa') %}{% for i in range(60) %}{% set ns.a %}{{ ns.a }}{{ ns.a }}{% endset %}{% endfor %}",
        "{% set ns = namespace(a=3) %}{% for i in range(60) %}{% set ns.a = ns.a * ns.a %}{% endfor %}",
        "{% set ns = namespace(a=['a']) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a | tojson }}",
        "{% macro g(i) %}{{ g(i) }}{% endmacro %}{{ g(0) }}",
        "{% macro g(i) %}{% if i %}{{ g(i - 1) }}{{ g(i - 1) }}{% endif %}{% endmacro %}{{ g(90) }}",
        "{{ range(1000000000) | list }}",
        "{{ range(0, 100000000000000000000, 1) | list }}",
        "{% for i in range(90000) %}{{ 'a' in messages[0].long }}{% endfor %}",
        "{% for i in range(90000) %}{{ messages[0].long == messages[0].long2 }}{% endfor %}",
        "{% for i in range(90000) %}{{ messages[0].long | trim | length }}{% endfor %}",
        "{% for i in range(90000) %}{% if messages[0].long.split('b') %}{% endif %}{% endfor %}",
        "{% for i in range(90000) %}{{ messages[0].long[1:] | length }}{% endfor %}",
    ],
)
def test_too_much_work_is_given_up(source):
    """Counted, not measured: the fuel is finite, and so is what is done per unit of it."""
    context = {**LANGUAGE_CONTEXT, "messages": [{"role": "user", "long": "a" * 100_000, "long2": "a" * 99_999 + "b"}]}
    with pytest.raises(NotPlain):
        by_us(source, context)


def test_output_is_bounded():
    template = parse("{% for i in range(1000) %}0123456789{% endfor %}")
    assert template is not None and len(template.render({}, 10_000)) == 10_000
    with pytest.raises(TemplateError, match="exceeds 9999"):
        template.render({}, 9999)


def test_long_conversations_are_within_the_fuel(monkeypatch):
    """A hundred turns of a thousand characters, under the longest of the templates."""
    used = []
    monkeypatch.setattr(plain_values.Fuel, "__del__", lambda fuel: used.append(FUEL - fuel.left), raising=False)
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 200} for i in range(100)]
    assert len(by_us(REAL["qwen3"], {"messages": messages, "add_generation_prompt": True})) > 100_000
    assert max(used) < FUEL / 4
