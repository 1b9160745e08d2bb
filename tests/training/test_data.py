"""Text, tokenizer, shards, rows, batches, validation."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training.__main__ import main
from pyengine_training.data import (
    BatchSource,
    Corpus,
    Phase,
    Split,
    prepare_corpus,
    validation_batches,
)
from pyengine_training.errors import DataError, MissingLibraryError
from pyengine_training.packing import RowPacker
from pyengine_training.run import open_run
from pyengine_training.runfolder import read_metrics
from pyengine_training.text import (
    is_validation,
    labelled,
    read_documents,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> Any:
    return train_tokenizer((t for t in read_documents(stories) if not is_validation(t)), 300)


@pytest.fixture(scope="module")
def corpus(stories: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus") / "prepared"
    prepare_corpus(stories, folder, tokenizer, shard_tokens=10_000)
    return Corpus(folder)


def split_of(lengths: list[int]) -> Split:
    """A split whose document i is [0, 100 i + 1, 100 i + 2, ...]."""
    documents = [np.r_[0, 100 * i + np.arange(1, n)].astype(np.uint16) for i, n in enumerate(lengths)]
    length = np.asarray(lengths)
    return Split(
        [np.concatenate(documents)],
        np.zeros(len(lengths), np.int64),
        np.cumsum(length) - length,
        length,
        length,
    )


# ---- text --------------------------------------------------------------------------------------------------------


def test_separator_lines_are_never_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One.\n<|endoftext|>\n\n  Two <|endoftext|> still two.\nMore.\n<|endoftext|>\n<|endoftext|>\n")
    assert list(read_documents(path)) == ["One.", "Two   still two.\nMore."]


def test_text_without_separators_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    paragraphs = [f"Paragraph {i} " + "word " * 100 for i in range(40)]
    path.write_text("\n\n".join(paragraphs))
    documents = list(read_documents(path))
    assert 3 < len(documents) < 10
    assert "".join("".join(documents).split()) == "".join("".join(paragraphs).split())


def write_parquet(path: Path, **columns: Any) -> Path:
    pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    texts = ["One.", " ", "Two\r\nlines <|endoftext|> here.", "Cut sho"]
    path = write_parquet(tmp_path / "a.parquet", id=[1, 2, 3, 4], story=texts)
    assert list(read_documents(path, column="story")) == ["One.", "Two\nlines   here.", "Cut sho"]
    assert list(read_documents(path, column="story", drop_unfinished=True)) == ["One.", "Two\nlines   here."]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("text", r"no column 'text'; it has number, story, parts: --column"),
        ("number", r"row 1 of column 'number' is no text \(int\)"),
        ("story", r"row 2 of column 'story' is no text \(NoneType\)"),
        ("parts", r"row 1 of column 'parts' is no text \(list\)"),
    ],
)
def test_parquet_without_such_texts_is_refused(tmp_path: Path, column: str, message: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", number=[1, 2], story=["One.", None], parts=[["a"], ["b"]])
    with pytest.raises(DataError, match=message):
        list(read_documents(path, column=column))


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["One.", "Two."])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet"):
        list(read_documents(path))


def test_parquet_without_its_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingLibraryError, match=r"parquet needs pyarrow: pip install 'pyengine-lm\[parquet\]'"):
        list(read_documents(tmp_path / "a.parquet"))


def test_any_share_can_be_held_out() -> None:
    documents = [f"Document {i}." for i in range(2000)]
    for share, low, high in ((0.02, 20, 60), (0.25, 420, 580), (0.4, 720, 880), (0.45, 810, 990)):
        found = [text for text, held_out in labelled(documents, share) if held_out]
        assert low < len(found) < high
        assert set(found) == {text for text in documents if is_validation(text, share)}
    assert not any(held_out for _, held_out in labelled(documents, 0))
    digests = {text: int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") for text in documents}
    assert [is_validation(text) for text in documents] == [digests[text] % 50 == 0 for text in documents]


def test_large_vocabularies_are_stored_in_32_bits(tmp_path: Path) -> None:
    """And read, packed and trained on as others are."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, 70_000)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"w{i} w{69_999 - i} w65536"}) + "\n" for i in range(1, 101)))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prepare_corpus(source, tmp_path / "out", tokenizer)
    corpus = Corpus(tmp_path / "out")
    assert corpus.manifest["dtype"] == "uint32"
    found = [corpus.train.document(i).tolist() for i in range(len(corpus.train.length))]
    found += [corpus.validation.document(i).tolist() for i in range(len(corpus.validation.length))]
    assert sorted(found) == [[i, 69_999 - i, 65_536, 0] for i in range(1, 101)]
    sizes = "--dim 8 --n-layers 1 --n-heads 1 --n-kv-heads 1 --head-dim 8 --hidden-dim 8 --seq-len 8 --batch-size 2"
    given = ["--data", str(source), "--tokenizer", str(tmp_path / "tokenizer.json"), "--sample-tokens", "1"]
    run = ["train", "--run-dir", str(tmp_path / "run"), *given, *sizes.split(), "--shards", "1", "--steps", "1"]
    assert main([*run, "--optimizer", "adamw", "--quantize", "never", "--checkpoint-every", "0"]) == 0


def test_every_text_has_its_share_and_its_validation(stories: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"Ben saw {i} boats and one kite."}) + "\n" for i in range(300)))
    sizes = (
        "--vocab-size 300 --dim 16 --n-layers 1 --n-heads 1 --n-kv-heads 1 --head-dim 16 --hidden-dim 16 --seq-len 16"
    )
    knobs = "--batch-size 2 --shards 1 --steps 2 --sample-tokens 1 --eval-documents 3 --quantize never"
    given = ["--data", str(stories), "--data", str(other), "--data", str(other)]
    run = tmp_path / "run"
    words = [*given, *sizes.split(), *knobs.split(), "--held-out", "0.1,0.3,0"]
    assert main(["train", "--run-dir", str(run), *words]) == 0
    corpora = open_run(run).corpora
    shares = [len(c.validation.length) / (len(c.validation.length) + len(c.train.length)) for c in corpora]
    assert shares == [pytest.approx(0.1, abs=0.05), pytest.approx(0.3, abs=0.08), 0]
    last = [entry for entry in read_metrics(run / "metrics.jsonl") if "val_loss" in entry][-1]
    assert list(last["others"]) == ["1_other"] and last["others"]["1_other"]["val_loss"] > 0
    assert "validation of 1_other" in (run / "log.txt").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--held-out", "0.1,0.2"], "2 shares for 1 texts"),
        (["--held-out", "0"], "the first text's is not 0"),
        (["--held-out", "0.7"], r"shares lie in 0..0.5"),
        (["--held-out", "5e-324"], r"shares lie in 0..0.5"),
        (["--held-out", "x"], "is no list of numbers"),
        (["--column", "story"], "--column would have no effect"),
    ],
)
def test_shares_and_columns_that_cannot_be(
    stories: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--run-dir", str(tmp_path / "run"), "--data", str(stories), *words]) == 1
    assert message in capsys.readouterr().err


def test_unfinished_documents_can_be_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["It ended.", "It was cut sho", '"Bye!"', ""]
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts) + "\n\n")
    assert list(read_documents(path, drop_unfinished=True)) == ["It ended.", '"Bye!"']
    assert len(list(read_documents(path))) == 3


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"caf\xe9 \xff", "not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": 3}\n', "line 2"),
        ("a.jsonl", b'{"text": 7}\n', "not a string"),
        ("a.jsonl", b"[1, 2]\n", "line 1"),
    ],
)
def test_bad_text_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        list(read_documents(path))
    assert str(path) in str(raised.value)


def test_tokenizer_begins_with_bos_and_round_trips(tokenizer: Any) -> None:
    text = "Zoë threw a naïve 🎈 \t away.\n\n  Twice."
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0 and 0 not in ids[1:]
    assert tokenizer.decode(ids) == text
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.id_to_token(0) == "<|endoftext|>"


def test_a_vocabulary_larger_than_the_text_supports() -> None:
    with pytest.raises(DataError, match="supports a vocabulary of only"):
        train_tokenizer(["abc abc abd"], 5000)
    with pytest.raises(DataError, match=r"must lie in 258\.\.1048576"):
        train_tokenizer(["abc"], 1 << 21)


def test_tokenizer_sees_the_train_split_only(stories: Path, tmp_path: Path) -> None:
    """Words that occur only in validation documents change nothing."""
    lines = list(read_documents(stories))
    extra = next(f"Xylophone{i} zzz." for i in range(10_000) if is_validation(f"Xylophone{i} zzz."))
    path = tmp_path / "more.txt"
    path.write_text("\n<|endoftext|>\n".join([*lines, *[extra] * 50]))

    def trained(source: Path) -> str:
        texts = (t for t in read_documents(source) if not is_validation(t))
        return str(train_tokenizer(texts, 300).to_str())

    assert trained(path) == trained(stories)


# ---- shards ------------------------------------------------------------------------------------------------------


def test_shards_hold_every_document(stories: Path, tokenizer: Any, corpus: Corpus) -> None:
    texts = list(read_documents(stories))
    for split, wanted in (
        (corpus.train, [t for t in texts if not is_validation(t)]),
        (corpus.validation, [t for t in texts if is_validation(t)]),
    ):
        found = [tokenizer.decode(split.document(i).tolist()) for i in range(len(split.length))]
        assert sorted(found) == sorted(wanted)
        assert split.n_bytes.sum() == sum(len(t.encode()) for t in wanted)
    assert len(corpus.train.tokens) > 1  # several shards
    assert isinstance(corpus.train.tokens[0], np.memmap)


def test_damaged_and_newer_shards_are_refused(stories: Path, tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    prepare_corpus(stories, folder, tokenizer)
    manifest = folder / "manifest.json"
    values = json.loads(manifest.read_text())
    shard = next(folder.glob("train_*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match="wrong size"):
        Corpus(folder)
    manifest.write_text(json.dumps({**values, "format_version": 2}))
    with pytest.raises(DataError, match="format_version 2"):
        Corpus(folder)


def test_an_empty_text_leaves_nothing_behind(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(" \n<|endoftext|>\n")
    with pytest.raises(DataError, match="empty text"):
        prepare_corpus(path, tmp_path / "p", tokenizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt"]


# ---- rows --------------------------------------------------------------------------------------------------------


def test_rows_start_at_documents_and_an_epoch_shows_each_whole() -> None:
    split = split_of([5, 9, 3, 14, 7, 2, 11, 6])
    packer = RowPacker(split, 16, seed=4)
    row = np.empty(17, np.int64)
    seen: set[int] = set()
    for r in range(packer.rows_in_epoch(0)):
        packer.fill(row, r)
        assert row[0] == 0
        text = row.tolist()
        for i in range(8):
            document = split.document(i).tolist()
            if any(text[k : k + len(document)] == document for k in range(17)):
                seen.add(i)
    assert seen == set(range(8))


@pytest.mark.parametrize("seed", range(4))
def test_best_fit_shows_each_document_whole_and_little_twice(seed: int) -> None:
    """Every piece once and whole; a cropped beginning only where nothing that waits would have fitted."""
    lengths = np.random.default_rng(seed).integers(2, 60, 300).tolist()
    packers = {name: RowPacker(split_of(lengths), 40, seed=seed, packing=name) for name in ("restart", "best-fit")}
    packer = packers["best-fit"]
    whole: list[int] = []
    read = 0
    for r in range(packer.rows_in_epoch(0)):
        parts = list(packer._epoch(0).parts(r))
        assert sum(count for _, count in parts) == 41
        whole += [piece for piece, count in parts if count == packer.length[piece]]
        read += sum(count for _, count in parts)
        assert all(count == packer.length[piece] for piece, count in parts[:-1]) or r == packer.rows_in_epoch(0) - 1
    assert set(whole) == set(range(len(packer.length)))
    assert read < 1.04 * packer.length.sum() < packers["restart"].rows_in_epoch(0) * 41
    row, again = np.empty(41, np.int64), np.empty(41, np.int64)
    packer.fill(row, 17)
    RowPacker(split_of(lengths), 40, seed=seed, packing="best-fit").fill(again, 17)
    np.testing.assert_array_equal(row, again)
    assert row[0] % 100 in (0, 40)  # begins at a piece's beginning


def test_best_fit_starts_rows_with_documents_of_every_length() -> None:
    """The first piece is random: long ones are not always at the beginning."""
    lengths = [30] * 50 + [8] * 200
    packer = RowPacker(split_of(lengths), 40, seed=1, packing="best-fit")
    firsts = [next(iter(packer._epoch(0).parts(r)))[0] for r in range(packer.rows_in_epoch(0))]
    assert 3 <= sum(packer.length[piece] == 30 for piece in firsts) <= 25  # of 50; a fifth of the pieces


@pytest.mark.parametrize("lengths", [[41], [5, 36], [3] * 14, [200, 2]])
def test_best_fit_fills_rows_out_of_little_text(lengths: list[int]) -> None:
    packer = RowPacker(split_of(lengths), 40, seed=0, packing="best-fit")
    row = np.full(41, -1, np.int64)
    for r in range(3 * packer.rows_in_epoch(0)):
        packer.fill(row, r)
        assert (row >= 0).all()


def test_documents_longer_than_a_row_are_seen_in_pieces() -> None:
    packer = RowPacker(split_of([50, 4]), 16, seed=0)
    seen: set[int] = set()
    row = np.empty(17, np.int64)
    for r in range(packer.rows_in_epoch(0)):
        packer.fill(row, r)
        seen |= set(row.tolist())
    assert set(range(1, 50)) <= seen


def test_rows_are_a_pure_function_of_the_seed() -> None:
    split = split_of([5, 9, 3, 14, 7, 2, 11, 6] * 4)
    a, b = np.empty(17, np.int64), np.empty(17, np.int64)
    first = RowPacker(split, 16, seed=4)
    forward = []
    for r in range(60):  # several epochs
        first.fill(a, r)
        forward.append(a.tolist())
    for r in (59, 0, 33, 17, 58):
        RowPacker(split, 16, seed=4).fill(b, r)
        assert b.tolist() == forward[r]
    RowPacker(split, 16, seed=5).fill(b, 0)
    assert b.tolist() != forward[0]
    assert forward[0] not in forward[first.rows_in_epoch(0) :][:1]  # epochs are shuffled anew


def test_a_sequence_longer_than_the_text() -> None:
    with pytest.raises(DataError, match="fewer than one sequence"):
        RowPacker(split_of([5, 6]), 16, seed=0)


def test_mixing_follows_the_weights_and_wastes_no_row() -> None:
    splits = [split_of([20] * 30), split_of([20] * 30)]
    phases = [Phase(0, (3.0, 1.0)), Phase(40, (1.0, 0.0))]
    source = BatchSource(splits, phases, batch_size=4, seq_len=16, seed=1)
    located = [source.locate(r) for r in range(60)]
    assert sum(c for c, _ in located[:40]) == 10 and all(c == 0 for c, _ in located[40:])
    for corpus in (0, 1):
        rows = [r for c, r in located if c == corpus]
        assert rows == list(range(len(rows)))
    tokens, targets, starts, _ = source.batch(3)
    assert starts is None
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
    with pytest.raises(DataError, match="give one each"):
        BatchSource(splits, [Phase(0, (1.0,))], batch_size=4, seq_len=16, seed=1)


# ---- validation --------------------------------------------------------------------------------------------------


def test_validation_counts_each_token_once() -> None:
    split = split_of([5, 17, 33, 16, 1])
    counted: list[int] = []
    text: list[int] = []
    for batch in validation_batches(split, 3, 16, eos=0):
        assert batch.tokens.shape == (3, 16)
        counted += batch.targets[batch.targets >= 0].tolist()
        text += batch.targets[batch.is_text].tolist()
    wanted = [t for i in range(5) for t in split.document(i)[1:].tolist()]
    assert text == wanted
    assert sorted(counted) == sorted(wanted + [0] * 5)
