"""The language that chat templates run in: jinja2's immutable sandbox, made to come back by itself. See chat.py.

One invariant carries it: **no value weighs more than `MAX_VALUE`** (characters and elements, counted through nesting as often as
they are referred to). Then every single operation of jinja2 and Python on such values is short, and it is enough to look at the
clock between operations: at each turn of a loop, each call, each filter. The syntax tree is rewritten so that loops, `~` and
literals pass through functions of ours; operators, calls and filters are intercepted by jinja2's own hooks.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from pyengine.errors import TemplateError

MAX_VALUE = 1 << 22
MAX_INTEGER_BITS = 4096
MAX_WRITTEN = 1 << 28  # characters written in all, into macros and blocks too
MAX_FORMAT = 64  # characters of a date format

# fmt: off
STR_METHODS = frozenset((
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit",
    "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition", "removeprefix",
    "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip",
    "swapcase", "title", "upper",
))
FILTER_NAMES = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "forceescape", "groupby", "int",
    "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe", "select",
    "selectattr", "sort", "string", "sum", "title", "trim", "unique", "upper",
)
# fmt: on

_running = threading.local()


class Budget:
    """What one rendering may still use."""

    def __init__(self, time_limit: float) -> None:
        self._time_limit = time_limit
        self._deadline = time.monotonic() + time_limit
        self._written = 0

    def tick(self) -> None:
        if time.monotonic() > self._deadline:
            raise TemplateError(f"the chat template did not finish within {self._time_limit:g} s")

    def write(self, n: int) -> None:
        self._written += n
        if self._written > MAX_WRITTEN:
            raise TemplateError(f"the chat template writes more than {MAX_WRITTEN} characters")


def _budget() -> Budget:
    budget: Budget = _running.budget
    return budget


def _too_large() -> TemplateError:
    return TemplateError(f"a value in the chat template is larger than {MAX_VALUE}")


def weighed(value: Any) -> Any:
    """`value`, if it weighs no more than MAX_VALUE."""
    if isinstance(value, str):
        if len(value) > MAX_VALUE:
            raise _too_large()
        return value
    if isinstance(value, int):
        if value.bit_length() > MAX_INTEGER_BITS:
            raise TemplateError("a number in the chat template is too large")
        return value
    left, stack = MAX_VALUE, [value]
    while stack:
        item = stack.pop()
        left -= len(item) + 1 if isinstance(item, str) else 1
        if isinstance(item, Namespace):
            item = item._Namespace__attrs
        if isinstance(item, Mapping):
            left -= len(item)
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            left -= len(item)
            if left >= 0:
                stack.extend(item)
        if left < 0:
            raise _too_large()
    return value


# -------------------------------------------------------------------- operations that make much out of little


def _repeat(value: Any, times: Any) -> None:
    if isinstance(value, (str, list, tuple)) and isinstance(times, int) and (len(value) + 1) * times > MAX_VALUE:
        raise _too_large()


def _replace(text: Any, old: Any, new: Any, count: Any = -1) -> str:
    string, before, after = str(text), str(old), str(new)
    if len(string) + string.count(before) * len(after) > MAX_VALUE:
        raise _too_large()
    return string.replace(before, after, -1 if count is None else int(count))


def _join(separator: Any, values: Iterable[Any]) -> str:
    items, size = [], 0
    for value in values:
        item = str(weighed(value))
        size += len(item) + len(str(separator))
        if size > MAX_VALUE:
            raise _too_large()
        items.append(item)
    return str(separator).join(items)


@jinja2.pass_environment
def _join_filter(environment: jinja2.Environment, value: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return _join(d, value)


def _indent(text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    margin = width if isinstance(width, str) else " " * min(int(width), MAX_VALUE)
    lines = str(text).split("\n")
    if len(lines) * len(margin) > MAX_VALUE:
        raise _too_large()
    return "\n".join(margin + line if (line or blank) and (first or i > 0) else line for i, line in enumerate(lines))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: no HTML escapes."""
    if isinstance(indent, str) or (indent is not None and not 0 <= int(indent) <= 16):
        raise TemplateError("tojson in the chat template: indent must be a number up to 16")
    return json.dumps(
        weighed(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: Any) -> str:
    if len(str(pattern)) > MAX_FORMAT or re.search(r"%[^A-Za-z%-]|%-?\d", str(pattern)):
        raise TemplateError("strftime_now in the chat template: not a plain date format")
    return datetime.now().strftime(str(pattern))


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _each(values: Iterable[Any], written: int) -> Iterator[Any]:
    """What loops run over; `written` is the length of the literal text inside the loop."""
    budget = _budget()
    for value in values:
        budget.tick()
        budget.write(written)
        yield value


def _finalize(value: Any) -> Any:
    """What every printed value passes through."""
    budget = _budget()
    budget.tick()
    budget.write(len(value) if isinstance(value, str) else len(str(weighed(value))))
    return value


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, with a look at the clock before and the weight of its result after."""

    @functools.wraps(function)  # jinja2 reads its own marks from the function's attributes
    def run(*args: Any, **kwargs: Any) -> Any:
        _budget().tick()
        return weighed(function(*args, **kwargs))

    return run


# -------------------------------------------------------------------- the environment


class _Generation(jinja2.ext.Extension):
    """{% generation %}: marks the assistant's words for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - the base class has it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Rewriter(NodeTransformer):
    """Sends loops, concatenations and literals through `_each`, `_join` and `weighed`."""

    @staticmethod
    def _through(name: str, node: Any, *args: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        written = _literal_length(node)
        self.generic_visit(node)
        node.iter = self._through("_each", node.iter, nodes.Const(written, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._through("join", nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return self._through("_weighed", node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._through("_weighed", node) if node.ctx == "load" else node


def _literal_length(node: nodes.Node) -> int:
    return sum(len(data.data) for data in node.find_all(nodes.TemplateData))


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    longest_macro = 0

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _budget().tick()
        if operator == "*":
            _repeat(left, right)
            _repeat(right, left)  # integers need no look: both are short, so their product is
        elif operator == "**":
            small = isinstance(left, int) and isinstance(right, int) and 0 <= right <= MAX_INTEGER_BITS
            if not small or left.bit_length() * right > MAX_INTEGER_BITS:
                raise TemplateError("a power in the chat template is too large")
        elif operator == "%" and isinstance(left, str):
            raise TemplateError("string formatting is not available to chat templates")
        return weighed(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget()
        budget.tick()
        if isinstance(__obj, Macro):
            budget.write(__self.longest_macro)
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if name in ("format", "format_map"):
            raise TemplateError("string formatting is not available to chat templates")
        if isinstance(owner, str):
            if name not in STR_METHODS:
                raise TemplateError(f"the method {name!r} is not available to chat templates")
            if name == "replace":
                return _replace(owner, *args, **kwargs)
            if name == "join":
                return _join(owner, *args, **kwargs)
        elif isinstance(owner, (int, float, bytes, type)):
            raise TemplateError(f"the method {name!r} is not available to chat templates")
        return weighed(super().call(__context, __obj, *args, **kwargs))


def _make_environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
        finalize=_finalize,
        optimized=False,  # constants are folded while compiling, where nothing looks at the clock
        cache_size=0,
    )
    environment.filters = {name: _guarded(FILTERS[name]) for name in FILTER_NAMES}
    environment.filters |= {
        "join": _guarded(_join_filter),
        "replace": _guarded(_replace),
        "indent": _guarded(_indent),
        "tojson": _guarded(_tojson),
        "_each": _each,
        "_weighed": weighed,
    }
    for name in ("lipsum", "cycler", "joiner"):
        del environment.globals[name]
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def compile_template(source: str) -> jinja2.Template:
    """The template, rewritten; TemplateError with the line if it is no jinja2."""
    environment = _make_environment()
    try:
        tree = environment.parse(source)
        macros = [*tree.find_all((nodes.Macro, nodes.CallBlock))]
        environment.longest_macro = max(map(_literal_length, macros), default=0)
        tree = _Rewriter().visit(tree)
        code = environment.compile(tree)
        return jinja2.Template.from_code(environment, code, environment.make_globals(None))
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"chat template, line {error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
        raise TemplateError(f"the chat template cannot be compiled: {error}") from None


def render(template: jinja2.Template, context: Mapping[str, Any], max_output: int, time_limit: float) -> str:
    """The template's text for these variables; TemplateError for whatever goes wrong in it."""
    previous = getattr(_running, "budget", None)
    _running.budget = Budget(time_limit)
    pieces, size = [], 0
    try:
        weighed(context)
        for piece in template.generate(**context):
            _running.budget.tick()
            size += len(piece)
            if size > max_output:
                raise TemplateError(f"the chat template's output exceeds {max_output} characters")
            pieces.append(piece)
    except TemplateError:
        raise
    except SecurityError as error:
        raise TemplateError(f"the chat template does what the sandbox forbids: {error}") from None
    except Exception as error:  # a template can raise anything that Python can
        raise TemplateError(f"the chat template failed: {type(error).__name__}: {error}") from None
    finally:
        _running.budget = previous
    return "".join(pieces)
