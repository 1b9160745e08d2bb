"""The commands: options in, exit code out. Each command's work is elsewhere."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import options as given
from . import report, runfolder, setup, train
from .data import Corpus, prepare_corpus
from .device import Device
from .errors import ConfigError
from .flags import train_parser


def run(command: str, arguments: Sequence[str]) -> int:
    """Dispatch."""
    return {
        "train": _train,
        "prepare": _prepare,
        "evaluate": report.evaluate_command,
        "sample": report.sample_command,
        "snap": report.snap_command,
    }[command](list(arguments))


def _train(arguments: list[str]) -> int:
    options = train_parser().parse_args(arguments)
    folder: Path = options.run_dir
    values = given.collect(options)
    device = Device.of(options)
    if options.resume:
        return _resume(values, options, device)
    given.refuse_unused(values, options)
    if options.dry_run:
        setup.dry_run(values, options)
        return 0
    device.require()  # before minutes of tokenizing
    with runfolder.new(folder):
        set_up = setup.branch if values.get("branch_from") else setup.new_run
        set_up(values, options, folder, arguments)
        parent = Path(values["branch_from"]) if values.get("branch_from") else None
        train.run_training(folder, threads=options.threads, parent=parent, device=device)
    return 0


def _resume(values: dict[str, Any], options: argparse.Namespace, device: Device) -> int:
    """Continue a run as it was started."""
    folder: Path = options.run_dir
    if values:
        raise ConfigError(
            f"--resume continues the run as it was started; {', '.join(sorted(values))} cannot change "
            "(a new run with --branch-from can)"
        )
    if options.dry_run:
        raise ConfigError("--dry-run has no effect beside --resume: the run's log has its plan")
    device.require()
    with runfolder.existing(folder):
        parent = runfolder.read_run(folder).get("parent")
        train.run_training(folder, threads=options.threads, parent=Path(parent) if parent else None, device=device)
    return 0


# ---- prepare -----------------------------------------------------------------------------------------------------


def _prepare(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="pyengine train prepare", description="Tokenize a text.")
    parser.add_argument("text", type=Path, help=".txt or .jsonl")
    parser.add_argument("folder", type=Path, help="new folder for shards, manifest and tokenizer")
    parser.add_argument("--vocab-size", type=int, help="of the tokenizer to train (default 4096)")
    parser.add_argument("--tokenizer", type=Path, help="use this tokenizer.json instead of training one")
    parser.add_argument("--drop-unfinished", action="store_true", help="documents that end like a sentence only")
    options = parser.parse_args(arguments)
    if options.vocab_size and options.tokenizer:
        raise ConfigError("--vocab-size would have no effect: --tokenizer is given")
    if options.folder.exists() and any(options.folder.iterdir()):
        raise ConfigError(f"{options.folder}: exists already and is not empty")
    values = {name: value for name, value in vars(options).items() if value}
    tokenizer = setup.find_tokenizer(values, given.data_paths({"data": [options.text]}))
    prepare_corpus(options.text, options.folder, tokenizer, drop_unfinished=bool(options.drop_unfinished))
    (options.folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    corpus = Corpus(options.folder)
    summary = {"train_tokens": corpus.train.n_tokens, "validation": corpus.validation.n_tokens}
    print(json.dumps(summary))
    return 0
