"""Beam search in chat and text completions, as vLLM's server has it: `n` beams go on together and are the outputs, best first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyengine.beam import MAX_BEAM_WIDTH, MAX_LENGTH_PENALTY, checked_length_penalty, checked_stopping
from pyengine.errors import InvalidArgumentError
from pyengine.run.beam_search import BeamRequest, BeamSearch, EarlyStopping
from pyengine.serve import payload
from pyengine.serve.errors import bad_request
from pyengine.serve.fields import BOOLEAN, Fields, Kind, Table

if TYPE_CHECKING:
    from pyengine.run.jobs import Job
    from pyengine.sampling import SamplingParams
    from pyengine.serve.models import ServedModel


@dataclass(frozen=True, slots=True)
class Beams:
    """What Engine.beam_search takes and sampling does not."""

    length_penalty: float
    early_stopping: EarlyStopping

    def requests(
        self, model: ServedModel, job: Job, prompts: Sequence[list[int]], params: SamplingParams, **options: Any
    ) -> list[BeamRequest]:
        """For the engine: a search for each prompt, of params.n beams. params: what it says beside that of ends and of text."""
        width = params.n or 1
        requests = []
        for ids in prompts:
            _, lanes = model.engine.beam_requests(
                job,
                ids,
                beam_width=width,
                n=width,
                max_tokens=params.max_tokens,
                length_penalty=self.length_penalty,
                early_stopping=self.early_stopping,
                stop=params.stop,
                stop_token_ids=params.stop_token_ids,
                include_stop_str_in_output=params.include_stop_str_in_output,
                ignore_eos=params.ignore_eos,
                skip_special_tokens=params.skip_special_tokens,
                timeout=params.timeout,
                structured_outputs=params.structured_outputs,
                adapter=model.adapter,
                **options,
            )
            requests += lanes
        return requests


def usage(searches: Sequence[BeamSearch]) -> dict[str, Any]:
    """Of searches that are done."""
    timings = [search.timings for search in searches]
    return payload.usage_of(
        sum(one.prompt_tokens for one in timings),
        sum(one.cached_tokens for one in timings),
        sum(one.generated_tokens for one in timings),
    )


# -------------------------------------------------------------------- parsed


def _kind(schema: dict[str, Any], check: Callable[[object], Any], default: Any) -> Kind:
    """Of a field that is a parameter of Engine.beam_search."""

    def read(value: Any, path: str) -> Any:
        try:
            return check(value)
        except InvalidArgumentError as error:
            raise bad_request(str(error), path) from None

    return Kind(schema, read, default)


_PENALTY = {"type": "number", "minimum": -MAX_LENGTH_PENALTY, "maximum": MAX_LENGTH_PENALTY}
BEAMS: Table = {
    "use_beam_search": BOOLEAN,
    "length_penalty": _kind(_PENALTY, checked_length_penalty, 1.0),
    "early_stopping": _kind({"enum": [True, False, "never"]}, checked_stopping, False),
}

# What does not go with beams: why, and the values that ask for nothing else.
_OWN = "beams go by the model's own probabilities"
_WITHOUT: dict[str, tuple[str, tuple[Any, ...]]] = {
    "stream": ("which beam is best shows at the end", (False,)),
    "logprobs": ("a choice has the sum, cumulative_logprob", (False,)),
    "top_logprobs": ("a choice has the sum, cumulative_logprob", (0,)),
    "temperature": (_OWN, (0.0, 1.0)),
    "top_k": (_OWN, (0, -1)),
    "top_p": (_OWN, (1.0,)),
    "min_p": (_OWN, (0.0,)),
    "typical_p": (_OWN, (1.0,)),
    "repetition_penalty": (_OWN, (1.0,)),
    "repeat_penalty": (_OWN, (1.0,)),
    "frequency_penalty": (_OWN, (0.0,)),
    "presence_penalty": (_OWN, (0.0,)),
    "logit_bias": (_OWN, ({},)),
    "allowed_token_ids": (_OWN, ()),
    "bad_token_ids": (_OWN, ((),)),
    "bad_words": (_OWN, ((),)),
    "no_repeat_ngram_size": (_OWN, (0,)),
    "top_n_sigma": (_OWN, (0.0, -1.0)),
    "dynatemp_range": (_OWN, (0.0,)),
    "xtc_probability": (_OWN, (0.0,)),
    "dry_multiplier": (_OWN, (0.0,)),
    "min_tokens": (_OWN, (0,)),
    "token_healing": ("beams go on from the prompt as it is", (False,)),
}


def beams_of(fields: Fields, model: ServedModel) -> Beams | None:
    """None if a request does not ask for them; to be called while its other fields are not taken. Raises HTTPError."""
    penalty, stopping = fields.take("length_penalty"), fields.take("early_stopping")
    if not fields.take("use_beam_search"):
        for name, value, default in (("length_penalty", penalty, 1.0), ("early_stopping", stopping, False)):
            if value != default:
                raise bad_request(f"{name} goes with use_beam_search", name)
        return None
    for name, (why, neutral) in _WITHOUT.items():
        value = fields.peek(name) if fields.has(name) else None
        if value is not None and not any(value == one and type(value) is type(one) for one in neutral):
            raise bad_request(f"{name} is not supported with use_beam_search: {why}", name, "unsupported_parameter")
    width, most = fields.peek("n") if fields.has("n") else 1, min(MAX_BEAM_WIDTH, model.engine.max_sequences)
    if width > most:
        raise bad_request(f"n is {width}: with use_beam_search so many beams go on together, and here at most {most} can", "n")
    return Beams(penalty, stopping)
