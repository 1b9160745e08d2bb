"""Drafts that a test chooses, in place of those that the engine would make of itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

from pyengine import Engine
from pyengine.run.request import GenerationRequest, Request

# Of a text that goes on with `truth`, a draft of at most `most` tokens.
Draft = Callable[[list[int], int], Sequence[int]]


class Scripted:
    """Stands in for `Speculation`. texts: {(prompt, index of the sample): what plain decoding says}."""

    def __init__(self, texts: dict[tuple[tuple[int, ...], int], list[int]], draft: Draft) -> None:
        self.texts = texts
        self.draft = draft

    def start(self, request: Request) -> None:
        pass

    def plan(self, requests: Iterable[Request], n_rows: int) -> dict[int, tuple[int, ...]]:
        return {one.number: self._draft(one) for one in requests if isinstance(one, GenerationRequest)}

    def _draft(self, request: GenerationRequest) -> tuple[int, ...]:
        text = self.texts.get((tuple(request.prompt), request.sampler.sample_index), [])
        truth = text[len(request.sampler.outputs) :]
        most = max(0, request.max_draft)
        return tuple(self.draft(truth, most))[:most]

    def note_step(self, n_rows: int, seconds: float) -> None:
        pass

    def check_integrity(self, requests: Iterable[Request]) -> None:
        pass

    def close(self) -> None:
        pass


def script(engine: Engine, texts: dict[tuple[tuple[int, ...], int], list[int]], draft: Draft) -> None:
    engine._scheduler.speculation = Scripted(texts, draft)  # type: ignore[assignment]


def wrong(token: int, vocab_size: int) -> int:
    return (token + 1) % vocab_size


def drafts_of(kind: str, *, seed: int, vocab_size: int) -> Draft:
    """ "right", "wrong", "random" tokens, or "mixed": right ones, then a wrong one, then any."""
    rng = random.Random(seed)

    def draft(truth: list[int], most: int) -> list[int]:
        n = min(most, 7) if kind in ("right", "wrong") else rng.randrange(most + 1) if most < 25 else rng.randrange(25)
        anything = [rng.randrange(vocab_size) for _ in range(n)]
        if kind == "random":
            return anything
        if kind == "wrong":
            return [wrong(token, vocab_size) for token in truth[:n]]
        if kind == "right":
            return truth[:n]
        n_right = rng.randrange(n + 1)
        return (truth[:n_right] + [wrong(token, vocab_size) for token in truth[n_right : n_right + 1]] + anything)[:n]

    return draft
