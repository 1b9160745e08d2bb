"""Fields of a request that say how to choose tokens, and what an output must be -> SamplingParams."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pyengine.errors import InvalidArgumentError
from pyengine.sampling import SamplingParams, StructuredOutputs, json_schema
from pyengine.serve.errors import HTTPError, bad_request, parameter_in
from pyengine.serve.fields import ANYTHING, STRING, Fields, Kind, checked
from pyengine.serve.models import ServedModel

if TYPE_CHECKING:
    from pyengine.engine import Engine

# Where a request says what an output must be: the field, as a path, and what it says.
Asked = Sequence[tuple[str, StructuredOutputs]]
# A JSON schema that an output is held to.
SCHEMA = checked(Kind({"type": ["object", "string", "boolean"]}, ANYTHING.read), lambda value: StructuredOutputs(json=value))

# Fields of every endpoint that generates, and the parameter that each is. OpenAI's names, then vLLM's and those of others.
NAMES = {
    name: name
    for name in (
        "temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty", "logit_bias",
        "top_k", "min_p", "typical_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos",
        "include_stop_str_in_output", "skip_special_tokens", "allowed_token_ids", "bad_token_ids", "timeout",
        "structured_outputs", "bad_words", "no_repeat_ngram_size", "repeat_last_n", "top_n_sigma", "dynatemp_range",
        "dynatemp_exponent", "xtc_probability", "xtc_threshold", "dry_multiplier", "dry_base", "dry_allowed_length",
        "dry_penalty_last_n", "dry_sequence_breakers",
    )
} | {"repeat_penalty": "repetition_penalty", "grammar": "structured_outputs", "json_schema": "structured_outputs"}  # fmt: skip


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
        raise bad_request(str(error), parameter_in(str(error))) from None


def parameter(name: str) -> Kind:
    """A field that is a parameter of SamplingParams."""

    def read(value: Any, path: str) -> Any:
        try:
            return getattr(SamplingParams(**{name: value}), name)
        except InvalidArgumentError as error:
            raise bad_request(str(error), path) from None

    return Kind(json_schema(name), read)


SAMPLING = {field: parameter(name) for field, name in NAMES.items()} | {
    "grammar": checked(STRING, lambda text: StructuredOutputs(grammar=text) if text else None),
    "json_schema": SCHEMA,
}


def asked_by(fields: Fields) -> Asked:
    """What these fields say that an output must be."""
    names = [name for name, parameter in NAMES.items() if parameter == "structured_outputs" and fields.has(name)]
    return [(name, fields.peek(name)) for name in names if fields.peek(name) is not None]


@contextlib.contextmanager
def told_of_output(engine: Engine, asked: Asked) -> Iterator[None]:
    """What the engine says of structured_outputs in this block comes from the first field whose own demand it does not take; or
    it is too much together, and comes from the first."""
    try:
        yield
    except InvalidArgumentError as error:
        if not asked or not str(error).startswith("structured_outputs"):
            raise
        # Of one demand it is known. What took too long takes as long again.
        again = () if len(asked) == 1 or isinstance(error.__cause__, TimeoutError) else asked
        found = (_refused(engine, path, wanted) for path, wanted in again)
        raise next(filter(None, found), _said_of(asked[0][0], error)) from None


def _refused(engine: Engine, path: str, wanted: StructuredOutputs) -> HTTPError | None:
    try:
        engine.guide(wanted)
    except InvalidArgumentError as error:
        return _said_of(path, error)
    return None


def _said_of(path: str, error: InvalidArgumentError) -> HTTPError:
    return bad_request(path + str(error).removeprefix("structured_outputs"), path)


def _default_is_greedy(model: ServedModel, options: dict[str, Any]) -> bool:
    alone = {name: value for name, value in options.items() if name != "n"}
    return model.engine.resolve(SamplingParams(**alone)).temperature == 0.0
