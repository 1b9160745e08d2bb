"""Values of sampling parameters in their normal form: one function for each kind, which raises InvalidArgumentError naming the
parameter, and its type where that is one of ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from pyengine.arguments import INT32_MAX, integer, number, shown
from pyengine.errors import InvalidArgumentError

MAX_STOP_STRINGS = 1024  # clients send a handful
MAX_STOP_CHARACTERS = 1 << 17  # of all stop strings of a request: an automaton over them takes about 300 bytes each
MAX_IDS = 1 << 24  # the largest vocabulary
MAX_BREAKERS = 64  # of DRY; clients send four
MAX_BREAKER_CHARACTERS = 256  # of all: for each of them the vocabulary is searched
MAX_CALLBACKS = 64  # each is a call of Python code a token
MAX_DRAFT = 24  # tokens guessed ahead in a step
LARGEST = 3.4028234663852886e38  # of float32, the type of logits


class Range(NamedTuple):
    """Legal values of a number: low <= x <= high, or low < x where `open_low`."""

    low: float
    high: float
    open_low: bool = False

    def check(self, name: str, value: float) -> None:
        inside = value > self.low if self.open_low else value >= self.low
        if not (inside and value <= self.high):
            bracket = "(" if self.open_low else "["
            raise InvalidArgumentError(f"{name} must be in {bracket}{self.low:g}, {self.high:g}], not {value!r}")


def items(name: str, values: object, kind: str, most: int) -> Collection[Any]:
    """`values`, if it is a collection of at most `most` items: whatever comes without a length may have no end."""
    if isinstance(values, (str, bytes, bytearray, memoryview, Mapping)) or not isinstance(values, Collection):
        raise InvalidArgumentError(f"{name} must be a list of {kind}, not {shown(values)}")
    try:
        length = len(values)
    except TypeError:  # a NumPy array without dimensions
        raise InvalidArgumentError(f"{name} must be a list of {kind}, not {shown(values)}") from None
    if length > most:
        raise InvalidArgumentError(f"{name} holds {length} {kind}, at most {most}")
    return values


def token_id(name: str, value: object) -> int:
    return integer(f"a token id of {name}", value, 0, INT32_MAX)


def token_ids(name: str, values: object) -> tuple[int, ...]:
    return tuple(token_id(name, value) for value in items(name, values, "token ids", MAX_IDS))


def logit_bias(values: object) -> dict[int, float]:
    if not isinstance(values, Mapping):
        raise InvalidArgumentError(f"logit_bias must map token ids to numbers, not {shown(values)}")
    if len(values) > MAX_IDS:
        raise InvalidArgumentError(f"logit_bias holds {len(values)} token ids, at most {MAX_IDS}")
    bias: dict[int, float] = {}
    for key, value in values.items():
        # JSON has no integer keys, so requests written for HTTP interfaces bring strings.
        token = int(key) if isinstance(key, str) and len(key) <= 10 and key.isascii() and key.isdigit() else key
        token = token_id("logit_bias", token)
        real = number(f"logit_bias of token {token}", value)
        if not real <= LARGEST or (real < -LARGEST and not math.isinf(real)):
            raise InvalidArgumentError(f"logit_bias of token {token} is out of range: {shown(value)}")
        if token in bias:
            raise InvalidArgumentError(f"logit_bias names token {token} twice")
        bias[token] = real
    return bias


def _strings(
    name: str, values: object, most: int = MAX_STOP_STRINGS, most_characters: int = MAX_STOP_CHARACTERS
) -> tuple[str, ...]:
    """One string or several, each once."""
    strings = (values,) if isinstance(values, str) else tuple(items(name, values, "strings", most))
    for string in strings:
        if not isinstance(string, str):
            raise InvalidArgumentError(f"{name} must hold strings, not {shown(string)}")
    strings = tuple(dict.fromkeys(strings))
    size = sum(map(len, strings))
    if size > most_characters:
        raise InvalidArgumentError(f"{name} holds {size} characters, at most {most_characters}")
    return strings


def _stop_strings(values: object) -> tuple[str, ...]:
    strings = _strings("stop", values)
    if not all(strings):
        raise InvalidArgumentError("stop must not hold an empty string: it would end every text at once")
    return strings


def _bad_words(values: object) -> tuple[str, ...]:
    words = _strings("bad_words", values)
    if not all(word.lstrip() for word in words):
        raise InvalidArgumentError("bad_words must not hold a string without a word")
    return words


def _breakers(values: object) -> tuple[str, ...]:
    strings = _strings("dry_sequence_breakers", values, MAX_BREAKERS, MAX_BREAKER_CHARACTERS)
    if not all(strings):
        raise InvalidArgumentError("dry_sequence_breakers must not hold an empty string: it would stand everywhere")
    return strings


STRING_LISTS = {"stop": _stop_strings, "bad_words": _bad_words, "dry_sequence_breakers": _breakers}


def callbacks(name: str, value: object) -> tuple[Callable[[Any, Any], Any], ...]:
    """A function, also one that is a list, like transformers' LogitsProcessorList, or several."""
    functions = (value,) if callable(value) else tuple(items(name, value, "functions", MAX_CALLBACKS))
    for function in functions:
        if not callable(function):
            raise InvalidArgumentError(f"{name} must be a function or a list of functions, not {shown(function)}")
    return functions


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """What an output must be; exactly one of these. Needs the extra pyengine-lm[guide].

    json         a JSON schema, as an object or as text
    json_object  True: any JSON object
    regex        a regular expression that the whole text matches
    choice       one of these strings
    grammar      a context-free grammar in Lark's notation, with a rule `start`, or in llama.cpp's (GBNF), with a rule `root`

    Raises InvalidArgumentError. Whether a schema is understood shows when it is used.
    """

    json: Mapping[str, Any] | str | bool | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            raise InvalidArgumentError(f"structured_outputs takes exactly one of its fields, not {given}")
        name, value = given[0], getattr(self, given[0])
        kinds: dict[str, Any] = {"json": (Mapping, str, bool), "json_object": bool, "regex": str, "grammar": str}
        if name == "choice":
            if isinstance(value, str) or not isinstance(value, Sequence) or not value:
                raise InvalidArgumentError("structured_outputs.choice must be a list of strings that is not empty")
            if not all(isinstance(one, str) and one for one in value):
                raise InvalidArgumentError("structured_outputs.choice must hold strings that are not empty")
            object.__setattr__(self, "choice", tuple(value))
        elif not isinstance(value, kinds[name]) or value is False:
            raise InvalidArgumentError(f"structured_outputs.{name} is {shown(value)}, which is not of its kind")


def structured_outputs(value: object) -> StructuredOutputs:
    if isinstance(value, StructuredOutputs):
        return value
    if not isinstance(value, Mapping):
        raise InvalidArgumentError("structured_outputs must be a StructuredOutputs, or a mapping of its fields")
    unknown = [name for name in value if name not in {field.name for field in fields(StructuredOutputs)}]
    if unknown:
        raise InvalidArgumentError(f"structured_outputs has no field {shown(unknown[0])}")
    return StructuredOutputs(**value)


class Drafting(NamedTuple):
    """How tokens may be guessed ahead: at most max_draft in a step (0 = never), and by earlier outputs of the same engine, too
    (`store`; among callers with the same cache_salt)."""

    max_draft: int = MAX_DRAFT
    store: bool = True


def check_speculative(value: object) -> Drafting:
    """ "auto", "off", or {"max_draft": ..., "store": ...}. Raises InvalidArgumentError."""
    if isinstance(value, str) and value in ("auto", "off"):
        return Drafting() if value == "auto" else Drafting(0)
    given = value._asdict() if isinstance(value, Drafting) else value
    if not isinstance(given, Mapping):
        raise InvalidArgumentError(f'speculative must be "auto", "off" or a mapping of options, not {shown(value)}')
    unknown = [key for key in given if key not in Drafting._fields]
    if unknown:
        raise InvalidArgumentError(f"speculative has no option {shown(unknown[0])}, only {', '.join(Drafting._fields)}")
    store = given.get("store", True)
    if not isinstance(store, bool):
        raise InvalidArgumentError(f"speculative: store must be True or False, not {shown(store)}")
    return Drafting(integer("max_draft of speculative", given.get("max_draft", MAX_DRAFT), 0, MAX_DRAFT), store)
