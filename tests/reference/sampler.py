"""The sampler's specification (csrc/sampler/sampler.h) in plain NumPy: full sorts, Python integers, no cleverness."""

from __future__ import annotations

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


def random_bits(seed: int, position: int, sample_index: int) -> int:
    counter = (position & MASK32, position >> 32, sample_index & MASK32, sample_index >> 32)
    out = philox(counter, (seed & MASK32, seed >> 32))
    return out[0] | out[1] << 32


def adjust(
    logits: np.ndarray,
    p: Any,
    prompt: list[int],
    output: list[int],
    end_ids: tuple[int, ...] = (),
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Step 1. logits (V) float32, mask (V) bool -> (V) float32."""
    out = logits.astype(np.float32).copy()
    penalties = (p.repetition_penalty, p.frequency_penalty, p.presence_penalty) != (1.0, 0.0, 0.0)
    for token in set(prompt) | set(output) if penalties else ():
        value = float(out[token])
        value = value / p.repetition_penalty if value > 0 else value * p.repetition_penalty
        count = output.count(token)
        if count:
            value = value - p.frequency_penalty * count - p.presence_penalty
        out[token] = np.float32(value)
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
    return out


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
) -> int:
    adjusted = adjust(logits, p, prompt or [], output or [], end_ids, mask)
    ids = order(adjusted, np.flatnonzero(adjusted > -np.inf))
    if p.temperature == 0:
        return int(ids[0])
    d = (adjusted.astype(np.float64) - float(adjusted[ids[0]])) / p.temperature
    with np.errstate(under="ignore"):
        weight = np.where(d < -30, 0, np.rint(np.exp(d) * 2.0**42)).astype(np.uint64)
    if p.min_p > 0:
        ids = ids[d[ids] >= np.log(p.min_p)]
    if p.typical_p < 1:
        by_id = np.sort(ids)
        total = sum(map(int, weight[ids]))
        expectation = 0.0
        for i in by_id:
            if weight[i]:
                expectation += float(weight[i]) * d[i]
        score = np.abs(d - expectation / float(total))
        by_score = ids[np.lexsort((ids, -(adjusted[ids] + np.float32(0)), score[ids]))]
        ids = order(adjusted, by_score[: prefix(weight[by_score], p.typical_p * float(total))])
    if p.top_k > 0:
        ids = ids[: p.top_k]
    if p.top_p < 1:
        ids = ids[: prefix(weight[ids], p.top_p * float(sum(map(int, weight[ids]))))]
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
