"""What is told when nobody can read it any more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

import pyengine_training

RUN = """
from pyengine_training.terminal import tell
tell("a")
tell("b")
print("done")
"""
RANK = """
from types import SimpleNamespace
from pyengine_training.comm import ending_together
comm = SimpleNamespace(size=2, rank=0, abort=lambda: print("the others are ended"))
try:
    with ending_together(comm):
        raise ValueError
except ValueError:
    pass
"""


@pytest.mark.parametrize(
    ("code", "said"), [(RUN, "done"), (RANK, "the others are ended")], ids=["a run", "a rank"]
)
def test_a_reader_of_stderr_that_is_gone_stops_nothing(code: str, said: str) -> None:
    """As tee is when a terminal is closed: a run still has a checkpoint to write, a rank the others to end."""
    reader, writer = os.pipe()
    os.close(reader)
    home = Path(pyengine_training.__file__).parents[1]
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=home, stdout=subprocess.PIPE, stderr=writer, text=True, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stdout.strip()) == (0, said)
