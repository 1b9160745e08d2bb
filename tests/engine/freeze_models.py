"""Tiny random checkpoints of every kind that can be frozen, and the way back from a frozen file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.freeze.quantize import dequantize
from pyengine.frozen import FrozenFile, expected_tensors

VOCAB = 300
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}

# ---------------------------------------------------------------------------- tokenizer


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for every byte value, by byte value."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in keep else chr(next(others)) for b in range(256)]


def vocabulary() -> tuple[list[str], list[str]]:
    """300 tokens: bytes, <|bos|> 256, <|end|> 257, one merge, fillers; and the merges."""
    tokens = [*byte_alphabet(), "<|bos|>", "<|end|>", "ab"]
    return tokens + [f"[{i}]" for i in range(len(tokens), VOCAB)], ["a b"]


def tokenizer_json() -> str:
    tokens, merges = vocabulary()
    added = [
        {"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i in (256, 257)
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": byte_level | {"use_regex": True},
            "decoder": byte_level | {"use_regex": True},
            "model": {
                "type": "BPE",
                "vocab": {token: i for i, token in enumerate(tokens)},
                "merges": [merge.split(" ") for merge in merges],
            },
        }
    )


# ---------------------------------------------------------------------------- Hugging Face


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face names -> shapes; biases and head norms as the config says."""
    dim, hidden = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", dim // config["num_attention_heads"])
    q, kv = (config[k] * head_dim for k in ("num_attention_heads", "num_key_value_heads"))
    kind = config["model_type"]
    qkv_bias = kind == "qwen2" or config.get("attention_bias", False)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], dim),
        "model.norm.weight": (dim,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], dim)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        attention = layer + "self_attn."
        for part, rows in {"q": q, "k": kv, "v": kv}.items():
            shapes[f"{attention}{part}_proj.weight"] = (rows, dim)
            if qkv_bias:
                shapes[f"{attention}{part}_proj.bias"] = (rows,)
        shapes[attention + "o_proj.weight"] = (dim, q)
        if config.get("attention_bias", False):
            shapes[attention + "o_proj.bias"] = (dim,)
        if kind == "qwen3":
            shapes[attention + "q_norm.weight"] = shapes[attention + "k_norm.weight"] = (head_dim,)
        shapes[layer + "input_layernorm.weight"] = (dim,)
        shapes[layer + "post_attention_layernorm.weight"] = (dim,)
        shapes[layer + "mlp.gate_proj.weight"] = shapes[layer + "mlp.up_proj.weight"] = (hidden, dim)
        shapes[layer + "mlp.down_proj.weight"] = (dim, hidden)
    return shapes


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights under their Hugging Face names."""
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(shape, np.float32) for n, shape in tensor_shapes(config).items()}


def encoded(array: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return array.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def safetensors_bytes(tensors: dict[str, np.ndarray], dtype: str = "F32") -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        raw = encoded(array, dtype)
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_hf(
    directory: Path,
    config: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    dtype: str = "F32",
    shards: int = 1,
) -> Path:
    """A Hugging Face directory with config, weights and tokenizer."""
    config = LLAMA if config is None else config
    tensors = random_tensors(config) if tensors is None else tensors
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(tokenizer_json())
    if shards == 1:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors, dtype))
        return directory
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        weight_map |= dict.fromkeys(part, name)
        (directory / name).write_bytes(safetensors_bytes(part, dtype))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


# ---------------------------------------------------------------------------- GGUF

GGUF_PARTS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    base, _, kind = name.rpartition(".")
    if base.startswith("model.layers."):
        _, _, layer, part = base.split(".", 3)
        return f"blk.{layer}.{GGUF_PARTS[part]}.{kind}"
    return f"{GGUF_PARTS[base]}.{kind}"


def interleaved(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """What converters do to q and k of architecture "llama": pairs (i, i + h/2) become neighbours."""
    half = rows.shape[0] // n_heads // 2
    return rows.reshape(n_heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    config: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    *,
    quantization: str = "F32",
    extra: dict[str, Any] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
    pre: str = "gpt-2",
) -> Path:
    """The same model as a GGUF file, written by the format's own package."""
    import gguf

    config = LLAMA if config is None else config
    tensors = random_tensors(config) if tensors is None else tensors
    arch = config["model_type"]
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q"])
    writer.add_head_count_kv(heads["k"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3] + [1] * (VOCAB - 258))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template("{{ messages[0].content }}\n\n")
    for key, value in (extra or {}).items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        add.get(type(value), writer.add_float32)(key, value)
    for name, array in {**tensors, **(extra_tensors or {})}.items():
        if arch == "llama" and ".self_attn." in name:
            part = name.split("self_attn.")[1][0]
            if part in heads and "_proj" in name:
                array = interleaved(array, heads[part])
        target = gguf_name(name) if name in tensors else name
        if quantization == "F32" or array.ndim == 1:
            writer.add_tensor(target, array)
        else:
            kind = gguf.GGMLQuantizationType[quantization]
            writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---------------------------------------------------------------------------- the way back


class ArrayRows:
    """A matrix in memory as a source of rows."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self._array = name, array
        self.rows, self.columns = array.shape

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        return self._array[start:stop]


def stored_vector(frozen: FrozenFile, name: str, n: int) -> np.ndarray:
    offset, _ = frozen.tensors[name]
    return np.frombuffer(frozen.buffer, "<f4", n, offset).copy()


def stored_panels(frozen: FrozenFile, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(codes (panels, groups, 16, 16, 4), scales (panels, groups, 16))."""
    shape = expected_tensors(frozen.config)[f"{name}.codes"].shape
    offset, nbytes = frozen.tensors[f"{name}.codes"]
    codes = np.frombuffer(frozen.buffer, np.int8, nbytes, offset).reshape(shape).copy()
    offset, _ = frozen.tensors[f"{name}.scales"]
    scales = np.frombuffer(frozen.buffer, "<f2", shape[0] * shape[1] * 16, offset)
    return codes, scales.reshape(shape[0], shape[1], 16).copy()


def stored_matrix(frozen: FrozenFile, name: str, rows: int, columns: int) -> np.ndarray:
    return dequantize(*stored_panels(frozen, name), rows, columns)


def weight_bytes(path: Path) -> dict[str, bytes]:
    """Every weight tensor's bytes, for equality of two frozen files."""
    with FrozenFile.open(path) as frozen:
        return {
            name: bytes(frozen.buffer[offset : offset + size])
            for name, (offset, size) in frozen.tensors.items()
            if name in expected_tensors(frozen.config)
        }
