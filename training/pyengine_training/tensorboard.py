"""The numbers of metrics.jsonl for TensorBoard: ``pyengine train --tensorboard``, then ``tensorboard --logdir RUN``.

metrics.jsonl stays the one record. An event file is made of its lines: of those that are there when a run starts or goes on, in
place of the event files that were there, and then of each line as it is written. So a step appears once, after a crash too, and
a run that was begun without the flag has its whole curve as soon as it is given.

A step's numbers are ``train/NAME``, a validation's ``validation/NAME``, of further texts ``validation/TEXT/NAME``.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import MissingLibraryError

FOLDER = "tensorboard"  # in the run folder
PREFIX = "val_"  # of what a validation has measured, in metrics.jsonl


def require() -> None:
    """MissingLibraryError unless event files can be written."""
    try:
        import tensorboard.summary.writer.event_file_writer  # noqa: F401
    except ImportError as error:
        raise MissingLibraryError(
            f"--tensorboard needs tensorboard ({error}): pip install 'pyengine-lm[tensorboard]'"
        ) from error


def scalars(entry: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, value) of every number of a line."""
    validation = any(name.startswith(PREFIX) for name in entry)
    group = "validation" if validation else "train"
    for name, value in entry.items():
        if isinstance(value, int | float) and name != "step":
            yield f"{group}/{name.removeprefix(PREFIX)}", float(value)
    for text, values in (entry.get("others") or {}).items():
        for name, value in values.items():
            yield f"{group}/{text}/{name.removeprefix(PREFIX)}", float(value)


class EventFile:
    """Of a run folder. Times are those that the run says it has trained, before now."""

    def __init__(self, run_folder: Path, entries: Iterable[dict[str, Any]]) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        known = list(entries)
        shutil.rmtree(run_folder / FOLDER, ignore_errors=True)
        self._seconds = 0.0
        self._began = time.time() - max((entry.get("seconds", 0.0) for entry in known), default=0.0)
        self._writer = EventFileWriter(str(run_folder / FOLDER))
        for entry in known:
            self.write(entry)

    def write(self, entry: dict[str, Any]) -> None:
        """Append a line's numbers."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._seconds = float(entry.get("seconds", self._seconds))
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(entry)]
        event = Event(wall_time=self._began + self._seconds, step=entry["step"], summary=Summary(value=values))
        self._writer.add_event(event)

    def close(self) -> None:
        """All of it is in the file."""
        self._writer.close()
