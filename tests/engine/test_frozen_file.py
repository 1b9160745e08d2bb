"""The frozen file's reader: whatever is wrong is a ModelFormatError that says what."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine.freeze_models import LLAMA, write_hf

from pyengine import golden
from pyengine.errors import ModelFormatError, UnsupportedModelError
from pyengine.format.container import StoredTensor, build_header
from pyengine.format.reader import FrozenFile, verify_checksums
from pyengine.freeze import freeze


@pytest.fixture(scope="module")
def frozen_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("frozen")
    config = LLAMA | {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 20}
    path = freeze(write_hf(directory / "hf", config), directory / "model.safetensors")
    return path.read_bytes()


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def with_header(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text = text.ljust(-(-(len(text) + 8) // 64) * 64 - 8)
    return len(text).to_bytes(8, "little") + text + body


def refused(tmp_path: Path, data: bytes, match: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    for use_mmap in (True, False):
        with pytest.raises(ModelFormatError, match=match):
            FrozenFile.open(path, use_mmap)


# ---------------------------------------------------------------------------- what is right


@pytest.mark.parametrize("use_mmap", [True, False])
def test_open_reads_what_was_written(tmp_path: Path, frozen_bytes: bytes, use_mmap: bool) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(frozen_bytes)
    with FrozenFile.open(path, use_mmap) as frozen:
        assert bytes(frozen.buffer) == frozen_bytes
        assert frozen.metadata["format"] == "pyengine"
        assert frozen.config.n_layers == 1
        assert all(ok for _, ok in verify_checksums(frozen))
        frozen.check_codes()


def test_a_view_outlives_close(tmp_path: Path, frozen_bytes: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(frozen_bytes)
    frozen = FrozenFile.open(path)
    view = memoryview(frozen.buffer)
    frozen.close()
    frozen.close()
    assert bytes(view) == frozen_bytes


def test_opening_imports_nothing_heavy(tmp_path: Path, frozen_bytes: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(frozen_bytes)
    code = (
        "import sys; from pyengine.format.reader import FrozenFile; FrozenFile.open(sys.argv[1]); "
        "print([m for m in ('numpy', 'tokenizers', 'gguf', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------- damage


def test_every_truncation_is_refused(tmp_path: Path, frozen_bytes: bytes) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(frozen_bytes)
    header_end = 8 + int.from_bytes(frozen_bytes[:8], "little")
    rest = random.Random(1).sample(range(header_end, len(frozen_bytes)), 500)
    for size in sorted({*range(header_end + 1), *rest, len(frozen_bytes) - 1}, reverse=True):
        os.truncate(path, size)
        with pytest.raises(ModelFormatError):
            FrozenFile.open(path)


def test_appended_bytes_are_refused(tmp_path: Path, frozen_bytes: bytes) -> None:
    refused(tmp_path, frozen_bytes + bytes(64), "the file at")


def test_mutated_headers_never_do_worse_than_raise(tmp_path: Path, frozen_bytes: bytes) -> None:
    rng = random.Random(2)
    path = tmp_path / "mutant.safetensors"
    path.write_bytes(frozen_bytes)
    n = int.from_bytes(frozen_bytes[:8], "little")
    opened = 0
    for _ in range(3000):
        mutant = bytearray(frozen_bytes)
        for _ in range(rng.randint(1, 4)):
            mutant[rng.randrange(8 + n)] = rng.choice(b'0123456789"[]{},: \xff\x00aA-.e')
        with open(path, "r+b") as target:  # in place: replacing a file costs some disks 5 ms
            target.write(mutant)
        try:
            FrozenFile.open(path).close()
            opened += 1  # a changed source name, a space in the padding, …
        except (ModelFormatError, UnsupportedModelError):
            pass
    assert opened < 1500


def test_mutated_configs_never_do_worse_than_raise(tmp_path: Path, frozen_bytes: bytes) -> None:
    rng = random.Random(3)
    path = tmp_path / "mutant.safetensors"
    path.write_bytes(frozen_bytes)
    with FrozenFile.open(path) as frozen:
        offset, size = frozen.tensors["config.json"]
    opened = 0
    for _ in range(3000):
        config = bytearray(frozen_bytes[offset : offset + size].rstrip())
        for _ in range(rng.randint(1, 4)):
            config[rng.randrange(len(config))] = rng.choice(b'0123456789"[]{},: \xff\x00aA-.e')
        with open(path, "r+b") as target:
            target.seek(offset)
            target.write(config)
        try:
            FrozenFile.open(path).close()
            opened += 1  # another norm_eps, another max_seq_len, …
        except (ModelFormatError, UnsupportedModelError):
            pass
    assert opened < 1500


def test_a_flipped_weight_fails_its_checksum(tmp_path: Path, frozen_bytes: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(frozen_bytes)
    with FrozenFile.open(path) as frozen:
        offset, _ = frozen.tensors["layers.0.wo.codes"]
    damaged = bytearray(frozen_bytes)
    damaged[offset] ^= 1
    path.write_bytes(damaged)
    with FrozenFile.open(path) as frozen:
        assert [n for n, ok in verify_checksums(frozen) if not ok] == ["layers.0.wo.codes"]


def test_code_minus_128_is_refused(tmp_path: Path, frozen_bytes: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(frozen_bytes)
    with FrozenFile.open(path) as frozen:
        offset, size = frozen.tensors["layers.0.w_down.codes"]
    damaged = bytearray(frozen_bytes)
    damaged[offset + size - 1] = 0x80
    path.write_bytes(damaged)
    with (
        FrozenFile.open(path) as frozen,
        pytest.raises(ModelFormatError, match=r"layers\.0\.w_down\.codes.*-128"),
    ):
        frozen.check_codes()


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ModelFormatError, match="not a regular file"):
        FrozenFile.open(tmp_path / "fifo")
    with pytest.raises(FileNotFoundError):
        FrozenFile.open(tmp_path / "nothing")


# ---------------------------------------------------------------------------- lies in the header


@pytest.mark.parametrize("length", [0, 1, (16 << 20) + 1, 1 << 63, (1 << 64) - 1])
def test_header_length_cap(tmp_path: Path, frozen_bytes: bytes, length: int) -> None:
    refused(tmp_path, length.to_bytes(8, "little") + frozen_bytes[8:], "header length|truncated")


def test_header_bloat_with_too_many_tensors(tmp_path: Path) -> None:
    """safetensors bug class: 100,000 empty tensors inside the size cap."""
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    refused(tmp_path, with_header({f"t{i}": entry for i in range(65_537)}, b""), "at most 65536")


def test_deeply_nested_json_does_not_overflow_the_stack(tmp_path: Path) -> None:
    refused(tmp_path, with_header(b'{"a":' + b"[" * 200_000, b""), "not valid JSON")


def test_duplicate_keys(tmp_path: Path, frozen_bytes: bytes) -> None:
    n = int.from_bytes(frozen_bytes[:8], "little")
    text = frozen_bytes[8 : 8 + n].rstrip()
    entry = b',"norm":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    refused(tmp_path, with_header(text[:-1] + entry, frozen_bytes[8 + n :]), "'norm' occurs twice")


Edit = Callable[[dict[str, Any]], None]


def edit_norm(**changes: Any) -> Edit:
    return lambda header: header["norm"].update(changes)


def shift_norm(delta: int) -> Edit:
    def edit(header: dict[str, Any]) -> None:
        begin, end = header["norm"]["data_offsets"]
        header["norm"]["data_offsets"] = [begin + delta, end + delta]

    return edit


def rename(old: str, new: str) -> Edit:
    def edit(header: dict[str, Any]) -> None:
        items = [(new if name == old else name, entry) for name, entry in header.items()]
        header.clear()
        header.update(items)

    return edit


def swap_order(header: dict[str, Any]) -> None:
    items = list(header.items())
    items[1], items[2] = items[2], items[1]
    header.clear()
    header.update(items)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (edit_norm(dtype="F16"), "shape needs"),
        (edit_norm(dtype="F99"), "unknown dtype 'F99'"),
        (edit_norm(dtype=["F32"]), "unknown dtype"),
        (edit_norm(dtype="I32"), "'norm' is I32"),
        (edit_norm(shape=[4, 4]), r"'norm' is F32 \[4, 4\]"),
        (edit_norm(shape=[-1, -16]), "bad size"),
        (edit_norm(shape=[1 << 63, 1 << 63]), "bad size"),
        (edit_norm(shape=[True]), "bad size"),
        (edit_norm(shape=[1.0]), "bad size"),
        (edit_norm(shape=[1] * 100), "at most 8"),
        (edit_norm(shape="16"), "shape must be a list"),
        (edit_norm(data_offsets=[0]), "two integers"),
        (edit_norm(data_offsets=[-64, 0]), "outside"),
        (edit_norm(data_offsets=[1 << 62, (1 << 62) + 64]), "outside"),
        (edit_norm(data_offsets=[64, 0]), "outside"),
        (edit_norm(data_offsets=[0, 64]), "overlaps"),
        (edit_norm(extra=1), "exactly dtype"),
        (shift_norm(64), "hole|overlaps|outside"),
        (shift_norm(-64), "overlaps"),
        (rename("norm", "abnormal"), "'norm' is missing"),
        (rename("norm", "n" * 300), "1..256 bytes"),
        (rename("golden.json", "golden.txt"), "unknown tensor|missing"),
        (rename("tokenizer.json", "tokenizer_config.json"), "'tokenizer.json' is missing"),
        (swap_order, "order"),
        (lambda h: h["__metadata__"].update(format="pt"), "not a frozen"),
        (lambda h: h["__metadata__"].update(format_version="3"), "format_version '3'.*freeze the model again from its source"),
        (lambda h: h["__metadata__"].update(name=1), "strings to strings"),
        (lambda h: h.pop("__metadata__"), "not a frozen"),
        (lambda h: h.update(norm=[]), "exactly dtype"),
    ],
)
def test_lies_in_the_header(tmp_path: Path, frozen_bytes: bytes, edit: Edit, match: str) -> None:
    header, body = header_of(frozen_bytes)
    edit(header)
    refused(tmp_path, with_header(header, body), match)


# ---------------------------------------------------------------------------- what a reader may ignore

Tensor = tuple[StoredTensor, bytes]


def tensors_of(data: bytes) -> dict[str, Tensor]:
    header, body = header_of(data)
    header.pop("__metadata__")
    return {
        name: (StoredTensor(entry["dtype"], tuple(entry["shape"]), end - begin), body[begin:end])
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def file_of(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    header = build_header({name: spec for name, (spec, _) in tensors.items()}, metadata)
    return header + b"".join(content for _, content in tensors.values())


def with_tensor(data: bytes, before: str, name: str, tensor: Tensor) -> bytes:
    """The file with one more tensor, which lies before another one."""
    tensors: dict[str, Tensor] = {}
    for other, content in tensors_of(data).items():
        if other == before:
            tensors[name] = tensor
        tensors[other] = content
    return file_of(tensors, header_of(data)[0]["__metadata__"])


EXTRA: Tensor = (StoredTensor("F64", (2, 4), 64), bytes(range(64)))


def test_extra_tensors_are_carried_and_ignored(tmp_path: Path, frozen_bytes: bytes) -> None:
    data = frozen_bytes
    for name in ("extra.heads", "extra.x.codes", "extra."):
        data = with_tensor(data, "config.json", name, EXTRA)
    config = b'{"extra": {"for": "somebody"}, ' + tensors_of(data)["config.json"][1].strip()[1:]
    config = config.ljust(-(-len(config) // 64) * 64)
    tensors = tensors_of(data)
    tensors["config.json"] = (StoredTensor("U8", (len(config),), len(config)), config)
    path, plain = tmp_path / "model.safetensors", tmp_path / "plain.safetensors"
    path.write_bytes(file_of(tensors, header_of(data)[0]["__metadata__"]))
    plain.write_bytes(frozen_bytes)
    with FrozenFile.open(path) as frozen, FrozenFile.open(plain) as without:
        assert list(frozen.weights) == list(without.weights)
        assert frozen.config.extra == {"for": "somebody"}
        offset, size = frozen.tensors["extra.heads"]
        assert bytes(frozen.buffer[offset : offset + size]) == EXTRA[1]
    # the core is given the same: golden outputs are those of the file without
    assert golden.compute(path) == golden.compute(plain)


@pytest.mark.parametrize(
    ("before", "name", "match"),
    [
        ("config.json", "heads", "unknown tensor 'heads'"),
        ("config.json", "layers.0.extra.x", "unknown tensor"),
        ("norm", "extra.x", "order"),
        ("tok_embeddings.codes", "extra.x", "order"),
        ("golden.json", "extra.x", "order"),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, frozen_bytes: bytes, before: str, name: str, match: str) -> None:
    refused(tmp_path, with_tensor(frozen_bytes, before, name, EXTRA), match)


def test_extra_tensors_are_padded_too(tmp_path: Path, frozen_bytes: bytes) -> None:
    odd = (StoredTensor("U8", (3,), 3), b"abc")
    refused(tmp_path, with_tensor(frozen_bytes, "config.json", "extra.x", odd), "not padded")


def test_what_a_later_file_requires_is_named(tmp_path: Path, frozen_bytes: bytes) -> None:
    path = tmp_path / "later.safetensors"
    tensors = tensors_of(frozen_bytes)
    config = tensors["config.json"][1].replace(b'"requires": [],', b'"requires":["experts"],').strip()
    config = config.ljust(-(-len(config) // 64) * 64)
    tensors["config.json"] = (StoredTensor("U8", (len(config),), len(config)), config)
    tensors["layers.0.experts"] = EXTRA  # told before a tensor that is not known
    path.write_bytes(file_of(tensors, header_of(frozen_bytes)[0]["__metadata__"]))
    with pytest.raises(UnsupportedModelError, match=r"later\.safetensors: config: .* 'experts'"):
        FrozenFile.open(path)


def test_tensors_must_start_on_64_bytes(tmp_path: Path, frozen_bytes: bytes) -> None:
    header, body = header_of(frozen_bytes)
    text = json.dumps(header).encode().ljust(64 * 200 + 1)
    data = len(text).to_bytes(8, "little") + text + body
    refused(tmp_path, data, "multiple of 64")


def test_the_file_must_fit_its_config(tmp_path: Path, frozen_bytes: bytes) -> None:
    damaged = frozen_bytes.replace(b'"n_layers": 1', b'"n_layers": 2')
    refused(tmp_path, damaged, r"'layers\.1\.attention_norm' is missing")
    damaged = frozen_bytes.replace(b'"qk_norm": false', b'"qk_norm": true ')
    refused(tmp_path, damaged, r"'layers\.0\.q_norm' is missing")
