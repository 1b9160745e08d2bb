"""Sampled tokens -> text: what one request has said.

The sampler's list of outputs is what happened; the text is read from it and can be read again. A reading that an
exception tore (Ctrl-C, anywhere) is thrown away and done anew from the first token, with the same result.

Text that nobody needs before its end is read at its end, or many tokens at once: until then the ids alone say whether the output
goes on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pyengine.results import FinishReason, Generation, Piece, Timings, TokenLogprob
from pyengine.text.output import OutputText

if TYPE_CHECKING:
    from pyengine._sampler import Sampler
    from pyengine.sampling import ResolvedParams
    from pyengine.text.stops import StopStrings
    from pyengine.text.tokenizer import Tokenizer


# Tokens that wait to be read at most: they take half a millisecond, and streams beside them wait so long.
READ_AT_ONCE = 256


class _Reading:
    """The text of outputs[:n_read], and one piece a token."""

    __slots__ = ("finish_reason", "is_torn", "n_read", "pieces", "stop_reason", "words")

    def __init__(self, output: Output) -> None:
        params = output.params
        self.words = OutputText(
            output.tokenizer,
            output.stops,
            skip_special_tokens=params.skip_special_tokens,
            include_stop_str=params.include_stop_str_in_output,
            shown_special=output.shown_special,
            n_healed=output.n_healed,
        )
        self.n_read = 0
        self.pieces: list[Piece] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.is_torn = False

    def push(self, token: int) -> str:
        """Text that is certain after `token`."""
        text = self.words.push(token)
        if self.words.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self.words.matched
        return text

    def finish(self, reason: FinishReason) -> str:
        """Flush what was held back."""
        text = self.words.finish()
        if self.words.matched is None:
            self.finish_reason = reason
        else:
            self.finish_reason, self.stop_reason = "stop", self.words.matched
        return text


class Output:
    """One output in progress.

    stops          the stop strings of params
    prompt_tokens  length of the prompt
    n_ctx          positions of the context
    end_ids        the model's end-of-text tokens, those that count for this request
    interactive    somebody reads along
    shown_special  special tokens that the text shows whatever skip_special_tokens says
    n_healed       bytes at its beginning that are the end of the prompt, said again (text/healing.py)

    Attributes: `finish_reason`, None while there is more to come, or to read again; `ends`, the tokens that end it.
    """

    def __init__(
        self,
        sampler: Sampler,
        params: ResolvedParams,
        tokenizer: Tokenizer,
        stops: StopStrings,
        *,
        prompt_tokens: int,
        n_ctx: int,
        end_ids: tuple[int, ...],
        interactive: bool = False,
        shown_special: frozenset[int] = frozenset(),
        n_healed: int = 0,
    ) -> None:
        self.params = params
        self.n_healed = n_healed
        self.shown_special = shown_special
        self.tokenizer = tokenizer
        self.stops = stops
        self.cached_tokens = 0
        self.drafted_tokens = self.accepted_tokens = 0
        self.started = time.monotonic()
        self._sampler = sampler
        self._prompt_tokens = prompt_tokens
        self._most = min(params.max_tokens or n_ctx, n_ctx - prompt_tokens)
        self._stop_ids = frozenset(params.stop_token_ids)
        self.ends = self._stop_ids.union(end_ids)
        self.finish_reason: FinishReason | None = None
        self._forced: FinishReason | None = None
        self._first_token_at = self._last_token_at = self.started
        self._reads_along = interactive or bool(stops)
        self._n_seen = 0  # outputs that `catch_up` knows
        self._reading = _Reading(self)

    @property
    def pieces(self) -> list[Piece]:
        """A piece for each token that was read so far; the last one of a finished output carries the result."""
        return self._reading.pieces

    @property
    def n_left(self) -> int:
        """Tokens that may still come."""
        return self._most - len(self._sampler.outputs)

    def stop(self, reason: FinishReason) -> None:
        """The next reading ends here, after what has been sampled."""
        self._forced = reason

    def catch_up(self) -> None:
        """Take note of what has been sampled since, and read it if its text is needed now. After an exception: once more."""
        outputs = self._sampler.outputs
        n = len(outputs)
        if self.finish_reason is not None or (n == self._n_seen and self._forced is None):
            return
        if n > self._n_seen:
            self._last_token_at = time.monotonic()
            if self._n_seen == 0:
                self._first_token_at = self._last_token_at
        if self._reads_along or self._is_over(outputs) or n - self._reading.n_read >= READ_AT_ONCE:
            self._read_on(outputs)
        self._n_seen = n

    def _is_over(self, outputs: list[int]) -> bool:
        """Whether the ids alone end it, as they do without stop strings."""
        at_limit = len(outputs) >= self._most
        return at_limit or self._forced is not None or not self.ends.isdisjoint(outputs[self._n_seen :])

    def _read_on(self, outputs: list[int]) -> None:
        reading = _Reading(self) if self._reading.is_torn else self._reading
        reading.is_torn = True
        while reading.finish_reason is None and reading.n_read < len(outputs):
            self._read(reading, outputs[reading.n_read])
        if reading.finish_reason is None and self._forced is not None:
            self._append(reading, reading.finish(self._forced), None, None)
        reading.is_torn = False
        self._reading = reading
        self.finish_reason = reading.finish_reason

    def _read(self, reading: _Reading, token: int) -> None:
        index = reading.n_read
        reading.n_read += 1
        logprobs = self._sampler.logprobs
        entry = None if logprobs is None else logprobs[index]
        logprob = None if entry is None else TokenLogprob(*entry)
        if token in self.ends:
            reading.stop_reason = token if token in self._stop_ids else None
            text = reading.finish("stop")
        else:
            text = reading.push(token)
            if reading.finish_reason is None and reading.n_read >= self._most:
                text += reading.finish("length")
        self._append(reading, text, token, logprob)

    def _append(self, reading: _Reading, text: str, token: int | None, logprob: TokenLogprob | None) -> None:
        result = None if reading.finish_reason is None else self._result(reading, text, logprob)
        reading.pieces.append(Piece(text, token, logprob, result))

    def _result(self, reading: _Reading, text: str, logprob: TokenLogprob | None) -> Generation:
        """text, logprob: of its last piece."""
        assert reading.finish_reason is not None
        logprobs = None
        if self.params.logprobs is not None:
            every = [*(piece.logprob for piece in reading.pieces), logprob]
            logprobs = [one for one in every if one is not None]
        timings = Timings(
            self._prompt_tokens,
            self.cached_tokens,
            reading.n_read,
            self._first_token_at - self.started,
            self._last_token_at - self.started,
            self.drafted_tokens,
            self.accepted_tokens,
        )
        return Generation(
            "".join(piece.text for piece in reading.pieces) + text,
            self._sampler.outputs[: reading.n_read],
            reading.finish_reason,
            reading.stop_reason,
            self.params.seed,
            logprobs,
            timings,
        )
