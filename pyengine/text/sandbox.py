"""Any chat template, in jinja2's immutable sandbox: no attribute of Python's machinery, no change to what it was given.

The sandbox keeps a template from reaching anything, not from working without end: for time and memory this runs in a process that
can be killed (template_worker.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pyengine.errors import TemplateError
from pyengine.text.template_syntax import SYNTAX, raise_exception, strftime_now, syntax_error, tojson

_ADDRESS = re.compile(r" at 0x[0-9a-f]+>")


def compile_template(source: str) -> jinja2.Template:
    """Raises TemplateError, with the line if it is no jinja2, and MemoryError."""
    environment = ImmutableSandboxedEnvironment(**SYNTAX)
    environment.filters["tojson"] = tojson
    del environment.filters["attr"]  # before jinja2 3.1.6 it was a way out
    for name in ("lipsum", "cycler", "joiner"):
        del environment.globals[name]
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise syntax_error(error) from None
    except MemoryError:
        raise
    except Exception as error:  # jinja2 hands on what Python's compiler says
        raise TemplateError(f"the chat template cannot be compiled: {type(error).__name__}: {error}") from None


def render(template: jinja2.Template, context: Mapping[str, Any], max_output: int) -> str:
    """The template's text for these variables, JSON's types; TemplateError for whatever goes wrong in it, MemoryError."""
    pieces, size = [], 0
    try:
        for piece in template.generate(**context):
            size += len(piece)
            if size > max_output:
                raise TemplateError(f"the chat template's output exceeds {max_output} characters")
            pieces.append(piece)
    except (TemplateError, MemoryError):
        raise
    except SecurityError as error:
        raise TemplateError(f"the chat template does what the sandbox forbids: {error}") from None
    except Exception as error:  # a template can raise anything that Python can
        raise TemplateError(f"the chat template failed: {type(error).__name__}: {error}") from None
    text = "".join(pieces)
    for address in set(_ADDRESS.findall(text)):  # of a function, a method or a generator: another one each time
        if address not in json.dumps(context):
            raise TemplateError(f"the chat template writes an object that is no text (…{address})")
    return text
