"""Run folders beside one another: how far each is, how good, how long it took, and what was asked for differently.

Reads JSON alone, so runs can be compared where they cannot be trained; one that is still going can be looked at too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import runfolder
from .errors import ConfigError, TrainingError
from .parser import Parser
from .plan import format_seconds

EPILOG = """\
examples:
  pyengine runs ~/runs                    every run folder in it
  pyengine runs ~/runs/a ~/runs/b --json

loss is the mean over the last steps (a tenth of them, at most 100); validation, bits a byte and accuracy (of preference runs) are
the last that were measured, of the first text. Below the table: the settings in which the runs differ.
"""
LAST = 100  # steps whose mean loss is shown


@dataclass(frozen=True)
class RunSummary:
    """One run. None: not measured. seconds: on the clock, in steps."""

    name: str
    step: int
    steps: int
    finished: bool
    tokens: int
    loss: float | None
    validation: float | None
    bits_per_byte: float | None
    accuracy: float | None
    seconds: float
    settings: dict[str, Any] = field(repr=False)


def settings_of(values: dict[str, Any]) -> dict[str, Any]:
    """What a run was asked for, flat, from run.json: sizes, knobs, texts and what it started from."""
    train = dict(values.get("train") or {})
    extra = train.pop("extra", None) or {}
    texts = [str(text.get("name")) for text in extra.get("data") or []] or [
        Path(p).name for p in values.get("corpora") or []
    ]
    given = {"data": texts, **{name: values.get(name) for name in ("teacher", "parent", "lora")}}
    return {**(values.get("model") or {}), **train, **given, "init_from": extra.get("init_from")}


def summary(folder: Path, name: str) -> RunSummary:
    """Of a run folder. TrainingError where its run.json cannot be read."""
    values = runfolder.read_run(folder)
    settings = settings_of(values)
    entries = runfolder.read_metrics(folder / "metrics.jsonl")
    done = [entry for entry in entries if "loss" in entry]
    checked: dict[str, Any] = next((entry for entry in reversed(entries) if "val_loss" in entry), {})
    last = done[-max(1, min(LAST, len(done) // 10)) :]
    return RunSummary(
        name=name,
        step=done[-1]["step"] if done else 0,
        steps=int(settings.get("steps") or 0),
        finished=(folder / "final").exists(),
        tokens=done[-1]["tokens"] if done else 0,
        loss=sum(entry["loss"] for entry in last) / len(last) if last else None,
        validation=checked.get("val_loss"),
        bits_per_byte=checked.get("val_bits_per_byte"),
        accuracy=checked.get("val_accuracy"),
        seconds=float(done[-1].get("seconds", 0)) if done else 0.0,
        settings=settings,
    )


def find_runs(paths: Iterable[Path]) -> list[tuple[Path, str]]:
    """(run folder, its name) of each path, which is one or holds some. ConfigError names a path that is neither."""
    found = []
    for path in paths:
        inside = [path] if (path / "run.json").exists() else sorted(child.parent for child in path.glob("*/run.json"))
        if not inside:
            reason = "neither a run folder nor a folder of run folders (there is no run.json)"
            raise ConfigError(f"{path}: {reason}{runfolder.kind(path)}")
        found += inside
    names = [folder.resolve().name for folder in found]
    return [(f, name if names.count(name) == 1 else str(f)) for f, name in zip(found, names, strict=True)]


def differences(runs: Sequence[RunSummary]) -> dict[str, list[Any]]:
    """Settings in which runs differ -> each run's value; None where a run does not have it."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    columns = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: values for name, values in columns.items() if any(value != values[0] for value in values)}


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right; empty columns are left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in zip(*columns, strict=True):
        cells = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return lines


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, value))
    if isinstance(value, dict):
        return ",".join(f"{name}={_text(v)}" for name, v in value.items())
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def lines(runs: Sequence[RunSummary]) -> list[str]:
    """For people."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows = [["run", "steps", "", "tokens", "loss", "validation", "bits/byte", "accuracy", "time"]]
    for run in runs:
        of = f"{run.step:,}" if run.finished else f"{run.step:,} of {run.steps:,}"
        scores = [number(run.loss, ".4f"), number(run.validation, ".4f"), number(run.bits_per_byte, ".4f")]
        tokens, accuracy = f"{run.tokens:,}", number(run.accuracy, ".1%")
        rows.append([run.name, of, "" if run.finished else "unfinished", tokens, *scores, accuracy])
        rows[-1].append(format_seconds(run.seconds))
    found = differences(runs)
    if not found:
        return table(rows)
    compared = [["", *(run.name for run in runs)], *([name, *map(_text, values)] for name, values in found.items())]
    return [*table(rows), "", *table(compared)]


def parser() -> argparse.ArgumentParser:
    """Of ``pyengine runs``."""
    made = Parser(
        prog="pyengine runs",
        description="List training runs and compare them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("folder", type=Path, nargs="+", help="a run folder, or one that holds run folders")
    made.add_argument("--json", action="store_true", help="everything, one object a run and line")
    return made


def runs_command(arguments: Sequence[str]) -> int:
    """``pyengine runs``."""
    options = parser().parse_args(arguments)
    runs, broken = [], []
    for folder, name in find_runs(options.folder):
        try:
            runs.append(summary(folder, name))
        except (KeyError, TypeError, ValueError, AttributeError, TrainingError) as error:
            broken.append(f"{folder}: {error if isinstance(error, TrainingError) else 'damaged metrics or run.json'}")
    for line in [json.dumps(asdict(run)) for run in runs] if options.json else lines(runs) if runs else []:
        print(line)
    if broken:
        raise TrainingError("; ".join(broken))
    return 0
