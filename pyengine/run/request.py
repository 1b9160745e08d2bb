"""Requests: tokens on their way through the engine.

A request is its tokens and how many of them are computed, and the second number is not kept here: it is the length of
its sequence, which the C core counts. `next_row` is the position whose logits the request waits for. That is all the
scheduler needs to know, and the one rule covers prefill, a prompt in chunks, decode, and whatever will propose several
tokens at a time.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pyengine import fork
from pyengine._sampler import Sampler, Sequences
from pyengine.arguments import shown
from pyengine.errors import InvalidArgumentError
from pyengine.run.output import Output

if TYPE_CHECKING:
    from pyengine import _core
    from pyengine._draft import Drafter
    from pyengine.results import Generation, Piece
    from pyengine.run.callbacks import Callbacks, Edited
    from pyengine.run.guide import Guide
    from pyengine.run.proposer import DraftState
    from pyengine.sampling import ResolvedParams
    from pyengine.text.healing import Healing
    from pyengine.text.stops import StopStrings
    from pyengine.text.tokenizer import Tokenizer

_numbers = itertools.count()
# What a forward computes of a position (pe_want of csrc/pyengine.h).
LOGITS, HIDDEN = 1, 2
# Unread pieces after which a stream pauses: an iterator that nobody asks anything must not compute on.
MAX_UNREAD = 32


class Caller:
    """Whoever waits for requests. The scheduler knows it weakly: requests whose caller is gone are dropped, however it
    went."""

    __slots__ = ("__weakref__",)


class Request(ABC):
    """What every kind of request has.

    sequence  the keys and values of its first tokens, None before it starts (or after it had to make room for others)
    adapter   what changes the model's products for it, None = nothing; `salt` keeps its keys and values apart
    error     what ended it, for its caller to raise
    """

    keep = True  # its pages stay cached for later texts that begin alike
    interactive = False  # somebody reads along: short steps
    row_kind = LOGITS  # what it wants of a position: LOGITS, HIDDEN or both
    n_places = 1  # of sequences, which it and those that go with it take, so that they run together

    def __init__(
        self, caller: Caller, *, salt: bytes, deadline: float | None, adapter: _core.Adapter | None = None
    ) -> None:
        self.number = next(_numbers)
        self.caller = weakref.ref(caller)
        self.salt = salt
        self.adapter = adapter
        self.deadline = deadline
        self.sequence: _core.Sequence | None = None
        self.error: BaseException | None = None
        self.is_started = False
        self.thread = threading.get_ident()  # of its caller, as far as a fork is concerned

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """Tokens known so far."""

    @property
    @abstractmethod
    def next_row(self) -> int:
        """The first position whose row is still wanted."""

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether nothing more is computed for it."""

    @property
    def has_place(self) -> bool:
        """Whether its place is taken already."""
        return self.sequence is not None

    @property
    def waiting_tokens(self) -> int:
        """Tokens of its prompt, while nothing has come of them. Any thread may ask."""
        return 0 if self.is_done else self.n_tokens

    @property
    def is_paused(self) -> bool:
        """Whether its caller should read before more is computed."""
        return False

    @property
    def can_go_on(self) -> bool:
        """Whether steps can compute something for it, or will when others have come first. Any thread may ask, in a step, too."""
        return not self.is_done and not self.is_paused

    @abstractmethod
    def tokens(self, begin: int, end: int) -> Sequence[int]:
        """Tokens [begin, end)."""

    @abstractmethod
    def wants(self, begin: int, end: int) -> bytes:
        """For each position of [begin, end): `row_kind` if its row is wanted, else 0."""

    def max_grant(self, begin: int) -> int:
        """The most tokens from `begin` on that one step should compute."""
        return self.n_tokens - begin

    def n_known(self, context: _core.Context) -> int:
        """How many of the tokens before `next_row` a new sequence would hold."""
        return context.match_length(self.tokens(0, self.next_row), self.salt)

    def new_sequence(self, context: _core.Context) -> _core.Sequence:
        """What it starts with: as many of its tokens as are known."""
        return context.sequence_match(self.tokens(0, self.next_row), self.salt, keep=self.keep)

    def note_cached(self, n_tokens: int) -> None:
        """So many of its first tokens were found in the cache."""

    def rows(self, begin: int, end: int) -> Sequence[int]:
        """The positions of [begin, end) whose rows it takes itself, ascending; none of a request that is sampled."""
        return ()

    def take_row(self, position: int, row: memoryview) -> None:
        """One of these rows, which is valid during the call. What it raises is the request's error."""

    def catch_up(self) -> None:
        """Make of what was sampled what its caller will read."""

    def time_out(self) -> None:
        """Its deadline has passed."""

    def let_go(self) -> None:
        """Nothing more is computed for it."""
        self.sequence = None


class GenerationRequest(Request):
    """One output of one prompt. Its sampler holds what was sampled, `output` what that says."""

    def __init__(
        self,
        caller: Caller,
        prompt: Sequence[int],
        params: ResolvedParams,
        stops: StopStrings,
        *,
        index: int,
        tokenizer: Tokenizer,
        vocab_size: int,
        n_ctx: int,
        end_ids: tuple[int, ...],
        salt: bytes,
        interactive: bool,
        adapter: _core.Adapter | None = None,
        guide: Guide | None = None,
        healing: Healing | None = None,
        shown_special: frozenset[int] = frozenset(),
        bad_sequences: Sequences | Sequence[Sequence[int]] = (),
        breakers: Sequences | Sequence[Sequence[int]] = (),
    ) -> None:
        self.prompt = prompt
        self.params = params
        self.drafter: Drafter | None = None
        self.draft_state: DraftState | None = None  # of the draft model or head
        self.may_draft = params.speculative.max_draft > 0
        end_ids = () if params.ignore_eos else end_ids
        self.sampler = Sampler(
            params, vocab_size, end_ids=end_ids, bad_sequences=bad_sequences, breakers=breakers, sample_index=index
        )
        if params.repetition_penalty != 1.0 or params.dry_multiplier or params.no_repeat_ngram_size:
            self.sampler.accept_prompt(array("i", prompt))
        self.output = Output(
            self.sampler,
            params,
            tokenizer,
            stops,
            prompt_tokens=len(prompt),
            n_ctx=n_ctx,
            end_ids=end_ids,
            interactive=interactive,
            shown_special=shown_special,
            n_healed=0 if healing is None else healing.n_bytes,
        )
        self.interactive = interactive
        self.guide = guide
        self.healing = healing
        self.callbacks: Callbacks | None = None
        if params.logits_processor or params.stopping_criteria:
            with fork.importing:
                from pyengine.run.callbacks import Callbacks

            self.callbacks = Callbacks(prompt, params)
            self.may_draft = False  # they are asked once a token, about what has been said
        self.n_taken = 0  # pieces that the caller has read
        deadline = None if params.timeout is None else self.output.started + params.timeout
        super().__init__(caller, salt=salt, deadline=deadline, adapter=adapter)

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) + len(self.sampler.outputs)

    @property
    def next_row(self) -> int:
        return len(self.prompt) + len(self.sampler.outputs) - 1

    @property
    def is_done(self) -> bool:
        return self.error is not None or self.output.finish_reason is not None

    @property
    def waiting_tokens(self) -> int:
        return 0 if self.sampler.outputs else super().waiting_tokens

    @property
    def max_draft(self) -> int:
        """Guesses that may be of use: one token is sampled after them."""
        if not self.may_draft or not (self.healing is None or self.healing.is_over(self.sampler.outputs)):
            return 0
        return min(self.params.speculative.max_draft, self.output.n_left - 1)

    @property
    def result(self) -> Generation:
        """Of a request that is done without an error."""
        result = self.output.pieces[-1].result
        assert result is not None
        return result

    @property
    def has_news(self) -> bool:
        """Whether there is a piece to read, or an error to raise."""
        return self.error is not None or len(self.output.pieces) > self.n_taken

    @property
    def is_paused(self) -> bool:
        return self.interactive and len(self.output.pieces) - self.n_taken >= MAX_UNREAD

    def take(self) -> Piece:
        """The next piece, which is there (`has_news`). Raises the request's error after its last piece."""
        pieces = self.output.pieces
        if self.n_taken == len(pieces):
            assert self.error is not None
            raise self.error
        self.n_taken += 1
        return pieces[self.n_taken - 1]

    def tokens(self, begin: int, end: int) -> Sequence[int]:
        n = len(self.prompt)
        if begin >= n:
            return self.sampler.outputs[begin - n : end - n]
        return [*self.prompt[begin:end], *self.sampler.outputs[: max(0, end - n)]]

    def wants(self, begin: int, end: int) -> bytes:
        return bytes(end - begin) if end < self.n_tokens else bytes(end - begin - 1) + bytes((self.row_kind,))

    def note_cached(self, n_tokens: int) -> None:
        if not self.is_started:
            self.output.cached_tokens = n_tokens

    def masks(self, draft: Sequence[int]) -> Sequence[array[int] | None] | None:
        """Which tokens may come next, and after each guess of `draft`, as far as the grammar can follow it; None = all."""
        if self.healing is not None and not self.healing.is_over(self.sampler.outputs):
            return [self.healing.mask(self.sampler.outputs)]  # there is no draft, and no grammar
        if self.guide is None:
            return None
        try:
            masks = self.guide.masks(self.sampler.outputs, draft)
            if len(masks) <= len(draft):
                self.may_draft = False  # guesses must not cost a text its grammar
            return masks
        except Exception as error:  # of this request's grammar
            self.error = error
            return None

    def edit(self, row: _core.RowView, masks: Sequence[array[int] | None] | None) -> Edited | None:
        """What its caller's functions make of the row of logits for its next token, whose masks these are. None if one of them
        ended it, or raised."""
        assert self.callbacks is not None
        try:
            edited = self.callbacks.edit(self.sampler.outputs, row, None if masks is None else masks[0])
        except BaseException as error:  # for its caller alone
            is_main = threading.get_ident() == threading.main_thread().ident
            if is_main and not isinstance(error, Exception):  # Ctrl-C, or what another signal's handler raises
                raise
            self.error = error
            return None
        if edited is None:
            self.output.stop("stop")
            self.catch_up()
        return edited

    def catch_up(self) -> None:
        try:
            self.output.catch_up()
        except Exception as error:  # of this request's text, for its caller alone
            self.error = error

    def time_out(self) -> None:
        self.output.stop("timeout")
        self.catch_up()

    def let_go(self) -> None:
        super().let_go()
        self.drafter = self.draft_state = None


class RowsRequest(Request):
    """Logits, or final hidden states, of given positions of a given text: `take(position, row)` is called with each, ascending,
    by whoever steps; the view is valid during the call. keep: for texts that begin alike; one of them that starts meanwhile waits
    for it."""

    def __init__(
        self,
        caller: Caller,
        tokens: Sequence[int],
        positions: Sequence[int],
        take: Callable[[int, memoryview], None],
        *,
        max_rows: int,
        salt: bytes,
        row_kind: int = LOGITS,
        adapter: _core.Adapter | None = None,
        keep: bool = False,
    ) -> None:
        super().__init__(caller, salt=salt, deadline=None, adapter=adapter)
        self.keep = keep
        self.row_kind = row_kind
        self._tokens = tokens
        self._positions = positions
        self._wanted = frozenset(positions)
        self._max_rows = max_rows
        self.take = take
        self.n_taken = 0  # of the positions
        self.n_cached = 0  # of its first tokens, found in the cache

    @property
    def n_tokens(self) -> int:
        # what comes after the last wanted row is not computed
        return self._positions[-1] + 1 if self._positions else 0

    @property
    def next_row(self) -> int:
        return self._positions[self.n_taken]

    @property
    def is_done(self) -> bool:
        return self.error is not None or self.n_taken == len(self._positions)

    def tokens(self, begin: int, end: int) -> Sequence[int]:
        return self._tokens[begin:end]

    def wants(self, begin: int, end: int) -> bytes:
        taken = self.next_row  # what lies before may be computed again, for its keys and values
        return bytes(self.row_kind if position >= taken and position in self._wanted else 0 for position in range(begin, end))

    def note_cached(self, n_tokens: int) -> None:
        if not self.is_started:
            self.n_cached = n_tokens

    def max_grant(self, begin: int) -> int:
        last = min(self.n_taken + self._max_rows, len(self._positions)) - 1
        return self._positions[last] + 1 - begin

    def rows(self, begin: int, end: int) -> list[int]:
        return [position for position in range(max(begin, self.next_row), end) if position in self._wanted]

    def take_row(self, position: int, row: memoryview) -> None:
        self.take(position, row)
        self.n_taken += 1


def check_salt(salt: str | bytes | None, adapter: bytes = b"") -> bytes:
    """16 bytes that stand for a caller's salt and for the digest (16 bytes) of an adapter; texts under different salts, or with
    different adapters, share no cached page. Raises InvalidArgumentError."""
    if salt is not None and (not isinstance(salt, (str, bytes)) or not salt):
        raise InvalidArgumentError(f"cache_salt must be a string that is not empty, not {shown(salt)}")
    if salt is None and not adapter:
        return bytes(16)
    import hashlib

    data = salt.encode("utf-8", "surrogatepass") if isinstance(salt, str) else salt or b""
    return hashlib.blake2b(data, digest_size=16, person=adapter).digest()
