"""A tiny model trained end to end in the simulator: the CPU's gradients, the CPU's losses, resuming, bad values."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")
pytest.importorskip("numba_cuda", reason="the CUDA kernels need numba-cuda: extra [cuda]")

from compiled import RecordingRuntime
from pyengine_training.arena import Arena, initialize, parameter_shapes
from pyengine_training.backend import cuda_optimizer
from pyengine_training.backend.cuda import device_bytes
from pyengine_training.comm import ALONE, PaperComm
from pyengine_training.config import ModelConfig, TrainConfig
from pyengine_training.data import ValidationBatch
from pyengine_training.device import CPU, Device, make_trainer
from pyengine_training.errors import NotFiniteError
from pyengine_training.ops.cuda import _runtime
from pyengine_training.ops.cuda._runtime import DeviceError, use_runtime
from pyengine_training.trainer import Trainer
from simulated_runtime import SimulatedRuntime

Array = np.ndarray[Any, Any]
MODEL = ModelConfig(
    vocab_size=19, dim=12, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=6, hidden_dim=20, max_seq_len=8
)
CONFIG = TrainConfig(
    seq_len=5,
    batch_size=2,
    shards=2,
    steps=4,
    warmup_fraction=0.25,
    decay_fraction=0.5,
    quantize_fraction=0.0,
    lr=0.01,
    quantize="decay",
    optimizer="adamw",
)


@pytest.fixture(autouse=True)
def runtime() -> Iterator[SimulatedRuntime]:
    with use_runtime(SimulatedRuntime("random", seed=3)) as made:
        yield made


def batch(seed: int) -> tuple[Array, Array]:
    tokens = np.random.default_rng(seed).integers(0, MODEL.vocab_size, (2, 6))
    targets = tokens[:, 1:].copy()
    targets[0, 1] = -1
    return tokens[:, :-1], targets


def pair(precision: str = "float32", **knobs: Any) -> tuple[Trainer, Trainer]:
    config = dataclasses.replace(CONFIG, **knobs)
    devices = CPU, Device("cuda", precision)
    trainers = tuple(make_trainer(MODEL, config, device=device, threads=1) for device in devices)
    for trainer in trainers:
        trainer.initialize()
    return trainers[0], trainers[1]


def distance(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("quantize", [False, True])
def test_gradients_of_a_whole_model(quantize: bool) -> None:
    cpu, gpu = pair()
    losses = [trainer.gradients(*batch(0), quantize=quantize) for trainer in (cpu, gpu)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if not quantize else 1e-3)
    wanted, got = cpu.grads, gpu.grads
    for name in wanted.shapes:
        # one flipped int8 code moves everything after it
        assert distance(got[name], wanted[name]) < (1e-5 if not quantize else 0.05), name


def test_gradients_with_qk_norm_and_documents() -> None:
    model = dataclasses.replace(MODEL, qk_norm=True)
    starts = np.array([[0, 0, 2, 2, 4], [0, 0, 0, 0, 0]])
    trainers = [make_trainer(model, CONFIG, device=d, threads=1) for d in (CPU, Device("cuda", "float32"))]
    losses = []
    for trainer in trainers:
        trainer.initialize()
        losses.append(trainer.gradients(*batch(0), starts))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    wanted, got = (trainer.grads for trainer in trainers)
    for name in wanted.shapes:
        assert distance(got[name], wanted[name]) < 1e-5, name


def test_a_batch_of_whole_rows_comes_after_one_of_documents() -> None:
    """What a position sees lies in a buffer that outlives the step."""
    gpu = pair()[1]
    wanted = gpu.gradients(*batch(0))
    documents = gpu.gradients(*batch(0), np.array([[0, 0, 2, 2, 4], [0, 1, 2, 3, 4]]))
    assert documents != wanted
    assert gpu.gradients(*batch(0)) == wanted


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_losses_are_the_cpus(optimizer: str, runtime: SimulatedRuntime) -> None:
    cpu, gpu = pair(optimizer=optimizer, quantize="never")
    for step in range(3):
        wanted, got = (trainer.step(*batch(step)) for trainer in (cpu, gpu))
        assert got.loss == pytest.approx(wanted.loss, rel=2e-5)
        assert got.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-4)
        assert got.lr_factor == wanted.lr_factor
    assert distance(gpu.params.flat, cpu.params.flat) < 1e-4
    assert runtime.recorded == 1


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_matrices_are_updated_together_as_one_by_one(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same matrix of so many layers at once, of three: bit for bit what one after another gives."""
    model = dataclasses.replace(MODEL, n_layers=3)
    config = dataclasses.replace(CONFIG, optimizer="muon", quantize="never")
    results = []
    for elements in (1, layers * MODEL.dim * MODEL.hidden_dim):
        monkeypatch.setattr(cuda_optimizer, "BATCH", elements)
        gpu = make_trainer(model, config, device=Device("cuda", "float32"))
        gpu.initialize()
        gpu.step(*batch(0))
        results.append(everything(gpu))
        units = gpu.backend.optimizer.units  # type: ignore[attr-defined]
        sizes = [unit.matrices.count for unit in units if unit.matrices]
        assert max(sizes) == (1 if elements == 1 else 3) and sum(sizes) == 3 * 7
    for wanted, got in zip(*results, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_bfloat16_losses_are_near_the_cpus(optimizer: str) -> None:
    cpu, gpu = pair("bf16", optimizer=optimizer, quantize="never")
    assert gpu.backend.training_worker(False).xs[0].dtype == np.uint16
    for step in range(2):
        wanted, got = (trainer.step(*batch(step)) for trainer in (cpu, gpu))
        assert got.loss == pytest.approx(wanted.loss, rel=0.02)


def test_recomputation_does_not_change_a_bit() -> None:
    results = []
    for recompute in ("none", "activations", "block"):
        gpu = pair(recompute=recompute, shards=1)[1]
        results.append((gpu.gradients(*batch(0)), gpu.grads.flat))
    for loss, flat in results[1:]:
        assert loss == results[0][0]
        np.testing.assert_array_equal(flat, results[0][1])


def write_model(gpu: Trainer, folder: Path) -> None:
    from pyengine_training.checkpoint import hf_config, hf_tensors
    from pyengine_training.files import save_safetensors, write_json

    write_json(folder / "config.json", hf_config(gpu.model, 0, 0))
    save_safetensors(folder / "model.safetensors", hf_tensors(gpu.params, gpu.model))


def one_row(seed: int) -> tuple[Array, Array]:
    tokens, targets = batch(seed)
    return tokens[:1], targets[:1]


def test_resuming_goes_through_the_quantized_decay_bitwise(tmp_path: Path) -> None:
    """bfloat16 in the trunk, float32 where int8 is simulated; saved between two steps of the trunk."""
    gpu = pair("bf16", shards=1, batch_size=1)[1]
    gpu.step(*one_row(0))
    gpu.save(tmp_path / "step", "data", lambda folder: write_model(gpu, folder))
    wanted = [gpu.step(*one_row(s)) for s in (1, 2)]
    assert [r.quantized for r in wanted] == [False, True]
    other = make_trainer(MODEL, gpu.config, device=Device("cuda"))
    other.restore(tmp_path / "step")
    got = [other.step(*one_row(s)) for s in (1, 2)]
    assert got == wanted
    np.testing.assert_array_equal(other.params.flat, gpu.params.flat)


def test_validation_is_the_cpus() -> None:
    cpu, gpu = pair("bf16")
    tokens, targets = batch(4)
    parts = (slice(0, 1), slice(1, 2))  # rows of a shard
    batches = [ValidationBatch(tokens[p], targets[p], targets[p] >= 0, np.arange(1)) for p in parts]
    for quantize in (False, True):
        wanted, got = (t.validate(batches, 33, quantize) for t in (cpu, gpu))
        assert got.loss == pytest.approx(wanted.loss, rel=1e-5 if not quantize else 1e-3)
        assert (got.tokens, got.n_bytes) == (wanted.tokens, wanted.n_bytes)


def test_distillation_is_the_cpus() -> None:
    teacher = Arena(parameter_shapes(MODEL))
    initialize(teacher, MODEL, 9)
    config = dataclasses.replace(CONFIG, distill_alpha=0.5)
    losses = []
    for device in (CPU, Device("cuda", "float32")):
        trainer = make_trainer(MODEL, config, device=device, threads=1, teacher=(MODEL, teacher))
        trainer.initialize()
        losses.append(trainer.gradients(*batch(0)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def everything(trainer: Trainer) -> list[Array]:
    """Parameters and moments."""
    moments = [np.zeros_like(trainer.params.flat) for _ in range(2)]
    trainer.backend.save_moments(*moments)
    return [trainer.params.flat.copy(), *moments]


def test_a_bad_loss_leaves_everything_as_it_was() -> None:
    gpu = pair(quantize="never")[1]
    gpu.step(*batch(0))
    gpu.params["norm"][3] = np.inf
    before = everything(gpu)
    with pytest.raises(NotFiniteError, match="step 1: loss"):
        gpu.step(*batch(1))
    for old, new in zip(before, everything(gpu), strict=True):
        np.testing.assert_array_equal(new, old)
    assert gpu.state.step == 1


def test_too_little_memory_is_refused_before_anything_is_allocated(
    runtime: SimulatedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "memory", lambda: (1000, 2000))
    with pytest.raises(DeviceError, match=r"GiB of GPU memory are needed.*--batch-size"):
        make_trainer(MODEL, CONFIG, device=Device("cuda"))


class Counted(RecordingRuntime):
    """Runs nothing and notes what is held: another count than the one that predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        made = super().empty(shape, dtype)
        key = len(self.sizes)
        self.sizes[key] = made.nbytes
        weakref.finalize(made, self.sizes.__setitem__, key, 0)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return made

    def upload(self, host: Any, out: Any = None) -> Array:
        return self.empty(host.shape, host.dtype) if out is None else out


@pytest.mark.parametrize(
    "precision, ranks, shard, rank",
    [("bf16", 1, False, 0), ("float32", 1, False, 0), ("bf16", 2, False, 0), ("bf16", 2, True, 0), ("bf16", 2, True, 1)],
)
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"quantize": "never", "optimizer": "muon"},
        {"quantize": "always", "recompute": "block"},
        {"shards": 4, "batch_size": 4, "recompute": "activations", "optimizer": "muon"},
        {"distill_alpha": 0.5},
    ],
    ids=str,
)
def test_a_run_holds_what_was_predicted(precision: str, ranks: int, shard: bool, rank: int, knobs: dict[str, Any]) -> None:
    """Steps through all phases with validation in between and a checkpoint, to the byte, on one of several ranks too."""
    config = dataclasses.replace(CONFIG, **knobs)
    teacher = (MODEL, Arena(parameter_shapes(MODEL))) if config.distill_alpha else None
    wanted = device_bytes(MODEL, config, precision, teacher, ranks, shard, rank)
    tokens, targets = (np.concatenate([x, x])[: config.batch_size] for x in batch(1))
    part = slice(0, config.batch_size // config.shards)
    validation = [ValidationBatch(tokens[part], targets[part], targets[part] >= 0, np.arange(part.stop))] * ranks
    with use_runtime(Counted()) as counted:
        comm = ALONE if ranks == 1 else PaperComm(ranks, rank)
        trainer = make_trainer(MODEL, config, device=Device("cuda", precision), teacher=teacher, comm=comm, shard_optimizer=shard)
        trainer.initialize()
        for step in range(config.steps):
            trainer.step(tokens, targets)
            trainer.validate(validation, 10, config.quantized(step))
            everything(trainer)
        for quantize in {False, config.quantize != "never"}:
            trainer.validate(validation, 10, quantize)
    assert counted.peak == wanted  # type: ignore[attr-defined]


def test_a_trainer_that_is_closed_leaves_its_memory_to_the_next() -> None:
    """At once, without a search for circles: what measures a step is followed by the trainer of the run."""
    with use_runtime(Counted()) as counted:
        trainer = make_trainer(MODEL, CONFIG, device=Device("cuda"))
        for _ in range(CONFIG.steps):
            trainer.step(*batch(0))
        gc.collect()
        gc.disable()
        try:
            trainer.close()
            del trainer
            kept = _runtime._kept[counted]
            of_the_device = sum(array.nbytes for array in (*kept.arrays.values(), *kept.numbers.values()))
            assert sum(counted.sizes.values()) == of_the_device  # type: ignore[attr-defined]
        finally:
            gc.enable()


def test_the_products_matrices_are_the_masters_rounded_to_nearest() -> None:
    from pyengine_training.gpu_check.judge import from_bf16, to_bf16

    gpu = pair("bf16", quantize="never")[1]
    gpu.gradients(*batch(0))
    narrow = gpu.backend._narrow  # type: ignore[attr-defined]
    np.testing.assert_array_equal(from_bf16(narrow.flat), from_bf16(to_bf16(gpu.params.flat)))


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_tensor_floats_are_for_steps_of_bf16_runs_alone(precision: str, runtime: SimulatedRuntime) -> None:
    gpu = pair(precision, quantize="always")[1]
    gpu.step(*batch(0))
    assert runtime.products and set(runtime.products) == {precision == "bf16"}
    runtime.products.clear()
    tokens, targets = batch(4)
    gpu.validate([ValidationBatch(tokens[:1], targets[:1], targets[:1] >= 0, np.arange(1))], 33, True)
    assert runtime.products and not any(runtime.products)


@pytest.mark.slow
def test_a_whole_run_by_the_command(tmp_path: Path, stories: Path) -> None:
    """Train, validate, sample, checkpoint, finish; then resume a second run from its checkpoint."""
    from pyengine_training.__main__ import main
    from pyengine_training.runfolder import read_metrics

    sizes = "--vocab-size 300 --dim 16 --n-layers 1 --n-heads 2 --n-kv-heads 1 --head-dim 8 --hidden-dim 16"
    knobs = "--seq-len 8 --batch-size 2 --shards 1 --steps 3 --eval-documents 1 --checkpoint-every 1 --sample-tokens 2"
    losses = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        where = ["--run-dir", str(folder), "--data", str(stories), "--device", device, "--precision", "float32"]
        assert main(["train", *where, *sizes.split(), *knobs.split()]) == 0
        assert (folder / "final" / "model.safetensors").exists()
        rows = read_metrics(folder / "metrics.jsonl")
        losses.append(
            [row["loss"] for row in rows if "loss" in row] + [row["val_loss"] for row in rows if "val_loss" in row]
        )
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    shutil.rmtree(folder / "final")
    assert main(["train", "--run-dir", str(folder), "--resume", "--device", "cuda"]) == 0
    assert (folder / "final" / "model.safetensors").exists()
