"""The commands: options in, exit code out. Each command's work is elsewhere."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import checkpoint as checkpoints
from . import report, runfolder, train
from .config import (
    ModelConfig,
    TrainConfig,
    load_options,
    model_from_depth,
    to_json,
    train_config_from_json,
)
from .data import Corpus, file_sha256, prepare_corpus
from .device import Device
from .errors import ConfigError, DataError
from .flags import MODEL_OPTIONS, train_parser
from .plan import estimated_step_seconds, make_plan
from .text import is_validation, load_tokenizer, read_documents, train_tokenizer
from .threads import available_threads


def run(command: str, arguments: Sequence[str]) -> int:
    """Dispatch."""
    return {
        "train": _train,
        "prepare": _prepare,
        "evaluate": report.evaluate_command,
        "sample": report.sample_command,
        "snap": report.snap_command,
    }[command](list(arguments))


# ---- train -------------------------------------------------------------------------------------------------------


def _train(arguments: list[str]) -> int:
    options = train_parser().parse_args(arguments)
    folder: Path = options.run_dir
    device = Device(options.device, options.precision)
    device.require()  # before minutes of tokenizing
    if options.resume:
        if not (folder / "run.json").exists():
            raise ConfigError(f"{folder}: nothing to resume")
        changed = sorted(set(_options(options)) - {"drop_unfinished"})
        if changed:
            raise ConfigError(
                f"--resume continues the run as it was started; {', '.join(changed)} cannot change "
                "(a new run with --branch-from can)"
            )
        parent = runfolder.read_run(folder).get("parent")
        train.run_training(folder, threads=options.threads, parent=Path(parent) if parent else None, device=device)
        return 0
    if options.dry_run:
        return _dry_run(options)
    runfolder.create(folder)
    try:
        if options.branch_from:
            _set_up_branch(options, folder, arguments)
        else:
            _set_up(options, folder, arguments)
    except BaseException:
        if not (folder / "run.json").exists():  # nothing of value: leave no half-made folder behind
            shutil.rmtree(folder, ignore_errors=True)
        raise
    parent = options.branch_from
    train.run_training(folder, threads=options.threads, parent=parent, device=device)
    return 0


def _options(options: argparse.Namespace) -> dict[str, Any]:
    """File options under flags, by field name; flags that were not given are absent."""
    values: dict[str, Any] = load_options(options.config) if options.config else {}
    unknown = sorted(set(values) - set(vars(options)) - {"data_weights", "decay_data_weights"})
    if unknown:
        raise ConfigError(f"{options.config}: unknown option(s) {', '.join(unknown)}")
    for name, value in vars(options).items():
        given = value is not None and (value is not False or name not in values)
        if given and name not in ("config", "run_dir", "resume", "dry_run", "threads", "device", "precision"):
            values[name] = value
    for name in ("data_weights", "decay_data_weights"):
        if isinstance(values.get(name), str):
            try:
                values[name] = [float(w) for w in values[name].split(",")]
            except ValueError as error:
                raise ConfigError(f"--{name.replace('_', '-')}: {values[name]!r}") from error
    return values


def _train_config(values: dict[str, Any], base: dict[str, Any]) -> TrainConfig:
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    chosen = {**base, **{k: v for k, v in values.items() if k in names}}
    if "tokens" in values:
        per_step = chosen.get("batch_size", 16) * chosen.get("seq_len", 512)
        chosen["steps"] = max(1, round(float(values["tokens"]) / per_step))
    return train_config_from_json(chosen)


def _model_config(values: dict[str, Any], vocab_size: int, seq_len: int) -> ModelConfig:
    base = model_from_depth(int(values.get("depth", 4)), vocab_size, seq_len)
    sizes: dict[str, Any] = {name: int(values[name]) for name in MODEL_OPTIONS if name in values}
    if "dim" in sizes and "head_dim" not in sizes and "n_heads" in sizes:
        sizes["head_dim"] = sizes["dim"] // sizes["n_heads"]
    return dataclasses.replace(base, **sizes)


def _data_paths(values: dict[str, Any]) -> list[Path]:
    paths = [Path(p) for p in values.get("data") or []]
    if not paths:
        raise ConfigError("--data is missing: give a .txt or .jsonl file, or a prepared folder")
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
    return paths


def _tokenizer(values: dict[str, Any], paths: list[Path]) -> Any:
    """The given one, a fine-tuned or teaching model's, a prepared folder's, or one trained on the texts."""
    for name in ("tokenizer", "init_from", "teacher"):
        if values.get(name):
            path = Path(values[name])
            return load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
    for path in paths:
        if path.is_dir():
            return load_tokenizer(path / "tokenizer.json")
    drop = bool(values.get("drop_unfinished"))
    documents = (
        text for path in paths for text in read_documents(path, drop_unfinished=drop) if not is_validation(text)
    )
    return train_tokenizer(documents, int(values.get("vocab_size", 4096)))


def _prepare_all(values: dict[str, Any], paths: list[Path], tokenizer: Any, folder: Path) -> list[str]:
    """Corpora of the texts as paths relative to the run folder, or absolute for prepared ones."""
    corpora = []
    for number, path in enumerate(paths):
        if path.is_dir():
            Corpus(path)
            corpora.append(str(path.resolve()))
            continue
        target = folder / "data" / f"{number}_{path.stem}"
        drop = bool(values.get("drop_unfinished"))
        prepare_corpus(path, target, tokenizer, drop_unfinished=drop)
        corpora.append(str(target.relative_to(folder)))
    return corpora


def _set_up(options: argparse.Namespace, folder: Path, arguments: Sequence[str]) -> None:
    """A new run: tokenizer, data, sizes, run.json."""
    values = _options(options)
    paths = _data_paths(values)
    tokenizer = _tokenizer(values, paths)
    defaults: dict[str, Any] = {"data_weights": [1.0] * len(paths)}
    config = _train_config(values, defaults)
    bos: int | None = 0
    eos: int | None = 0
    riders: Path | None = None
    if values.get("init_from"):
        riders = Path(values["init_from"]).resolve()
        model = checkpoints.read_model_config(riders)
        bos, eos = checkpoints.special_ids(riders)
    else:
        model = _model_config(values, tokenizer.get_vocab_size(), config.seq_len)
        if values.get("teacher"):
            bos, eos = checkpoints.special_ids(Path(values["teacher"]))
    if tokenizer.get_vocab_size() > model.vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {model.vocab_size}")
    corpora = _prepare_all(values, paths, tokenizer, folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    extra = {
        "command": shlex.join(["pyengine", "train", *arguments]),
        "init_from": str(riders) if riders else None,
        "data": [{"name": p.name, "sha256": file_sha256(p)} for p in paths if p.is_file()],
    }
    config = dataclasses.replace(config, extra=extra)
    teacher = str(Path(values["teacher"]).resolve()) if values.get("teacher") else None
    if teacher and config.distill_alpha == 0:
        config = dataclasses.replace(config, distill_alpha=0.5)
    run_values = {
        "model": to_json(model),
        "train": to_json(config),
        "corpora": corpora,
        "bos": bos,
        "eos": eos,
        "riders": str(riders) if riders else None,
        "teacher": teacher,
    }
    runfolder.write_run(folder, run_values)
    if values.get("budget_minutes"):
        run_values["train"] = to_json(_budgeted(folder, config, values, options))
        runfolder.write_run(folder, run_values)


def _budgeted(folder: Path, config: TrainConfig, values: dict[str, Any], options: argparse.Namespace) -> TrainConfig:
    minutes = float(values["budget_minutes"])
    device = Device(options.device, options.precision)
    steps, _ = train.steps_for_budget(train.open_run(folder), minutes, options.threads, device)
    extra = {**config.extra, "budget_minutes": minutes}
    return dataclasses.replace(config, steps=steps, extra=extra)


def _set_up_branch(options: argparse.Namespace, folder: Path, arguments: Sequence[str]) -> None:
    """A new run that starts from another run's checkpoint with its data; flags change the schedule."""
    checkpoint = options.branch_from.resolve()
    state = checkpoints.read_state(checkpoint)
    origin = checkpoint.parent if checkpoint.name == "trunk" else checkpoint.parent.parent
    values = runfolder.read_run(origin)
    base = dict(state["train"])
    base["extra"] = {
        **base.get("extra", {}),
        "command": shlex.join(["pyengine", "train", *arguments]),
        "parent_command": base.get("extra", {}).get("command"),
    }
    config = _train_config(_options(options), base)
    if config.steps <= state["step"]:
        raise ConfigError(f"--steps counts from the beginning: the checkpoint has done {state['step']} already")
    corpora = [str((origin / path).resolve()) for path in values["corpora"]]
    shutil.copyfile(origin / "tokenizer.json", folder / "tokenizer.json")
    values.update(train=to_json(config), corpora=corpora, parent=str(checkpoint))
    values.pop("run_version", None)
    runfolder.write_run(folder, values)


def _dry_run(options: argparse.Namespace) -> int:
    """The plan without side effects: tokens are counted by a tokenizer trained on the fly when needed."""
    values = _options(options)
    paths = _data_paths(values)
    config = _train_config(values, {"data_weights": [1.0] * len(paths)})
    if values.get("init_from"):
        model = checkpoints.read_model_config(Path(values["init_from"]))
    else:
        model = _model_config(values, int(values.get("vocab_size", 4096)), config.seq_len)
    tokens = 0.0
    for path in paths:
        if path.is_dir():
            tokens += Corpus(path).train.n_tokens
        else:  # about four bytes a token; exact once the text is tokenized
            tokens += path.stat().st_size / 4
    epochs = [config.steps * config.batch_size * config.seq_len / max(1.0, tokens)]
    threads = max(1, min(options.threads or available_threads(), config.shards))
    seconds = estimated_step_seconds(model, config, threads)
    for line in make_plan(model, config, epochs, threads, seconds).lines(model, config):
        print(line)
    return 0


# ---- prepare -----------------------------------------------------------------------------------------------------


def _prepare(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="pyengine train prepare", description="Tokenize a text.")
    parser.add_argument("text", type=Path, help=".txt or .jsonl")
    parser.add_argument("folder", type=Path, help="new folder for shards, manifest and tokenizer")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the tokenizer to train (default 4096)")
    parser.add_argument("--tokenizer", type=Path, help="use this tokenizer.json instead of training one")
    parser.add_argument("--drop-unfinished", action="store_true", help="documents that end like a sentence only")
    options = parser.parse_args(arguments)
    runfolder.create(options.folder)
    values = {k: v for k, v in vars(options).items() if v}
    tokenizer = _tokenizer(values, _data_paths({"data": [options.text]}))
    drop = bool(options.drop_unfinished)
    prepare_corpus(options.text, options.folder, tokenizer, drop_unfinished=drop)
    text = tokenizer.to_str(pretty=True)
    (options.folder / "tokenizer.json").write_text(text, encoding="utf-8")
    corpus = Corpus(options.folder)
    summary = {"train_tokens": corpus.train.n_tokens, "validation": corpus.validation.n_tokens}
    print(json.dumps(summary))
    return 0
