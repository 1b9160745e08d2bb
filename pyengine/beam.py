"""What an engine finds by beam search: the outputs of high probability, instead of one that is sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyengine import fork
from pyengine._sampler import MAX_TOP_LOGPROBS
from pyengine.arguments import integer, number, shown
from pyengine.engine_base import EngineBase
from pyengine.errors import InvalidArgumentError
from pyengine.results import BeamHypothesis
from pyengine.run.request import Caller
from pyengine.run.stream import run_all
from pyengine.text.output import OutputText
from pyengine.text.prompts import Prompt
from pyengine.text.stops import StopStrings

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's own from Python 3.11 on

    from pyengine.run.beam_search import BeamRequest, BeamSearch, EarlyStopping
    from pyengine.sampling import StructuredOutputs
    from pyengine.sampling_options import BeamOptions

MAX_BEAM_WIDTH = MAX_TOP_LOGPROBS // 2  # as many candidates of a beam, and as many that may end
MAX_LENGTH_PENALTY = 10  # a power of the length of any context is a float then


class BeamSearching(EngineBase):
    """The part of an `Engine` that searches."""

    def beam_requests(
        self,
        caller: Caller,
        prompt: Prompt,
        *,
        beam_width: int = 4,
        n: int = 1,
        max_tokens: int | None = None,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        include_stop_str_in_output: bool | None = None,
        ignore_eos: bool | None = None,
        skip_special_tokens: bool | None = None,
        timeout: float | None = None,
        structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None,
        parse_special: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        shown_special: frozenset[int] = frozenset(),
    ) -> tuple[BeamSearch, list[BeamRequest]]:
        """A search as `beam_search` has it, and what the scheduler is to compute for it. shown_special: special tokens that the
        text shows whatever skip_special_tokens says. Raises what beam_search raises."""
        with fork.importing:
            from pyengine.run.beam_search import BeamSearch, Reader, Rules
            from pyengine.sampling import SamplingParams

        ids = self.prompt_ids(prompt, parse_special=parse_special)
        width = integer("beam_width", beam_width, 1, MAX_BEAM_WIDTH)
        if width > self.max_sequences:
            together = f"this engine computes {self.max_sequences} sequences together"
            raise InvalidArgumentError(f"beam_width is {width}, {together}: open it with max_sequences={width}")
        n = integer("n", n, 1, width)
        params = self.resolve(
            SamplingParams(
                max_tokens=max_tokens,
                temperature=0,
                stop=stop,
                stop_token_ids=stop_token_ids,
                include_stop_str_in_output=include_stop_str_in_output,
                ignore_eos=ignore_eos,
                skip_special_tokens=skip_special_tokens,
                timeout=timeout,
                structured_outputs=structured_outputs,
            )
        )
        room = max(1, self.n_ctx - len(ids))  # a whole context has one more token, too
        rules = Rules(
            width,
            room if params.max_tokens is None else min(params.max_tokens, room),
            checked_length_penalty(length_penalty),
            checked_stopping(early_stopping),
        )
        words = OutputText(
            self.tokenizer,
            StopStrings(params.stop),
            skip_special_tokens=params.skip_special_tokens,
            include_stop_str=params.include_stop_str_in_output,
            shown_special=shown_special,
        )
        end_ids = frozenset(() if params.ignore_eos else self.eos_token_ids)
        reader = Reader(end_ids, frozenset(params.stop_token_ids), rules.max_tokens)
        if width + reader.n_ends > MAX_TOP_LOGPROBS:
            most = MAX_TOP_LOGPROBS - width
            raise InvalidArgumentError(
                f"{reader.n_ends} tokens end a text, with a beam_width of {width} at most {most} may"
            )
        core_adapter, salt = self._adapters.of_request(adapter, cache_salt)
        guide = None if params.structured_outputs is None else self.guide(params.structured_outputs)
        search = BeamSearch(ids, rules, reader, words, guide, n)
        return search, search.lanes(caller, salt=salt, adapter=core_adapter, timeout=params.timeout)

    def beam_search(self, prompt: Prompt, **options: Unpack[BeamOptions]) -> list[BeamHypothesis]:
        """The n outputs of the highest scores that beam search finds, best first. An output's score is the sum of its tokens'
        log-probabilities / (their number ** length_penalty).

        beam_width      (4) beams that go on together, 1 to 32, at most the engine's max_sequences: a step computes all, beside
                        other requests. 1 is greedy: the most probable token each time
        n               (1) outputs wanted, at most beam_width. There are fewer if so few tokens have no more outputs
        max_tokens      tokens of an output at most; None = as many as the context holds
        length_penalty  (1.0) above 0 longer outputs gain by their length, 0 = the sum counts alone; -10 to 10
        early_stopping  (False) with beam_width outputs finished the search ends: True: at once; False: when the best beam would
                        not score higher than the last of them if it ended now; "never": if it ended at max_tokens either
        stop, stop_token_ids, include_stop_str_in_output, ignore_eos, skip_special_tokens   as in SamplingParams, for each beam
        timeout         seconds after which the search ends: its beams are outputs as far as they go, finish_reason "timeout"
        structured_outputs   as in SamplingParams: each beam goes on with tokens that may come, whose probabilities stay what they
                        are among all tokens. What max_tokens or timeout cut is incomplete, and says so by its finish_reason
        parse_special, adapter, cache_salt   as in generate

        The model's own probabilities count: there is no temperature, filter, penalty, bias, min_tokens, allowed or bad token, and
        what generation_config.json says of these does not count. Nothing is drawn, so there is no seed. Results are those of
        transformers' generate(num_beams=beam_width, num_return_sequences=n) over the same log-probabilities, and depend on
        nothing that runs beside. Raises what generate raises."""
        caller = Caller()
        search, requests = self.beam_requests(caller, prompt, **options)
        run_all(self._scheduler, requests)
        return search.results


def checked_length_penalty(value: object) -> float:
    """Raises InvalidArgumentError."""
    penalty = number("length_penalty", value)
    if not abs(penalty) <= MAX_LENGTH_PENALTY:
        most = MAX_LENGTH_PENALTY
        raise InvalidArgumentError(f"length_penalty must be in [-{most}, {most}], not {shown(value)}")
    return penalty


def checked_stopping(value: object) -> EarlyStopping:
    """`early_stopping`. Raises InvalidArgumentError."""
    if isinstance(value, str) and value == "never":
        return "never"
    if isinstance(value, bool):
        return value
    raise InvalidArgumentError(f'early_stopping is True, False or "never", not {shown(value)}')
