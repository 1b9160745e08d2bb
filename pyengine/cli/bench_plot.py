"""`pyengine bench --plot`: tokens per second against context and batch (matplotlib, imported when used)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyengine.cli import UsageError
from pyengine.cli.errors import MissingExtraError

Row = Mapping[str, Any]


def _lines(axes: Any, rows: Sequence[Row], x: str, other: str) -> None:
    """One line for each value of `other` and number of threads: median speed over x, a band from slowest to fastest run."""
    for key in sorted({(row[other], row["threads"]) for row in rows}):
        chosen = sorted((row for row in rows if (row[other], row["threads"]) == key), key=lambda row: row[x])
        label = f"{other} {key[0]}, {key[1]} thread{'s' * (key[1] != 1)}"
        places = [row[x] for row in chosen]
        axes.plot(places, [row["median"] for row in chosen], marker=".", label=label)
        axes.fill_between(places, [min(r["samples"]) for r in chosen], [max(r["samples"]) for r in chosen], alpha=0.15)
    axes.set_xlabel("tokens in the cache" if x == "depth" else "sequences side by side")
    axes.set_ylabel("tokens/s, all sequences together")
    axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="small")


def plot_rows(rows: Sequence[Row], path: str) -> None:
    """Draw the generation tests. Raises MissingExtraError without matplotlib, UsageError without such tests."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("--plot needs matplotlib: pip install matplotlib") from None
    generation = [row for row in rows if row["test"].startswith("tg")]
    if not generation:
        raise UsageError("--plot draws generation: -n must not be 0")
    figure = Figure(figsize=(11, 4.5), dpi=120)
    FigureCanvasAgg(figure)
    by_depth, by_batch = figure.subplots(1, 2)
    _lines(by_depth, generation, "depth", "batch")
    _lines(by_batch, generation, "batch", "depth")
    figure.suptitle(f"{generation[0]['model']}, {generation[0]['isa']}")
    figure.tight_layout()
    figure.savefig(path, format="png")
