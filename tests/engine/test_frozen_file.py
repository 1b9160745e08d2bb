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

from pyengine.errors import ModelFormatError
from pyengine.format.config import FrozenConfig
from pyengine.format.reader import FrozenFile, verify_checksums
from pyengine.freeze import freeze

CONFIG: dict[str, Any] = {
    "architecture": "LlamaForCausalLM", "dim": 64, "hidden_dim": 88, "n_layers": 2, "n_heads": 4,
    "n_kv_heads": 2, "head_dim": 16, "vocab_size": 300, "max_seq_len": 128, "norm_eps": 1e-5,
    "sliding_window": 0, "tie_embeddings": False, "qkv_bias": False, "o_bias": False,
    "qk_norm": False, "bos_token_id": 256, "eos_token_ids": [257],
}  # fmt: skip


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
        except ModelFormatError:
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
        (rename("norm", "abnormal"), "unknown tensor 'abnormal'"),
        (rename("norm", "n" * 300), "1..256 bytes"),
        (rename("golden.json", "golden.txt"), "unknown tensor|missing"),
        (rename("tokenizer.json", "tokenizer_config.json"), "'tokenizer.json' is missing"),
        (swap_order, "order"),
        (lambda h: h["__metadata__"].update(format="pt"), "not a frozen"),
        (lambda h: h["__metadata__"].update(format_version="2"), "format_version '2'"),
        (lambda h: h["__metadata__"].update(name=1), "strings to strings"),
        (lambda h: h.pop("__metadata__"), "not a frozen"),
        (lambda h: h.update(norm=[]), "exactly dtype"),
    ],
)
def test_lies_in_the_header(tmp_path: Path, frozen_bytes: bytes, edit: Edit, match: str) -> None:
    header, body = header_of(frozen_bytes)
    edit(header)
    refused(tmp_path, with_header(header, body), match)


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


# ---------------------------------------------------------------------------- configuration


def test_config_round_trip() -> None:
    config = FrozenConfig.from_json(json.dumps(CONFIG))
    assert config.eos_token_ids == (257,) and config.q_dim == 64 and config.kv_dim == 32
    assert FrozenConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", ""), ("architecture", 5), ("dim", 0), ("dim", -64), ("dim", 1 << 21),
        ("dim", 64.0), ("dim", True), ("dim", "64"), ("dim", None), ("dim", 1 << 64),
        ("hidden_dim", 0), ("n_layers", 0), ("n_layers", 4097), ("n_heads", 0), ("n_heads", 1 << 17),
        ("n_kv_heads", 3), ("n_kv_heads", 0), ("head_dim", 15), ("head_dim", 514), ("head_dim", 0),
        ("vocab_size", (1 << 24) + 1), ("max_seq_len", 0), ("max_seq_len", (1 << 24) + 1),
        ("norm_eps", 0.0), ("norm_eps", 2.0), ("norm_eps", "x"), ("norm_eps", None),
        ("sliding_window", -1), ("tie_embeddings", 1), ("qkv_bias", None), ("o_bias", "no"),
        ("qk_norm", 0), ("bos_token_id", 300), ("bos_token_id", -1), ("bos_token_id", 1.0),
        ("eos_token_ids", [300]), ("eos_token_ids", 257), ("eos_token_ids", [None]),
        ("eos_token_ids", [0] * 257),
    ],
)  # fmt: skip
def test_config_errors_name_the_field(key: str, value: Any) -> None:
    with pytest.raises(ModelFormatError, match=f"config: .*{key}"):
        FrozenConfig.from_json(json.dumps(CONFIG | {key: value}))


def test_config_keys_are_exact() -> None:
    with pytest.raises(ModelFormatError, match="unknown key 'window'"):
        FrozenConfig.from_json(json.dumps(CONFIG | {"window": 1}))
    with pytest.raises(ModelFormatError, match="'dim' is missing"):
        FrozenConfig.from_json(json.dumps({k: v for k, v in CONFIG.items() if k != "dim"}))
    with pytest.raises(ModelFormatError, match="NaN is not JSON"):
        FrozenConfig.from_json(json.dumps(CONFIG | {"norm_eps": float("nan")}))
    with pytest.raises(ModelFormatError, match="not a JSON object"):
        FrozenConfig.from_json("[]")
    with pytest.raises(ModelFormatError, match="not valid JSON"):
        FrozenConfig.from_json(b"\xff\xfe")
