"""Sampled tokens -> text: what one request has said.

The sampler's list of outputs is what happened; the text is read from it and can be read again. A reading that an
exception tore (Ctrl-C, anywhere) is thrown away and done anew from the first token, with the same result.
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


class _Reading:
    """The text of outputs[:n_read], and one piece a token."""

    __slots__ = ("finish_reason", "is_torn", "n_read", "pieces", "stop_reason", "text", "words")

    def __init__(self, output: Output) -> None:
        params = output.params
        self.words = OutputText(
            output.tokenizer,
            output.stops,
            skip_special_tokens=params.skip_special_tokens,
            include_stop_str=params.include_stop_str_in_output,
            shown_special=output.shown_special,
        )
        self.n_read = 0
        self.text = ""
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
    shown_special  special tokens that the text shows whatever skip_special_tokens says
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
        shown_special: frozenset[int] = frozenset(),
    ) -> None:
        self.params = params
        self.shown_special = shown_special
        self.tokenizer = tokenizer
        self.stops = stops
        self.cached_tokens = 0
        self.drafted_tokens = self.accepted_tokens = 0
        self.started = time.monotonic()
        self._sampler = sampler
        self._prompt_tokens = prompt_tokens
        self._most = min(params.max_tokens or n_ctx, n_ctx - prompt_tokens)
        self._end_ids = frozenset(end_ids)
        self._stop_ids = frozenset(params.stop_token_ids)
        self._forced: FinishReason | None = None
        self._first_token_at = self._last_token_at = self.started
        self._reading = _Reading(self)

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while there is more to come, or to read again."""
        return None if self._reading.is_torn else self._reading.finish_reason

    @property
    def pieces(self) -> list[Piece]:
        """A piece a token so far; the last one of a finished output carries the result."""
        return self._reading.pieces

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end it."""
        return self._end_ids | self._stop_ids

    @property
    def n_left(self) -> int:
        """Tokens that may still come."""
        return self._most - len(self._sampler.outputs)

    def stop(self, reason: FinishReason) -> None:
        """The next reading ends here, after what has been sampled."""
        self._forced = reason

    def catch_up(self) -> None:
        """Read what has been sampled since."""
        reading, outputs = self._reading, self._sampler.outputs
        if reading.is_torn:
            reading = _Reading(self)
        elif reading.n_read == len(outputs) and self._forced is None:
            return
        reading.is_torn = True
        if reading.n_read < len(outputs):
            self._last_token_at = time.monotonic()
            if self._first_token_at == self.started:
                self._first_token_at = self._last_token_at
        while reading.finish_reason is None and reading.n_read < len(outputs):
            self._read(reading, outputs[reading.n_read])
        if reading.finish_reason is None and self._forced is not None:
            self._append(reading, reading.finish(self._forced), None, None)
        reading.is_torn = False
        self._reading = reading

    def _read(self, reading: _Reading, token: int) -> None:
        index = reading.n_read
        reading.n_read += 1
        logprob = None
        if self.params.logprobs is not None:
            logprob = self._logprobs(index, index + 1)[0]
        if token in self._end_ids or token in self._stop_ids:
            reading.stop_reason = token if token in self._stop_ids else None
            text = reading.finish("stop")
        else:
            text = reading.push(token)
            if reading.finish_reason is None and reading.n_read >= self._most:
                text += reading.finish("length")
        self._append(reading, text, token, logprob)

    def _append(self, reading: _Reading, text: str, token: int | None, logprob: TokenLogprob | None) -> None:
        reading.text += text
        result = None if reading.finish_reason is None else self._result(reading)
        reading.pieces.append(Piece(text, token, logprob, result))

    def _result(self, reading: _Reading) -> Generation:
        assert reading.finish_reason is not None
        logprobs = None
        if self.params.logprobs is not None:
            logprobs = self._logprobs(0, reading.n_read)
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
            reading.text,
            list(self._sampler.outputs[: reading.n_read]),
            reading.finish_reason,
            reading.stop_reason,
            self.params.seed,
            logprobs,
            timings,
        )

    def _logprobs(self, begin: int, end: int) -> list[TokenLogprob]:
        assert self._sampler.logprobs is not None
        return [TokenLogprob(*entry) for entry in self._sampler.logprobs[begin:end] if entry is not None]
