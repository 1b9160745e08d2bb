"""A draft head in a frozen file: what is written is what was given, and what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.draft_heads import Tensors, random_head, with_random_head
from engine.freeze_models import weight_bytes
from engine.frozen_parts import FrozenParts

import pyengine
from pyengine import golden
from pyengine.cli.info import describe, text_lines
from pyengine.errors import ExistingFileError, ModelFormatError, UnsupportedModelError
from pyengine.format.draft_head import attach_draft
from pyengine.format.inventory import draft_inventory
from pyengine.format.quantize import dequantize
from pyengine.format.reader import FrozenFile, verify_checksums
from pyengine.format.writer import FrozenWriter


@pytest.fixture(scope="module")
def headed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_random_head(tiny_model, tmp_path_factory.mktemp("headed") / "headed.safetensors")


def head_for(path: Path) -> Tensors:
    with FrozenFile.open(path) as frozen:
        return random_head(frozen.config.dim, frozen.config.vocab_size, n_tokens=frozen.config.vocab_size * 3 // 4)


def values_of(frozen: FrozenFile) -> Tensors:
    """What the head's tensors in the file stand for, by the names that `attach_draft` takes."""
    found: Tensors = {}
    for weight in draft_inventory(frozen.config):
        stored, n_rows = weight.stored(), weight.shape[0]
        raw = [bytes(frozen.buffer[offset : offset + size]) for offset, size in map(frozen.tensors.__getitem__, stored)]
        if not weight.is_matrix:
            found[f"draft.{weight.role}"] = np.frombuffer(raw[0], "<i4" if weight.kind == "i32" else "<f4")[:n_rows]
            continue
        codes = np.frombuffer(raw[0], np.int8).reshape(next(iter(stored.values())).shape)
        scales = np.frombuffer(raw[1], "<f2")[: codes.shape[0] * codes.shape[1] * 16].reshape(*codes.shape[:2], 16)
        n_parts = len(weight.parts)
        for i, part in enumerate(weight.parts):
            found[f"draft.{part.name}"] = dequantize(codes[i::n_parts], scales[i::n_parts], part.rows, weight.shape[1])
    return found


def test_what_is_attached_is_found_again(tiny_model: Path, headed: Path) -> None:
    given = head_for(tiny_model)
    with FrozenFile.open(headed) as frozen:
        assert frozen.config.draft_head == (24, len(given["draft.vocab"]))
        found = values_of(frozen)
        assert found.keys() == given.keys()
        for name, values in found.items():
            assert values.shape == given[name].shape
            # A transformed weight of absmax a is stored to a / 254; transformed back it is a sum of at most 64 such errors / 8.
            atol = np.abs(given[name]).max() * 64 / 254 if values.ndim == 2 else 0
            np.testing.assert_allclose(values, given[name], rtol=0, atol=atol)
            assert values.ndim == 1 or np.corrcoef(values.ravel(), given[name].ravel())[0, 1] > 0.999
        assert all(good for _, good in verify_checksums(frozen))
        assert frozen.weights_bytes + frozen.draft_bytes < headed.stat().st_size
    assert weight_bytes(headed) == weight_bytes(tiny_model)
    with FrozenFile.open(headed) as frozen, FrozenFile.open(tiny_model) as plain:
        assert frozen.attachment("golden.json") == plain.attachment("golden.json")
        assert list(frozen.weights) == list(plain.weights) and frozen.weights_bytes == plain.weights_bytes
        assert frozen.metadata == plain.metadata and plain.draft_bytes == 0
    assert golden.compute(headed) == golden.compute(tiny_model)


def test_without_the_head_the_file_is_what_it_was(tiny_model: Path, headed: Path, tmp_path: Path) -> None:
    again = attach_draft(headed, tmp_path / "again.safetensors", None)
    assert again.read_bytes() == tiny_model.read_bytes()
    other = with_random_head(headed, tmp_path / "other.safetensors", seed=1)
    assert other.read_bytes() == with_random_head(tiny_model, tmp_path / "new.safetensors", seed=1).read_bytes()
    assert other.read_bytes() != headed.read_bytes()


def test_other_extra_tensors_stay(tiny_model: Path, headed: Path, tmp_path: Path) -> None:
    from engine.test_frozen_file import EXTRA, with_tensor

    path = tmp_path / "extra.safetensors"
    path.write_bytes(with_tensor(tiny_model.read_bytes(), "config.json", "extra.heads", EXTRA))
    with FrozenFile.open(with_random_head(path, tmp_path / "both.safetensors")) as frozen:
        offset, size = frozen.tensors["extra.heads"]
        assert bytes(frozen.buffer[offset : offset + size]) == EXTRA[1]
        assert frozen.config.draft_head is not None


def test_info_shows_it(headed: Path) -> None:
    with FrozenFile.open(headed) as frozen:
        facts = describe(frozen, with_tensors=True)
        size = frozen.draft_bytes
        lines = dict(text_lines(facts))
    assert facts["draft_bytes"] == size > 0 and "extra.draft.w_in.codes" in {one["name"] for one in facts["tensors"]}
    assert lines["draft head"].startswith("hidden dim 24, ") and "extra" not in lines


def test_the_model_itself_is_not_overwritten(tiny_model: Path, headed: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(headed.read_bytes())
    (tmp_path / "link").symlink_to(path)
    for output in (path, tmp_path / "link"):
        with pytest.raises(pyengine.InvalidArgumentError, match="the model itself"):
            attach_draft(path, output, head_for(path), overwrite=True)
    taken = tmp_path / "taken"
    taken.write_bytes(b"mine")
    with pytest.raises(ExistingFileError):
        attach_draft(path, taken, head_for(path))
    assert taken.read_bytes() == b"mine" and path.read_bytes() == headed.read_bytes()
    attach_draft(path, taken, head_for(path), overwrite=True)
    assert taken.read_bytes() == headed.read_bytes()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link", "m.safetensors", "taken"]


def test_a_writer_wants_the_tensors_of_the_head_that_is_configured(tiny_model: Path, headed: Path, tmp_path: Path) -> None:
    with FrozenFile.open(headed) as frozen:
        config = frozen.config
    attachments = {"tokenizer.json": b"{}"}
    with pytest.raises(pyengine.InvalidArgumentError, match="draft head"):
        FrozenWriter(tmp_path / "m", config, attachments, name="n", source="s")
    with pytest.raises(pyengine.InvalidArgumentError, match="a name without"):
        FrozenWriter(tmp_path / "m", replace(config, extra={}), attachments, name="n", source="s", extra={"x": None})  # type: ignore[dict-item]


# ---------------------------------------------------------------------------- tensors that do not fit


def changed(name: str, values: Any) -> Callable[[Tensors], Tensors]:
    return lambda head: {**head, name: values(head[name]) if callable(values) else values}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda head: {}, "is missing"),
        (lambda head: {**head, "draft.bias": head["draft.w_in"]}, "'draft.bias' is not one of a draft head"),
        (changed("draft.w_in", lambda w: w[:, 1:]), r"'draft.w_in' has shape \[64, 127\], expected \[64, 128\]"),
        (changed("draft.w_up", lambda w: w[1:]), "'draft.w_up' has shape"),
        (changed("draft.output", lambda w: w[1:]), "'draft.output' has shape"),
        (changed("draft.mlp_norm", lambda w: w[1:]), "'draft.mlp_norm' has shape"),
        (changed("draft.w_down", lambda w: w * np.nan), "'draft.w_down' must hold finite"),
        (changed("draft.w_down", lambda w: w.astype(np.int32)), "'draft.w_down' must hold finite"),
        (changed("draft.w_in", lambda w: w * np.float32(1e30)), "overflow the f16 scale"),
        (changed("draft.vocab", lambda v: v[::-1]), "'draft.vocab' is not ascending"),
        (changed("draft.vocab", lambda v: v * 0), "'draft.vocab' is not ascending"),
        (changed("draft.vocab", lambda v: v - v[0] - 1), "'draft.vocab' must hold integers in 0.."),
        (changed("draft.vocab", lambda v: v + 100000), "'draft.vocab' must hold integers in 0.."),
        (changed("draft.vocab", lambda v: v.astype(np.float32)), "'draft.vocab' must hold integers"),
        (changed("draft.vocab", np.zeros(0, np.int32)), "'draft.output' has shape"),
        (changed("draft.w_gate", np.float32(1)), "has shape"),
        (
            lambda head: head | {n: np.zeros((0, 64), np.float32) for n in ("draft.w_gate", "draft.w_up")}
            | {"draft.w_down": np.zeros((64, 0), np.float32)},
            "hidden_dim of extra.draft must be",
        ),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(
    tiny_model: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], match: str
) -> None:
    with pytest.raises(ModelFormatError, match=match):
        attach_draft(tiny_model, tmp_path / "m.safetensors", change(head_for(tiny_model)))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- files that contradict themselves


def with_draft(parts: FrozenParts, draft: Any) -> dict[str, bytes]:
    config = json.loads(parts.attachment("config.json"))
    config["extra"]["draft"] = draft
    return {"config.json": json.dumps(config).encode()}


@pytest.mark.parametrize(
    ("draft", "error", "match"),
    [
        (None, ModelFormatError, "extra.draft must be an object"),
        ([], ModelFormatError, "extra.draft must be an object"),
        ({}, ModelFormatError, "key 'hidden_dim' of extra.draft is missing"),
        ({"hidden_dim": 24}, ModelFormatError, "key 'vocab_size' of extra.draft is missing"),
        ({"hidden_dim": 24, "vocab_size": 40, "layers": 2}, UnsupportedModelError, "extra.draft has the key 'layers'"),
        ({"hidden_dim": True, "vocab_size": 40}, ModelFormatError, "hidden_dim of extra.draft must be an integer"),
        ({"hidden_dim": 1 << 40, "vocab_size": 40}, ModelFormatError, "hidden_dim of extra.draft must be an integer"),
        ({"hidden_dim": 24, "vocab_size": 0}, ModelFormatError, "vocab_size of extra.draft must be an integer"),
        ({"hidden_dim": 24, "vocab_size": 1 << 20}, ModelFormatError, "vocab_size of extra.draft must be an integer"),
        ({"hidden_dim": 40, "vocab_size": 40}, ModelFormatError, "tensor 'extra.draft.w_gate_up.codes' is I8"),
    ],
)
def test_a_head_that_is_not_described_rightly_is_refused(
    headed: Path, tmp_path: Path, draft: Any, error: type[Exception], match: str
) -> None:
    parts = FrozenParts(headed.read_bytes())
    path = tmp_path / "m.safetensors"
    path.write_bytes(parts.build(with_draft(parts, draft)))
    with pytest.raises(error, match=match):
        FrozenFile.open(path)


def test_a_tensor_of_another_kind_is_refused(headed: Path, tmp_path: Path) -> None:
    parts = FrozenParts(headed.read_bytes())
    path = tmp_path / "m.safetensors"

    def as_floats(header: dict[str, Any]) -> dict[str, Any]:
        header["extra.draft.vocab"]["dtype"] = "F32"
        return header

    path.write_bytes(parts.build(change_header=as_floats))
    with pytest.raises(ModelFormatError, match=r"'extra.draft.vocab' is F32 .*, the configuration needs I32"):
        FrozenFile.open(path)
    del parts.parts["extra.draft.w_down.scales"]
    path.write_bytes(parts.build())
    with pytest.raises(ModelFormatError, match=r"'extra.draft.w_down.scales' is missing"):
        FrozenFile.open(path)
