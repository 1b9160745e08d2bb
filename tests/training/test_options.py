"""Options of a run, as flags and in files: each has an effect, a range and a kind, or is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training.__main__ import main
from pyengine_training.config import TrainConfig, train_config_from_json
from pyengine_training.errors import ConfigError
from pyengine_training.files import read_json
from pyengine_training.plan import batch_hint, make_plan
from pyengine_training.setup import base_options, train_config
from training.command import KNOBS, SIZES, train


@pytest.mark.parametrize(
    ("values", "rows", "shards"),
    [
        ({"tokens": 1.02e6}, 4, 4),
        ({"tokens": 1.02e6, "seq_len": 2048}, 1, 1),
        ({"tokens": 1e8}, 16, 4),
        ({"tokens": 1.02e6, "batch_size": 8}, 8, 4),
        ({"tokens": 1.02e6, "shards": 8}, 8, 8),
        ({"steps": 10}, 16, 4),
    ],
)
def test_the_batch_follows_from_the_tokens(values: dict[str, Any], rows: int, shards: int) -> None:
    config = train_config(values, base_options(values, [Path("a.txt")]))
    assert (config.batch_size, config.shards) == (rows, shards)
    if "tokens" in values:
        assert config.steps == round(values["tokens"] / (rows * config.seq_len))


def test_rates_and_int8_follow_from_what_is_trained(finished: Path) -> None:
    def config(**values: Any) -> TrainConfig:
        return train_config(values, base_options(values, [Path("a.txt")]))

    assert (config().lr, config().muon_lr, config().quantize_fraction) == (0.01, 0.015, 0.1)
    assert (config(optimizer="adamw").lr, config(optimizer="adamw", lr=1e-3).lr) == (3e-3, 1e-3)
    tuned = config(init_from=str(finished / "final"))
    assert (tuned.lr, tuned.muon_lr, tuned.quantized_steps) == (3e-4, 2e-3, tuned.decay_steps)
    whole, other = config(), (tuned, config(optimizer="adamw"))
    assert (whole.beta2, whole.decay_fraction) == (0.99, 0.8)
    assert [(c.beta2, c.decay_fraction) for c in other] == [(0.95, 0.3)] * 2
    assert config(decay_data_weights=[1.0]).decay_fraction == 0.3
    assert config(decay_data_weights=[1.0], decay_fraction=0.5).decay_fraction == 0.5
    with pytest.raises(ConfigError, match=r"quantize_fraction \(0\.3\) exceeds decay_fraction \(0\.2\)"):
        config(decay_fraction=0.2, quantize_fraction=0.3)
    assert config(steps=100, decay_fraction=0.05).quantized_steps == 5  # the default's part is at most the decay


BRANCH = [
    *("--data {data}", "--dim 64", "--seed 3", "--seq-len 16", "--packing best-fit", "--optimizer adamw"),
    *("--tokenizer x", "--teacher x"),
]


@pytest.mark.parametrize(
    "start, extra",
    [
        *[("--branch-from {run}/trunk --steps 9", extra) for extra in BRANCH],
        ("--branch-from {run}/trunk --steps 9", "--distill-alpha 0.5"),
        ("--init-from {run}/final --data {data}", "--dim 64"),
        ("--init-from {run}/final --data {data}", "--depth 2"),
        ("--init-from {run}/final --data {data}", "--vocab-size 999"),
        ("--teacher {run}/final --data {data}", "--vocab-size 300"),
        ("--data {data}", "--distill-tau 3"),
        ("--data {data}", "--precision float32"),
        ("--data {data} --optimizer adamw", "--muon-lr 0.1"),
        ("--data {data} --tokenizer {run}/tokenizer.json", "--vocab-size 300"),
        ("--data {prepared}", "--vocab-size 300"),
        ("--data {prepared}", "--drop-unfinished"),
        ("--data {data} --steps 3", "--budget-minutes 1"),
        ("--data {data} --steps 3", "--tokens 1000"),
        ("--resume", "--dry-run"),
        ("--resume", "--plan"),
        ("--resume", "--shard-optimizer"),
        ("--resume", "--precision float32"),
        ("--resume", "--gpu h100"),
        ("--data {data}", "--ranks 4"),
        ("--data {data}", "--gpu h100"),
        ("--data {data}", "--shard-optimizer"),
    ],
)
def test_a_flag_without_effect_is_refused_by_name(
    start: str,
    extra: str,
    finished: Path,
    prepared: Path,
    stories: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"run": finished, "data": stories, "prepared": prepared}
    run = tmp_path / "run"
    assert train(run, f"{start} {extra}".format(**names)) == 1
    assert extra.split()[0] in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize("start", ["--resume", "--init-from x"])
def test_a_run_starts_in_one_way(start: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        train(tmp_path / "run", "--branch-from x", start)


@pytest.mark.parametrize(
    "given",
    [
        "--budget-minutes 0", "--budget-minutes -1", "--budget-minutes nan", "--budget-minutes inf", "--tokens 0",
        "--seed -1", "--seed 99999999999999999999", "--beta1 1.5", "--weight-decay -1", "--lr nan", "--eps 0",
        "--warmup-fraction 0.9 --decay-fraction 0.9", "--eval-documents 0", "--sample-tokens 0", "--clip -1",
        "--checkpoint-every -1", "--muon-momentum 1", "--depth 0", "--steps 0",
    ],
)  # fmt: skip
def test_a_value_that_cannot_work_is_refused_before_the_text_is_read(
    given: str, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise AssertionError("the text was read")

    monkeypatch.setattr("pyengine_training.setup.find_tokenizer", unreachable)
    assert train(tmp_path / "run", "--data", stories, given) == 1
    assert given.split()[0].strip("-").replace("-", "_") in capsys.readouterr().err.replace("-", "_")


@pytest.mark.parametrize(
    "values",
    [{"steps": "3"}, {"steps": 1.5}, {"steps": True}, {"lr": "a"}, {"lr": [1]}, {"optimizer": 3}, {"data_weights": 1}],
)
def test_a_value_of_the_wrong_type_is_named(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        train_config_from_json(values)
    assert train_config_from_json({"lr": 1, "data_weights": [1, 2]}) == TrainConfig(lr=1.0, data_weights=(1.0, 2.0))


@pytest.mark.parametrize(
    "values",
    [
        {"teacher": 3},
        {"data": [5]},
        {"depth": 1.7},
        {"drop_unfinished": "no"},
        {"vocab_size": 300.9},
        {"held_out": {"a": 1}},
        {"lora": ["x"]},
        {"qk_norm": True},
        {"seed": 0.5},
        {"steps": float("inf")},
        {"sample_prompt": 5},
        {"tokens": "many"},
    ],
)
def test_a_value_of_a_file_is_of_its_flags_kind(
    values: dict[str, Any], stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"data": [str(stories)], **values}))
    assert train(tmp_path / "run", "--config", path, "--dry-run") == 1
    err = capsys.readouterr().err
    assert f"{path}: {next(iter(values))} is " in err and "expected" in err


def test_a_file_may_write_whole_numbers_as_it_likes_and_leave_defaults_open(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Programs that write JSON know one kind of number, and null for what they do not say."""
    path, run = tmp_path / "options.json", tmp_path / "run"
    nulls = '"lr": null, "held_out": null, "teacher": null, "drop_unfinished": null, "tokens": null'
    path.write_text(f'{{"data": {json.dumps(str(stories))}, "steps": 1e3, "seed": 3.0, "depth": 2e0, {nulls}}}')
    assert train(run, "--config", path, "--dry-run") == 0
    assert "steps       1,000" in capsys.readouterr().out
    path.write_text(json.dumps({"data": None}))
    assert train(run, "--config", path, "--dry-run") == 1
    assert "--data is missing" in capsys.readouterr().err
    path.write_text(json.dumps({"depht": None}))
    assert train(run, "--config", path, "--dry-run") == 1
    assert "unknown option(s) depht" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["steps", "tokens", "lr", "dim", "vocab_size", "data_weights", "held_out"])
def test_an_integer_that_no_float_holds_is_named(
    name: str, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "options.json"
    value = 10**400
    path.write_text(json.dumps({"data": str(stories), name: [value] if name in ("data_weights", "held_out") else value}))
    assert train(tmp_path / "run", "--config", path, "--dry-run") == 1
    assert f"--{name.replace('_', '-')} is too large" in capsys.readouterr().err


def test_one_text_of_a_file_needs_no_list(stories: Path, tmp_path: Path) -> None:
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"data": str(stories), "held_out": 0.1, "drop_unfinished": False}))
    assert train(tmp_path / "run", "--config", path, "--dry-run") == 0


def test_a_flags_length_replaces_the_files(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"budget_minutes": 5, "depth": 1, "data": [str(stories)]}))
    assert train(tmp_path / "run", "--config", path, "--steps 55 --dry-run") == 0
    assert "steps       55 of" in capsys.readouterr().out
    path.write_text(json.dumps({"device": "cuda"}))
    assert train(tmp_path / "run", "--config", path, "--data", stories) == 1
    assert "device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "train --run-dir r --threads 0",
        "train --plan --nodes 0",
        "train --plan --ranks 0",
        "train --plan --rate nan",
        "evaluate m t --documents 0",
        "evaluate m t --seq-len 0",
        "sample m --max-tokens -4",
        "sample m --temperature nan",
        "sample m --top-p 0",
        "sample m --top-p 1.5",
        "sample m --seed -1",
        "cost r --rate -1",
        "cost r --tokens-per-second 0",
    ],
)
def test_a_number_out_of_range_is_wrong_usage(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert f"argument {words.split()[-2]}: " in err and words.split()[-1] in err


@pytest.mark.parametrize("name", ["eps", "distill_tau"])
def test_what_float32_cannot_divide_by_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        train_config_from_json({name: 1e-45})


@pytest.mark.parametrize(("fraction", "steps"), [(0.0, 30), (0.3, 30), (0.1, 10), (0.004, 1)])
def test_however_small_a_part_that_simulates_int8_has_a_step(fraction: float, steps: int) -> None:
    config = TrainConfig(steps=100, decay_fraction=0.3, quantize_fraction=fraction)
    assert config.quantized_steps == steps
    assert [config.quantized(step) for step in range(100)] == [False] * (100 - steps) + [True] * steps


def test_a_plan_shows_the_prepared_vocabulary(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", "--data", prepared, SIZES, KNOBS, "--steps 2 --dry-run") == 0
    assert "vocabulary 300" in capsys.readouterr().out


def test_a_short_context_is_the_default_length_of_rows(finished: Path, stories: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, "--init-from", finished / "final", "--data", stories, "--steps 1 --batch-size 4") == 0
    assert read_json(run / "run.json")["train"]["seq_len"] == 32


@pytest.mark.parametrize("name", ["", "final"])
def test_branching_from_something_else_says_what_to_give(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert train(tmp_path / "run", "--branch-from", finished / name, "--steps 9") == 1
    assert "give RUN/trunk" in capsys.readouterr().err


def test_a_gpus_time_is_not_the_cpus(tiny_sizes: dict[str, Any]) -> None:
    from pyengine_training.config import ModelConfig

    model, config = ModelConfig(**tiny_sizes), TrainConfig(seq_len=24)
    lines = make_plan(model, config, [1.0], 2, None, None).lines(model, config)
    assert "unknown until steps have run" in lines[-1] and "threads" not in lines[-1]


def test_few_large_steps_are_told() -> None:
    few = TrainConfig(steps=128)  # 1,048,576 tokens
    assert batch_hint(few)[0].endswith("(as many tokens: --batch-size 4 --shards 4 --steps 512)")
    assert batch_hint(TrainConfig(steps=512, batch_size=4)) == []
    assert batch_hint(TrainConfig(steps=1000)) == []
