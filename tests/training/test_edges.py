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
from pyengine_training.data import BatchSource, Corpus, Phase, Reader, Split
from pyengine_training.errors import DataError, MissingLibraryError, RunFolderError
from pyengine_training.files import read_json
from pyengine_training.packing import RowPacker
from pyengine_training.plan import warnings
from pyengine_training.run import open_run
from pyengine_training.text import _pieces, is_validation, labelled, read_documents
from training.command import KNOBS, SIZES, TINY, train

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


def test_an_empty_text_is_called_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e.txt").write_text("")
    assert train(tmp_path / "run", "--data", tmp_path / "e.txt") == 1
    assert "empty text" in capsys.readouterr().err


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


def test_an_error_of_the_system_is_its_file_and_its_words(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    run = tmp_path / "file" / "run"
    assert main(["train", "--run-dir", str(run), "--data", str(stories)]) == 1
    assert capsys.readouterr().err == f"pyengine: error: {run}: Not a directory\n"

    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")  # as a write says it: without a name

    monkeypatch.setattr("pyengine_training.cli.run", fail)
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "pyengine: error: Input/output error\n"


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunFolderError, match="already used"), runfolder.new(tmp_path):
        raise AssertionError("not reached")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


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
