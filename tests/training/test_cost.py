"""The cost sheet: the numbers of a run, the speed that the engine adds, and both doors to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pyengine_training import checkpoint as checkpoints
from pyengine_training import cost
from pyengine_training.__main__ import main
from pyengine_training.arena import Arena, initialize, parameter_shapes
from pyengine_training.config import ModelConfig, TrainConfig, to_json
from pyengine_training.files import read_json, write_json
from pyengine_training.text import read_documents, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(300, 64, 2, 2, 1, 32, 88, 48)
STEPS, TOKENS, SECONDS = 10, 5000, 1800.0


@pytest.fixture
def run(stories: Path, tmp_path: Path) -> Path:
    """A finished run's folder as far as the sheet reads it."""
    folder = tmp_path / "run"
    params = Arena(parameter_shapes(MODEL))
    initialize(params, MODEL, seed=5)
    tokenizer = train_tokenizer(read_documents(stories), 300)
    step = folder / "checkpoints" / f"step_{STEPS:08d}"
    for target in (step, folder / "final"):
        target.mkdir(parents=True)
        checkpoints.write_hf_folder(target, params, MODEL, tokenizer=tokenizer, bos=0, eos=0)
    state: dict[str, Any] = {
        "format_version": checkpoints.FORMAT_VERSION,
        "step": STEPS,
        "tokens": TOKENS,
        "seconds": SECONDS,
        "joules": 7.2e6,
        "model": to_json(MODEL),
        "train": to_json(TrainConfig(seq_len=32)),
    }
    write_json(step / "state.json", state)
    write_json(folder / "run.json", {"run_version": 1, "teacher": None})
    return folder


def sheet(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["cost", *map(str, arguments), "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_numbers_of_the_sheet(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure from the formulas, by hand."""
    values = sheet(capsys, run, "--rate", 0.36, "--tokens-per-second", 1000)
    matrices = 2 * ((2 * 64 + 2 * 32) * 64 + 3 * 88 * 64)
    per_token = 2 * (matrices + 300 * 64 + 2 * 2 * 64 * 16)
    assert values["parameters"] == matrices + 300 * 64 + 5 * 64
    assert values["inference_flops_per_token"] == per_token
    assert values["training_flops"] == 3 * per_token * TOKENS
    assert values["training_tokens"] == TOKENS and values["training_steps"] == STEPS
    assert values["training_joules"] == 7.2e6
    assert values["training_price"] == pytest.approx(0.18)
    assert values["inference_price_per_million"] == pytest.approx(0.1)
    assert values["break_even_tokens_by_time"] == SECONDS * 1000
    # the same price, from the other side
    assert values["break_even_tokens_by_time"] * 1e-6 * 0.1 == pytest.approx(values["training_price"])
    assert values["break_even_tokens_by_flops"] == 3 * TOKENS


def test_what_is_not_known_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints" / f"step_{STEPS:08d}" / "state.json"
    write_json(path, {**read_json(path), "joules": None})
    values = sheet(capsys, run)
    for name in ("training_price", "training_joules", "inference_price_per_million", "break_even_tokens_by_time"):
        assert values[name] is None
    assert main(["cost", str(path.parent)]) == 0  # a checkpoint of the run is as good
    text = capsys.readouterr().out
    assert "not reported by this machine" in text and "give --rate" in text and "30:00" in text


def test_a_teachers_forward_is_part_of_the_cost(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = sheet(capsys, run)["training_flops"]
    write_json(run / "run.json", {"run_version": 1, "teacher": str(run / "final")})
    assert sheet(capsys, run)["training_flops"] == pytest.approx(alone * 8 / 6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda run: run.parent / "nothing", "no such folder"),
        (lambda run: run.parent, "not a run folder"),
        (lambda run: run / "final", "give its run folder"),
        (lambda run: (run / "checkpoints").rename(run / "gone").parent, "no checkpoint yet"),
    ],
)
def test_other_folders_are_named(run: Path, make: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(run)
    assert main(["cost", str(folder)]) == 1
    err = capsys.readouterr().err
    assert message in err and str(folder) in err
    engine = pytest.importorskip("pyengine.cli", reason="the engine is not built")
    assert engine.main(["cost", str(folder)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("pyengine: error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("flag, value", [("--rate", "-1"), ("--rate", "inf"), ("--tokens-per-second", "0")])
def test_numbers_that_cannot_be_are_wrong_usage(
    run: Path, flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["cost", str(run), flag, value])
    assert stop.value.code == 2
    assert flag in capsys.readouterr().err


def test_the_bare_door_needs_neither_numba_nor_the_engine(run: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['numba', 'llvmlite', 'pyengine']));"
        "from pyengine_training.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "cost", str(run), "--rate", "1"]
    done = subprocess.run(command, cwd=ROOT / "training", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "training price            0.5000 at 1 an hour" in done.stdout


# ---- pyengine cost -----------------------------------------------------------------------------------------------


@pytest.fixture
def engine_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("pyengine._core", reason="the engine's extension is not built")
    monkeypatch.setenv("PYENGINE_CACHE", str(tmp_path / "cache"))
    from pyengine.cli import main as engine_main

    return engine_main


def test_the_runs_own_model_is_measured(
    run: Path, engine_main: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYENGINE_MODEL", "/nowhere")  # another model, whatever it is
    assert engine_main(["cost", str(run), "--rate", "0.36", "-n", "8", "-r", "2", "-t", "1", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    speed = values["inference_tokens_per_second"]
    assert speed > 0 and values["threads"] == 1 and values["rate"] == 0.36
    assert values["inference_price_per_million"] == pytest.approx(100 / speed)
    assert values["break_even_tokens_by_time"] == pytest.approx(SECONDS * speed)
    assert Path(values["model"]).exists()
    assert engine_main(["cost", str(run), "-n", "8", "-r", "1"]) == 0
    out = capsys.readouterr().out
    assert "tokens/s, one sequence" in out and "costs as much as training" in out


def test_the_model_must_be_the_one_that_was_trained(
    run: Path, engine_main: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints" / f"step_{STEPS:08d}" / "state.json"
    state = read_json(path)
    write_json(path, {**state, "model": {**state["model"], "n_layers": 3}})
    assert engine_main(["cost", str(run), "-m", str(run / "final")]) == 1
    assert "not the model that was trained: its n_layers is 2, the run's 3" in capsys.readouterr().err


def test_train_cost_points_to_the_command(run: Path, engine_main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert engine_main(["train", "cost", str(run)]) == 2
    assert "pyengine cost RUN" in capsys.readouterr().err


def test_a_given_speed_is_not_measured(run: Path, engine_main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert engine_main(["cost", str(run), "--tokens-per-second", "250", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["inference_tokens_per_second"] == 250 and cost.cost_sheet(
        cost.read_training(run), None, 250.0
    ).break_even_tokens_by_time == pytest.approx(250 * SECONDS)


def test_without_the_training_half_the_extra_is_named(
    engine_main: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pyengine.cli.cost.find_spec", lambda name: None)
    assert engine_main(["cost", "run"]) == 1
    assert "pip install 'pyengine-lm[train]'" in capsys.readouterr().err
