"""The sampler's specification (csrc/sampler/sampler.h) in plain NumPy: full sorts, Python integers, no cleverness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MASK32 = 0xFFFFFFFF


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK32, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK32]
        k = [(k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32]
    return tuple(c)


def random_bits(seed: int, position: int, sample_index: int, word: int = 0) -> int:
    counter = (position & MASK32, position >> 32, sample_index & MASK32, sample_index >> 32)
    out = philox(counter, (seed & MASK32, seed >> 32))
    return out[word] | out[word + 1] << 32


# ---------------------------------------------------------------- what the history's order says


def ends_with(text: list[int], end: list[int]) -> bool:
    return len(end) <= len(text) and text[len(text) - len(end) :] == end


def behind_breaker(text: list[int], breakers: Sequence[Sequence[int]]) -> int:
    for start in reversed(range(len(text))):
        lengths = [len(one) for one in breakers if text[start : start + len(one)] == list(one)]
        if lengths:
            return len(text) - start - max(lengths)
    return len(text)


def dry_lengths(text: list[int], limit: int) -> dict[int, int]:
    """{token: how many of the last tokens stand somewhere before it}, the most for each token."""
    longest: dict[int, int] = {}
    for at in range(1, len(text)):
        n = 0
        while n < min(at, limit) and text[at - 1 - n] == text[-1 - n]:
            n += 1
        longest[text[at]] = max(n, longest.get(text[at], 0))
    return longest


def apply_dry(out: np.ndarray, p: Any, text: list[int], breakers: Sequence[Sequence[int]]) -> None:
    text = text if p.dry_penalty_last_n < 0 else text[max(0, len(text) - p.dry_penalty_last_n) :]
    alone = {one[0] for one in breakers if len(one) == 1}
    for token, length in dry_lengths(text, behind_breaker(text, breakers)).items():
        if length < p.dry_allowed_length or token in alone:
            continue
        penalty = p.dry_multiplier
        for _ in range(length - p.dry_allowed_length):
            penalty *= p.dry_base
        out[token] = np.float32(max(float(out[token]) - penalty, -float(np.finfo(np.float32).max)))


def repeated_ngrams(text: list[int], size: int) -> list[int]:
    begin = text[len(text) - size + 1 :]
    return [text[at + size - 1] for at in range(len(text) - size + 1) if text[at : at + size - 1] == begin]


def adjust(
    logits: np.ndarray,
    p: Any,
    prompt: list[int],
    output: list[int],
    end_ids: tuple[int, ...] = (),
    mask: np.ndarray | None = None,
    bad_sequences: Sequence[Sequence[int]] = (),
    breakers: Sequence[Sequence[int]] = (),
) -> np.ndarray:
    """Step 1. logits (V) float32, mask (V) bool -> (V) float32."""
    out = logits.astype(np.float32).copy()
    penalties = (p.repetition_penalty, p.frequency_penalty, p.presence_penalty) != (1.0, 0.0, 0.0)
    text = prompt + output
    window = text if p.repeat_last_n < 0 else text[max(0, len(text) - p.repeat_last_n) :]
    for token in set(window) if penalties else ():
        value = float(out[token])
        value = value / p.repetition_penalty if value > 0 else value * p.repetition_penalty
        count = window[max(0, len(window) - len(output)) :].count(token)
        if count:
            value = value - p.frequency_penalty * count - p.presence_penalty
        out[token] = np.float32(value)
    if p.dry_multiplier > 0:
        apply_dry(out, p, text, breakers)
    for token, bias in p.logit_bias.items():
        out[token] = out[token] + np.float32(bias)
    if p.allowed_token_ids is not None:
        banned = np.ones(len(out), bool)
        banned[list(p.allowed_token_ids)] = False
        out[banned] = -np.inf
    if mask is not None:
        out[~mask] = -np.inf
    out[list(p.bad_token_ids)] = -np.inf
    if len(output) < p.min_tokens:
        out[[*p.stop_token_ids, *end_ids]] = -np.inf
    for *begin, last in bad_sequences:
        if ends_with(output, begin):
            out[last] = -np.inf
    if p.no_repeat_ngram_size > 0:
        without = out.copy()
        without[repeated_ngrams(text, p.no_repeat_ngram_size)] = -np.inf
        out = without if without.max() > -np.inf else out
    return out


def lanes_sum(values: np.ndarray) -> float:
    padded = np.concatenate([values, np.zeros(-len(values) % 16)]).reshape(-1, 16)
    lanes = np.zeros(16)
    for row in padded:
        lanes += row
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return float(lanes[0])


def keep_sigma(logits: np.ndarray, n_sigma: float) -> np.ndarray:
    """Top-n-sigma of logits (V) float32."""
    x = logits.astype(np.float64)
    there = x > -np.inf
    mean = lanes_sum(np.where(there, x, 0.0)) / float(there.sum())
    deviation = np.where(there, x - mean, 0.0)
    limit = n_sigma * n_sigma * (lanes_sum(deviation * deviation) / float(there.sum()))
    return np.where((x.max() - x) ** 2 > limit, np.float32(-np.inf), logits)


def expectation_of(weight: np.ndarray, d: np.ndarray, ids: np.ndarray) -> tuple[float, float]:
    """(sum of w, E)"""
    total, expectation = sum(map(int, weight[ids])), 0.0
    for i in ids:
        if weight[i]:
            expectation += float(weight[i]) * d[i]
    return float(total), expectation / float(total)


def dynamic_temperature(logits: np.ndarray, p: Any) -> float:
    if p.dynatemp_range == 0:
        return float(p.temperature)
    d = logits.astype(np.float64) - float(logits.max())
    ids = np.flatnonzero(logits > -np.inf)
    total, expectation = expectation_of(weights(d), d, ids)
    entropy = np.log(total / 2.0**42) - expectation
    share = min(1.0, entropy / np.log(len(ids))) if len(ids) > 1 else 0.0
    low, high = max(p.temperature - p.dynatemp_range, 0.0), p.temperature + p.dynatemp_range
    return float(low + (high - low) * max(share, 0.0) ** p.dynatemp_exponent)


def weights(d: np.ndarray) -> np.ndarray:
    with np.errstate(under="ignore"):
        return np.where(d < -30, 0, np.rint(np.exp(d) * 2.0**42)).astype(np.uint64)


def without_top_choices(ids: np.ndarray, weight: np.ndarray, d: np.ndarray, threshold: float) -> np.ndarray:
    """XTC on ids in the order."""
    share = threshold * (sum(map(int, weight[ids])) / 2.0**42)
    ids = ids[weight[ids] > 0]
    first = ids[d[ids] >= np.log(share)] if share > 0 else ids
    return ids[max(len(first) - 1, 0) :]


def order(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """ids by (logit descending, id ascending); adding 0 turns -0 into +0."""
    return ids[np.lexsort((ids, -(logits[ids] + np.float32(0))))]


def choose(
    logits: np.ndarray,
    p: Any,
    position: int,
    sample_index: int = 0,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    end_ids: tuple[int, ...] = (),
    mask: np.ndarray | None = None,
    bad_sequences: Sequence[Sequence[int]] = (),
    breakers: Sequence[Sequence[int]] = (),
) -> int:
    adjusted = adjust(logits, p, prompt or [], output or [], end_ids, mask, bad_sequences, breakers)
    if p.temperature > 0 and p.top_n_sigma > 0:
        adjusted = keep_sigma(adjusted, p.top_n_sigma)
    ids = order(adjusted, np.flatnonzero(adjusted > -np.inf))
    temperature = dynamic_temperature(adjusted, p) if p.temperature > 0 else 0.0
    if temperature == 0:
        return int(ids[0])
    d = (adjusted.astype(np.float64) - float(adjusted[ids[0]])) / temperature
    weight = weights(d)
    if p.min_p > 0:
        ids = ids[d[ids] >= np.log(p.min_p)]
    if p.typical_p < 1:
        total, expectation = expectation_of(weight, d, np.sort(ids))
        score = np.abs(d - expectation)
        by_score = ids[np.lexsort((ids, -(adjusted[ids] + np.float32(0)), score[ids]))]
        ids = order(adjusted, by_score[: prefix(weight[by_score], p.typical_p * total)])
    if p.top_k > 0:
        ids = ids[: p.top_k]
    if p.top_p < 1:
        ids = ids[: prefix(weight[ids], p.top_p * float(sum(map(int, weight[ids]))))]
    if random_bits(p.seed, position, sample_index, 2) >> 11 < p.xtc_probability * 2.0**53:
        ids = without_top_choices(ids, weight, d, p.xtc_threshold)
    target = random_bits(p.seed, position, sample_index) * sum(map(int, weight[ids])) >> 64
    running = 0
    for i in ids:
        running += int(weight[i])
        if running > target:
            return int(i)
    raise AssertionError("the weights are used up")


def prefix(weights: np.ndarray, wanted: float) -> int:
    """Length of the shortest non-empty prefix whose sum reaches `wanted`."""
    running = 0
    for count, weight in enumerate(weights, 1):
        running += int(weight)
        if float(running) >= wanted and running > 0:
            return count
    return len(weights)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64) - float(logits.max())
    return x - np.log(np.exp(x).sum())
