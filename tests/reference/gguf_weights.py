"""The weights of a Llama GGUF file for the oracle, by way of the format authors' own reader and
dequantizers.

Slow (the reader visits every string of the vocabulary) and trusting: for tests, on known files. It
shares no code with pyengine.freeze, so it also judges how that undoes the permutation of q and k.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

NAMES = {
    "token_embd.weight": "tok_embeddings",
    "output_norm.weight": "norm",
    "output.weight": "output",
}
LAYER_NAMES = {
    "attn_norm.weight": "attention_norm",
    "attn_q.weight": "wq",
    "attn_k.weight": "wk",
    "attn_v.weight": "wv",
    "attn_output.weight": "wo",
    "ffn_norm.weight": "ffn_norm",
    "ffn_gate.weight": "w_gate",
    "ffn_up.weight": "w_up",
    "ffn_down.weight": "w_down",
}


def read(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """config and weights for oracle.Oracle, of an architecture "llama" without RoPE scaling."""
    reader = gguf.GGUFReader(path)

    def field(key: str) -> Any:
        found = reader.get_field(key)
        return None if found is None else found.contents()

    assert field("general.architecture") == "llama"
    n_heads, dim = field("llama.attention.head_count"), field("llama.embedding_length")
    head_dim = dim // n_heads
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    config = {
        "dim": dim,
        "n_layers": field("llama.block_count"),
        "head_dim": head_dim,
        "norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "layers": {"window": 0, "rope": 0, "norm": "rmsnorm", "activation": "swiglu"},
        "qk_norm": False,
        "tie_embeddings": "output.weight" not in tensors,
    }
    weights = {}
    for gguf_name, w in tensors.items():
        name = NAMES.get(gguf_name)
        if name is None:
            _, layer, rest = gguf_name.split(".", 2)
            name = f"layers.{layer}.{LAYER_NAMES[rest]}"
        if name.endswith((".wq", ".wk")):
            w = halves_from_pairs(w, head_dim)
        weights[name] = w
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    weights["rope.0.inv_freq"] = (field("llama.rope.freq_base") ** -exponent).astype(np.float32)
    return config, weights


def halves_from_pairs(w: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """Rows of each head from GGUF's pairs (0, h, 1, h + 1, ...) to the order (0, 1, ..., h, h + 1,
    ...)."""
    rows, columns = w.shape
    return w.reshape(-1, head_dim // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
