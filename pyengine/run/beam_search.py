"""Beam search: the `width` most probable beginnings of an output go on together, a token a step.

`Rules.step` is the algorithm, a function of numbers alone, and transformers' (`generate` with num_beams, from version 4.50 on):
of the candidates of a step, all beams by all tokens, the first `width` that do not end go on, and those that end among the first
`width` of all are finished; the `width` finished ones of the highest score are kept. Candidates are ordered by log-probability,
those that tie by beam and by token, so there is one result.

Each beam is a request of the scheduler, and all beams of a step are rows of one forward. There are `width` requests for the whole
search, its lanes: a beam's first successor stays in its lane and goes on from its keys and values, others fork them into lanes
that have become free. The prompt's are cached like anybody's, those of beams are not: most of them lead nowhere.

With a grammar, candidates are the tokens that may come by it, each with its probability among all tokens, as transformers' logits
processors leave it. A beam's guide is a fork of its parent's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from pyengine._sampler import MAX_TOP_LOGPROBS, logprobs
from pyengine.errors import InvalidArgumentError
from pyengine.results import BeamHypothesis, FinishReason, Timings
from pyengine.run.request import Caller, Request
from pyengine.text.output import OutputText

if TYPE_CHECKING:
    from pyengine import _core
    from pyengine.run.guide import Guide

EarlyStopping = bool | Literal["never"]
Row = Sequence[tuple[int, float]]  # the most probable tokens, and their log-probabilities


# ------------------------------------------------------------------ the algorithm


class Said(NamedTuple):
    """What a beam's tokens say, and whether that is its end.

    words  where its decoder and its stop strings stand; never changed, a successor has a copy
    """

    text: str
    words: OutputText
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class Beam(NamedTuple):
    """The beginning of an output, or a whole one.

    tokens   what came after the prompt
    logprob  sum of their log-probabilities, natural logarithm
    said     what they say
    parent   which of the beams of the step before it goes on from
    """

    tokens: tuple[int, ...]
    logprob: float
    said: Said
    parent: int = 0


class Rules(NamedTuple):
    """What a search is to do.

    width           beams that go on, and finished ones that are kept
    max_tokens      tokens of an output at most
    length_penalty  a score is logprob / n_tokens ** length_penalty
    early_stopping  when a search ends that has `width` finished beams: True: at once; False: when the best beam, if it ended now,
                    would not score higher than the last of them; "never": when it would not after max_tokens either, its
                    log-probability unchanged (which is False's test unless length_penalty > 0)
    """

    width: int
    max_tokens: int
    length_penalty: float
    early_stopping: EarlyStopping

    def score(self, logprob: float, n_tokens: int) -> float:
        return float(logprob / max(n_tokens, 1) ** self.length_penalty)  # of none, if there was no time for one: 0

    def score_of(self, beam: Beam) -> float:
        return self.score(beam.logprob, len(beam.tokens))

    def step(
        self,
        beams: Sequence[Beam],
        finished: Sequence[Beam],
        rows: Sequence[Row],
        read: Callable[[Said, int, int], Said],
    ) -> tuple[list[Beam], list[Beam]]:
        """One token more: the beams that go on, the most probable first, none if the search has ended; and those that are
        finished, the highest score first.

        beams     the most probable first; all have the same number of tokens
        finished  so far, the highest score first
        rows      for each beam its most probable tokens: `width` and as many as there are that end a text, or all
        read      (what a beam said, a token, which one it is from 1 on) -> what its successor says
        """
        n_tokens = len(beams[0].tokens) + 1
        candidates = sorted(
            (-(beam.logprob + logprob), parent, token)
            for parent, (beam, row) in enumerate(zip(beams, rows, strict=True))
            for token, logprob in row
        )
        going_on: list[Beam] = []
        merged = list(finished)
        for rank, (cost, parent, token) in enumerate(candidates):
            if rank >= self.width and (len(going_on) == self.width or n_tokens >= self.max_tokens):
                break
            before = beams[parent]
            said = read(before.said, token, n_tokens)
            beam = Beam((*before.tokens, token), -cost, said, parent)
            if said.finish_reason is None:
                going_on += [beam] if len(going_on) < self.width else []
            elif rank < self.width:
                merged.append(beam)
        merged = self.best(merged)
        return (going_on if going_on and self._may_improve(going_on[0], merged) else []), merged

    def best(self, finished: Iterable[Beam]) -> list[Beam]:
        """Those that are kept, the highest score first; of those with one score, the first that was finished is first."""
        return sorted(finished, key=self.score_of, reverse=True)[: self.width]

    def _may_improve(self, best: Beam, finished: Sequence[Beam]) -> bool:
        if len(finished) < self.width:
            return True
        if self.early_stopping is True:
            return False
        at_end = self.early_stopping == "never" and self.length_penalty > 0
        n_tokens = self.max_tokens if at_end else len(best.tokens)
        return self.score(best.logprob, n_tokens) > self.score_of(finished[-1])


class Reader(NamedTuple):
    """Reads beams as outputs are read: end_ids (of the model) and stop_ids end one, and a stop string does."""

    end_ids: frozenset[int]
    stop_ids: frozenset[int]
    max_tokens: int

    def read(self, before: Said, token: int, n_tokens: int) -> Said:
        """What is said with one more token, the n_tokens-th."""
        words = before.words.copy()
        if token in self.end_ids or token in self.stop_ids:
            return _ended(before.text, words, "stop", token if token in self.stop_ids else None)
        text = before.text + words.push(token)
        if n_tokens >= self.max_tokens or words.matched is not None:
            return _ended(text, words, "length")
        return Said(text, words)

    @property
    def n_ends(self) -> int:
        return len(self.end_ids | self.stop_ids)


def _ended(text: str, words: OutputText, reason: FinishReason, stop_reason: int | None = None) -> Said:
    """The end of a text, which may end in a stop string then; `words` is its own."""
    text += words.finish()
    if words.matched is not None:
        return Said(text, words, "stop", words.matched)
    return Said(text, words, reason, stop_reason)


# ------------------------------------------------------------------ its requests


class _Step:
    """Where a search is. Only `guides` and `rows` change, one entry at a time.

    beams     the most probable first; none: it has ended
    finished  the highest score first
    lanes     for each beam, which request computes it
    sources   for each beam, the lane in which its parent was and its parent's first successor is
    rows      for each beam, its most probable next tokens, None = not computed yet
    guides    for each beam, that of its text, or, until it has its row, of its parent's; None without a grammar
    """

    __slots__ = ("beams", "finished", "guides", "lanes", "rows", "sources")

    def __init__(
        self,
        beams: Sequence[Beam],
        finished: Sequence[Beam],
        lanes: Sequence[int],
        sources: Sequence[int],
        guides: list[Guide | None],
    ) -> None:
        self.beams, self.finished, self.lanes, self.sources = beams, finished, lanes, sources
        self.guides = guides
        self.rows: list[Row | None] = [None] * len(beams)


class BeamSearch:
    """One search. What the scheduler is to compute are its lanes, which know it, and it has no reference to them. They are done
    together, by the same step or error.

    sequences      for each lane, as of a Request
    error          what ended the search
    is_started     all of its lanes have their places
    cached_tokens  of the prompt, found in the cache

    An exception may fall anywhere: the search goes from one step to the next by one assignment, before which lanes whose beams
    change have let go of their sequences, and what is lost before it is computed again from the same rows.
    """

    def __init__(
        self, prompt: Sequence[int], rules: Rules, reader: Reader, words: OutputText, guide: Guide | None, n: int
    ) -> None:
        """n: outputs that are wanted."""
        self.prompt = prompt
        self._rules, self._reader, self._n = rules, reader, n
        # as many candidates as `step` needs; twice the width, so that stop strings leave enough that go on
        self.n_candidates = min(2 * rules.width + reader.n_ends, MAX_TOP_LOGPROBS)
        self.sequences: list[_core.Sequence | None] = [None] * rules.width
        self.error: BaseException | None = None
        self.is_started = False
        self.step = _Step([Beam((), 0.0, Said("", words))], (), [0], [0], [guide])
        self.cached_tokens = 0
        self._started = self._first_token_at = self._last_token_at = time.monotonic()

    def lanes(
        self, caller: Caller, *, salt: bytes, adapter: _core.Adapter | None, timeout: float | None = None
    ) -> list[BeamRequest]:
        """Its requests; to be made once."""
        deadline = None if timeout is None else self._started + timeout
        return [
            BeamRequest(self, lane, caller, salt=salt, adapter=adapter, deadline=deadline)
            for lane in range(self._rules.width)
        ]

    @property
    def is_done(self) -> bool:
        return not self.step.beams or self.error is not None

    @property
    def results(self) -> list[BeamHypothesis]:
        """Of a search that is done without an error, the highest score first: fewer than are wanted where there are no more of so
        few tokens."""
        return [self._hypothesis(beam) for beam in self.step.finished[: self._n]]

    def _hypothesis(self, beam: Beam) -> BeamHypothesis:
        said = beam.said
        assert said.finish_reason is not None
        score = self._rules.score_of(beam)
        return BeamHypothesis(said.text, list(beam.tokens), said.finish_reason, said.stop_reason, beam.logprob, score)

    @property
    def finish_reason(self) -> FinishReason:
        """Of its best result."""
        finished = self.step.finished
        return (finished[0].said.finish_reason if finished else None) or "length"

    @property
    def timings(self) -> Timings:
        """Of a search that is done; its generated tokens are those of all its results."""
        return Timings(
            len(self.prompt),
            self.cached_tokens,
            sum(len(beam.tokens) for beam in self.step.finished[: self._n]),
            self._first_token_at - self._started,
            self._last_token_at - self._started,
        )

    def take(self, rank: int, row: memoryview) -> None:
        """The logits after a beam. Raises InvalidArgumentError if its grammar cannot be followed any more."""
        step, mask = self.step, None
        guide = step.guides[rank]
        if guide is not None:
            step.guides[rank] = guide = guide.fork()
            mask = guide.masks(step.beams[rank].tokens)[0]
        step.rows[rank] = logprobs(row, 0, self.n_candidates, mask)[1]

    def advance(self) -> None:
        """Go on to the next step if every beam has its row."""
        step = self.step
        rows = [row for row in step.rows if row is not None]
        if len(rows) < len(step.rows) or not step.beams:
            return
        beams, finished = self._rules.step(step.beams, step.finished, rows, self._reader.read)
        if not beams and not finished:
            raise InvalidArgumentError("structured_outputs cannot be followed: no token that may come is in the vocabulary")
        sources = [step.lanes[beam.parent] for beam in beams]
        lanes = _lanes(sources, self._rules.width)
        is_prompt = not step.beams[0].tokens
        self._last_token_at = time.monotonic()
        if is_prompt:
            self._first_token_at = self._last_token_at
        for lane in range(self._rules.width):
            if is_prompt or lane not in sources:
                self.sequences[lane] = None
        self.step = _Step(beams, finished, lanes, sources, [step.guides[beam.parent] for beam in beams])

    def time_out(self) -> None:
        """End it where it is: its beams are outputs as far as they go."""
        step = self.step
        cut = [beam._replace(said=_ended(beam.said.text, beam.said.words.copy(), "timeout")) for beam in step.beams]
        self.step = _Step((), self._rules.best([*step.finished, *cut]), (), (), [])


def _lanes(sources: Sequence[int], width: int) -> list[int]:
    """A lane for each beam: its parent's for the first successor, others where no beam goes on."""
    free = [lane for lane in range(width) if lane not in sources]
    return [source if source not in sources[:beam] else free.pop(0) for beam, source in enumerate(sources)]


class BeamRequest(Request):
    """A lane: the beam that is in it, if any. The first one, with the prompt, starts them all."""

    keep = False  # but while it computes the prompt

    def __init__(
        self,
        search: BeamSearch,
        index: int,
        caller: Caller,
        *,
        salt: bytes,
        adapter: _core.Adapter | None,
        deadline: float | None,
    ) -> None:
        self.search = search
        self.index = index
        self.n_places = len(search.sequences)
        super().__init__(caller, salt=salt, deadline=deadline, adapter=adapter)

    @property
    def sequence(self) -> _core.Sequence | None:
        return self.search.sequences[self.index]

    @sequence.setter
    def sequence(self, value: _core.Sequence | None) -> None:
        self.search.sequences[self.index] = value

    @property
    def error(self) -> BaseException | None:
        return self.search.error

    @error.setter
    def error(self, value: BaseException | None) -> None:
        self.search.error = value

    @property
    def is_started(self) -> bool:
        return self.search.is_started

    @is_started.setter
    def is_started(self, value: bool) -> None:
        self.search.is_started = value

    @property
    def has_place(self) -> bool:
        """With its search: beams that took turns would be computed anew at every step."""
        return self.is_started

    def _rank(self, step: _Step) -> int | None:
        """Which of the beams is here."""
        return step.lanes.index(self.index) if self.index in step.lanes else None

    @property
    def _wants_row(self) -> bool:
        step = self.search.step
        rank = self._rank(step)
        return rank is not None and step.rows[rank] is None

    @property
    def n_tokens(self) -> int:
        return len(self.search.prompt) + len(self.search.step.beams[0].tokens)

    @property
    def waiting_tokens(self) -> int:
        beams = self.search.step.beams
        return 0 if self.index > 0 or self.is_done or not beams or beams[0].tokens else len(self.search.prompt)

    @property
    def next_row(self) -> int:
        return self.n_tokens - 1 if self._wants_row else self.n_tokens

    @property
    def is_done(self) -> bool:
        return self.search.is_done

    @property
    def is_paused(self) -> bool:
        """Whether others have to come first. It makes room for them if there is none."""
        return not self._wants_row

    @property
    def can_go_on(self) -> bool:
        """As its search: nobody reads before its end, and while it goes from one step to the next all its lanes are paused."""
        return not self.is_done

    def tokens(self, begin: int, end: int) -> Sequence[int]:
        prompt, step = self.search.prompt, self.search.step
        n, rank = len(prompt), self._rank(step)
        assert rank is not None
        return [*prompt[begin:end], *step.beams[rank].tokens[max(0, begin - n) : max(0, end - n)]]

    def wants(self, begin: int, end: int) -> bytes:
        return bytes(end - begin) if end < self.n_tokens else bytes(end - begin - 1) + bytes((self.row_kind,))

    def _source(self) -> _core.Sequence | None:
        """Whose first tokens are those of this beam's parent, if they have been computed and not made room."""
        step = self.search.step
        rank = self._rank(step)
        source = None if rank is None else self.search.sequences[step.sources[rank]]
        return source if source is not None and source.length >= self.next_row else None

    def n_known(self, context: _core.Context) -> int:
        return super().n_known(context) if self._source() is None else self.next_row

    def new_sequence(self, context: _core.Context) -> _core.Sequence:
        source = self._source()
        self.keep = not self.search.step.beams[0].tokens
        return super().new_sequence(context) if source is None else source.fork(self.next_row)

    def note_cached(self, n_tokens: int) -> None:
        if not self.is_started:
            self.search.cached_tokens = n_tokens

    def rows(self, begin: int, end: int) -> Sequence[int]:
        return range(self.n_tokens - 1, end) if self._wants_row else ()

    def take_row(self, position: int, row: memoryview) -> None:
        rank = self._rank(self.search.step)
        assert rank is not None
        self.search.take(rank, row)
        self.search.advance()

    def catch_up(self) -> None:
        """After an exception that fell between the last row and the next step."""
        try:
            self.search.advance()
        except Exception as error:  # of this search's text, for its caller alone
            self.error = error

    def time_out(self) -> None:
        try:
            self.search.time_out()
        except Exception as error:
            self.error = error
