"""The seed corpus, made by code: one small model in every form, its tokenizers, templates and messages."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from engine.freeze_models import LLAMA, encoded, random_tensors, safetensors_bytes, tokenizer_json
from reference import small_tokenizers

CONFIG = LLAMA | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "max_position_embeddings": 64}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|bos|>{{ message.role }}\n{{ message.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)
SETTINGS = {
    "bos_token": "<|bos|>",
    "eos_token": "<|end|>",
    "add_bos_token": True,
    "tokenizer_class": "PreTrainedTokenizerFast",
}
GENERATION = {"eos_token_id": [257, 258], "temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1}
PROMPTS = ["hello <|end|> w", "", "ab<|bos|>", "x" * 100, "é🙂\ud800"]
MESSAGES = [
    {"role": "user", "content": "hi <|end|>"},
    {"role": "assistant", "content": "ab"},
    {"role": "user", "content": " x "},
]


def hf_files(dtype: str = "F32") -> dict[str, bytes]:
    """A Hugging Face directory: file name -> content."""
    documents = {
        "config.json": CONFIG,
        "generation_config.json": GENERATION,
        "tokenizer_config.json": SETTINGS,
        "special_tokens_map.json": {"bos_token": "<|bos|>"},
    }
    return {
        **{name: json.dumps(document).encode() for name, document in documents.items()},
        "tokenizer.json": tokenizer_json().encode(),
        "chat_template.jinja": TEMPLATE.encode(),
        "model.safetensors": safetensors_bytes(random_tensors(CONFIG), dtype),
    }


def write_files(directory: Path, files: Mapping[str, bytes]) -> Path:
    """A directory with these files and no others."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def llama2c_header(**changes: int) -> dict[str, int]:
    sizes = {
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 1,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": 300,
        "seq_len": 16,
    }
    return sizes | changes


def llama2c_floats(sizes: Mapping[str, int]) -> int:
    """Values that a checkpoint with this header has."""
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = sizes.values()
    head_dim = dim // heads
    layer = 2 * dim + 2 * dim * dim + 2 * kv_heads * head_dim * dim + 3 * dim * hidden
    return abs(vocab) * dim * (1 if vocab > 0 else 2) + layers * layer + dim + seq_len * head_dim


def llama2c_bytes(sizes: Mapping[str, int], weights: bytes) -> bytes:
    return struct.pack("<7i", *sizes.values()) + weights


def llama2c_weights(n: int) -> bytes:
    return encoded(np.random.default_rng(0).standard_normal(n, np.float32), "F32")


def llama2c_tokens(vocab_size: int = 300) -> list[tuple[float, bytes]]:
    """(score, spelling) of every token, as tokenizer.bin has them."""
    pieces = [
        b"<unk>",
        b"\n<s>\n",
        b"\n</s>\n",
        *(f"<0x{byte:02X}>".encode() for byte in range(256)),
        b" ",
        b"a",
        b"b",
        b"ab",
        b" ab",
    ]
    pieces += [f"[{i}]".encode() for i in range(len(pieces), vocab_size)]
    return [(-float(i), piece) for i, piece in enumerate(pieces[:vocab_size])]


def llama2c_tokenizer(tokens: list[tuple[float, bytes]]) -> bytes:
    longest = max((len(piece) for _, piece in tokens), default=0)
    return struct.pack("<i", longest) + b"".join(struct.pack("<fi", s, len(piece)) + piece for s, piece in tokens)


def tokenizer_documents() -> list[dict[str, Any]]:
    """tokenizer.json of every family, parsed."""
    made = (
        small_tokenizers.byte_level(),
        small_tokenizers.sentencepiece_bpe(),
        small_tokenizers.metaspace(),
        small_tokenizers.unigram(),
    )
    return [json.loads(tokenizer_json()), *(json.loads(tokenizer.to_str()) for tokenizer in made)]
