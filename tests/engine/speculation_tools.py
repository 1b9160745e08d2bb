"""Draft models and heads that guess whatever it costs, and what tests of both have in common."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyengine import Engine, _core, _draft
from pyengine.run.proposer import DraftBuilder, Proposer
from pyengine.run.speculation import Speculation


@contextlib.contextmanager
def plain_engine(model: Path) -> Iterator[Engine]:
    """What outputs are compared with: one token a step, one thread, the scalar kernels."""
    _core.select_isa("scalar")
    try:
        with Engine(model, n_threads=1, speculative="off") as engine:
            yield engine
    finally:
        _core.select_isa(None)


def assert_nothing_is_held(stats: dict[str, int]) -> None:
    """Of a cache: no sequence is left, and every page is cached or free."""
    assert stats["n_sequences"] == 0 and stats["n_pages"] == stats["n_cached"] + stats["n_free"]


def costs(seconds: dict[int, float], n: int = 200) -> _draft.DraftStats:
    """What was learnt from steps that took so long by their number of rows."""
    stats = _draft.DraftStats()
    for _ in range(n):
        for rows, time in seconds.items():  # as with one text: without guesses, and with some
            stats.note_step(1, seconds[1])
            stats.note_step(rows, time)
    return stats


class Free(DraftBuilder):
    """Nothing but guesses of the proposer, which are believed to be right."""

    def _chance(self, bucket: int) -> float:
        return 0.999

    def _ngram(self) -> tuple[int, float] | None:
        return None

    def proposal(self) -> list[tuple[int, float]]:
        return [(token, 0.999) for token in self.tokens]


def always_guess(speculation: Speculation, n: int) -> Proposer:
    """The draft model or head guesses n tokens whenever it may, as if steps of any size took the same time."""
    proposer = speculation.proposer
    assert proposer is not None
    speculation.max_asked = 1 << 20
    speculation.stats = proposer.stats = costs(dict.fromkeys(range(1, _draft.MAX_ROWS + 1), 1.0), n=2)
    speculation.note_step = lambda n_rows, seconds: None  # type: ignore[method-assign]
    proposer.new_builder = Free
    proposer._note_gain = lambda *_: None  # type: ignore[method-assign]
    proposer._goes_on = lambda builder, n_running, n_rows: len(builder.tokens) < n  # type: ignore[method-assign]
    return proposer


def in_company(
    plain: Engine, engine_of: Callable[[int | None], Engine], n_guesses: int, check: Callable[[Engine], None]
) -> None:
    """Texts of many lengths side by side, streams left half way, all pages and few: each says what `plain` says. engine_of: an
    engine with so many bytes for its cache (None = as many as it wants) and three sequences at once."""
    rng = random.Random(8)
    jobs: list[tuple[list[int], dict[str, Any], list[int]]] = []
    for i in range(12):
        prompt = [3 + rng.randrange(50) for _ in range(rng.choice((1, 2, 40, 300, 450)))]
        options = {"max_tokens": rng.choice((1, 2, 30)), "ignore_eos": True, "seed": i, "temperature": rng.choice((0, 1))}
        jobs.append((prompt, options, plain.generate(prompt, speculative="off", **options).tokens))
    for n_pages in (0, 7):
        page_bytes = plain.cache_stats()["page_bytes"]
        with engine_of(n_pages * page_bytes or None) as engine:
            always_guess(engine.scheduler.speculation, n_guesses)
            for _ in range(12):
                prompt, options, tokens = rng.choice(jobs)
                stream = engine.stream(prompt, **options)
                assert next(stream).token == tokens[0]
                some = [rng.choice(jobs) for _ in range(3)]
                for prompt, options, tokens in some:
                    assert engine.generate(prompt, **options).tokens == tokens
                assert engine.generate([prompt for prompt, _, _ in some], max_tokens=3, ignore_eos=True)
                del stream
                check(engine)
