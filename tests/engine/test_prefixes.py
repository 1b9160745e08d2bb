"""Keys and values in a file (Engine.save_prefix, load_prefix): no byte of an output changes, and no damaged file gets in."""

from __future__ import annotations

import mmap
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from engine.cli_tools import run_process, write_talker
from engine.freeze_models import freeze_fixture

from pyengine import (
    ContextFullError,
    Engine,
    InvalidArgumentError,
    ModelFormatError,
    OutOfMemoryError,
    SystemCallError,
    _core,
)
from pyengine.format.prefix import read_prefix, write_prefix
from pyengine.format.reader import FrozenFile
from pyengine.freeze import freeze

N_CTX = 1536
# No windows; all layers with a window of 16; one layer of three that sees everything, the others 40 positions; the others
# convolutions of 3.
MODELS = ["llama_tied", "mistral_window", "gemma3", "lfm2"]


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return freeze_fixture(request.param, tmp_path_factory.mktemp(request.param), N_CTX)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return freeze_fixture("llama_tied", tmp_path_factory.mktemp("plain"))


def text_of(seed: int, n: int) -> list[int]:
    rng = random.Random(seed)
    return [3 + rng.randrange(250) for _ in range(n)]


def forward(context: _core.Context, sequence: _core.Sequence, tokens: list[int]) -> bytes:
    """Logits after the last of `tokens`."""
    context.forward(tokens, [sequence] * len(tokens), bytes(len(tokens) - 1) + bytes([1]))
    return bytes(context.logits(0))


def aligned(data: bytes | bytearray) -> memoryview:
    """A copy that begins on a page."""
    buffer = mmap.mmap(-1, max(len(data), 1))
    buffer[: len(data)] = bytes(data)
    return memoryview(buffer)[: len(data)]


@pytest.mark.parametrize("kv_dtype", ["int8", "f32"])
def test_what_is_restored_is_what_was_computed(path: Path, kv_dtype: Any) -> None:
    """Bytes for bytes, wherever it ends, into a cache that knows nothing or any part of it; and what follows is the same."""
    tokens, rng = text_of(1, 1100), random.Random(2)
    with FrozenFile.open(path) as file:
        model = _core.Model(file.config, file.buffer, file.weights)
        source = _core.Context(model, kv_dtype=kv_dtype)
        for n in (1, 63, 256, 300, 512, 1000):
            sequence = source.sequence_new()
            forward(source, sequence, tokens[:n])
            saved = sequence.save()
            expected = forward(source, sequence, tokens[n : n + 70])
            for known in (0, rng.randrange(1, n + 1), n, n + 50):
                context = _core.Context(model, kv_dtype=kv_dtype)
                if known > 0:
                    forward(context, context.sequence_match([]), tokens[:known])  # cached, held by nobody
                restored = context.restore(tokens[:n], aligned(saved))
                assert restored.tokens().tolist() == tokens[:n] and restored.save() == saved
                context.check()
                assert forward(context, restored, tokens[n : n + 70]) == expected
                restored.close()
                context.check()
                # and any beginning of it goes on as it should
                shorter = context.sequence_match(tokens[: rng.randrange(n + 1)])
                fresh = source.sequence_new()
                forward(source, fresh, tokens[: shorter.length + 1])
                again = forward(context, shorter, [tokens[shorter.length]])
                assert again == bytes(source.logits(0))
                context.check()


def test_equal_texts_have_equal_snapshots(path: Path) -> None:
    """Whatever was in the memory before, and however they were computed: nothing of another text is in a file."""
    tokens = text_of(3, 700)
    with FrozenFile.open(path) as file:
        model = _core.Model(file.config, file.buffer, file.weights)
        clean, used = _core.Context(model), _core.Context(model)
        forward(used, used.sequence_new(), text_of(4, 1200))
        used.drop_cached()
        one, other = clean.sequence_new(), used.sequence_new()
        forward(clean, one, tokens)
        for begin in range(0, 700, 90):
            forward(used, other, tokens[begin : begin + 90])
        assert one.save() == other.save()


def test_a_sequence_that_lacks_window_parts_is_saved_all_the_same(path: Path) -> None:
    """One that shares pages whose windows have made room holds those that its next query sees, and perhaps no others."""
    tokens = text_of(10, 1100)
    with FrozenFile.open(path) as file:
        model = _core.Model(file.config, file.buffer, file.weights)
        context, source = _core.Context(model), _core.Context(model)
        longer = context.sequence_match([])
        forward(context, longer, tokens)  # has let go of the windows of its first pages
        for n in (300, 560, 800):
            fresh = source.sequence_new()
            forward(source, fresh, tokens[:n])
            expected = forward(source, fresh, tokens[n : n + 70])
            for max_pages in range(5, 2, -1):
                context.set_max_pages(max_pages)
                sequence = context.sequence_match(tokens[:n])
                other = _core.Context(model)
                restored = other.restore(tokens[: sequence.length], aligned(sequence.save()))
                other.check()
                assert restored.save() == sequence.save()
                assert forward(other, restored, tokens[sequence.length : n + 70]) == expected
                restored.truncate(n - 1)
                restored.close()
                other.check()
            context.set_max_pages(0)


def test_a_full_cache_refuses_and_keeps_what_it_has(path: Path) -> None:
    """What does not fit beside what is held is refused before anything cached has made room for it in vain."""
    with FrozenFile.open(path) as file:
        model = _core.Model(file.config, file.buffer, file.weights)
        context = _core.Context(model)
        sequence = context.sequence_new()
        forward(context, sequence, text_of(5, 1030))  # two pages, also of what a window of 16 positions keeps
        saved = sequence.save()
        small = _core.Context(model)
        small.set_max_pages(2)
        held, cached = small.sequence_new(), small.sequence_match([])
        forward(small, held, text_of(6, 200))
        forward(small, cached, text_of(7, 200))
        cached.close()
        before = small.cache_stats()
        with pytest.raises(OutOfMemoryError):
            small.restore(text_of(5, 1030), aligned(saved))
        assert small.cache_stats() == before and small.match_length(text_of(7, 200)) == 200
        small.check()


@pytest.mark.parametrize("kv_dtype", ["int8", "f32"])
def test_numbers_that_no_text_has_are_refused(plain: Path, kv_dtype: Any) -> None:
    with FrozenFile.open(plain) as file:
        model = _core.Model(file.config, file.buffer, file.weights)
        context = _core.Context(model, kv_dtype=kv_dtype)
        sequence = context.sequence_new()
        tokens = text_of(7, 20)
        forward(context, sequence, tokens)
        saved = bytes(sequence.save())
        context.drop_cached()
        head_dim_p = -(-file.config.head_dim // 16) * 16
        scales = 256 * head_dim_p if kv_dtype == "int8" else 0  # where the first k_scales are, or k_f32
        bad = [struct.pack("<f", x) for x in (float("nan"), float("inf"), *((-1.0,) if kv_dtype == "int8" else ()))]
        damaged = [saved[:scales] + one + saved[scales + 4 :] for one in bad]
        damaged += [saved[:-64], saved + bytes(64), b""]
        damaged += [b"\x80" + saved[1:]] if kv_dtype == "int8" else []
        for data in damaged:
            with pytest.raises(InvalidArgumentError):
                context.restore(tokens, aligned(data))
        for ids in ([*tokens[:-1], file.config.vocab_size], [-1, *tokens[1:]]):
            with pytest.raises(InvalidArgumentError, match="vocabulary"):
                context.restore(ids, aligned(saved))
        with pytest.raises(InvalidArgumentError, match="aligned"):
            context.restore(tokens, aligned(b"\0" + saved)[1:])
        with pytest.raises(ContextFullError):
            context.restore([1] * (file.config.max_seq_len + 1), aligned(saved))
        context.check()
        assert context.cache_stats()["n_sequences"] == 1 and context.match_length(tokens) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_inputs_of_convolutions_that_no_text_has_are_refused(tmp_path: Path, bad: float) -> None:
    """They lie behind the layers with attention: the last number that the first of 20 positions has."""
    with FrozenFile.open(freeze_fixture("lfm2", tmp_path)) as file:
        context = _core.Context(_core.Model(file.config, file.buffer, file.weights))
        sequence, tokens = context.sequence_new(), text_of(7, 20)
        forward(context, sequence, tokens)
        saved = bytearray(sequence.save())
        at = len(saved) - 256 * 4 * 48 + 4 * (file.config.dim - 1)  # the last layer is one; its rows of 40 are padded to 48
        assert context.restore(tokens, aligned(saved)).save() == saved
        saved[at : at + 4] = struct.pack("<f", bad)
        context.drop_cached()
        with pytest.raises(InvalidArgumentError, match="no text has"):
            context.restore(tokens, aligned(saved))


# ---------------------------------------------------------------- the engine


def test_a_loaded_prefix_is_not_computed_again(path: Path, tmp_path: Path) -> None:
    tokens = text_of(8, 900)
    saved = tmp_path / "beginning.prefix"
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with Engine(path) as engine:
        assert engine.save_prefix(tokens[:700], saved) == 700
        assert engine.save_prefix(tokens[:700], saved) == 700  # again: replaced
    with Engine(path) as engine:
        expected = engine.generate(tokens, **options)
        assert expected.timings.cached_tokens == 0
    with Engine(path) as engine:
        assert engine.load_prefix(saved) == tokens[:700]
        engine.check_integrity()
        result = engine.generate(tokens, **options)
        assert result.tokens == expected.tokens and result.timings.cached_tokens == 700
        assert engine.generate(tokens, cache_salt="another", **options).timings.cached_tokens == 0
        engine.load_prefix(saved, cache_salt="a third")
        assert engine.generate(tokens, cache_salt="a third", **options).timings.cached_tokens == 700
        engine.check_integrity()
    assert [one.name for one in tmp_path.iterdir()] == ["beginning.prefix"]


def test_files_that_do_not_belong(plain: Path, path: Path, tmp_path: Path) -> None:
    saved = tmp_path / "a.prefix"
    with Engine(plain) as engine:
        engine.save_prefix([5, 6, 7], saved)
        with pytest.raises(InvalidArgumentError, match="no tokens"):
            engine.save_prefix([], saved)
        with pytest.raises(FileNotFoundError):
            engine.load_prefix(tmp_path / "missing")
        with pytest.raises(FileNotFoundError):
            engine.save_prefix([5, 6, 7], tmp_path / "missing" / "a.prefix")
    with Engine(path) as engine, pytest.raises(InvalidArgumentError, match=r"a\.prefix.*another model"):
        engine.load_prefix(saved)
    with Engine(plain, kv_dtype="f32") as engine, pytest.raises(InvalidArgumentError, match="another kv_dtype"):
        engine.load_prefix(saved)
    with Engine(plain) as engine:
        for wrong in (plain, tmp_path):
            with pytest.raises(ModelFormatError) as caught:
                engine.load_prefix(wrong)
            assert str(caught.value).count(str(wrong)) == 1


def test_a_directory_is_no_file_to_write(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose path has no name."""
    monkeypatch.chdir(tmp_path)
    with Engine(plain) as engine:
        for path in (tmp_path, ".", "/"):
            with pytest.raises(SystemCallError, match=r"(?i)is a directory"):
                engine.save_prefix([5, 6, 7], path)
    assert not list(tmp_path.iterdir())


def test_damaged_files(plain: Path, tmp_path: Path) -> None:
    """Truncated or changed anywhere: refused. A hostile one with a right checksum: by its numbers."""
    saved, bad = tmp_path / "a.prefix", tmp_path / "bad.prefix"
    with Engine(plain) as engine:
        engine.save_prefix([5, 6, 7], saved)
        whole = saved.read_bytes()
        rng = random.Random(9)
        damaged = [whole[:n] for n in (0, 1, 7, 8, 64, len(whole) // 2, len(whole) - 12, len(whole) - 1)] + [whole + b"\0"]
        for at in [*range(0, 900, 7), *(rng.randrange(len(whole)) for _ in range(40))]:
            damaged.append(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        for data in damaged:
            bad.write_bytes(data)
            with pytest.raises((ModelFormatError, InvalidArgumentError), match=r"bad\.prefix"):
                engine.load_prefix(bad)
        key = engine.prefix_key()
        with read_prefix(saved, key) as prefix:
            tokens, keys_values = prefix.tokens, bytearray(prefix.keys_values)
        write_prefix(bad, key, tokens, bytearray(b"\x80" * len(keys_values)))
        with pytest.raises(InvalidArgumentError, match="no text has"):
            engine.load_prefix(bad)
        write_prefix(bad, key, tokens, keys_values[:64])
        with pytest.raises(InvalidArgumentError, match="bytes here"):
            engine.load_prefix(bad)
        assert engine.generate([5, 6, 7], max_tokens=1).timings.cached_tokens <= 2
        engine.check_integrity()


# ---------------------------------------------------------------- the command line


def test_generate_reads_and_writes_it(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Once upon a time there was a cat. " * 3)
    arguments = ("generate", "-m", plain, "-f", "prompt.txt", "-n", 6, "--temp", 0, "-v")
    plainly = run_process(tmp_path, *arguments)
    first = run_process(tmp_path, *arguments, "--prompt-cache", "a.kv")
    again = run_process(tmp_path, *arguments, "--prompt-cache", "a.kv")
    assert plainly.returncode == first.returncode == again.returncode == 0, again.stderr
    assert plainly.stdout == first.stdout == again.stdout
    assert "cached" not in first.stderr and "cached" in again.stderr
    other = run_process(tmp_path, "generate", "-m", plain, "-c", 64, "-p", "x", "-n", 1, "--prompt-cache", plain)
    assert other.returncode != 0 and "not a file of keys and values" in other.stderr
    for nowhere in ("", "missing/a.kv"):  # refused before anything is computed
        other = run_process(tmp_path, "generate", "-m", plain, "-p", "x", "-n", 1, "--prompt-cache", nowhere)
        assert other.returncode == 1 and other.stdout == "" and "no directory" in other.stderr


def test_chat_keeps_its_system_prompt(tmp_path: Path) -> None:
    freeze(write_talker(tmp_path / "hf", 4096), tmp_path / "talker.safetensors")
    arguments = ("chat", "-m", "talker.safetensors", "-n", 4, "--temp", 0, "-v", "--prompt-cache", "a.kv")
    refused = run_process(tmp_path, *arguments, input="hi\n")
    assert refused.returncode != 0 and "--system" in refused.stderr
    runs = [run_process(tmp_path, *arguments, "--system", "You are a cat. " * 20, input="hi\n") for _ in range(2)]
    assert [one.returncode for one in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout and all("cached" in one.stderr for one in runs)
