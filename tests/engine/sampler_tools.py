"""Random work for a sampler: logits, parameters and masks of every kind."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pyengine.sampling import ResolvedParams, SamplingParams


def params(**kwargs: Any) -> ResolvedParams:
    kwargs.setdefault("seed", 1)
    kwargs.setdefault("temperature", 1.0)
    return SamplingParams(**kwargs).resolve()


def random_logits(rng: np.random.Generator, n: int) -> np.ndarray:
    """Mixtures of smooth, peaked, flat and tie-ridden logits, with both zeros."""
    kind = rng.integers(5)
    if kind == 0:
        x = rng.normal(0, rng.choice([0.1, 1, 4]), n)
    elif kind == 1:
        x = rng.integers(-3, 3, n) * 0.5  # many ties
    elif kind == 2:
        x = np.where(rng.random(n) < 0.02, rng.normal(12, 2, n), rng.normal(0, 2, n))
    elif kind == 3:
        x = np.zeros(n)
    else:
        x = rng.choice([0.0, -0.0, 1.0, -50.0, 1e38, -1e38], n)  # the penalties below keep it finite
    return x.astype(np.float32)


def random_params(rng: np.random.Generator, n: int) -> ResolvedParams:
    def maybe(value: Any, chance: float = 0.35) -> Any:
        return value if rng.random() < chance else None

    def ids(most: int) -> list[int]:
        return [int(i) for i in rng.integers(0, n, rng.integers(1, most))]

    return SamplingParams(
        temperature=float(rng.choice([0, 0.1, 0.7, 1.0, 2.5, 30.0], p=[0.1, 0.15, 0.25, 0.3, 0.15, 0.05])),
        top_k=maybe(int(rng.choice([1, 2, 5, 40, n, 2 * n]))),
        top_p=maybe(float(rng.choice([1e-9, 0.1, 0.5, 0.9, 0.95, 0.9999]))),
        min_p=maybe(float(rng.choice([1e-300, 1e-14, 1e-6, 0.05, 0.5, 1.0]))),
        typical_p=maybe(float(rng.choice([1e-9, 0.2, 0.9, 0.999])), 0.25),
        top_n_sigma=maybe(float(rng.choice([0.3, 1.0, 3.0])), 0.2),
        dynatemp_range=maybe(float(rng.choice([0.1, 0.7, 5.0])), 0.15),
        dynatemp_exponent=float(rng.choice([0.0, 0.5, 1.0, 3.0])),
        xtc_probability=maybe(float(rng.choice([0.5, 1.0])), 0.3),
        xtc_threshold=float(rng.choice([0.0, 1e-9, 0.05, 0.1, 0.3, 0.5, 1.0])),
        repeat_last_n=maybe(int(rng.integers(0, 8)), 0.3),
        dry_multiplier=maybe(float(rng.choice([0.5, 3.0, 1e30])), 0.3),
        dry_base=float(rng.choice([1.0, 1.75, 1e20])),
        dry_allowed_length=int(rng.integers(1, 4)),
        dry_penalty_last_n=maybe(int(rng.integers(0, 12)), 0.3),
        no_repeat_ngram_size=maybe(int(rng.integers(0, 4)), 0.3),
        repetition_penalty=maybe(float(rng.choice([0.7, 1.1, 2.0]))),
        frequency_penalty=maybe(float(rng.choice([-0.5, 0.3, 2.0]))),
        presence_penalty=maybe(float(rng.choice([-0.5, 0.3, 2.0]))),
        logit_bias=maybe({i: float(rng.choice([-math.inf, -5, 0.25, 5])) for i in ids(6)}),
        allowed_token_ids=maybe(ids(n + 1), 0.15),
        bad_token_ids=maybe(ids(4), 0.2),
        stop_token_ids=maybe(ids(3), 0.2),
        min_tokens=maybe(3, 0.3),
        seed=int(rng.integers(0, 2**63)),
    ).resolve()


def random_text(rng: np.random.Generator, n: int, most: int) -> list[int]:
    """Up to `most` tokens: any, of a few kinds, or one passage again and again."""
    length, kind = int(rng.integers(0, most + 1)), rng.integers(3)
    if kind == 0:
        return [int(i) for i in rng.integers(0, n, length)]
    passage = rng.integers(0, min(n, 4), length if kind == 1 else int(rng.integers(1, 6)))
    return [int(i) for i in np.resize(passage, length)]


def random_sequences(rng: np.random.Generator, n: int) -> list[tuple[int, ...]]:
    """Of the ids that random_text likes, mostly none."""
    return [
        tuple(int(i) for i in rng.integers(0, min(n, 6), rng.integers(1, 4))) for _ in range(rng.integers(0, 4))
    ] if rng.random() < 0.4 else []


def random_mask(rng: np.random.Generator, n: int) -> np.ndarray | None:
    """(n) bool, dense or sparse, or with whole words of one kind; or none."""
    kind = rng.integers(6)
    if kind < 2:
        return None
    if kind == 2:
        return np.repeat(rng.random((n + 31) // 32) < 0.5, 32)[:n]
    return np.asarray(rng.random(n) < rng.choice([0.03, 0.5, 0.97]))


def words_of(mask: np.ndarray) -> np.ndarray:
    """The bits as sample wants them: 32 a word, the first in the lowest place; those past the end are 1, and must not matter."""
    padded = np.concatenate([mask, np.ones(-len(mask) % 32, bool)])
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)
