"""The loss curves of a run, and of the runs that it continues, as a picture (matplotlib, imported when used)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import runfolder
from .errors import ConfigError, TrainingError
from .parser import Parser

POINTS = 400  # of the training curve: a picture of every step is noise, and large
FORMATS: dict[str, dict[str, Any]] = {  # by the end of the picture's name; what savefig is told more
    ".png": {"pil_kwargs": {"optimize": True}},
    ".svg": {},
    ".pdf": {},
}
Entries = list[dict[str, Any]]

EPILOG = """\
examples:
  pyengine train plot ~/runs/mine
  pyengine train plot ~/runs/decayed -o card/loss.png
  pyengine train plot ~/runs/decayed --alone -o piece.svg

A run that was started with --branch-from begins where its parent's checkpoint ended: the parent's curve up to there comes
first, and its parent's before that. A run that is still going can be drawn too.
"""


def read_chain(run: Path) -> list[Entries]:
    """Metrics of a run's pieces, the oldest first, each up to the step at which the next one begins.

    TrainingError names a parent that is gone.
    """
    pieces: list[Entries] = []
    seen: set[Path] = set()
    folder: Path | None = run
    while folder is not None:
        values = runfolder.read_run(folder)
        entries = runfolder.read_metrics(folder / "metrics.jsonl")
        begins = next((piece[0]["step"] for piece in reversed(pieces) if piece), None)
        pieces.append([e for e in entries if begins is None or e["step"] < begins])
        seen.add(folder.resolve())
        parent = Path(values["parent"]) if values.get("parent") else None
        folder = runfolder.run_of(parent) if parent else None
        if parent is not None and (folder is None or folder.resolve() in seen):
            raise TrainingError(f"the run that this one continues is gone: {parent} (--alone draws the rest)")
    return [piece for piece in reversed(pieces) if piece]


def thinned(steps: Entries) -> tuple[list[float], list[float]]:
    """(million tokens, mean loss) of at most POINTS groups of consecutive steps."""
    size = -(-len(steps) // POINTS)
    groups = [steps[i : i + size] for i in range(0, len(steps), size)] if steps else []
    tokens = [group[-1]["tokens"] / 1e6 for group in groups]
    return tokens, [sum(e["loss"] for e in group) / len(group) for group in groups]


def plot_losses(pieces: list[Entries], path: Path) -> bool:
    """Training and validation loss over tokens; False when matplotlib is not installed. path: its end, of FORMATS, says what is
    written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    entries = [entry for piece in pieces for entry in piece]
    steps = [e for e in entries if "loss" in e]
    checks = list({e["tokens"]: e for e in entries if "val_loss" in e}.values())  # the last one of a step counts
    figure = Figure(figsize=(7.2, 4.2), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    size = -(-len(steps) // POINTS)
    axes.plot(*thinned(steps), linewidth=0.8, alpha=0.6, label="train" if size < 2 else f"train, means of {size} steps")
    if checks:
        bits = checks[-1].get("val_bits_per_byte")
        label = "validation" if bits is None else f"validation; {bits:.3f} bits a byte at the end"
        axes.plot([e["tokens"] / 1e6 for e in checks], [e["val_loss"] for e in checks], marker=".", label=label)
    _mark(axes, pieces, steps)
    _dress(axes, "pair" if any("val_accuracy" in check for check in checks) else "token")
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        suffix = path.suffix.lower()
        figure.savefig(temporary, format=suffix[1:], **FORMATS[suffix])
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _mark(axes: Any, pieces: list[Entries], steps: Entries) -> None:
    """Where int8 begins to be simulated, and where a piece continues the one before."""
    first = next((e["tokens"] / 1e6 for e in steps if e.get("quantized")), None)
    if first is not None and not steps[0].get("quantized"):
        axes.axvline(first, color="gray", linestyle=":", label="int8 arithmetic simulated from here")
    for number, piece in enumerate(pieces[1:]):
        label = "continued in a new run" if number == 0 else None
        axes.axvline(piece[0]["tokens"] / 1e6, color="gray", linestyle="-", linewidth=0.5, label=label)


def _dress(axes: Any, of: str) -> None:
    from matplotlib.ticker import FormatStrFormatter

    axes.set_xlabel("million tokens")
    axes.set_ylabel(f"loss, nats a {of}")
    axes.set_yscale("log")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which(FormatStrFormatter("%g"))
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize="small")


def plot_command(arguments: Sequence[str]) -> int:
    """``pyengine train plot``."""
    parser = Parser(
        prog="pyengine train plot",
        description="Draw the loss curves of a run and of the runs that it continues.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("-o", "--output", type=Path, metavar="PICTURE", help="a .png, .svg or .pdf (default: RUN/loss.png)")
    parser.add_argument("--alone", action="store_true", help="this run's own steps only")
    options = parser.parse_args(arguments)
    run: Path = options.run
    target: Path = options.output or run / "loss.png"
    if target.suffix.lower() not in FORMATS:
        raise ConfigError(f"{target}: a picture's name ends in {', '.join(FORMATS)}")
    if not (run / "run.json").exists():
        raise ConfigError(f"{run} is not a run folder: it has no run.json{runfolder.kind(run)}")
    pieces = [runfolder.read_metrics(run / "metrics.jsonl")] if options.alone else read_chain(run)
    if not any("loss" in entry for piece in pieces for entry in piece):
        raise ConfigError(f"{run}: no step has been done yet")
    if not plot_losses(pieces, target):
        raise TrainingError("drawing needs matplotlib, which is not installed: pip install 'pyengine-lm[train]'")
    print(target)
    return 0
