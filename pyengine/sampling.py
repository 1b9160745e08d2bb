"""What a caller may ask of generation: `SamplingParams`, with vLLM's names, and what is left once defaults are filled in.

Every field defaults to None, "what the model's generation_config.json says, else greedy and neutral". `SamplingParams.resolve`
fills that in and returns `ResolvedParams`, which has no None left but where None is a value.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pyengine.arguments import shown
from pyengine.errors import InvalidArgumentError, ModelFormatError, UnknownParameterError
from pyengine.sampling_fields import check_seed as check_seed
from pyengine.sampling_fields import checked
from pyengine.sampling_fields import json_schema as json_schema
from pyengine.sampling_values import MAX_DRAFT as MAX_DRAFT
from pyengine.sampling_values import Drafting as Drafting
from pyengine.sampling_values import StructuredOutputs as StructuredOutputs
from pyengine.sampling_values import check_speculative as check_speculative

# (token ids (n) int32 so far, logits (vocab_size) float32 of the next) -> None, or other logits; -> whether to end
LogitsProcessor = Callable[[Any, Any], Any]
StoppingCriteria = Callable[[Any, Any], bool]

# Names that people bring from llama-cpp-python, transformers and OpenVINO GenAI.
ALIASES: dict[str, str] = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "repeat_penalty": "repetition_penalty",
    "stop_strings": "stop",
    "rng_seed": "seed",
    "num_return_sequences": "n",
    "max_time": "timeout",
    "temp": "temperature",
    "penalty_last_n": "repeat_last_n",
}

# What generation_config.json may say; its other keys are not about sampling, or ask for what a caller must ask for.
_FROM_MODEL = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
# Asking for one of these without a temperature asks for sampling.
_FILTERS: dict[str, float] = {
    "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "top_n_sigma": 0.0, "dynatemp_range": 0.0, "xtc_probability": 0.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ResolvedParams:
    """`SamplingParams` with every default filled in. None: no limit (`max_tokens`, `timeout`), no restriction
    (`allowed_token_ids`), no log-probabilities (`logprobs`). `temperature` 0 is greedy, `top_k` 0 is off."""

    n: int
    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    top_n_sigma: float
    dynatemp_range: float
    dynatemp_exponent: float
    xtc_probability: float
    xtc_threshold: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    repeat_last_n: int
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: tuple[str, ...]
    no_repeat_ngram_size: int
    logit_bias: dict[int, float]
    allowed_token_ids: tuple[int, ...] | None
    bad_token_ids: tuple[int, ...]
    bad_words: tuple[str, ...]
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    include_stop_str_in_output: bool
    ignore_eos: bool
    seed: int
    logprobs: int | None
    skip_special_tokens: bool
    timeout: float | None
    speculative: Drafting
    structured_outputs: StructuredOutputs | None = None
    logits_processor: tuple[LogitsProcessor, ...] = ()
    stopping_criteria: tuple[StoppingCriteria, ...] = ()
    token_healing: bool = False


_NEUTRAL: dict[str, Any] = {
    "n": 1,
    "max_tokens": None,
    "min_tokens": 0,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "top_n_sigma": 0.0,
    "dynatemp_range": 0.0,
    "dynatemp_exponent": 1.0,
    "xtc_probability": 0.0,
    "xtc_threshold": 0.1,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repeat_last_n": -1,
    "dry_multiplier": 0.0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": -1,
    "dry_sequence_breakers": ("\n", ":", '"', "*"),
    "no_repeat_ngram_size": 0,
    "allowed_token_ids": None,
    "bad_token_ids": (),
    "bad_words": (),
    "stop": (),
    "stop_token_ids": (),
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "logprobs": None,
    "skip_special_tokens": True,
    "timeout": None,
    "structured_outputs": None,
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop. None = the model's generation_config.json, else greedy and neutral.

    n                     samples per prompt (needs a temperature above 0)
    max_tokens            outputs at most; None = to the end of text or of the context
    min_tokens            outputs before an end-of-text or stop token may come
    temperature           0 = greedy; given a filter (top_k to xtc_probability) alone, the model's, else 1
    top_k                 keep the k most probable tokens; 0 or -1 = off
    top_p                 keep the most probable tokens that reach this mass; 1 = off
    min_p                 keep tokens at least this fraction as probable as the first; 0 = off
    typical_p             keep the tokens nearest the entropy that reach this mass; 1 = off
    top_n_sigma           keep logits at most so many standard deviations below the first; 0 or -1 = off
    dynatemp_range        the temperature follows the entropy, from temperature - range to temperature + range; 0 = off
    dynatemp_exponent     of the entropy's share of the largest one; 1 = in proportion
    xtc_probability       how often the most probable tokens are left out, all but the last above xtc_threshold; 0 = off
    xtc_threshold         from this probability on a token is among them; above 0.5 there is never another one beside it
    repetition_penalty    divides (or multiplies, when negative) logits of tokens of prompt and output; 1 = off
    frequency_penalty     subtracted from a logit per occurrence in the output
    presence_penalty      subtracted once from the logit of every token in the output
    repeat_last_n         tokens that these three look at, from the end; -1 = the whole text, 0 = off
    dry_multiplier        DRY, against repeated passages: subtracted from the logit of a token that would go on with one of
                          dry_allowed_length tokens; 0 = off
    dry_base              by this it is multiplied for each token more; at least 1
    dry_allowed_length    the shortest passage that counts
    dry_penalty_last_n    tokens of prompt and output that are looked at, from the end; -1 = the whole text, 0 = off
    dry_sequence_breakers a string or strings over which no passage reaches; None = newline, colon, quotation mark, asterisk
    no_repeat_ngram_size  so many tokens of prompt and output never come a second time, unless nothing else may come; 0 = off
    logit_bias            {token id: added to its logit}; -inf bans the token
    allowed_token_ids     only these may come
    bad_token_ids         these may not come
    bad_words             a string or strings that may not come in the tokens that the tokenizer makes of them, with and without a
                          space before
    stop                  a string or strings that end the text
    stop_token_ids        tokens that end the text
    include_stop_str_in_output   leave the stop string in the text
    ignore_eos            go on after the model's end-of-text tokens
    seed                  of 64 bits, -2**63 <= seed < 2**64, a negative one as its two's complement; None and -1 draw one
                          (or take the engine's own), and the result reports it
    logprobs              log-probability of each token and of this many alternatives (0..64); None = neither
    skip_special_tokens   leave special tokens out of the text
    timeout               seconds after which the text so far is returned
    structured_outputs    what the text must be: a JSON schema, a regular expression, … (see StructuredOutputs)
    logits_processor      a function or functions f(token_ids, logits), called for every token, see below
    stopping_criteria     a function or functions f(token_ids, logits) -> bool: True ends the text before the next token
    token_healing         take the prompt's last tokens back and say them again, so that a broken word, or "http:", goes on as the
                          tokenizer would have it; see below
    speculative           tokens guessed ahead, which change no byte: "auto", "off", or {"max_draft": tokens in a step, at
                          most 24; "store": guess by earlier outputs too}; None = the engine's

    **A caller's own functions** get the tokens so far, prompt and output, (n) int32 and read-only, and the model's logits of the
    next one, (vocab_size) float32. Criteria come first. A processor changes the logits in place, or returns others: any numbers,
    and -inf bans a token; a NaN or +inf is a NotFiniteError, no token left an InvalidArgumentError. Penalties, bias, bans, a
    grammar and the filters come after it; log-probabilities stay those of the model. What a function raises ends its own output
    and reaches its caller. It runs in whichever thread computes for all, while everybody waits; it may be asked about a token
    twice (after Ctrl-C, say), and the output is repeatable if it depends on its arguments alone. It may keep both arrays.
    It may use the tokenizer, but no engine: that is a PyEngineError, and to wait for a thread that does is a deadlock. Tokens are
    not guessed ahead for it.

    **token_healing** takes the longest end of the prompt, of whole tokens, that a longer token begins with (of a prompt around a
    hole, of the text in front of it), but no special token. The output begins with tokens that spell it, the last of which may go
    beyond; its text begins behind it, and stop strings are looked for there. All else is told as the model sees it: these tokens
    count towards max_tokens and stand in `tokens` and `logprobs`, the prompt is shorter. Not with structured_outputs, or beams.

    Raises InvalidArgumentError (a ValueError) naming the field for wrong types, NaN, and values out of range.
    """

    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    top_n_sigma: float | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repeat_last_n: int | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: str | Sequence[str] | None = None
    no_repeat_ngram_size: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_token_ids: Sequence[int] | None = None
    bad_words: str | Sequence[str] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    logprobs: int | None = None
    skip_special_tokens: bool | None = None
    timeout: float | None = None
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None
    stopping_criteria: StoppingCriteria | Sequence[StoppingCriteria] | None = None
    token_healing: bool | None = None
    speculative: str | Mapping[str, Any] | Drafting | None = None

    def __post_init__(self) -> None:
        for name, value in self._given().items():
            object.__setattr__(self, name, checked(name, value))
        self._check_together()

    def _given(self) -> dict[str, Any]:
        """What is not None."""
        return {name: value for name in _FIELDS if (value := getattr(self, name)) is not None}

    def _check_together(self) -> None:
        low, high = self.min_tokens, self.max_tokens
        if low is not None and high is not None and low > high:
            raise InvalidArgumentError(f"min_tokens ({low}) is above max_tokens ({high})")
        if self.structured_outputs is not None and self.ignore_eos:
            raise InvalidArgumentError(
                "ignore_eos and structured_outputs contradict each other: such an output has an end"
            )
        if self.structured_outputs is not None and self.token_healing:
            raise InvalidArgumentError(
                "token_healing and structured_outputs contradict each other: such an output begins as its grammar says"
            )
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise InvalidArgumentError("allowed_token_ids is empty: no token could ever come")
            if set(self.allowed_token_ids) <= set(self.bad_token_ids or ()):
                raise InvalidArgumentError("bad_token_ids holds everything that allowed_token_ids allows")

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> SamplingParams:
        """SamplingParams from names and aliases (`max_new_tokens`, `repeat_penalty`, `stop_strings`, ...).

        UnknownParameterError (a TypeError) for an unknown name, with the closest known one; InvalidArgumentError if a field is
        given twice under two names."""
        chosen: dict[str, Any] = {}
        given_as: dict[str, str] = {}
        for name, value in kwargs.items():
            field_name = ALIASES.get(name, name)
            if field_name not in _FIELDS:
                import difflib

                near = difflib.get_close_matches(name[:64], [*_FIELDS, *ALIASES], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UnknownParameterError(f"unknown sampling parameter {shown(name)}{hint}")
            if field_name in given_as:
                raise InvalidArgumentError(
                    f"{given_as[field_name]} and {name} are the same parameter: give one of them"
                )
            given_as[field_name] = name
            chosen[field_name] = value
        return cls(**chosen)

    def resolve(
        self,
        defaults: Mapping[str, Any] | None = None,
        *,
        seed: int | None = None,
        speculative: Drafting = Drafting(),  # noqa: B008 (immutable)
    ) -> ResolvedParams:
        """Fill in what is None from `defaults` (generation_config.json as parsed), then from neutral values.

        `do_sample` is honoured as transformers does: without it the model's default is greedy. `seed` is the engine's own,
        used when these params name none; without either one is drawn. `speculative` is the engine's, too.
        ModelFormatError if `defaults` holds nonsense."""
        from_model = _model_defaults(defaults or {})
        given = self._given()
        if "temperature" not in given:
            given["temperature"] = self._default_temperature(from_model, defaults or {})
        merged = {**_NEUTRAL, "logit_bias": {}, **from_model, **given}
        if merged["n"] > 1 and merged["temperature"] == 0.0:
            raise InvalidArgumentError(
                f"n = {merged['n']} samples at temperature 0 would all be the same: set temperature"
            )
        merged["top_k"] = max(merged["top_k"], 0)
        merged["top_n_sigma"] = max(merged["top_n_sigma"], 0.0)
        merged.setdefault("speculative", speculative)
        if merged.get("seed") is None:
            own = None if seed is None else check_seed(seed)
            merged["seed"] = int.from_bytes(os.urandom(8), "little") if own is None else own
        return ResolvedParams(**merged)

    def _default_temperature(self, from_model: Mapping[str, Any], defaults: Mapping[str, Any]) -> float:
        sampling = bool(defaults.get("do_sample", False))
        for name, off in _FILTERS.items():
            value = getattr(self, name)
            sampling = sampling or (value is not None and value != off and value >= 0)
        return float(from_model.get("temperature", 1.0)) if sampling else 0.0


_FIELDS = tuple(field.name for field in fields(SamplingParams))  # asked once: every call of generate goes through them


def _model_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling values of a generation_config.json, checked like a caller's."""
    if not isinstance(defaults.get("do_sample", False), bool):
        raise ModelFormatError(f"generation_config.json: do_sample is {shown(defaults['do_sample'])}")
    try:
        return {name: checked(name, defaults[name]) for name in _FROM_MODEL if defaults.get(name) is not None}
    except InvalidArgumentError as error:
        raise ModelFormatError(f"generation_config.json: {error}") from None
