"""Values of plain templates, and what may be done with them: operators, tests and methods, where their cost is known.

Every function pays for its work before it does it, in characters and items. What is not done here raises NotPlain, also where
jinja2 would raise an error of its own: then jinja2 renders the template, in another process, with its own result or message.
Filters are in plain_filters.py.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from pyengine.text import template_syntax

FUEL = 200_000  # steps of a rendering, of about a microsecond each
CHARACTERS_PER_STEP = 32
MAX_INTEGER = 1 << 63
MAX_RANGE = 100_000  # jinja2's sandbox has the same
_DATE = re.compile(r"(?:%[A-Za-z%]|[ -$&-~]){0,64}")


class NotPlain(Exception):
    """Only jinja2 can do this."""


class Undefined:
    """The value of a name or an attribute that is not there."""


class Lazy:
    """An iterator in jinja2: for loops and some filters, and for nothing else."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items


class Namespace:
    """namespace(...): what a loop may assign to."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values


class Fuel:
    """The work that a rendering may still do. What takes more raises NotPlain."""

    def __init__(self, steps: int = FUEL) -> None:
        self.left = steps

    def steps(self, n: int) -> None:
        """Pay for n steps."""
        self.left -= n
        if self.left < 0:
            raise NotPlain("too much work")

    def characters(self, n: int) -> None:
        """Pay for a string of n characters."""
        self.steps(1 + n // CHARACTERS_PER_STEP)


UNDEFINED = Undefined()
CONTAINERS = (list, tuple, dict)
NUMBERS = (int, float)  # bool is an int

Args = Sequence[Any]
Kwargs = dict[str, Any]

# -------------------------------------------------------------------- operators


def require(condition: bool) -> None:
    """Raise NotPlain unless it holds."""
    if not condition:
        raise NotPlain


def is_true(value: Any) -> bool:
    """As a condition takes it."""
    if value is UNDEFINED:
        return False
    require(value is None or isinstance(value, (str, *NUMBERS, *CONTAINERS)))
    return bool(value)


def to_text(value: Any) -> str:
    """As jinja2 prints it. Lists and mappings are printed as Python's, which a template seldom means: not here."""
    if isinstance(value, str):
        return value
    if value is UNDEFINED:
        return ""
    require(value is None or is_short(value))
    return str(value)


def is_short(value: Any) -> bool:
    """A number that has a text: CPython refuses to write down integers of 5,000 digits."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= MAX_INTEGER)


def equal(fuel: Fuel, left: Any, right: Any) -> bool:
    """left == right, item by item: each comparison is paid for."""
    if left is UNDEFINED or right is UNDEFINED:
        return left is right
    fuel.steps(1)
    if isinstance(left, CONTAINERS) and isinstance(right, CONTAINERS):
        if type(left) is not type(right) or len(left) != len(right):
            return False
        if isinstance(left, dict):
            return all(key in right and equal(fuel, value, right[key]) for key, value in left.items())
        return all(equal(fuel, *pair) for pair in zip(left, right, strict=True))
    for value in (left, right):
        require(value is None or isinstance(value, (str, *NUMBERS, *CONTAINERS)))
    if isinstance(left, str) and isinstance(right, str):
        fuel.characters(min(len(left), len(right)))
    return bool(left == right)


def compare(fuel: Fuel, name: str, left: Any, right: Any) -> bool:
    """One of eq, ne, lt, lteq, gt, gteq, in, notin."""
    if name in ("eq", "ne"):
        return equal(fuel, left, right) == (name == "eq")
    if name in ("in", "notin"):
        return contains(fuel, right, left) == (name == "in")
    numbers = isinstance(left, NUMBERS) and isinstance(right, NUMBERS)
    require(numbers or (isinstance(left, str) and isinstance(right, str)))
    if not numbers:
        fuel.characters(min(len(left), len(right)))
    return bool(_ORDER[name](left, right))


_ORDER = {"lt": operator.lt, "lteq": operator.le, "gt": operator.gt, "gteq": operator.ge}


def contains(fuel: Fuel, container: Any, value: Any) -> bool:
    """value in container: a part of a string, a key of a mapping, an item of a list."""
    if isinstance(container, str):
        require(isinstance(value, str))
        fuel.characters(len(container))
        return value in container
    require(value is None or isinstance(value, (str, *NUMBERS)))
    if isinstance(container, dict):
        fuel.characters(len(value) if isinstance(value, str) else 0)
        return value in container
    require(isinstance(container, (list, tuple)))
    return any(equal(fuel, item, value) for item in paid(fuel, container))


def paid(fuel: Fuel, items: Any) -> Any:
    """`items`, a step each."""
    fuel.steps(len(items))
    return items


def add(fuel: Fuel, left: Any, right: Any) -> Any:
    """left + right: strings, lists or numbers."""
    if isinstance(left, str) and isinstance(right, str):
        fuel.characters(len(left) + len(right))
        return left + right
    if isinstance(left, list) and isinstance(right, list):
        fuel.steps(1 + len(left) + len(right))
        return left + right
    return arithmetic(operator.add, left, right)


def negative(value: Any) -> Any:
    """-value, a number."""
    require(isinstance(value, NUMBERS) and is_short(value))
    return -value


def arithmetic(operation: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    """operation(left, right) of two numbers, whose result is one that is not too large."""
    require(isinstance(left, NUMBERS) and isinstance(right, NUMBERS))
    try:
        result = operation(left, right)
    except ArithmeticError:
        raise NotPlain from None
    require(abs(result) <= MAX_INTEGER)  # also: no NaN, no infinity
    return result


def join(fuel: Fuel, separator: str, items: Sequence[Any]) -> str:
    """separator.join(items), each as text."""
    texts = [to_text(item) for item in paid(fuel, items)]
    fuel.characters(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def replace(fuel: Fuel, text: str, args: Args) -> str:
    """text.replace(*args)."""
    old, new = args
    require(isinstance(old, str) and isinstance(new, str))
    fuel.characters(len(text) + text.count(old) * len(new))
    return text.replace(old, new)


def iterate(fuel: Fuel, value: Any) -> Sequence[Any]:
    """What a loop runs over, or a filter that takes any iterable."""
    if value is UNDEFINED:
        return ()
    if isinstance(value, Lazy):
        items: Sequence[Any] = value.items
    elif isinstance(value, dict):
        items = list(value)
    else:
        require(isinstance(value, (str, list, tuple)))
        items = value
    return paid(fuel, items)  # type: ignore[no-any-return]


# -------------------------------------------------------------------- attributes and items


def attribute(value: Any, name: str) -> Any:
    """value.name: the attribute first, then the item."""
    if isinstance(value, Namespace):
        require(not name.startswith("_"))
        return value.values.get(name, UNDEFINED)
    require(value is None or isinstance(value, (str, *NUMBERS, *CONTAINERS)))
    require(not hasattr(value, name))  # a method, or what the sandbox hides
    return value.get(name, UNDEFINED) if isinstance(value, dict) else UNDEFINED


def item(value: Any, key: Any) -> Any:
    """value[key]: the item first, then the attribute."""
    require(value is None or isinstance(value, (str, *NUMBERS, *CONTAINERS)))
    require(key is None or isinstance(key, (str, *NUMBERS)))
    if isinstance(value, (str, *CONTAINERS)):
        try:
            return value[key]
        except (LookupError, TypeError):
            pass
    require(not (isinstance(key, str) and hasattr(value, key)))
    return UNDEFINED


def part(fuel: Fuel, value: Any, bounds: Sequence[Any]) -> Any:
    """value[begin:end:step]."""
    require(isinstance(value, (str, list, tuple)))
    require(all(bound is None or isinstance(bound, int) for bound in bounds) and bounds[2] != 0)
    if isinstance(value, str):
        fuel.characters(len(value))
    else:
        fuel.steps(len(value))
    return value[slice(*bounds)]


# -------------------------------------------------------------------- tests

_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "mapping": lambda value: isinstance(value, dict),
    "none": lambda value: value is None,
    "boolean": lambda value: value is True or value is False,
    "true": lambda value: value is True,
    "false": lambda value: value is False,
    "number": lambda value: isinstance(value, NUMBERS),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "float": lambda value: isinstance(value, float),
    "sequence": lambda value: isinstance(value, (str, *CONTAINERS)),
    "iterable": lambda value: isinstance(value, (str, *CONTAINERS)),
}
_COMPARISONS = {
    "eq": "eq", "==": "eq", "equalto": "eq", "ne": "ne", "!=": "ne", "in": "in", "lt": "lt", "<": "lt", "lessthan": "lt",
    "le": "lteq", "<=": "lteq", "gt": "gt", ">": "gt", "greaterthan": "gt", "ge": "gteq", ">=": "gteq",
}  # fmt: skip
TESTS = frozenset((*_TYPES, *_COMPARISONS, "defined", "undefined", "odd", "even", "divisibleby"))


def test(fuel: Fuel, name: str, value: Any, args: Sequence[Any]) -> bool:
    """value is name(args)."""
    fuel.steps(1)
    if name in ("defined", "undefined"):
        require(not args)
        return (value is UNDEFINED) == (name == "undefined")
    if name in _COMPARISONS:
        require(len(args) == 1)
        return compare(fuel, _COMPARISONS[name], value, args[0])
    if name in _TYPES:
        known = value is None or isinstance(value, (str, *NUMBERS, *CONTAINERS))
        require(not args and (known or (value is UNDEFINED and name not in ("sequence", "iterable"))))
        return _TYPES[name](value)
    require(isinstance(value, int) and name in TESTS)
    if name == "divisibleby":
        require(len(args) == 1 and isinstance(args[0], int) and args[0] != 0)
        return bool(value % args[0] == 0)
    require(not args)
    return bool(value % 2 == (name == "odd"))


# -------------------------------------------------------------------- methods and functions

_STRING_METHODS: dict[str, int] = {  # name -> arguments at most; all of them strings
    "strip": 1, "lstrip": 1, "rstrip": 1, "split": 1, "rsplit": 1, "splitlines": 0, "startswith": 1, "endswith": 1, "upper": 0,
    "lower": 0, "capitalize": 0, "title": 0, "find": 1, "rfind": 1, "removeprefix": 1, "removesuffix": 1, "isdigit": 0,
    "isspace": 0, "isupper": 0, "islower": 0, "isalpha": 0, "isalnum": 0,
}  # fmt: skip
METHODS = frozenset((*_STRING_METHODS, "replace", "join", "items", "keys", "values", "get"))


def method(fuel: Fuel, value: Any, name: str, args: Args) -> Any:
    """value.name(args)."""
    if isinstance(value, str):
        return _string_method(fuel, value, name, args)
    require(isinstance(value, dict))
    if name == "get":
        require(1 <= len(args) <= 2 and isinstance(args[0], str))
        return value.get(args[0], args[1] if len(args) == 2 else None)
    require(name in ("items", "keys", "values") and not args)
    fuel.steps(1 + len(value))
    return Lazy(list(getattr(value, name)()))


def _string_method(fuel: Fuel, value: str, name: str, args: Args) -> Any:
    if name == "replace":
        require(len(args) == 2)
        return replace(fuel, value, args)
    if name == "join":
        require(len(args) == 1)
        items = iterate(fuel, args[0])
        require(all(isinstance(part, str) for part in items))
        return join(fuel, value, items)
    require(name in _STRING_METHODS and len(args) <= _STRING_METHODS[name])
    require(all(isinstance(arg, str) for arg in args))
    require(len(args) == 1 or name in ("strip", "lstrip", "rstrip", "split", "rsplit") or _STRING_METHODS[name] == 0)
    require(name not in ("split", "rsplit") or args != ("",))
    require(name not in ("strip", "lstrip", "rstrip") or not args or len(args[0]) <= 64)
    fuel.characters(4 * len(value))
    return getattr(value, name)(*args)


def function(fuel: Fuel, name: str, args: Args, kwargs: Kwargs) -> Any:
    """One of the functions that every template has."""
    if name == "namespace":
        require(not args)
        return Namespace(dict(kwargs))
    require(not kwargs)
    if name == "range":
        require(
            1 <= len(args) <= 3 and all(type(arg) is int and abs(arg) < 1 << 31 for arg in args) and args[2:] != (0,)
        )
        numbers = range(*args)
        require(len(numbers) <= MAX_RANGE)
        return Lazy(paid(fuel, numbers))
    require(len(args) == 1 and isinstance(args[0], str))
    if name == "raise_exception":
        template_syntax.raise_exception(args[0])
    require(name == "strftime_now" and _DATE.fullmatch(args[0]) is not None)
    return template_syntax.strftime_now(args[0])


FUNCTIONS = frozenset(("namespace", "range", "raise_exception", "strftime_now"))
