"""Numbers for a model card, measured in the engine itself: bits per byte on held-out documents, and
what samples look like.

    python training/tools/model_report.py --text tinystories.txt MODEL [MODEL ...]

MODEL is anything that ``pyengine.Engine`` opens (a frozen file, a Hugging Face folder, a llama2.c
checkpoint), so other people's models are scored by the same code. Held-out documents are the
trainer's: one in fifty, chosen by content, the same for every model. The result is one JSON object
per model on stdout.

bits_per_byte: negative log2-probability of a document's own tokens (its end is not counted) over
its UTF-8 bytes. Documents longer than the context are scored in windows that start anew.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyengine_training.text import is_validation, read_documents

import pyengine

WORD = re.compile(r"[A-Za-z']+")


def document_bits(engine: Any, text: str) -> float:
    """Negative log2-probability of a document's tokens after BOS."""
    ids = engine.tokenize(text)
    bits = 0.0
    for start in range(0, len(ids) - 1, engine.n_ctx - 1):
        window = ids[start : start + engine.n_ctx]
        bits -= sum(engine.score(window).logprobs[1:]) / math.log(2)
    return bits


def bits_per_byte(engine: Any, documents: list[str]) -> dict[str, float]:
    """Over all documents, with the standard error over documents."""
    bits = [document_bits(engine, text) for text in documents]
    sizes = [len(text.encode()) for text in documents]
    mean = sum(bits) / sum(sizes)
    residuals = [b - mean * n for b, n in zip(bits, sizes, strict=True)]
    spread = math.sqrt(sum(r * r for r in residuals)) / sum(sizes)
    return {"bits_per_byte": mean, "standard_error": spread, "documents": len(documents)}


def repeated_share(words: list[str]) -> float:
    """Share of 4-grams that occurred before in the same text."""
    grams = Counter(tuple(words[i : i + 4]) for i in range(len(words) - 3))
    total = sum(grams.values())
    return sum(count - 1 for count in grams.values()) / total if total else 0.0


def text_statistics(texts: list[str], known: set[str]) -> dict[str, float]:
    """Means over texts."""
    words = [[w.lower() for w in WORD.findall(text)] for text in texts]
    total = sum(len(w) for w in words)
    return {
        "known_words": sum(w in known for text in words for w in text) / max(1, total),
        "repeated_4grams": sum(repeated_share(w) for w in words) / len(words),
        "words": total / len(words),
    }


def samples(engine: Any, prompt: str, count: int) -> Iterator[tuple[int, str, bool]]:
    """(seed, text, whether the story ended by itself) with the model's own generation settings."""
    for seed in range(count):
        result = engine.generate(prompt, seed=seed)
        yield seed, prompt + result.text, result.finish_reason == "stop"


def report(model: str, documents: list[str], known: set[str], args: argparse.Namespace) -> Any:
    """Everything about one model."""
    with pyengine.Engine(model) as engine:
        result: dict[str, Any] = {"model": Path(model).name, **bits_per_byte(engine, documents)}
        if args.samples:
            drawn = list(samples(engine, args.prompt, args.samples))
            texts = [text for _, text, _ in drawn]
            result["samples"] = text_statistics(texts, known)
            result["samples"]["ended"] = sum(ended for *_, ended in drawn) / len(drawn)
            result["validation"] = text_statistics(documents[: args.samples], known)
            result["shown"] = [{"seed": s, "text": t} for s, t, _ in drawn[: args.show]]
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--show", type=int, default=10)
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--keep-unfinished", action="store_true")
    args = parser.parse_args()
    train: list[str] = []
    held_out: list[str] = []
    for text in read_documents(args.text, drop_unfinished=not args.keep_unfinished):
        (held_out if is_validation(text) else train).append(text)
    known = {word.lower() for text in train for word in WORD.findall(text)}
    for model in args.models:
        print(json.dumps(report(model, held_out[: args.documents], known, args), indent=2))


if __name__ == "__main__":
    main()
