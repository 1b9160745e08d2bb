"""The tools of a request, and what its answer may make of them: a call that is forced, or calls as the model likes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from pyengine.sampling import StructuredOutputs
from pyengine.serve.call_grammars import call_grammar
from pyengine.serve.calls import OBJECT, CallReader, Syntax, TextReader
from pyengine.serve.errors import HTTPError, bad_request
from pyengine.serve.fields import (
    BOOLEAN,
    STRING,
    TRUE,
    Fields,
    Kind,
    Table,
    hint,
    list_of,
    needed,
    object_of,
    one_of,
    parse_json,
)
from pyengine.serve.models import ServedModel
from pyengine.serve.sampling import Asked, asked_by

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
MAX_TOOLS = 128
INVALID = "INVALID_JSON"  # the name for arguments that are no JSON, as Anthropic's documents have it


@dataclass(frozen=True)
class Tools:
    """Tools that an answer may call.

    shown      as the template takes them
    allowed    {name: schema of its arguments} of those that may be called
    syntax     how the model writes calls
    only_one   the answer ends with its first call
    must_be    of a forced call: what the model's text must be; None if the model chooses
    asked      what that is made of: the schemas of those that may be called
    """

    shown: list[dict[str, Any]]
    allowed: dict[str, Any]
    syntax: Syntax
    only_one: bool
    must_be: StructuredOutputs | None = None
    asked: Asked = ()


def forced_object(shown: list[dict[str, Any]], allowed: dict[str, Any]) -> Tools:
    """One call that any model can be made to write, as JSON of one spelling: {"name": "...", "arguments": {...}}."""
    grammar = call_grammar(OBJECT, allowed, {}, only_one=True)
    return Tools(shown, allowed, OBJECT, True, StructuredOutputs(grammar=grammar))


def _forced(shown: list[dict[str, Any]], allowed: dict[str, Any], model: ServedModel, *, only_one: bool) -> Tools:
    """Calls in the model's own format, if it has one that we know and can hold to these schemas."""
    syntax, special = model.call_syntax, model.engine.tokenizer.special_tokens
    grammar = None if syntax is None else call_grammar(syntax, allowed, special, only_one=only_one)
    if syntax is None or grammar is None:
        return forced_object(shown, allowed)
    return Tools(shown, allowed, syntax, only_one, StructuredOutputs(grammar=grammar))


def reader_of(tools: Tools | None) -> CallReader | TextReader:
    """For one output."""
    return TextReader() if tools is None else CallReader(tools.syntax, tools.allowed, only_one=tools.only_one)


def arguments_of(text: str) -> dict[str, Any]:
    """The arguments of a call as an object; as text under a name for it if they are no JSON object, cut short for instance, or
    none that we would read when they come back."""
    try:
        value = parse_json(text.encode("utf-8", "replace"))
    except HTTPError:
        value = None
    return value if isinstance(value, dict) else {INVALID: text}


def held_to(
    tools: Tools | None, asked: Asked, fields: Fields, model: ServedModel
) -> tuple[StructuredOutputs | None, Asked]:
    """What an output must be, and where that comes from: calls of the tools, or `asked`, the JSON that is asked of an answer. It
    is either where the model has the choice; where a call is forced there is no answer. Raises HTTPError if it cannot be held
    to both."""
    if tools is None:
        return (asked[0][1] if asked else None), (*asked, *asked_by(fields))
    for name, _ in asked_by(fields):
        raise bad_request(f"tool calls and {name} contradict each other", "tool_choice")
    if not asked or tools.must_be is not None:
        return tools.must_be, tools.asked
    ((_, wanted),) = asked
    schema = {"type": "object"} if wanted.json_object else wanted.json
    special = model.engine.tokenizer.special_tokens
    grammar = call_grammar(tools.syntax, tools.allowed, special, only_one=tools.only_one, otherwise=schema)
    if grammar is None:
        why = f"the format in which {model.name} writes calls cannot be held to these schemas"
        raise bad_request(f"tools and a response format together are not supported here: {why}", "tools")
    return StructuredOutputs(grammar=grammar), (*tools.asked, *asked)


def _read_name(value: Any, path: str) -> Any:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise bad_request(f"{path} must be 1 to 64 of a-z, A-Z, 0-9, _ and -", path)
    return value


def _read_parameters(value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise bad_request(f"{path} must be a JSON schema", path)
    if value.get("type", "object") != "object":  # arguments have names
        raise bad_request(f'{path}.type must be "object"', f"{path}.type")
    return value


NAME = Kind({"type": "string", "pattern": f"^{_NAME.pattern}$"}, _read_name)
PARAMETERS = Kind({"type": "object", "properties": {"type": {"enum": ["object"]}}}, _read_parameters)
_FUNCTION: Table = {
    "name": needed(NAME),
    "description": replace(STRING, default=""),
    "parameters": PARAMETERS,
    "strict": hint(BOOLEAN),  # arguments of a forced call are always held to the schema, those of others never
}
_CHOICE = one_of("none", "auto", "required")
_MODE = needed(one_of("auto", "required"))


def _choice_kind(named: Kind, some: Kind) -> Kind:
    """A word, an object that names a tool, or one that names those that may be called."""

    def read(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return (some if value.get("type") == "allowed_tools" else named).read(value, path)
        return _CHOICE.read(value, path)

    return Kind({"anyOf": [_CHOICE.schema, named.schema, some.schema]}, read)


# As chats have them: what is said of a function is an object in the tool.
_NAMED = {"type": one_of("function"), "function": needed(object_of({"name": needed(STRING)}))}
_ALLOWED: Table = {"mode": _MODE, "tools": needed(list_of(object_of(_NAMED), least=1))}
TOOLS: Table = {
    "tools": list_of(object_of({"type": one_of("function"), "function": needed(object_of(_FUNCTION))})),
    "tool_choice": _choice_kind(
        object_of(_NAMED),
        object_of({"type": needed(one_of("allowed_tools")), "allowed_tools": needed(object_of(_ALLOWED))}),
    ),
    "parallel_tool_calls": TRUE,
}
# As responses have them: it stands in the tool itself.
_FLAT_NAMED = {"type": needed(one_of("function")), "name": needed(STRING)}
FLAT_TOOLS: Table = {
    "tools": list_of(object_of({"type": needed(one_of("function")), **_FUNCTION})),
    "tool_choice": _choice_kind(
        object_of(_FLAT_NAMED),
        object_of(
            {
                "type": needed(one_of("allowed_tools")),
                "mode": _MODE,
                "tools": needed(list_of(object_of(_FLAT_NAMED), least=1)),
            }
        ),
    ),
    "parallel_tool_calls": TRUE,
}


@dataclass(frozen=True)
class Choice:
    """What a request says of which tools are called. mode: "none", "auto" or "required"; named: what has the names of those
    that may be, None for all; is_one: it is one call."""

    mode: str = "auto"
    named: list[Fields] | None = None
    is_one: bool = False


def choice_of(given: Fields | str | None, *, is_flat: bool) -> Choice:
    """Of the field tool_choice, in a response (flat) or in a chat."""
    if not isinstance(given, Fields):
        return Choice(given or "auto")
    is_some = (given.take("type") if given.has("type") else None) == "allowed_tools"
    if not is_some:
        return Choice("required", [given if is_flat else given.take("function")], True)
    inner = given if is_flat else given.take("allowed_tools")
    tools = inner.take("tools")
    return Choice(inner.take("mode"), tools if is_flat else [tool.take("function") for tool in tools])


def tools_of(fields: Fields, model: ServedModel) -> Tools | None:
    """Of a chat; None if the request has none, or wants none called. Raises HTTPError."""
    tools = [tool.take("function") for tool in fields.take("tools") or ()]
    choice = choice_of(fields.take("tool_choice"), is_flat=False)
    return chosen_tools(tools, choice, model, only_one=not fields.take("parallel_tool_calls"))


def chosen_tools(
    given: list[Fields], choice: Choice, model: ServedModel, *, only_one: bool, parameters: str = "parameters"
) -> Tools | None:
    """given: what is said of each function, its parameters in the field of this name. None if none may be called. Raises
    HTTPError."""
    tools = [_tool(function, parameters) for function in given]
    if len(tools) > MAX_TOOLS:
        raise bad_request(f"{len(tools)} tools, at most {MAX_TOOLS}", "tools")
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    if len(schemas) < len(tools):
        raise bad_request("two tools have the same name", "tools")
    if choice.mode == "none" or (not tools and choice == Choice()):
        return None
    if not tools:
        raise bad_request("tool_choice asks for a call, and there are no tools", "tool_choice")
    allowed = {name: {"type": "object", **(schema or {})} for name, schema in schemas.items()}
    paths = {name: function.path(parameters) for name, function in zip(schemas, given, strict=True)}
    if choice.named is not None:
        names = [_known(named, allowed) for named in choice.named]
        allowed = {name: schema for name, schema in allowed.items() if name in names}
    if not choice.is_one:  # of others the model is not told: it could call them
        tools = [tool for tool in tools if tool["function"]["name"] in allowed]
    asked = [(paths[name], StructuredOutputs(json=schema)) for name, schema in allowed.items()]
    if choice.mode == "auto":
        return Tools(tools, allowed, _syntax(model), only_one, asked=asked)
    return replace(_forced(tools, allowed, model, only_one=only_one or choice.is_one), asked=asked)


def _known(named: Fields, tools: dict[str, Any]) -> str:
    name: str = named.take("name")
    if name not in tools:
        raise bad_request(f"there is no tool {name!r} among: {', '.join(tools)}", named.path("name"))
    return name


def _syntax(model: ServedModel) -> Syntax:
    """How the model writes calls of its own accord. Raises HTTPError if it cannot be told of tools, or we read no such calls."""
    if not model.shows_tools:
        why = (
            f"the chat template of {model.name} does not show tools"
            if model.has_template
            else "it has no chat template"
        )
    elif model.call_syntax is None:
        why = f"the chat template of {model.name} writes calls in a format that is not read here"
    else:
        return model.call_syntax
    text = f"tool_choice 'auto' is not supported by this model: {why}; choose 'none', 'required' or a tool's name"
    raise bad_request(text, "tool_choice", "unsupported_parameter")


def _tool(function: Fields, parameters: str) -> dict[str, Any]:
    out: dict[str, Any] = {"name": function.take("name"), "description": function.take("description")}
    if function.has(parameters):
        out["parameters"] = function.take(parameters)
    return {"type": "function", "function": out}
