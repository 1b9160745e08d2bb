"""Golden outputs: what a frozen file must compute, on any machine and instruction set, to the bit.

`pyengine freeze` computes them once and stores them in the file; `pyengine verify` computes them again.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from pyengine.format.reader import FrozenFile

N_PROMPT, N_GREEDY = 24, 16
STRIDE = 7919  # a prime: prompts that walk all over the vocabulary


def _greedy_token(logits: memoryview) -> int:
    """The most probable token, the smallest id of equals."""
    return max(range(len(logits)), key=lambda token: (logits[token], -token))


def compute(path: str | os.PathLike[str], n_threads: int = 0) -> dict[str, Any]:
    """{"tokens": prompt ids, "greedy": the ids that follow, "logits_sha256": of all rows' float32 logits, little-endian}.

    Raises what opening and running the file raises (ModelFormatError, NotFiniteError, …).
    """
    from pyengine import _core

    with FrozenFile.open(path) as frozen:
        config = frozen.config
        model = _core.Model(config, frozen.buffer, frozen.weights, n_threads)
        context = _core.Context(model, n_threads=n_threads)
        vocab_size, n_ctx = config.vocab_size, config.max_seq_len
        prompt = [(1 + STRIDE * i) % vocab_size for i in range(min(N_PROMPT, n_ctx))]
        digest, greedy, feed = hashlib.sha256(), [], prompt
        sequence = context.sequence_new()
        for _ in range(max(1, min(N_GREEDY, n_ctx - len(prompt)))):
            context.forward(feed, [sequence] * len(feed), b"\1" * len(feed))
            for row in range(context.n_logits):
                with memoryview(context.logits(row)) as logits:
                    digest.update(logits)
                    token = _greedy_token(logits)
            greedy.append(token)
            feed = [token]
        del sequence, context, model
    return {"tokens": prompt, "greedy": greedy, "logits_sha256": digest.hexdigest()}


def compute_json(path: str) -> bytes:
    """`compute` as the content of the attachment golden.json."""
    return json.dumps(compute(path)).encode()
