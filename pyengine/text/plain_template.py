"""Chat templates that are plain, rendered here and now.

Nearly all chat templates are loops over the messages, conditions and strings put together. Those are evaluated from jinja2's
syntax tree, node by node, by this module: no code is generated, no attribute of a Python object is looked up, and each step is
paid for (plain_values.py, plain_filters.py), so a rendering ends in a fraction of a second whatever the template says. A
template with anything else in it is not plain, and neither is one that runs out of fuel or does what only jinja2 knows the
outcome of: it raises NotPlain, and template_process.py renders it. What comes out of here is, to the character, what jinja2
would write.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes

from pyengine.errors import TemplateError
from pyengine.text import plain_values as values
from pyengine.text.plain_filters import FILTERS
from pyengine.text.plain_values import UNDEFINED, Fuel, Namespace, NotPlain, require
from pyengine.text.template_syntax import SYNTAX, syntax_error

MAX_SOURCE = 1 << 15  # characters; longer ones are not even parsed here
MAX_DEPTH = 64  # of the syntax tree
MAX_MACROS = 32
MAX_CALLS = 8  # of macros in macros

_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    nodes.Sub: operator.sub,
    nodes.Mul: operator.mul,
    nodes.Div: operator.truediv,
    nodes.FloorDiv: operator.floordiv,
    nodes.Mod: operator.mod,
}
_FORBIDDEN_NAMES = frozenset(("self", "super", "caller", "varargs", "kwargs", "context", "environment"))


def parse(source: str) -> PlainTemplate | None:
    """The template, or None if it is not plain. Raises TemplateError, with the line, if it is no jinja2."""
    if len(source) > MAX_SOURCE:
        return None
    try:
        tree = jinja2.Environment(**SYNTAX).parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise syntax_error(error) from None
    except Exception:  # too deep for the parser, a number too long: jinja2 shall say it
        return None
    return PlainTemplate(tree) if _is_plain(tree) else None


# -------------------------------------------------------------------- which templates are plain


def _is_plain(tree: nodes.Template) -> bool:
    stack: list[tuple[nodes.Node, int, bool, bool]] = [(tree, 0, True, False)]
    while stack:
        node, depth, is_top, in_loop = stack.pop()
        if depth > MAX_DEPTH or not _is_plain_node(node, is_top, in_loop):
            return False
        inner_top = is_top and isinstance(node, (nodes.Template, nodes.If))
        in_loop = in_loop and not isinstance(node, nodes.AssignBlock)
        body = node.body if isinstance(node, nodes.For) else ()
        stack.extend((child, depth + 1, False, True) for child in body)
        others = node.iter_child_nodes(exclude=("body",) if body else ())
        stack.extend((child, depth + 1, inner_top, in_loop) for child in others)
    return _macros_are_closed(tree) and _loop_conditions_are_fixed(tree)


def _is_plain_node(node: nodes.Node, is_top: bool, in_loop: bool) -> bool:
    if isinstance(node, nodes.Macro):
        return is_top  # at the template's top level
    if isinstance(node, (nodes.Break, nodes.Continue)):
        return in_loop
    if isinstance(node, nodes.For):
        return not node.recursive
    if isinstance(node, nodes.AssignBlock):
        return node.filter is None
    if isinstance(node, nodes.Name):
        return node.name not in _FORBIDDEN_NAMES
    if isinstance(node, nodes.Filter):
        return node.node is not None and node.name in FILTERS and _has_simple_arguments(node)
    if isinstance(node, nodes.Test):
        return node.name in values.TESTS and _has_simple_arguments(node) and not node.kwargs
    if isinstance(node, nodes.Call):
        named = isinstance(node.node, nodes.Name) and node.node.name != "loop"
        method = isinstance(node.node, nodes.Getattr) and node.node.attr in values.METHODS and not node.kwargs
        return (named or method) and _has_simple_arguments(node)
    if isinstance(node, nodes.Slice):
        return True
    return type(node) in _Rendering.KNOWN


def _has_simple_arguments(node: Any) -> bool:
    return node.dyn_args is None and node.dyn_kwargs is None


def _variables(node: nodes.Node) -> set[str]:
    """Names that the node's statements assign to."""
    return {name.name for name in node.find_all(nodes.Name) if name.ctx in ("store", "param")}


def _macros_are_closed(tree: nodes.Template) -> bool:
    """Macros use their parameters, each other and the template's variables; nothing that is assigned elsewhere, since when it is
    seen is a matter of jinja2's scopes."""
    macros = [*tree.find_all(nodes.Macro)]
    names = {macro.name for macro in macros}
    assigned = _variables(tree) if macros else set()
    if len(names) < len(macros) or len(macros) > MAX_MACROS or names & assigned:
        return False
    elsewhere = assigned | {"loop"}
    return all({n.name for n in macro.find_all(nodes.Name)} & elsewhere <= _variables(macro) for macro in macros)


def _loop_conditions_are_fixed(tree: nodes.Template) -> bool:
    """{% for x in y if z %}: jinja2 evaluates z between the turns of the loop, we before them. It must not look at a namespace or
    call anything."""
    spaces = {reference.name for reference in tree.find_all(nodes.NSRef)} | values.FUNCTIONS | {"loop"}
    tests = [loop.test for loop in tree.find_all(nodes.For) if loop.test is not None]
    return not any(name.name in spaces for test in tests for name in test.find_all(nodes.Name))


# -------------------------------------------------------------------- rendering


class PlainTemplate:
    """A template that is plain. Rendering may run in any thread."""

    def __init__(self, tree: nodes.Template) -> None:
        self._tree = tree

    def render(self, context: Mapping[str, Any], max_output: int) -> str:
        """The text for these variables, of JSON's types. Raises TemplateError if the template does or writes more than max_output
        characters, and NotPlain if it must be rendered by jinja2 after all."""
        rendering = _Rendering(context, max_output)
        try:
            rendering.run(self._tree.body, rendering.root)
        except (TemplateError, NotPlain):
            raise
        except Exception as error:  # jinja2 shall say what is wrong
            raise NotPlain(f"{type(error).__name__}: {error}") from None
        return "".join(rendering.written)


class _Scope(dict[str, Any]):
    """Variables of a block; `outer` has the others."""

    def __init__(self, outer: _Scope | None = None) -> None:
        self.outer = outer

    def look_up(self, name: str) -> Any:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope:
                return scope[name]
            scope = scope.outer
        return UNDEFINED


class _Loop:
    """`loop` in the body of a loop."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.index0 = 0

    def attribute(self, name: str) -> Any:
        i, n = self.index0, len(self.items)
        numbers = {"index": i + 1, "index0": i, "revindex": n - i, "revindex0": n - i - 1, "length": n}
        if name in numbers:
            return numbers[name]
        if name == "previtem":
            return self.items[i - 1] if i else UNDEFINED
        if name == "nextitem":
            return self.items[i + 1] if i + 1 < n else UNDEFINED
        require(name in ("first", "last"))
        return i == (0 if name == "first" else n - 1)


class _Function:
    """A function that every template has, where a variable has not taken its name."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


class _Rendering:
    """One walk over the tree: `run` statements, `value` expressions."""

    def __init__(self, context: Mapping[str, Any], max_output: int) -> None:
        self.fuel = Fuel()
        self.written: list[str] = []
        self._size = 0
        self._max_output = max_output
        self._captures = 0  # blocks and macros that are being written
        self._calls = 0  # macros among them
        self.root = _Scope()
        self.root.update({name: _Function(name) for name in values.FUNCTIONS})
        self.root.update(context)

    # ---------------------------------------------------------------- statements

    def run(self, body: Iterable[nodes.Node], scope: _Scope) -> None:
        for node in body:
            self.fuel.steps(1)
            self.STATEMENTS[type(node)](self, node, scope)

    def _write(self, text: str) -> None:
        self.fuel.characters(len(text))
        self.written.append(text)
        if not self._captures:
            self._size += len(text)
            if self._size > self._max_output:
                raise TemplateError(f"the chat template's output exceeds {self._max_output} characters")

    def _captured(self, body: Iterable[nodes.Node], scope: _Scope) -> str:
        """What the statements write, kept from the output."""
        outer, self.written = self.written, []
        self._captures += 1
        try:
            self.run(body, scope)
            return "".join(self.written)
        finally:
            self.written = outer
            self._captures -= 1

    def _output(self, node: nodes.Output, scope: _Scope) -> None:
        for part in node.nodes:
            self._write(part.data if isinstance(part, nodes.TemplateData) else values.to_text(self.value(part, scope)))

    def _if(self, node: nodes.If, scope: _Scope) -> None:
        for branch in (node, *node.elif_):
            if values.is_true(self.value(branch.test, scope)):
                return self.run(branch.body, scope)
        return self.run(node.else_, scope)

    def _for(self, node: nodes.For, scope: _Scope) -> None:
        items = list(values.iterate(self.fuel, self.value(node.iter, scope)))
        if node.test is not None:
            items = [item for item in items if self._passes(node, item, scope)]
        loop = _Loop(items)
        for loop.index0, item in enumerate(items):
            inner = _Scope(scope)
            inner["loop"] = loop
            self._assign_to(node.target, item, inner)
            try:
                self.run(node.body, inner)
            except _Break:
                break
            except _Continue:
                continue
        if not items:
            self.run(node.else_, _Scope(scope))

    def _passes(self, node: nodes.For, item: Any, scope: _Scope) -> bool:
        inner = _Scope(scope)
        self._assign_to(node.target, item, inner)
        assert node.test is not None
        return values.is_true(self.value(node.test, inner))

    def _break(self, node: nodes.Break, scope: _Scope) -> None:
        raise _Break

    def _continue(self, node: nodes.Continue, scope: _Scope) -> None:
        raise _Continue

    def _assign(self, node: nodes.Assign, scope: _Scope) -> None:
        self._assign_to(node.target, self.value(node.node, scope), scope)

    def _assign_block(self, node: nodes.AssignBlock, scope: _Scope) -> None:
        self._assign_to(node.target, self._captured(node.body, _Scope(scope)), scope)

    def _assign_to(self, target: nodes.Node, value: Any, scope: _Scope) -> None:
        if isinstance(target, nodes.Name):
            scope[target.name] = value
        elif isinstance(target, nodes.NSRef):
            space = scope.look_up(target.name)
            require(isinstance(space, Namespace))
            space.values[target.attr] = value
        else:
            assert isinstance(target, nodes.Tuple)
            require(isinstance(value, (list, tuple)) and len(value) == len(target.items))
            for inner, part in zip(target.items, value, strict=True):
                self._assign_to(inner, part, scope)

    def _macro(self, node: nodes.Macro, scope: _Scope) -> None:
        scope[node.name] = node

    # ---------------------------------------------------------------- expressions

    def value(self, node: nodes.Node, scope: _Scope) -> Any:
        self.fuel.steps(1)
        return self.EXPRESSIONS[type(node)](self, node, scope)

    def _const(self, node: nodes.Const, scope: _Scope) -> Any:
        return node.value

    def _name(self, node: nodes.Name, scope: _Scope) -> Any:
        return scope.look_up(node.name)

    def _list(self, node: nodes.List, scope: _Scope) -> list[Any]:
        return [self.value(item, scope) for item in node.items]

    def _tuple(self, node: nodes.Tuple, scope: _Scope) -> tuple[Any, ...]:
        return tuple(self.value(item, scope) for item in node.items)

    def _dict(self, node: nodes.Dict, scope: _Scope) -> dict[Any, Any]:
        pairs = [(self.value(pair.key, scope), self.value(pair.value, scope)) for pair in node.items]
        require(all(isinstance(key, str) for key, _ in pairs))
        return dict(pairs)

    def _condition(self, node: nodes.CondExpr, scope: _Scope) -> Any:
        if values.is_true(self.value(node.test, scope)):
            return self.value(node.expr1, scope)
        return UNDEFINED if node.expr2 is None else self.value(node.expr2, scope)

    def _and(self, node: nodes.And, scope: _Scope) -> Any:
        left = self.value(node.left, scope)
        return self.value(node.right, scope) if values.is_true(left) else left

    def _or(self, node: nodes.Or, scope: _Scope) -> Any:
        left = self.value(node.left, scope)
        return left if values.is_true(left) else self.value(node.right, scope)

    def _not(self, node: nodes.Not, scope: _Scope) -> bool:
        return not values.is_true(self.value(node.node, scope))

    def _negative(self, node: nodes.Neg, scope: _Scope) -> Any:
        return values.negative(self.value(node.node, scope))

    def _compare(self, node: nodes.Compare, scope: _Scope) -> bool:
        left = self.value(node.expr, scope)
        for operand in node.ops:
            right = self.value(operand.expr, scope)
            if not values.compare(self.fuel, operand.op, left, right):
                return False
            left = right
        return True

    def _add(self, node: nodes.Add, scope: _Scope) -> Any:
        left = self.value(node.left, scope)
        return values.add(self.fuel, left, self.value(node.right, scope))

    def _arithmetic(self, node: nodes.BinExpr, scope: _Scope) -> Any:
        left = self.value(node.left, scope)
        return values.arithmetic(_ARITHMETIC[type(node)], left, self.value(node.right, scope))

    def _concat(self, node: nodes.Concat, scope: _Scope) -> str:
        return values.join(self.fuel, "", [self.value(part, scope) for part in node.nodes])

    def _attribute(self, node: nodes.Getattr, scope: _Scope) -> Any:
        value = self.value(node.node, scope)
        return value.attribute(node.attr) if isinstance(value, _Loop) else values.attribute(value, node.attr)

    def _item(self, node: nodes.Getitem, scope: _Scope) -> Any:
        value = self.value(node.node, scope)
        if isinstance(node.arg, nodes.Slice):
            bounds = (node.arg.start, node.arg.stop, node.arg.step)
            return values.part(self.fuel, value, [None if b is None else self.value(b, scope) for b in bounds])
        return values.item(value, self.value(node.arg, scope))

    def _arguments(self, node: Any, scope: _Scope) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = tuple(self.value(argument, scope) for argument in node.args)
        return args, {pair.key: self.value(pair.value, scope) for pair in node.kwargs}

    def _filter(self, node: nodes.Filter, scope: _Scope) -> Any:
        assert node.node is not None
        value = self.value(node.node, scope)
        return FILTERS[node.name](self.fuel, value, *self._arguments(node, scope))

    def _test(self, node: nodes.Test, scope: _Scope) -> bool:
        value = self.value(node.node, scope)
        return values.test(self.fuel, node.name, value, self._arguments(node, scope)[0])

    def _call(self, node: nodes.Call, scope: _Scope) -> Any:
        if isinstance(node.node, nodes.Getattr):
            value = self.value(node.node.node, scope)
            return values.method(self.fuel, value, node.node.attr, self._arguments(node, scope)[0])
        called = self.value(node.node, scope)
        args, kwargs = self._arguments(node, scope)
        if isinstance(called, _Function):
            return values.function(self.fuel, called.name, args, kwargs)
        require(isinstance(called, nodes.Macro) and self._calls < MAX_CALLS)
        return self._call_macro(called, args, kwargs)

    def _call_macro(self, macro: nodes.Macro, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        names = [parameter.name for parameter in macro.args]
        require(len(args) <= len(names) and kwargs.keys() <= set(names[len(args) :]))
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        defaults = dict(zip(names[len(names) - len(macro.defaults) :], macro.defaults, strict=True))
        scope = _Scope(self.root)
        for name in names:
            default = defaults.get(name)
            missing = UNDEFINED if default is None or name in given else self.value(default, scope)
            scope[name] = given.get(name, missing)
        self._calls += 1
        text = self._captured(macro.body, scope)
        self._calls -= 1
        return text

    STATEMENTS: ClassVar[dict[type, Callable[..., None]]] = {
        nodes.Output: _output,
        nodes.If: _if,
        nodes.For: _for,
        nodes.Break: _break,
        nodes.Continue: _continue,
        nodes.Assign: _assign,
        nodes.AssignBlock: _assign_block,
        nodes.Macro: _macro,
    }
    EXPRESSIONS: ClassVar[dict[type, Callable[..., Any]]] = {
        nodes.Const: _const,
        nodes.Name: _name,
        nodes.List: _list,
        nodes.Tuple: _tuple,
        nodes.Dict: _dict,
        nodes.CondExpr: _condition,
        nodes.And: _and,
        nodes.Or: _or,
        nodes.Not: _not,
        nodes.Neg: _negative,
        nodes.Compare: _compare,
        nodes.Add: _add,
        **dict.fromkeys(_ARITHMETIC, _arithmetic),
        nodes.Concat: _concat,
        nodes.Getattr: _attribute,
        nodes.Getitem: _item,
        nodes.Filter: _filter,
        nodes.Test: _test,
        nodes.Call: _call,
    }
    # Parts of other nodes, which are looked at there.
    PARTS = (nodes.Template, nodes.TemplateData, nodes.NSRef, nodes.Operand, nodes.Pair, nodes.Keyword, nodes.Slice)
    KNOWN = frozenset((*STATEMENTS, *EXPRESSIONS, *PARTS))
