"""How much a model is to think before it answers, as OpenAI asks for it and as chat templates are told."""

from __future__ import annotations

from typing import Any

from pyengine.serve.errors import bad_request
from pyengine.serve.fields import Table, hint, one_of, refused
from pyengine.serve.models import ServedModel

EFFORT = one_of("none", "minimal", "low", "medium", "high", "xhigh", "max")
_SUMMARY = hint(one_of("auto", "concise", "detailed"))  # what a model thinks is part of its text, whole
REASONING: Table = {
    "effort": EFFORT,
    "summary": _SUMMARY,
    "generate_summary": _SUMMARY,
    "context": refused("reasoning is part of the text", "auto"),
    "mode": refused("there is one mode", "standard"),
}


def effort_variables(effort: str | None, model: ServedModel, path: str) -> dict[str, Any]:
    """Variables of the template that say so: the words themselves where it knows them (gpt-oss), else whether to think at all
    (Qwen3, SmolLM3). A model whose template knows neither is taken to think as it was made to: any effort but "none" is
    refused. Raises HTTPError."""
    source = model.template.source
    if effort is None:
        return {}
    if "reasoning_effort" in source:
        return {"reasoning_effort": effort}
    if "enable_thinking" in source:
        return {"enable_thinking": effort != "none"}
    if effort != "none":
        why = f"the chat template of {model.name} knows no effort"
        raise bad_request(f"{path} is not supported: {why}", path, "unsupported_parameter")
    return {}
