"""What generation and scoring return."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length", "timeout"]


class TokenLogprob(NamedTuple):
    """Natural log-probability of one token under the model, and of the most probable alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """Counts and seconds of one generation. A batch shares its steps, so its members' seconds overlap."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the cache of earlier sequences
    generated_tokens: int
    time_to_first_token: float  # seconds from the start of the call
    total: float  # seconds from the start of the call to the last token
    drafted_tokens: int = 0  # guessed ahead and computed
    accepted_tokens: int = 0  # of these, how many came true

    @property
    def prompt_tokens_per_second(self) -> float:
        """Rate of the prompt tokens that were computed (cached ones are not)."""
        return (self.prompt_tokens - self.cached_tokens) / max(self.time_to_first_token, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        """Rate of the tokens after the first; 0 if there is no second one."""
        if self.generated_tokens < 2:
            return 0.0
        return (self.generated_tokens - 1) / max(self.total - self.time_to_first_token, 1e-9)


@dataclass(frozen=True, slots=True)
class Generation:
    """One finished output.

    text           what the tokens say, without special tokens and (unless asked for) without the stop string
    tokens         every id that was sampled, the one that ended the text included
    finish_reason  "stop" (end of text, stop token or string, stopping_criteria), "length" (max_tokens or the context), "timeout"
    stop_reason    the stop string or token id that ended it, None for end of text and other reasons
    seed           what reproduces this output together with the prompt and the parameters
    logprobs       one entry a token, if they were asked for
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    seed: int
    logprobs: list[TokenLogprob] | None
    timings: Timings

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        timings = self.timings
        return {
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
            "seed": self.seed,
            "logprobs": None if self.logprobs is None else [entry._asdict() for entry in self.logprobs],
            "timings": {
                "prompt_tokens": timings.prompt_tokens,
                "cached_tokens": timings.cached_tokens,
                "generated_tokens": timings.generated_tokens,
                "time_to_first_token_s": timings.time_to_first_token,
                "total_s": timings.total,
                "drafted_tokens": timings.drafted_tokens,
                "accepted_tokens": timings.accepted_tokens,
                "prompt_tokens_per_second": timings.prompt_tokens_per_second,
                "tokens_per_second": timings.tokens_per_second,
            },
        }


@dataclass(frozen=True, slots=True)
class BeamHypothesis:
    """One output of a beam search.

    text, tokens, finish_reason, stop_reason   as of a Generation
    cumulative_logprob  sum of the tokens' log-probabilities (natural logarithm)
    score               what outputs are ordered by: cumulative_logprob / (number of tokens ** length_penalty)
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    cumulative_logprob: float
    score: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """A document of a ranking: its place among those that were given, its score from 0 to 1, and its text."""

    index: int
    score: float
    document: str


class Piece(NamedTuple):
    """A step of a stream: whole characters that are certain to stay, possibly none; the last piece carries the result."""

    text: str
    token: int | None
    logprob: TokenLogprob | None = None
    result: Generation | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probabilities of a given text: logprobs[i] is that of tokens[i] after tokens[:i] (natural logarithm), None for
    the first token and for those that were not asked for."""

    tokens: list[int]
    logprobs: list[float | None]

    @property
    def total(self) -> float:
        """Sum of the log-probabilities, in nats."""
        return math.fsum(value for value in self.logprobs if value is not None)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability; infinite beyond what a float holds, NaN if no token was scored."""
        n_scored = sum(value is not None for value in self.logprobs)
        if not n_scored:
            return math.nan
        mean = -self.total / n_scored
        return math.exp(mean) if mean < math.log(sys.float_info.max) else math.inf
