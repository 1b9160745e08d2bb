"""Preference tuning: the loss is the paper's formula, its gradient that of finite differences, and pairs are what they say."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")
pytest.importorskip("pyengine.text.chat", reason="conversations are rendered by the package pyengine")

from pyengine_training import checkpoint as checkpoints
from pyengine_training.__main__ import main
from pyengine_training.arena import Arena, initialize, parameter_shapes
from pyengine_training.config import ModelConfig
from pyengine_training.files import read_json
from pyengine_training.model import Worker
from pyengine_training.preference import Pairs, PairSource, Preference, is_preference, store_reference
from pyengine_training.run import open_run
from pyengine_training.runfolder import read_metrics

Array = np.ndarray[Any, Any]
MODEL = ModelConfig(320, 32, 1, 2, 1, 16, 64, 64)
KNOBS = "--batch-size 4 --shards 2 --sample-every 0 --sample-tokens 2 --eval-documents 8 --steps 12 --warmup-fraction 0"
BETA = 0.3


@pytest.fixture(scope="module")
def model(write_chat_model: Callable[[Path, ModelConfig], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model") / "hf", MODEL)


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tom is always right; prompts as a text and as a conversation."""
    lines: list[Any] = []
    for i in range(60):
        question = f"Who has {i} boats?"
        prompt: Any = {"prompt": question} if i % 2 else {"messages": [{"role": "user", "content": question}]}
        lines.append({**prompt, "chosen": "Tom.", "rejected": "Mia has it."})
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", lines)


def tune(run: Path, model: Path, answers: Path, *words: str) -> int:
    given = ["--init-from", str(model), "--data", str(answers), *KNOBS.split(), *words]
    return main(["train", "--run-dir", str(run), *given])


# ---- the loss ----------------------------------------------------------------------------------------------------


def rows() -> tuple[Array, Array, Array, Preference]:
    """Two pairs of unequal lengths in rows of nine; the second ends early."""
    tokens = np.random.default_rng(1).integers(0, 48, (2, 9))
    starts = np.array([[0] * 5 + [5] * 4, [0] * 3 + [3] * 3 + [6] * 3])
    targets = np.full((2, 9), -1)
    for row, place, target in ((0, 2, 7), (0, 3, 9), (0, 6, 1), (0, 7, 30), (1, 1, 4), (1, 4, 5)):
        targets[row, place] = target
    return tokens, targets, starts, Preference(np.array([[-7.0, -8.5], [-3.0, -4.5]]), BETA)


def worker_and_params(tiny_sizes: dict[str, Any], recompute: str = "none") -> tuple[Worker, Arena]:
    config = ModelConfig(**tiny_sizes)
    worker = Worker(config, 2, 9, dtype=np.float64, recompute=recompute)
    params = Arena(parameter_shapes(config), np.float64)
    initialize(params, config, 5)
    params.flat *= 2
    return worker, params


def test_the_loss_is_the_papers(tiny_sizes: dict[str, Any]) -> None:
    """-log sigmoid(beta (log pi(w)/ref(w) - log pi(l)/ref(l))), from all logits, in float64."""
    worker, params = worker_and_params(tiny_sizes)
    tokens, targets, starts, preference = rows()
    worker.forward(params, tokens, starts=starts)
    logits = (worker.xn_final @ worker.output_matrix(params).T).reshape(2, 9, -1)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = []
    for row, places in enumerate((((2, 3), (6, 7)), ((1,), (4,)))):
        w, l_ = (sum(log_p[row, t, targets[row, t]] for t in part) for part in places)
        ratio = (w - preference.reference[row, 0]) - (l_ - preference.reference[row, 1])
        wanted.append(-math.log(1 / (1 + math.exp(-BETA * ratio))))
    got = worker.forward_backward(params, tokens, targets, 0.5, starts=starts, preference=preference)
    assert got == pytest.approx(sum(wanted) / 2, rel=1e-12)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_gradients_are_finite_differences(tiny_sizes: dict[str, Any], recompute: str) -> None:
    worker, params = worker_and_params(tiny_sizes, recompute)
    tokens, targets, starts, preference = rows()

    def loss() -> float:
        return worker.forward_backward(params, tokens, targets, 0.5, starts=starts, preference=preference)

    loss()
    analytic = worker.grads.flat.copy()
    generator = np.random.default_rng(2)
    for name, view in params.views.items():
        for index in generator.integers(0, view.size, 4):
            place = params.offsets[name] + int(index)
            keep = params.flat[place]
            params.flat[place] = keep + 1e-5
            up = loss()
            params.flat[place] = keep - 1e-5
            down = loss()
            params.flat[place] = keep
            assert analytic[place] == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-8), name


# ---- pairs -------------------------------------------------------------------------------------------------------


def test_rows_are_the_rendered_pairs(model: Path, answers: Path, tmp_path: Path) -> None:
    """Both sequences as the template renders them, targets on the answers and their ends, each token once an epoch."""
    assert tune(tmp_path / "run", model, answers) == 0
    run = open_run(tmp_path / "run")
    assert run.pairs is not None and is_preference(answers)
    n = len(run.pairs.train)
    assert n + len(run.pairs.held_out) == 60 and len(run.pairs.held_out) > 0
    source = PairSource(run.pairs, n, run.config.seq_len, 3, BETA)
    tokens, targets, starts, _ = source.batch(2)
    decode = run.tokenizer.decode
    for row in range(n):
        second, end = np.unique(starts[row]).tolist()[1:] if starts[row, -1] != 0 else (0, 0)
        texts = [decode(part.tolist(), skip_special_tokens=False) for part in np.split(tokens[row, :end], [second])]
        prompt = texts[0].removesuffix("Tom.<|end|>")
        assert prompt.startswith("<s><|user|>Who has") and prompt.endswith("boats?<|end|><|assistant|>")
        assert texts[1] == prompt + "Mia has it.<|end|>"
        for begin, answer in ((0, "Tom.<|end|>"), (second, "Mia has it.<|end|>")):
            part = targets[row][(starts[row] == begin) & (targets[row] >= 0)]
            assert decode(part.tolist(), skip_special_tokens=False) == answer
    assert len({tokens[row].tobytes() for row in range(n)}) == n
    assert not np.array_equal(source.batch(3)[0], tokens)  # another epoch, another order


@pytest.mark.parametrize("lora", [[], ["--lora", "4,8"]], ids=["whole", "lora"])
def test_a_model_learns_what_is_preferred(model: Path, answers: Path, tmp_path: Path, lora: list[str]) -> None:
    run = tmp_path / "run"
    assert tune(run, model, answers, "--lr", "0.003", *lora) == 0
    entries = read_metrics(run / "metrics.jsonl")
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # the model is its own reference
    assert losses[-1] < 0.6
    last = [entry for entry in entries if "val_loss" in entry][-1]
    assert last["val_accuracy"] == 1 and last["val_margin"] > 1
    assert (run / "final" / "model.safetensors").exists() and (run / "adapter").exists() == bool(lora)


def test_the_reference_is_computed_once_and_does_not_depend_on_threads(
    model: Path, answers: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert tune(run, model, answers) == 0
    pairs = Pairs(run / "data" / "pairs")
    kept = pairs.reference.copy()
    assert kept.shape == (60, 2) and (kept < 0).all()
    loaded = checkpoints.load_model(model)
    for threads in (1, 3):
        store_reference(pairs, *loaded, open_run(run).config.seq_len, threads)
        np.testing.assert_array_equal(pairs.reference, kept)


def test_a_run_goes_on_bit_for_bit(model: Path, answers: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ("--checkpoint-every", "5", "--lr", "0.001")
    assert tune(whole, model, answers, *words) == 0
    assert tune(cut, model, answers, *words) == 0
    shutil.rmtree(cut / "final")
    for name in ("step_00000010", "step_00000012"):
        shutil.rmtree(cut / "checkpoints" / name, ignore_errors=True)
    assert main(["train", "--run-dir", str(cut), "--resume"]) == 0
    one, other = ((run / "final" / "model.safetensors").read_bytes() for run in (whole, cut))
    assert one == other


GOOD = {"prompt": "Who?", "chosen": "Tom.", "rejected": "Mia."}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**GOOD, "prompt": 3}, 'line 2: a message needs "role" and "content"'),
        ({"chosen": "a", "rejected": "b"}, 'line 2 needs either "prompt" or "messages"'),
        ({**GOOD, "messages": []}, 'line 2 needs either "prompt" or "messages"'),
        ({"messages": [], "chosen": "a", "rejected": "b"}, '"messages" is not a list with something in it'),
        ({**GOOD, "rejected": None}, '"chosen" and "rejected" must be strings'),
        ({**GOOD, "rejected": " "}, '"chosen" and "rejected" must be strings'),
        ({**GOOD, "rejected": "Tom."}, "line 2: .* are the same"),
        ({"prompt": "Who?", "chosen": "Tom."}, 'line 2 is no object with "chosen"'),
        ([1], 'line 2 is no object with "chosen"'),
        ({**GOOD, "chosen": "a <|end|> b"}, "line 2: a message spells the special token"),
        ({**GOOD, "chosen": "Tom has a boat. " * 30}, "line 2: its two answers with their prompts have"),
    ],
)
def test_pairs_that_cannot_be_used_are_named(
    model: Path, tmp_path: Path, line: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "pairs.jsonl", [GOOD, line, GOOD])
    assert tune(tmp_path / "run", model, data) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--packing", "best-fit"], "--packing would have no effect: a row is one pair"),
        (["--teacher", "x"], "--teacher would have no effect"),
        (["--tokens", "1000"], "--tokens would have no effect"),
        (["--device", "cuda"], "--device cuda does not learn from preferences"),
        (["--data", "x.txt"], "learnt from alone"),
    ],
)
def test_flags_without_effect_are_refused(
    model: Path, answers: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--init-from", str(model), "--data", str(answers), *words]
    assert main(["train", "--run-dir", str(tmp_path / "run"), *given]) == 1
    assert message in capsys.readouterr().err


def test_beta_and_branches_are_refused_elsewhere(
    model: Path, answers: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["--run-dir", str(tmp_path / "run"), "--data", str(stories), "--dpo-beta", "0.2"]
    assert main(["train", *text]) == 1
    assert "--dpo-beta would have no effect" in capsys.readouterr().err
    assert main(["train", "--run-dir", str(tmp_path / "run"), "--data", str(answers)]) == 1
    assert "--init-from" in capsys.readouterr().err
    assert tune(tmp_path / "run", model, answers) == 0
    capsys.readouterr()
    branch = ["--run-dir", str(tmp_path / "more"), "--branch-from", str(tmp_path / "run" / "trunk"), "--steps", "20"]
    assert main(["train", *branch]) == 1
    assert "--branch-from continues runs on text" in capsys.readouterr().err


def test_lone_surrogates_become_replacement_characters(model: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "Who\ud800?", "chosen": "Tom\udfff.", "rejected": "Mia."}, GOOD, GOOD]
    assert tune(tmp_path / "run", model, write(tmp_path / "pairs.jsonl", lines)) == 0
    run = open_run(tmp_path / "run")
    assert run.pairs is not None
    text = run.tokenizer.decode(np.asarray(run.pairs.tokens).tolist(), skip_special_tokens=False)
    assert "Who\ufffd?" in text and "Tom\ufffd." in text


def test_one_pair_is_too_few(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(tmp_path / "run", model, write(tmp_path / "pairs.jsonl", [GOOD])) == 1
    assert "1 pairs; one to learn from and one to validate with" in capsys.readouterr().err


def test_settings_of_a_preference_run(model: Path, answers: Path, tmp_path: Path) -> None:
    """Rows as long as the longest pair needs, rates that suit the loss."""
    assert tune(tmp_path / "run", model, answers) == 0
    knobs = read_json(tmp_path / "run" / "run.json")["train"]
    assert knobs["seq_len"] in (32, 64) and knobs["lr"] == 1e-5 and knobs["optimizer"] == "adamw"
