"""The commands: options in, exit code out. Each command's work is elsewhere."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import checkpoint as checkpoints
from . import options as given
from . import report, runfolder, setup, tensorboard, train
from .comm import ending_together, launched_ranks, same_everywhere, together, world
from .data import Corpus, prepare_corpus
from .device import Device, Machine
from .errors import ConfigError
from .files import package_digest, write_json
from .flags import train_parser
from .parser import Parser
from .text import PARQUET, tokenizer_config


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
    rank, ranks = launched_ranks()
    with contextlib.redirect_stderr(io.StringIO()) if rank else contextlib.nullcontext():
        parser = train_parser()
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            meant = "" if unknown[0].startswith("-") else f"; a text is given with --data {unknown[0]}"
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        if options.run_dir is None and not options.plan:
            parser.error("the following arguments are required: --run-dir")
    values = given.collect(options)
    given.refuse_unused_here(options, ranks)
    if not options.resume:
        given.refuse_unused(values, options)
    if options.plan:
        setup.plan_on_paper(values, options)
        return 0
    if options.dry_run and not options.resume:
        setup.dry_run(values, options)
        return 0
    comm = world()
    with ending_together(comm):
        if comm.size > 1:
            program = {"program": package_digest(), "command line": shlex.join(arguments)}
            same_everywhere(comm, {**checkpoints.environment(), **program})
        device = Device.of(options)
        with together(comm):
            device.require(comm.local_rank)  # before minutes of tokenizing
            if options.tensorboard:
                tensorboard.require()
        comm = device.connect(comm, options.comm)
        machine = Machine(device, options.threads, comm, options.shard_optimizer)
        (_resume if options.resume else _start)(values, options, machine, arguments)
    return 0


def _start(values: dict[str, Any], options: argparse.Namespace, machine: Machine, arguments: list[str]) -> None:
    """A new run: rank 0 sets it up."""
    folder: Path = options.run_dir
    comm = machine.comm
    with contextlib.ExitStack() as stack:
        with together(comm):
            if comm.rank == 0:
                stack.enter_context(runfolder.new(folder))
                set_up = setup.branch if values.get("branch_from") else setup.new_run
                set_up(values, folder, arguments)
        if "budget_minutes" in values:
            setup.apply_budget(folder, float(values["budget_minutes"]), machine)
        parent = Path(values["branch_from"]) if values.get("branch_from") else None
        train.run_training(folder, machine, parent, tensorboard=options.tensorboard)


def _resume(values: dict[str, Any], options: argparse.Namespace, machine: Machine, arguments: list[str]) -> None:
    """Continue a run as it was started."""
    folder: Path = options.run_dir
    if values:
        raise ConfigError(
            f"--resume continues the run as it was started; {', '.join(sorted(values))} cannot change "
            "(a new run with --branch-from can)"
        )
    if options.dry_run:
        raise ConfigError("--dry-run has no effect beside --resume: the run's log has its plan")
    with contextlib.ExitStack() as stack:
        with together(machine.comm):
            if machine.comm.rank == 0:
                stack.enter_context(runfolder.existing(folder))
            run = runfolder.read_run(folder)
            given.refuse_sharded_adapters(run, options)
            parent = run.get("parent")
        train.run_training(folder, machine, Path(parent) if parent else None, tensorboard=options.tensorboard)


# ---- prepare -----------------------------------------------------------------------------------------------------


def _prepare(arguments: list[str]) -> int:
    parser = Parser(prog="pyengine train prepare", description="Tokenize a text.")
    parser.add_argument("text", type=Path, help=".txt, .jsonl or .parquet")
    parser.add_argument("folder", type=Path, help="new folder for shards, manifest and tokenizer")
    parser.add_argument("--vocab-size", type=int, help="of the tokenizer to train (default 4096)")
    parser.add_argument("--tokenizer", type=Path, help="use this tokenizer.json instead of training one")
    parser.add_argument("--held-out", type=float, metavar="S", help="share of the documents (default 0.02)")
    parser.add_argument("--column", metavar="NAME", help="of a .parquet file (default text)")
    parser.add_argument("--drop-unfinished", action="store_true", help="documents that end like a sentence only")
    options = parser.parse_args(arguments)
    if options.vocab_size and options.tokenizer:
        raise ConfigError("--vocab-size would have no effect: --tokenizer is given")
    if options.folder.exists() and any(options.folder.iterdir()):
        raise ConfigError(f"{options.folder}: exists already and is not empty")
    values = {name: value for name, value in vars(options).items() if value is not None and value is not False}
    (share,) = given.held_out_shares(values, 1)
    if options.column and options.text.suffix != PARQUET:
        raise ConfigError("--column would have no effect: the text is no .parquet file")
    paths = given.data_paths({"data": [options.text]})
    with contextlib.closing(runfolder.Log(None)) as log:
        tokenizer = setup.find_tokenizer(values, paths, log.report)
        bos, eos = setup.find_ends(values, [], tokenizer)
        more = {"held_out": share, "say": log.report, **setup.reading(values)}
        prepare_corpus(options.text, options.folder, tokenizer, eos=eos, **more)
    (options.folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    write_json(options.folder / "tokenizer_config.json", tokenizer_config(tokenizer, 1 << 20, bos, eos))
    corpus = Corpus(options.folder)
    summary = {"train_tokens": corpus.train.n_tokens, "validation": corpus.validation.n_tokens}
    print(json.dumps(summary))
    return 0
