"""Layers that differ: windows and RoPE tables by layer, against the specification bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.freeze_models import ArrayRows
from reference import frozen_reader
from reference.oracle import Oracle, dequantize_codes
from reference.spec_f32 import Spec

from pyengine import _core
from pyengine.format.config import FrozenConfig, LayerSpec
from pyengine.format.inventory import Weight, inventory
from pyengine.format.quantize import QuantizedMatrix
from pyengine.format.reader import FrozenFile
from pyengine.format.writer import FrozenWriter

f32 = np.float32
# Windows inside a chunk of 256 positions and across its border; each RoPE table with several of them.
LAYERS = (LayerSpec(5, 1), LayerSpec(0, 0), LayerSpec(270, 2), LayerSpec(2, 1), LayerSpec(0, 2), LayerSpec(64, 0))
CONFIG = FrozenConfig(
    architecture="Test", dim=32, hidden_dim=40, n_layers=len(LAYERS), n_heads=4, n_kv_heads=2, head_dim=8,
    vocab_size=50, max_seq_len=400, norm_eps=1e-5, tie_embeddings=True, qkv_bias=False, o_bias=False, qk_norm=False,
    layers=LAYERS, bos_token_id=None, eos_token_ids=(),
)  # fmt: skip
MODELS = {
    "plain": CONFIG,
    "key_bias": replace(CONFIG, qkv_bias=True, requires=("key_bias",)),
}
TOKENS = np.random.default_rng(5).integers(0, CONFIG.vocab_size, 300)
THETAS = (10_000.0, 100.0, 1_000_000.0)


def content(weight: Weight, rng: np.random.Generator) -> Iterator[tuple[str, list[Any]]]:
    """What the file holds of a weight, random."""
    if weight.is_matrix:
        rows = sum(-(-part.rows // 16) * 16 for part in weight.parts) if weight.alternating else weight.shape[0]
        values = rng.standard_normal((rows, weight.shape[1])).astype(f32) / f32(weight.shape[1] ** 0.5)
        matrix = QuantizedMatrix(ArrayRows(weight.name, values))
        yield f"{weight.name}.codes", list(matrix)
        yield f"{weight.name}.scales", [matrix.scales]
    elif weight.role == "key_bias":  # a third of the pairs, up to some 100
        pairs = 30 * rng.standard_normal((CONFIG.n_kv_heads, 2, CONFIG.head_dim // 2))
        pairs *= rng.random((CONFIG.n_kv_heads, 1, CONFIG.head_dim // 2)) < 0.3
        yield weight.name, [pairs.reshape(-1).astype(f32)]
    elif weight.is_parameter:
        yield weight.name, [(1 + 0.2 * rng.standard_normal(weight.shape)).astype(f32)]
    else:
        theta = THETAS[int(weight.name.split(".")[1])]
        yield weight.name, [(theta ** -(np.arange(weight.shape[0]) / weight.shape[0])).astype(f32)]


@pytest.fixture(scope="module", params=MODELS)
def path(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    config = MODELS[request.param]
    path = tmp_path_factory.mktemp("layers") / f"{request.param}.safetensors"
    rng = np.random.default_rng(4)
    with FrozenWriter(path, config, {"tokenizer.json": b"{}"}, name="layers", source="test") as writer:
        for weight in inventory(config):
            for name, chunks in content(weight, rng):
                writer.write(name, chunks)
    return path


@cache
def spec_logits(path: Path, kv_dtype: str, layers: str | None = None) -> Any:
    config, weights = frozen_reader.read(path)
    if layers is not None:
        config["layers"] = json.loads(layers)
    return Spec(config, weights, kv_dtype=kv_dtype).logits(TOKENS)


def engine_logits(path: Path, kv_dtype: str, chunk: int) -> Any:
    with FrozenFile.open(path) as frozen:
        context = _core.Context(_core.Model(frozen.config, frozen.buffer, frozen.weights), kv_dtype=kv_dtype)  # type: ignore[arg-type]
        sequence, rows = context.sequence_new(), []
        for begin in range(0, len(TOKENS), chunk):
            feed = [int(token) for token in TOKENS[begin : begin + chunk]]
            context.forward(feed, [sequence] * len(feed), b"\1" * len(feed))
            rows += [np.array(context.logits(row), f32) for row in range(context.n_logits)]
        return np.stack(rows)


@pytest.mark.parametrize("isa", _core.available_isas())
@pytest.mark.parametrize("kv_dtype", ["int8", "f32"])
def test_engine_equals_the_specification(path: Path, kv_dtype: str, isa: str) -> None:
    wanted = spec_logits(path, kv_dtype)
    _core.select_isa(isa)
    try:
        for chunk in (len(TOKENS), 97, 1):
            got = engine_logits(path, kv_dtype, chunk)
            assert np.array_equal(got.view(np.uint32), wanted.view(np.uint32)), f"chunks of {chunk}"
    finally:
        _core.select_isa(None)


@pytest.mark.parametrize("field", ["window", "rope"])
@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_every_layers_field_counts(path: Path, field: str, layer: int) -> None:
    """The comparison above could tell: another value of one layer gives other bits."""
    columns = CONFIG.to_document()["layers"]
    columns[field] = [*columns[field]]
    columns[field][layer] = {"window": 7, "rope": (LAYERS[layer].rope + 1) % 3}[field]
    assert not np.array_equal(spec_logits(path, "int8"), spec_logits(path, "int8", json.dumps(columns)))


def test_the_law_is_near_the_oracle(path: Path) -> None:
    """float64 without codes, over the weights that the codes stand for: the statistics of quantization, not of a
    mistake in the specification's bookkeeping of layers, which would be the same in the engine."""
    config, weights = frozen_reader.read(path)
    plain = {}
    for name, weight in weights.items():
        if isinstance(weight, np.ndarray):
            plain[name] = weight
        else:
            plain[name] = dequantize_codes(weight.codes, weight.scales, 40 if name.endswith("w_down") else 32)
    wanted = Oracle(config, plain, quantized=False).logits(TOKENS)
    error = np.linalg.norm(spec_logits(path, "int8") - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    other = np.linalg.norm(np.roll(wanted, 1, axis=0) - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert np.median(error) < 0.05 < np.median(other)
