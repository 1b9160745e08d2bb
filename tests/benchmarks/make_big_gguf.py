"""A GGUF file of TinyLlama's shape (1.1 billion weights) with random Q8_0 weights: for speed, not for sense.

    python tests/benchmarks/make_big_gguf.py --tokenizer smollm2.Q8_0.gguf --output llama-1.1b.Q8_0.gguf

The tokenizer is copied from another GGUF file. `pyengine freeze` reads the result, llama.cpp runs it, and transformers' import of
GGUF files turns it into the directory from which OpenVINO's export starts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np

BLOCK = np.dtype([("scale", "<f2"), ("codes", "i1", 32)])  # Q8_0
WEIGHT_DEVIATION = 0.02  # of what models are initialized with
TOKENIZER = {
    "model": "add_tokenizer_model",
    "pre": "add_tokenizer_pre",
    "tokens": "add_token_list",
    "token_type": "add_token_types",
    "merges": "add_token_merges",
    "bos_token_id": "add_bos_token_id",
    "eos_token_id": "add_eos_token_id",
}


def random_matrix(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Blocks of a (rows, columns) matrix as bytes (rows, columns / 32 * 34): uniform codes, one scale."""
    blocks = np.empty((rows, columns // 32), BLOCK)
    blocks["codes"] = rng.integers(-127, 128, (rows, columns // 32, 32), np.int8)
    blocks["scale"] = WEIGHT_DEVIATION / (127 / 3**0.5)
    return blocks.view(np.uint8).reshape(rows, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--tokenizer", type=Path, required=True, help="GGUF file that has the tokenizer")
    add("--output", type=Path, required=True)
    for name, default in (("dim", 2048), ("hidden-dim", 5632), ("layers", 22), ("heads", 32), ("kv-heads", 4)):
        add(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    fields = gguf.GGUFReader(args.tokenizer).fields
    vocabulary = len(fields["tokenizer.ggml.tokens"].data)
    dim, hidden_dim, kv_dim = args.dim, args.hidden_dim, args.dim // args.heads * args.kv_heads

    writer = gguf.GGUFWriter(args.output, "llama")
    writer.add_name("random weights")
    writer.add_block_count(args.layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(hidden_dim)
    writer.add_head_count(args.heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_rope_dimension_count(dim // args.heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q8_0))
    for name, method in TOKENIZER.items():
        if field := fields.get(f"tokenizer.ggml.{name}"):
            getattr(writer, method)(field.contents())

    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        blocks = random_matrix(rng, rows, columns)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(dim, np.float32))

    matrix("token_embd", vocabulary, dim)
    for i in range(args.layers):
        norm(f"blk.{i}.attn_norm")
        matrix(f"blk.{i}.attn_q", dim, dim)
        matrix(f"blk.{i}.attn_k", kv_dim, dim)
        matrix(f"blk.{i}.attn_v", kv_dim, dim)
        matrix(f"blk.{i}.attn_output", dim, dim)
        norm(f"blk.{i}.ffn_norm")
        matrix(f"blk.{i}.ffn_gate", hidden_dim, dim)
        matrix(f"blk.{i}.ffn_up", hidden_dim, dim)
        matrix(f"blk.{i}.ffn_down", dim, hidden_dim)
    norm("output_norm")
    matrix("output", vocabulary, dim)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
