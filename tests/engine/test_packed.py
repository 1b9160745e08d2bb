"""Checkpoints that were quantized before, against what the tools that wrote them make of them.

The layers are of reference/make_packed_fixtures.py.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from engine.freeze_models import LLAMA, random_tensors, write_hf

from pyengine.errors import ModelFormatError, PyEngineError, UnsupportedModelError
from pyengine.format.reader import FrozenFile
from pyengine.freeze import freeze
from pyengine.freeze.fields import Fields
from pyengine.freeze.packed import PackedTensors
from pyengine.freeze.safetensors import SafetensorsReader

ARCHIVE = np.load(Path(__file__).parents[1] / "reference" / "data" / "packed" / "layers.npz")
CASES = sorted({key.partition("/")[0] for key in ARCHIVE.files})


class Part(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def layer(case: str, module: str = "m") -> dict[str, Part]:
    """Stored tensors by name."""
    keys = [k for k in ARCHIVE.files if k.startswith(f"{case}/") and f"{k}:dtype" in ARCHIVE.files]
    return {
        f"{module}.{key.partition('/')[2]}": Part(
            str(ARCHIVE[f"{key}:dtype"]), tuple(ARCHIVE[f"{key}:shape"].tolist()), ARCHIVE[key].tobytes()
        )
        for key in keys
    }


def settings(case: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(str(ARCHIVE[f"{case}/settings"]))
    return found


def safetensors(parts: dict[str, Part]) -> bytes:
    header, data = {}, b""
    for name, part in parts.items():
        header[name] = {
            "dtype": part.dtype, "shape": list(part.shape), "data_offsets": [len(data), len(data) + len(part.data)],
        }  # fmt: skip
        data += part.data
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


Open = Callable[[dict[str, Part], dict[str, Any]], PackedTensors]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """opened(parts, settings); a file is closed when the next one is opened."""
    path, readers = tmp_path / "model.safetensors", []

    def open_one(parts: dict[str, Part], options: dict[str, Any]) -> PackedTensors:
        while readers:
            readers.pop().close()
        path.write_bytes(safetensors(parts))
        readers.append(SafetensorsReader([path]))
        return PackedTensors(readers[-1], Fields(options, "config.json"))

    yield open_one
    for reader in readers:
        reader.close()


@pytest.mark.parametrize("case", CASES)
def test_rows_are_what_the_tool_makes_of_them(opened: Open, case: str) -> None:
    tensors = opened(layer(case), settings(case))
    assert tensors.shapes == {"m.weight": (32, 96)}
    rows = tensors.matrix("m.weight")
    assert (rows.name, rows.rows, rows.columns) == ("m.weight", 32, 96)
    expected = ARCHIVE[f"{case}/expected"]
    assert rows.read_rows(0, 32).dtype == np.float32
    assert np.array_equal(rows.read_rows(0, 32), expected)
    pieces = [rows.read_rows(a, b) for a, b in ((0, 1), (1, 7), (7, 24), (24, 25), (25, 32))]
    assert np.array_equal(np.concatenate(pieces), expected)


def test_scales_of_activations_are_no_weights(opened: Open) -> None:
    parts = layer("fp8-blocks")
    parts["m.input_scale"] = parts["k_proj.k_scale"] = Part("F32", (1,), bytes(4))
    parts["norm.weight"] = Part("F32", (2,), np.array([1, 2], "<f4").tobytes())
    tensors = opened(parts, settings("fp8-blocks"))
    assert tensors.shapes == {"m.weight": (32, 96), "norm.weight": (2,)}
    assert tensors.vector("norm.weight").tolist() == [1, 2]


def test_gptq_of_the_second_version_stores_zeros_as_they_are(opened: Open) -> None:
    rows = [
        opened(layer("gptq4"), settings("gptq4") | {"checkpoint_format": version}).matrix("m.weight").read_rows(0, 32)
        for version in ("gptq", "gptq_v2")
    ]
    scales = np.frombuffer(layer("gptq4")["m.scales"].data, "<f2").astype(np.float32).reshape(3, 32)
    assert np.allclose(rows[1] - rows[0], np.repeat(scales.T, 32, axis=1), rtol=0, atol=1e-6)


def test_every_float_of_eight_bits() -> None:
    from pyengine.freeze.packed import _E4M3, _E5M2

    assert _E4M3[[0x00, 0x01, 0x08, 0x38, 0x7E, 0xFE, 0x80]].tolist() == [0, 2**-9, 2**-6, 1, 448, -448, 0]
    assert np.isnan(_E4M3[[0x7F, 0xFF]]).all() and np.isfinite(np.delete(_E4M3, [0x7F, 0xFF])).all()
    halves = (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)  # E5M2 is the upper half of one
    finite = np.isfinite(halves)
    assert np.array_equal(_E5M2[finite], halves[finite]) and np.isnan(_E5M2[~finite]).all()


# ---------------------------------------------------------------------------- whole models


def quantized_model(case: str) -> tuple[dict[str, Part], dict[str, np.ndarray]]:
    """The tensors of a model whose up and gate matrices are a stored layer, and the same as floats."""
    config = LLAMA | {"hidden_size": 96, "intermediate_size": 32, "head_dim": 16}
    floats = random_tensors(config)
    parts = {}
    for name, tensor in floats.items():
        module, _, last = name.rpartition(".")
        if last == "weight" and module.endswith(("gate_proj", "up_proj")):
            floats[name] = ARCHIVE[f"{case}/expected"]
            parts |= layer(case, module)
        else:
            parts[name] = Part("F32", tensor.shape, tensor.astype("<f4").tobytes())
    return parts, floats


@pytest.mark.parametrize("case", CASES)
def test_a_model_freezes_to_what_its_floats_freeze_to(tmp_path: Path, case: str) -> None:
    config = LLAMA | {"hidden_size": 96, "intermediate_size": 32, "head_dim": 16}
    parts, floats = quantized_model(case)
    plain = write_hf(tmp_path / "plain" / "x", config, floats)
    packed = write_hf(tmp_path / "packed" / "x", config | {"quantization_config": settings(case)}, floats)
    (packed / "model.safetensors").write_bytes(safetensors(parts))
    files = [freeze(source, tmp_path / f"{source.parent.name}.safetensors") for source in (plain, packed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    FrozenFile.open(files[1]).close()


# ---------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
        ({}, "unnamed method"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        ({"quant_method": "awq", "version": "gemv"}, "gemv"),
        ({"quant_method": "gptq", "bits": 3}, "3 bits"),
    ],
)
def test_unknown_layouts_are_named(opened: Open, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        opened(layer("gptq4"), options)


def damaged(parts: dict[str, Part]) -> Iterator[dict[str, Part]]:
    """Each part missing, of another dtype, with a row or a column less, with another number of dimensions."""
    for name, part in parts.items():
        yield {key: value for key, value in parts.items() if key != name}
        yield parts | {name: Part("U8", (len(part.data),), part.data)}
        item = len(part.data) // int(np.prod(part.shape, dtype=int))
        for axis, size in enumerate(part.shape):
            if size > 1:
                shape = (*part.shape[:axis], size - 1, *part.shape[axis + 1 :])
                yield parts | {name: Part(part.dtype, shape, part.data[: int(np.prod(shape)) * item])}
        yield parts | {name: Part(part.dtype, (*part.shape, 1, 1), part.data)}
        yield parts | {name: Part(part.dtype, (0,), b"")}


@pytest.mark.parametrize("case", CASES)
def test_tensors_that_do_not_belong_together_are_refused(opened: Open, case: str) -> None:
    """Or, where a part may be missing, read: never anything else."""
    refused = 0
    for parts in damaged(layer(case)):
        try:
            tensors = opened(parts, settings(case))
            for name, shape in tensors.shapes.items():
                if len(shape) == 2 and 0 not in shape:
                    assert tensors.matrix(name).read_rows(0, shape[0]).shape == shape
        except (ModelFormatError, UnsupportedModelError):
            refused += 1
    assert refused >= 5


def test_groups_that_are_not_there_are_refused(opened: Open) -> None:
    parts = layer("gptq4-act-order")
    for wrong in (-1, 3, 1 << 30):
        index = np.frombuffer(parts["m.g_idx"].data, "<i4").copy()
        index[7] = wrong
        with pytest.raises(ModelFormatError, match=r"a group is not in 0\.\.2"):
            opened(parts | {"m.g_idx": Part("I32", (96,), index.tobytes())}, settings("gptq4-act-order"))


def test_settings_of_strangers_never_do_worse_than_raise(opened: Open) -> None:
    rng = random.Random(8)
    strange = [None, -1, 0, 3, 1 << 70, 1.5, "x", "", [], {}, [0, 0], [1, 2, 3], [64, -1], True]
    strange += [[1 << 70, 1], [1, 1 << 70], [32, 1 << 70], [1 << 70, 96], {"weights": 3}, {"a": {"weights": []}}]
    for case in CASES:
        options = settings(case)
        for key in [*options, "weight_block_size", "config_groups", "version", "checkpoint_format"]:
            for value in strange if key == "weight_block_size" else rng.sample(strange, 6):
                try:
                    tensors = opened(layer(case), options | {key: value})
                    tensors.matrix("m.weight").read_rows(0, 32)
                except PyEngineError:
                    pass
