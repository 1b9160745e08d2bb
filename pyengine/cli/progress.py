"""A line on a terminal that says how far long work has come; nothing at all anywhere else."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

from pyengine.cli.terminal import visible

REFRESH_S = 0.1


class ProgressLine:
    """Rewrites one line of stderr, at most ten times a second. As a context manager it wipes the line at the end, also after an
    error; `update` has the signature of a freeze's progress callback."""

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self._label = label
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"  # which can wipe no line
        self._started = time.monotonic()
        self._shown_at = 0.0

    def update(self, done: float, total: float, detail: str = "") -> None:
        """Show done / total (of whatever unit) and what is being worked on."""
        percent = 100 * done / total if total else 100.0
        elapsed = time.monotonic() - self._started
        self.show(f"{self._label} {percent:3.0f} %  {elapsed:4.0f} s  {detail}", force=done >= total)

    def show(self, text: str, force: bool = False) -> None:
        """Replace the line."""
        now = time.monotonic()
        if not self._is_terminal or (now - self._shown_at < REFRESH_S and not force):
            return
        import shutil

        self._shown_at = now
        width = shutil.get_terminal_size().columns - 1  # the last column would wrap
        self._stream.write(f"\r\x1b[K{visible(text)[:width]}")
        self._stream.flush()

    def clear(self) -> None:
        if self._is_terminal and self._shown_at:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._shown_at = 0.0

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
