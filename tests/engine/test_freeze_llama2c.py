"""llama2.c legacy checkpoints: the same weights as from Hugging Face, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from engine import cli_tools
from engine.freeze_models import LLAMA, VOCAB, interleaved, random_tensors, weight_bytes, write_hf

import pyengine
from pyengine.errors import InvalidArgumentError, ModelFormatError, UnsupportedModelError
from pyengine.format.reader import FrozenFile
from pyengine.freeze import freeze


def write_llama2c(directory: Path, shared: bool) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """A legacy checkpoint and tokenizer.bin; returns the weights under their Hugging Face names."""
    config = LLAMA | {"tie_word_embeddings": shared}
    tensors = random_tensors(config)
    heads = {"q": 4, "k": 2}

    def layers(part: str) -> bytes:
        out = b""
        for i in range(2):
            array = tensors[f"model.layers.{i}.{part}.weight"]
            kind = part[10] if part.startswith("self_attn.") else ""
            out += (interleaved(array, heads[kind]) if kind in heads else array).tobytes()
        return out

    data = struct.pack("<7i", 64, 88, 2, 4, 2, VOCAB if shared else -VOCAB, 32)
    data += tensors["model.embed_tokens.weight"].tobytes() + layers("input_layernorm")
    data += b"".join(layers(f"self_attn.{p}_proj") for p in "qkvo")
    data += layers("post_attention_layernorm")
    data += b"".join(layers(f"mlp.{p}_proj") for p in ("gate", "down", "up"))
    data += tensors["model.norm.weight"].tobytes() + bytes(4 * 32 * 16)
    data += b"" if shared else tensors["lm_head.weight"].tobytes()
    (directory / "m.bin").write_bytes(data)
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *[f"<0x{b:02X}>" for b in range(256)]]
    pieces += [*" ab", " a", " ab"]
    pieces += [f"[{i}]" for i in range(len(pieces), VOCAB)]
    tokenizer = struct.pack("<i", 8)
    for i, piece in enumerate(pieces):
        tokenizer += struct.pack("<fi", -float(i), len(piece.encode())) + piece.encode()
    (directory / "tok.bin").write_bytes(tokenizer)
    return directory / "m.bin", directory / "tok.bin", tensors


@pytest.mark.parametrize("shared", [True, False])
def test_llama2c_equals_the_same_weights_from_hf(tmp_path: Path, shared: bool) -> None:
    model, tokenizer, tensors = write_llama2c(tmp_path, shared)
    a = freeze(model, tmp_path / "a", tokenizer=tokenizer)
    config = LLAMA | {"tie_word_embeddings": shared}
    b = freeze(write_hf(tmp_path / "hf", config, tensors), tmp_path / "b")
    assert weight_bytes(a) == weight_bytes(b)
    with FrozenFile.open(a) as frozen:
        text = (frozen.attachment("tokenizer.json") or b"").decode()
        assert frozen.config.eos_token_ids == (2, 1)
    encoding = tokenizers.Tokenizer.from_str(text).encode("ab é")
    assert encoding.tokens == ["<s>", "▁ab", "▁", "<0xC3>", "<0xA9>"]


def test_llama2c_refusals(tmp_path: Path) -> None:
    model, tokenizer, _ = write_llama2c(tmp_path, True)
    with pytest.raises(InvalidArgumentError, match="need the tokenizer"):
        freeze(model, tmp_path / "m")
    data = model.read_bytes()
    for cut in (0, 10, 28, len(data) - 1):
        (tmp_path / "cut.bin").write_bytes(data[:cut])
        with pytest.raises(ModelFormatError):
            freeze(tmp_path / "cut.bin", tmp_path / "m", tokenizer=tokenizer)
    (tmp_path / "v2.bin").write_bytes(struct.pack("<I", 0x616B3432) + data[4:])
    with pytest.raises(UnsupportedModelError, match="legacy"):
        freeze(tmp_path / "v2.bin", tmp_path / "m", tokenizer=tokenizer)
    raw = tokenizer.read_bytes()
    for damaged in (raw[:100], raw + b"x", raw[:8] + b"\xff\xff\xff\xff" + raw[12:]):
        (tmp_path / "bad.tok").write_bytes(damaged)
        with pytest.raises(ModelFormatError, match=r"bad\.tok"):
            freeze(model, tmp_path / "m", tokenizer=tmp_path / "bad.tok")


def test_the_way_out_is_named(tmp_path: Path) -> None:
    model, _, _ = write_llama2c(tmp_path, True)
    for opening in (pyengine.Engine, lambda path: freeze(path, tmp_path / "m")):
        with pytest.raises(InvalidArgumentError, match=r"tokenizer='tokenizer\.bin'.*freeze.*--tokenizer"):
            opening(model)


@pytest.mark.parametrize("command", ["generate", "info", "verify"])
def test_the_command_line_takes_a_tokenizer(tmp_path: Path, command: str) -> None:
    model, tokenizer, _ = write_llama2c(tmp_path, True)
    environment = cli_tools.environment(PYENGINE_CACHE=str(tmp_path / "cache"))
    prompt = ["a", "-n", "2"] if command == "generate" else []
    result = cli_tools.run_process(tmp_path, command, "-m", model, "--tokenizer", tokenizer, *prompt, env=environment)
    assert result.returncode == 0, result.stderr
    result = cli_tools.run_process(tmp_path, command, "-m", model, *prompt, env=environment)
    assert result.returncode == 1 and "--tokenizer" in result.stderr


def test_stories260k(tmp_path: Path, shared_data: Path) -> None:
    """A real model: shapes from the header, and its tokenizer on a story's first words."""
    model, tokenizer = shared_data / "stories260K.bin", shared_data / "tok512.bin"
    with FrozenFile.open(freeze(model, tmp_path / "m", tokenizer=tokenizer)) as frozen:
        c = frozen.config
        assert (c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.vocab_size) == (64, 5, 8, 4, 512)
        text = (frozen.attachment("tokenizer.json") or b"").decode()
    encoding = tokenizers.Tokenizer.from_str(text).encode("Once upon a time")
    assert encoding.tokens == ["<s>", "▁Once", "▁upon", "▁a", "▁time"]
    assert encoding.ids == [1, 403, 407, 261, 378]
    with pytest.raises(UnsupportedModelError, match="legacy"):
        freeze(shared_data / "stories260K-q8.bin", tmp_path / "q", tokenizer=tokenizer)
