"""FORMAT.md as vectors: the quantizer, the panels, and a whole tiny file byte by byte."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from engine.freeze_models import ArrayRows

from pyengine.errors import ModelFormatError
from pyengine.format.config import FrozenConfig, LayerSpec
from pyengine.format.inventory import stored_tensors
from pyengine.format.quantize import dequantize, from_panels, quantize_rows, to_panels
from pyengine.format.reader import FrozenFile
from pyengine.format.writer import FrozenWriter
from pyengine.freeze.sources import AlternatingPanels, StackedRows


def group(*values: float) -> np.ndarray:
    """One row of 64 weights that starts with ``values``."""
    row = np.zeros((1, 64), np.float32)
    row[0, : len(values)] = values
    return row


def codes_of(row: np.ndarray) -> list[int]:
    return quantize_rows(row, "w")[0].reshape(-1).tolist()


# ---------------------------------------------------------------------------- section 4


def test_ties_round_to_even() -> None:
    # absmax 127 makes the scale exactly 1: the codes are the rounded weights
    row = group(127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 0.49999997)
    assert codes_of(row)[:10] == [127, 0, 2, 2, 0, -2, -2, 126, -126, 0]


def test_division_is_by_the_stored_scale() -> None:
    # 1/127 is stored as 0x2008, 0.006 % smaller: 31.499 / 127 is 31.5009 of the stored scale
    codes, scales = quantize_rows(group(1.0, 31.499 / 127), "w")
    assert scales.view(np.uint16).tolist() == [[0x2008]]
    assert codes[0, 0, :2].tolist() == [127, 32]


def test_a_rounded_down_scale_is_clamped() -> None:
    # f16(absmax / 127) below absmax / 127 gives a quotient above 127, by much where f16 is
    # subnormal
    absmax = np.float32(127 * 1.49 * 2**-24)
    codes, scales = quantize_rows(group(absmax, -absmax), "w")
    assert scales.view(np.uint16).tolist() == [[1]]  # the smallest subnormal is kept
    assert codes[0, 0, :2].tolist() == [127, -127]


@pytest.mark.parametrize("value", [0.0, 1e-30, 127 * 2.0**-25])
def test_a_scale_of_zero_has_codes_of_zero(value: float) -> None:
    codes, scales = quantize_rows(group(value, -value), "w")  # 2^-25 is a tie and goes to even: 0
    assert not scales.any() and not codes.any()


def test_largest_scale_and_overflow() -> None:
    _, scales = quantize_rows(group(127 * 65504.0), "w")
    assert scales.tolist() == [[65504.0]]
    with pytest.raises(ModelFormatError, match=r"'blk\.3\.ffn_up'.*overflow"):
        quantize_rows(group(127 * 65520.0), "blk.3.ffn_up")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_must_be_finite(value: float) -> None:
    with pytest.raises(ModelFormatError, match=r"'w'.*not finite"):
        quantize_rows(group(1.0, value), "w")


def test_code_minus_128_does_not_occur() -> None:
    rows = np.random.default_rng(1).standard_normal((512, 64)).astype(np.float32)
    rows *= np.exp2(np.random.default_rng(2).integers(-40, 10, (512, 1))).astype(np.float32)
    assert quantize_rows(rows, "w")[0].min() == -127


def test_quantizer_equals_the_specification_one_weight_at_a_time() -> None:
    rng = np.random.default_rng(3)
    rows = (rng.standard_normal((5, 130)) * rng.choice([1e-6, 1, 1e4], (5, 130))).astype("f4")
    codes, scales = quantize_rows(rows, "w")
    assert codes.shape == (5, 3, 64)
    for r in range(5):
        for g in range(3):
            part = rows[r, 64 * g : 64 * g + 64]
            scale = np.float16(np.float32(max(abs(w) for w in part)) / np.float32(127))
            assert scales[r, g] == scale
            for k, w in enumerate(part):
                q = np.rint(np.float32(w) / np.float32(scale)) if scale else 0
                assert codes[r, g, k] == min(max(q, -127), 127)
            assert not codes[r, g, len(part) :].any()


def test_requantizing_is_exact_for_normal_scales() -> None:
    rows = np.random.default_rng(4).standard_normal((48, 128)).astype(np.float32)
    codes, scales = quantize_rows(rows, "w")
    back = dequantize(*to_panels(codes, scales), 48, 128)
    again, scales_again = quantize_rows(back, "w")
    assert np.array_equal(codes, again) and np.array_equal(scales, scales_again)


# ---------------------------------------------------------------------------- section 3


def test_panel_layout() -> None:
    codes = np.arange(18 * 2 * 64).reshape(18, 2, 64).astype(np.int8)
    scales = np.arange(36, dtype=np.float16).reshape(18, 2)
    panels, panel_scales = to_panels(codes, scales)
    assert panels.shape == (2, 2, 16, 16, 4) and panel_scales.shape == (2, 2, 16)
    for row, column in [(0, 0), (3, 5), (15, 127), (16, 64), (17, 63)]:
        place = (row // 16, column // 64, column % 64 // 4, row % 16, column % 4)
        assert panels[place] == codes[row, column // 64, column % 64]
        assert panel_scales[row // 16, column // 64, row % 16] == scales[row, column // 64]
    assert not panels[1, :, :, 2:].any() and not panel_scales[1, :, 2:].any()
    back, scales_back = from_panels(panels, panel_scales)
    assert np.array_equal(back[:18], codes) and np.array_equal(scales_back[:18], scales)


def test_gate_and_up_alternate_by_panel_each_padded_by_itself() -> None:
    gate = np.arange(20 * 64, dtype=np.float32).reshape(20, 64) + 1
    rows = AlternatingPanels(ArrayRows("g", gate), ArrayRows("u", -gate))
    whole = rows.read_rows(0, 64)
    assert rows.rows == 64
    assert np.array_equal(whole[0:16], gate[:16]) and np.array_equal(whole[16:32], -gate[:16])
    assert np.array_equal(whole[32:36], gate[16:]) and np.array_equal(whole[48:52], -gate[16:])
    assert not whole[36:48].any() and not whole[52:].any()
    assert np.array_equal(rows.read_rows(32, 64), whole[32:])


def test_stacked_rows_in_any_cut() -> None:
    parts = [np.full((n, 4), n, np.float32) for n in (3, 1, 5)]
    stacked = StackedRows([ArrayRows("x", part) for part in parts])
    whole = np.concatenate(parts)
    for a in range(9):
        for b in range(a + 1, 10):
            assert np.array_equal(stacked.read_rows(a, b), whole[a:b])


# ---------------------------------------------------------------------------- sections 1 and 2

TINY = FrozenConfig(
    architecture="LlamaForCausalLM", dim=4, hidden_dim=2, n_layers=1, n_heads=1, n_kv_heads=1,
    head_dim=4, vocab_size=3, max_seq_len=8, norm_eps=1e-5, tie_embeddings=True,
    qkv_bias=False, o_bias=False, qk_norm=False, layers=(LayerSpec(),), bos_token_id=None, eos_token_ids=(2,),
)  # fmt: skip


def write_tiny(path: Path) -> Path:
    """A file whose every code is 1 and every float 2."""
    with FrozenWriter(path, TINY, {"tokenizer.json": b"{}"}, name="tiny", source="test") as writer:
        for name, spec in stored_tensors(TINY).items():
            value = {"I8": b"\1", "F16": b"\0\x40", "F32": b"\0\0\0\x40"}[spec.dtype]
            writer.write(name, [value * (spec.nbytes // len(value))])
    return path


def test_a_tiny_file_byte_by_byte(tmp_path: Path) -> None:
    """Written out once more by hand, from the text of the format alone."""
    matrix = [("codes", "I8", [1, 1, 16, 16, 4], 1024), ("scales", "F16", [32], 64)]
    layout = [(f"tok_embeddings.{p}", d, s, n) for p, d, s, n in matrix]
    layout += [("layers.0.attention_norm", "F32", [16], 64)]
    layout += [(f"layers.0.wqkv.{p}", d, s, n) for p, d, s, n in matrix]
    layout += [(f"layers.0.wo.{p}", d, s, n) for p, d, s, n in matrix]
    layout += [("layers.0.ffn_norm", "F32", [16], 64)]
    layout += [
        ("layers.0.w_gate_up.codes", "I8", [2, 1, 16, 16, 4], 2048),
        ("layers.0.w_gate_up.scales", "F16", [32], 64),
    ]
    layout += [(f"layers.0.w_down.{p}", d, s, n) for p, d, s, n in matrix]
    layout += [("norm", "F32", [16], 64), ("rope.0.inv_freq", "F32", [16], 64)]
    fill = {"I8": b"\1", "F16": b"\0\x40", "F32": b"\0\0\0\x40"}
    body = {name: fill[dtype] * (size // len(fill[dtype])) for name, dtype, _, size in layout}
    config = b"""{
 "requires": [],
 "architecture": "LlamaForCausalLM",
 "dim": 4,
 "hidden_dim": 2,
 "n_layers": 1,
 "n_heads": 1,
 "n_kv_heads": 1,
 "head_dim": 4,
 "vocab_size": 3,
 "max_seq_len": 8,
 "norm_eps": 1e-05,
 "tie_embeddings": true,
 "qkv_bias": false,
 "o_bias": false,
 "qk_norm": false,
 "layers": {"window": 0, "rope": 0, "norm": "rmsnorm", "activation": "swiglu"},
 "bos_token_id": null,
 "eos_token_ids": [2],
 "kinds": {"default": "int8_g64"}
}"""
    attachments = {
        "config.json": config.ljust(-(-len(config) // 64) * 64),
        "tokenizer.json": b"{}".ljust(64),
        "golden.json": b"{}".ljust(8192),
    }
    sums = {n: hashlib.sha256(data).hexdigest() for n, data in {**body, **attachments}.items()}
    text = json.dumps(sums, indent=0).encode()
    attachments["checksums.json"] = text.ljust(-(-len(text) // 64) * 64)
    header = (
        '{"__metadata__":{"format":"pyengine","format_version":"2","name":"tiny",'
        '"source":"test","generator":"pyengine"}'
    )
    offset = 0
    for name, dtype, shape, size in layout + [(n, "U8", [len(d)], len(d)) for n, d in attachments.items()]:
        sizes = ",".join(map(str, shape))
        header += f',"{name}":{{"dtype":"{dtype}","shape":[{sizes}],'
        header += f'"data_offsets":[{offset},{offset + size}]}}'
        offset += size
    header += "}"
    header = header.ljust(-(-(len(header) + 8) // 64) * 64 - 8)
    expected = struct.pack("<Q", len(header)) + header.encode()
    expected += b"".join(body.values()) + b"".join(attachments.values())
    assert write_tiny(tmp_path / "tiny.safetensors").read_bytes() == expected
    # and it is what it was when format version 2 was fixed
    digest = hashlib.sha256(expected).hexdigest()
    assert digest == "ed8fd5bdaa7d40fe45f644e1c5b0c55edd128cf4e85f17f3bb57129bcc3615a9"


def test_every_safetensors_tool_reads_the_file(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors", reason="the safetensors package is optional")
    with safetensors.safe_open(write_tiny(tmp_path / "t.safetensors"), "numpy") as file:
        assert "layers.0.wqkv.codes" in file.keys()  # noqa: SIM118  # not a mapping
        assert file.metadata()["format"] == "pyengine"


def test_tensors_start_on_64_bytes_and_attachments_lose_their_padding(tmp_path: Path) -> None:
    with FrozenFile.open(write_tiny(tmp_path / "t.safetensors")) as frozen:
        assert all(offset % 64 == 0 for offset, _ in frozen.tensors.values())
        assert frozen.attachment("golden.json") == b"{}"
        assert frozen.attachment("chat_template.jinja") is None
        assert frozen.attachment("norm") is None
        assert frozen.config == TINY
