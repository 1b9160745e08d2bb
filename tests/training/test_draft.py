"""Draft heads: gradients, what is stored of the model, runs that stop and go on, and what cannot be used."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")
pytest.importorskip("pyengine._core", reason="the engine's extension is not built")

from pyengine_training import checkpoint as checkpoints
from pyengine_training.__main__ import main
from pyengine_training.arena import Arena, initialize, parameter_shapes
from pyengine_training.config import ModelConfig
from pyengine_training.draft import command, loop, outputs
from pyengine_training.draft.head import Batch, HeadConfig, HeadWorker, head_shapes
from pyengine_training.draft.prompts import MAX_BEGIN, MIN_BEGIN, read_prompts
from pyengine_training.draft.states import TOGETHER, States, draft_vocabulary
from pyengine_training.draft.target import Target
from pyengine_training.errors import ConfigError, DataError
from pyengine_training.files import load_safetensors, read_json, write_json
from pyengine_training.optimizer import schedule
from pyengine_training.runfolder import read_metrics

import pyengine

Array = np.ndarray[Any, Any]
MODEL = ModelConfig(320, 32, 1, 2, 1, 16, 64, 64, tie_embeddings=False)
KNOBS = "--max-tokens 12 --vocab-size 64 --hidden-dim 24 --batch-size 16 --shards 2 --held-out 0.25 --epochs 2"


@pytest.fixture(scope="module")
def frozen(chat_tokenizer: Any, chat_template: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny frozen chat model, sure enough of itself to repeat what can be learnt."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    folder.mkdir()
    params = Arena(parameter_shapes(MODEL))
    initialize(params, MODEL, 3)
    params["output"][...] *= 40
    checkpoints.write_hf_folder(folder, params, MODEL, tokenizer=chat_tokenizer(True), bos=1, eos=2)
    write_json(
        folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "chat_template": chat_template}
    )
    from pyengine.freeze import freeze

    path = folder.parent / "model.safetensors"
    freeze(folder, path)
    return path


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {n} and {n}?"}) + "\n" for n in range(24)))
    return path


def small_run(frozen: Path, questions: Path, folder: Path, n_threads: int) -> list[str]:
    """Arguments of a run that takes seconds."""
    named = {"--data": questions, "--run-dir": folder, "--threads": n_threads}
    return ["draft", str(frozen), *(str(word) for pair in named.items() for word in pair), *KNOBS.split()]


@pytest.fixture(scope="module")
def run(frozen: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on one thread."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main(small_run(frozen, questions, folder, n_threads=1)) == 0
    return folder


# ---- the head ----------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_finite_differences() -> None:
    """In float64, every parameter, with steps behind a sequence's end."""
    config = HeadConfig(dim=6, hidden_dim=10, vocab_size=11, norm_eps=1e-5, n_steps=3)
    rows, k, generator = 5, 4, np.random.default_rng(0)
    params = Arena(head_shapes(config), np.float64)
    grads = params.like()
    for view in params.views.values():
        view[...] = generator.normal(size=view.shape) / 2
    shape = (config.n_steps, rows)
    ids = np.argsort(generator.random((*shape, config.vocab_size)), axis=2)[..., :k]
    probs = generator.random((*shape, k + 1))
    hidden, embeddings = generator.normal(size=(rows, 6)), generator.normal(size=(*shape, 6))
    batch = Batch(hidden, embeddings, ids, probs, np.arange(3)[:, None] < np.array([3, 1, 2, 3, 0]))
    counts = batch.valid.sum(axis=1)
    worker = HeadWorker(config, rows, np.float64)

    def loss() -> float:
        return float(worker.forward_backward(params, grads, batch, counts) / counts @ config.weights())

    loss()
    written = grads.flat.copy()
    for name, view in params.views.items():
        flat, first = view.reshape(-1), params.offsets[name]
        for i in generator.permutation(flat.size)[:10]:
            kept, h = flat[i], 1e-5
            flat[i] = kept + h
            up = loss()
            flat[i] = kept - h
            down = loss()
            flat[i] = kept
            # the error of a central difference is of order h^2, and rounding's 1e-16 / h
            assert written[first + i] == pytest.approx((up - down) / (2 * h), rel=1e-6, abs=1e-9), name


def test_the_forward_is_the_agreed_formula() -> None:
    """Step by step as the engine's format describes it."""
    config = HeadConfig(dim=8, hidden_dim=12, vocab_size=9, norm_eps=1e-5, n_steps=2)
    generator = np.random.default_rng(1)
    params = Arena(head_shapes(config), np.float64)
    for view in params.views.values():
        view[...] = generator.normal(size=view.shape)
    hidden, embeddings = generator.normal(size=(3, 8)), generator.normal(size=(2, 3, 8))
    none = np.zeros((2, 3, 1), np.int64)
    worker = HeadWorker(config, 3, np.float64)
    worker.forward(params, Batch(hidden, embeddings, none, none.astype(float), none[..., 0] == 0))

    def norm(x: Array, gain: str) -> Array:
        normed: Array = x / np.sqrt(np.mean(x * x) + config.norm_eps) * params[gain]
        return normed

    gate, up = params["w_gate_up"][:12], params["w_gate_up"][12:]
    for row in range(3):
        s = hidden[row]
        for step in range(2):
            x = np.concatenate([norm(embeddings[step, row], "token_norm"), norm(s, "state_norm")])
            u = s + params["w_in"] @ x
            n = norm(u, "mlp_norm")
            g = gate @ n
            s = u + params["w_down"] @ (g / (1 + np.exp(-g)) * (up @ n))
            logits = params["output"] @ norm(s, "output_norm")
            np.testing.assert_allclose(worker.logits[step * 3 + row], logits, rtol=1e-10, atol=1e-10)


# ---- what is learnt ----------------------------------------------------------------------------------------------


def test_prompts_are_rendered_by_the_models_template(frozen: Path, questions: Path, tmp_path: Path) -> None:
    chats, texts = tmp_path / "chats.jsonl", tmp_path / "texts.jsonl"
    turns = [("user", "Hi."), ("assistant", "Yes?"), ("user", "Bye."), ("assistant", "Bye.")]
    chats.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    texts.write_text(json.dumps({"text": "Tom found a ball. " * 40}) + "\n" + json.dumps({"text": "Mia saw it."}))
    target = Target(frozen)
    try:
        read = lambda *files, **options: read_prompts(list(files), target, max_tokens=8, seed=1, **options)  # noqa: E731
        asked = read(questions, given=False).ids
        begun, whole = read(texts, given=False).ids, read(texts, chats, given=True)
        talked = read(chats, questions, given=False).ids
        words = {target._engine.detokenize(ids, skip_special_tokens=False) for ids in talked}
        assert "<s><|user|>What is 7 and 7?<|end|><|assistant|>" in words
        assert "<s><|user|>Hi.<|end|><|assistant|>Yes?<|end|><|user|>Bye.<|end|><|assistant|>" in words
        long, short = (target.text_ids(text) for text in ("Tom found a ball. " * 40, "Mia saw it."))
        assert len(asked) == 24
        assert len(begun) == 2 and long not in begun
        assert all(ids in (long[: len(ids)], short[: len(ids)]) for ids in begun)
        assert all(min(MIN_BEGIN, len(short)) <= len(ids) <= MAX_BEGIN for ids in begun)
        assert len(long) > target.context
        assert [long[:64], short] == [
            ids for ids in sorted(whole.ids, key=len, reverse=True) if ids[:3] in (long[:3], short[:3])
        ]
        assert whole.skipped == 0
    finally:
        target.close()


def test_the_vocabulary_is_what_outputs_have_most() -> None:
    vocab = draft_vocabulary([[5, 5, 7], [7, 5, 3]], 3, 10, end_ids=[9])
    assert vocab.tolist() == [5, 7, 9]
    assert draft_vocabulary([[4]], 10, 10, [2]).tolist() == list(range(10))


def test_rows_are_those_that_the_engine_reads(frozen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state times the output rows is the logits, but for int8; some rows are those of all."""
    with contextlib.closing(Target(frozen)) as target:
        every = target.rows("output", np.arange(MODEL.vocab_size))
        seen: list[tuple[Array, Array]] = []
        target.read([np.array([1, 70, 71, 72, 73])], [2], lambda _, at, hidden, logits: seen.append((hidden, logits)))
        ((hidden, logits),) = seen
        assert hidden.shape == (3, 32) and logits.shape == (3, 320)
        assert np.linalg.norm(hidden @ every.T - logits) < 0.02 * np.linalg.norm(logits)
        some = np.array([0, 15, 16, 17, 300, 319])
        monkeypatch.setattr("pyengine_training.draft.target.PANELS", 3)
        np.testing.assert_array_equal(target.rows("output", some), every[some])
        assert not np.array_equal(target.rows("tok_embeddings", some), every[some])


def test_states_are_the_models_own(run: Path, frozen: Path) -> None:
    """Rows of the store beside the engine's logits of each whole sequence."""
    states = States(run / "states")
    made = outputs.read_outputs(run)
    assert states.tokens.tolist() == [token for _, output in made for token in output]
    index = np.full(MODEL.vocab_size, -1)
    index[states.vocab] = np.arange(len(states.vocab))
    with pyengine.Engine(frozen) as engine:
        for number in range(0, len(made), 7):
            prompt, output = made[number]
            first, rows, _ = states.sequences[number]
            part = slice(first, first + rows)
            logits = engine.logits([*prompt, *output[:-1]])[len(prompt) - 1 :].astype(np.float64)
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            known = p[:, states.vocab]
            np.testing.assert_array_equal(states.greedy[part], index[logits.argmax(axis=1)])
            np.testing.assert_allclose(states.inside[part], known.sum(axis=1), rtol=1e-5)
            known /= known.sum(axis=1, keepdims=True)
            ids = states.ids[part].astype(np.int64)
            # float16: 11 bits, and nothing below 6e-8
            np.testing.assert_allclose(np.take_along_axis(known, ids, 1), states.probs[part, :-1], rtol=1e-3, atol=1e-7)
            assert (np.diff(states.probs[part, :-1].astype(float), axis=1) <= 0).all()
            output_rows = engine.embed([[*prompt, *output[:-1]]], pooling="last", normalize=False)
            np.testing.assert_allclose(states.hidden[part][-1], output_rows[0], rtol=1e-3, atol=1e-6)


def test_a_guess_reads_the_tokens_that_came_and_learns_what_followed(run: Path) -> None:
    states = States(run / "states")
    known = np.unique(states.tokens)
    embeddings = known.astype(np.float32)[:, None]  # a token is its own embedding
    batches = loop.Batches(states, known, embeddings, HeadConfig(1, 1, len(states.vocab), 1e-5, n_steps=4), 16, seed=1)
    for held_out, starts in ((0, batches.starts), (1, batches.held_out)):
        for first, rows, side in states.sequences:
            inside = (starts >= first) & (starts < first + rows)
            assert inside.sum() == (max(0, rows - 1) if side == held_out else 0)
    first, rows, _ = next(row for row in states.sequences if row[1] > 6)
    batch = batches.at(np.array([first, first + rows - 3]))
    np.testing.assert_array_equal(batch.valid.T, [[True] * 4, [True, True, False, False]])
    np.testing.assert_array_equal(batch.embeddings[:, 0, 0], states.tokens[first : first + 4])
    np.testing.assert_array_equal(batch.embeddings[:2, 1, 0], states.tokens[first + rows - 3 : first + rows - 1])
    np.testing.assert_array_equal(batch.ids[:, 0], states.ids[first + 1 : first + 5])
    np.testing.assert_array_equal(batch.hidden, states.hidden[[first, first + rows - 3]].astype(np.float32))


# ---- runs --------------------------------------------------------------------------------------------------------


def test_a_run_ends_with_the_model_and_a_head_in_its_file(run: Path, frozen: Path) -> None:
    from pyengine.format.quantize import dequantize
    from pyengine.format.reader import FrozenFile

    head = load_safetensors(run / "head.safetensors")
    states = States(run / "states")
    assert head["w_gate"].shape == head["w_up"].shape == (24, 32) and head["w_in"].shape == (32, 64)
    assert head["vocab"].tolist() == states.vocab.tolist() and {2} <= set(head["vocab"].tolist())
    with FrozenFile.open(run / "model.safetensors") as file:
        assert file.config.draft_head == (24, 64)
        begin, size = file.tensors["extra.draft.output.codes"]
        codes = np.frombuffer(file.buffer, np.int8, size, begin).copy().reshape(4, 1, 16, 16, 4)
        begin, size = file.tensors["extra.draft.output.scales"]
        scales = np.frombuffer(file.buffer, np.float16, 64, begin).copy().reshape(4, 1, 16)
    error = dequantize(codes, scales, 64, 32) - head["output"]
    assert np.abs(error).max() < np.abs(head["output"]).max() / 64
    with pyengine.Engine(frozen) as plain, pyengine.Engine(run / "model.safetensors") as drafted:
        for temperature in (0.0, 1.0):
            wanted, got = (e.generate("Tom", max_tokens=20, temperature=temperature, seed=3) for e in (plain, drafted))
            assert wanted.tokens == got.tokens


def test_the_engines_step_is_the_trainers(run: Path) -> None:
    """The head in the file, in int8, beside the float32 head over the same two steps."""
    from pyengine import _core
    from pyengine.format.reader import FrozenFile

    states, head = States(run / "states"), load_safetensors(run / "head.safetensors")
    config = HeadConfig(32, 24, 64, 1e-5, n_steps=2)
    params = Arena(head_shapes(config))
    for name, view in params.views.items():
        view[...] = np.concatenate([head["w_gate"], head["w_up"]]) if name == "w_gate_up" else head[name]
    with contextlib.closing(Target(run / "model.safetensors")) as target:
        known = np.unique(states.tokens)
        batches = loop.Batches(states, known, target.rows("tok_embeddings", known), config, 16, seed=1)
    starts = batches.held_out_starts()[:64]  # as many as the engine takes
    batch = batches.at(starts)
    worker = HeadWorker(config, len(starts))
    worker.forward(params, batch)
    with FrozenFile.open(run / "model.safetensors") as file:
        model = _core.Model(file.config, file.buffer, file.weights, 1)
        assert file.config.draft_head is not None
        engine = _core.DraftHead(model, file.config.draft_head, file.draft_weights, 1)
        state = np.ascontiguousarray(batch.hidden.reshape(-1))
        for step in range(2):
            assert not any(engine.step(states.tokens[starts + step * batch.valid[step]].tolist(), state))
            with memoryview(engine) as view:
                logits = np.array(view).reshape(len(starts), len(states.vocab))
            rows = batch.valid[step]
            ours = worker.logits[step * len(starts) : (step + 1) * len(starts)][rows]
            # rounding to int8 moves a product by about half a per cent (0.7 in all here), another formula by about all of it
            assert np.linalg.norm(logits[rows] - ours) < 0.03 * np.linalg.norm(ours)
        del engine, model


def test_the_same_bytes_on_any_threads_and_after_stopping_anywhere(
    run: Path, frozen: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    arguments = small_run(frozen, questions, folder, n_threads=2)

    def stopped(place: Any, name: str, times: int) -> None:
        """Let a function end by an interrupt at its so many-th call."""
        whole, calls = getattr(place, name), []

        def part(*given: Any, **named: Any) -> Any:
            calls.append(1)
            if len(calls) == times:
                raise KeyboardInterrupt
            return whole(*given, **named)

        monkeypatch.setattr(place, name, part)

    resumed = ["draft", "--run-dir", str(folder), "--resume", "--threads", "2"]
    stopped(Target, "outputs", 2)
    assert main(arguments) == 130
    with open(folder / "outputs.jsonl", "a") as file:  # a write that a crash cut off
        file.write('{"prompt": [1, 2')
    monkeypatch.undo()
    stopped(Target, "read", 2)
    assert main(resumed) == 130
    assert States(folder / "states").done == TOGETHER
    monkeypatch.undo()
    stopped(loop.HeadTrainer, "step", 15)
    assert main(resumed) == 130
    monkeypatch.undo()
    steps = read_json(folder / "draft.json")["steps"]
    assert 0 < checkpoints.read_state(checkpoints.checkpoints(folder)[-1])["step"] < 14 < steps
    assert main(resumed) == 0
    for name in ("outputs.jsonl", "head.safetensors", "model.safetensors"):
        assert (folder / name).read_bytes() == (run / name).read_bytes(), name
    entries = [[m for m in read_metrics(f / "metrics.jsonl") if "loss" in m] for f in (folder, run)]
    assert entries[0] == entries[1] and [m["step"] for m in entries[0]] == list(range(1, steps + 1))


def test_a_head_learns_what_the_shipped_model_says(stories: Path, tmp_path: Path) -> None:
    """On held-out outputs it agrees with the model far more often than the most frequent token does."""
    model = Path(pyengine.__file__).parent / "models" / "default.safetensors"
    folder = tmp_path / "run"
    sizes = "--max-tokens 48 --tokens 3000 --vocab-size 512 --hidden-dim 64 --batch-size 64 --epochs 3"
    options = ["--held-out", "0.1", "--temperatures", "0,0.7", "--threads", "1"]
    assert main(["draft", str(model), "--data", str(stories), "--run-dir", str(folder), *sizes.split(), *options]) == 0
    last = [entry for entry in read_metrics(folder / "metrics.jsonl") if "agreement" in entry][-1]
    assert last["agreement"][0] > 3 * last["unigram"] > 0
    assert last["expected"][0] > 2 * last["unigram"]


# ---- what cannot be used -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "a new run needs a frozen model and --data"),
        (["{hf}", "--data", "{questions}"], "no frozen file"),
        (["{questions}", "--data", "{questions}"], "questions.jsonl: no frozen file"),
        (["{frozen}", "--data", "{empty}"], "no line with anything in it"),
        (["{frozen}", "--data", "{blank}"], "0 texts with tokens"),
        (["{frozen}", "--data", "{numbers}"], "line 1 is no object"),
        (["{frozen}", "--data", "{wrong}"], 'line 1 needs "prompt", a string'),
        (["{frozen}", "--data", "{missing}"], "No such file"),
        (["{frozen}", "--data", "{questions}", "--vocab-size", "321"], "it must lie in 3..320"),
        (["{frozen}", "--data", "{questions}", "--vocab-size", "2"], "it must lie in 3..320"),
        (["{frozen}", "--data", "{questions}", "--max-tokens", "64"], "leave no room in the model's context of 64"),
        (["{frozen}", "--data", "{questions}", "--held-out", "0"], "it must lie above 0"),
        (["{frozen}", "--data", "{questions}", "--held-out", "nan"], "it must lie above 0"),
        (["{frozen}", "--data", "{questions}", "--shards", "3"], "power of two"),
        (["{frozen}", "--data", "{questions}", "--temperatures", "0,hot"], "expected numbers"),
        (["{frozen}", "--data", "{questions}", "--temperatures", "nan"], "each must lie in 0..100"),
        (["{frozen}", "--data", "{questions}", "--lr", "inf"], "it must be a positive number"),
        (["{frozen}", "--data", "{questions}", "--given", "--tokens", "9"], "would have no effect"),
        (["{frozen}", "--data", "{questions}", "--epochs", "1", "--budget-minutes", "1"], "two lengths"),
        (["{frozen}", "--data", "{questions}", "-o", "{questions}"], "exists already"),
        (["{frozen}", "--data", "{questions}", "-o", "{missing}/model.safetensors"], "there is no such folder"),
        (["{frozen}", "--data", "{questions}", "--max-tokens", "1"], "it must be at least 2"),
        (["{frozen}", "--data", "{questions}", "--ahead", "25"], "it must be at most 24"),
    ],
)
def test_what_cannot_be_used_is_named_and_leaves_no_folder(
    options: list[str], message: str, frozen: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {"empty": "", "blank": '{"text": ""}', "numbers": "1\n", "wrong": '{"prompt": 3}'}
    paths = {name: tmp_path / f"{name}.jsonl" for name in (*contents, "missing")}
    for name, text in contents.items():
        paths[name].write_text(text)
    paths |= {"frozen": frozen, "questions": questions, "hf": frozen.parent / "hf"}
    folder = tmp_path / "run"
    arguments = [option.format(**paths) for option in options]
    assert main(["draft", "--run-dir", str(folder), "--threads", "1", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize("epochs", ["2", "0.001"])
def test_a_head_that_is_not_finite_ends_the_run(
    frozen: Path, questions: Path, tmp_path: Path, epochs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Be it seen in the second step or after the only one: one error, and neither a checkpoint nor a file of such a head."""
    folder = tmp_path / "run"
    assert main([*small_run(frozen, questions, folder, n_threads=1), "--lr", "1e30", "--epochs", epochs]) == 1
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "step 1: " in said and "try a lower --lr" in said, said
    assert "nan" not in said.partition("error:")[0]
    assert not checkpoints.checkpoints(folder) and not (folder / "model.safetensors").exists()


def test_a_folder_belongs_to_one_run(
    run: Path, frozen: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = ["draft", str(frozen), "--data", str(questions), "--run-dir", str(run)]
    assert main(new) == 1 and "already used" in capsys.readouterr().err
    assert main(["draft", "--run-dir", str(tmp_path), "--resume"]) == 1
    assert "nothing to resume" in capsys.readouterr().err
    for words in (["train", "--resume", "--run-dir"], ["plot"], ["runs"], ["cost"]):  # of a model's training
        assert main([*words, str(run)]) == 1, words
        assert "it is a draft head's run ('pyengine train draft')" in capsys.readouterr().err, words
    assert main(["draft", str(frozen), "--run-dir", str(run), "--resume", "--lr", "1"]) == 1
    assert "the model, --lr would have no effect" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    values = read_json(copy / "draft.json")
    write_json(copy / "draft.json", {**values, "model_sha256": "0"})
    assert main(["draft", "--run-dir", str(copy), "--resume"]) == 1
    assert "is not the file that the run" in capsys.readouterr().err
    write_json(copy / "draft.json", {**values, "steps": values["steps"] + 1})
    assert main(["draft", "--run-dir", str(copy), "--resume"]) == 1
    assert "a checkpoint of another head or other data" in capsys.readouterr().err


def test_a_run_that_goes_on_has_what_is_left_of_its_budget(
    frozen: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped while it samples, a thousand years after it began: one group is what it has, and one step."""
    folder = tmp_path / "run"
    lengths = ["--budget-minutes", "1000", "--temperatures", "0,1"]
    sizes = KNOBS.removesuffix(" --epochs 2").split()
    work, calls = Target.outputs, []

    def stops(self: Target, *arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return work(self, *arguments, **options)

    monkeypatch.setattr(Target, "outputs", stops)
    new = ["draft", str(frozen), "--data", str(questions), "--run-dir", str(folder), "--threads", "1"]
    assert main([*new, *lengths, *sizes]) == 130
    values = read_json(folder / "draft.json")
    assert values["seconds"] > 0
    write_json(folder / "draft.json", {**values, "seconds": 1e12})
    assert main(["draft", "--run-dir", str(folder), "--resume", "--threads", "1"]) == 0
    assert len(calls) == 2 and read_json(folder / "draft.json")["steps"] == 1


def test_a_run_on_a_machine_that_slows_down_makes_fewer_steps(
    frozen: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second a step, then three, on the test's clock: it ends in time and at the end of its decay, also in two parts."""
    clock, work, factors = [0.0], loop.HeadTrainer.step, []

    def step(self: loop.HeadTrainer, batch: Any) -> Any:
        clock[0] += 1.0 if self.step_number < 20 else 3.0
        factors.append(schedule(self.config, self.step_number))
        if self.step_number == 30 and len(factors) == 31:
            raise KeyboardInterrupt
        return work(self, batch)

    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(loop, "seconds_of_a_step", lambda *_: (1.0, 0.0))
    monkeypatch.setattr(loop.HeadTrainer, "step", step)
    folder, sizes = tmp_path / "run", KNOBS.removeprefix("--max-tokens 12 ").removesuffix(" --epochs 2").split()
    begin = ["draft", str(frozen), "--data", str(questions), "--given", "--run-dir", str(folder), "--threads", "1"]
    assert main([*begin, "--budget-minutes", "1", *sizes]) == 130
    planned = read_json(folder / "draft.json")
    assert 31 < planned["steps"] < 57
    last = checkpoints.checkpoints(folder)[-1]
    assert main(["draft", "--run-dir", str(folder), "--resume", "--threads", "1"]) == 0
    values = read_json(folder / "draft.json")
    assert 20 < values["steps"] <= planned["steps"] and values["budget"]["seconds"] == 60
    assert clock[0] <= 60 + 3 + 3 * (31 - int(last.name[5:]))  # the last step, and what was done after the checkpoint
    assert 0 < factors[-1] < 0.2 and factors[-1] == min(factors[31:])


def test_guesses_ahead_are_those_of_the_engine() -> None:
    from pyengine_training.draft.command import MOST_AHEAD

    from pyengine.sampling import MAX_DRAFT

    assert MOST_AHEAD == MAX_DRAFT


def test_damaged_states_are_refused(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "states"
    shutil.copytree(run / "states", folder)
    (folder / "hidden").write_bytes(b"\0")
    with pytest.raises(DataError, match="hidden: missing or of the wrong size"):
        States(folder)
    (folder / "vocab.npy").unlink()
    with pytest.raises(DataError, match="no states"):
        States(folder)
    assert issubclass(ConfigError, ValueError)


def test_a_heads_squares_are_remembered_as_where_adamw_trains_alone() -> None:
    values = {"batch_size": 4, "shards": 1, "lr": 1e-3, "seed": 1}
    assert command._train_config(values, 3).beta2 == 0.95
