"""Numbers for a model card, measured in the engine itself: bits per byte on held-out documents, and
what samples look like.

    python training/tools/model_report.py --text tinystories.txt MODEL [MODEL ...]
    python training/tools/model_report.py --text tinystories.txt --text other.txt --documents 1000 MODEL

MODEL is anything that ``pyengine.Engine`` opens (a frozen file, a Hugging Face folder, a llama2.c
checkpoint), so other people's models are scored by the same code. Held-out documents are the
trainer's: one in fifty, chosen by content, the same for every model. The result is one JSON object
per model on stdout. With several texts each is scored by itself ("texts") and all together; samples
are set beside the held-out documents of the first.

With --sources, checkpoints that the models were frozen from (in the same order), each is scored in
float32 as well, by the trainer's forward on the same tokens.

bits_per_byte: negative log2-probability of a document's own tokens (its end is not counted) over
its UTF-8 bytes. Documents longer than the context are scored in windows that start anew.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pyengine_training.arena import Arena, parameter_shapes
from pyengine_training.config import ModelConfig
from pyengine_training.model import Worker
from pyengine_training.text import split_documents

import pyengine
from pyengine.freeze import open_source

WORD = re.compile(r"[A-Za-z']+")


Scorer = Callable[[list[int]], float]  # token ids -> natural log-probability of all but the first


def document_bits(engine: Any, text: str, log_probability: Scorer) -> float:
    """Negative log2-probability of a document's tokens after BOS."""
    ids = engine.tokenize(text)
    bits = 0.0
    for start in range(0, len(ids) - 1, engine.n_ctx - 1):
        bits -= log_probability(ids[start : start + engine.n_ctx]) / math.log(2)
    return bits


def float32_scorer(source: Path, tokenizer: Path | None) -> Scorer:
    """Scores by the trainer's float32 forward on the weights of a checkpoint that freeze can read.

    Models beyond that forward are refused: biases, windows, convolutions, other gates and norms, experts, soft caps.
    """
    with contextlib.closing(open_source(source, tokenizer=tokenizer)) as model:
        c = model.config
        biases = c.qkv_bias, c.o_bias, c.gate_up_bias, c.down_bias, c.output_bias
        attention = c.qk_norm_all_heads, c.qk_norm_after_rope, c.attention_sinks, c.attention_softcap
        beyond = *biases, *attention, c.n_experts, c.logits_softcap
        # A layer that says nothing is a plain one: attention to all positions, RMSNorm, SwiGLU.
        if any(beyond) or any(layer != type(layer)() for layer in c.layers):
            raise SystemExit(f"{source}: not a plain Llama; cannot be scored in float32")
        names = {f.name for f in dataclasses.fields(ModelConfig)} & set(dir(c))
        config = ModelConfig(**{name: getattr(c, name) for name in names})
        params = Arena(parameter_shapes(config))
        for name, view in params.views.items():
            if view.ndim == 1:
                view[...] = model.vectors[name]()
                continue
            rows = model.matrices[name].read_rows(0, model.matrices[name].rows)
            if name.endswith("w_gate_up"):  # gate and up alternate by panels of 16 rows
                panels = rows.reshape(-1, 2, 16, rows.shape[1])
                halves = [panels[:, i].reshape(-1, rows.shape[1])[: c.hidden_dim] for i in (0, 1)]
                rows = np.concatenate(halves)
            view[...] = rows
        inv_freq = np.asarray(model.vectors["rope.0.inv_freq"]())
    worker = Worker(config, 1, config.max_seq_len, training=False)
    angle = (np.arange(worker.seq_len, dtype=np.float32)[:, None] * inv_freq).astype(np.float64)
    worker.cos, worker.sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

    def log_probability(ids: list[int]) -> float:
        tokens = np.zeros((1, worker.seq_len), np.int64)
        targets = np.full((1, worker.seq_len), -1, np.int64)
        n = len(ids) - 1
        tokens[0, :n], targets[0, :n] = ids[:-1], ids[1:]
        return -float(worker.evaluate(params, tokens, targets, False).sum(dtype=np.float64))

    return log_probability


def summary(bits: list[float], documents: list[str]) -> dict[str, float]:
    """Bits per byte over all documents, with the standard error over documents."""
    sizes = [len(text.encode()) for text in documents]
    mean = sum(bits) / sum(sizes)
    residuals = [b - mean * n for b, n in zip(bits, sizes, strict=True)]
    spread = math.sqrt(sum(r * r for r in residuals)) / sum(sizes)
    return {"bits_per_byte": mean, "standard_error": spread, "documents": len(documents)}


Texts = dict[str, list[str]]  # name of a text -> its held-out documents


def score_texts(engine: Any, texts: Texts, log_probability: Scorer) -> tuple[dict[str, float], dict[str, Any]]:
    """(all texts together, each by its name)."""
    bits = {name: [document_bits(engine, text, log_probability) for text in texts[name]] for name in texts}
    together = summary([b for name in texts for b in bits[name]], [text for name in texts for text in texts[name]])
    return together, {name: summary(bits[name], texts[name]) for name in texts}


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


def report(
    model: str,
    source: Path | None,
    texts: Texts,
    known: set[str],
    args: argparse.Namespace,
) -> Any:
    """Everything about one model."""
    with pyengine.Engine(model) as engine:
        result: dict[str, Any] = {"model": Path(model).name}
        scorers: dict[str, Scorer] = {"int8": lambda ids: sum(engine.score(ids).logprobs[1:])}
        if source is not None:
            scorers["float32"] = float32_scorer(source, args.tokenizer)
        for arithmetic, scorer in scorers.items():
            result[arithmetic], by_text = score_texts(engine, texts, scorer)
            if len(texts) > 1:
                for name, values in by_text.items():
                    result.setdefault("texts", {}).setdefault(name, {})[arithmetic] = values
        if args.samples:
            drawn = list(samples(engine, args.prompt, args.samples))
            result["samples"] = text_statistics([text for _, text, _ in drawn], known)
            result["samples"]["ended"] = sum(ended for *_, ended in drawn) / len(drawn)
            first = next(iter(texts.values()))
            result["validation"] = text_statistics(first[: args.samples], known)
            result["shown"] = [{"seed": s, "text": t} for s, t, _ in drawn[: args.show]]
        return result


def read_texts(paths: list[Path], count: int, keep_unfinished: bool) -> tuple[Texts, set[str]]:
    """The first `count` held-out documents of each text, and the words of all that is not held out."""
    texts: Texts = {}
    known: set[str] = set()
    for path in paths:
        train, held_out = split_documents(path, drop_unfinished=not keep_unfinished)
        if not held_out:
            raise SystemExit(f"{path}: no document is held out (one in fifty is); the text is too short")
        texts[str(path) if path.name in texts else path.name] = held_out[:count]
        known |= {word.lower() for text in train for word in WORD.findall(text)}
    return texts, known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--sources", nargs="*", type=Path, default=[])
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.bin of llama2.c sources")
    parser.add_argument("--text", type=Path, action="append", required=True, help="repeatable")
    parser.add_argument("--documents", type=int, default=200, help="held-out documents of each text (default 200)")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--show", type=int, default=10)
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--keep-unfinished", action="store_true")
    args = parser.parse_args()
    texts, known = read_texts(args.text, args.documents, args.keep_unfinished)
    for number, model in enumerate(args.models):
        source = args.sources[number] if number < len(args.sources) else None
        print(json.dumps(report(model, source, texts, known, args), indent=2))


if __name__ == "__main__":
    main()
