"""Names and types of keyword options, for editors and type checkers: those that generate, stream and chat take, which are the
fields of `SamplingParams` (sampling.py says what each means) and the aliases that it knows; those of beam_search (beam.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from pyengine.run.beam_search import EarlyStopping
    from pyengine.sampling import Drafting, LogitsProcessor, StoppingCriteria, StructuredOutputs


class SamplingOptions(TypedDict, total=False):
    """`SamplingParams`, field by field."""

    n: int | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    top_n_sigma: float | None
    dynatemp_range: float | None
    dynatemp_exponent: float | None
    xtc_probability: float | None
    xtc_threshold: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repeat_last_n: int | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_penalty_last_n: int | None
    dry_sequence_breakers: str | Sequence[str] | None
    no_repeat_ngram_size: int | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    bad_token_ids: Sequence[int] | None
    bad_words: str | Sequence[str] | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    ignore_eos: bool | None
    seed: int | None
    logprobs: int | None
    skip_special_tokens: bool | None
    timeout: float | None
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None
    stopping_criteria: StoppingCriteria | Sequence[StoppingCriteria] | None
    token_healing: bool | None
    speculative: str | Mapping[str, Any] | Drafting | None

    max_new_tokens: int | None
    min_new_tokens: int | None
    repeat_penalty: float | None
    stop_strings: str | Sequence[str] | None
    rng_seed: int | None
    num_return_sequences: int | None
    max_time: float | None
    temp: float | None
    penalty_last_n: int | None


class BeamOptions(TypedDict, total=False):
    """What `beam_search` takes beside a prompt."""

    beam_width: int
    n: int
    max_tokens: int | None
    length_penalty: float
    early_stopping: EarlyStopping
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    timeout: float | None
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None
    parse_special: bool
    adapter: str | None
    cache_salt: str | None
