"""A run that has so many minutes ends in time, at the end of its decay, on a clock of the test's own."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training import train
from pyengine_training.__main__ import main
from pyengine_training.budget import Budget
from pyengine_training.checkpoint import read_state
from pyengine_training.config import TrainConfig
from pyengine_training.files import read_json
from pyengine_training.optimizer import schedule
from pyengine_training.runfolder import read_metrics
from pyengine_training.trainer import Trainer

DECAY: dict[str, Any] = {"decay_fraction": 0.3, "quantize_fraction": 0.0}  # all of it simulates int8
FLAGS = (
    "--vocab-size 300 --dim 32 --n-layers 1 --n-heads 2 --n-kv-heads 1 --head-dim 16 --hidden-dim 64 "
    "--seq-len 32 --batch-size 4 --shards 2 --eval-every 0 --sample-every 0 --eval-documents 2 --sample-tokens 1 "
    "--decay-fraction 0.3"
)


def test_a_machine_as_fast_as_it_was_keeps_its_plan() -> None:
    budget = Budget(seconds=103.0, plain=1.0, quantized=2.0)
    config = TrainConfig(**DECAY)
    steps = budget.steps_at_first(config)
    assert steps == 76  # 100 seconds at 1.3 a step
    config = replace(config, steps=steps)
    for step in range(1, steps + 1):
        elapsed = step + max(0, step - config.decay_start)
        assert budget.steps(config, step, elapsed) == steps


@pytest.mark.parametrize("slow_from", [1, 40, 60, 70])
@pytest.mark.parametrize("factor", [1.5, 4.0])
@pytest.mark.parametrize("first", [0, 1000])
def test_a_slower_machine_makes_fewer_steps_and_the_whole_decay(slow_from: int, factor: float, first: int) -> None:
    """Of which the last step may be over the time, and the rates fall from one step to the next until they are almost zero."""
    budget = Budget(103.0, 1.0, 2.0, first=first)
    config = TrainConfig(steps=first + 76, warmup_fraction=0.0, **DECAY)
    step, elapsed, before, factors = first, 0.0, 0.0, []
    while step < config.steps:
        before = elapsed
        elapsed += (2.0 if config.quantized(step) else 1.0) * (factor if step - first >= slow_from else 1.0)
        factors.append(schedule(config, step))
        step += 1
        fewer = budget.steps(config, step, elapsed)
        assert step <= fewer <= config.steps
        config = replace(config, steps=fewer)
    assert before < budget.seconds
    assert factors == sorted(factors, reverse=True)
    assert len(factors) < 76


@pytest.mark.parametrize("warmup", [0.0, 0.3])
def test_after_a_pause_steps_come_back_until_the_decay_begins(warmup: float) -> None:
    """At most to the first plan; the rates do not rise again, end at almost zero, and the time is kept."""
    for pause_at, comes_back in [(12, True), (65, False)]:
        budget = Budget(103.0, 1.0, 2.0, planned=76)
        config = TrainConfig(steps=76, warmup_fraction=warmup, **DECAY)
        elapsed, before, counts, factors = 0.0, 0.0, [76], []
        step = 0
        while step < config.steps:
            before = elapsed
            elapsed += (2.0 if config.quantized(step) else 1.0) + (10.0 if step == pause_at else 0.0)
            factors.append(schedule(config, step))
            step += 1
            steps = budget.steps(config, step, elapsed)
            assert step <= steps <= 76 and (steps <= config.steps or step < config.decay_start)
            config = replace(config, steps=steps)
            counts.append(steps)
        grown = [after - was for was, after in itertools.pairwise(counts) if after > was]
        assert bool(grown) == comes_back and len(grown) < 20, counts  # of more than 40: not at every step
        assert before < budget.seconds and factors[-1] < 0.1
        past_warmup = factors[factors.index(1.0) :]
        assert past_warmup == sorted(past_warmup, reverse=True)


def test_a_run_that_was_begun_without_a_first_plan_only_shrinks() -> None:
    budget = Budget.of(TrainConfig(extra={"budget": {"seconds": 100.0, "plain": 1.0, "quantized": 1.0}}), 0)
    assert budget is not None and budget.steps(TrainConfig(steps=50), 10, 10.0) == 50


def test_the_first_steps_say_little() -> None:
    config = TrainConfig(steps=100)
    budget = Budget(100.0, 1.0, 1.0)
    assert budget.steps(config, 1, 4.9) == 100
    assert budget.steps(config, 1, 50.0) == 1 + 49 * 99 // 100 // 50


def test_a_run_on_a_machine_that_slows_down(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second a step, then three: less than the 58 steps that fit into a minute at first."""
    clock, work = [0.0], Trainer.step

    def step(self: Trainer, *batch: object) -> object:
        clock[0] += 1.0 if self.state.step < 20 else 3.0
        return work(self, *batch)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "monotonic", lambda: clock[0])
    monkeypatch.setattr(train, "measure_step_seconds", lambda run, machine: (1.0, 1.0))
    monkeypatch.setattr(Trainer, "step", step)
    run = tmp_path / "run"
    assert main(["train", "--run-dir", str(run), "--data", str(stories), *FLAGS.split(), "--budget-minutes", "1"]) == 0
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "lr_factor" in line]
    steps = len(lines)
    assert 20 < steps < 58 and lines[-1]["seconds"] <= 60
    values = read_json(run / "run.json")["train"]
    assert values["steps"] == steps and values["extra"]["budget"]["seconds"] == 60
    factors = [line["lr_factor"] for line in lines]
    assert factors == sorted(factors, reverse=True) and 0 < factors[-1] < 0.2
    assert 0 < read_state(run / "trunk")["step"] <= steps and (run / "final").exists()
    assert "measuring what a step takes here" in (run / "log.txt").read_text()  # nobody waits without a word
    assert main(["train", "--run-dir", str(run), "--resume"]) == 0  # it is finished
    assert len([line for line in read_metrics(run / "metrics.jsonl") if "lr_factor" in line]) == steps


def test_a_branch_has_its_own_minutes_and_goes_on_without_the_trunk(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the parent's steps took is none of the branch's time, and is known where that checkpoint is gone."""
    clock, work = [0.0], Trainer.step

    def step(self: Trainer, *batch: object) -> object:
        clock[0] += 1.0
        return work(self, *batch)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "monotonic", lambda: clock[0])
    monkeypatch.setattr(train, "measure_step_seconds", lambda run, machine: (1.0, 1.0))
    monkeypatch.setattr(Trainer, "step", step)
    parent, branch = tmp_path / "parent", tmp_path / "branch"
    assert main(["train", "--run-dir", str(parent), "--data", str(stories), *FLAGS.split(), "--steps", "20"]) == 0
    trunk = parent / "trunk"
    seconds = read_state(trunk)["seconds"]
    begin = ["train", "--run-dir", str(branch), "--branch-from", str(trunk), "--budget-minutes", "0.3"]
    assert seconds > 0 and main(begin) == 0
    values = read_json(branch / "run.json")["train"]
    assert values["extra"]["budget"]["before"] == seconds
    assert values["steps"] == read_state(trunk)["step"] + 17  # 18 seconds, of which a few per cent are for the rest
    shutil.rmtree(trunk)  # its texts are where they were
    assert main(["train", "--run-dir", str(branch), "--resume"]) == 0
