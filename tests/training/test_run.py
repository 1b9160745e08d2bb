"""Whole runs through the command line: a run, resuming it, branching, fine-tuning, and bad input."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training import checkpoint as checkpoints
from pyengine_training.__main__ import main
from pyengine_training.energy import EnergyMeter, add_joules
from pyengine_training.files import load_safetensors, read_json
from training.command import KNOBS, SIZES, arguments, metrics, steps_of


@pytest.fixture(scope="module")
def finished(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    extra = "--steps 12 --eval-every 6 --checkpoint-every 4 --sample-every 12 --keep-checkpoints 0 --decay-fraction 0.3"
    assert main(arguments(run, stories, extra)) == 0
    return run


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    assert [s for s, _ in steps_of(finished)] == list(range(1, 13))
    checks = [e for e in metrics(finished) if "val_loss" in e]
    assert checks[0]["step"] == 6 and checks[-1]["int8"]
    assert all(0 < e["val_bits_per_byte"] < 9 for e in checks)
    names = {p.name for p in (finished / "final").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (finished / "trunk" / "state.json").exists()
    assert (finished / "loss.png").read_bytes()[:4] == b"\x89PNG"
    log = (finished / "log.txt").read_text()
    assert "parameters" in log and "FLOP" in log and "sample: Once upon a time" in log
    generation = read_json(finished / "final" / "generation_config.json")
    assert generation["temperature"] == 0.7 and generation["eos_token_id"] == 0


def test_int8_at_the_end_of_a_long_decay(stories: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    extra = "--steps 10 --eval-every 0 --sample-every 0 --decay-fraction 0.8 --quantize-fraction 0.3"
    assert main(arguments(run, stories, extra)) == 0
    steps = [e for e in metrics(run) if "loss" in e]
    assert [e["quantized"] for e in steps] == [False] * 7 + [True] * 3
    assert [e["lr_factor"] < 1 for e in steps] == [False] * 2 + [True] * 8
    log = (run / "log.txt").read_text()
    assert "int8 simulated: in the last 3 steps" in log
    assert "sample" not in log


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--decay-fraction 0.2 --quantize-fraction 0.3", "quantize_fraction (0.3) exceeds decay_fraction (0.2)"),
        ("--quantize always --quantize-fraction 0.1", "--quantize-fraction would have no effect"),
        ("--quantize never --quantize-fraction 0.1", "--quantize-fraction would have no effect"),
        ("--comm nccl", "--comm has no effect on --device cpu"),
        ("--comm nccl --device cuda", "--comm has no effect on one rank"),
        ("--shard-optimizer", "--shard-optimizer has no effect on one rank"),
    ],
)
def test_flags_that_cannot_be(
    stories: Path, tmp_path: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "run", stories, f"--steps 4 {words}")) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_checkpoint_names_are_hugging_faces(finished: Path) -> None:
    tensors = load_safetensors(finished / "final" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (16, 32)
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (32, 64)
    assert all(t.dtype == np.float32 for t in tensors.values())
    model, params = checkpoints.load_model(finished / "final")
    assert model.n_params() == sum(t.size for t in tensors.values())
    np.testing.assert_array_equal(params["tok_embeddings"], tensors["model.embed_tokens.weight"])


def test_a_used_folder_is_never_overwritten(finished: Path, stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert main(arguments(finished, stories, "--steps 3")) == 1
    assert "already used" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_resuming_gives_the_same_bits_and_each_step_once(finished: Path, tmp_path: Path) -> None:
    """The run as it was after a crash at step 8: later checkpoints gone, metrics ahead and cut mid-line."""
    run = tmp_path / "crashed"
    shutil.copytree(finished, run)
    for name in ("checkpoints/step_00000012", "trunk", "final"):
        shutil.rmtree(run / name)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:11]) + '\n{"step": 11, "lo')
    assert main(["train", "--run-dir", str(run), "--resume"]) == 0
    assert steps_of(run) == steps_of(finished)
    for name in ("final", "checkpoints/step_00000012"):
        ours = (run / name / "model.safetensors").read_bytes()
        assert ours == (finished / name / "model.safetensors").read_bytes()


def test_resuming_changes_no_option_and_a_finished_run_stays(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    resume = ["train", "--run-dir", str(finished), "--resume"]
    assert main([*resume, "--steps", "99"]) == 1
    assert "steps cannot change" in capsys.readouterr().err
    assert main(resume) == 0
    assert "already finished" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_trunk_can_be_decayed_and_continued(finished: Path, tmp_path: Path) -> None:
    state = read_json(finished / "trunk" / "state.json")
    assert state["step"] == 8
    branch = tmp_path / "branch"
    flags = ["--steps", "12", "--decay-fraction", "0.34"]
    code = main(["train", "--run-dir", str(branch), "--branch-from", str(finished / "trunk"), *flags])
    assert code == 0
    # the same schedule as the parent's own decay: the same losses
    assert steps_of(branch) == steps_of(finished)[8:]


def test_fine_tuning_starts_from_the_given_weights(finished: Path, stories: Path, tmp_path: Path) -> None:
    run = tmp_path / "tuned"
    flags = f"--init-from {finished / 'final'} --steps 2 --quantize never --warmup-fraction 0"
    given = ["--data", str(stories), *f"{KNOBS} {flags}".split()]
    assert main(["train", "--run-dir", str(run), *given]) == 0
    assert steps_of(run)[0][1] < steps_of(finished)[0][1] - 0.2
    attachments = (run / "final" / "tokenizer.json").read_bytes()
    assert attachments == (finished / "final" / "tokenizer.json").read_bytes()


def test_distillation_from_the_command_line(finished: Path, stories: Path, tmp_path: Path) -> None:
    run = tmp_path / "student"
    flags = f"{SIZES} {KNOBS} --teacher {finished / 'final'} --distill-alpha 0.7 --steps 2"
    assert main(["train", "--run-dir", str(run), "--data", str(stories), *flags.split()]) == 0
    assert read_json(run / "run.json")["train"]["distill_alpha"] == 0.7


def test_a_budget_becomes_a_stored_number_of_steps(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr("pyengine_training.runfolder.Log.progress", lambda log, text: shown.append(text))
    run = tmp_path / "budget"
    assert main(arguments(run, stories, "--budget-minutes 0.02 --eval-every 0")) == 0
    steps = read_json(run / "run.json")["train"]["steps"]
    assert steps >= 1 and len(steps_of(run)) == steps
    last = [f"step {steps}: validating", f"step {steps}: writing a sample"]
    assert [text for text in shown if text in last][:2] == last  # after the last step, too, a terminal says what takes long


def test_dry_run_prints_the_plan_and_writes_nothing(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "dry", stories, "--tokens 1e6 --dry-run")) == 0
    out = capsys.readouterr().out
    for word in ("parameters", "tokens", "epochs", "memory", "FLOP", "time"):
        assert word in out
    assert not (tmp_path / "dry").exists()


def test_options_from_a_file_lose_to_flags(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"depth": 2, "steps": 77, "data": [str(stories)], "lr": 0.001}))
    run = ["train", "--run-dir", str(tmp_path / "r"), "--config", str(path), "--dry-run"]
    assert main([*run, "--steps", "55"]) == 0
    out = capsys.readouterr().out
    assert "2 layers, dim 128" in out and "steps       55" in out
    path.write_text(json.dumps({"depht": 2, "data": [str(stories)]}))
    assert main(run) == 1
    assert "depht" in capsys.readouterr().err


def test_a_model_that_the_last_step_ruined_is_not_kept(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, rates = tmp_path / "run", "--optimizer adamw --lr 1e30 --warmup-fraction 0 --quantize never"
    assert main(arguments(run, stories, f"{rates} --steps 1")) == 1
    said = capsys.readouterr().err
    assert said.count("error: step 1: the held-out loss of") == 1 and "Lower the learning rate" in said, said
    assert not checkpoints.checkpoints(run) and not (run / "final").exists()


# ---- interruption ------------------------------------------------------------------------------------------------


def test_what_kill_9_left_of_a_checkpoint_goes_with_the_next_one(finished: Path, tmp_path: Path) -> None:
    """The same step may never be written again, and the size of three models would stay."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step_00000012")
    left = run / "checkpoints" / ".step_00000010.tmp"
    left.mkdir()
    (left / "model.safetensors").touch()
    shutil.rmtree(run / "final")
    assert main(["train", "--run-dir", str(run), "--resume"]) == 0
    assert not left.exists() and (run / "checkpoints" / "step_00000012").exists()


def test_a_full_disk_keeps_the_old_checkpoint(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "full"
    shutil.copytree(finished, run)
    for name in ("checkpoints/step_00000012", "final"):
        shutil.rmtree(run / name)

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")  # as a write that fails says it: without a name

    monkeypatch.setattr(checkpoints, "save_safetensors", no_space)
    assert main(["train", "--run-dir", str(run), "--resume"]) == 1
    err = capsys.readouterr().err
    assert "No space left" in err and "step_00000012" in err and "--resume" in err
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000008"]


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, extra, message",
    [
        (b"", "", "empty|only"),
        (b"\xff\xfe\x00", "", "not UTF-8"),
        (b"One small text. " * 40, "--vocab-size 4096", "supports a vocabulary of only"),
        (None, "--seq-len 1000000", "fewer than one sequence"),
        (None, "--n-kv-heads 3", "does not divide"),
        (None, "--shards 3", "power of two"),
        (None, "--shards 8", "does not divide"),
        (None, "--data-weights 1,2", "give one each"),
    ],
)
def test_bad_input_is_named_and_leaves_no_folder(
    stories: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    extra: str,
    message: str,
) -> None:
    data = stories
    if content is not None:
        data = tmp_path / "bad.txt"
        data.write_bytes(content)
    run = tmp_path / "run"
    assert main(arguments(run, data, f"--steps 2 {extra}")) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (run / "checkpoints").exists()


def test_checkpoints_of_other_kinds_are_refused(
    finished: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def attempt(folder: Path) -> str:
        run = tmp_path / f"run_{folder.name}"
        given = ["--data", str(stories), "--init-from", str(folder), "--steps", "1", "--seq-len", "32"]
        assert main(["train", "--run-dir", str(run), *given]) == 1
        return capsys.readouterr().err

    def damaged(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(finished / "final", folder)
        values = read_json(folder / "config.json")
        (folder / "config.json").write_text(json.dumps({**values, **changes}))
        return folder

    assert "mistral" in attempt(damaged("a", model_type="mistral"))
    assert "RoPE scaling" in attempt(damaged("b", rope_scaling={"rope_type": "llama3"}))
    assert "missing tensors" in attempt(damaged("c", num_hidden_layers=2))
    assert "shape" in attempt(damaged("d", intermediate_size=65))
    cut = damaged("e")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "truncated" in attempt(cut)
    newer = tmp_path / "newer"
    shutil.copytree(finished, newer)
    shutil.rmtree(newer / "final")
    path = newer / "checkpoints" / "step_00000012" / "state.json"
    path.write_text(json.dumps({**read_json(path), "format_version": 9}))
    assert main(["train", "--run-dir", str(newer), "--resume"]) == 1
    assert "newer version" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": "abc"},
        {"num_attention_heads": 0, "head_dim": None},
        {"rope_scaling": [1]},
        {"rope_parameters": {"rope_theta": "x"}},
        {"vocab_size": math.inf},
        {"layer_types": 3},
        {"model_type": ["llama"]},
        {"rms_norm_eps": "nan"},
        {"rope_theta": -1},
    ],
)
def test_a_config_that_is_no_models_is_named(
    changes: dict[str, Any], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(finished / "final", folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**read_json(path), **changes}))
    assert main(["sample", str(folder), "--max-tokens", "1"]) == 1
    assert f"pyengine: error: {path}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "header", [b"[" * 100_000, b'{"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}']
)
def test_weights_that_cannot_be_read_are_named(
    header: bytes, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(finished / "final", folder)
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"1")
    assert main(["sample", str(folder), "--max-tokens", "1"]) == 1
    assert f"pyengine: error: {path}: " in capsys.readouterr().err


@pytest.mark.parametrize("values", [{}, {"weight_map": {"a": 3}}])
def test_an_index_of_weights_that_names_none_is_named(
    values: Any, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(finished / "final", folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(values))
    assert main(["sample", str(folder), "--max-tokens", "1"]) == 1
    assert f"pyengine: error: {folder}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", '{"run_version": 1}'),
        ("run.json", "[" * 100_000),
        ("checkpoints/step_00000012/state.json", '{"format_version": 1}'),
        ("checkpoints/step_00000012/state.json", '{"format_version": "2"}'),
    ],
)
def test_what_a_run_is_continued_from_is_named_where_it_is_damaged(
    name: str, content: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / name).write_text(content)
    assert main(["train", "--run-dir", str(run), "--resume"]) == 1
    assert f"pyengine: error: {(run / name).parent}" in capsys.readouterr().err


def test_what_may_be_null_must_be_there_all_the_same(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    values = read_json(run / "run.json")
    del values["bos"]
    (run / "run.json").write_text(json.dumps(values))
    assert main(["train", "--run-dir", str(run), "--resume"]) == 1
    assert f"{run / 'run.json'} is damaged: bos missing or malformed" in capsys.readouterr().err


def test_a_line_of_metrics_that_is_none_is_left_out(finished: Path, tmp_path: Path) -> None:
    """A disk that was full, or an editor, leaves such lines."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "final")
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"a": 1}\n\xff\n' + b"[" * 100_000 + b'\n{"step": ')
    assert main(["train", "--run-dir", str(run), "--resume"]) == 0
    steps = [step for step, _ in steps_of(run)]
    assert steps == list(range(1, 13))


# ---- reports -----------------------------------------------------------------------------------------------------


def test_evaluate_sample_and_snap(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, final = str(next((finished / "data").iterdir())), str(finished / "final")
    assert main(["evaluate", final, data]) == 0
    results = json.loads(capsys.readouterr().out)
    logged = [e for e in metrics(finished) if "val_loss" in e][-2:]
    assert results["float32"]["tokens"] > 0
    assert abs(results["int8"]["loss"] - results["float32"]["loss"]) < 0.05
    assert main(["evaluate", final, data, "--documents", "4", "--seq-len", "32"]) == 0
    four = json.loads(capsys.readouterr().out)
    assert four["float32"]["loss"] == pytest.approx(logged[0]["val_loss"], rel=1e-6)
    assert four["int8"]["loss"] == pytest.approx(logged[1]["val_loss"], rel=1e-6)
    assert main(["sample", final, "--max-tokens", "5", "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("Once upon a time")
    main(["sample", final, "--max-tokens", "5", "--seed", "3"])
    assert capsys.readouterr().out == first
    assert main(["snap", final, str(tmp_path / "snapped")]) == 0
    _, snapped = checkpoints.load_model(tmp_path / "snapped")
    _, params = checkpoints.load_model(finished / "final")
    from pyengine_training.ops import cpu as ops

    wanted = np.empty_like(params["layers.0.wo"])
    ops.fake_quant_weights(wanted, params["layers.0.wo"])
    np.testing.assert_array_equal(snapped["layers.0.wo"], wanted)


def test_energy_counters_that_wrap(tmp_path: Path) -> None:
    zone = tmp_path / "intel-rapl:0"
    part = tmp_path / "intel-rapl:0:1"  # inside package 0: must not count twice
    for folder in (zone, part):
        folder.mkdir()
        (folder / "max_energy_range_uj").write_text("10000000\n")
        (folder / "energy_uj").write_text("9000000\n")
    meter = EnergyMeter(tmp_path)
    (zone / "energy_uj").write_text("1500000\n")
    assert meter.joules() == pytest.approx(2.5)
    assert EnergyMeter(tmp_path / "absent").joules() is None
    assert add_joules(None, None) is None and add_joules(None, 2.0) == 2.0 == add_joules(2.0, None)
