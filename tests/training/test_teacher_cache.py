"""A teacher's thoughts on disk: they are the teacher's, wherever a student reads them; their loss is its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training import checkpoint as checkpoints
from pyengine_training.__main__ import main
from pyengine_training.arena import Arena, initialize, parameter_shapes
from pyengine_training.config import ModelConfig, TrainConfig
from pyengine_training.data import BatchSource, Corpus, Phase, prepare_corpus
from pyengine_training.model import Worker
from pyengine_training.ops.cpu import cross_entropy_kl_forward_backward
from pyengine_training.ops.cpu.topk_kl import cross_entropy_topk_forward_backward
from pyengine_training.runfolder import read_metrics
from pyengine_training.teacher_cache import TeacherCache, description, likeliest, make_cache
from pyengine_training.text import read_documents, train_tokenizer

Array = np.ndarray[Any, Any]
VOCAB, SEQ, TAU = 300, 24, 2.0
TEACHER = ModelConfig(VOCAB, 32, 2, 2, 1, 16, 48, 64, tie_embeddings=False)
SIZES = "--dim 16 --n-layers 1 --n-heads 1 --n-kv-heads 1 --head-dim 16 --hidden-dim 16 --seq-len 24 --batch-size 4"
KNOBS = "--shards 2 --steps 3 --eval-documents 2 --sample-tokens 1 --checkpoint-every 0"


@pytest.fixture(scope="module")
def teacher(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher that is sure of itself."""
    folder = tmp_path_factory.mktemp("teacher") / "hf"
    folder.mkdir()
    params = Arena(parameter_shapes(TEACHER))
    initialize(params, TEACHER, 3)
    params["output"][...] *= 40
    tokenizer = train_tokenizer(read_documents(stories), VOCAB)
    checkpoints.write_hf_folder(folder, params, TEACHER, tokenizer=tokenizer, bos=0, eos=0)
    return folder


# ---- the loss ----------------------------------------------------------------------------------------------------


def batch(k: int) -> tuple[Array, Array, Array, Array]:
    """logits, ids, probs and targets of four rows over eleven tokens; one row is not counted."""
    generator = np.random.default_rng(4)
    logits, teacher = 2 * generator.standard_normal((2, 4, 11))
    p = np.exp(teacher / TAU)
    p /= p.sum(1, keepdims=True)
    ids = np.argsort(-p, axis=1)[:, :k]
    chosen = np.take_along_axis(p, ids, axis=1)
    probs = np.concatenate([chosen, 1 - chosen.sum(1, keepdims=True)], axis=1).clip(0)
    return logits, ids, 3 * probs, np.array([0, 10, -1, 4])  # normalized by the operation


@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_gradient_is_that_of_finite_differences(k: int, alpha: float) -> None:
    logits, ids, probs, targets = batch(k)
    losses = np.empty(4)

    def loss() -> float:
        cross_entropy_topk_forward_backward(losses, logits.copy(), ids, probs, targets, alpha, TAU, 0.5)
        return float(losses.sum() * 0.5)

    gradient = logits.copy()
    cross_entropy_topk_forward_backward(losses, gradient, ids, probs, targets, alpha, TAU, 0.5)
    for index in np.ndindex(logits.shape):
        keep = logits[index]
        logits[index] = keep + 1e-5
        up = loss()
        logits[index] = keep - 1e-5
        down = loss()
        logits[index] = keep
        assert gradient[index] == pytest.approx((up - down) / 2e-5, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("k", [1, 4, 11])
def test_the_loss_is_its_formula(k: int) -> None:
    logits, ids, probs, targets = batch(k)
    losses = np.empty(4)
    cross_entropy_topk_forward_backward(losses, logits.copy(), ids, probs, targets, 0.3, TAU, 1.0)

    def log_softmax(x: Array) -> Array:
        return x - np.log(np.exp(x).sum())

    for i in (0, 1, 3):
        log_p = log_softmax(logits[i] / TAU)
        inside = np.isin(np.arange(11), ids[i])
        q = probs[i] / probs[i].sum()
        kl = sum(q[j] * (np.log(q[j]) - log_p[ids[i, j]]) for j in range(k))
        if k < 11:
            kl += q[k] * (np.log(q[k]) - np.log(np.exp(log_p[~inside]).sum()))
        hard = -log_softmax(logits[i])[targets[i]]
        assert losses[i] == pytest.approx(0.7 * hard + 0.3 * TAU**2 * kl, rel=1e-10)
    assert losses[2] == 0


def test_all_tokens_are_the_whole_divergence() -> None:
    logits, ids, probs, targets = batch(11)
    teacher = np.empty_like(logits)
    np.put_along_axis(teacher, ids, TAU * np.log(probs[:, :-1]), axis=1)
    results = []
    for run in (
        lambda loss, x: cross_entropy_topk_forward_backward(loss, x, ids, probs, targets, 0.3, TAU, 0.5),
        lambda loss, x: cross_entropy_kl_forward_backward(loss, x, teacher, targets, 0.3, TAU, 0.5),
    ):
        losses, x = np.empty(4), logits.copy()
        run(losses, x)
        results.append((losses, x))
    for got, wanted in zip(*results, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)


def test_likeliest_tokens_and_the_rest() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    ids, probs = likeliest(logits, 6, TAU)
    p = np.exp(logits / TAU, dtype=np.float64)
    p /= p.sum(1, keepdims=True)
    np.testing.assert_array_equal(ids, np.argsort(-p, axis=1)[:, :6])
    np.testing.assert_allclose(probs[:, :-1], np.take_along_axis(p, ids, axis=1), rtol=2**-11)
    np.testing.assert_allclose(probs.astype(float).sum(1), 1, rtol=1e-3)


# ---- the cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["restart", "best-fit"])
def test_a_student_reads_what_the_teacher_thinks_of_its_row(
    teacher: Path, stories: Path, tmp_path: Path, packing: str
) -> None:
    """In later epochs too, with documents longer than a row, beside the teacher run on the same batch."""
    tokenizer = train_tokenizer(read_documents(stories), VOCAB)
    prepare_corpus(stories, tmp_path / "data", tokenizer)
    corpus = Corpus(tmp_path / "data")
    assert corpus.train.length.max() > 2 * SEQ
    config, k = TrainConfig(seq_len=SEQ, distill_tau=TAU), 8
    model, params = checkpoints.load_model(teacher)
    make_cache(tmp_path / "cache", description(teacher, [corpus], config, k), [corpus], model, params, 2)
    cache = TeacherCache(tmp_path / "cache")
    assert (np.asarray(cache.probs[0]).astype(float).sum(1) > 0.99).all()  # every token was read
    options: dict[str, Any] = {"batch_size": 4, "seq_len": SEQ, "seed": 7, "masked": True, "eos": 0, "packing": packing}
    source = BatchSource([corpus.train], [Phase(0, (1.0,))], **options, cache=cache)
    worker = Worker(model, 4, SEQ, training=False)
    for step in (0, 3, 400, 1203):
        tokens, _, starts, soft = source.batch(step)
        assert soft is not None
        worker.forward(params, np.ascontiguousarray(tokens), starts=np.ascontiguousarray(starts))
        wanted = likeliest(worker.xn_final @ worker.output_matrix(params).T, k, TAU)
        got = soft.ids.reshape(-1, k), soft.probs.reshape(-1, k + 1)
        np.testing.assert_allclose(got[1].astype(float), wanted[1].astype(float), rtol=2e-3, atol=1e-6)
        assert (got[0] == wanted[0]).mean() > 0.99  # equally likely ones may change places
    assert source.epochs(1203)[0] > 1


def test_caches_have_the_same_bits_for_any_threads(teacher: Path, stories: Path, tmp_path: Path) -> None:
    prepare_corpus(stories, tmp_path / "data", train_tokenizer(read_documents(stories), VOCAB))
    corpora = [Corpus(tmp_path / "data")]
    wanted = description(teacher, corpora, TrainConfig(seq_len=SEQ), 4)
    for threads in (1, 3):
        make_cache(tmp_path / str(threads), wanted, corpora, *checkpoints.load_model(teacher), threads)
    for name in ("0.ids", "0.probs"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def distill(run: Path, teacher: Path, stories: Path, *words: str) -> int:
    given = ["--data", str(stories), "--teacher", str(teacher), *SIZES.split(), *KNOBS.split(), *words]
    return main(["train", "--run-dir", str(run), *given])


def test_students_share_a_cache(
    teacher: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    words = ["--teacher-cache", str(cache), "--teacher-top-k", "300"]
    assert distill(tmp_path / "a", teacher, stories, *words) == 0
    made = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert distill(tmp_path / "b", teacher, stories, *words, "--packing", "best-fit") == 0
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == made
    assert distill(tmp_path / "online", teacher, stories, "--attention", "document") == 0
    cached, online = (
        [entry["loss"] for entry in read_metrics(tmp_path / run / "metrics.jsonl") if "loss" in entry]
        for run in ("a", "online")
    )
    assert cached == pytest.approx(online, rel=2e-3)  # all tokens of the vocabulary, rounded to half precision
    capsys.readouterr()
    assert distill(tmp_path / "c", teacher, stories, *words, "--distill-tau", "1") == 1
    assert "made for another tau" in capsys.readouterr().err
    assert main(["train", "--run-dir", str(tmp_path / "a"), "--resume"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher-cache", "CACHE", "--attention", "row"], "--teacher-cache needs --attention document"),
        (["--teacher-cache", "CACHE", "--teacher-top-k", "0"], r"it must lie in 1..300"),
        (["--teacher-cache", "CACHE", "--teacher-top-k", "301"], r"it must lie in 1..300"),
        (["--teacher-cache", "CACHE", "--device", "cuda"], "--device cuda does not read a teacher's cache"),
        (["--teacher-top-k", "3"], "--teacher-top-k would have no effect"),
        (["--teacher-cache", "."], "exists and is no teacher's cache"),
    ],
)
def test_caches_that_cannot_be(
    teacher: Path,
    stories: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [word.replace("CACHE", str(tmp_path / "cache")) for word in words]
    assert distill(tmp_path / "run", teacher, stories, *words) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


def test_a_damaged_cache_is_named(
    teacher: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    words = ["--teacher-cache", str(cache), "--teacher-top-k", "2"]
    assert distill(tmp_path / "a", teacher, stories, *words) == 0
    ids, manifest = cache / "0.ids", cache / "manifest.json"
    whole = ids.read_bytes(), manifest.read_bytes()
    for number, (damaged, content, message) in enumerate((
        (ids, b"", "0.ids: missing or of the wrong size"),
        (ids, b"\xff" * len(whole[0]), f"names token 65535 of {VOCAB}"),
        (manifest, b'{"format_version": 1}', "manifest.json is damaged"),
    )):  # fmt: skip
        ids.write_bytes(whole[0])
        manifest.write_bytes(whole[1])
        damaged.write_bytes(content)
        capsys.readouterr()
        assert distill(tmp_path / f"b{number}", teacher, stories, *words) == 1
        assert message in capsys.readouterr().err
