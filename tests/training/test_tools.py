"""training/tools: the numbers of a model report, the engine beside the trainer, optimizers beside each other."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")
pytest.importorskip("pyengine._core", reason="the engine's extension is not built")

from pyengine_training import checkpoint as checkpoints
from pyengine_training.arena import Arena, initialize, parameter_shapes
from pyengine_training.config import ModelConfig
from pyengine_training.files import load_safetensors, read_json, write_json
from pyengine_training.model import Worker
from pyengine_training.text import is_validation, load_tokenizer, read_documents, split_documents, train_tokenizer

TOOLS = Path(__file__).resolve().parents[2] / "training" / "tools"


def load(name: str) -> ModuleType:
    """A tool as a module."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_report() -> ModuleType:
    return load("model_report")


@pytest.fixture(scope="module")
def paired_losses() -> ModuleType:
    return load("paired_losses")


@pytest.fixture(scope="module")
def second_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Longer documents than the first text's: several windows each."""
    path = tmp_path_factory.mktemp("text") / "second.txt"
    story = "Mia made a kite number {}. " + "Sam saw a boat and threw a stone. " * 12
    path.write_text("\n<|endoftext|>\n".join(story.format(i) for i in range(300)))
    return path


def random_model(hidden: int, qk_norm: bool) -> tuple[ModelConfig, Arena]:
    model = ModelConfig(300, 64, 2, 2, 1, 32, hidden, 48, qk_norm=qk_norm)
    params = Arena(parameter_shapes(model))
    initialize(params, model, seed=5)
    for name in [name for name in params.shapes if name.endswith(("q_norm", "k_norm"))]:
        params[name][...] = np.linspace(0.5, 1.5, 32)
    return model, params


@pytest.fixture(scope="module", params=[False, True], ids=["llama", "qwen3"])
def model_files(
    stories: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, Path]:
    """A small model's Hugging Face folder, and what it was frozen to."""
    model, params = random_model(96, request.param)
    folder = tmp_path_factory.mktemp("model") / "hf"
    folder.mkdir()
    tokenizer = train_tokenizer(read_documents(stories), 300)
    checkpoints.write_hf_folder(folder, params, model, tokenizer=tokenizer, bos=0, eos=0)
    from pyengine.freeze import freeze

    return folder, freeze(folder, folder.parent / "model.safetensors")


def run_tool(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return module.main()


def test_repetition_and_known_words(model_report: ModuleType) -> None:
    assert model_report.repeated_share(["a", "b", "c", "d", "e", "f"]) == 0
    assert model_report.repeated_share(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 / 5)
    assert model_report.repeated_share(["a"]) == 0
    found = model_report.text_statistics(["The cat sat.", "A dgo."], {"the", "cat", "sat", "a"})
    assert found["known_words"] == pytest.approx(4 / 5) and found["words"] == 2.5


@pytest.mark.parametrize("qk_norm", [False, True])
def test_float32_scores_are_the_trainers(
    model_report: ModuleType, stories: Path, tmp_path: Path, qk_norm: bool
) -> None:
    """Read back through the freeze package (gate and up alternating by panel), scored alike."""
    model, params = random_model(88, qk_norm)
    documents = list(read_documents(stories))[:40]
    folder = tmp_path / "hf"
    folder.mkdir()
    tokenizer = train_tokenizer(read_documents(stories), 300)
    checkpoints.write_hf_folder(folder, params, model, tokenizer=tokenizer, bos=0, eos=0)
    scorer = model_report.float32_scorer(folder, None)
    worker = Worker(model, 1, 48, training=False)
    for text in documents[:3]:
        ids = tokenizer.encode(text).ids[:48]
        tokens, targets = np.zeros((1, 48), np.int64), np.full((1, 48), -1)
        tokens[0, : len(ids) - 1], targets[0, : len(ids) - 1] = ids[:-1], ids[1:]
        wanted = -float(worker.evaluate(params, tokens, targets, False).sum())
        assert scorer(ids) == pytest.approx(wanted, rel=1e-6)


def test_float32_scores_are_refused_for_models_that_the_trainer_cannot_compute(
    model_report: ModuleType, stories: Path, tmp_path: Path
) -> None:
    model, params = random_model(88, False)
    tokenizer = train_tokenizer(read_documents(stories), 300)
    folder = tmp_path / "hf"
    folder.mkdir()
    checkpoints.write_hf_folder(folder, params, model, tokenizer=tokenizer, bos=0, eos=0)
    write_json(folder / "config.json", read_json(folder / "config.json") | {"hidden_act": "gelu_pytorch_tanh"})
    with pytest.raises(SystemExit, match="not a plain Llama"):
        model_report.float32_scorer(folder, None)


def test_long_documents_are_scored_in_windows(model_report: ModuleType) -> None:
    """Every token after the first counts once."""

    class Stub:
        n_ctx = 5

        def tokenize(self, text: str) -> list[int]:
            return list(range(len(text)))

    seen: list[Any] = []

    def score(ids: list[int]) -> float:
        seen.extend(ids[1:])
        return -math.log(2) * (len(ids) - 1)

    assert model_report.document_bits(Stub(), "x" * 14, score) == pytest.approx(13)
    assert seen == list(range(1, 14))


def test_texts_are_reported_apart_and_together(
    model_report: ModuleType,
    model_files: tuple[Path, Path],
    stories: Path,
    second_text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, frozen = model_files
    texts = ["--text", stories, "--text", second_text]
    run_tool(model_report, monkeypatch, *texts, "--samples", 2, "--documents", 4, "--sources", source, "--", frozen)
    result = json.loads(capsys.readouterr().out)
    assert result["int8"]["documents"] == 8
    assert list(result["texts"]) == ["stories.txt", "second.txt"]
    for arithmetic in ("int8", "float32"):
        parts = [result["texts"][name][arithmetic]["bits_per_byte"] for name in result["texts"]]
        assert min(parts) < result[arithmetic]["bits_per_byte"] < max(parts)
    run_tool(model_report, monkeypatch, "--text", stories, "--samples", 0, "--documents", 4, frozen)
    alone = json.loads(capsys.readouterr().out)
    assert alone["int8"] == result["texts"]["stories.txt"]["int8"] and "texts" not in alone


def test_engine_and_trainer_are_compared_over_several_texts(
    paired_losses: ModuleType,
    model_files: tuple[Path, Path],
    stories: Path,
    second_text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every held-out token after a document's first counts once, in the text that it comes from."""
    texts = ["--text", stories, "--text", second_text]
    assert run_tool(paired_losses, monkeypatch, *model_files, *texts, "--at-least", 1000) == 0
    result = json.loads(capsys.readouterr().out)
    tokenizer = load_tokenizer(model_files[0] / "tokenizer.json")
    for path in (stories, second_text):
        held_out = split_documents(path, drop_unfinished=True)[1]
        part = result["texts"][path.name]
        assert part["documents"] == len(held_out)
        assert part["tokens"] == sum(len(tokenizer.encode(text).ids) - 1 for text in held_out)
    assert result["tokens"] == sum(part["tokens"] for part in result["texts"].values())
    assert abs(result["difference"]) <= 3 * result["standard_error"] and result["within_three"]
    assert abs(result["engine"] - result["trainer_float32"]) < 0.01
    assert run_tool(paired_losses, monkeypatch, *model_files, *texts) == 2
    assert "fewer than --at-least 100000" in capsys.readouterr().err


def test_of_conversations_the_answers_are_compared(
    paired_losses: ModuleType,
    chat_model: tuple[Path, Path],
    reminders: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """So many tokens as a run would count of the same file."""
    path = reminders / "test.jsonl"
    assert run_tool(paired_losses, monkeypatch, *chat_model, "--text", path, "--at-least", 100) == 0
    result = json.loads(capsys.readouterr().out)
    tokenizer = load_tokenizer(chat_model[0] / "tokenizer.json")
    answers = [json.loads(line)["messages"][1]["content"] for line in path.read_text().splitlines()]
    assert result["documents"] == len(answers)
    assert result["tokens"] == sum(len(tokenizer.encode(answer + "<|end|>").ids) for answer in answers)


# ---- reminders and answers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reminders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reminders")
    load("make_reminders").write(folder, 30, 20, 1)
    return folder


@pytest.fixture(scope="module")
def chat_model(chat_tokenizer: Any, chat_template: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a chat template, and what it was frozen to."""
    from pyengine.freeze import freeze

    model = ModelConfig(320, 64, 2, 2, 1, 32, 96, 192)
    params = Arena(parameter_shapes(model))
    initialize(params, model, seed=5)
    folder = tmp_path_factory.mktemp("chat") / "hf"
    folder.mkdir()
    checkpoints.write_hf_folder(folder, params, model, tokenizer=chat_tokenizer(False), bos=1, eos=6)
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "<|end|>"})
    (folder / "chat_template.jinja").write_text(chat_template)
    return folder, freeze(folder, folder.parent / "model.safetensors")


def test_reminders_have_right_answers_and_no_question_twice(reminders: Path) -> None:
    seen = set()
    for name, count in (("train", 30), ("test", 20)):
        lines = (reminders / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == count
        for line in lines:
            user, assistant = json.loads(line)["messages"]
            answer = json.loads(assistant["content"])
            hour, minute = map(int, answer["time"].split(":"))
            said = f"{hour % 12 or 12}{f':{minute:02}' if minute else ''} {'pm' if hour >= 12 else 'am'}"
            assert said in user["content"] and answer["what"] in user["content"]
            assert answer["day"] is None or answer["day"] in user["content"]
            assert (answer["day"] is None) == (not any(day in user["content"] for day in load("make_reminders").DAYS))
            seen.add(user["content"])
    assert len(seen) == 50


def test_answers_are_counted(
    chat_model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the engine itself: what it answers is wanted of one question and not of the other."""
    import pyengine

    answers, path = load("answers"), tmp_path / "asked.jsonl"
    user = {"role": "user", "content": "Who made a kite?"}
    with pyengine.Engine(chat_model[1]) as engine:
        said = engine.chat([user], temperature=0, max_tokens=5)
    talks = [[user, {"role": "assistant", "content": text}] for text in (said.text, said.text + "!")]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    run_tool(answers, monkeypatch, chat_model[1], path, "--max-tokens", 5)
    found = json.loads(capsys.readouterr().out)
    assert found == {"questions": 2, "ended": 2 * (said.finish_reason == "stop"), "as_wanted": 1}
    path.write_text(json.dumps({"messages": [user]}))
    with pytest.raises(SystemExit, match="line 1 does not end"):
        run_tool(answers, monkeypatch, chat_model[1], path)


def test_a_difference_beyond_its_error_fails(
    paired_losses: ModuleType,
    model_files: tuple[Path, Path],
    stories: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An engine that is a little worse at every token."""
    monkeypatch.setattr(paired_losses, "quantized_parameters", lambda params: params)

    def trainer_losses(worker: Worker, params: Any, quantize: bool) -> Any:
        return lambda ids: np.full(len(ids) - 1, 1.0)

    monkeypatch.setattr(paired_losses, "trainer_losses", trainer_losses)
    assert run_tool(paired_losses, monkeypatch, *model_files, "--text", stories, "--at-least", 1) == 1
    assert not json.loads(capsys.readouterr().out)["within_three"]


def test_windows_share_one_id(paired_losses: ModuleType) -> None:
    assert list(paired_losses.windows(list(range(8)), 4)) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]
    assert list(paired_losses.windows([0, 1], 4)) == [[0, 1]]


def test_splitting_a_text_is_the_runs_split(stories: Path) -> None:
    train, held_out = split_documents(stories)
    assert held_out and sorted(train + held_out) == sorted(read_documents(stories))
    assert all(is_validation(text) for text in held_out) and not any(is_validation(text) for text in train)


# ---- compare_optimizers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compare_optimizers() -> ModuleType:
    return load("compare_optimizers")


def write_run(folder: Path, optimizer: str, per_step: float, bits: list[float], elapsed: float = 9.0) -> None:
    """A run of 2 steps a validation; `elapsed` seconds a step pass on the clock, whatever it costs."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"train": {"optimizer": optimizer}}))
    lines: list[dict[str, Any]] = []
    for step in range(1, 2 * len(bits) + 1):
        lines.append({"step": step, "loss": 1.0, "cpu_seconds": per_step, "seconds": elapsed * step})
        if step % 2 == 0:
            lines.append({"step": step, "val_bits_per_byte": bits[step // 2 - 1], "int8": False})
    lines.append(lines[-1])  # the end of a run validates once more
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves_are_over_the_steps_own_seconds(compare_optimizers: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "muon_0.02", "muon", 2.0, [3.0, 2.0, 1.0])
    curve = compare_optimizers.read_curve(tmp_path / "muon_0.02")
    assert curve.seconds == [4.0, 8.0, 12.0] and curve.bits == [3.0, 2.0, 1.0] and curve.steps == 6
    assert curve.at(6.0) == 2.5 and curve.at(12.0) == 1.0 and curve.at(3.9) is None
    elapsed = compare_optimizers.read_curve(tmp_path / "muon_0.02", "seconds")
    assert elapsed.seconds == [18.0, 36.0, 54.0]


def test_the_best_of_each_optimizer_meet(compare_optimizers: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "muon_0.02", "muon", 2.0, [3.0, 2.0, 1.2])
    write_run(tmp_path / "adamw_0.001", "adamw", 1.5, [3.0, 2.9, 2.0, 1.9])
    write_run(tmp_path / "adamw_0.003", "adamw", 1.5, [3.0, 2.5, 1.5, 1.3])
    curves = [compare_optimizers.read_curve(folder) for folder in sorted(tmp_path.iterdir())]
    lines, verdict = compare_optimizers.table(curves)
    assert verdict["winner"] == "muon"
    assert verdict["ahead_by_bits_per_byte"] == pytest.approx(0.1)
    assert verdict["best"]["adamw"] == ["adamw_0.003", 1.3]
    assert lines[-1].startswith("muon_0.02 wins by 0.1000 over adamw_0.003")


@pytest.mark.slow
def test_candidates_get_the_same_time(
    compare_optimizers: ModuleType,
    stories: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whole runs of a tiny model; asked again, nothing is run again."""
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "hidden_dim": 64}
    for name, value in {"MODEL": sizes, "VOCABULARY": 300, "SEQ_LEN": 32, "ROWS": 4, "SHARDS": 2}.items():
        monkeypatch.setattr(compare_optimizers, name, value)
    given = ["--data", stories, "--out", tmp_path / "runs", "--minutes", 0.01, "--adamw", 3e-3, "--muon", 0.02]
    run_tool(compare_optimizers, monkeypatch, *given, "--json")
    result = json.loads(capsys.readouterr().out)
    assert {curve["optimizer"] for curve in result["curves"]} == {"adamw", "muon"}
    assert all(curve["steps"] > 0 for curve in result["curves"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    run_tool(compare_optimizers, monkeypatch, *given)
    assert " wins by " in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}


# ---- thaw --------------------------------------------------------------------------------------------------------


def test_thawed_models_freeze_to_the_same_bytes(model_files: tuple[Path, Path], tmp_path: Path) -> None:
    """Codes and scales; the rest of a file is its name and what follows from it."""
    from pyengine.freeze import freeze

    thaw = load("thaw")
    folder, frozen = tmp_path / "hf", model_files[1]
    thaw.thaw(frozen, folder)
    again = freeze(folder, tmp_path / "again.safetensors")
    first, second = load_safetensors(frozen), load_safetensors(again)
    assert first.keys() == second.keys()
    compared = [name for name in first if name.endswith((".codes", ".scales", "norm", "inv_freq"))]
    assert len(compared) == 3 + 2 * 10 + 1 + (4 if first["config.json"].tobytes().count(b'"qk_norm": true') else 0)
    for name in compared:
        assert first[name].tobytes() == second[name].tobytes(), name
    source, thawed = (checkpoints.load_model(path)[0] for path in (model_files[0], folder))
    assert source == thawed
    with pytest.raises(thaw.ConfigError, match="exists"):
        thaw.thaw(frozen, folder)
    with pytest.raises(thaw.ConfigError, match="not a frozen file"):
        thaw.thaw(model_files[0] / "model.safetensors", tmp_path / "other")
    older = tmp_path / "older.safetensors"
    older.write_bytes(frozen.read_bytes().replace(b'"format_version":"4"', b'"format_version":"2"'))
    with pytest.raises(thaw.ConfigError, match="format_version '2'"):
        thaw.thaw(older, tmp_path / "other")
