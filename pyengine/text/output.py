"""The text of one output: tokens in, text out, up to a stop string."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

from pyengine.text.decoder import IncrementalDecoder
from pyengine.text.stops import StopMatcher, StopStrings

if TYPE_CHECKING:
    from pyengine.text.tokenizer import Tokenizer


class OutputText:
    """`push` returns the text that is certain after a token, `finish` what was held back; `matched` is the stop string that ended
    the text, or None. A stop string may spell special tokens, whether the text shows them or not. `shown_special`: those that it
    shows whatever skip_special_tokens says. `n_healed`: bytes at the beginning that are not of the text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: StopStrings,
        *,
        skip_special_tokens: bool,
        include_stop_str: bool,
        shown_special: frozenset[int] = frozenset(),
        n_healed: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids - shown_special if skip_special_tokens else frozenset()
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens=False, continuation=True, n_healed=n_healed)
        self._stops = StopMatcher(stops, include_stop_str=include_stop_str)

    @property
    def matched(self) -> str | None:
        return self._stops.matched

    def copy(self) -> OutputText:
        """Another one that goes on from the same text."""
        twin = copy(self)
        twin._decoder, twin._stops = self._decoder.copy(), copy(self._stops)
        return twin

    def push(self, id_: int) -> str:
        if id_ in self._hidden:
            return self._stops.push(self._tokenizer.token_text(id_) or "", hidden=True)
        return self._stops.push(self._decoder.push(id_))

    def finish(self) -> str:
        text = self._stops.push(self._decoder.finish())
        return text if self._stops.matched is not None else text + self._stops.finish()
