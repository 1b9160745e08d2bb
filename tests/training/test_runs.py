"""Runs beside one another: numbers of the last steps and checks, and the settings that differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pyengine_training.__main__ import main

STEPS = 200


def write_run(folder: Path, steps: int, settings: dict[str, Any], check: dict[str, Any], finished: bool = True) -> Path:
    """Loss falls from 10 by 0.01 a step; a step takes half a second and 100 tokens."""
    folder.mkdir(parents=True)
    train = {"steps": STEPS, "lr": 0.003, "extra": {"data": [{"name": "a.txt"}], "command": folder.name}, **settings}
    values = {"run_version": 1, "model": {"dim": 64, "qk_norm": False}, "train": train, "corpora": ["data/0_a"]}
    (folder / "run.json").write_text(json.dumps(values))
    lines: list[dict[str, Any]] = [
        {"step": i, "tokens": 100 * i, "loss": 10 - i / 100, "seconds": i / 2} for i in range(1, steps + 1)
    ]
    lines += [{"step": steps, "tokens": 100 * steps, **check}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "final").mkdir()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    write_run(runs / "a", STEPS, {}, {"val_loss": 8.5, "val_bits_per_byte": 1.25})
    write_run(runs / "b", 130, {"lr": 0.01, "packing": "best-fit"}, {"val_loss": 8.25, "val_accuracy": 0.75}, False)
    (runs / "no run").mkdir()
    return runs


def test_runs_are_listed_and_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(folder)]) == 0
    first, second = (block.splitlines() for block in capsys.readouterr().out.split("\n\n"))
    assert [line.split() for line in first] == [
        ["run", "steps", "tokens", "loss", "validation", "bits/byte", "accuracy", "time"],
        ["a", "200", "20,000", "8.0950", "8.5000", "1.2500", "1:40"],  # the mean of the last 20 steps
        ["b", "130", "of", "200", "unfinished", "13,000", "8.7600", "8.2500", "75.0%", "1:05"],
    ]
    assert [line.split() for line in second] == [["a", "b"], ["lr", "0.003", "0.01"], ["packing", "-", "best-fit"]]


def test_runs_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(folder / "b"), str(folder / "a"), "--json"]) == 0
    b, a = map(json.loads, capsys.readouterr().out.splitlines())
    assert (b["name"], b["step"], b["finished"], b["bits_per_byte"]) == ("b", 130, False, None)
    assert a["settings"]["dim"] == 64 and a["settings"]["data"] == ["a.txt"] and "extra" not in a["settings"]


def test_one_run_differs_from_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(folder / "a")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_run_without_a_step_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "new", 0, {}, {}, False)
    (tmp_path / "new" / "metrics.jsonl").unlink()
    assert main(["runs", str(tmp_path)]) == 0
    assert "0 of 200" in capsys.readouterr().out


def test_what_is_no_run_is_named_and_the_others_are_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(folder / "no run")]) == 1
    assert "no run: neither a run folder nor" in capsys.readouterr().err
    (folder / "b" / "metrics.jsonl").write_text('{"loss": "x"}\n')
    write_run(folder / "c", 1, {}, {})
    (folder / "c" / "run.json").write_text("{")
    assert main(["runs", str(folder)]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].startswith("a")
    assert "b: damaged metrics" in captured.err and "run.json: Expecting" in captured.err


def test_runs_of_one_name_are_told_apart(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_run(tmp_path / "more" / "a", 3, {}, {"val_loss": 9.0, "val_bits_per_byte": 2.0})
    assert main(["runs", str(folder), str(other)]) == 0
    assert str(other) in capsys.readouterr().out


def test_both_doors_and_no_numba(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; sys.modules['numba'] = None; from pyengine_training.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "runs", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0 and "best-fit" in done.stdout
    cli = pytest.importorskip("pyengine.cli", reason="needs the engine's command line")
    assert cli.main(["runs", str(folder)]) == 0
    assert capsys.readouterr().out == done.stdout
    for command in ("train", "runs"):
        assert cli.main([command]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("pyengine: error: the following arguments are required: ")
        assert said.err.endswith(f"('pyengine {command} --help' tells more)\n") and said.err.count("\n") == 1
    assert cli.main(["train", "runs", str(folder)]) == 2
    assert "pyengine runs FOLDER" in capsys.readouterr().err


def test_a_reader_that_has_gone_is_no_error(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pyengine_training", "runs", str(folder)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
