"""The cost sheet of a model: what training was and what inference is, in the same units.

Reads JSON files of a run folder and computes; numba is not needed, so the sheet of a run can be made
where it cannot be trained. The speed of inference is given: the engine measures it, and
``pyengine cost`` is the command that puts the two together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import checkpoint as checkpoints
from . import runfolder
from .config import ModelConfig, model_config_from_json, train_config_from_json
from .errors import CheckpointError
from .parser import Parser, number
from .plan import format_seconds

EPILOG = """\
examples:
  python -m pyengine_training cost ~/runs/mine --rate 0.10
  python -m pyengine_training cost ~/runs/mine --rate 0.10 --tokens-per-second 5000 --json

The half of the sheet that needs no engine. 'pyengine cost' measures the speed of inference as well.
"""


@dataclass(frozen=True)
class Training:
    """What a run has cost until a checkpoint, all pieces that it continues included."""

    model: ModelConfig
    seq_len: int
    steps: int
    tokens: int
    seconds: float
    joules: float | None  # None: the machine does not report its energy
    teacher: ModelConfig | None = None  # of a distillation; its forward is part of the cost
    adapters: bool = False  # are what was trained

    @property
    def flops(self) -> float:
        """6 per weight and token (4 with adapters), attention included, and 2 for a teacher's."""
        per_token = self.model.flops_per_token(self.seq_len, adapters=self.adapters)
        if self.teacher:
            per_token += self.teacher.flops_per_token(self.seq_len, training=False)
        return per_token * self.tokens


@dataclass(frozen=True)
class CostSheet:
    """Training against inference, in numbers; None = not known. Prices need a rate, the rest a speed."""

    parameters: int
    training_steps: int
    training_tokens: int
    training_flops: float
    training_seconds: float
    training_joules: float | None
    training_price: float | None
    inference_flops_per_token: float
    inference_tokens_per_second: float | None
    inference_price_per_million: float | None
    # generated tokens that take as long, and at one rate cost as much, as the training did
    break_even_tokens_by_time: float | None
    break_even_tokens_by_flops: float

    def lines(self, rate: float | None) -> list[str]:
        """For people."""
        energy = "not reported by this machine"
        if self.training_joules is not None:
            energy = f"{self.training_joules / 3.6e6:.4f} kWh"
        price, million = "give --rate, the price of an hour of this machine", ""
        if self.training_price is not None:
            price = f"{self.training_price:.4f} at {rate:g} an hour"
        if self.inference_price_per_million is not None:
            million = f"{self.inference_price_per_million:.6f} a million tokens"
        rows = [
            ("parameters", f"{self.parameters:,}"),
            ("training tokens", f"{self.training_tokens:,} in {self.training_steps:,} steps"),
            ("training compute", f"{self.training_flops:.3g} FLOP"),
            ("training time", format_seconds(self.training_seconds)),
            ("training energy", energy),
            ("training price", price),
            ("inference compute", f"{self.inference_flops_per_token:.3g} FLOP a token"),
        ]
        if self.inference_tokens_per_second is not None:
            rows.append(("inference speed", f"{self.inference_tokens_per_second:,.0f} tokens/s, one sequence"))
        if million:
            rows.append(("inference price", million))
        if self.break_even_tokens_by_time is not None:
            rows.append(("costs as much as training", f"{self.break_even_tokens_by_time:,.0f} generated tokens"))
        rows.append(("computes as much", f"{self.break_even_tokens_by_flops:,.0f} generated tokens"))
        return [f"{name:26}{value}" for name, value in rows]


def cost_sheet(training: Training, rate: float | None, tokens_per_second: float | None) -> CostSheet:
    """Fill the sheet. rate: price of one hour of the machine, the same for both halves."""
    per_token = training.model.flops_per_token(training.seq_len, training=False)
    speed = tokens_per_second
    return CostSheet(
        parameters=training.model.n_params(),
        training_steps=training.steps,
        training_tokens=training.tokens,
        training_flops=training.flops,
        training_seconds=training.seconds,
        training_joules=training.joules,
        training_price=None if rate is None else training.seconds / 3600 * rate,
        inference_flops_per_token=per_token,
        inference_tokens_per_second=speed,
        inference_price_per_million=None if rate is None or speed is None else 1e6 / speed / 3600 * rate,
        break_even_tokens_by_time=None if speed is None else training.seconds * speed,
        break_even_tokens_by_flops=training.flops / per_token,
    )


# ---- reading -----------------------------------------------------------------------------------------------------


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint that a run folder (its newest) or a checkpoint's own folder means.

    CheckpointError says what the folder is instead.
    """
    if (folder / "state.json").exists():
        return folder
    if (folder / "run.json").exists():
        runfolder.read_run(folder)
        found = checkpoints.checkpoints(folder)
        if not found:
            raise CheckpointError(f"{folder}: this run has no checkpoint yet (--checkpoint-every steps make one)")
        return found[-1]
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder; the cost sheet needs the run folder of a training")
    if (folder.parent / "run.json").exists():
        raise CheckpointError(f"{folder} is a model without its counters; give its run folder, {folder.parent}")
    raise CheckpointError(
        f"{folder} is not a run folder: it has no run.json (it is what 'pyengine train --run-dir' was given)"
        + runfolder.kind(folder)
    )


def read_training(folder: Path) -> Training:
    """What a run folder, or one of its checkpoints, says of its training."""
    checkpoint = find_checkpoint(folder)
    state = checkpoints.read_state(checkpoint)
    run = runfolder.run_of(checkpoint)
    values = runfolder.read_run(run) if run else {}
    try:
        joules = state.get("joules")
        return Training(
            model=model_config_from_json(state["model"]),
            seq_len=train_config_from_json(state["train"]).seq_len,
            steps=int(state["step"]),
            tokens=int(state["tokens"]),
            seconds=float(state["seconds"]),
            joules=None if joules is None else float(joules),
            teacher=_teacher(values),
            adapters=bool(values.get("lora")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / 'state.json'}: missing or malformed {error}") from error


def _teacher(values: dict[str, Any]) -> ModelConfig | None:
    """The model that a run learnt from, by its run.json; an error where it should be and is gone."""
    # a cache is made once, for any number of runs
    teacher = None if values.get("teacher_cache") else values.get("teacher")
    return checkpoints.read_model_config(Path(teacher)) if teacher else None


# ---- the command -------------------------------------------------------------------------------------------------


def add_options(parser: Any) -> None:
    """What both doors to the sheet understand."""
    add = parser.add_argument
    add("run", type=Path, help="run folder of a training (its newest checkpoint counts), or one of its checkpoints")
    add("--rate", type=number(0), metavar="PRICE", help="of an hour of this machine, in any currency; default: no prices")
    add("--tokens-per-second", type=number(0, above=True), metavar="X", help="speed of inference, instead of measuring it")
    add("--json", action="store_true", help="one JSON object")


def show(sheet: CostSheet, rate: float | None, as_json: bool, **more: Any) -> None:
    """Print a sheet; more: facts that JSON carries along."""
    if as_json:
        print(json.dumps({**asdict(sheet), "rate": rate, **more}))
    else:
        print("\n".join(sheet.lines(rate)))


def cost_command(arguments: Sequence[str]) -> int:
    """``python -m pyengine_training cost``: the sheet without an engine to measure."""
    parser = Parser(
        prog="python -m pyengine_training cost",
        description="What training was and what inference is: FLOPs, time, energy, price, and where they are equal.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    options = parser.parse_args(arguments)
    sheet = cost_sheet(read_training(options.run), options.rate, options.tokens_per_second)
    show(sheet, options.rate, options.json)
    return 0
