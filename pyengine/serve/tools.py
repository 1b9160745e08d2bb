"""The tools of a request, and what its answer may make of them: a call that is forced, or calls as the model likes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from pyengine.sampling import StructuredOutputs
from pyengine.serve.calls import OBJECT, CallReader, Syntax, TextReader
from pyengine.serve.errors import bad_request
from pyengine.serve.fields import BOOLEAN, STRING, TRUE, Fields, Kind, Table, hint, list_of, needed, object_of, one_of
from pyengine.serve.models import ServedModel

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
MAX_TOOLS = 128


@dataclass(frozen=True)
class Tools:
    """Tools that an answer may call.

    shown      as the template takes them
    allowed    {name: schema of its arguments} of those that may be called
    syntax     how the model writes calls
    is_forced  the answer is one call, whose arguments are held to the schema; otherwise the model chooses
    only_one   the answer ends with its first call
    """

    shown: list[dict[str, Any]]
    allowed: dict[str, Any]
    syntax: Syntax
    is_forced: bool
    only_one: bool

    def output(self) -> StructuredOutputs | None:
        """What the model's text must be: for a forced call JSON of one spelling, {"name": "...", "arguments": {...}}."""
        if not self.is_forced:
            return None
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": schema},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for name, schema in self.allowed.items()
        ]
        return StructuredOutputs(json=calls[0] if len(calls) == 1 else {"anyOf": calls})


def reader_of(tools: Tools | None) -> CallReader | TextReader:
    """For one output."""
    return TextReader() if tools is None else CallReader(tools.syntax, tools.allowed, only_one=tools.only_one)


def held_to(tools: Tools | None, wanted: StructuredOutputs | None, fields: Fields) -> StructuredOutputs | None:
    """What an output must be: `wanted`, or calls of the tools. Raises HTTPError if the request asks for both."""
    if tools is None:
        return wanted
    if wanted is not None or fields.has("structured_outputs"):
        raise bad_request("tool calls and a response format contradict each other", "tool_choice")
    return tools.output()


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


_FUNCTION: Table = {
    "name": needed(Kind({"type": "string", "pattern": f"^{_NAME.pattern}$"}, _read_name)),
    "description": replace(STRING, default=""),
    "parameters": Kind({"type": "object", "properties": {"type": {"enum": ["object"]}}}, _read_parameters),
    "strict": hint(BOOLEAN),  # arguments of a forced call are always held to the schema, those of others never
}
_CHOICE = one_of("none", "auto", "required")


def _choice_kind(named: Table) -> Kind:
    """A word, or an object that names a tool."""
    by_name = object_of(named)
    return Kind(
        {"anyOf": [_CHOICE.schema, by_name.schema]},
        lambda value, path: (_CHOICE if isinstance(value, str) else by_name).read(value, path),
    )


# As chats have them: what is said of a function is an object in the tool.
TOOLS: Table = {
    "tools": list_of(object_of({"type": one_of("function"), "function": needed(object_of(_FUNCTION))})),
    "tool_choice": _choice_kind(
        {"type": one_of("function"), "function": needed(object_of({"name": needed(STRING)}))},
    ),
    "parallel_tool_calls": TRUE,
}
# As responses have them: it stands in the tool itself.
FLAT_TOOLS: Table = {
    "tools": list_of(object_of({"type": needed(one_of("function")), **_FUNCTION})),
    "tool_choice": _choice_kind({"type": needed(one_of("function")), "name": needed(STRING)}),
    "parallel_tool_calls": TRUE,
}


def tools_of(fields: Fields, model: ServedModel) -> Tools | None:
    """Of a chat; None if the request has none, or wants none called. Raises HTTPError."""
    tools = [tool.take("function") for tool in fields.take("tools") or ()]
    choice = fields.take("tool_choice")
    name = choice.take("function") if isinstance(choice, Fields) else choice
    return chosen_tools(tools, name, model, only_one=not fields.take("parallel_tool_calls"))


def chosen_tools(
    given: list[Fields], choice: Fields | str | None, model: ServedModel, *, only_one: bool
) -> Tools | None:
    """given: what is said of each function; choice: a word, or what has the name of one. None if none may be called.
    Raises HTTPError."""
    tools = [_tool(function) for function in given]
    if len(tools) > MAX_TOOLS:
        raise bad_request(f"{len(tools)} tools, at most {MAX_TOOLS}", "tools")
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    if len(schemas) < len(tools):
        raise bad_request("two tools have the same name", "tools")
    if choice == "none" or (not tools and choice in (None, "auto")):
        return None
    if not tools:
        raise bad_request("tool_choice asks for a call, and there are no tools", "tool_choice")
    allowed = {name: {"type": "object", **(schema or {})} for name, schema in schemas.items()}
    if choice in (None, "auto"):
        return Tools(tools, allowed, _syntax(model), is_forced=False, only_one=only_one)
    if isinstance(choice, Fields):
        name = choice.take("name")
        if name not in allowed:
            raise bad_request(f"there is no tool {name!r} among: {', '.join(allowed)}", choice.path("name"))
        allowed = {name: allowed[name]}
    return Tools(tools, allowed, OBJECT, is_forced=True, only_one=True)


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


def _tool(function: Fields) -> dict[str, Any]:
    out: dict[str, Any] = {"name": function.take("name"), "description": function.take("description")}
    if function.has("parameters"):
        out["parameters"] = function.take("parameters")
    return {"type": "function", "function": out}
