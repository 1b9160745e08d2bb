"""The writer: a file appears whole or not at all, whoever interrupts."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.freeze_models import LLAMA, tensor_shapes, write_hf

from pyengine.errors import InvalidArgumentError
from pyengine.format.config import FrozenConfig, LayerSpec
from pyengine.format.inventory import stored_tensors
from pyengine.format.reader import FrozenFile, verify_checksums
from pyengine.format.writer import FrozenWriter
from pyengine.freeze import freeze, freeze_cached, frozen_cache_path

CONFIG = FrozenConfig(
    architecture="LlamaForCausalLM", dim=64, hidden_dim=64, n_layers=1, n_heads=1, n_kv_heads=1,
    head_dim=64, vocab_size=16, max_seq_len=8, norm_eps=1e-5, tie_embeddings=True,
    qkv_bias=False, o_bias=False, qk_norm=False, layers=(LayerSpec(),), bos_token_id=None, eos_token_ids=(),
)  # fmt: skip
ATTACHMENTS = {"tokenizer.json": b"{}"}


def writer(path: Path, **options: Any) -> FrozenWriter:
    attachments = options.pop("attachments", ATTACHMENTS)
    return FrozenWriter(path, CONFIG, attachments, name="n", source="s", **options)


def write_all(out: FrozenWriter) -> None:
    for name, spec in stored_tensors(CONFIG).items():
        out.write(name, [bytes(spec.nbytes)])


def test_attachments_survive(tmp_path: Path) -> None:
    template = b"{{ x }}\n\n\n"
    attachments = {
        "tokenizer.json": '{"a": "é"}'.encode(),
        "tokenizer_config.json": b"{}",
        "generation_config.json": b'{"temperature": 0.7}',
        "chat_template.jinja": template,
    }
    with writer(tmp_path / "m", attachments=attachments) as out:
        write_all(out)
    with FrozenFile.open(tmp_path / "m") as frozen:
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert frozen.attachment(name) == attachments[name]
        stored = (frozen.attachment("chat_template.jinja") or b"").decode()
    import jinja2

    render = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string
    assert render(stored).render(x=1) == render(template.decode()).render(x=1) == "1\n\n"


def test_golden_is_computed_from_the_complete_file(tmp_path: Path) -> None:
    seen = []

    def golden(path: str) -> bytes:
        with FrozenFile.open(path) as frozen:
            seen.append((frozen.attachment("golden.json"), all(ok for _, ok in verify_checksums(frozen))))
        assert not (tmp_path / "m").exists()
        return b'{"tokens": [1, 2]}'

    with writer(tmp_path / "m", golden=golden) as out:
        write_all(out)
    assert seen == [(b"{}", True)]
    with FrozenFile.open(tmp_path / "m") as frozen:
        assert frozen.attachment("golden.json") == b'{"tokens": [1, 2]}'
        assert all(ok for _, ok in verify_checksums(frozen))


def test_golden_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(InvalidArgumentError, match=r"golden\.json has 9000"),
        writer(tmp_path / "m", golden=lambda _: bytes(9000)) as out,
    ):
        write_all(out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), writer(tmp_path / "m") as out:
        out.write("tok_embeddings.codes", [bytes(1024)])
        raise error
    assert not list(tmp_path.iterdir())


def test_what_the_system_refuses_names_the_file_to_be(tmp_path: Path) -> None:
    """And not the temporary one, of which nobody has heard. A limit on the size of files stands for a disk that is full."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.safetensors"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError) as full, writer(path) as out:
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, hard))
        try:
            write_all(out)
            out.file.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full.value.errno == errno.EFBIG and full.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError) as missing, writer(tmp_path / "absent" / "a.safetensors"):
        pass
    assert missing.value.filename == str(tmp_path / "absent" / "a.safetensors")


def test_misuse_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="not the next"), writer(tmp_path / "m") as out:
        out.write("norm", [bytes(256)])
    with pytest.raises(InvalidArgumentError, match="needs 1024 bytes, 900"), writer(tmp_path / "m") as out:
        out.write("tok_embeddings.codes", [bytes(900)])
    with pytest.raises(InvalidArgumentError, match="was not written"), writer(tmp_path / "m"):
        pass
    with pytest.raises(InvalidArgumentError, match=r"tokenizer\.json is missing"):
        writer(tmp_path / "m", attachments={})
    with pytest.raises(InvalidArgumentError, match="unknown attachment 'x'"):
        writer(tmp_path / "m", attachments=ATTACHMENTS | {"x": b""})
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_replaced_only_on_request(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    target = tmp_path / "m.safetensors"
    target.write_text("precious")
    with pytest.raises(FileExistsError, match="overwrite"):
        freeze(source, target)
    assert target.read_text() == "precious"
    assert freeze(source, target, overwrite=True) == target
    FrozenFile.open(target).close()


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with writer(tmp_path / "m") as out:
            write_all(out)
    finally:
        os.umask(old)
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o640


# ---------------------------------------------------------------------------- other processes

SLOW_FREEZE = """
import sys, time
from pyengine.freeze import freeze
def slowly(done, total, name):
    print(done, flush=True)
    time.sleep(0.05)
freeze(sys.argv[1], sys.argv[2], progress=slowly)
"""


def start_slow_freeze(source: Path, target: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_FREEZE, str(source), str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=source.parent,
    )
    assert process.stdout is not None
    assert int(process.stdout.readline()) > 0  # it is in the middle of the weights
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_killed_freeze_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    source = write_hf(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    with start_slow_freeze(source, tmp_path / "out" / "m") as process:
        assert list((tmp_path / "out").iterdir())
        process.send_signal(number)
        process.stdout.close()  # type: ignore[union-attr]
        assert process.wait(30) != 0
    assert not list((tmp_path / "out").iterdir())


def test_what_sigkill_leaves_goes_with_the_next_freeze(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    out = tmp_path / "out"
    out.mkdir()
    target = out / "m[1]*.safetensors"  # a name that a pattern must not take for one
    with start_slow_freeze(source, target) as process:
        process.kill()
        process.stdout.close()  # type: ignore[union-attr]
        process.wait(30)
    assert not target.exists() and len(list(out.iterdir())) == 1
    freeze(source, target)
    assert list(out.iterdir()) == [target]


def test_a_running_freeze_is_not_swept_away(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    with start_slow_freeze(source, tmp_path / "m") as process:
        freeze(source, tmp_path / "m")  # the same name, and done before the other
        process.kill()
        process.stdout.close()  # type: ignore[union-attr]
    FrozenFile.open(tmp_path / "m").close()


CACHED = """
import sys
from pyengine.freeze import freeze_cached
calls = []
print(freeze_cached(sys.argv[1], lambda *a: calls.append(a)), len(calls) > 0)
"""


def test_racing_processes_freeze_once(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    environment = os.environ | {"PYENGINE_CACHE": str(tmp_path / "cache")}
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", CACHED, str(source)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
        for _ in range(3)
    ]
    results = [racer.communicate(timeout=250)[0].rsplit(" ", 1) for racer in racers]
    assert len({path for path, _ in results}) == 1
    assert sorted(froze.strip() for _, froze in results) == ["False", "False", "True"]
    FrozenFile.open(results[0][0]).close()


def test_cache_is_keyed_by_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYENGINE_CACHE", str(tmp_path / "cache"))
    source = write_hf(tmp_path / "hf")
    first = freeze_cached(source)
    stamp = first.stat().st_mtime_ns
    assert freeze_cached(source) == first and first.stat().st_mtime_ns == stamp
    later = time.time() + 10
    os.utime(source / "model.safetensors", (later, later))
    assert frozen_cache_path(source) != first
    (source / "chat_template.jinja").write_text("{{ x }}")
    assert frozen_cache_path(source) not in (first, freeze_cached(write_hf(tmp_path / "other")))


def test_cache_directory_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_hf(tmp_path / "hf")
    monkeypatch.delenv("PYENGINE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert frozen_cache_path(source).parent == tmp_path / "xdg" / "pyengine"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert frozen_cache_path(source).parent == tmp_path / ".cache" / "pyengine"


# VmHWM, not getrusage: ru_maxrss of a child begins with what its parent had when it forked.
MEMORY = """
import re, sys
from pyengine.freeze import freeze
freeze(sys.argv[1], sys.argv[2])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def test_peak_memory_is_far_below_the_model(tmp_path: Path) -> None:
    """A float32 checkpoint of 454 MB, its largest tensor 67 MB, needs under 67 + 315 MB."""
    config = LLAMA | {
        "hidden_size": 1024, "intermediate_size": 16384, "num_attention_heads": 16,
        "num_key_value_heads": 8,
    }  # fmt: skip
    source = write_hf(tmp_path / "hf", config, {})
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in tensor_shapes(config).items():
        nbytes = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32).tobytes()
    with open(source / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, offset, len(noise)):
            file.write(noise[: offset - start])
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(source), str(tmp_path / "m")],
        stdout=subprocess.PIPE, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    largest = 4 * 16384 * 1024
    assert offset > largest + (300 << 20) > int(done.stdout) * 1024
