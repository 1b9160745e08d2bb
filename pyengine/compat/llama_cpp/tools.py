"""Tools of a chat: what the template is told of, and which call the answer is held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyengine.arguments import shown
from pyengine.errors import InvalidArgumentError
from pyengine.serve.tools import Tools, forced_object


def chosen_tools(given: Sequence[Mapping[str, Any]] | None, choice: Any) -> tuple[Any, Tools | None]:
    """(tools for the template, the call that is forced). "none" and None for no tools; None and "auto" leave the answer to the
    model; "required" and {"type": "function", "function": {"name": ...}} force a call. Raises InvalidArgumentError."""
    listed = _by_name(given)
    if choice == "none" or not listed:
        if choice not in (None, "none", "auto"):
            raise InvalidArgumentError("tool_choice asks for a call, and there are no tools")
        return None, None
    if choice in (None, "auto"):
        return list(listed.values()), None
    names = list(listed)
    if choice != "required":
        function = choice.get("function") if isinstance(choice, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if name not in names:
            raise InvalidArgumentError(f"tool_choice names no tool among {', '.join(names)}: {shown(choice)}")
        names = [name]
    schemas = {name: {"type": "object", **(listed[name]["function"].get("parameters") or {})} for name in names}
    tools = list(listed.values())
    return tools, forced_object(tools, schemas)


def _by_name(tools: object) -> dict[str, dict[str, Any]]:
    """Checked tools. Raises InvalidArgumentError."""
    if tools is None:
        return {}
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise InvalidArgumentError(f"tools must be a list of tools, not {shown(tools)}")
    named: dict[str, dict[str, Any]] = {}
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        function = function if isinstance(function, Mapping) else {}
        name = function.get("name")
        if not isinstance(name, str) or name in named:
            raise InvalidArgumentError(
                f"a tool is {{'type': 'function', 'function': {{'name': ...}}}}, not {shown(tool)}"
            )
        if not isinstance(function.get("parameters") or {}, Mapping):
            raise InvalidArgumentError(f"the parameters of the tool {name} must be a JSON schema")
        named[name] = dict(tool)
    return named
