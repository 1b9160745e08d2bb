"""The cache of frozen models: whose directory it is, and when an entry is stale."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from engine import gguf_bytes
from engine.freeze_models import write_hf
from engine.test_freeze_llama2c import write_llama2c

import pyengine
from pyengine.errors import InvalidArgumentError, SystemCallError
from pyengine.freeze import freeze_cached, frozen_cache_path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes.model_bytes())
    return path


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# ---------------------------------------------------------------------------- whose it is


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_directory_is_made_for_the_user_alone(cache: Path, source: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        freeze_cached(source)
    finally:
        os.umask(old)
    assert mode(cache) == 0o700


def test_a_directory_of_ours_that_others_could_read_is_closed(cache: Path, source: Path) -> None:
    entry = freeze_cached(source)
    cache.chmod(0o755)
    assert freeze_cached(source) == entry and mode(cache) == 0o700
    (cache / "something else").mkdir()
    cache.chmod(0o755)
    assert freeze_cached(source) == entry and mode(cache) == 0o755  # it is more than our cache: not ours to change


@pytest.mark.parametrize("bits", [0o777, 0o775, 0o1777, 0o702])
def test_a_directory_that_others_may_write_to_is_refused(cache: Path, source: Path, bits: int) -> None:
    cache.mkdir()
    cache.chmod(bits)
    with pytest.raises(SystemCallError, match="others may write"):
        pyengine.Engine(source)
    assert not any(cache.iterdir())


def test_a_directory_of_another_user_is_refused(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    freeze_cached(source)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(SystemCallError, match="belongs to another user"):
        freeze_cached(source)


def link_elsewhere(cache: Path) -> None:
    cache.with_name("elsewhere").mkdir(mode=0o700)
    cache.symlink_to("elsewhere")


@pytest.mark.parametrize(
    "put",
    [link_elsewhere, lambda cache: cache.symlink_to("nowhere"), Path.touch, os.mkfifo],
    ids=["link", "dangling", "file", "fifo"],
)
def test_only_a_directory_itself_will_do(cache: Path, source: Path, put: Callable[[Path], object]) -> None:
    put(cache)
    with pytest.raises(SystemCallError, match="no directory"):
        freeze_cached(source)
    assert not any(path.is_file() for path in cache.parent.glob("elsewhere/*"))


def test_a_user_without_a_home(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYENGINE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(SystemCallError, match="PYENGINE_CACHE"):
        pyengine.Engine(source)


def test_a_directory_that_cannot_be_made(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYENGINE_CACHE", str(source / "below" / "a file"))
    with pytest.raises(SystemCallError, match=r"a file cannot be made: (Not a directory|File exists); PYENGINE_CACHE names"):
        pyengine.Engine(source)


@pytest.mark.parametrize("name", ["{}", ".{}.lock"])
@pytest.mark.parametrize(
    "put", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/etc/passwd")], ids=["fifo", "directory", "link"]
)
def test_what_was_planted_in_the_cache_is_not_used(
    cache: Path, source: Path, name: str, put: Callable[[Path], object]
) -> None:
    cache.mkdir(mode=0o700)
    put(cache / name.format(frozen_cache_path(source).name))
    with pytest.raises(SystemCallError):
        freeze_cached(source)
    assert len(list(cache.iterdir())) == 1


# ---------------------------------------------------------------------------- when it is stale


def altered_in_place(path: Path) -> None:
    """Another content of the same size, and the old modification time."""
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of files has coarse ticks
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        with open(path, "r+b") as file:
            file.write(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def altered_by_renaming(path: Path) -> None:
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-1] + b"\1")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(path)


@pytest.mark.parametrize("alter", [altered_in_place, altered_by_renaming])
def test_another_content_of_the_same_size_and_time_is_noticed(
    cache: Path, source: Path, alter: Callable[[Path], None]
) -> None:
    first = freeze_cached(source)
    assert freeze_cached(source) == first
    alter(source)
    assert freeze_cached(source) != first


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00002-of-00002.safetensors"])
def test_every_file_of_a_directory_counts(cache: Path, tmp_path: Path, name: str) -> None:
    source = write_hf(tmp_path / "hf", shards=2)
    first = frozen_cache_path(source)
    altered_in_place(source / name)
    assert frozen_cache_path(source) != first


@pytest.mark.parametrize("name", ["chat_template.jinja", "special_tokens_map.json", "model.safetensors"])
def test_a_file_that_comes_counts(cache: Path, tmp_path: Path, name: str) -> None:
    source = write_hf(tmp_path / "hf", shards=2)
    first = frozen_cache_path(source)
    (source / name).write_text("{}")
    assert frozen_cache_path(source) != first


def test_a_file_that_is_not_read_does_not_count(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a cache inside of the source would make it stale with every entry."""
    source = write_hf(tmp_path / "hf")
    monkeypatch.setenv("PYENGINE_CACHE", str(source))
    source.chmod(0o700)
    first = freeze_cached(source)
    (source / "README.md").write_text("x")
    assert frozen_cache_path(source) == first and first.parent == source


def test_a_checkpoint_is_opened_with_its_tokenizer(cache: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = write_llama2c(tmp_path, True)
    with pyengine.Engine(model, tokenizer=tokenizer) as engine:
        first = engine.path
        assert engine.tokenize("ab")[0] == 1
    assert frozen_cache_path(model, tokenizer) == first
    altered_in_place(tokenizer)
    assert frozen_cache_path(model, tokenizer) != first
    with pytest.raises(InvalidArgumentError, match="only llama2"):
        pyengine.Engine(first, tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["gguf", "hf"])
def test_a_tokenizer_that_nothing_would_read_is_refused(cache: Path, tmp_path: Path, source: Path, kind: str) -> None:
    _, tokenizer, _ = write_llama2c(tmp_path, True)
    model = source if kind == "gguf" else write_hf(tmp_path / "hf")
    with pytest.raises(InvalidArgumentError, match="has a tokenizer of its own"):
        pyengine.Engine(model, tokenizer=tokenizer)
    with pytest.raises(InvalidArgumentError, match="has a tokenizer of its own"):
        pyengine.freeze(model, tmp_path / "m", tokenizer=tokenizer)
