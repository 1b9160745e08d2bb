"""Losses and gradients of whole models against PyTorch's, kept in torch_gradients.npz by the script beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training.arena import Arena, parameter_shapes
from pyengine_training.config import ModelConfig, TrainConfig
from pyengine_training.device import make_trainer
from pyengine_training.trainer import Trainer

FIXTURE = Path(__file__).parent / "fixtures" / "torch_gradients.npz"
SEQ = 24


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(FIXTURE)


def fill(arena: Arena, golden: Any, prefix: str = "parameters/") -> None:
    for name in arena.shapes:
        arena[name][...] = golden[prefix + name]


def parity_trainer(sizes: dict[str, Any], rows: int, teacher: Any = None, **config: Any) -> Trainer:
    knobs = {"seq_len": sizes["max_seq_len"], "batch_size": rows, "shards": min(2, rows), **config}
    return make_trainer(ModelConfig(**sizes), TrainConfig(**knobs), teacher=teacher)


def assert_gradients(trainer: Trainer, golden: Any, kind: str) -> None:
    """Every tensor to 1e-5 of its largest element."""
    for name in trainer.grads.shapes:
        wanted = golden[f"{kind}/grad/{name}"]
        error = np.abs(trainer.grads[name] - wanted).max() / np.abs(wanted).max()
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("recompute", ["none", "activations", "block"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_gradients(golden: Any, tiny_sizes: dict[str, Any], kind: str, recompute: str) -> None:
    sizes = {**tiny_sizes, "tie_embeddings": kind == "tied", "n_layers": 2 if kind == "tied" else 1}
    trainer = parity_trainer(sizes, 4, recompute=recompute)
    fill(trainer.params, golden)
    loss = trainer.gradients(golden["tokens"], golden["targets"])
    assert loss == pytest.approx(float(golden[f"{kind}/loss"]), rel=1e-6)
    assert_gradients(trainer, golden, kind)
    trainer.close()


@pytest.mark.parametrize("recompute", ["none", "activations", "block"])
def test_gradients_with_qk_norm_and_documents(golden: Any, tiny_sizes: dict[str, Any], recompute: str) -> None:
    trainer = parity_trainer({**tiny_sizes, "qk_norm": True}, 4, recompute=recompute, attention="document")
    fill(trainer.params, golden)
    loss = trainer.gradients(golden["tokens"], golden["targets"], golden["normed/starts"])
    assert loss == pytest.approx(float(golden["normed/loss"]), rel=1e-6)
    assert_gradients(trainer, golden, "normed")
    trainer.close()


def test_gradients_through_fake_quantization(golden: Any, tiny_sizes: dict[str, Any]) -> None:
    """Same straight-through estimator at the same points; the fixture keeps clear of rounding boundaries."""
    sizes = {**tiny_sizes, "n_layers": 1, "max_seq_len": 5}
    trainer = parity_trainer(sizes, 1)
    fill(trainer.params, golden, "quantized/parameters/")
    tokens, targets = golden["tokens"][:1, :5], golden["targets"][:1, :5]
    plain = trainer.gradients(tokens, targets)
    loss = trainer.gradients(tokens, targets, quantize=True)
    assert loss != plain
    assert loss == pytest.approx(float(golden["quantized/loss"]), rel=1e-6)
    assert_gradients(trainer, golden, "quantized")
    trainer.close()


def test_gradients_of_distillation(golden: Any, tiny_sizes: dict[str, Any]) -> None:
    teacher_config = ModelConfig(**{**tiny_sizes, "tie_embeddings": False})
    teacher = Arena(parameter_shapes(teacher_config))
    fill(teacher, golden)
    sizes = {**tiny_sizes, "n_layers": 1}
    trainer = parity_trainer(sizes, 4, teacher=(teacher_config, teacher), distill_alpha=0.4, distill_tau=2.0)
    fill(trainer.params, golden)
    loss = trainer.gradients(golden["tokens"], golden["targets"])
    assert loss == pytest.approx(float(golden["distilled/loss"]), rel=1e-6)
    assert_gradients(trainer, golden, "distilled")
    trainer.close()


def test_ten_steps_of_adamw(golden: Any, tiny_sizes: dict[str, Any]) -> None:
    knobs = {"lr": 3e-3, "beta2": 0.95, "warmup_fraction": 0, "decay_fraction": 0}
    trainer = parity_trainer(tiny_sizes, 4, optimizer="adamw", steps=10, **knobs)
    fill(trainer.params, golden)
    losses = [trainer.step(golden["tokens"], golden["targets"]).loss for _ in range(10)]
    np.testing.assert_allclose(losses, golden["curve"], rtol=1e-4)
    assert losses[-1] < losses[0] - 0.5
    trainer.close()
