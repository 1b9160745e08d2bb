"""Experts in MXFP4, as gpt-oss has them: their values, what is refused of them, and experts that are not quantized."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.freeze_models import weight_bytes
from reference import fixtures
from reference.folds import unfused

from pyengine.errors import ModelFormatError, PyEngineError, UnsupportedModelError
from pyengine.freeze import freeze, mxfp4, open_source
from pyengine.freeze.safetensors import SafetensorsReader
from pyengine.freeze.sources import FileRows


@contextlib.contextmanager
def mxfp4_file(path: Path, tensors: dict[str, Any]) -> Iterator[mxfp4.Mxfp4Tensors]:
    fixtures.write_safetensors(path, {name: w for name, w in tensors.items() if w is not None})
    with contextlib.closing(SafetensorsReader([path])) as reader:
        yield mxfp4.Mxfp4Tensors(reader)


def test_mxfp4_by_hand(tmp_path: Path) -> None:
    """Every code, two neighbours a byte, and an exponent."""
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    wanted = np.array([values + [-x for x in values]] * 2, np.float32).reshape(1, -1)
    codes = np.tile(np.arange(16, dtype=np.uint8), 2)
    blocks = np.tile(codes[::2] | codes[1::2] << 4, (1, 3, 1, 1))  # one expert of three rows
    scales = np.array([[[127], [125], [130]]], np.uint8)
    with mxfp4_file(tmp_path / "m", {"w_blocks": blocks, "w_scales": scales}) as reader:
        assert reader.shapes == {"w": (1, 3, 32)}
        assert np.array_equal(reader.matrix("w").read_rows(0, 3), np.concatenate([wanted, wanted / 4, wanted * 8]))
        assert np.array_equal(reader.matrix("w").read_rows(1, 2), wanted / 4)


@pytest.mark.parametrize(
    "change",
    [
        {"w_scales": None},
        {"w_scales": np.zeros((4, 64, 1), np.uint8)},
        {"w_scales": np.zeros((4, 64, 2, 1), np.uint8)},
        {"w": np.zeros((4, 64), np.uint8)},
    ],
)
def test_blocks_of_mxfp4_need_their_scales(tmp_path: Path, change: dict[str, Any]) -> None:
    tensors = {"w_blocks": np.zeros((4, 64, 2, 16), np.uint8), "w_scales": np.zeros((4, 64, 2), np.uint8)} | change
    wanted = pytest.raises(ModelFormatError, match="'w_blocks' has no 'w_scales' of its shape")
    with wanted, mxfp4_file(tmp_path / "m", tensors):
        pass


def test_mxfp4_that_is_not_of_bytes_is_refused(tmp_path: Path) -> None:
    fixture = fixtures.load("gpt_oss")
    scales = {name: w.astype(np.float16) for name, w in fixture.hf_weights.items() if name.endswith("_scales")}
    directory = fixtures.write_hf_dir(replace(fixture, hf_weights=fixture.hf_weights | scales), tmp_path / "hf")
    with pytest.raises(UnsupportedModelError, match="MXFP4 in F16 is not"):
        open_source(directory)


def test_an_exponent_that_overflows_is_refused_when_it_is_quantized(tmp_path: Path) -> None:
    fixture = fixtures.load("gpt_oss")
    largest = {name: np.full_like(w, 255) for name, w in fixture.hf_weights.items() if name.endswith("_scales")}
    directory = fixtures.write_hf_dir(replace(fixture, hf_weights=fixture.hf_weights | largest), tmp_path / "hf")
    with pytest.raises(PyEngineError, match="finite"):
        freeze(directory, tmp_path / "m")


def test_experts_that_are_not_quantized_are_transposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tools make of gpt-oss when they dequantize it: the same values, (n_experts, inputs, outputs). A weight is quantized in
    many pieces, and its matrix is read once."""
    fixture = fixtures.load("gpt_oss")
    wanted = weight_bytes(freeze(fixtures.write_hf_dir(fixture, tmp_path / "a"), tmp_path / "m"))
    tensors = {name: w for name, w in fixture.hf_weights.items() if w.dtype != np.uint8}
    parts = unfused(fixture.hf_config, fixture.hf_weights)
    for i in range(2):
        prefix = f"model.layers.{i}.mlp.experts."
        gate, up, down = (np.stack([parts[f"{prefix}{e}.{end}_proj.weight"] for e in range(4)]) for end in ("gate", "up", "down"))
        alternating = np.stack([gate, up], axis=2).reshape(4, -1, gate.shape[2])
        tensors |= {prefix + "gate_up_proj": alternating.swapaxes(1, 2), prefix + "down_proj": down.swapaxes(1, 2)}
    config = {key: value for key, value in fixture.hf_config.items() if key != "quantization_config"}
    plain = fixtures.write_hf_dir(replace(fixture, hf_config=config, hf_weights=tensors), tmp_path / "b")
    monkeypatch.setattr("pyengine.format.quantize._CHUNK_ELEMENTS", 1)
    reads: list[tuple[str, int]] = []
    read_rows = FileRows.read_rows

    def note(rows: FileRows, start: int, stop: int) -> Any:
        reads.append((rows.name, start))
        return read_rows(rows, start, stop)

    monkeypatch.setattr(FileRows, "read_rows", note)
    assert weight_bytes(freeze(plain, tmp_path / "n")) == wanted
    for name, tensor in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            assert [start for one, start in reads if one == name] == [e * tensor.shape[1] for e in range(4)]
