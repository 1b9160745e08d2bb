"""Filters of plain templates: jinja2's, each paying for its work before it does it, as everything in plain_values.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyengine.text import template_syntax
from pyengine.text.plain_values import (
    CONTAINERS,
    TESTS,
    UNDEFINED,
    Args,
    Fuel,
    Kwargs,
    Lazy,
    is_short,
    is_true,
    item,
    iterate,
    join,
    paid,
    replace,
    require,
    test,
    to_text,
)


def _string(fuel: Fuel, value: Any, factor: int = 1) -> str:
    """A string that a filter works on."""
    require(isinstance(value, str))
    fuel.characters(factor * len(value))
    return str(value)


def _simple(method: Callable[[str], str]) -> Callable[[Fuel, Any, Args, Kwargs], Any]:
    def apply(fuel: Fuel, value: Any, args: Args, kwargs: Kwargs) -> str:
        require(not args and not kwargs)
        return method(_string(fuel, value, 4))  # upper case may be three times as long

    return apply


def _trim(fuel: Fuel, value: Any, args: Args, kwargs: Kwargs) -> str:
    require(not kwargs and len(args) <= 1 and all(isinstance(chars, str) and len(chars) <= 64 for chars in args))
    return _string(fuel, to_text(value)).strip(*args)


def _length(fuel: Fuel, value: Any, args: Args, kwargs: Kwargs) -> int:
    require(not args and not kwargs and isinstance(value, (str, *CONTAINERS)))
    return len(value)


def _default(fuel: Fuel, value: Any, args: Args, kwargs: Kwargs) -> Any:
    require(len(args) <= 2 and kwargs.keys() <= {"boolean"} and not (len(args) == 2 and kwargs))
    also_false = args[1] if len(args) == 2 else kwargs.get("boolean", False)
    if value is UNDEFINED or (is_true(also_false) and not is_true(value)):
        return args[0] if args else ""
    return value


def _tojson(fuel: Fuel, value: Any, args: Args, kwargs: Kwargs) -> str:
    require(not args and kwargs.keys() <= {"indent", "ensure_ascii", "sort_keys"})
    indent = kwargs.get("indent")
    require(indent is None or (type(indent) is int and 0 <= indent <= 8))
    require(all(isinstance(kwargs.get(name, False), bool) for name in ("ensure_ascii", "sort_keys")))
    _weigh(fuel, value, 64)
    text = template_syntax.tojson(value, **kwargs)
    fuel.characters(len(text))
    return text


def _weigh(fuel: Fuel, value: Any, depth: int) -> None:
    """Pay for all of a nested value, which holds nothing but JSON's types."""
    require(depth > 0)
    if isinstance(value, str):
        fuel.characters(len(value))
    elif isinstance(value, dict):
        for key, inner in value.items():
            require(isinstance(key, str))
            fuel.characters(len(key))
            _weigh(fuel, inner, depth - 1)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _weigh(fuel, inner, depth - 1)
    else:
        require(value is None or is_short(value))
    fuel.steps(1)


def _items(fuel: Fuel, value: Any, args: Args, kwargs: Kwargs) -> Lazy:
    require(not args and not kwargs and (value is UNDEFINED or isinstance(value, dict)))
    return Lazy([] if value is UNDEFINED else list(paid(fuel, value).items()))


def _list(fuel: Fuel, value: Any, args: Args, kwargs: Kwargs) -> list[Any]:
    require(not args and not kwargs)
    return list(iterate(fuel, value))


def _first(fuel: Fuel, value: Any, args: Args, kwargs: Kwargs) -> Any:
    require(not args and not kwargs and value is not UNDEFINED)
    return next(iter(iterate(fuel, value)), UNDEFINED)


def _last(fuel: Fuel, value: Any, args: Args, kwargs: Kwargs) -> Any:
    require(not args and not kwargs and isinstance(value, (str, list, tuple)))
    return value[-1] if value else UNDEFINED


def _join(fuel: Fuel, value: Any, args: Args, kwargs: Kwargs) -> str:
    require(not kwargs and len(args) <= 1)
    return join(fuel, to_text(args[0]) if args else "", iterate(fuel, value))


def _replace(fuel: Fuel, value: Any, args: Args, kwargs: Kwargs) -> str:
    require(not kwargs and len(args) == 2)
    return replace(fuel, _string(fuel, value), args)


def _string_filter(fuel: Fuel, value: Any, args: Args, kwargs: Kwargs) -> str:
    require(not args and not kwargs)
    return to_text(value)


def _reverse(fuel: Fuel, value: Any, args: Args, kwargs: Kwargs) -> Any:
    require(not args and not kwargs and isinstance(value, (str, list, tuple)))
    return _string(fuel, value)[::-1] if isinstance(value, str) else Lazy(paid(fuel, value)[::-1])


def _path(value: Any, path: Any) -> Any:
    """selectattr("function.name"): items of items."""
    require(isinstance(path, str) and len(path) <= 256)
    for name in path.split("."):
        require(name.isascii() or not name.isdigit())
        value = item(value, int(name) if name.isdigit() else name)
    return value


def _selects(keeps: bool, by_attribute: bool) -> Callable[[Fuel, Any, Args, Kwargs], Any]:
    def select(fuel: Fuel, value: Any, args: Args, kwargs: Kwargs) -> Lazy:
        require(not kwargs and len(args) >= by_attribute)
        path, tests = (args[0], args[1:]) if by_attribute else (None, args)
        require(not tests or (isinstance(tests[0], str) and tests[0] in TESTS))
        chosen = []
        for element in iterate(fuel, value):
            subject = _path(element, path) if by_attribute else element
            outcome = test(fuel, tests[0], subject, tests[1:]) if tests else is_true(subject)
            if outcome == keeps:
                chosen.append(element)
        return Lazy(chosen)

    return select


def _map(fuel: Fuel, value: Any, args: Args, kwargs: Kwargs) -> Lazy:
    elements = iterate(fuel, value)
    if kwargs:
        require(not args and kwargs.keys() == {"attribute"})
        return Lazy([_path(element, kwargs["attribute"]) for element in elements])
    require(len(args) == 1 and args[0] in ("trim", "upper", "lower", "string", "length", "tojson"))
    return Lazy([FILTERS[args[0]](fuel, element, (), {}) for element in elements])


FILTERS: dict[str, Callable[[Fuel, Any, Args, Kwargs], Any]] = {
    "trim": _trim,
    "upper": _simple(str.upper),
    "lower": _simple(str.lower),
    "capitalize": _simple(str.capitalize),
    "length": _length,
    "count": _length,
    "default": _default,
    "d": _default,
    "tojson": _tojson,
    "items": _items,
    "list": _list,
    "first": _first,
    "last": _last,
    "join": _join,
    "replace": _replace,
    "string": _string_filter,
    "reverse": _reverse,
    "select": _selects(True, by_attribute=False),
    "reject": _selects(False, by_attribute=False),
    "selectattr": _selects(True, by_attribute=True),
    "rejectattr": _selects(False, by_attribute=True),
    "map": _map,
}
