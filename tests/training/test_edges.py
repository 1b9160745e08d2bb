"""What people do to a trainer: odd texts, corrected options, two starts at once, flags that cannot have an effect."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

import pyengine_training
from pyengine_training import runfolder, threads
from pyengine_training.__main__ import main
from pyengine_training.checkpoint import checkpoints, read_state
from pyengine_training.config import TrainConfig, train_config_from_json
from pyengine_training.data import BatchSource, Corpus, Phase, Reader, Split
from pyengine_training.errors import ConfigError, DataError, MissingLibraryError, RunFolderError
from pyengine_training.files import read_json
from pyengine_training.packing import RowPacker
from pyengine_training.plan import batch_hint, make_plan, warnings
from pyengine_training.run import open_run
from pyengine_training.setup import base_options, train_config
from pyengine_training.text import _pieces, is_validation, labelled, read_documents

SIZES = "--dim 32 --n-layers 1 --n-heads 2 --n-kv-heads 1 --head-dim 16 --hidden-dim 64"
KNOBS = "--seq-len 32 --batch-size 4 --shards 2 --eval-documents 4 --sample-tokens 4"
TINY = f"--vocab-size 300 {SIZES} {KNOBS} --sample-every 0"


def train(run: Path, *words: object) -> int:
    given = [part for word in words for part in (str(word).split() if isinstance(word, str) else [str(word)])]
    return main(["train", "--run-dir", str(run), *given])


# ---- texts -------------------------------------------------------------------------------------------------------


def test_line_ends_and_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    documents = ["One line.\nTwo lines.", "Another."]
    text = "\n<|endoftext|>\n".join(documents)
    for name, data in {
        "unix": text.encode(),
        "windows": text.replace("\n", "\r\n").encode(),
        "old_mac": text.replace("\n", "\r").encode(),
        "marked": b"\xef\xbb\xbf" + text.encode(),
    }.items():
        path = tmp_path / f"{name}.txt"
        path.write_bytes(data)
        assert list(read_documents(path)) == documents, name
    path = tmp_path / "marked.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "a\r\nb"}).encode() + b"\r\n")
    assert list(read_documents(path)) == ["a\r\nb"]  # escaped, so part of the text


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_line_ends_end_a_line(tmp_path: Path, end: str) -> None:
    """JSON may hold U+2028 and U+0085 unescaped, and a text a form feed: none of them ends a line, Windows or not."""
    path = tmp_path / "a.jsonl"
    path.write_bytes("".join(f'{{"text": "one\u2028two\x85{i}"}}{end}' for i in range(3)).encode())
    assert list(read_documents(path)) == [f"one\u2028two\x85{i}" for i in range(3)]
    path = tmp_path / "a.txt"
    path.write_bytes(f"a\x0c<|endoftext|>\x0cb{end}<|endoftext|>{end}c".encode())
    assert list(read_documents(path)) == ["a\x0c \x0cb", "c"]


def test_json_that_nests_without_end_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text("[" * 100_000 + "\n")
    assert train(tmp_path / "run", "--data", path, "--dry-run") == 0  # it does not look into the text
    assert train(tmp_path / "run", "--data", path, TINY) == 1
    assert f"{path}: line 1 is no object" in capsys.readouterr().err


def test_a_lone_surrogate_becomes_the_replacement_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "cut \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n')
    assert list(read_documents(path)) == ["cut \ufffd", "whole \U0001f600"]


@pytest.mark.parametrize("data, message", [(b"a\nb\nna\xefve\n", "line 3"), ("a".encode("utf-16"), "UTF-16")])
def test_what_is_not_utf8_is_named_by_its_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        list(read_documents(path))


def test_a_long_line_is_cut_without_copying_what_is_left_of_it() -> None:
    """A text may be one line of gigabytes: copies of its rest would be quadratic."""

    class Line(str):
        copied = 0

        def __getitem__(self, part: Any) -> Line:
            found = Line(super().__getitem__(part))
            Line.copied += len(found)
            return found

    line = Line("word " * 200_000)
    assert "".join(_pieces(line)) == line
    assert Line.copied == len(line)


@pytest.mark.parametrize("separator", ["\n", " ", ""])
def test_any_long_text_is_cut_into_documents_that_lose_nothing(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "a.txt"
    text = separator.join(f"word{i}" for i in range(60_000))
    path.write_text(text)
    documents = list(read_documents(path))
    assert len(documents) > 5 and max(map(len, documents)) < 100_000
    assert "".join("".join(documents).split()) == "".join(text.split())


def sides(documents: list[str]) -> tuple[list[str], list[str]]:
    found = list(labelled(documents))
    return [text for text, held_out in found if not held_out], [text for text, held_out in found if held_out]


def test_neither_side_is_ever_empty() -> None:
    names = [f"document {i}" for i in range(500)]
    held_out, others = [n for n in names if is_validation(n)], [n for n in names if not is_validation(n)]
    assert sides(names) == (others, held_out)
    assert sides(others[:3]) == (others[:2], others[2:3])
    assert sides(held_out[:2]) == (held_out[1:2], held_out[:1])
    assert sides([]) == ([], [])
    for alone in (others[0], held_out[0], "one two three four five six seven eight nine ten", "x"):
        train_side, validation = sides([alone])
        assert len(train_side) == len(validation) == 1 and validation[0]
        if len(alone) > 1:
            assert "".join((train_side[0] + validation[0]).split()) == "".join(alone.split())
            assert len(validation[0]) < len(train_side[0])


def test_a_text_of_one_document_is_not_scored_perfect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "names.txt"
    path.write_text("\n".join(f"name{i * 7919 % 1009}" for i in range(1500)))
    assert len(list(read_documents(path))) == 1
    assert train(tmp_path / "run", "--data", path, TINY, "--steps 2") == 0
    losses = [e["val_loss"] for e in runfolder.read_metrics(tmp_path / "run" / "metrics.jsonl") if "val_loss" in e]
    assert losses and min(losses) > 1
    assert "tokens are held out: validation of so few says little" in capsys.readouterr().err


def test_warnings_are_about_little_text() -> None:
    assert warnings([0.5], 30_000, 1_000_000) == []
    assert "held out" in warnings([0.5], 30_000, 10_000_000)[0]
    assert "5.0 passes" in warnings([0.5, 5.0], 30_000, 1_000_000)[0]


def test_runs_from_before_a_knob_go_on_as_they_were(finished: Path, tmp_path: Path) -> None:
    """What run.json did not name once had other values than today's defaults."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    values = runfolder.read_run(run)
    assert (values["train"].pop("packing"), values["train"].pop("attention")) == ("best-fit", "document")
    assert values["train"].pop("quantize_fraction") == 0.1
    runfolder.write_run(run, {name: value for name, value in values.items() if name != "run_version"})
    config = open_run(run).config
    assert (config.packing, config.attention) == ("restart", "row")
    assert config.quantized_steps == config.decay_steps


def test_a_run_that_goes_on_with_other_kernels_says_so(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    monkeypatch.setattr("pyengine_training.checkpoint.kernels_in_use", lambda: "others")
    assert main(["train", "--run-dir", str(run), "--resume"]) == 0
    assert "warning: the checkpoint was made with another blas: the run continues, but not with" in capsys.readouterr().err


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


def test_few_large_steps_are_told() -> None:
    few = TrainConfig(steps=128)  # 1,048,576 tokens
    assert batch_hint(few)[0].endswith("(as many tokens: --batch-size 4 --shards 4 --steps 512)")
    assert batch_hint(TrainConfig(steps=512, batch_size=4)) == []
    assert batch_hint(TrainConfig(steps=1000)) == []


def test_an_empty_text_is_called_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e.txt").write_text("")
    assert train(tmp_path / "run", "--data", tmp_path / "e.txt") == 1
    assert "empty text" in capsys.readouterr().err


# ---- folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["--seq-len 1000000", "--n-kv-heads 3", "--dim 0", "--vocab-size 60000"])
def test_corrected_options_find_the_folder_free(stories: Path, tmp_path: Path, wrong: str) -> None:
    run = tmp_path / "run"
    assert train(run, "--data", stories, TINY, "--steps 2", wrong) == 1
    assert not run.exists()
    assert train(run, "--data", stories, TINY, "--steps 2") == 0


def test_an_interrupted_set_up_leaves_the_folder_free(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pyengine_training.setup.prepare_corpus", interrupt)
        assert train(run, "--data", stories, TINY, "--steps 2") == 130
    assert not run.exists()
    run.mkdir()  # as a set-up leaves it that is killed
    (run / runfolder.UNFINISHED).touch()
    (run / "data").mkdir()
    (run / "run.json").write_text("{")
    assert train(run, "--resume") == 1
    assert train(run, "--data", stories, TINY, "--steps 2") == 0


def test_one_process_at_a_time_trains_in_a_folder(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(run, "--data", stories, TINY, "--steps 2") == 0
    capsys.readouterr()
    with runfolder.existing(run):  # locks belong to open files, so this process can play the other one
        assert train(run, "--resume") == 1
    assert "already used by a process" in capsys.readouterr().err
    assert train(run, "--resume") == 0


def test_of_two_starts_one_runs_and_one_is_told(stories: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--run-dir", str(run), "--data", str(stories), *TINY.split(), "--steps", "3"]
    path = os.pathsep.join([str(Path(pyengine_training.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pyengine_training", *words]
    environment = {**os.environ, "PYTHONPATH": path}
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    messages = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], messages
    assert sum("already used" in message for message in messages) == 1
    assert read_state(checkpoints(run)[-1])["step"] == 3


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunFolderError, match="already used"), runfolder.new(tmp_path):
        raise AssertionError("not reached")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


# ---- options -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps whose trunk ends after 4."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert train(run, "--data", stories, TINY, "--steps 6 --decay-fraction 0.3") == 0
    return run


@pytest.fixture(scope="module")
def prepared(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "folder"
    assert main(["prepare", str(stories), str(folder), "--vocab-size", "300"]) == 0
    return folder


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
        {"seed": None},
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


def test_a_flags_length_replaces_the_files(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"budget_minutes": 5, "depth": 1, "data": [str(stories)]}))
    assert train(tmp_path / "run", "--config", path, "--steps 55 --dry-run") == 0
    assert "steps       55 of" in capsys.readouterr().out
    path.write_text(json.dumps({"device": "cuda"}))
    assert train(tmp_path / "run", "--config", path, "--data", stories) == 1
    assert "device" in capsys.readouterr().err


def test_texts_of_two_tokenizers_are_refused(
    prepared: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert main(["prepare", str(stories), str(other), "--vocab-size", "290"]) == 0
    assert train(tmp_path / "run", "--data", prepared, "--data", other, SIZES, KNOBS, "--steps 2") == 1
    assert "another tokenizer" in capsys.readouterr().err


def test_a_text_of_another_tokenizer_says_nothing_of_a_model(
    finished: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert main(["prepare", str(stories), str(other), "--vocab-size", "290"]) == 0
    assert main(["evaluate", str(finished / "final"), str(other)]) == 1
    assert "another tokenizer" in capsys.readouterr().err


def damaged_texts() -> dict[str, Any]:
    """What can be wrong with a prepared folder: by the message, what makes it so."""

    def table(change: Any) -> Any:
        def damage(folder: Path) -> None:
            values = np.load(folder / "train_00000.npy")
            change(values)
            np.save(folder / "train_00000.npy", values)

        return damage

    def manifest(values: Any) -> Any:
        return lambda folder: (folder / "manifest.json").write_text(json.dumps(values(read_json(folder / "manifest.json"))))

    return {
        "expected a JSON object": manifest(lambda values: []),
        "malformed 'splits'": manifest(lambda values: {k: v for k, v in values.items() if k != "splits"}),
        "malformed": manifest(lambda values: {**values, "splits": 3}),
        "train_00000.npy: No such file": lambda folder: (folder / "train_00000.npy").unlink(),
        "train_00000.npy: ": lambda folder: (folder / "train_00000.npy").write_bytes(b"hi"),
        "(documents, 3) expected": lambda folder: np.save(folder / "train_00000.npy", np.zeros(3)),
        "lies outside its shard": table(lambda values: values.__setitem__((3, 0), 10**9)),
        "outside its shard": table(lambda values: values.__setitem__((3, 1), -5)),
        "has token 65535, the model 300": lambda folder: (folder / "train_00000.bin").write_bytes(
            b"\xff" * (folder / "train_00000.bin").stat().st_size
        ),
    }


def test_a_piece_of_a_document_reads_that_piece_alone() -> None:
    """A row is made of pieces: were the whole document looked through for each, long ones would cost their length a row."""
    tokens = np.arange(10, dtype=np.uint16)
    tokens[9] = 400
    numbers = [np.array([n]) for n in (0, 0, 10, 10)]
    split = Split([tokens], *numbers, vocab_size=300)
    assert split.document(0, 3, 4).tolist() == [3, 4, 5, 6]
    with pytest.raises(DataError, match="has token 400, the model 300"):
        split.document(0, 8)
    with pytest.raises(DataError, match="has token 400, the model 300"):
        split.document(0)


@pytest.mark.parametrize("message", damaged_texts())
def test_a_damaged_text_is_named(
    prepared: Path, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing that indexes by a token checks it again: one that the model does not have would be memory of others."""
    folder = tmp_path / "damaged"
    shutil.copytree(prepared, folder)
    damaged_texts()[message](folder)
    assert train(tmp_path / "run", "--data", folder, SIZES, KNOBS, "--steps 2") == 1
    err = capsys.readouterr().err
    assert message in err and "internal error" not in err


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


def test_without_threadpoolctl_the_cpu_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    with pytest.raises(MissingLibraryError, match=r"threadpoolctl.*pyengine-lm\[train\]"):
        threads.single_threaded_blas()
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with threads.single_threaded_blas():
        pass


# ---- the reader's position ---------------------------------------------------------------------------------------


def rows_of(source: BatchSource, steps: range, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that steps read."""
    seen: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(RowPacker, "fill", lambda _self, _out, row, *_beside: seen.append(row))
        for step in steps:
            source.batch(step)
    return seen


@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_a_branch_reads_on_where_its_parent_stopped(
    finished: Path, tmp_path: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of its batches: no row twice, none left out. A branch of a branch, too."""
    seen = rows_of(open_run(finished).source(), range(4), monkeypatch)
    parent = finished / "trunk"
    for number, size in enumerate((batch_size, 4)):
        run = tmp_path / f"branch{number}"
        first = read_state(parent)["step"]
        assert train(run, "--branch-from", parent, f"--batch-size {size} --shards 1 --steps {first + 3}") == 0
        seen += rows_of(open_run(run).source(), range(first, first + 3), monkeypatch)
        parent = checkpoints(run)[-1]
        assert read_state(parent)["position"] == 32 * len(seen)
    assert seen == list(range(4 * 4 + 3 * batch_size + 3 * 4))


def test_a_branch_with_other_mixtures_keeps_the_past(prepared: Path, tmp_path: Path) -> None:
    """Rows of each text go on one after another when the weights change on the way."""
    splits = [Corpus(prepared).train] * 2
    past = (Phase(0, (3.0, 1.0)),)
    sizes = {"batch_size": 4, "seq_len": 32, "seed": 1}
    source = BatchSource(splits, [*past, Phase(40, (1.0, 1.0))], reader=Reader(10, 40, past), **sizes)
    located = [source.locate(row) for row in range(80)]
    for corpus, count in ((0, 30 + 20), (1, 10 + 20)):
        assert [row for c, row in located if c == corpus] == list(range(count))
    tokens = source.batch(10)[0].copy()
    source.packers[located[40][0]].fill(row := np.empty(33, np.int64), located[40][1])
    assert tokens[0].tolist() == row[:-1].tolist()
    assert Reader.from_json(json.loads(json.dumps(source.reader.to_json()))) == Reader(10, 40, (Phase(0, (3.0, 1.0)),))


def test_a_budget_of_a_branch_comes_after_its_parents_steps(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, "--branch-from", finished / "trunk", "--budget-minutes 0.01 --eval-every 0") == 0
    assert read_json(run / "run.json")["train"]["steps"] > 4


@pytest.mark.parametrize(("fraction", "steps"), [(0.0, 30), (0.3, 30), (0.1, 10), (0.004, 1)])
def test_however_small_a_part_that_simulates_int8_has_a_step(fraction: float, steps: int) -> None:
    config = TrainConfig(steps=100, decay_fraction=0.3, quantize_fraction=fraction)
    assert config.quantized_steps == steps
    assert [config.quantized(step) for step in range(100)] == [False] * (100 - steps) + [True] * steps
