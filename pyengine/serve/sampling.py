"""Fields of a request that say how to choose tokens -> SamplingParams."""

from __future__ import annotations

import secrets
from typing import Any

from pyengine.errors import InvalidArgumentError
from pyengine.sampling import SamplingParams, json_schema
from pyengine.serve.errors import bad_request
from pyengine.serve.fields import Fields, Kind
from pyengine.serve.models import ServedModel

# Fields of every endpoint that generates, and the parameter that each is. OpenAI's names, then vLLM's and llama.cpp's.
NAMES = {
    name: name
    for name in (
        "temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty", "logit_bias",
        "top_k", "min_p", "typical_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos",
        "include_stop_str_in_output", "skip_special_tokens", "allowed_token_ids", "bad_token_ids", "timeout",
        "structured_outputs",
    )
} | {"repeat_penalty": "repetition_penalty"}  # fmt: skip


def sampling_params(fields: Fields, model: ServedModel, given: dict[str, Any]) -> SamplingParams:
    """SamplingParams of the fields, and of `given`, which an endpoint has already read. Raises HTTPError."""
    options = dict(given)
    for field, name in NAMES.items():
        value = fields.take(field)
        if value is None:
            continue
        if name in options:
            raise bad_request(f"{field} is given twice, under two names", field)
        options[name] = value
    if "temperature" not in options and options.get("n", 1) > 1 and _default_is_greedy(model, options):
        options["temperature"] = 1.0  # OpenAI's default, for those who count on it; equal samples are of no use
    if "seed" not in options and model.engine.seed is None:
        options["seed"] = secrets.randbelow(2**53)  # one that JavaScript can say
    try:
        return SamplingParams(**options)
    except InvalidArgumentError as error:
        raise bad_request(str(error)) from None


def parameter(name: str) -> Kind:
    """A field that is a parameter of SamplingParams."""

    def read(value: Any, path: str) -> Any:
        try:
            return getattr(SamplingParams(**{name: value}), name)
        except InvalidArgumentError as error:
            raise bad_request(str(error), path) from None

    return Kind(json_schema(name), read)


SAMPLING = {field: parameter(name) for field, name in NAMES.items()}


def _default_is_greedy(model: ServedModel, options: dict[str, Any]) -> bool:
    alone = {name: value for name, value in options.items() if name != "n"}
    return model.engine.resolve(SamplingParams(**alone)).temperature == 0.0
