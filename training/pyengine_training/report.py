"""Commands that look at models: evaluate, sample, snap, cost."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import checkpoint as checkpoints
from . import runfolder, sample
from .arena import Arena
from .config import ModelConfig, model_config_from_json, train_config_from_json
from .data import Corpus, prepare_corpus, validation_batches
from .errors import ConfigError, TrainingError
from .files import atomic_directory
from .model import Worker, fake_quantize_parameters
from .plan import format_seconds
from .text import load_tokenizer
from .trainer import Validation, available_threads, evaluate, single_threaded_blas

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
        return evaluate(workers, pool, weights, batches, n_bytes, int8)


def evaluate_command(arguments: Sequence[str]) -> int:
    """Loss and bits per byte of a model in float32 and in the engine's simulated int8."""
    parser = argparse.ArgumentParser(prog="pyengine train evaluate", description=__doc__)
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("data", type=Path, help="text, or prepared folder")
    parser.add_argument("--documents", type=int, help="validation documents (default: all)")
    parser.add_argument("--seq-len", type=int, default=1 << 30)
    parser.add_argument("--drop-unfinished", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = options.data
        if not folder.is_dir():
            folder = Path(scratch) / "data"
            tokenizer = load_tokenizer(options.model / "tokenizer.json")
            prepare_corpus(options.data, folder, tokenizer, drop_unfinished=options.drop_unfinished)
        corpus = Corpus(folder)
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
    parser = argparse.ArgumentParser(prog="pyengine train sample", description=sample_command.__doc__)
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--max-tokens", type=int, default=120)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--int8", action="store_true", help="simulate the engine's arithmetic")
    options = parser.parse_args(arguments)
    model, params = checkpoints.load_model(options.model)
    tokenizer = load_tokenizer(options.model / "tokenizer.json")
    ids = tokenizer.encode(options.prompt).ids
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
    parser = argparse.ArgumentParser(prog="pyengine train snap", description=snap_command.__doc__)
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
            riders=options.model,
        )
    print(options.output)
    return 0


# ---- cost ----------------------------------------------------------------------------------------
# ---------------


@dataclass(frozen=True)
class CostSheet:
    """Training against inference, in numbers. Money is 0 without a rate; None = not known."""

    parameters: int
    training_tokens: int
    training_flops: float
    training_seconds: float
    training_joules: float | None
    training_price: float
    inference_flops_per_token: float
    inference_tokens_per_second: float | None
    inference_price_per_million: float | None
    # generated tokens that take as long as the training did
    break_even_tokens_by_time: float | None
    break_even_tokens_by_flops: float

    def lines(self, rate: float) -> list[str]:
        """For people."""
        joules = self.training_joules
        energy = "not reported by this machine" if joules is None else f"{joules / 3.6e6:.4f} kWh"
        speed, million = self.inference_tokens_per_second, self.inference_price_per_million
        lines = [
            f"parameters                  {self.parameters:,}",
            f"training tokens             {self.training_tokens:,}",
            f"training compute            {self.training_flops:.3g} FLOP",
            f"training time               {format_seconds(self.training_seconds)}",
            f"training energy             {energy}",
            f"training price              {self.training_price:.4f} at {rate:g} an hour",
            f"inference compute           {self.inference_flops_per_token:.3g} FLOP a token",
        ]
        if speed is not None and million is not None:
            lines += [
                f"inference speed             {speed:,.0f} tokens/s",
                f"inference price             {million:.6f} a million tokens",
                f"as long as the training     {self.break_even_tokens_by_time:,.0f} generated tokens",
            ]
        lines.append(f"as much compute             {self.break_even_tokens_by_flops:,.0f} generated tokens")
        return lines


def cost_sheet(
    model: ModelConfig,
    seq_len: int,
    tokens: int,
    seconds: float,
    joules: float | None,
    rate: float,
    tokens_per_second: float | None,
) -> CostSheet:
    """Fill the sheet. rate: price of one hour of this machine."""
    flops = model.flops_per_token(seq_len) * tokens
    per_token = model.flops_per_token(seq_len, training=False)
    speed = tokens_per_second
    return CostSheet(
        parameters=model.n_params(),
        training_tokens=tokens,
        training_flops=flops,
        training_seconds=seconds,
        training_joules=joules,
        training_price=seconds / 3600 * rate,
        inference_flops_per_token=per_token,
        inference_tokens_per_second=speed,
        inference_price_per_million=None if speed is None else 1e6 / speed / 3600 * rate,
        break_even_tokens_by_time=None if speed is None else seconds * speed,
        break_even_tokens_by_flops=flops / per_token,
    )


MEASURE = """
import json, sys, pyengine
engine = pyengine.Engine(sys.argv[1])
room = engine.n_ctx - 16
engine.generate("Once upon a time", max_tokens=8, temperature=0)
rates = []
for seed in range(3):
    result = engine.generate("Once upon a time", max_tokens=room, temperature=1.0, seed=seed)
    rates.append(result.timings.tokens_per_second)
print(json.dumps(sorted(rates)[1]))
"""


def measured_tokens_per_second(model: Path) -> float:
    """Median decoding speed of the engine on a frozen file (or anything it opens), in a process of
    its own.
    """
    done = subprocess.run([sys.executable, "-c", MEASURE, str(model)], capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise TrainingError(f"the engine could not measure {model}: {last[0]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def cost_command(arguments: Sequence[str]) -> int:
    """What training was and what inference is: FLOPs, time, energy, price, and where they are
    equal.
    """
    parser = argparse.ArgumentParser(prog="pyengine cost", description=cost_command.__doc__)
    parser.add_argument("run", type=Path, help="run folder, or one checkpoint of it")
    parser.add_argument("--rate", type=float, default=0.0, help="price of an hour of this machine")
    parser.add_argument("--model", type=Path, help="frozen file whose speed is measured here")
    parser.add_argument("--tokens-per-second", type=float, help="speed, instead of measuring")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    folder: Path = options.run
    if not (folder / "state.json").exists():
        runfolder.read_run(folder)
        found = checkpoints.checkpoints(folder)
        if not found:
            raise ConfigError(f"{folder}: no checkpoint yet")
        folder = found[-1]
    state = checkpoints.read_state(folder)
    speed: float | None = options.tokens_per_second
    if speed is None and options.model is not None:
        speed = measured_tokens_per_second(options.model)
    sheet = cost_sheet(
        model_config_from_json(state["model"]),
        train_config_from_json(state["train"]).seq_len,
        int(state["tokens"]),
        float(state["seconds"]),
        state.get("joules"),
        options.rate,
        speed,
    )
    values: dict[str, Any] = asdict(sheet)
    print(json.dumps(values, indent=2) if options.json else "\n".join(sheet.lines(options.rate)))
    return 0
