"""Tool calls that a request forces: the answer is held to one call, whose arguments are held to the tool's schema.

The output is JSON of one spelling, {"name": "...", "arguments": {...}}, which a guide enforces token by token; so the arguments
can be streamed as they come: they are what stands between the name and the last brace.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from pyengine.sampling import StructuredOutputs
from pyengine.serve import payload
from pyengine.serve.errors import bad_request
from pyengine.serve.fields import Fields

_BEGINNING = re.compile(r'\{"name": "([a-zA-Z0-9_-]{1,64})", "arguments": ')
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
MAX_TOOLS = 128


@dataclass(frozen=True)
class ForcedTools:
    """tools: as the template takes them; allowed: {name: schema of its arguments} of those that may be called."""

    tools: list[dict[str, Any]]
    allowed: dict[str, Any]

    def output(self) -> StructuredOutputs:
        """What the model's text must be."""
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


def forced_tools(fields: Fields) -> ForcedTools | None:
    """The tools of which a request forces one, None if it has none, or wants none called. Raises HTTPError."""
    tools = [_tool(Fields(value, f"tools[{i}]")) for i, value in enumerate(fields.list_("tools") or [])]
    fields.boolean("parallel_tool_calls")  # a forced call is one
    choice = fields.take("tool_choice")
    if len(tools) > MAX_TOOLS:
        raise bad_request(f"{len(tools)} tools, at most {MAX_TOOLS}", "tools")
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise bad_request("two tools have the same name", "tools")
    if choice == "none" or (not tools and choice in (None, "auto")):
        return None
    if not tools:
        raise bad_request("tool_choice asks for a call, and there are no tools", "tool_choice")
    if choice in (None, "auto"):
        why = "whether to call a tool cannot be left to the model here; choose 'none', 'required' or a tool's name"
        raise bad_request(f"tool_choice 'auto' is not supported: {why}", "tool_choice", "unsupported_parameter")
    if choice != "required":
        named = Fields(choice, "tool_choice")
        named.one_of("type", "function")
        function = named.object_("function")
        name = named.missing("function") if function is None else function.required_string("name")
        if name not in names:
            raise bad_request(f"there is no tool {name!r} among: {', '.join(names)}", "tool_choice.function.name")
        names = [name]
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    return ForcedTools(tools, {name: schemas[name] or {"type": "object"} for name in names})


def _tool(tool: Fields) -> dict[str, Any]:
    tool.one_of("type", "function", default="function")
    function = tool.object_("function")
    if function is None:
        tool.missing("function")
    name = function.required_string("name")
    if not _NAME.fullmatch(name):
        raise bad_request(f"{function.path('name')} must be 1 to 64 of a-z, A-Z, 0-9, _ and -", function.path("name"))
    out: dict[str, Any] = {"name": name, "description": function.string("description") or ""}
    parameters = function.take("parameters")
    if parameters is not None:
        if not isinstance(parameters, dict):
            raise bad_request(f"{function.path('parameters')} must be a JSON schema", function.path("parameters"))
        out["parameters"] = parameters
    function.boolean("strict")  # arguments are always held to the schema
    function.end()
    tool.end()
    return {"type": "function", "function": out}


class CallReader:
    """The text of one output -> the parts of its call, as they come."""

    def __init__(self) -> None:
        self.id = payload.new_id("call_")
        self._text = ""
        self._n_said = 0  # characters of the arguments that were given out
        self._begin: int | None = None  # of the arguments

    def push(self, text: str, *, is_last: bool, is_complete: bool) -> list[dict[str, Any]]:
        """tool_calls for a stream's delta, none or one: first with id and name, then with arguments. `is_complete`: the text
        ended by itself, so its last brace is not the arguments'."""
        self._text += text
        head: dict[str, Any] = {}
        if self._begin is None:
            match = _BEGINNING.match(self._text)
            if match is None:
                return []
            self._begin = match.end()
            head = {"id": self.id, "type": "function"}
            name = {"name": match[1]}
        else:
            name = {}
        arguments = self._text[self._begin :]
        arguments = arguments.rstrip().removesuffix("}") if is_complete else arguments if is_last else arguments[:-1]
        new, self._n_said = arguments[self._n_said :], max(self._n_said, len(arguments))
        if not new and not head:
            return []
        return [{"index": 0, **head, "function": {**name, "arguments": new}}]


def whole_call(text: str, *, is_complete: bool) -> list[dict[str, Any]]:
    """tool_calls of a message."""
    calls = CallReader().push(text, is_last=True, is_complete=is_complete)
    for call in calls:
        del call["index"]
        if is_complete:
            json.loads(call["function"]["arguments"])  # a guide has seen to it
    return calls
