"""The scheduler: one engine, many requests, one forward a step.

A step walks through the requests, oldest first, and grants each min(what it misses, what is left of the budget) tokens.
The forward appends them, rows whose logits somebody waits for are sampled, and that is all: a request that misses its
whole prompt is a prefill, one that misses a part of it a prefill in chunks, one that misses a token decodes, and a few
guessed tokens may follow that one (speculation.py).

Whoever waits for an output steps, for all: the library has no thread of its own. A caller becomes the leader by taking
the step lock, and the others sleep until there is news. An exception in a step (Ctrl-C in the leader's thread) ends the
leader's call and nothing else: what has been computed is the length of the sequences, what has been sampled stands in
the samplers, and both change in compiled code that no exception can divide, so the next leader goes on from whatever
point was reached.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pyengine import fork
from pyengine._sampler import sample_many
from pyengine._step_lock import StepLock
from pyengine.errors import CancelledError, NotFiniteError, OutOfMemoryError, PyEngineError
from pyengine.format.kv import PAGE_POSITIONS, KvLayout
from pyengine.run.request import HIDDEN, LOGITS, GenerationRequest, Request
from pyengine.run.speculation import Speculation

if TYPE_CHECKING:
    from pyengine import _core

MAX_SEQUENCES = 64
# Prompt tokens in one step: few while somebody reads along, so that no stream waits long; many otherwise.
BUDGET_BESIDE_STREAMS = 128
BUDGET = 1024
# A prompt waits for another that computes so many of its tokens: half of one page costs about what sharing it saves.
WORTH_WAITING_FOR = 32


class Grant(NamedTuple):
    """Tokens [begin, end) of a request, to be computed in this step, and guesses at those after them."""

    request: Request
    begin: int
    end: int
    wants: bytes  # for each, guesses too: the kind of row that is wanted, 0 = none
    draft: tuple[int, ...] = ()


class Running(NamedTuple):
    """A forward that runs, or is about to: what it computes, and how it is ended."""

    grants: Sequence[Grant]
    cancel: Callable[[], None]


def with_rows(grants: list[Grant]) -> Iterator[tuple[Grant, int, int]]:
    """Each grant and the numbers of its first row, among the rows of logits and among those of hidden states."""
    n_logits = n_hidden = 0
    for one in grants:
        yield one, n_logits, n_hidden
        n_both = one.wants.count(LOGITS | HIDDEN)
        n_logits += one.wants.count(LOGITS) + n_both
        n_hidden += one.wants.count(HIDDEN) + n_both


class Scheduler:
    """Requests of one context. Every method but those for callers (`add` to `exclusively`) runs under the step lock."""

    def __init__(self, context: _core.Context, *, max_sequences: int = MAX_SEQUENCES, max_pages: int = 0) -> None:
        self.context = context
        self.n_threads = context.n_threads
        self.max_sequences = max_sequences
        self.max_pages = max_pages
        context.set_max_pages(max_pages)
        self.step_lock = StepLock()
        self.closed = False
        self.speculation = Speculation()
        # Both are changed by single operations only, which no other thread and no exception can divide. To walk through one, take
        # list(….values()): that of items() makes tuples, for which the garbage collector may run, and a stream that it finds is
        # aborted in the middle of the list.
        self._requests: dict[int, Request] = {}  # by number, so oldest first
        self._holders: dict[int, Request] = {}  # those that have a sequence, and maybe some that had one
        self._running: Running | None = None
        self._is_full = False  # pages ran out, and nobody has given any back since
        self._is_torn = False  # a step is under way, or an exception has ended it
        _schedulers.add(self)

    # ------------------------------------------------------------ callers

    def add(self, requests: Iterable[Request]) -> None:
        """From now on steps compute them, in the order of their numbers. They belong to their callers, see `Caller`."""
        for request in requests:
            self._requests[request.number] = request

    def abort(self, requests: Iterable[Request]) -> None:
        """Drop requests, done or not. If one of them is being computed, that forward ends; whoever waits for one looks again."""
        for request in requests:
            self._requests.pop(request.number, None)
            running = self._running  # looked at second: a forward says first what it computes, and then looks who is gone
            if running is not None and any(one.request is request and one.end - one.begin > 1 for one in running.grants):
                running.cancel()
        self.step_lock.notify()
        self._sweep_after()

    def wait(self, ready: Callable[[], bool]) -> None:
        """Return when `ready()`; step, or sleep while another thread steps. Raises PyEngineError on a closed engine."""
        while True:
            news = self.step_lock.news
            if ready():
                return
            try:
                self.step_lock.run(news, self._lead, ready)
            finally:
                self._sweep_after()

    def exclusively(self, function: Callable[[], object]) -> None:
        """Call function() with the step lock, between two steps."""
        try:
            self.step_lock.exclusively(function)
        finally:
            self._sweep_after()

    def _sweep_after(self) -> None:
        """Let go of what was aborted, now, or leave it to whoever has the lock: he looks once more when he has given it back (a
        sweep is such a holder, too), since there may be no next step."""
        while not self._holders.keys() <= self._requests.keys() and self.step_lock.try_run(self.sweep):
            pass

    def _lead(self, ready: Callable[[], bool]) -> None:
        """Step until `ready()`, or until somebody wants the lock who does not step (a fork, a look at the books)."""
        while not ready():
            if self.closed:
                raise PyEngineError("this engine is closed")
            if self.step():
                self.step_lock.notify()
            if self.step_lock.is_wanted:
                return

    # ------------------------------------------------------------ one step

    def step(self) -> bool:
        """One forward for whatever waits. Whether there may be news for other callers."""
        if self._is_torn:  # what it sampled may not have been read
            for request in list(self._requests.values()):
                request.catch_up()
        self._is_torn = True
        is_one_done = self.sweep()
        requests = list(self._requests.values())
        grants = self._grant(requests)
        began = time.perf_counter()
        if grants and self._forward(grants):
            numbered = list(with_rows(grants))
            self._sample(numbered)
            are_decodes = all(one.end - one.begin == 1 for one in grants)
            n_rows = sum(len(one.wants) for one in grants) if are_decodes else 0
            self.speculation.note_step(n_rows, time.perf_counter() - began)
            self._take_rows(numbered)
        is_one_done |= self.sweep()  # before the next step, if there is one: its pages may be wanted
        self._is_torn = False
        return is_one_done or any(request.interactive for request in requests)

    def sweep(self) -> bool:
        """Let go of requests that are done or out of time, or whose caller is gone. Their pages stay cached. Whether there were
        any."""
        is_one_done = False
        now = time.monotonic()  # one moment for all: the lanes of a search end together
        for request in list(self._requests.values()):
            if request.deadline is not None and now >= request.deadline and not request.is_done:
                request.time_out()
            is_left = request.caller() is None
            if request.is_done or is_left:
                if is_left and not request.is_done:  # whoever waits for it all the same must not wait for ever
                    request.error = PyEngineError("nobody holds this request's caller any more, so it is not computed")
                self._requests.pop(request.number, None)
                is_one_done = True
        if not self._holders.keys() <= self._requests.keys():
            for request in list(self._holders.values()):
                if request.number not in self._requests:
                    request.let_go()
                    self._is_full = False
                    self._holders.pop(request.number, None)
        return is_one_done

    # ------------------------------------------------------------ who gets what

    def _grant(self, requests: list[Request]) -> list[Grant]:
        """Tokens for this step: of texts that decode, then of prompts."""
        if any(request.sequence is None for request in requests):
            waiting = [request for request in requests if request.sequence is None and not request.is_paused]
            waiting.sort(key=lambda request: not request.has_place)  # they wait for no place, and others for theirs
            n_places = sum(request.has_place for request in requests)
            self._admit(waiting, [request for request in requests if request.sequence is not None], n_places)
            requests = [request for request in requests if request.sequence is not None]
        decoding: list[tuple[Request, int]] = []
        prefilling: list[tuple[Request, int]] = []
        for request in requests:
            if not request.is_paused:
                begin = self._begin(request)
                (decoding if request.n_tokens - begin == 1 else prefilling).append((request, begin))
        prefills = self._grant_prompts(prefilling, any(request.interactive for request, _ in decoding))
        n_rows = len(decoding) + sum(one.end - one.begin for one in prefills)
        # If pages have run out, guesses must not take what others need.
        drafts = {} if self._is_full else self.speculation.plan([request for request, _ in decoding], n_rows)
        decodes = []
        for request, begin in decoding:
            draft = drafts.get(request.number, ())
            decodes.append(Grant(request, begin, begin + 1, bytes((request.row_kind,)) * (1 + len(draft)), draft))
        return decodes + prefills

    @staticmethod
    def _begin(request: Request) -> int:
        """The first position to compute. Logits that an exception lost are computed again."""
        sequence = request.sequence
        assert sequence is not None
        if sequence.length > request.next_row:
            sequence.truncate(request.next_row)
        return sequence.length

    @staticmethod
    def _grant_prompts(prefilling: list[tuple[Request, int]], beside_streams: bool) -> list[Grant]:
        """Tokens from `begin` on of each (request, begin), oldest first, as far as the budget goes."""
        budget = BUDGET_BESIDE_STREAMS if beside_streams else BUDGET
        grants = []
        for request, begin in prefilling:
            end = begin + min(request.max_grant(begin), budget)
            if end > begin:
                grants.append(Grant(request, begin, end, request.wants(begin, end)))
                budget -= end - begin
        return grants

    def _admit(self, waiting: list[Request], running: list[Request], n_places: int) -> None:
        """Start what there is room for, in this order. n_places of max_sequences are taken. One that waits for another's
        beginning does not keep later ones; one that misses room does, or a search, which takes many places, might never start."""
        for request in waiting:
            n_wanted = 0 if request.has_place else request.n_places
            while n_places + n_wanted > self.max_sequences:
                if not self._preempt_paused(running, alone=True):
                    return
                n_places -= 1
            if self._should_wait_for(request, running):
                continue
            if running and not self._has_pages_for(request, running) and not self._preempt_paused(running):
                return
            n_places += n_wanted
            self._start(request)
            running.append(request)

    def _start(self, request: Request) -> None:
        self._holders[request.number] = request
        self.speculation.start(request)
        request.sequence = request.new_sequence(self.context)
        request.note_cached(request.sequence.length)
        request.is_started = True

    def _should_wait_for(self, request: Request, running: list[Request]) -> bool:
        """Whether one of `running` is about to compute the beginning of this request, too."""
        n = request.next_row
        n_known: int | None = None
        for other in running:
            assert other.sequence is not None
            if other.salt != request.salt or not other.keep or other.sequence.length >= other.next_row:
                continue
            least = other.sequence.length + WORTH_WAITING_FOR
            if least > min(n, other.next_row) or request.tokens(0, least) != other.tokens(0, least):
                continue
            if n_known is None:
                n_known = request.n_known(self.context)
            if n_known < least:
                return True
        return False

    def _has_pages_for(self, request: Request, running: list[Request]) -> bool:
        """Whether the pages of this request fit beside those that the others hold and will need for what they miss."""
        if self.max_pages == 0:
            return True
        if self._is_full:
            return False
        stats = self.context.cache_stats()
        layout = KvLayout.of_stats(stats)
        n_known = request.n_known(self.context)
        # What is known of a window may be of others, who let go of it: room is made for all of it.
        needed = stats["n_held_bytes"] + layout.n_bytes(request.n_tokens, BUDGET) - n_known // PAGE_POSITIONS * layout.data_bytes
        for other in running:
            assert other.sequence is not None
            needed += layout.n_bytes(other.n_tokens, BUDGET) - layout.n_bytes(other.sequence.length, BUDGET)
        return needed <= self.max_pages * layout.page_bytes

    @staticmethod
    def _preempt_paused(running: list[Request], *, alone: bool = False) -> bool:
        """Take the sequence of a request whose caller does not read; it is computed again when he does. alone: and its place, so
        of one that has no others beside it."""
        for request in reversed(running):
            if request.is_paused and not (alone and request.n_places > 1):
                request.sequence = None
                running.remove(request)
                return True
        return False

    # ------------------------------------------------------------ the forward and what comes of it

    def _forward(self, grants: list[Grant]) -> bool:
        """Whether there are logits now. Not if the forward was cancelled, or a request had to make room."""
        try:
            self._running = Running(grants, self.context.cancel)
            failed = self._forward_of(grants)
        except CancelledError:
            return False  # somebody's deadline, or an abort: the others are computed in the next step
        except OutOfMemoryError as error:
            self._make_room(grants, error)
            return False
        finally:
            self._running = None
        if failed:
            self._fail_rows(grants, failed)
        return True

    def _forward_of(self, grants: list[Grant]) -> bytes:
        """What the core says of the rows. Raises CancelledError too if a prompt was aborted since it was granted."""
        tokens: list[int] = []
        sequences: list[_core.Sequence] = []
        wants, drafted = bytearray(), bytearray()
        adapters: list[_core.Adapter | None] = []
        deadline = None
        for request, begin, end, flags, draft in grants:
            if end - begin > 1 and request.number not in self._requests:
                raise CancelledError("aborted")
            assert request.sequence is not None
            n = len(flags)
            tokens += request.tokens(begin, end)
            tokens += draft
            sequences += [request.sequence] * n
            wants += flags
            drafted += bytes(end - begin) + b"\1" * len(draft)
            adapters += [request.adapter] * n
            if request.deadline is not None:
                deadline = request.deadline if deadline is None else min(deadline, request.deadline)
        return self.context.forward(tokens, sequences, wants, drafted=drafted, adapters=adapters, deadline=deadline)

    def _make_room(self, grants: list[Grant], error: OutOfMemoryError) -> None:
        """Guesses first. Then the youngest request gives its pages up and is computed again later; a single one has nobody to
        wait for."""
        self._is_full = True
        if any(one.draft for one in grants):
            return
        holders = [request for request in self._requests.values() if request.sequence is not None]
        if len(holders) > 1:
            holders[-1].sequence = None
        else:
            grants[0].request.error = error

    @staticmethod
    def _fail_rows(grants: list[Grant], failed: bytes) -> None:
        row = 0
        for request, _, _, wants, draft in grants:
            if any(failed[row : row + len(wants)]):
                if draft and isinstance(request, GenerationRequest):
                    request.may_draft = False  # a wrong guess may have done it: once more, without
                else:
                    request.error = NotFiniteError("an infinity or NaN appeared in the computation of this request")
            row += len(wants)

    def _sample(self, numbered: list[tuple[Grant, int, int]]) -> None:
        """The next token of every request whose last one was computed. numbered: grants with their rows."""
        requests: list[GenerationRequest] = []
        rows: list[int] = []
        hidden_rows: list[int] = []
        drafts: list[tuple[int, ...]] = []
        masks: list[Sequence[Any] | None] = []
        edited: list[Any] = []
        for (request, _, end, wants, draft), row, hidden_row in numbered:
            if not isinstance(request, GenerationRequest) or not wants[-1] or request.error is not None:
                continue
            assert request.sequence is not None
            request_masks: Sequence[Any] | None = request.masks(draft)
            if request.sequence.length != end or request.error is not None:  # its rows failed
                continue
            logits = None
            if request.callbacks is not None:
                edit = request.edit(self.context.logits(row), request_masks)
                if edit is None:
                    continue
                logits, request_masks = edit.logits, [edit.mask]
            requests.append(request)
            rows.append(row)
            hidden_rows.append(hidden_row)
            drafts.append(draft if request_masks is None else draft[: len(request_masks) - 1])
            masks.append(request_masks)
            edited.append(logits)
        if not requests:
            return
        samplers, lengths = [request.sampler for request in requests], [request.n_tokens for request in requests]
        errors = sample_many(self.context.logits(), rows, samplers, lengths, masks, self.n_threads, drafts, edited)
        for request, draft, error in zip(requests, drafts, errors, strict=True):
            if error is not None:
                request.error = error
            if draft:
                self._accept(request, draft)
            request.catch_up()
        for request, n_before, row in zip(requests, lengths, hidden_rows, strict=True):
            if request.row_kind & HIDDEN and request.n_tokens > n_before and not request.is_done:
                with memoryview(self.context.hidden(row + request.n_tokens - n_before - 1)) as state:
                    self.speculation.note_state(request, state)

    @staticmethod
    def _accept(request: GenerationRequest, draft: tuple[int, ...]) -> None:
        """Guesses that came true are part of the sequence. It compares them itself with what was sampled; those that an
        exception loses are computed again."""
        sequence, output = request.sequence, request.output
        assert sequence is not None
        output.drafted_tokens += len(draft)
        output.accepted_tokens += sequence.accept(request.tokens(sequence.length, request.n_tokens))

    def _take_rows(self, numbered: list[tuple[Grant, int, int]]) -> None:
        for (request, begin, end, _, _), row, hidden_row in numbered:
            if not isinstance(request, GenerationRequest) and request.error is None:
                self._take(request, begin, end, row if request.row_kind == LOGITS else hidden_row)

    def _take(self, request: Request, begin: int, end: int, row: int) -> None:
        row_of = self.context.logits if request.row_kind == LOGITS else self.context.hidden
        for position in request.rows(begin, end):
            try:
                with memoryview(row_of(row)) as view:
                    request.take_row(position, view)
            except Exception as error:  # of the caller's own making, for him alone
                request.error = error
                return
            row += 1

    # ------------------------------------------------------------ life

    def close(self) -> None:
        """End every request. Under the step lock; an exception may end it, and another call goes on."""
        self.closed = True
        for request in list(self._requests.values()):
            request.error = request.error or PyEngineError("this engine is closed")
        self.sweep()
        self.speculation.close()
        vars(self).pop("context", None)

    def after_fork_in_parent(self) -> None:
        """A fork holds the lock while it waits for others: what was aborted meanwhile is let go of here."""
        self._sweep_after()

    def after_fork_in_child(self) -> None:
        """The callers of other threads do not exist here. (The lock was held at the fork: no step is half done.)"""
        self.step_lock.after_fork_in_child()
        thread = threading.get_ident()
        for request in list(self._requests.values()):
            if request.thread != thread:
                self._requests.pop(request.number, None)

    def check_integrity(self) -> dict[str, int]:
        """Raises PyEngineError if any book does not balance: sequences and their requests, tokens and their pages,
        references.

        Returns the cache's counts. Under the step lock, between steps.
        """
        self.sweep()
        self.context.check()
        stats = self.context.cache_stats()
        holders = [request for request in self._holders.values() if request.sequence is not None]
        if stats["n_sequences"] != len(holders):
            raise PyEngineError(f"{stats['n_sequences']} sequences for {len(holders)} requests: some are lost")
        for request in holders:
            assert request.sequence is not None
            held = request.sequence.tokens()
            if list(held) != list(request.tokens(0, len(held))):
                raise PyEngineError(f"request {request.number}: its sequence holds other tokens than its text")
        self.speculation.check_integrity(self._holders.values())
        return stats


_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


def _after_fork_in_parent() -> None:
    for scheduler in list(_schedulers):
        scheduler.after_fork_in_parent()


def _after_fork_in_child() -> None:
    for scheduler in list(_schedulers):
        scheduler.after_fork_in_child()


fork.call_after(in_parent=_after_fork_in_parent, in_child=_after_fork_in_child)
