"""TensorBoard's own reader finds in a run's event file what metrics.jsonl says, once a step."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training.__main__ import main
from pyengine_training.runfolder import read_metrics
from pyengine_training.tensorboard import FOLDER, scalars

SIZES = "--vocab-size 300 --dim 32 --n-layers 1 --n-heads 2 --n-kv-heads 1 --head-dim 16 --hidden-dim 64"
KNOBS = "--seq-len 32 --batch-size 4 --shards 2 --sample-every 0 --eval-documents 4 --eval-every 2 --checkpoint-every 2"


def train(run: Path, *words: str) -> int:
    return main(["train", "--run-dir", str(run), *words])


def test_lines_become_tags() -> None:
    step = {"step": 3, "loss": 1.5, "quantized": True}
    assert list(scalars(step)) == [("train/loss", 1.5), ("train/quantized", 1.0)]
    validation = {"step": 3, "tokens": 9, "val_loss": 2.0, "int8": False, "others": {"b": {"val_loss": 3.0}}}
    wanted = [("tokens", 9.0), ("loss", 2.0), ("int8", 0.0), ("b/loss", 3.0)]
    assert list(scalars(validation)) == [(f"validation/{name}", value) for name, value in wanted]


def read_events(run: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value) in the order of the file, by TensorBoard's loader."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    (path,) = (run / FOLDER).iterdir()
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for event in LegacyEventFileLoader(str(path)).Load():
        for value in event.summary.value:
            found[value.tag].append((event.step, value.simple_value))
    return found


def wanted_events(run: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for entry in read_metrics(run / "metrics.jsonl"):
        for tag, value in scalars(entry):
            found[tag].append((entry["step"], float(np.float32(value))))
    return found


def test_a_run_and_its_continuation(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second text, validations, and a crash after which two steps are done again; first without the flag, then with it."""
    pytest.importorskip("tensorboard", reason="event files need tensorboard: extra [tensorboard]")
    other, run = tmp_path / "other.txt", tmp_path / "run"
    other.write_bytes(stories.read_bytes())
    words = ["--data", str(stories), "--data", str(other), *SIZES.split(), *KNOBS.split(), "--steps", "6"]
    from pyengine_training.trainer import Trainer

    step = Trainer.step

    def failing(trainer: Trainer, *batch: Any) -> Any:
        if trainer.state.step == 3:
            raise OSError("no more")
        return step(trainer, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", failing)
        assert train(run, *words) == 1
    assert not (run / FOLDER).exists()
    for again in range(2):  # from step 2, and once more when all is done
        assert train(run, "--resume", "--tensorboard") == 0
        found = read_events(run)
        assert found == wanted_events(run), again
    assert [number for number, _ in found["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert len(found["validation/1_other/bits_per_byte"]) >= 3


def test_without_the_library_it_says_so(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    assert train(tmp_path / "run", "--data", str(stories), *SIZES.split(), "--tensorboard") == 1
    assert "pip install 'pyengine-lm[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
