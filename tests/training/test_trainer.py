"""One step and many: same bits for any thread count, accumulation, recomputation, resuming; learning; memory."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training.arena import Arena, parameter_shapes
from pyengine_training.config import ModelConfig, TrainConfig
from pyengine_training.device import make_trainer
from pyengine_training.errors import ConfigError, NotFiniteError
from pyengine_training.optimizer import schedule
from pyengine_training.trainer import Trainer

Array = np.ndarray[Any, Any]


def make(sizes: dict[str, Any], threads: int = 2, **knobs: Any) -> Trainer:
    config = TrainConfig(**{"seq_len": 24, "batch_size": 8, "shards": 4, "steps": 20, **knobs})
    trainer = make_trainer(ModelConfig(**sizes), config, threads=threads)
    trainer.initialize()
    return trainer


def batch(rows: int = 8, seed: int = 0, vocab: int = 48) -> tuple[Array, Array]:
    tokens = np.random.default_rng(seed).integers(0, vocab, (rows, 25))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_threads_do_not_change_a_bit(tiny_sizes: dict[str, Any], optimizer: str) -> None:
    ends = []
    for threads in (1, 2, 3, 4):
        trainer = make(tiny_sizes, threads, optimizer=optimizer, quantize="always", steps=3)
        losses = [trainer.step(*batch(seed=s)).loss for s in range(3)]
        ends.append((losses, trainer.params.flat.copy()))
        trainer.close()
    for losses, flat in ends[1:]:
        assert losses == ends[0][0]
        np.testing.assert_array_equal(flat, ends[0][1])


def test_a_gradient_is_the_sum_of_its_shards(tiny_sizes: dict[str, Any]) -> None:
    trainer = make(tiny_sizes)
    tokens, targets = batch()
    loss = trainer.gradients(tokens, targets)
    whole = trainer.grads.flat.copy()
    parts = [trainer.gradients(tokens[first : first + 2], targets[first : first + 2]) for first in range(0, 8, 2)]
    assert np.mean(parts) == pytest.approx(loss, rel=1e-6)
    mean = np.zeros(whole.shape)
    for first in range(0, 8, 2):
        trainer.gradients(tokens[first : first + 2], targets[first : first + 2])
        mean += trainer.grads.flat / 4.0
    np.testing.assert_allclose(whole, mean, atol=1e-6)
    trainer.close()


@pytest.mark.parametrize("quantize", [False, True])
def test_recomputation_does_not_change_a_bit(tiny_sizes: dict[str, Any], quantize: bool) -> None:
    results = []
    for recompute in ("none", "activations", "block"):
        trainer = make(tiny_sizes, recompute=recompute)
        loss = trainer.gradients(*batch(), quantize=quantize)
        results.append((loss, trainer.grads.flat.copy()))
        trainer.close()
    for loss, flat in results[1:]:
        assert loss == results[0][0]
        np.testing.assert_array_equal(flat, results[0][1])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_overfits_one_batch(tiny_sizes: dict[str, Any], optimizer: str) -> None:
    trainer = make(tiny_sizes, optimizer=optimizer, steps=150, lr=1e-2, warmup_fraction=0.05)
    losses = [trainer.step(*batch()).loss for _ in range(150)]
    assert losses[0] > 3.5 and losses[-1] < 0.35
    trainer.close()


def test_quantized_only_in_the_decay(tiny_sizes: dict[str, Any]) -> None:
    trainer = make(tiny_sizes, steps=10, decay_fraction=0.3, quantize_fraction=0.0, warmup_fraction=0.2)
    results = [trainer.step(*batch(seed=s)) for s in range(10)]
    assert [r.quantized for r in results] == [False] * 7 + [True] * 3
    factors = [r.lr_factor for r in results]
    assert factors[0] == 0.5 and factors[1:7] == [1.0] * 6
    assert factors[7] > factors[8] > factors[9] > 0
    trainer.close()


def test_schedule_shapes() -> None:
    config = TrainConfig(steps=100, warmup_fraction=0.1, decay_fraction=0.4)
    linear = [schedule(config, s) for s in range(100)]
    assert linear[9] == linear[59] == 1.0 and linear[99] == pytest.approx(0.0125)
    cosine = [schedule(dataclasses.replace(config, decay_shape="cosine"), s) for s in range(100)]
    assert cosine[60] > linear[60] and cosine[98] < linear[98] and min(cosine) > 0


def test_resuming_is_bitwise(tiny_sizes: dict[str, Any], tmp_path: Path) -> None:
    """Save in the trunk, restore into a fresh trainer, go through the quantized decay: losses and parameters equal."""
    knobs = {"steps": 8, "decay_fraction": 0.5, "quantize_fraction": 0.0}
    trainer = make(tiny_sizes, **knobs)
    for s in range(3):
        trainer.step(*batch(seed=s))

    def write_model(folder: Path) -> None:
        from pyengine_training.checkpoint import hf_config, hf_tensors
        from pyengine_training.files import save_safetensors, write_json

        write_json(folder / "config.json", hf_config(trainer.model, 0, 0))
        tensors = hf_tensors(trainer.params, trainer.model)
        save_safetensors(folder / "model.safetensors", tensors)

    trainer.save(tmp_path / "step", "data", write_model)
    wanted = [trainer.step(*batch(seed=s)).loss for s in range(3, 8)]
    other = make({**tiny_sizes}, seed=99, **knobs)
    other.restore(tmp_path / "step")
    assert other.state.step == 3 and other.state.tokens == 3 * 8 * 24
    assert [other.step(*batch(seed=s)).loss for s in range(3, 8)] == wanted
    np.testing.assert_array_equal(other.params.flat, trainer.params.flat)
    trainer.close()
    other.close()


def test_a_bad_gradient_stops_and_says_where(tiny_sizes: dict[str, Any]) -> None:
    trainer = make(tiny_sizes)
    trainer.step(*batch())
    trainer.params["layers.1.w_down"][3, 5] = np.inf
    before = trainer.params.flat.copy()
    with pytest.raises(NotFiniteError, match="step 1"):
        trainer.step(*batch())
    np.testing.assert_array_equal(trainer.params.flat, before)
    trainer.close()


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_a_thousand_steps_do_not_grow(tiny_sizes: dict[str, Any]) -> None:
    sizes = {**tiny_sizes, "n_layers": 1}
    trainer = make(sizes, batch_size=2, shards=2, steps=1100, quantize="always")
    tokens, targets = batch(2)
    for _ in range(100):
        trainer.step(tokens, targets)
    before = resident_bytes()
    for _ in range(1000):
        trainer.step(tokens, targets)
    assert resident_bytes() - before < 2 << 20
    trainer.close()


def test_arenas_are_padded_and_aligned(tiny_sizes: dict[str, Any]) -> None:
    config = ModelConfig(**tiny_sizes)
    arena = Arena(parameter_shapes(config))
    assert arena.flat.size % 1024 == 0
    assert all(offset % 32 == 0 for offset in arena.offsets.values())
    assert sum(view.size for view in arena.views.values()) == config.n_params()
    for number, view in enumerate(arena.views.values()):
        view.fill(number + 1)
    for number, view in enumerate(arena.views.values()):
        assert (view == number + 1).all()  # no two share an element


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_kv_heads": 3}, "does not divide"),
        ({"head_dim": 7}, "odd"),
        ({"dim": 0}, "at least 1"),
        ({"max_seq_len": 10}, "exceeds"),
    ],
)
def test_sizes_that_cannot_work(tiny_sizes: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make({**tiny_sizes, **change})


@pytest.mark.parametrize(
    "knobs",
    [
        {"shards": 3},
        {"optimizer": "sgd"},
        {"decay_fraction": 1.5},
        {"lr": 0.0},
        {"quantize": "int4"},
        {"steps": 0},
    ],
)
def test_knobs_that_cannot_work(knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TrainConfig(**knobs)


def test_distillation_helps_a_student(tiny_sizes: dict[str, Any]) -> None:
    """A source of noisy bigrams: after the same few steps a taught student is nearer to the truth
    than an untaught one, because the teacher knows every row's distribution and a sample shows one
    draw.
    """
    generator = np.random.default_rng(7)
    table = generator.dirichlet(np.full(48, 0.3), size=48)

    def draw(seed: int) -> tuple[Array, Array]:
        rng = np.random.default_rng([8, seed])
        tokens = np.empty((8, 25), np.int64)
        tokens[:, 0] = rng.integers(0, 48, 8)
        for t in range(24):
            u = rng.random((8, 1))
            tokens[:, t + 1] = (table[tokens[:, t]].cumsum(1) < u).sum(1).clip(0, 47)
        return tokens[:, :-1], tokens[:, 1:]

    knobs: dict[str, Any] = {"quantize": "never", "optimizer": "adamw", "lr": 1e-2}
    teacher = make({**tiny_sizes, "dim": 64}, steps=250, **knobs)
    for s in range(250):
        teacher.step(*draw(s))
    student = {**tiny_sizes, "n_layers": 1}
    losses = {}
    for alpha in (0.0, 0.9):
        config = TrainConfig(seq_len=24, batch_size=8, shards=4, steps=60, distill_alpha=alpha, **knobs)
        taught = (teacher.model, teacher.params) if alpha else None
        trainer = make_trainer(ModelConfig(**student), config, threads=2, teacher=taught)
        trainer.initialize()
        for s in range(60):
            trainer.step(*draw(1000 + s))
        losses[alpha] = np.mean([-np.log(truth_probability(trainer, table, *draw(5000 + s))).mean() for s in range(4)])
        trainer.close()
    teacher.close()
    assert losses[0.9] < losses[0.0] - 0.02, losses


def truth_probability(trainer: Trainer, table: Array, tokens: Array, targets: Array) -> Array:
    """The model's probability of each target."""
    worker = trainer.backend.workers[0]  # type: ignore[attr-defined]
    values = []
    for first in range(0, len(tokens), worker.rows):
        part = slice(first, first + worker.rows)
        loss = worker.evaluate(trainer.params, tokens[part], targets[part], False)
        values.append(np.exp(-loss.astype(np.float64)))
    return np.concatenate(values)
