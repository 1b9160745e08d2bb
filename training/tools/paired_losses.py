"""The engine's losses against the trainer's, token by token, on held-out documents.

    python training/tools/paired_losses.py CHECKPOINT FROZEN --text tinystories.txt --tokens 100000

CHECKPOINT is the Hugging Face folder that FROZEN was made from. Prints means, the paired difference
with its standard error, and the share of tokens that agree to 1e-4; exits with 1 when the means
differ by more than three standard errors.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from pyengine_training import checkpoint
from pyengine_training.model import Worker
from pyengine_training.report import quantized_parameters
from pyengine_training.text import is_validation, load_tokenizer, read_documents
from pyengine_training.trainer import single_threaded_blas

import pyengine


def trainer_losses(worker: Worker, params: Any, ids: list[int], quantize: bool) -> Any:
    """Loss of each token after the first, float64."""
    n = len(ids) - 1
    tokens = np.zeros((1, worker.seq_len), np.int64)
    targets = np.full((1, worker.seq_len), -1, np.int64)
    tokens[0, :n], targets[0, :n] = ids[:-1], ids[1:]
    return worker.evaluate(params, tokens, targets, quantize)[0, :n].astype(np.float64)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("frozen", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=100_000)
    args = parser.parse_args()
    model, params = checkpoint.load_model(args.checkpoint)
    quantized = quantized_parameters(params)
    tokenizer = load_tokenizer(args.checkpoint / "tokenizer.json")
    worker = Worker(model, 1, model.max_seq_len, training=False)
    columns: list[list[Any]] = [[], [], []]
    count = 0
    with single_threaded_blas(), pyengine.Engine(args.frozen) as engine:
        for text in read_documents(args.text, drop_unfinished=True):
            if not is_validation(text) or count >= args.tokens:
                continue
            ids = tokenizer.encode(text).ids[: model.max_seq_len]
            columns[0].append(-np.asarray(engine.score(ids).logprobs[1:], np.float64))
            columns[1].append(trainer_losses(worker, quantized, ids, True))
            columns[2].append(trainer_losses(worker, params, ids, False))
            count += len(ids) - 1
    engine_loss, int8, plain = (np.concatenate(c) for c in columns)
    difference = engine_loss - int8
    standard_error = difference.std() / math.sqrt(len(difference))
    within = abs(difference.mean()) <= 3 * standard_error
    print(
        json.dumps(
            {
                "tokens": len(difference),
                "engine": engine_loss.mean(),
                "trainer_int8": int8.mean(),
                "trainer_float32": plain.mean(),
                "difference": difference.mean(),
                "standard_error": standard_error,
                "within_three": bool(within),
                "agree_to_1e-4": float((np.abs(difference) < 1e-4).mean()),
                "rms_to_int8": float(np.sqrt((difference**2).mean())),
                "rms_to_float32": float(np.sqrt(((engine_loss - plain) ** 2).mean())),
            },
            indent=2,
        )
    )
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
