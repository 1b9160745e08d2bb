"""``pyengine train draft``: from a frozen model and prompts to the same model with a draft head in its file.

RUN/draft.json         what the run was started with
RUN/prompts.jsonl      token ids of the prompts, in their order
RUN/outputs.jsonl      what the model said after them (outputs.py)
RUN/states/            its hidden states and likeliest tokens meanwhile (states.py)
RUN/checkpoints/, log.txt, metrics.jsonl
RUN/head.safetensors   the trained head, float32
RUN/model.safetensors  the model with the head in its file
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import runfolder
from ..budget import Budget, change
from ..checkpoint import environment
from ..config import TrainConfig
from ..data import file_sha256
from ..errors import CheckpointError, ConfigError, Interrupted, NotFiniteError
from ..files import atomic_directory, read_json, save_safetensors, write_atomic, write_json
from ..parser import Parser
from ..plan import format_seconds
from ..signals import signals
from ..threads import available_threads, single_threaded_blas
from . import loop, outputs, states
from .head import HeadConfig
from .prompts import read_prompts
from .target import Target, attach

RUN, RUN_VERSION = runfolder.DRAFT, 1
SAMPLING_SHARE = 0.45  # of --budget-minutes
EPOCHS = 4  # over the states, without a budget
VALIDATIONS = 8
MOST_AHEAD = 24  # the engine guesses no more in a step

EPILOG = """\
examples:
  pyengine train draft model.safetensors --data prompts.jsonl --run-dir ~/runs/draft --budget-minutes 60
  pyengine train draft --run-dir ~/runs/draft --resume
"""

# option -> (type, default, metavar, help); stored in draft.json. Where the default is None it depends on the model.
OPTIONS: dict[str, tuple[Any, Any, str, str]] = {
    "max_tokens": (int, None, "N", "tokens of an output, at most (default: 256, at most half of the model's context)"),
    "tokens": (
        int,
        1_000_000,
        "N",
        "tokens of all outputs, about: when there are so many, no more prompts are answered",
    ),
    "held_out": (float, 0.02, "S", "share of the prompts whose outputs only judge the head"),
    "vocab_size": (
        int,
        None,
        "N",
        "tokens that it can guess, the most frequent of the outputs (default: 8192, or the model's)",
    ),
    "hidden_dim": (int, None, "N", "width of the head's MLP (default: the model's own, at most 4 times its dim)"),
    "ahead": (int, 4, "K", f"guesses in a row that it is trained to make, at most {MOST_AHEAD}"),
    "top_k": (int, 32, "K", "likeliest tokens whose probabilities are kept of every position, the rest taken together"),
    "epochs": (float, EPOCHS, "X", "passes over the outputs; with --budget-minutes as many as fit"),
    "batch_size": (int, 256, "N", "positions a step"),
    "shards": (int, 4, "N", "parts of a batch, a power of two: as many run at once as there are threads"),
    "lr": (float, 3e-3, "X", "peak learning rate of AdamW"),
    "seed": (int, 1, "N", "of the outputs, the head's first weights and the order of the batches"),
}
LONGEST_OUTPUT, VOCABULARY, WIDEST = 256, 8192, 4


def draft_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="pyengine train draft",
        description="Train a draft head for a frozen model on its own outputs, and store it in the model's file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", type=Path, nargs="?", help="frozen file of any model that the engine runs")
    add("--run-dir", type=Path, required=True, metavar="RUN", help="the run's folder, outside a source tree")
    add("--resume", action="store_true", help="go on with the run in --run-dir, as it was started")
    add(
        "--data",
        type=Path,
        action="append",
        metavar="FILE",
        help='prompts: .jsonl of {"messages": […]} or {"prompt": …}; or texts, whose beginnings are continued; repeatable',
    )
    add("--given", action="store_true", help="learn the data as it is, instead of what the model says after it")
    add("--temperatures", metavar="T,…", help="at which outputs are sampled in turn (default 0,0.7,1)")
    add(
        "--budget-minutes",
        type=float,
        metavar="X",
        help="for sampling, reading and training together, measured on this machine; fewer steps where it becomes slower",
    )
    for name, (kind, default, metavar, text) in OPTIONS.items():
        text = text if default is None else f"{text} (default {default:{',' if kind is int else 'g'}})"
        add(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    add("--threads", type=int, metavar="N", help="the result does not depend on it (default: the CPUs allowed here)")
    add("-o", "--output", type=Path, metavar="FILE", help="the new frozen file (default RUN/model.safetensors)")
    return parser


def draft_command(arguments: Sequence[str]) -> int:
    """Train a draft head."""
    options = draft_parser().parse_args(arguments)
    threads = available_threads() if options.threads is None else options.threads
    if threads < 1:
        raise ConfigError(f"--threads is {threads}; it must be at least 1")
    folder: Path = options.run_dir
    if options.output is not None:  # before hours of work
        if options.output.exists():
            raise ConfigError(f"{options.output} exists already")
        if not options.output.absolute().parent.is_dir():
            raise ConfigError(f"{options.output}: there is no such folder to write it into")
    began = time.monotonic()
    if options.resume:
        given = [
            name
            for name, value in vars(options).items()
            if value is not None and value is not False and name not in RESUMING
        ]
        if given:
            names = ", ".join("the model" if name == "model" else f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(f"--resume goes on as the run was started: {names} would have no effect")
        with runfolder.existing(folder, RUN):
            return _Run(folder, threads, began).all(options.output)
    values = _checked(options)
    with runfolder.new(folder):
        with contextlib.closing(Target(Path(values["model"]), threads)) as target:
            _prepare(folder, values, target)
        runfolder.begun(folder)
        return _Run(folder, threads, began).all(options.output)


RESUMING = ("run_dir", "resume", "threads", "output")


# ---- what was asked for ------------------------------------------------------------------------------------------


def _checked(options: argparse.Namespace) -> dict[str, Any]:
    """draft.json of a new run. Raises ConfigError before anything is read."""
    if options.model is None or not options.data:
        raise ConfigError("a new run needs a frozen model and --data (or --resume an old one)")
    if options.given:
        useless = [name for name in ("temperatures", "max_tokens", "tokens") if getattr(options, name) is not None]
        if useless:
            raise ConfigError(f"--{useless[0].replace('_', '-')} would have no effect: with --given nothing is sampled")
    if options.budget_minutes is not None and options.epochs is not None:
        raise ConfigError("--epochs and --budget-minutes are two lengths: give one")
    values = {name: default for name, (_, default, _, _) in OPTIONS.items()}
    values.update({name: value for name in OPTIONS if (value := getattr(options, name)) is not None})
    for name, (kind, *_) in OPTIONS.items():
        least = 0 if name == "seed" else 2 if name == "max_tokens" else 1
        if kind is int and values[name] is not None and values[name] < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {values[name]}; it must be at least {least}")
    if values["ahead"] > MOST_AHEAD:
        raise ConfigError(f"--ahead is {values['ahead']}; it must be at most {MOST_AHEAD}: the engine guesses no more")
    if not 0 < values["held_out"] <= 0.5:
        raise ConfigError(f"--held-out is {values['held_out']}; it must lie above 0 and be at most 0.5")
    for name in ("epochs", "lr"):
        if not 0 < values[name] < math.inf:
            raise ConfigError(f"--{name} is {values[name]}; it must be a positive number")
    if values["seed"] >= 1 << 32:
        raise ConfigError(f"--seed is {values['seed']}; it must lie in 0..2^32 - 1")
    budget = options.budget_minutes
    if budget is not None and not 0 < budget < math.inf:
        raise ConfigError(f"--budget-minutes is {budget}; it must be a positive number")
    _train_config(values, 1)  # batch and shards
    return {
        "run_version": RUN_VERSION,
        "model": str(options.model.resolve()),
        "data": [str(path) for path in options.data],
        "given": options.given,
        "temperatures": _temperatures(options.temperatures or "0,0.7,1"),
        "budget_minutes": budget,
        **values,
    }


def _temperatures(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--temperatures {text}: expected numbers, as in 0,0.7,1") from error
    if not all(0 <= value <= 100 for value in found):
        raise ConfigError(f"--temperatures {text}: each must lie in 0..100")
    return found


def _train_config(values: dict[str, Any], steps: int) -> TrainConfig:
    """The optimizer's part."""
    return TrainConfig(
        batch_size=values["batch_size"],
        shards=values["shards"],
        steps=steps,
        optimizer="adamw",
        lr=values["lr"],
        beta2=0.95,  # as wherever AdamW trains alone
        weight_decay=0.0,
        decay_fraction=0.5,
        quantize="never",
        seed=values["seed"],
    )


def _prepare(folder: Path, values: dict[str, Any], target: Target) -> None:
    """draft.json and prompts.jsonl; what cannot work is an error here."""
    defaults = {
        "max_tokens": max(2, min(LONGEST_OUTPUT, target.context // 2)),
        "vocab_size": min(VOCABULARY, target.vocab_size),
        "hidden_dim": min(target.hidden_dim, WIDEST * target.dim),
    }
    values.update({name: value for name, value in defaults.items() if values[name] is None})
    if not len(target.end_ids) + 2 <= values["vocab_size"] <= target.vocab_size:
        raise ConfigError(
            f"--vocab-size is {values['vocab_size']}; it must lie in {len(target.end_ids) + 2}..{target.vocab_size}: the tokens "
            "that end a text and two more, at most the model's"
        )
    found = read_prompts(
        [Path(path) for path in values["data"]],
        target,
        max_tokens=values["max_tokens"],
        given=values["given"],
        seed=values["seed"],
    )
    lines = "".join(json.dumps(ids) + "\n" for ids in found.ids)
    write_atomic(folder / "prompts.jsonl", lines.encode())
    counts = {
        "norm_eps": target.norm_eps,
        "n_prompts": len(found.ids),
        "skipped": found.skipped,
        "model_sha256": file_sha256(Path(values["model"])),
    }
    write_json(folder / RUN, {**values, **counts, "steps": None})


# ---- the run -----------------------------------------------------------------------------------------------------


class _Run:
    """The stages of a run in a locked folder; each goes on where it was stopped."""

    def __init__(self, folder: Path, threads: int, began: float) -> None:
        self.folder, self.threads, self.began = folder, threads, began
        self.values = read_json(folder / RUN)
        if self.values.get("run_version") != RUN_VERSION:
            raise CheckpointError(
                f"{folder}: run_version {self.values.get('run_version')} (this program reads {RUN_VERSION})"
            )
        model = Path(self.values["model"])
        if not model.exists() or file_sha256(model) != self.values["model_sha256"]:
            raise ConfigError(f"{model} is not the file that the run in {folder} was started with")
        self.log = runfolder.Log(folder / "log.txt")
        self.before = float(self.values.get("seconds", 0.0))  # what the run has taken until it was stopped
        self.fits_more: bool | None = None  # by the last change of the number of steps

    @property
    def budget_seconds(self) -> float:
        return 60 * float(self.values["budget_minutes"] or 0)

    def _seconds(self) -> float:
        """What the run has taken."""
        return self.before + time.monotonic() - self.began

    def _store(self) -> None:
        write_json(self.folder / RUN, {**self.values, "seconds": self._seconds()})

    def _progress(self, text: str) -> None:
        self.log.report(text)
        self._store()  # so that the budget of a run that goes on is what is left of it

    def all(self, output: Path | None) -> int:
        """Every stage that is left."""
        with contextlib.closing(self.log):
            with contextlib.closing(Target(Path(self.values["model"]), self.threads)) as target:
                self._make_outputs(target)
                found = self._read_states(target)
                known = np.unique(found.tokens)
                embeddings, rows = target.rows("tok_embeddings", known), target.rows("output", found.vocab)
            with single_threaded_blas():
                trainer = self._train(found, known, embeddings, rows)
            path = self._write_head(found, trainer, output)
            self.log.say(f"done: {path}")
        print(path)
        return 0

    def _make_outputs(self, target: Target) -> None:
        v = self.values
        if outputs.is_complete(self.folder):
            return
        prompts = [json.loads(line) for line in (self.folder / "prompts.jsonl").read_text().splitlines()]
        skipped = f", {v['skipped']} left out that leave no room in the context" if v["skipped"] else ""
        self.log.say(f"{v['n_prompts']:,} {'texts' if v['given'] else 'prompts'}{skipped}")
        if v["given"]:
            outputs.take_given(self.folder, prompts)
            return
        seconds = self.budget_seconds and max(1e-9, SAMPLING_SHARE * self.budget_seconds - self._seconds())
        sampling = outputs.Sampling(tuple(v["temperatures"]), v["max_tokens"], v["tokens"], seconds, v["seed"])
        outputs.make_outputs(self.folder, prompts, target, sampling, self._progress)
        made = outputs.read_outputs(self.folder)
        self.log.say(f"{len(made):,} outputs of {sum(len(output) for _, output in made):,} tokens")

    def _read_states(self, target: Target) -> states.States:
        v, folder = self.values, self.folder / "states"
        made = outputs.read_outputs(self.folder)
        if not (folder / "layout.json").exists():
            with atomic_directory(folder) as temporary:
                states.create(temporary, made, v["n_prompts"], v["held_out"], v["vocab_size"], v["top_k"], target)
        found = states.fill(folder, made, target, self._progress)
        inside = float(np.mean(found.inside[:: max(1, len(found.inside) // 10000)]))
        self.log.say(
            f"{len(found.starts(False)):,} positions of {len(made):,} outputs to learn from, {len(found.starts(True)):,} held "
            f"out; {len(found.vocab):,} tokens, which have {inside:.1%} of the model's probability"
        )
        return found

    def _train(self, found: states.States, known: Any, embeddings: Any, output_rows: Any) -> loop.HeadTrainer:
        v = self.values
        head = HeadConfig(embeddings.shape[1], v["hidden_dim"], len(found.vocab), v["norm_eps"], v["ahead"])
        batches = loop.Batches(found, known, embeddings, head, v["batch_size"], v["seed"])
        config = _train_config(v, self._steps(batches, head, output_rows))
        trainer = loop.HeadTrainer(head, config, self.threads)
        budget = Budget(**v["budget"]) if v.get("budget") else None
        identity = loop.describe(head, config, steps_may_change=budget is not None)
        restored = trainer.restore(self.folder, identity)
        if restored is None:
            loop.fresh(trainer, batches, output_rows, v["seed"])
        else:
            changed = [name for name, value in environment().items() if restored.get(name) != value]
            self.log.say(f"continuing from step {trainer.step_number}")
            if changed:
                self.log.say(f"warning: made with another {', '.join(changed)}: other bits than there")
        metrics = runfolder.Metrics(self.folder / "metrics.jsonl", trainer.step_number)
        received: list[int] = []
        try:
            with signals(received):
                self._loop(trainer, batches, metrics, identity, received, budget)
        finally:
            metrics.close()
            trainer.close()
        return trainer

    def _steps(self, batches: loop.Batches, head: HeadConfig, output_rows: Any) -> int:
        """Of the run: decided before its first one, and stored; with a budget their number may change."""
        v = self.values
        if v["steps"] is None:
            if v["budget_minutes"] is not None:
                config = _train_config(v, 10)
                seconds, validation = loop.seconds_of_a_step(batches, head, config, output_rows, self.threads)
                before = self._seconds() + validation  # the one before the first step
                left = self.budget_seconds - before
                v["steps"] = max(1, int((left - VALIDATIONS * validation) / (seconds * 1.05)))  # checkpoints take some per cent
                v.update(Budget(max(0.0, left), seconds, seconds, before, v["steps"]).stored())
            else:
                v["steps"] = max(1, round(v["epochs"] * len(batches.starts) / v["batch_size"]))
            self._store()
        return int(v["steps"])

    def _loop(
        self,
        trainer: loop.HeadTrainer,
        batches: loop.Batches,
        metrics: runfolder.Metrics,
        identity: Any,
        received: list[int],
        budget: Budget | None,
    ) -> None:
        steps, n_params = trainer.config.steps, trainer.params.flat.size
        every = -(-steps // VALIDATIONS)
        if trainer.step_number == 0:
            epochs = steps * trainer.config.batch_size / len(batches.starts)
            self.log.say(f"head of {n_params:,} parameters; {steps:,} steps, {epochs:.1f} passes over the outputs")
            self._validate(trainer, batches, metrics)
        began, first = time.monotonic(), trainer.step_number
        while trainer.step_number < steps:
            loss, norm = trainer.step(batches.batch(trainer.step_number))
            step, now = trainer.step_number, time.monotonic()
            metrics.write({"step": step, "loss": loss, "grad_norm": norm})
            steps = self._keep_to(budget, trainer, steps)
            left = (now - began) / (step - first) * (steps - step)
            self.log.report(f"step {step}/{steps} KL {loss:.4f} {format_seconds(left)} left")
            if step % every == 0 or step == steps:
                self._validate(trainer, batches, metrics)
                self._save(trainer, identity)
            if received:
                self._save(trainer, identity)
                raise Interrupted(received[0])

    def _keep_to(self, budget: Budget | None, trainer: loop.HeadTrainer, steps: int) -> int:
        """How many steps the run has, others than ``steps`` where the machine has become slower or faster."""
        if budget is None:
            return steps
        fitting = budget.steps(trainer.config, trainer.step_number, self._seconds() - budget.before)
        if fitting != steps:
            if (fitting > steps) != self.fits_more:  # others may follow, one step after the other
                self.fits_more = fitting > steps
                self.log.say(f"step {trainer.step_number}: {change(steps, fitting)}")
            trainer.config = replace(trainer.config, steps=fitting)
            self.values["steps"] = fitting
            self._store()
        return fitting

    def _save(self, trainer: loop.HeadTrainer, identity: Any) -> None:
        """A checkpoint, and what the run has taken until it."""
        trainer.save(self.folder, identity)
        self._store()

    def _validate(self, trainer: loop.HeadTrainer, batches: loop.Batches, metrics: runfolder.Metrics) -> None:
        """Raises NotFiniteError, before anything is written of it, for a head whose guesses have no number."""
        found = loop.measure(batches, trainer.params, trainer.workers, trainer.pool)
        if not math.isfinite(found.loss):
            raise NotFiniteError(f"step {trainer.step_number}: the loss on held-out outputs is {found.loss}: try a lower --lr")
        entry = {
            "agreement": found.agreement,
            "expected": found.expected,
            "ahead": found.ahead,
            "unigram": found.unigram,
        }
        metrics.write({"step": trainer.step_number, "validation_loss": found.loss, **entry})
        self.log.say(f"step {trainer.step_number}: held out: {found}")

    def _write_head(self, found: states.States, trainer: loop.HeadTrainer, output: Path | None) -> Path:
        """The head, gate and up apart, with its vocabulary; and the frozen file, whose path is returned."""
        tensors = dict(trainer.params.views)
        gate_up = tensors.pop("w_gate_up")
        m = trainer.head.hidden_dim
        tensors |= {"w_gate": gate_up[:m], "w_up": gate_up[m:], "vocab": found.vocab}
        save_safetensors(self.folder / ".head.tmp", tensors)
        (self.folder / ".head.tmp").replace(self.folder / "head.safetensors")
        path = output or self.folder / "model.safetensors"
        attach(Path(self.values["model"]), path, tensors, overwrite=output is None)
        return path
