"""Text from a model in training: temperature and nucleus sampling over the plain float32 forward.

For a look at progress, not for use: every token reruns the whole prefix. The engine is what
generates fast.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .arena import Arena
from .model import Worker


def generate(
    worker: Worker,
    params: Arena,
    prompt: list[int],
    max_tokens: int,
    *,
    eos: int | None,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    quantize: bool = False,
) -> list[int]:
    """Continue ``prompt`` (token ids, BOS included) until eos, max_tokens or the worker's sequence
    length.

    worker has one row. The same arguments give the same tokens; temperature 0 takes the likeliest.
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    tokens = np.zeros((1, worker.seq_len), np.int64)
    ids = list(prompt)
    tokens[0, : len(ids)] = ids
    while len(ids) - len(prompt) < max_tokens and len(ids) < worker.seq_len:
        worker.forward(params, tokens, quantize)
        logits = worker.xn_final[len(ids) - 1] @ worker.output_matrix(params).T
        token = pick(logits.astype(np.float64), temperature, top_p, float(generator.random()))
        if token == eos:
            break
        tokens[0, len(ids)] = token
        ids.append(token)
    return ids[len(prompt) :]


def pick(logits: Any, temperature: float, top_p: float, uniform: float) -> int:
    """One token from logits (vocab_size,): the smallest set of mass top_p, by descending
    probability, then ascending id.
    """
    if temperature <= 0:
        return int(np.argmax(logits))
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    cumulative = np.cumsum(p[order])
    count = int(np.searchsorted(cumulative, top_p)) + 1
    target = uniform * cumulative[min(count, len(order)) - 1]
    return int(order[int(np.searchsorted(cumulative[:count], target, side="right").clip(0, count - 1))])
