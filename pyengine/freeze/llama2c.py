"""llama2.c legacy checkpoints: seven int32, then float32 tensors in a fixed order; the tokenizer is
a second file.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import InvalidArgumentError, ModelFormatError, UnsupportedModelError
from ..files import open_regular, read_regular
from ..format.config import FrozenConfig, same_layers
from ..format.quantize import Float32Array, RowSource
from ..system import read_at
from .arch.base import PARTS
from .build import build_model, checked_n_ctx
from .rope import default_inv_freq
from .sources import FileRows, SourceModel, f32_rows
from .tokenizer import gguf_tokenizer_attachments

_HEADER = struct.Struct("<7i")
_VERSIONED_MAGIC = b"24ka"  # 0x616b3432, little-endian: the newer, versioned formats
_NORM_EPS = 1e-5  # run.c has both as constants
_ROPE_THETA = 10_000.0
_MAX_TOKENIZER_BYTES = 64 << 20
_UNK, _BOS, _EOS, _FIRST_BYTE = 0, 1, 2, 3
_NO_MODEL = "neither a frozen file of pyengine nor another model file that it reads (GGUF, llama2.c)"


class Llama2cFile:
    """Named tensors of a legacy checkpoint: each kind of weight lies together, by layer."""

    def __init__(self, path: Path) -> None:
        self._file = open_regular(path)
        try:
            self._parse(self._file.seek(0, 2))
        except BaseException:
            self._file.close()
            raise

    def _parse(self, file_bytes: int) -> None:
        head = read_at(self._file.fileno(), _HEADER.size, 0)
        if len(head) < _HEADER.size:
            raise ModelFormatError(f"{file_bytes} bytes: {_NO_MODEL}")
        if head[:4] == _VERSIONED_MAGIC:
            raise UnsupportedModelError("llama2.c formats other than the legacy float32 one")
        dim, hidden, layers, heads, kv_heads, vocab, seq_len = _HEADER.unpack(head)
        if heads < 1 or dim < 1 or dim % heads:
            raise ModelFormatError(_NO_MODEL)
        self.config = FrozenConfig(
            architecture="LlamaForCausalLM",
            dim=dim,
            hidden_dim=hidden,
            n_layers=layers,
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=dim // heads,
            vocab_size=abs(vocab),
            max_seq_len=seq_len,
            norm_eps=_NORM_EPS,
            layers=same_layers(layers),
            tie_embeddings=vocab > 0,  # a negative size says that the output matrix is its own
            qkv_bias=False,
            o_bias=False,
            qk_norm=False,
            bos_token_id=_BOS,
            eos_token_ids=(_EOS, _BOS),  # texts were joined by BOS: it ends one as well
        )
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}
        end = self._place_all(_HEADER.size)
        if end != file_bytes:
            raise ModelFormatError(f"a llama2.c checkpoint with this header has {end} bytes, not {file_bytes}")

    def _place_all(self, at: int) -> int:
        c = self.config
        at = self._place(at, "tok_embeddings", (c.vocab_size, c.dim))
        for part, shape in {
            "attention_norm": (c.dim,),
            "q": (c.q_dim, c.dim),
            "k": (c.kv_dim, c.dim),
            "v": (c.kv_dim, c.dim),
            "wo": (c.dim, c.q_dim),
            "ffn_norm": (c.dim,),
            "gate": (c.hidden_dim, c.dim),
            "down": (c.dim, c.hidden_dim),
            "up": (c.hidden_dim, c.dim),
        }.items():
            for i in range(c.n_layers):
                at = self._place(at, part, shape, i)
        at = self._place(at, "norm", (c.dim,))
        at += 4 * c.max_seq_len * c.head_dim  # tables of cos and sin, which nobody needs
        return at if c.tie_embeddings else self._place(at, "output", (c.vocab_size, c.dim))

    def _place(self, at: int, part: str, shape: tuple[int, ...], layer: int = 0) -> int:
        self._places[PARTS[part].hf.format(i=layer)] = (at, shape)
        return at + 4 * math.prod(shape)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape) in self._places.items()}

    def matrix(self, name: str) -> RowSource:
        offset, shape = self._places[name]
        rows, columns = shape if len(shape) == 2 else (1, shape[0])
        fd = self._file.fileno()
        return FileRows(name, fd, offset, (rows, columns), 4 * columns, f32_rows)

    def vector(self, name: str) -> Float32Array:
        return self.matrix(name).read_rows(0, 1).reshape(-1)

    def close(self) -> None:
        self._file.close()


def read_llama2c_tokenizer(path: str | os.PathLike[str], vocab_size: int) -> dict[str, object]:
    """tokenizer.bin (per token: float32 score, int32 length, bytes) as GGUF-style metadata."""
    path = Path(path)
    data = read_regular(path, _MAX_TOKENIZER_BYTES)
    at, tokens, scores = 4, [], []
    for i in range(vocab_size):
        if at + 8 > len(data):
            raise ModelFormatError(f"{path.name} ends before token {i} of {vocab_size}")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= length <= len(data) - at:
            raise ModelFormatError(f"{path.name}: token {i} claims {length} bytes")
        tokens.append(data[at : at + length].decode("utf-8", "replace").replace(" ", "▁"))
        scores.append(score)
        at += length
    if at != len(data):
        raise ModelFormatError(f"{path.name} goes on after its {vocab_size} tokens")
    if vocab_size < _FIRST_BYTE + 256:
        raise ModelFormatError(f"{path.name}: {vocab_size} tokens leave no room for the 256 bytes")
    types = np.ones(vocab_size, np.int32)
    types[_UNK], types[_BOS], types[_EOS] = 2, 3, 3
    types[_FIRST_BYTE : _FIRST_BYTE + 256] = 6
    tokens[:_FIRST_BYTE] = ["<unk>", "<s>", "</s>"]
    tokens[_FIRST_BYTE : _FIRST_BYTE + 256] = [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": _BOS,
        "tokenizer.ggml.eos_token_id": _EOS,
        "tokenizer.ggml.unknown_token_id": _UNK,
    }


def load_llama2c(
    path: Path,
    name: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    n_ctx: int | None = None,
) -> SourceModel:
    """Read a legacy checkpoint's header; ``tokenizer`` is the path of its tokenizer.bin, ``n_ctx`` as in ``freeze``."""
    file = Llama2cFile(path)
    try:
        if tokenizer is None:
            raise InvalidArgumentError(
                f"{path.name}: llama2.c checkpoints need the tokenizer too: tokenizer='tokenizer.bin', here or in freeze "
                "(--tokenizer on the command line)"
            )
        n_ctx = checked_n_ctx(n_ctx, file.config.max_seq_len)
        model = build_model(
            file,
            file.config if n_ctx is None else replace(file.config, max_seq_len=n_ctx),
            [default_inv_freq(file.config.head_dim, _ROPE_THETA)],
            parts=PARTS,
            kind="hf",
            name=name or path.stem,
            source=path.name,
            interleaved=True,
        )
        metadata = read_llama2c_tokenizer(tokenizer, file.config.vocab_size)
        model.attachments = gguf_tokenizer_attachments(metadata, file.config.vocab_size)
    except BaseException:
        file.close()
        raise
    model.close = file.close
    return model
