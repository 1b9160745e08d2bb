"""The engine's losses against the trainer's, token by token, on held-out documents.

    python training/tools/paired_losses.py CHECKPOINT FROZEN --text tinystories.txt --text other.txt

CHECKPOINT is the Hugging Face folder that FROZEN was made from. All held-out documents of every text are scored; one that is
longer than the context is scored in windows that start anew. Of a .jsonl file of conversations ("messages") all are, and of
these the tokens that a run counts: what the assistant says, in CHECKPOINT's template. Prints, for all tokens and for each text,
the means, the paired difference with its standard error over tokens (and over documents, within which tokens depend on each
other) and the share of tokens that agree to 1e-4.

Exit code: 0; 1 when the means over all tokens differ by more than three standard errors; 2 when the
texts hold out fewer than --at-least tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pyengine_training import checkpoint
from pyengine_training.chat import ChatFormat, is_chat
from pyengine_training.model import Worker
from pyengine_training.report import quantized_parameters
from pyengine_training.text import load_tokenizer, split_documents
from pyengine_training.threads import single_threaded_blas

import pyengine

Losses = Callable[[list[int]], Any]  # token ids -> loss of each but the first, float64
Document = tuple[list[int], Any]  # token ids, and of each but the first whether it counts


def trainer_losses(worker: Worker, params: Any, quantize: bool) -> Losses:
    """By the trainer's forward."""

    def losses(ids: list[int]) -> Any:
        n = len(ids) - 1
        tokens = np.zeros((1, worker.seq_len), np.int64)
        targets = np.full((1, worker.seq_len), -1, np.int64)
        tokens[0, :n], targets[0, :n] = ids[:-1], ids[1:]
        return worker.evaluate(params, tokens, targets, quantize)[0, :n].astype(np.float64)

    return losses


def windows(ids: list[int], size: int) -> Iterator[list[int]]:
    """Pieces of at most `size` ids that share one, so that each id after the first is predicted once."""
    for start in range(0, len(ids) - 1, size - 1):
        yield ids[start : start + size]


def read_tokens(path: Path, folder: Path, tokenizer: Any, drop_unfinished: bool) -> list[Document]:
    """What is scored of a text."""
    if is_chat(path):
        chat = ChatFormat(folder, tokenizer)
        return [(ids, counted[1:]) for ids, counted in map(chat.encode, chat.conversations(path))]
    _, held_out = split_documents(path, drop_unfinished=drop_unfinished)
    return [(ids, np.ones(len(ids) - 1, bool)) for ids in (tokenizer.encode(text).ids for text in held_out) if ids]


def score(documents: list[Document], size: int, scorers: list[Losses]) -> list[Any]:
    """A (3, tokens that count) array of losses for each document, one row a scorer."""
    return [
        np.stack([np.concatenate([losses(piece) for piece in windows(ids, size)]) for losses in scorers])[:, counted]
        for ids, counted in documents
    ]


def compare(documents: list[Any]) -> dict[str, Any]:
    """Statistics of documents' losses: rows engine, trainer's int8, trainer's float32."""
    engine, int8, plain = np.concatenate(documents, axis=1)
    difference = engine - int8
    mean, count = float(difference.mean()), len(difference)
    sums = [float((d[0] - d[1] - mean).sum()) for d in documents]
    return {
        "documents": len(documents),
        "tokens": count,
        "engine": float(engine.mean()),
        "trainer_int8": float(int8.mean()),
        "trainer_float32": float(plain.mean()),
        "difference": mean,
        "standard_error": float(difference.std()) / math.sqrt(count),
        "standard_error_over_documents": math.sqrt(math.fsum(s * s for s in sums)) / count,
        "agree_to_1e-4": float((np.abs(difference) < 1e-4).mean()),
        "rms_to_int8": float(np.sqrt((difference**2).mean())),
        "rms_to_float32": float(np.sqrt(((engine - plain) ** 2).mean())),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("frozen", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True, help="repeatable")
    parser.add_argument("--at-least", type=int, default=100_000, metavar="N", help="tokens (default 100000)")
    parser.add_argument("--documents", type=int, help="only the first so many of each text, for a quick look")
    parser.add_argument("--keep-unfinished", action="store_true", help="documents that do not end like a sentence too")
    args = parser.parse_args()
    model, params = checkpoint.load_model(args.checkpoint)
    tokenizer = load_tokenizer(args.checkpoint / "tokenizer.json")
    texts: dict[str, list[Document]] = {}
    for path in args.text:
        read = read_tokens(path, args.checkpoint, tokenizer, not args.keep_unfinished)[: args.documents]
        texts[str(path) if path.name in texts else path.name] = [one for one in read if one[1].any()]
    every = [document for documents in texts.values() for document in documents]
    count = sum(int(counted.sum()) for _, counted in every)
    if count < args.at_least:
        print(f"the held-out documents have {count} tokens, fewer than --at-least {args.at_least}", file=sys.stderr)
        return 2
    size = min(model.max_seq_len, max(len(ids) for ids, _ in every))
    worker = Worker(model, 1, size, training=False)
    with single_threaded_blas(), pyengine.Engine(args.frozen) as engine:
        scorers: list[Losses] = [
            lambda ids: -np.asarray(engine.score(ids).logprobs[1:], np.float64),
            trainer_losses(worker, quantized_parameters(params), True),
            trainer_losses(worker, params, False),
        ]
        scored = {name: score(documents, size, scorers) for name, documents in texts.items()}
    result = compare([document for documents in scored.values() for document in documents])
    within = abs(result["difference"]) <= 3 * result["standard_error"]
    by_text = {name: compare(documents) for name, documents in scored.items() if documents}
    print(json.dumps({**result, "within_three": within, "texts": by_text}, indent=2))
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
