"""What each parameter of `SamplingParams` may be: its range or kind, as a check of one value and as a JSON schema."""

from __future__ import annotations

from typing import Any

from pyengine.arguments import INT32_MAX, integer, number, shown
from pyengine.errors import InvalidArgumentError
from pyengine.sampling_values import (
    LARGEST,
    MAX_BREAKER_CHARACTERS,
    MAX_BREAKERS,
    MAX_STOP_STRINGS,
    STRING_LISTS,
    Range,
    callbacks,
    check_speculative,
    logit_bias,
    structured_outputs,
    token_ids,
)

MAX_LOGPROBS = 64
MAX_SAMPLES = 1024

_INTEGERS: dict[str, tuple[int, int]] = {
    "n": (1, MAX_SAMPLES),
    "max_tokens": (1, INT32_MAX),
    "min_tokens": (0, INT32_MAX),
    "top_k": (-1, INT32_MAX),
    "repeat_last_n": (-1, INT32_MAX),
    "dry_allowed_length": (1, INT32_MAX),
    "dry_penalty_last_n": (-1, INT32_MAX),
    "no_repeat_ngram_size": (0, INT32_MAX),
    "seed": (-(2**63), 2**64 - 1),
    "logprobs": (0, MAX_LOGPROBS),
}
_FLOATS: dict[str, Range] = {
    "temperature": Range(0.0, LARGEST),
    "top_p": Range(0.0, 1.0, open_low=True),
    "min_p": Range(0.0, 1.0),
    "typical_p": Range(0.0, 1.0, open_low=True),
    "top_n_sigma": Range(-1.0, LARGEST),
    "dynatemp_range": Range(0.0, LARGEST),
    "dynatemp_exponent": Range(0.0, LARGEST),
    "xtc_probability": Range(0.0, 1.0),
    "xtc_threshold": Range(0.0, 1.0),
    "dry_multiplier": Range(0.0, LARGEST),
    "dry_base": Range(1.0, LARGEST),
    "repetition_penalty": Range(0.0, LARGEST, open_low=True),
    "frequency_penalty": Range(-LARGEST, LARGEST),
    "presence_penalty": Range(-LARGEST, LARGEST),
    "timeout": Range(0.0, 1e9, open_low=True),
}
_BOOLEANS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "token_healing")
_ID_LISTS = ("allowed_token_ids", "bad_token_ids", "stop_token_ids")
_CALLBACKS = ("logits_processor", "stopping_criteria")


def check_seed(value: object) -> int | None:
    """A seed as 64 bits without a sign: a negative one is its two's complement, so every int64 and every uint64 is one. -1 is
    none, None: vLLM, llama.cpp and ollama all take it to ask for a new one. Raises InvalidArgumentError."""
    seed = integer("seed", value, *_INTEGERS["seed"])
    return None if seed == -1 else seed % 2**64


def json_schema(name: str) -> dict[str, Any]:
    """A JSON schema of the parameter `name` of SamplingParams. Values that fit it may still be refused."""
    if name in _INTEGERS:
        least, most = _INTEGERS[name]
        return {"type": "integer", "minimum": least, "maximum": most}
    if name in _FLOATS:
        low, high, open_low = _FLOATS[name]
        return {"type": "number", "exclusiveMinimum" if open_low else "minimum": low, "maximum": high}
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": INT32_MAX}}
    string = {"type": "string", "minLength": 1}
    breaker = {**string, "maxLength": MAX_BREAKER_CHARACTERS}
    schemas: dict[str, dict[str, Any]] = {
        **{key: {"type": "boolean"} for key in _BOOLEANS},
        **dict.fromkeys(_ID_LISTS, ids),
        "allowed_token_ids": {**ids, "minItems": 1},
        "stop": {"anyOf": [string, {"type": "array", "items": string, "maxItems": MAX_STOP_STRINGS}]},
        "bad_words": {"anyOf": [string, {"type": "array", "items": string, "maxItems": MAX_STOP_STRINGS}]},
        "dry_sequence_breakers": {"anyOf": [breaker, {"type": "array", "items": breaker, "maxItems": MAX_BREAKERS}]},
        "logit_bias": {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -LARGEST, "maximum": LARGEST},
        },
        "structured_outputs": {
            "type": "object",
            "properties": {
                "json": {"type": ["object", "string", "boolean"]},
                "json_object": {"enum": [True]},
                "regex": {"type": "string"},
                "choice": {"type": "array", "items": string, "minItems": 1},
                "grammar": {"type": "string"},
            },
            "additionalProperties": False,
        },
    }
    return schemas[name]


def checked(name: str, value: Any) -> Any:
    """The value in its normal form; InvalidArgumentError naming the field if it has none."""
    if name == "seed":
        return check_seed(value)
    if name in _INTEGERS:
        return integer(name, value, *_INTEGERS[name])
    if name in _FLOATS:
        real = number(name, value)
        _FLOATS[name].check(name, real)
        return real
    if name in _BOOLEANS:
        if not isinstance(value, bool):
            raise InvalidArgumentError(f"{name} must be True or False, not {shown(value)}")
        return value
    if name in _ID_LISTS:
        return token_ids(name, value)
    if name in _CALLBACKS:
        return callbacks(name, value)
    if name == "structured_outputs":
        return structured_outputs(value)
    if name == "speculative":
        return check_speculative(value)
    return logit_bias(value) if name == "logit_bias" else STRING_LISTS[name](value)
