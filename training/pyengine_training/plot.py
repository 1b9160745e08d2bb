"""The loss curves of a run as a PNG (matplotlib, imported when used)."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_losses(entries: list[dict[str, Any]], path: Path) -> bool:
    """Training and validation loss over tokens; False when matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    steps = [e for e in entries if "loss" in e]
    checks = [e for e in entries if "val_loss" in e]
    figure = Figure(figsize=(8, 5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    millions = [e["tokens"] / 1e6 for e in steps]
    axes.plot(millions, [e["loss"] for e in steps], linewidth=0.5, alpha=0.4, label="train, a step")
    axes.plot(
        [e["tokens"] / 1e6 for e in checks],
        [e["val_loss"] for e in checks],
        marker=".",
        label="validation",
    )
    first = next((e["tokens"] / 1e6 for e in steps if e.get("quantized")), None)
    if first is not None and not steps[0].get("quantized"):
        axes.axvline(first, color="gray", linestyle=":", label="int8 arithmetic simulated from here")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss, nats a token")
    axes.set_yscale("log")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
    return True
