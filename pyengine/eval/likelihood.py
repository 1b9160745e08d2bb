"""Log-likelihoods of continuations after contexts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pyengine._sampler import logprobs
from pyengine.errors import ContextFullError, InvalidArgumentError
from pyengine.run.request import Caller, RowsRequest
from pyengine.run.stream import run_all

if TYPE_CHECKING:
    from pyengine.engine import Engine

TOGETHER = 256  # pairs that are given to the scheduler at once


class Pair(NamedTuple):
    """Token ids of a context, not empty, and of what is to follow it, not empty either."""

    context: list[int]
    continuation: list[int]


class Likelihood(NamedTuple):
    """logprob: sum over the continuation's tokens, in nats; is_greedy: whether each of them is the most probable one (of equal
    ones the lowest id); n_cut: tokens of the context's beginning that did not fit."""

    logprob: float
    is_greedy: bool
    n_cut: int


def encode_pair(engine: Engine, context: str, continuation: str, *, parse_special: bool = False) -> Pair:
    """Tokens of both as those of the whole text are, cut where the context's tokens end; spaces at the context's end belong to
    the continuation, since vocabularies spell words with the space before them. An empty context is BOS, or else the end of text,
    after which texts begin. Raises InvalidArgumentError for a continuation without tokens."""
    kept = context.rstrip()
    if not kept:
        ids = engine.tokenize(context + continuation, add_bos=False, parse_special=parse_special)
        start = _first_token(engine)
        pair = Pair([start], ids[1:] if ids[:1] == [start] else ids)
    else:
        whole = engine.tokenize(context + continuation, parse_special=parse_special)
        known = engine.tokenize(kept, parse_special=parse_special)
        pair = Pair(known, whole[len(known) :])
    if not pair.continuation:
        raise InvalidArgumentError(f"there is nothing to score: {continuation[:80]!r} adds no token to its context")
    return pair


def _first_token(engine: Engine) -> int:
    bos, ends = engine.tokenizer.bos_id, engine.eos_token_ids
    if bos is None and not ends:
        raise InvalidArgumentError(
            "an empty context needs a model that has a token for the beginning or the end of texts"
        )
    return ends[0] if bos is None else bos


def likelihoods(
    engine: Engine, pairs: Sequence[Pair], progress: Callable[[int, int], None] | None = None
) -> list[Likelihood]:
    """Of each pair, in order. Pairs in a row that begin alike share what is computed of their beginnings. A context that does not
    fit loses its beginning; progress(done, total) is called now and then. Raises ContextFullError for a continuation that is
    longer than the context holds."""
    out: list[Likelihood] = []
    for begin in range(0, len(pairs), TOGETHER):
        out += _together(engine, pairs[begin : begin + TOGETHER])
        if progress is not None:
            progress(len(out), len(pairs))
    return out


def _together(engine: Engine, pairs: Sequence[Pair]) -> list[Likelihood]:
    caller = Caller()  # the scheduler knows it weakly
    rows: list[_Rows] = [_Rows(engine, pair) for pair in pairs]
    requests: list[RowsRequest] = []
    for one in rows:
        requests += engine.rows_requests(caller, one.tokens[:-1], one.positions, one.take)
    for request in requests:
        request.keep = True  # the next one may begin alike
    run_all(engine.scheduler, requests)
    return [Likelihood(math.fsum(one.values.values()), one.is_greedy, one.n_cut) for one in rows]


class _Rows:
    """What is read of one pair's logits. positions: those after which the continuation's tokens come."""

    def __init__(self, engine: Engine, pair: Pair) -> None:
        if len(pair.continuation) > engine.n_ctx:
            n = len(pair.continuation)
            raise ContextFullError(f"a continuation has {n} tokens, the context holds {engine.n_ctx}")
        whole = [*pair.context, *pair.continuation]
        self.tokens = whole[-(engine.n_ctx + 1) :]  # the last one is not computed
        self.n_cut = len(whole) - len(self.tokens)
        n = len(self.tokens)
        self.positions = list(range(n - 1 - len(pair.continuation), n - 1))
        self.values: dict[int, float] = {}  # by position: a row may come again after an exception
        self.is_greedy = True

    def take(self, position: int, logits: memoryview) -> None:
        token = self.tokens[position + 1]
        value, top = logprobs(logits, token, 1)
        self.values[position] = value
        self.is_greedy = self.is_greedy and top[0][0] == token
