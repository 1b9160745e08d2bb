"""Adapters in PEFT's layout: freezing with one gives the file that freezing the merged weights gives; what is not a plain
low-rank product is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.frozen_parts import FrozenParts
from numpy.typing import NDArray
from reference import fixtures

import pyengine
from pyengine import InvalidArgumentError, ModelFormatError, PyEngineError, UnsupportedModelError
from pyengine.cli import main
from pyengine.freeze import freeze
from pyengine.freeze.lora import AdaptedRows, Adapter, Product, parse

TARGETS = ("q_proj", "v_proj", "down_proj")
R, ALPHA = 4, 8.0
PLAIN = {
    "peft_type": "LORA",
    "r": R,
    "lora_alpha": ALPHA,
    "target_modules": list(TARGETS),
    "bias": "none",
    "use_dora": False,
}

Array = NDArray[Any]


@pytest.fixture(scope="module")
def model() -> fixtures.Fixture:
    return fixtures.load("llama_untied")


@pytest.fixture(scope="module")
def base(model: fixtures.Fixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixtures.write_hf_dir(model, tmp_path_factory.mktemp("base") / "model", "F32")


def pairs(model: fixtures.Fixture, seed: int = 0, targets: tuple[str, ...] = TARGETS) -> dict[str, tuple[Array, Array]]:
    """Tensor of the model -> (A, B): sixteenths, so that products and sums of float64 are exact in any order."""
    rng = np.random.default_rng(seed)
    return {
        name: tuple(rng.integers(-8, 9, shape).astype(np.float32) / 16 for shape in ((R, w.shape[1]), (w.shape[0], R)))
        for name, w in model.hf_weights.items()
        if name.split(".")[-2] in targets
    }  # type: ignore[return-value]


def write_adapter(
    directory: Path, pairs: dict[str, tuple[Array, Array]], changes: dict[str, Any] | None = None
) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({**PLAIN, **(changes or {})}))
    tensors = {}
    for name, (a, b) in pairs.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    fixtures.write_safetensors(directory / "adapter_model.safetensors", tensors)
    return directory


def write_merged(
    directory: Path, model: fixtures.Fixture, *changes: tuple[dict[str, tuple[Array, Array]], float]
) -> Path:
    """A directory with base + the sum of scale * B A, rounded once."""
    weights = {}
    for name, weight in model.hf_weights.items():
        wide = weight.astype(np.float64)
        for pairs, scale in changes:
            if name in pairs:
                a, b = pairs[name]
                wide += scale * (b.astype(np.float64) @ a.astype(np.float64))
        weights[name] = wide.astype(np.float32)
    fixtures.write_hf_dir(model, directory, "F32")
    fixtures.write_safetensors(directory / "model.safetensors", weights)
    return directory


def parts(path: Path) -> dict[str, bytes]:
    return FrozenParts(path.read_bytes()).parts


# ------------------------------------------------------------------ equal to the merged weights


@pytest.mark.parametrize(
    ("changes", "factor"),
    [({}, ALPHA / R), ({"use_rslora": True}, ALPHA / math.sqrt(R)), ({"lora_alpha": 0.5}, 0.5 / R)],
)
def test_a_merged_freeze_is_a_freeze_of_the_merged_weights(
    model: fixtures.Fixture, base: Path, tmp_path: Path, changes: dict[str, Any], factor: float
) -> None:
    adapter = write_adapter(tmp_path / "adapter", pairs(model), changes)
    merged = freeze(write_merged(tmp_path / "merged", model, (pairs(model), factor)), tmp_path / "merged.safetensors")
    tuned = freeze(base, tmp_path / "tuned.safetensors", lora=[adapter])
    assert parts(tuned) == parts(merged)  # codes, scales and golden outputs
    assert parts(tuned) != parts(freeze(base, tmp_path / "plain.safetensors"))
    with pyengine.Engine(tuned) as engine:
        assert engine.metadata["source"] == "model (llama) + adapter"


def test_scales_and_several_adapters(model: fixtures.Fixture, base: Path, tmp_path: Path) -> None:
    one, two = pairs(model), pairs(model, 1, ("gate_proj", "up_proj", "k_proj", "o_proj", "q_proj"))
    first = write_adapter(tmp_path / "one", one)
    second = write_adapter(tmp_path / "two", two, {"target_modules": "all-linear"})
    merged = freeze(write_merged(tmp_path / "merged", model, (one, 0.5 * 2), (two, -2.0)), tmp_path / "m.safetensors")
    words = [str(base), "--lora", f"{first}:0.5", "--lora", f"{second}:-1", "-o", str(tmp_path / "tuned.safetensors")]
    assert main(["freeze", *words]) == 0
    assert parts(tmp_path / "tuned.safetensors") == parts(merged)


def test_the_order_of_the_sum_is_written(model: fixtures.Fixture) -> None:
    """Random float64 values, element by element, whichever rows are asked for."""
    rng = np.random.default_rng(0)
    a, b, weight = (
        rng.standard_normal((5, 12)),
        rng.standard_normal((7, 5)),
        rng.standard_normal((7, 12)).astype(np.float32),
    )

    class Rows:
        name, rows, columns = "w", 7, 12

        def read_rows(self, start: int, stop: int) -> Array:
            return weight[start:stop]

    def one(i: int, j: int) -> np.float32:
        total = 0.0
        for k in range(5):
            total += float(b[i, k]) * float(a[k, j])
        return np.float32(float(weight[i, j]) + total * 0.3)

    expected = np.array([[one(i, j) for j in range(12)] for i in range(7)])
    adapted = AdaptedRows(Rows(), [Product(a, b, 0.3)])
    np.testing.assert_array_equal(adapted.read_rows(0, 7), expected)
    np.testing.assert_array_equal(adapted.read_rows(2, 5), expected[2:5])


def test_the_trainers_files(model: fixtures.Fixture, base: Path, tmp_path: Path) -> None:
    """What training/pyengine_training/lora.py exports is what is read here."""
    pytest.importorskip("numba", reason="training needs numba: extra [train]")
    from pyengine_training.arena import Arena
    from pyengine_training.lora import Adapters, LoraConfig

    named = pairs(model)
    values = Arena({
        f"{name.removesuffix('.weight')}.lora_{side}.weight": matrix.shape
        for name, both in named.items()
        for side, matrix in zip("AB", both, strict=True)
    })  # fmt: skip
    for name, both in named.items():
        for side, matrix in zip("AB", both, strict=True):
            values[f"{name.removesuffix('.weight')}.lora_{side}.weight"][...] = matrix
    adapters = object.__new__(Adapters)  # its values alone: a model to train is not needed to write them
    adapters.config, adapters.values = LoraConfig(R, ALPHA, TARGETS, str(base)), values
    (tmp_path / "adapter").mkdir()
    adapters.export(tmp_path / "adapter")
    tuned = freeze(base, tmp_path / "tuned.safetensors", lora=[(tmp_path / "adapter", 0.5)])
    same = freeze(base, tmp_path / "same.safetensors", lora=[(write_adapter(tmp_path / "other", named), 0.5)])
    assert parts(tuned) == parts(same)


# ------------------------------------------------------------------ what is said


def test_words(tmp_path: Path) -> None:
    assert parse("a/b") == Adapter(Path("a/b"), 1.0)
    assert parse("a/b:0.5") == Adapter(Path("a/b"), 0.5) and parse("a:b") == Adapter(Path("a:b"), 1.0)
    (tmp_path / "x:2").mkdir()
    assert parse(str(tmp_path / "x:2")) == Adapter(tmp_path / "x:2", 1.0)
    with pytest.raises(InvalidArgumentError, match="finite"):
        parse("a:nan")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"peft_type": "IA3"}, UnsupportedModelError, "type 'IA3'"),
        ({"use_dora": True}, UnsupportedModelError, "use_dora = True"),
        ({"bias": "all"}, UnsupportedModelError, "bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedModelError, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, UnsupportedModelError, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, UnsupportedModelError, "alpha_pattern"),
        ({"fan_in_fan_out": True}, UnsupportedModelError, "fan_in_fan_out"),
        ({"r": 8}, ModelFormatError, r"r 8; the adapter's matrices are \[4, "),
        ({"r": 0}, ModelFormatError, "r is 0"),
        ({"r": "4"}, ModelFormatError, "r must be an integer"),
        ({"lora_alpha": None}, ModelFormatError, "lora_alpha is missing"),
        ({"use_rslora": "yes"}, ModelFormatError, "use_rslora must be a bool"),
        ({"target_modules": ["q_proj", "gate_proj"]}, ModelFormatError, "names the module 'gate_proj'"),
    ],
)
def test_configurations_that_are_refused(
    model: fixtures.Fixture,
    base: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[PyEngineError],
    message: str,
) -> None:
    adapter = write_adapter(tmp_path / "adapter", pairs(model), changes)
    with pytest.raises(error, match=message):
        freeze(base, tmp_path / "x.safetensors", lora=[adapter])
    assert not (tmp_path / "x.safetensors").exists()


def test_tensors_that_are_refused(model: fixtures.Fixture, base: Path, tmp_path: Path) -> None:
    a, b = np.zeros((R, 64), np.float32), np.zeros((64, R), np.float32)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    good = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    adapter = write_adapter(tmp_path / "adapter", {}, {"target_modules": "all-linear"})
    for tensors, error, message in (
        ({}, ModelFormatError, "is empty"),
        ({**good, f"{prefix}.lora_magnitude_vector": b[:, 0]}, UnsupportedModelError, "lora_magnitude_vector"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": a}, UnsupportedModelError, "lora_embedding_A"),
        ({f"{prefix}.lora_A.weight": a}, ModelFormatError, "has a matrix A only"),
        ({**good, f"{prefix}.lora_A.default.weight": a}, ModelFormatError, "two matrices A"),
        ({**good, f"{prefix}.lora_B.weight": b[:9]}, ModelFormatError, "q_proj.weight' is"),
        (
            {name.replace("layers.0", "layers.9"): t for name, t in good.items()},
            ModelFormatError,
            "layers.9.*does not have",
        ),
        ({**good, f"{prefix}.lora_A.weight": a + np.float32(np.inf)}, ModelFormatError, "not finite"),
    ):
        fixtures.write_safetensors(adapter / "adapter_model.safetensors", tensors)
        with pytest.raises(error, match=message):
            freeze(base, tmp_path / "x.safetensors", lora=[adapter])
    large = {name: np.full(t.shape, 3e38, np.float32) for name, t in good.items()}
    fixtures.write_safetensors(adapter / "adapter_model.safetensors", large)
    with pytest.raises(ModelFormatError, match="finite"):
        freeze(base, tmp_path / "x.safetensors", lora=[adapter])
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UnsupportedModelError, match="pickled adapters"):
        freeze(base, tmp_path / "x.safetensors", lora=[adapter])


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (8,), (2, 8, 8), ()])
def test_an_adapter_of_what_is_no_matrix(model: fixtures.Fixture, tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Tensors that the model has, though it has no use for them."""
    directory = fixtures.write_hf_dir(model, tmp_path / "model", "F32")
    weights = {name: weight.astype(np.float32) for name, weight in model.hf_weights.items()}
    fixtures.write_safetensors(directory / "model.safetensors", {**weights, "other.weight": np.zeros(shape, np.float32)})
    sides = np.ones((R, *shape[1:]), np.float32), np.ones((*shape[:1], R), np.float32)
    adapter = write_adapter(tmp_path / "adapter", {"other.weight": sides}, {"target_modules": ["other"]})
    with pytest.raises(ModelFormatError, match=r"'other.weight', which is no matrix"):
        freeze(directory, tmp_path / "x.safetensors", lora=[adapter])


def test_a_shared_output_matrix_is_not_changed_in_silence(tmp_path: Path) -> None:
    tied = fixtures.load("llama_tied")
    directory = fixtures.write_hf_dir(tied, tmp_path / "model", "F32")
    shape = tied.hf_weights["model.embed_tokens.weight"].shape
    weights = {name: weight.astype(np.float32) for name, weight in tied.hf_weights.items()}
    fixtures.write_safetensors(
        directory / "model.safetensors", {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    )
    both = {"lm_head.weight": (np.ones((R, shape[1]), np.float32), np.ones((shape[0], R), np.float32))}
    adapter = write_adapter(tmp_path / "adapter", both, {"target_modules": ["lm_head"]})
    with pytest.raises(UnsupportedModelError, match=r"'lm_head.weight', which this model shares"):
        freeze(directory, tmp_path / "x.safetensors", lora=[adapter])


def test_other_sources_and_arguments(base: Path, model: fixtures.Fixture, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="is no adapter"):
        freeze(base, tmp_path / "x.safetensors", lora=[tmp_path])
    with pytest.raises(InvalidArgumentError, match="list of directories"):
        freeze(base, tmp_path / "x.safetensors", lora=str(tmp_path))
    for scale in ("2", True, math.nan, math.inf, 10**400, 10**5000):
        with pytest.raises(InvalidArgumentError, match="scale"):
            freeze(base, tmp_path / "x.safetensors", lora=[(tmp_path, scale)])  # type: ignore[list-item]
    adapter = write_adapter(tmp_path / "adapter", pairs(model))
    with pytest.raises(InvalidArgumentError, match="part of the source"):
        freeze(base, adapter / "adapter_model.safetensors", lora=[adapter], overwrite=True)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(InvalidArgumentError, match="adapters are merged into the weights of"):
        freeze(tmp_path / "m.gguf", tmp_path / "x.safetensors", lora=[adapter])
