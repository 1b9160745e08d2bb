"""What may lie where a model file is expected, and what a frozen file may be called."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from engine import cli_tools, gguf_bytes
from engine.cli_tools import run_process
from engine.freeze_models import LLAMA, random_tensors, safetensors_bytes, write_hf
from engine.test_freeze_llama2c import write_llama2c

import pyengine
from pyengine import files
from pyengine.errors import (
    ExistingFileError,
    InvalidArgumentError,
    MissingFileError,
    ModelFormatError,
    OutOfMemoryError,
    PyEngineError,
    SystemCallError,
    system_errors,
)
from pyengine.format.reader import FrozenFile
from pyengine.freeze import freeze, frozen_cache_path

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"

# ---------------------------------------------------------------------------- one way in


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


def put_directory(path: Path) -> None:
    path.mkdir()


def put_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        short = os.path.relpath(path)  # an address has room for 107 bytes
        listener.bind(short if len(short) < len(str(path)) else str(path))


def put_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_fifo_behind_a_link(path: Path) -> None:
    os.mkfifo(path.with_name("fifo"))
    path.symlink_to("fifo")


SPECIAL = [put_fifo, put_directory, put_socket, put_device, put_fifo_behind_a_link]


@pytest.mark.parametrize("put", SPECIAL)
def test_only_regular_files_are_opened(tmp_path: Path, put: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "x")  # type: ignore[operator]
    with pytest.raises(ModelFormatError, match=r"not a regular file \((a FIFO|a directory|a socket|a device)\)"):
        files.open_regular(tmp_path / "x")


def test_a_regular_file_that_becomes_a_fifo_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"")
    stat = os.stat

    def replaced(name: str) -> os.stat_result:
        status = stat(name)
        path.unlink()
        os.mkfifo(path)
        return status

    monkeypatch.setattr(files.os, "stat", replaced)
    with pytest.raises(ModelFormatError, match="a FIFO"):
        files.open_regular(path)


def test_what_the_system_refuses_is_ours_and_the_builtin(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError) as caught:
        files.open_regular(tmp_path / "nothing")
    assert isinstance(caught.value, (PyEngineError, FileNotFoundError))
    assert (caught.value.errno, caught.value.filename) == (2, str(tmp_path / "nothing"))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SystemCallError, match="symbolic links"):
        files.open_regular(tmp_path / "loop")
    with pytest.raises(SystemCallError, match="too long"):
        files.open_regular(tmp_path / ("x" * 300))
    for builtin, ours in ((MemoryError("no"), OutOfMemoryError), (FileExistsError(17, "no", "x"), ExistingFileError)):
        with pytest.raises(ours), system_errors():
            raise builtin


@pytest.mark.parametrize("path", ["a\0b", "\ud800", b"a\0b", 3, None, 1.5, ["x"]])
def test_what_is_no_path(path: object) -> None:
    with pytest.raises(InvalidArgumentError):
        files.path_of(path)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError):
        freeze(path, "out")  # type: ignore[arg-type]


def test_reading_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert files.read_regular(path, 5) == b"12345"
    with pytest.raises(ModelFormatError, match="larger than 4 bytes"):
        files.read_regular(path, 4)
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelFormatError, match="larger"):
        files.read_regular(path, 1 << 20)


# ---------------------------------------------------------------------------- wherever a model is read

DOCUMENTS = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
]
PARTS = [*DOCUMENTS, "chat_template.jinja", "model.safetensors", "model.safetensors.index.json"]

OPENED = """
import sys
import pyengine
from pyengine.freeze import freeze
source, output = sys.argv[1:]
for way in (lambda: freeze(source, output), lambda: pyengine.Engine(source)):
    try:
        way()
    except pyengine.ModelFormatError as error:
        print(error)
"""


def refusals(source: Path, output: Path) -> list[str]:
    """What freeze and Engine say, in a process that cannot hang for ever."""
    done = subprocess.run(
        [sys.executable, "-c", OPENED, str(source), str(output)],
        capture_output=True, text=True, timeout=60, cwd=output.parent,
        env=os.environ | {"PYENGINE_CACHE": str(output.parent / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", PARTS)
def test_a_fifo_in_a_directory(tmp_path: Path, name: str) -> None:
    source = write_hf(tmp_path / "hf")
    if name.endswith("index.json"):
        (source / "model.safetensors").unlink()
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    lines = refusals(source, tmp_path / "out")
    assert len(lines) == 2 and all(f"{name}: not a regular file (a FIFO)" in line for line in lines)


@pytest.mark.parametrize("name", ["m.gguf", "m.safetensors", "m.bin", "m"])
def test_a_fifo_as_the_model(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    lines = refusals(tmp_path / name, tmp_path / "out")
    assert len(lines) == 2 and all("not a regular file (a FIFO)" in line for line in lines)


def test_a_fifo_as_the_tokenizer_of_a_checkpoint(tmp_path: Path) -> None:
    model, tokenizer, _ = write_llama2c(tmp_path, True)
    tokenizer.unlink()
    os.mkfifo(tokenizer)
    with pytest.raises(ModelFormatError, match="a FIFO"):
        freeze(model, tmp_path / "out", tokenizer=tokenizer)


@pytest.mark.parametrize("command", ["info", "verify", "generate", "bench"])
def test_a_fifo_on_the_command_line(tmp_path: Path, command: str) -> None:
    for name in ("m.safetensors", "m"):
        os.mkfifo(tmp_path / name)
        result = run_process(tmp_path, command, "-m", str(tmp_path / name), *(["x"] if command == "generate" else []))
        assert result.returncode == 1 and "not a regular file (a FIFO)" in result.stderr


@pytest.mark.parametrize("name", [*DOCUMENTS, "model.safetensors", "model.safetensors.index.json"])
def test_lfs_pointers_in_a_directory_are_named(tmp_path: Path, name: str) -> None:
    source = write_hf(tmp_path / "hf")
    if name.endswith("index.json"):
        (source / "model.safetensors").unlink()
    (source / name).write_text(POINTER)
    with pytest.raises(ModelFormatError, match=rf"{name}: a Git LFS pointer .*git lfs pull"):
        freeze(source, tmp_path / "out")


@pytest.mark.parametrize("name", ["m.gguf", "m.safetensors", "m.bin"])
def test_lfs_pointers_as_the_model_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER)
    for opening in (lambda path: freeze(path, tmp_path / "out"), pyengine.Engine, FrozenFile.open):
        with pytest.raises(ModelFormatError, match="Git LFS pointer"):
            opening(tmp_path / name)


def test_lfs_pointers_among_shards_and_parts_are_named(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", shards=2)
    (source / "model-00002-of-00002.safetensors").write_text(POINTER)
    with pytest.raises(ModelFormatError, match=r"model-00002-of-00002\.safetensors: a Git LFS pointer"):
        freeze(source, tmp_path / "out")
    parts = gguf_bytes.write_split(tmp_path / "m", 3)
    parts[2].write_text(POINTER)
    with pytest.raises(ModelFormatError, match=r"m-00003-of-00003\.gguf: a Git LFS pointer"):
        freeze(parts[0], tmp_path / "out")


# ---------------------------------------------------------------------------- outputs


def refuse_own(source: Path, output: Path, **options: object) -> None:
    before = {path: path.read_bytes() for path in sorted(source.parent.rglob("*")) if path.is_file()}
    with pytest.raises(InvalidArgumentError, match="part of the source"):
        freeze(source, output, overwrite=True, **options)  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in sorted(source.parent.rglob("*")) if path.is_file()} == before


def test_a_gguf_is_not_frozen_onto_itself(tmp_path: Path) -> None:
    source = tmp_path / "m.gguf"
    source.write_bytes(gguf_bytes.model_bytes())
    os.link(source, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(source)
    (tmp_path / "here").symlink_to(tmp_path)
    for a, b in (
        (source, source),
        (source, "hard"),
        (source, "soft"),
        ("soft", source),
        (source, "here/m.gguf"),
        ("hard", source),
    ):
        refuse_own(tmp_path / a, tmp_path / b)
    parts = gguf_bytes.write_split(tmp_path / "split", 3)
    refuse_own(parts[0], parts[2])


@pytest.mark.parametrize("name", [*PARTS, "model-00002-of-00003.safetensors"])
def test_a_directory_is_not_frozen_into_what_it_would_read(tmp_path: Path, name: str) -> None:
    """Whether the file is there or not."""
    source = write_hf(tmp_path / "hf", shards=3)
    refuse_own(source, source / name)
    (tmp_path / "link").symlink_to(source)
    refuse_own(tmp_path / "link", source / name)
    refuse_own(source, tmp_path / "link" / name)


def test_a_directory_may_hold_its_frozen_form_under_another_name(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    before = frozen_cache_path(source)
    frozen = freeze(source, source / "frozen.safetensors")
    assert freeze(source, frozen, overwrite=True) == frozen
    assert frozen_cache_path(source) == before


def test_a_checkpoint_is_not_frozen_onto_its_tokenizer(tmp_path: Path) -> None:
    model, tokenizer, _ = write_llama2c(tmp_path, True)
    for output in (model, tokenizer):
        refuse_own(model, output, tokenizer=tokenizer)


@pytest.mark.parametrize("put", SPECIAL)
def test_only_regular_files_are_replaced(tmp_path: Path, put: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "m.gguf"
    source.write_bytes(gguf_bytes.model_bytes())
    put(tmp_path / "x")  # type: ignore[operator]
    kind = os.lstat(tmp_path / "x").st_mode
    with pytest.raises(InvalidArgumentError, match="not a regular file"):
        freeze(source, tmp_path / "x", overwrite=True)
    assert os.lstat(tmp_path / "x").st_mode == kind


@pytest.mark.parametrize(
    "name",
    [b"m", b"m.gguf", b"m.bin", b"a\nb.safetensors", b"\xff\xfe.safetensors", b"\xff", b" ", b"-", b"\x1b[31m.x", "ü–名".encode(),
     b"%s{}.safetensors", b"x" * 200, b"y" * 255, "名".encode() * 85],
)  # fmt: skip
def test_what_is_written_can_be_read_whatever_its_name(tmp_path: Path, name: bytes) -> None:
    source = tmp_path / "m.src"
    source.write_bytes(gguf_bytes.model_bytes({"general.name": None}))
    output = tmp_path / os.fsdecode(name)
    assert freeze(source, output) == output
    with pyengine.Engine(output) as engine:
        assert engine.path == output
        tokens = engine.generate([1, 2, 3], max_tokens=3, temperature=0).tokens
    for argument in (os.fsencode(output), str(output)):
        with pyengine.Engine(argument) as engine:  # type: ignore[arg-type]
            assert engine.generate([1, 2, 3], max_tokens=3, temperature=0).tokens == tokens
    for command in ("info", "verify"):
        environment = cli_tools.environment(PYTHONIOENCODING="utf-8:strict")
        done = subprocess.run(
            cli_tools.command(command, "-m", output), capture_output=True, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [b"a\nb", b"\xff\xfe", b"x" * 250, "名".encode() * 80, b" ", b"-m"])
def test_sources_of_any_name_freeze_into_the_cache(
    tmp_path: Path, name: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYENGINE_CACHE", str(tmp_path / "cache"))
    source = tmp_path / os.fsdecode(name)
    source.write_bytes(gguf_bytes.model_bytes({"general.name": None}))
    with pyengine.Engine(source) as engine:
        engine.metadata["name"].encode()  # Unicode, whatever the file is called
        assert engine.path.parent == tmp_path / "cache"


def test_a_frozen_file_is_found_by_content(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(safetensors_bytes(random_tensors(LLAMA)))
    with pytest.raises(ModelFormatError, match=r"not a frozen pyengine file; .* name the directory that holds it"):
        pyengine.Engine(tmp_path / "weights")
    with pytest.raises(ModelFormatError, match="give the directory"):
        freeze(tmp_path / "weights", tmp_path / "out")
    source = tmp_path / "m.gguf"
    source.write_bytes(gguf_bytes.model_bytes())
    result = run_process(tmp_path, "freeze", str(freeze(source, tmp_path / "frozen")), "-o", str(tmp_path / "twice"))
    assert result.returncode == 1 and "already frozen" in result.stderr


def test_names_in_the_header_are_unicode(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"\xff")
    source.write_bytes(gguf_bytes.model_bytes({"general.name": None}))
    freeze(source, tmp_path / "m")
    result = run_process(tmp_path, "info", "-m", str(tmp_path / "m"), "--json")
    assert json.loads(result.stdout)["name"] == "\ufffd"
    with pytest.raises(InvalidArgumentError, match="name must be a string"):
        freeze(source, tmp_path / "n", name=5)  # type: ignore[arg-type]


def test_a_fifo_that_looks_like_an_abandoned_output(tmp_path: Path) -> None:
    """What a killed writer left is swept away; nothing else is opened for that."""
    source = tmp_path / "m.gguf"
    source.write_bytes(gguf_bytes.model_bytes())
    os.mkfifo(tmp_path / f".m.{'0' * 16}.partial")
    (tmp_path / f".m.{'1' * 16}.partial").mkdir()
    (tmp_path / f".m.{'2' * 16}.partial").write_bytes(b"x")
    freeze(source, tmp_path / "m")
    assert sorted(path.name[3] for path in tmp_path.glob(".m.*")) == ["0", "1"]
