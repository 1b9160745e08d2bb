"""Adapters: gradients by the chain rule, nothing else moves, files that others read, the same bits after resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training import checkpoint as checkpoints
from pyengine_training.__main__ import main
from pyengine_training.backend.cpu import cpu_bytes
from pyengine_training.checkpoint import hf_tensors
from pyengine_training.config import ModelConfig, TrainConfig
from pyengine_training.device import make_trainer
from pyengine_training.errors import ConfigError
from pyengine_training.files import load_safetensors, read_json, save_safetensors
from pyengine_training.flags import train_parser
from pyengine_training.lora import TARGETS, LoraConfig, parse
from pyengine_training.options import refuse_sharded_adapters, refuse_unused
from pyengine_training.runfolder import read_metrics, read_run
from pyengine_training.trainer import Trainer

Array = np.ndarray[Any, Any]
LORA = LoraConfig(4, 8.0, ("q_proj", "v_proj", "down_proj"), "unused")
KNOBS = "--seq-len 32 --batch-size 4 --shards 2 --sample-every 0 --sample-tokens 2 --eval-documents 4 --eval-every 0"
SIZES = "--vocab-size 300 --dim 32 --n-layers 2 --n-heads 2 --n-kv-heads 1 --head-dim 16 --hidden-dim 64"


def batch(seed: int = 0) -> tuple[Array, Array]:
    tokens = np.random.default_rng(seed).integers(0, 48, (8, 25))
    return tokens[:, :-1], tokens[:, 1:]


def make(sizes: dict[str, Any], lora: LoraConfig | None = LORA, **knobs: Any) -> Trainer:
    config = TrainConfig(**{"seq_len": 24, "batch_size": 8, "shards": 4, "steps": 20, "lr": 1e-2, **knobs})
    trainer = make_trainer(ModelConfig(**sizes), config, threads=2, lora=lora)
    trainer.initialize()
    if trainer.backend.adapters:
        trainer.backend.adapters.begin(config.seed)
    return trainer


@pytest.mark.parametrize("quantize", [False, True])
def test_gradients_follow_from_the_weights(tiny_sizes: dict[str, Any], quantize: bool) -> None:
    """Against whole gradients of a trainer without adapters that has the same effective weights."""
    trainer = make(tiny_sizes)
    for seed in range(3):  # so that B is not zero
        trainer.step(*batch(seed))
    adapters = trainer.backend.adapters
    assert adapters is not None
    whole = make(tiny_sizes, None)
    whole.params.flat[...] = trainer.params.flat
    loss = whole.gradients(*batch(9), quantize=quantize)
    assert trainer.gradients(*batch(9), quantize=quantize) == loss
    assert trainer.grads.shapes.keys() == adapters.values.shapes.keys()
    full = hf_tensors(whole.grads, whole.model)
    for name in (f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")):
        a, b = adapters.values[f"{name}.lora_A.weight"], adapters.values[f"{name}.lora_B.weight"]
        d = full[f"{name}.weight"].astype(np.float64)
        for suffix, wanted in (("A", 2 * b.T @ d), ("B", 2 * d @ a.T)):  # alpha / r = 2
            got = trainer.grads[f"{name}.lora_{suffix}.weight"]
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6 * np.abs(wanted).max())
    total = float((trainer.grads.flat.astype(np.float64) ** 2).sum())
    assert adapters.norm(trainer.grads) == pytest.approx(total**0.5, rel=1e-6)
    trainer.close()
    whole.close()


def test_only_the_targets_move_and_the_loss_falls(tiny_sizes: dict[str, Any]) -> None:
    trainer = make(tiny_sizes, steps=60, decay_fraction=0.3, warmup_fraction=0)
    before = {name: view.copy() for name, view in hf_tensors(trainer.params, trainer.model).items()}
    losses = [trainer.step(*batch()).loss for _ in range(60)]
    assert losses[-1] < losses[0] - 0.3
    adapters = trainer.backend.adapters
    assert adapters is not None
    for name, view in hf_tensors(trainer.params, trainer.model).items():
        target = name.split(".")[-2] in LORA.targets
        assert np.array_equal(view, before[name]) == (not target), name
        if target:
            module = name.removesuffix(".weight")
            a, b = (adapters.values[f"{module}.lora_{x}.weight"] for x in "AB")
            np.testing.assert_allclose(view - before[name], 2 * b @ a, atol=1e-6)
            assert np.linalg.matrix_rank(view - before[name], tol=1e-4) <= LORA.r
    trainer.close()


@pytest.fixture(scope="module")
def base(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to adapt."""
    run = tmp_path_factory.mktemp("base") / "run"
    words = ["--data", str(stories), *SIZES.split(), *KNOBS.split(), "--steps", "8"]
    assert main(["train", "--run-dir", str(run), *words]) == 0
    return run / "final"


def tune(run: Path, base: Path, stories: Path, *words: str) -> int:
    given = ["--init-from", str(base), "--data", str(stories), *KNOBS.split(), "--lora", "4,8,q_proj,v_proj,down_proj"]
    return main(["train", "--run-dir", str(run), *given, *words])


@pytest.fixture(scope="module")
def tuned(base: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tuned") / "run"
    assert tune(run, base, stories, "--steps", "10", "--checkpoint-every", "4", "--keep-checkpoints", "0") == 0
    return run


def test_what_is_written_is_what_others_read(tuned: Path, base: Path) -> None:
    """PEFT's two files beside the merged model: base + alpha / r B A is the merged weight."""
    config = read_json(tuned / "adapter" / "adapter_config.json")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert config["target_modules"] == ["q_proj", "v_proj", "down_proj"] and config["bias"] == "none"
    assert Path(config["base_model_name_or_path"]) == base.resolve()
    adapter = load_safetensors(tuned / "adapter" / "adapter_model.safetensors")
    first, last = (load_safetensors(folder / "model.safetensors") for folder in (base, tuned / "final"))
    assert len(adapter) == 2 * 3 * 2
    moved = 0
    for name, weight in last.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in adapter:
            np.testing.assert_array_equal(weight, first[name])
            continue
        a, b = (adapter[f"{module}.lora_{x}.weight"] for x in "AB")
        assert a.shape[0] == b.shape[1] == 4
        np.testing.assert_allclose(weight, first[name] + 8 / 4 * b @ a, atol=1e-6)
        moved += not np.array_equal(weight, first[name])
    assert moved == 6
    assert not (tuned / "final" / "adapter_config.json").exists()  # or transformers would add it once more


def test_adapters_go_on_bit_for_bit(tuned: Path, tmp_path: Path) -> None:
    run = tmp_path / "again"
    shutil.copytree(tuned, run)
    for name in ("checkpoints/step_00000010", "checkpoints/step_00000008", "final", "adapter", "trunk"):
        shutil.rmtree(run / name)
    assert main(["train", "--run-dir", str(run), "--resume"]) == 0
    for name in ("final/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (run / name).read_bytes() == (tuned / name).read_bytes()
    losses = [[e["loss"] for e in read_metrics(folder / "metrics.jsonl") if "loss" in e] for folder in (run, tuned)]
    assert losses[0] == losses[1]


def test_moments_are_the_adapters_alone(tuned: Path) -> None:
    moments = load_safetensors(checkpoints.checkpoints(tuned)[-1] / "optimizer.safetensors")
    model = checkpoints.read_model_config(tuned / "final")
    assert moments["m"].size < model.n_params() / 4


def test_the_plan_counts_the_adapters(
    tuned: Path, base: Path, stories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many as are written; two thirds of a whole step; less memory than a whole model's run."""
    adapter = load_safetensors(tuned / "adapter" / "adapter_model.safetensors")
    count = sum(tensor.size for tensor in adapter.values())
    assert tune(tuned.parent / "planned", base, stories, "--steps", "10", "--dry-run") == 0
    plan = capsys.readouterr().out
    assert f"of adapters {count:,}, which alone are trained" in plan and "optimizer   adamw" in plan
    model = checkpoints.read_model_config(base)
    assert LORA.n_params(model) == count
    assert model.flops_per_token(32, adapters=True) == model.flops_per_token(32) * 2 / 3
    config = TrainConfig(seq_len=32, batch_size=4, shards=2)
    assert cpu_bytes(model, config, 2, lora=LORA) < cpu_bytes(model, config, 2)


def test_a_base_that_has_changed_is_noticed(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = tmp_path / "run", tmp_path / "base"
    shutil.copytree(tuned, run)
    shutil.rmtree(run / "final")
    values = read_json(run / "run.json")
    shutil.copytree(values["lora"]["base"], other)
    tensors = dict(load_safetensors(other / "model.safetensors"))
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"] + 1
    save_safetensors(other / "model.safetensors", tensors)
    values["lora"]["base"] = str(other)
    (run / "run.json").write_text(json.dumps(values))
    assert main(["train", "--run-dir", str(run), "--resume"]) == 1
    assert "has it changed?" in capsys.readouterr().err


def test_a_sharded_optimizer_is_refused(tuned: Path) -> None:
    """Of a new run on two ranks, and of one that goes on."""
    options = train_parser().parse_args(["--run-dir", "run", "--shard-optimizer"])
    with pytest.raises(ConfigError, match="--shard-optimizer has no effect with --lora"):
        refuse_unused({"init_from": "model", "lora": "4,8"}, options)
    with pytest.raises(ConfigError, match="--shard-optimizer has no effect with --lora"):
        refuse_sharded_adapters(read_run(tuned), options)


def test_what_was_asked_for() -> None:
    assert parse("8,16", Path("/m")) == LoraConfig(8, 16.0, TARGETS, "/m")
    assert parse("8,16,q_proj,up_proj", Path("/m")).targets == ("q_proj", "up_proj")
    for text in ("8", "a,16", "8,16,lm_head", "0,16", "8,-1", "8,nan", "8,16,"):
        if text == "8,16,":
            assert parse(text, Path("/m")).targets == TARGETS
            continue
        with pytest.raises(ConfigError, match="--lora"):
            parse(text, Path("/m"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--lora", "4,8"], "adapters need a model"),
        (["--init-from", "{base}", "--lora", "4,8", "--muon-lr", "0.1"], "--muon-lr would have no effect"),
        (["--init-from", "{base}", "--lora", "4,8,wq"], "no matrix wq"),
    ],
)
def test_adapters_that_cannot_be(
    base: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    given = [word.format(base=base) for word in words]
    assert main(["train", "--run-dir", str(tmp_path / "run"), "--data", str(stories), *KNOBS.split(), *given]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
