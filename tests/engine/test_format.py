"""FORMAT.md as vectors: the quantizer, the panels, and a whole tiny file byte by byte."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from engine.freeze_models import ArrayRows
from reference import oracle, spec_ops

from pyengine.errors import ModelFormatError
from pyengine.format.config import FrozenConfig, LayerSpec
from pyengine.format.inventory import stored_tensors
from pyengine.format.quantize import dequantize, from_panels, hadamard, hadamard_exponent, quantize_rows, to_panels
from pyengine.format.reader import FrozenFile
from pyengine.format.writer import FrozenWriter
from pyengine.freeze.sources import AlternatingPanels, StackedRows


def group(*values: float) -> np.ndarray:
    """One row of 63 weights that starts with ``values``. An odd number: nothing is transformed."""
    row = np.zeros((1, 63), np.float32)
    row[0, : len(values)] = values
    return row


def codes_of(row: np.ndarray) -> list[int]:
    return quantize_rows(row, "w")[0].reshape(-1).tolist()


# ---------------------------------------------------------------------------- section 4: the Hadamard transform

BLOCKS = {1: 1, 2: 2, 24: 8, 64: 64, 96: 32, 100: 4, 576: 64}  # columns -> transformed together
# SHA-256 of T(x) for the x of ``hadamard_vector``, float32, little-endian
TRANSFORMED = {
    1: "50b57b10f599699ea8d0e51bf3a9240b6523769a839f2d789d0dcb4e98310246",
    2: "ac0f736737c28c7eed7cb8e4b4fb8d1bed66b0364d93dc8134dfec2c411e85e4",
    24: "d90033b10e1a2402bedbb294e8882211c04b752b5547818ba213084501b671e2",
    64: "f1b4c7730d2c968c54043d58ff2b93ed861357b90f7b6ad9aaa5fdc4b0c905e4",
    96: "3a9674f4dee560bdba4ad6aeff54d48d43d0fb31764f88bd5bfc73b34e3f88f9",
    100: "60e96654434e5279b0a9a60b33f55f62bc5133db635ffcea4ec87b3d0056c544",
    576: "02d6f00bd15d6d713c855768c9570ab11b6ed0cd9457ff6dd9e37b037a276e3d",
}


def hadamard_vector(columns: int) -> np.ndarray:
    """Float32 (2, columns) whose sums are rounded: from the raw stream of PCG64, which NumPy promises never to change."""
    raw = np.random.PCG64(columns).random_raw(2 * columns)
    return ((raw >> np.uint64(40)).astype(np.float32) - np.float32(2**23)).reshape(2, columns) * np.float32(2.0**-24)


def transformed_one_by_one(row: np.ndarray, block: int) -> np.ndarray:
    """The page's two lines, on scalars."""
    x = list(row)
    for start in range(0, len(x), block):
        h = 1
        while h < block:
            for i in range(start, start + block):
                if (i - start) & h == 0:
                    x[i], x[i + h] = x[i] + x[i + h], x[i] - x[i + h]
            h *= 2
    return np.array(x, np.float32)


def test_hadamard_transforms_by_hand() -> None:
    def transformed(*values: float) -> list[float]:
        return hadamard(np.array([values], np.float32), 0)[0].tolist()

    assert transformed(3) == [3]
    assert transformed(3, 5) == [8, -2]
    assert transformed(3, 5, 7) == [3, 5, 7]
    assert transformed(1, 2, 3, 4) == [10, -2, -4, 0]
    assert transformed(1, 2, 3, 4, 5, 6) == [3, -1, 7, -1, 11, -1]
    assert transformed(0, 0, 0, 0, 0, 0, 1, 0) == [1, 1, -1, -1, -1, -1, 1, 1]
    # 2^24 + 1 rounds to 2^24; pairs with h = 2 first would give 2^24, 2^24 - 1, 2^24, 2^24 - 2
    assert transformed(2**24, 1, 1, 0) == [2**24, 2**24, 2**24 - 1, 2**24 - 2]


@pytest.mark.parametrize("columns", BLOCKS)
def test_hadamard_vectors(columns: int) -> None:
    """The order of the additions, in all three programs that have one; and the bits, for those that are not here."""
    x = hadamard_vector(columns)
    wanted = np.array([transformed_one_by_one(row, BLOCKS[columns]) for row in x])
    assert 2 ** hadamard_exponent(columns) == BLOCKS[columns]
    for got in (hadamard(x, 0), spec_ops.hadamard(x), oracle.hadamard_f32(x)):
        assert got.dtype == np.float32 and np.array_equal(got, wanted)
    assert np.array_equal(hadamard(x, -3), wanted / 8)
    assert hashlib.sha256(wanted.astype("<f4").tobytes()).hexdigest() == TRANSFORMED[columns]


@pytest.mark.parametrize("columns", [*range(1, 20), *BLOCKS, 4096])
def test_transforming_twice_multiplies_by_the_block_and_keeps_dot_products(columns: int) -> None:
    rng = np.random.default_rng(columns)
    x, w = rng.integers(-100, 101, (2, 7, columns)).astype(np.float32)
    block = max(b for b in (1, 2, 4, 8, 16, 32, 64) if columns % b == 0)
    assert np.array_equal(hadamard(hadamard(x, 0), 0), block * x)
    transformed = hadamard(x, 0).astype(np.float64) @ hadamard(w, 0).T.astype(np.float64)
    assert np.array_equal(transformed, block * (x.astype(np.float64) @ w.T.astype(np.float64)))


def test_any_number_of_rows_is_transformed_alike() -> None:
    """More than what is transformed at a time, and a part of it; one block; and the source stays as it was."""
    x = hadamard_vector(576)[:1].repeat(1001, axis=0)
    x.flags.writeable = False
    assert np.array_equal(hadamard(x, 0), hadamard(x[:1], 0).repeat(1001, axis=0))
    assert np.array_equal(hadamard(x[:1, 64:128], 0), hadamard(x[:1], 0)[:, 64:128])


def test_one_large_weight_is_spread_over_its_block() -> None:
    """508 among 64 zeros, transformed: 64 times 508 / 8, and the codes hold it exactly."""
    row = np.zeros((1, 64), np.float32)
    row[0, 5] = 508
    codes, scales = quantize_rows(row, "w")
    assert scales.tolist() == [[0.5]] and (abs(codes) == 127).all()
    assert np.array_equal(dequantize(*to_panels(codes, scales), 1, 64), row)


# ---------------------------------------------------------------------------- section 4: weights


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
    row = np.eye(1, 64, dtype=np.float32) * np.float32(127 * 65504.0 * 8)
    assert quantize_rows(row, "w")[1].tolist() == [[65504.0]]
    with pytest.raises(ModelFormatError, match=r"'blk\.3\.ffn_up'.*overflow"):
        quantize_rows(group(127 * 65520.0), "blk.3.ffn_up")
    with pytest.raises(ModelFormatError, match=r"'w'.*too large"):
        quantize_rows(np.full((1, 64), 3e38, np.float32), "w")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_must_be_finite(value: float) -> None:
    for columns in (63, 64, 96):
        row = np.ones((1, columns), np.float32)
        row[0, 7] = value
        with pytest.raises(ModelFormatError, match=r"'w'.*not finite"):
            quantize_rows(row, "w")


def test_code_minus_128_does_not_occur() -> None:
    rows = np.random.default_rng(1).standard_normal((512, 64)).astype(np.float32)
    rows *= np.exp2(np.random.default_rng(2).integers(-40, 10, (512, 1))).astype(np.float32)
    assert quantize_rows(rows, "w")[0].min() == -127


def test_quantizer_equals_the_specification_one_weight_at_a_time() -> None:
    """132 columns: blocks of 4, three groups, the last one partial."""
    rng = np.random.default_rng(3)
    rows = (rng.standard_normal((5, 132)) * rng.choice([1e-6, 1, 1e4], (5, 132))).astype("f4")
    codes, scales = quantize_rows(rows, "w")
    assert codes.shape == (5, 3, 64)
    for r in range(5):
        transformed = transformed_one_by_one(rows[r], 4) / 2
        for g in range(3):
            part = transformed[64 * g : 64 * g + 64]
            scale = np.float16(np.float32(max(abs(w) for w in part)) / np.float32(127))
            assert scales[r, g] == scale
            for k, w in enumerate(part):
                q = np.rint(np.float32(w) / np.float32(scale)) if scale else 0
                assert codes[r, g, k] == min(max(q, -127), 127)
            assert not codes[r, g, len(part) :].any()


@pytest.mark.parametrize("columns", [63, 96, 100, 128])
def test_requantizing_is_exact_for_normal_scales(columns: int) -> None:
    """A sum of 64 products of a code and one scale has 24 bits: what is read back is exact, and transforms to the same codes."""
    rows = np.random.default_rng(4).standard_normal((48, columns)).astype(np.float32)
    codes, scales = quantize_rows(rows, "w")
    back = dequantize(*to_panels(codes, scales), 48, columns)
    assert np.array_equal(back, oracle.dequantize_weight(rows))
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


def test_a_tensor_of_several_parts_is_named_once() -> None:
    x, y = (ArrayRows(name, np.zeros((16, 4), np.float32)) for name in "xy")
    assert StackedRows([x, y, y]).name == "x + y" and AlternatingPanels(x, x).name == "x"


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
        '{"__metadata__":{"format":"pyengine","format_version":"4","name":"tiny",'
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
    # and it is what it was when format version 4 was fixed
    digest = hashlib.sha256(expected).hexdigest()
    assert digest == "7078efef6dc0db10c6fe6cfc9113ef2a520f70db9cbb9457df506b6b573997eb"


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
