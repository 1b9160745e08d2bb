"""Fine-tuning: the model's own end of documents, documents kept from each other, conversations, the loss on answers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training import checkpoint as checkpoints
from pyengine_training.__main__ import main
from pyengine_training.arena import Arena, initialize, parameter_shapes
from pyengine_training.config import ModelConfig, TrainConfig
from pyengine_training.data import BatchSource, Corpus, Phase, prepare_corpus, validation_batches
from pyengine_training.device import make_trainer
from pyengine_training.distill import Distillation
from pyengine_training.errors import DataError
from pyengine_training.files import read_json, write_json
from pyengine_training.model import Worker
from pyengine_training.ops import cpu
from pyengine_training.run import open_run
from pyengine_training.runfolder import read_metrics
from pyengine_training.text import document_ids, read_documents, train_tokenizer

MODEL = ModelConfig(320, 32, 1, 2, 1, 16, 64, 64)
KNOBS = "--seq-len 64 --batch-size 4 --shards 2 --sample-every 0 --sample-tokens 2 --eval-documents 4"


@pytest.fixture(scope="module", params=[True, False], ids=["adds BOS", "adds none"])
def model(
    request: pytest.FixtureRequest, chat_tokenizer: Any, chat_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model folder whose config names other ids than its tokenizer_config, which wins."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    folder.mkdir()
    params = Arena(parameter_shapes(MODEL))
    initialize(params, MODEL, 3)
    tokenizer = chat_tokenizer(request.param)
    checkpoints.write_hf_folder(folder, params, MODEL, tokenizer=tokenizer, bos=1, eos=2)
    values = read_json(folder / "config.json")
    write_json(folder / "config.json", {**values, "bos_token_id": 0, "eos_token_id": [6, 0]})
    write_json(
        folder / "tokenizer_config.json",
        {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": chat_template},
    )
    return folder


def conversation(number: int) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": f"What is {number} and {number}?"},
        {"role": "assistant", "content": f"It is {2 * number}. Zoë says so."},
        {"role": "user", "content": "Thanks!"},
        {"role": "assistant", "content": "Bye."},
    ]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": conversation(i)}) + "\n" for i in range(150)))
    return path


# ---- ends of documents -------------------------------------------------------------------------------------------


def test_ids_are_those_that_transformers_resolves(model: Path) -> None:
    assert checkpoints.special_ids(model) == (1, 2)
    (model / "tokenizer_config.json").rename(model / "aside.json")
    try:
        assert checkpoints.special_ids(model) == (0, 6)
    finally:
        (model / "aside.json").rename(model / "tokenizer_config.json")


def test_a_document_ends_once() -> None:
    assert document_ids([5, 6], 2) == [5, 6, 2]
    assert document_ids([1, 5, 6], 2) == [1, 5, 6, 2]
    assert document_ids([1, 5, 2], 2) == [1, 5, 2]
    assert document_ids([0, 5, 6], 0) == [0, 5, 6]  # the next document's first token ends it
    assert document_ids([5, 6], None) == [5, 6]


def test_documents_are_stored_and_scored_with_the_models_end(model: Path, stories: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--init-from", str(model), "--data", str(stories), "--steps", "2", *KNOBS.split()]
    assert main(["train", "--run-dir", str(run), *words]) == 0
    opened = open_run(run)
    assert (opened.bos, opened.eos) == (1, 2)
    config = read_json(run / "final" / "config.json")
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    for split in (opened.corpora[0].train, opened.corpora[0].validation):
        for index in range(len(split.length)):
            document = split.document(index).tolist()
            assert document[-1] == 2 and document.count(2) == 1
            assert document.count(1) == (document[0] == 1)
    split = opened.corpora[0].validation
    targets = np.concatenate([b.targets.ravel() for b in validation_batches(split, 2, 64, 2)])
    assert (targets == 2).sum() == len(split.length)
    assert read_json(run / "run.json")["train"]["lr"] == 3e-4  # what suits a model that has learnt already


def test_a_given_tokenizer_brings_its_ends(model: Path, stories: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sizes = "--dim 32 --n-layers 1 --n-heads 2 --n-kv-heads 1 --head-dim 16 --hidden-dim 64 --steps 1"
    words = ["--tokenizer", str(model / "tokenizer.json"), "--data", str(stories), *sizes.split(), *KNOBS.split()]
    assert main(["train", "--run-dir", str(run), *words]) == 0
    written = read_json(run / "final" / "tokenizer_config.json")
    assert (written["bos_token"], written["eos_token"]) == ("<s>", "</s>")
    assert checkpoints.special_ids(run / "final") == (1, 2)


def test_a_given_tokenizer_without_an_end_is_refused(
    model: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "tokenizer.json"
    alone.write_bytes((model / "tokenizer.json").read_bytes())
    words = ["--tokenizer", str(alone), "--data", str(stories), *KNOBS.split()]
    assert main(["train", "--run-dir", str(tmp_path / "run"), *words]) == 1
    assert "no token that ends a document" in capsys.readouterr().err


# ---- documents kept from each other ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus") / "prepared"
    prepare_corpus(stories, folder, train_tokenizer(read_documents(stories), 300))
    return Corpus(folder)


SEQ = 320  # no document is longer


def source(corpus: Corpus, masked: bool) -> BatchSource:
    sizes = {"batch_size": 8, "seq_len": SEQ, "seed": 1}
    return BatchSource([corpus.train], [Phase(0, (1.0,))], masked=masked, eos=0, **sizes)


def test_starts_and_targets_are_each_documents_own(corpus: Corpus) -> None:
    """Here a document begins with the token that ends the one before, which counts."""
    plain, masked = source(corpus, False), source(corpus, True)
    for step in range(3):
        tokens, targets, starts, _ = masked.batch(step)
        wanted, next_tokens, nothing, _ = plain.batch(step)
        assert nothing is None and starts is not None
        np.testing.assert_array_equal(tokens, wanted)
        for row in range(8):
            for t in range(SEQ):
                begins = max(i for i in range(t + 1) if i == 0 or tokens[row, i] == 0)
                assert starts[row, t] == begins
        np.testing.assert_array_equal(targets, next_tokens)  # no document is longer than a row


def test_a_masked_row_is_its_documents_alone(corpus: Corpus) -> None:
    """Loss and gradients of packed rows equal those of the same documents, each in a row of its own."""
    model = ModelConfig(300, 32, 1, 2, 1, 16, 64, SEQ)
    tokens, targets, starts = (np.array(x) for x in source(corpus, True).batch(0)[:3])
    config = TrainConfig(seq_len=SEQ, batch_size=8, shards=1, quantize="never")
    trainer = make_trainer(model, config, threads=1)
    trainer.initialize()
    loss = trainer.gradients(tokens, targets, starts)
    grads = trainer.grads.flat.copy()
    rows = []
    for row in range(8):
        begins = [*np.unique(starts[row]), SEQ]
        for begin, end in itertools.pairwise(begins):
            alone = np.zeros((2, SEQ), np.int64)
            alone[1] = -1
            alone[0, : end - begin], alone[1, : end - begin] = tokens[row, begin:end], targets[row, begin:end]
            rows.append(alone)
    rows += [np.stack([np.zeros(SEQ, np.int64), np.full(SEQ, -1)])] * (-len(rows) % 8)
    total, count = 0.0, int((targets >= 0).sum())
    summed = np.zeros(grads.shape)
    for first in range(0, len(rows), 8):
        part = np.stack(rows[first : first + 8])
        n = int((part[:, 1] >= 0).sum())
        total += trainer.gradients(part[:, 0], part[:, 1]) * n
        summed += trainer.grads.flat * float(n)
    assert total / count == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(grads, summed / count, atol=2e-6)
    trainer.close()


def test_a_step_without_a_target_moves_nothing_but_the_decay(tiny_sizes: dict[str, Any]) -> None:
    trainer = make_trainer(
        ModelConfig(**tiny_sizes), TrainConfig(seq_len=24, batch_size=4, weight_decay=0.0), threads=1
    )
    trainer.initialize()
    before = trainer.params.flat.copy()
    result = trainer.step(np.zeros((4, 24), np.int64), np.full((4, 24), -1))
    assert result.loss == 0 and result.grad_norm == 0
    np.testing.assert_array_equal(trainer.params.flat, before)
    trainer.close()


class Recording:
    """The CPU's operations, with few rows of logits at a time; counts those that are made. chosen: of counted rows only."""

    def __init__(self, chosen: bool) -> None:
        self.chosen, self.rows = chosen, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(cpu, name)

    def loss_rows(self, vocab_size: int) -> int:
        return 7

    def counted_rows(self, targets: Any) -> Any:
        return cpu.counted_rows(targets) if self.chosen else None

    def linear_forward(self, y: Any, x: Any, w: Any) -> None:
        self.rows += len(y) if len(w) == 48 else 0  # the output matrix
        cpu.linear_forward(y, x, w)


@pytest.mark.parametrize("teaches", [False, True])
@pytest.mark.parametrize("counted", [0, 1, 17, 47])
def test_logits_are_made_of_the_rows_that_count(tiny_sizes: dict[str, Any], counted: int, teaches: bool) -> None:
    """Losses and gradients are those of all rows. In float64: sums of 48 rows and 48 words, in another order."""
    model = ModelConfig(**tiny_sizes)
    params = Arena(parameter_shapes(model), np.float64)
    initialize(params, model, 1)
    generator = np.random.default_rng(counted)
    tokens, targets = generator.integers(0, 48, (2, 2, 24))
    targets.ravel()[generator.permutation(48)[counted:]] = -1
    found = []
    for ops in (Recording(True), Recording(False)):
        teacher = Worker(model, 2, 24, training=False, dtype=np.float64, ops=ops)
        worker = Worker(model, 2, 24, dtype=np.float64, ops=ops)
        worker.loss.fill(9)  # of a step before
        worker.dxn.fill(9)
        distillation = Distillation(teacher, params, TrainConfig(distill_alpha=0.5)) if teaches else None
        loss = worker.forward_backward(params, tokens, targets, 1 / 48, distillation=distillation)
        gradients = worker.grads.flat.copy()
        found.append((loss, worker.loss.copy(), gradients, worker.evaluate(params, tokens, targets, False).copy()))
        assert ops.rows == (counted if ops.chosen else 48) * (3 if teaches else 2)
    for chosen, whole in zip(*found, strict=True):
        np.testing.assert_allclose(chosen, whole, rtol=1e-12, atol=1e-12 * max(1.0, np.abs(whole).max()))
    assert (np.abs(found[0][2]).max() > 0) == (counted > 0)


# ---- conversations -----------------------------------------------------------------------------------------------


def learnt_texts(split: Any, index: int, tokenizer: Any) -> list[str]:
    """Runs of tokens that count, as text."""
    tokens, learnt = split.document(index).tolist(), split.learnt(index)
    runs: list[list[int]] = []
    for i, token in enumerate(tokens):
        if learnt[i]:
            if i == 0 or not learnt[i - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def test_the_loss_is_on_what_the_assistant_says(model: Path, chats: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyengine._core", reason="conversations are rendered by the package pyengine")
    run = tmp_path / "run"
    words = ["--init-from", str(model), "--data", str(chats), "--steps", "3", *KNOBS.split()]
    assert main(["train", "--run-dir", str(run), *words]) == 0
    opened = open_run(run)
    assert opened.config.attention == "document"
    for split in (opened.corpora[0].train, opened.corpora[0].validation):
        assert len(split.length) > 0
        for index in range(len(split.length)):
            text = opened.tokenizer.decode(split.document(index).tolist(), skip_special_tokens=False)
            assert text.startswith("<s><|system|>Be short.<|end|><|user|>What is")
            number = int(text.split("What is ")[1].split(" ")[0])
            answers = [f"It is {2 * number}. Zoë says so.<|end|>", "Bye.<|end|>"]
            assert learnt_texts(split, index, opened.tokenizer) == answers
    _, targets, starts, _ = opened.source().batch(0)
    assert starts is not None and (targets >= 0).sum() < targets.size / 2
    checked = [e for e in read_metrics(run / "metrics.jsonl") if "val_loss" in e]
    assert checked and all(e["val_loss"] > 1 for e in checked)
    assert next(e["tokens"] for e in read_metrics(run / "metrics.jsonl") if "loss" in e) == (targets >= 0).sum()


def test_all_of_a_conversation_can_count(model: Path, chats: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyengine._core", reason="conversations are rendered by the package pyengine")
    run = tmp_path / "run"
    words = ["--init-from", str(model), "--data", str(chats), "--steps", "1", "--train-on", "all", *KNOBS.split()]
    assert main(["train", "--run-dir", str(run), *words]) == 0
    split = open_run(run).corpora[0].train
    assert all(split.learnt(index).all() for index in range(len(split.length)))


@pytest.mark.parametrize(
    "lines, template, message",
    [
        (['{"messages": []}'], "OWN", 'line 1: "messages" is not a list'),
        (['{"messages": [{"role": "user"}]}'], "OWN", 'line 1: a message needs "role"'),
        (['{"messages": [{"role": "user", "content": "a <|end|>"}]}'], "OWN", r"spells the special token <\|end\|>"),
        ([json.dumps({"messages": conversation(i)[:2]}) for i in range(3)], "OWN", "nothing to learn"),
        ([json.dumps({"messages": conversation(1)})], "OWN", "one conversation alone"),
        ([json.dumps({"messages": conversation(i)}) for i in range(3)], None, "no chat template"),
        ([json.dumps({"messages": conversation(i)}) for i in range(3)], "{{ 1 / 0 }}", "line 1"),
        ([json.dumps({"messages": conversation(i)}) for i in range(3)], "{% for", "cannot be used"),
        (
            [json.dumps({"messages": conversation(i)}) for i in range(3)],
            "{{ messages | length }}OWN",
            "renders the beginning of a conversation in another way",
        ),
    ],
)
def test_conversations_that_cannot_be_used_are_named(
    model: Path, chat_template: str, tmp_path: Path, lines: list[str], template: str | None, message: str
) -> None:
    """OWN stands for the model's template."""
    pytest.importorskip("pyengine._core", reason="conversations are rendered by the package pyengine")
    from pyengine_training.chat import ChatFormat
    from pyengine_training.text import load_tokenizer

    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(lines))
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer = load_tokenizer(model / "tokenizer.json")
    values = {"bos_token": "<s>", "eos_token": "</s>"} | (
        {"chat_template": template.replace("OWN", chat_template)} if template else {}
    )
    write_json(folder / "tokenizer_config.json", values)
    with pytest.raises(DataError, match=message):
        prepare_corpus(path, tmp_path / "out", tokenizer, eos=2, chat=ChatFormat(folder, tokenizer))
    assert not (tmp_path / "out").exists()


def test_conversations_need_a_model_to_render_them(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stories: Path, model: Path
) -> None:
    words = ["--data", str(chats), "--tokenizer", str(model / "tokenizer.json"), *KNOBS.split()]
    assert main(["train", "--run-dir", str(tmp_path / "run"), *words]) == 1
    assert "--init-from" in capsys.readouterr().err
    words = ["--data", str(stories), "--train-on", "all"]
    assert main(["train", "--run-dir", str(tmp_path / "run"), *words]) == 1
    assert "--train-on would have no effect" in capsys.readouterr().err
