"""Commands that look at models: evaluate, sample, snap."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from . import checkpoint as checkpoints
from . import sample
from .arena import Arena
from .data import Corpus, prepare_corpus, validation_batches
from .errors import ConfigError
from .files import atomic_directory
from .model import Worker, fake_quantize_parameters
from .parser import Parser, at_least, number
from .text import load_tokenizer
from .threads import available_threads, single_threaded_blas
from .validation import Validation, summarize, sums_on_threads

ROWS = 8


def quantized_parameters(params: Arena) -> Arena:
    """The values that the frozen file's int8 codes stand for."""
    result = params.like()
    fake_quantize_parameters(result, params)
    return result


def evaluate_model(folder: Path, corpus: Corpus, *, documents: int | None, seq_len: int, int8: bool) -> Validation:
    """Validation of a Hugging Face folder on the validation documents of a corpus."""
    model, params = checkpoints.load_model(folder)
    seq_len = min(seq_len, model.max_seq_len)
    split = corpus.validation
    count = len(split.length) if documents is None else min(documents, len(split.length))
    eos = checkpoints.special_ids(folder)[1]
    batches = validation_batches(split, ROWS, seq_len, 0 if eos is None else eos, count)
    weights = quantized_parameters(params) if int8 else params
    with single_threaded_blas(), ThreadPoolExecutor(available_threads()) as pool:
        workers = [Worker(model, ROWS, seq_len, training=False) for _ in range(available_threads())]
        n_bytes = int(split.n_bytes[:count].sum())
        return summarize(sums_on_threads(workers, pool, weights, batches, int8), n_bytes)


def evaluate_command(arguments: Sequence[str]) -> int:
    """Loss and bits per byte of a model in float32 and in the engine's simulated int8."""
    parser = Parser(prog="pyengine train evaluate", description=evaluate_command.__doc__)
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("data", type=Path, help="text, or prepared folder")
    parser.add_argument("--documents", type=at_least(1), help="validation documents (default: all)")
    parser.add_argument(
        "--seq-len", type=at_least(1), default=1 << 30, help="tokens of a window (default: the model's context)"
    )
    parser.add_argument("--drop-unfinished", action="store_true", help="documents that end like a sentence only")
    options = parser.parse_args(arguments)
    if options.drop_unfinished and options.data.is_dir():
        raise ConfigError("--drop-unfinished would have no effect: the documents of a prepared folder are chosen already")
    vocab_size = checkpoints.read_model_config(options.model).vocab_size
    tokenizer = load_tokenizer(options.model / "tokenizer.json")
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = options.data
        if not folder.is_dir():
            folder = Path(scratch) / "data"
            eos = checkpoints.special_ids(options.model)[1]
            prepare_corpus(options.data, folder, tokenizer, eos=eos, drop_unfinished=options.drop_unfinished)
        corpus = Corpus(folder, vocab_size)
        corpus.require_tokenizer(tokenizer)
        results = {
            name: asdict(
                evaluate_model(
                    options.model,
                    corpus,
                    documents=options.documents,
                    seq_len=options.seq_len,
                    int8=name == "int8",
                )
            )
            for name in ("float32", "int8")
        }
    print(json.dumps(results, indent=2))
    return 0


def sample_command(arguments: Sequence[str]) -> int:
    """Text from a checkpoint, by the trainer's own slow forward."""
    parser = Parser(prog="pyengine train sample", description=sample_command.__doc__)
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("--prompt", default="Once upon a time", help="what the text begins with (default: %(default)s)")
    parser.add_argument("--max-tokens", type=at_least(1), default=120, help="at most (default %(default)s)")
    parser.add_argument(
        "--temperature", type=number(0), default=0.7, help="0: the most probable token (default %(default)s)"
    )
    parser.add_argument(
        "--top-p", type=number(0, 1, above=True), default=0.9, help="only tokens that reach this mass (default %(default)s)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="same seed, same text (default %(default)s)")
    parser.add_argument("--int8", action="store_true", help="simulate the engine's arithmetic")
    options = parser.parse_args(arguments)
    model, params = checkpoints.load_model(options.model)
    tokenizer = load_tokenizer(options.model / "tokenizer.json")
    ids = tokenizer.encode(options.prompt).ids
    if not ids:
        raise ConfigError("--prompt is empty, and this model's tokenizer begins a text with no token of its own: give a word")
    if len(ids) >= model.max_seq_len:
        raise ConfigError(f"the prompt has {len(ids)} tokens, the model sees {model.max_seq_len}")
    worker = Worker(model, 1, min(model.max_seq_len, len(ids) + options.max_tokens), training=False)
    new = sample.generate(
        worker,
        quantized_parameters(params) if options.int8 else params,
        ids,
        options.max_tokens,
        eos=checkpoints.special_ids(options.model)[1],
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        quantize=options.int8,
    )
    print(tokenizer.decode(ids + new))
    return 0


def snap_command(arguments: Sequence[str]) -> int:
    """Write a copy of a model whose weights are the dequantized int8 values, so that other programs
    see what ships. Freezing the copy gives the same codes and scales (except where a scale is
    subnormal in half precision).
    """
    parser = Parser(prog="pyengine train snap", description=snap_command.__doc__)
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("output", type=Path, help="new folder")
    options = parser.parse_args(arguments)
    if options.output.exists():
        raise ConfigError(f"{options.output} exists already")
    model, params = checkpoints.load_model(options.model)
    bos, eos = checkpoints.special_ids(options.model)
    with atomic_directory(options.output) as temporary:
        checkpoints.write_hf_folder(
            temporary,
            quantized_parameters(params),
            model,
            tokenizer=None,
            bos=bos,
            eos=eos,
            attachments=options.model,
        )
    print(options.output)
    return 0
