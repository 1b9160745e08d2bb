"""A run's folder: what it holds, and the rule that a used one is never overwritten.

run.json        everything the run was started with
data/NAME/      prepared text, when it was given as text
tokenizer.json  the tokenizer of the run
metrics.jsonl   one line a step (and per validation), each step once
log.txt         what was printed
loss.png        the curves
tensorboard/    the numbers of metrics.jsonl once more, where they were asked for (--tensorboard)
checkpoints/step_XXXXXXXX/
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from .config import TrainConfig, to_json
from .errors import CheckpointError, ConfigError, RunFolderError
from .files import read_json, write_atomic, write_json
from .tensorboard import EventFile
from .terminal import tell

RUN_VERSION = 1
LOG_EVERY_SECONDS = 30.0
DRAFT = "draft.json"  # in place of run.json where a draft head is trained

LOCK, UNFINISHED = ".lock", ".unfinished"  # held by the process that trains; until the first step can be taken


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. RunFolderError when another process does."""
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunFolderError(f"{folder}: the run folder is already used by a process that trains in it") from error
        yield


@contextlib.contextmanager
def new(folder: Path) -> Iterator[None]:
    """A new run folder, locked while the body runs; removed again if it ends by an error before :func:`begun`.

    RunFolderError when the folder is not empty, or used by another process. What a set-up that was killed has left
    behind is removed first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in folder.iterdir()}
    if names - {LOCK} and UNFINISHED not in names:
        hint = " (resume it with --resume)" if "run.json" in names else ""
        raise RunFolderError(f"{folder}: the run folder is already used{hint}")
    with _locked(folder):
        names = {path.name for path in folder.iterdir()}
        if names - {LOCK} and UNFINISHED not in names:  # another start came, trained and ended meanwhile
            raise RunFolderError(f"{folder}: the run folder is already used (resume it with --resume)")
        _clear(folder)
        (folder / UNFINISHED).touch()
        try:
            yield
        except BaseException:
            if (folder / UNFINISHED).exists():  # nothing of value: a corrected command finds the folder free
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextlib.contextmanager
def existing(folder: Path, name: str = "run.json") -> Iterator[None]:
    """A run to continue, which has the file ``name``, locked while the body runs. ConfigError when there is none."""
    if not (folder / name).exists() or (folder / UNFINISHED).exists():
        raise ConfigError(f"{folder}: nothing to resume" + ("" if name == DRAFT else kind(folder)))
    with _locked(folder):
        yield


def kind(folder: Path) -> str:
    """To be said of a folder that has no run.json: which command's it is, if it is one's."""
    return "; it is a draft head's run ('pyengine train draft')" if (folder / DRAFT).exists() else ""


def begun(folder: Path) -> None:
    """Everything before the first step went well: from now on the folder is kept."""
    (folder / UNFINISHED).unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def write_run(folder: Path, values: dict[str, Any]) -> None:
    """run.json."""
    write_json(folder / "run.json", {"run_version": RUN_VERSION, **values})


def read_run(folder: Path, kinds: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """run.json, version checked; kinds: as :func:`.files.read_json` has them."""
    version = read_json(folder / "run.json").get("run_version")
    if version != RUN_VERSION:
        raise CheckpointError(f"{folder}: run_version {version} (this program reads {RUN_VERSION})")
    return read_json(folder / "run.json", kinds)


def replace_config(folder: Path, config: TrainConfig) -> None:
    """Another configuration of training in run.json."""
    write_run(folder, {**read_run(folder), "train": to_json(config)})


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint, a trunk or a final model lies in; None when it lies elsewhere."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if (folder / "run.json").exists():
            return folder
    return None


class Metrics:
    """metrics.jsonl: appended line by line; on resuming, lines of steps that will be done again are dropped.

    tensorboard: every line is written for it, too.
    """

    def __init__(self, path: Path, keep_through_step: int, *, tensorboard: bool = False) -> None:
        if path.exists():
            steps = ((line, entry.get("step")) for line, entry in _metrics(path))
            lines = [line + "\n" for line, step in steps if isinstance(step, int) and step <= keep_through_step]
            write_atomic(path, "".join(lines).encode())
        self._events = EventFile(path.parent, read_metrics(path)) if tensorboard else None
        self._file: TextIO = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry (with "step")."""
        self._file.write(json.dumps(entry) + "\n")
        if self._events:
            self._events.write(entry)

    def close(self) -> None:
        self._file.close()
        if self._events:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All entries that are whole: the last line of a run that crashed, or is running, may not be."""
    return [entry for _, entry in _metrics(path)]


def _metrics(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, entry)"""
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            yield line, entry


class Log:
    """Prints to stderr and keeps a copy in log.txt; progress replaces its line on a terminal and is quiet in a pipe."""

    def __init__(self, path: Path | None, *, speaks: bool = True) -> None:
        self._file: TextIO | None = None
        self._speaks = speaks
        if path and speaks:
            self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._terminal = sys.stderr.isatty()
        self._pending = False
        self._reported = -math.inf
        self._reporting = threading.Lock()  # progress may come from several threads

    def say(self, text: str) -> None:
        """A lasting line."""
        if not self._speaks:
            return
        if self._pending:
            tell()
            self._pending = False
        tell(text)
        if self._file:
            self._file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")

    def progress(self, text: str) -> None:
        """A line that the next one replaces."""
        if self._terminal and self._speaks:
            tell(f"\r\x1b[K{text}", end="")
            self._pending = True

    def report(self, text: str) -> None:
        """How far something is: a progress line, and every LOG_EVERY_SECONDS, at first too, a lasting one."""
        with self._reporting:
            self.progress(text)
            now = time.monotonic()
            if now - self._reported > LOG_EVERY_SECONDS:
                self.say(text)
                self._reported = now

    def close(self) -> None:
        if self._pending:
            tell()
        if self._file:
            self._file.close()
