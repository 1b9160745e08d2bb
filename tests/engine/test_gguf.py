"""The GGUF header parser: what it reads, and what hostile files cannot make it do."""

from __future__ import annotations

import os
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from engine.gguf_bytes import ARRAY, BOOL, F32, STRING, U32, Tensor, array, gguf_bytes, key, string, value

from pyengine.errors import ModelFormatError, UnsupportedModelError
from pyengine.freeze.gguf import BLOCK_TYPES, GGUFFile

GOOD = gguf_bytes(
    [
        key("general.architecture", STRING, string("llama")),
        key("a.u32", U32, value(U32, 7)),
        key("a.f32", F32, value(F32, 0.5)),
        key("a.bool", BOOL, value(BOOL, True)),
        key("a.strings", ARRAY, array(STRING, ["é", "", "xyz"])),
        key("a.numbers", ARRAY, array(U32, [1, 2, 3])),
    ],
    [("w", [32, 2], 8, 0), ("v", [8], 0, 96)],
    bytes(range(96)) + np.arange(8, dtype="<f4").tobytes(),
)


def parsed(tmp_path: Path, data: bytes) -> GGUFFile:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return GGUFFile(path)


def refused(tmp_path: Path, data: bytes, match: str) -> None:
    with pytest.raises(ModelFormatError, match=match):
        parsed(tmp_path, data)


# ---------------------------------------------------------------------------- what it reads


@pytest.mark.parametrize("version", [2, 3])
def test_reads_every_kind_of_value(tmp_path: Path, version: int) -> None:
    file = parsed(tmp_path, GOOD[:4] + struct.pack("<I", version) + GOOD[8:])
    numbers = file.metadata.pop("a.numbers")
    assert file.metadata == {
        "general.architecture": "llama",
        "a.u32": 7,
        "a.f32": 0.5,
        "a.bool": True,
        "a.strings": ["é", "", "xyz"],
    }
    assert numbers.tolist() == [1, 2, 3]
    assert file.shapes == {"w": (2, 32), "v": (8,)}
    assert file.vector("v").tolist() == list(range(8))
    file.close()


def test_the_packages_own_writer_and_reader_agree(tmp_path: Path) -> None:
    import gguf
    from engine.freeze_models import LLAMA, write_gguf

    config = LLAMA | {"intermediate_size": 96}
    path = write_gguf(tmp_path / "m.gguf", config, quantization="Q8_0", extra={"x.y": "z"})
    file, reference = GGUFFile(path), gguf.GGUFReader(path)
    for name, field in reference.fields.items():
        if not name.startswith("GGUF."):
            ours = file.metadata[name]
            assert (ours.tolist() if isinstance(ours, np.ndarray) else ours) == field.contents()
    for tensor in reference.tensors:
        ours = file.tensors[tensor.name]
        assert (ours.offset, ours.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert ours.type.name == tensor.tensor_type.name
        assert list(ours.shape) == tensor.shape.tolist()[::-1]
    file.close()


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_rows_in_chunks_equal_the_packages_dequantizer(tmp_path: Path, kind: int) -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    block = BLOCK_TYPES[kind]
    reference = GGMLQuantizationType(kind)
    assert reference.name == block.name
    assert GGML_QUANT_SIZES[reference] == (block.items, block.nbytes)
    row_bytes = 256 // block.items * block.nbytes
    # small bytes: as f16 scales or floats they are finite
    data = np.random.default_rng(kind).integers(0, 100, (6, row_bytes), np.uint8)
    file = parsed(tmp_path, gguf_bytes(tensors=[("w", [256, 6], kind, 0)], data=data.tobytes()))
    rows = file.matrix("w")
    ours = np.concatenate([rows.read_rows(0, 1), rows.read_rows(1, 5), rows.read_rows(5, 6)])
    if block.items == 1 and block.name != "BF16":
        data = data.view({"F32": np.float32, "F16": np.float16}[block.name])
    assert ours.dtype == np.float32
    assert np.array_equal(ours, dequantize(data, reference))
    file.close()


def test_large_vocabularies_parse_fast(tmp_path: Path) -> None:
    tokens = key("t", ARRAY, array(STRING, [f"token{i}" for i in range(262_144)]))
    merges = key("m", ARRAY, array(STRING, [f"a{i} b" for i in range(514_906)]))
    path = tmp_path / "big.gguf"
    path.write_bytes(gguf_bytes([tokens, merges]))
    start = time.process_time()
    file = GGUFFile(path)
    assert time.process_time() - start < 3  # 0.3 s where it was written; the slow reader takes 24
    assert len(file.metadata["t"]) == 262_144
    file.close()


# ---------------------------------------------------------------------------- damage


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(GOOD)
    for size in reversed(range(len(GOOD))):
        os.truncate(path, size)
        with pytest.raises((ModelFormatError, UnsupportedModelError)):
            GGUFFile(path)


def test_mutations_never_do_worse_than_raise(tmp_path: Path) -> None:
    rng = random.Random(4)
    path = tmp_path / "mutant.gguf"
    path.write_bytes(GOOD)
    for _ in range(5000):
        mutant = bytearray(GOOD)
        for _ in range(rng.randint(1, 4)):
            mutant[rng.randrange(len(GOOD) - 128)] = rng.choice([0, 1, 255, 127, 128, rng.randrange(256)])
        with open(path, "r+b") as target:  # in place: replacing a file costs some disks 5 ms
            target.write(mutant)
        try:
            file = GGUFFile(path)
        except (ModelFormatError, UnsupportedModelError):
            continue
        for tensor in file.tensors.values():
            assert tensor.offset + tensor.nbytes <= len(GOOD)
        file.close()


# ---------------------------------------------------------------------------- public bug classes


def test_cve_2024_21802_tensor_dimension_count(tmp_path: Path) -> None:
    """n_dims beyond the array that holds the dimensions (also gguf-tools #25, where an assert was
    the check).
    """
    for n in (0, 5, 8, 1 << 31):
        raw = string("w") + struct.pack("<I", n) + bytes(256)
        head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
        refused(tmp_path, head + raw, f"{n} dimensions")


def test_cve_2024_21825_array_of_unknown_type(tmp_path: Path) -> None:
    for kind in (13, 255, 1 << 31, ARRAY):
        raw = struct.pack("<IQ", kind, 1) + bytes(64)
        refused(tmp_path, gguf_bytes([key("a", ARRAY, raw)]), "unknown type")


def test_cve_2024_21836_number_of_tensors(tmp_path: Path) -> None:
    for n in (65_537, 1 << 32, (1 << 64) - 1):
        refused(tmp_path, gguf_bytes(counts=(n, 0)), "too many")


def test_cve_2024_23496_number_of_keys(tmp_path: Path) -> None:
    for n in (65_537, 1 << 60, (1 << 64) - 1):
        refused(tmp_path, gguf_bytes(counts=(0, n)), "too many")


def test_cve_2024_23605_array_length(tmp_path: Path) -> None:
    for n in (1 << 20, 1 << 61, (1 << 64) - 1):
        for kind in (U32, STRING, F32):
            raw = struct.pack("<IQ", kind, n)
            refused(tmp_path, gguf_bytes([key("a", ARRAY, raw)]), "too many|truncated")


def test_ggml_709_string_length(tmp_path: Path) -> None:
    for n in (1 << 10, (16 << 20) + 1, 1 << 63, (1 << 64) - 1):
        head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
        refused(tmp_path, head + struct.pack("<Q", n) + b"x" * 16, "claims|truncated")
        raw = struct.pack("<IQQ", STRING, 1, n)
        refused(tmp_path, gguf_bytes([key("a", ARRAY, raw)]), "claims")


def test_ggml_709_type_index(tmp_path: Path) -> None:
    refused(tmp_path, gguf_bytes([key("a", 99, bytes(8))]), "unknown type 99")
    with pytest.raises(UnsupportedModelError, match="'w': GGML type 99"):
        parsed(tmp_path, gguf_bytes(tensors=[("w", [32], 99, 0)]))


@pytest.mark.parametrize("dims", [[1 << 32, 1 << 32], [1 << 40] * 4, [1 << 62, 4], [32, 1 << 40]])
def test_cve_2025_53630_and_2026_27940_size_wraps(tmp_path: Path, dims: list[int]) -> None:
    refused(tmp_path, gguf_bytes(tensors=[("w", dims, 0, 0)], data=bytes(64)), "inside|bad dimensions")


@pytest.mark.parametrize("alignment", [0, 1, 3, 33, 1 << 17, 1 << 31])
def test_llamacpp_18674_alignment(tmp_path: Path, alignment: int) -> None:
    """An alignment of 0 or of 2^31 makes the padding arithmetic wrap."""
    keys = [key("general.alignment", U32, value(U32, alignment))]
    refused(tmp_path, gguf_bytes(keys, [("w", [32], 0, 0)], bytes(128)), "alignment")


def test_alignment_is_respected(tmp_path: Path) -> None:
    keys = [key("general.alignment", U32, value(U32, 64))]
    data = gguf_bytes(keys, [("v", [2], 0, 0)], struct.pack("<2f", 1, 2), alignment=64)
    file = parsed(tmp_path, data)
    assert file.tensors["v"].offset % 64 == 0 and file.vector("v").tolist() == [1, 2]
    file.close()


def test_ggml_1516_tiny_files_do_not_exhaust_memory(tmp_path: Path) -> None:
    """160 bytes, and 43: counts and lengths that promise gigabytes."""
    raw = struct.pack("<IQ", STRING, 1 << 24)
    for size in (43, 160):
        refused(tmp_path, gguf_bytes([key("a", ARRAY, raw)])[:size].ljust(size, b"\0"), "truncated")


def test_cve_2026_7482_tensor_range_outside_the_file(tmp_path: Path) -> None:
    """A tensor that claims more than the file has leaked heap in a peer's converter."""
    for offset in (64, 1 << 40, (1 << 64) - 32):
        refused(tmp_path, gguf_bytes(tensors=[("w", [16], 0, offset)], data=bytes(64)), "inside")
    refused(tmp_path, gguf_bytes(tensors=[("w", [17], 0, 0)], data=bytes(64)), "inside")
    refused(tmp_path, gguf_bytes(tensors=[("w", [4], 0, 4)], data=bytes(64)), "not aligned")


def test_overlapping_and_duplicate_tensors(tmp_path: Path) -> None:
    tensors: list[Tensor] = [("a", [16], 0, 0), ("b", [16], 0, 32)]
    refused(tmp_path, gguf_bytes(tensors=tensors, data=bytes(128)), "'a' and 'b' overlap")
    tensors = [("a", [16], 0, 0), ("a", [16], 0, 64)]
    refused(tmp_path, gguf_bytes(tensors=tensors, data=bytes(128)), "'a' occurs twice")


def test_duplicate_keys(tmp_path: Path) -> None:
    keys = [key("a", U32, value(U32, 1)), key("a", U32, value(U32, 2))]
    refused(tmp_path, gguf_bytes(keys), "'a' occurs twice")


def test_rows_that_are_not_whole_blocks(tmp_path: Path) -> None:
    refused(tmp_path, gguf_bytes(tensors=[("w", [31, 2], 8, 0)], data=bytes(96)), "whole blocks")


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    refused(tmp_path, gguf_bytes([key("a", STRING, string(b"\xff"))]), "not UTF-8")
    raw = struct.pack("<IQ", STRING, 1) + string(b"\xc3")
    refused(tmp_path, gguf_bytes([key("a", ARRAY, raw)]), "not UTF-8")


@pytest.mark.parametrize(
    ("version", "match"), [(0, "version 0"), (1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")]
)
def test_versions(tmp_path: Path, version: int, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        parsed(tmp_path, gguf_bytes(version=version))


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = parsed(tmp_path, GOOD)
    (tmp_path / "x.gguf").write_bytes(GOOD[:-8])
    with pytest.raises(ModelFormatError, match=r"'v'.*ends inside"):
        file.vector("v")
    file.close()
