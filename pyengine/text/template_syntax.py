"""The language of chat templates as `transformers` has it: jinja2 with {% generation %}, {% break %} and three functions.

Both ways of rendering use this: pyengine/text/plain_template.py and, in a process of its own, template_worker.py.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
from jinja2.parser import Parser

from pyengine.errors import TemplateError


class Generation(jinja2.ext.Extension):
    """{% generation %}: marks the assistant's words for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - the base class has it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


# How templates are read; arguments of jinja2.Environment.
SYNTAX: dict[str, Any] = {
    "trim_blocks": True,
    "lstrip_blocks": True,
    "extensions": [Generation, "jinja2.ext.loopcontrols"],
    "cache_size": 0,
}


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter of that name, without jinja2's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(pattern: Any) -> str:
    """Today's date."""
    return datetime.now().strftime(str(pattern))


def raise_exception(message: Any = "") -> None:
    """A template refuses its messages."""
    raise TemplateError(str(message))


def syntax_error(error: jinja2.TemplateSyntaxError) -> TemplateError:
    return TemplateError(f"chat template, line {error.lineno}: {error.message}")
