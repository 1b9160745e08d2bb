"""GGUF files byte by byte, well-formed or not, without the format's own package."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.freeze_models import vocabulary

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {
    U8: "<B",
    I8: "<b",
    U16: "<H",
    I16: "<h",
    U32: "<I",
    I32: "<i",
    F32: "<f",
    BOOL: "<?",
    U64: "<Q",
    I64: "<q",
    F64: "<d",
}
Tensor = tuple[str, list[int], int, int]  # name, dims innermost first, type, offset
Value = tuple[int, Any]  # kind and content; the content of an array is (kind of its items, items)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, content: Any) -> bytes:
    if kind == STRING:
        return string(content)
    if kind == ARRAY:
        return array(*content)
    return struct.pack(CODES[kind], content)


def array(kind: int, items: list[Any]) -> bytes:
    return struct.pack("<IQ", kind, len(items)) + b"".join(value(kind, item) for item in items)


def key(name: str, kind: int, raw: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + raw


def info(tensor: Tensor) -> bytes:
    name, dims, kind, offset = tensor
    head = string(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
    return head + struct.pack("<IQ", kind, offset)


def gguf_bytes(
    keys: list[bytes] = [],  # noqa: B006  # never changed
    tensors: list[Tensor] = [],  # noqa: B006
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)
    head += b"".join(keys) + b"".join(map(info, tensors))
    return head.ljust(-(-len(head) // alignment) * alignment, b"\0") + data


# ---------------------------------------------------------------------------- one small model

DIM, HIDDEN, N_TOKENS = 32, 32, 300


def bpe_keys() -> dict[str, Value]:
    """A tokenizer of bytes and one merge."""
    tokens, merges = vocabulary()
    return {
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "gpt-2"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.token_type": (ARRAY, (I32, [1] * 256 + [3, 3] + [1] * (N_TOKENS - 258))),
        "tokenizer.ggml.merges": (ARRAY, (STRING, merges)),
    }


def spm_keys() -> dict[str, Value]:
    """A SentencePiece tokenizer: control tokens, bytes, letters and two merges."""
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "a", "b", "ab", "▁ab"]
    pieces += [f"[{i}]" for i in range(len(pieces), N_TOKENS)]
    return {
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, pieces)),
        "tokenizer.ggml.scores": (ARRAY, (F32, [-float(i) for i in range(N_TOKENS)])),
        "tokenizer.ggml.token_type": (ARRAY, (I32, [2, 3, 3] + [6] * 256 + [1] * (N_TOKENS - 259))),
    }


def model_keys(tokenizer: Mapping[str, Value] | None = None) -> dict[str, Value]:
    """A Llama of one layer that can be frozen and run."""
    tokenizer = bpe_keys() if tokenizer is None else tokenizer
    bos, eos = (256, 257) if tokenizer["tokenizer.ggml.model"][1] == "gpt2" else (1, 2)
    return {
        "general.architecture": (STRING, "llama"),
        "general.name": (STRING, "small"),
        "llama.context_length": (U32, 64),
        "llama.embedding_length": (U32, DIM),
        "llama.block_count": (U32, 1),
        "llama.feed_forward_length": (U32, HIDDEN),
        "llama.attention.head_count": (U32, 2),
        "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        **tokenizer,
        "tokenizer.ggml.bos_token_id": (U32, bos),
        "tokenizer.ggml.eos_token_id": (U32, eos),
        "tokenizer.ggml.padding_token_id": (U32, 0xFFFFFFFF),
        "tokenizer.chat_template": (STRING, "{{ messages[0].content }}"),
    }


def model_tensors() -> dict[str, list[int]]:
    """Its tensors, all float32: name -> dims, innermost first."""
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    return {
        "token_embd.weight": [DIM, N_TOKENS],
        "output_norm.weight": [DIM],
        "blk.0.attn_norm.weight": [DIM],
        "blk.0.ffn_norm.weight": [DIM],
        **{f"blk.0.{name}.weight": [DIM, DIM] for name in square},
    }


def model_bytes(
    changes: Mapping[str, Value | None] | None = None,
    tensors: Mapping[str, list[int]] | None = None,
    tokenizer: Mapping[str, Value] | None = None,
) -> bytes:
    """The model as a file, with keys changed, added or (None) left out. Its weights are small numbers."""
    keys = model_keys(tokenizer) | dict(changes or {})
    infos: list[Tensor] = []
    data = b""
    for name, dims in (model_tensors() if tensors is None else tensors).items():
        infos.append((name, dims, 0, len(data)))
        n = math.prod(dims)
        data += struct.pack(f"<{n}f", *((i * 37 % 101 - 50) / 100 for i in range(n))).ljust(-(-4 * n // 32) * 32, b"\0")
    written = [key(name, kept[0], value(*kept)) for name, kept in keys.items() if kept is not None]
    return gguf_bytes(written, infos, data)


def write_split(path: Path, n_parts: int, changes: Mapping[int, Mapping[str, Value]] | None = None) -> list[Path]:
    """The model in parts NAME-00001-of-0000N.gguf, as the format's own tools cut them: metadata in the first, tensors dealt out.
    ``changes`` are keys of the parts (from 0) that are written otherwise."""
    items = list(model_tensors().items())
    paths = []
    for i in range(n_parts):
        split: dict[str, Value | None] = {
            "split.no": (U16, i),
            "split.count": (U16, n_parts),
            "split.tensors.count": (I32, len(items)),
        }
        split |= dict((changes or {}).get(i, {}))
        dropped: dict[str, Value | None] = dict.fromkeys(model_keys() if i else ())
        part = path.with_name(f"{path.name}-{i + 1:05d}-of-{n_parts:05d}.gguf")
        part.write_bytes(model_bytes(dropped | split, dict(items[i::n_parts])))
        paths.append(part)
    return paths
