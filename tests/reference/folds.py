"""What an architecture's linear peculiarities make of its weights: the fixtures' own reading of them, from transformers'
modelling code, in float64 and rounded once. Shares nothing with pyengine.freeze.arch.

``unfused`` takes fused matrices apart; ``folded`` multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = dict[str, NDArray[Any]]


def head_dim_of(hf: Mapping[str, Any]) -> int:
    return int(hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"])


def unfused(hf: Mapping[str, Any], weights: Mapping[str, NDArray[Any]]) -> Weights:
    """Phi-3's qkv_proj and gate_up_proj as five matrices, Granite-MoE's input_linear and output_linear as three of each expert
    and of the shared one, gpt-oss's gate_up_proj and down_proj as three of each expert, under the names of other models."""
    if hf["model_type"] == "gpt_oss":
        return _gpt_oss_experts(weights)
    q = hf["num_attention_heads"] * head_dim_of(hf)
    kv = hf.get("num_key_value_heads", hf["num_attention_heads"]) * head_dim_of(hf)
    cuts = {
        "qkv_proj": (("q_proj", 0, q), ("k_proj", q, q + kv), ("v_proj", q + kv, q + 2 * kv)),
        "gate_up_proj": (("gate_proj", 0, hf["intermediate_size"]), ("up_proj", hf["intermediate_size"], None)),
    }
    shared = hf.get("shared_intermediate_size", 0)
    cuts["input_linear"] = (("gate_proj", 0, shared), ("up_proj", shared, None))
    cuts["output_linear"] = (("down_proj", None, None),)
    parts: Weights = {}
    for name, w in weights.items():
        if name.endswith("attention.wqkv.weight"):  # InternLM 2: of each kv head its queries, its key, its value
            heads = w.reshape(hf["num_key_value_heads"], -1, head_dim_of(hf), w.shape[1])
            for part, rows in (("wq", heads[:, :-2]), ("wk", heads[:, -2]), ("wv", heads[:, -1])):
                parts[name.replace("wqkv", part)] = rows.reshape(-1, w.shape[1])
            continue
        if ".query_key_value." in name:  # GPT-NeoX: of each head its query, its key, its value
            heads = w.reshape(hf["num_attention_heads"], 3, head_dim_of(hf), -1)
            for j, part in enumerate(("query", "key", "value")):
                rows = heads[:, j].reshape(-1, *w.shape[1:])
                parts[name.replace("query_key_value", part)] = rows
            continue
        stem = name.removesuffix(".weight").rpartition(".")[2]
        if w.ndim == 3 and stem != "conv":
            for e, expert in enumerate(w):
                halves = np.split(expert, 2) if stem == "input_linear" else [expert]
                for half, part in zip(halves, ("w1", "w3") if stem == "input_linear" else ("w2",), strict=True):
                    parts[name.replace(stem, f"experts.{e}.{part}")] = half
            continue
        for part, begin, end in cuts.get(stem, ((stem, None, None),)):
            parts[name.replace(stem, part)] = w[begin:end] if w.ndim else w
    return parts


_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _mxfp4(blocks: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float32]:
    """One expert: blocks (rows, groups, 16) and scales (rows, groups), uint8 -> (rows, 32 groups)."""
    values = np.empty((*blocks.shape, 2), np.float64)
    for i in range(16):
        number = _FP4[i % 8] * (-1 if i >= 8 else 1)
        values[..., 0][blocks % 16 == i] = number
        values[..., 1][blocks // 16 == i] = number
    values *= 2.0 ** (scales.astype(int) - 127)[..., None, None]
    return values.reshape(len(blocks), -1).astype(np.float32)


def _gpt_oss_experts(weights: Mapping[str, NDArray[Any]]) -> Weights:
    """Rows of gate and up take turns in gate_up_proj and in its bias."""
    parts: Weights = {}
    for name, w in weights.items():
        if ".experts." not in name:
            parts[name] = w
        elif not name.endswith("_scales"):
            stem = name.removesuffix("_blocks").removesuffix("_bias")
            kind = "bias" if name.endswith("_bias") else "weight"
            for e in range(len(w)):
                one = w[e] if kind == "bias" else _mxfp4(w[e], weights[stem + "_scales"][e])
                place = stem.replace(".experts.", f".experts.{e}.")
                if "gate_up" in stem:
                    parts[place.replace("gate_up", "gate") + f".{kind}"] = one[::2]
                    parts[place.replace("gate_up", "up") + f".{kind}"] = one[1::2]
                else:
                    parts[f"{place}.{kind}"] = one
    return parts


def turned(hf: Mapping[str, Any]) -> int:
    """Elements of a head that RoPE turns."""
    return int(head_dim_of(hf) * hf.get("partial_rotary_factor", hf.get("rotary_pct", 1.0)))


def long_rope_amplitude(hf: Mapping[str, Any]) -> float:
    """What cos and sin are multiplied by."""
    if (hf.get("rope_scaling") or {}).get("type") != "longrope":
        return 1.0
    trained = hf["original_max_position_embeddings"]
    return float(np.float32(math.sqrt(1 + math.log(hf["max_position_embeddings"] / trained) / math.log(trained))))


def _scale(w: NDArray[Any], by: Any) -> NDArray[np.float32]:
    return (w.astype(np.float64) * by).astype(np.float32)


def _multiply(weights: Weights, end: str, by: Any) -> None:
    for name in [name for name in weights if name.endswith(end)]:
        weights[name] = _scale(weights[name], by)


def _granite(hf: Mapping[str, Any], weights: Weights) -> None:
    _multiply(weights, "tok_embeddings", hf["embedding_multiplier"])
    _multiply(weights, ".wq", hf["attention_multiplier"] * math.sqrt(head_dim_of(hf)))
    _multiply(weights, ".wo", hf["residual_multiplier"])
    _multiply(weights, ".w_down", hf["residual_multiplier"])
    assert hf["tie_word_embeddings"]
    weights["norm"] = _scale(weights["norm"], 1 / (hf["embedding_multiplier"] * hf["logits_scaling"]))


def _minicpm(hf: Mapping[str, Any], weights: Weights) -> None:
    residual = minicpm_residual(hf)
    _multiply(weights, "tok_embeddings", hf["scale_emb"])
    _multiply(weights, ".wo", residual)
    _multiply(weights, ".w_down", residual)
    assert hf["tie_word_embeddings"]
    weights["norm"] = _scale(weights["norm"], 1 / (hf["scale_emb"] * (hf["hidden_size"] / hf["dim_model_base"])))


def minicpm_residual(hf: Mapping[str, Any]) -> float:
    """What attention and the MLP add is multiplied by it, with as many digits as GGUF's float32 has."""
    return float(str(np.float32(hf["scale_depth"] / math.sqrt(hf["num_hidden_layers"]))))


def _yarn(hf: Mapping[str, Any], weights: Weights) -> None:
    """YaRN's amplitude of cos and sin, of q and of k, is q's alone: of OLMo 3 its norm's, in layers without a window; of SmolLM3
    in layers with RoPE."""
    for i in range(hf["num_hidden_layers"]):
        if hf["model_type"] == "smollm3" and not hf["no_rope_layers"][i]:
            continue
        if hf["model_type"] != "olmo3":
            _multiply(weights, f"layers.{i}.wq", yarn_amplitude(hf) ** 2)
            _multiply(weights, f"layers.{i}.wq.bias", yarn_amplitude(hf) ** 2)
        elif hf["layer_types"][i] == "full_attention":
            _multiply(weights, f"layers.{i}.q_norm", yarn_amplitude(hf) ** 2)


def has_yarn(hf: Mapping[str, Any]) -> bool:
    return (hf.get("rope_scaling") or {}).get("rope_type") == "yarn"


def yarn_amplitude(hf: Mapping[str, Any]) -> float:
    scaling: dict[str, Any] = hf["rope_scaling"]
    return float(scaling.get("attention_factor", 0.1 * math.log(scaling["factor"]) + 1.0))


def _turned_first(hf: Mapping[str, Any], weights: Weights) -> None:
    """Pair i of the turned elements, (i, i + turned / 2) or (2i, 2i + 1), becomes (i, i + head_dim / 2); what is not turned
    follows."""
    head_dim, n = head_dim_of(hf), turned(hf)
    place = np.empty(head_dim, int)  # of a source's element
    first, second = slice(0, n // 2), slice(n // 2, n)
    if hf["model_type"] in INTERLEAVED:
        first, second = slice(0, n, 2), slice(1, n, 2)
    place[first] = np.arange(n // 2)
    place[second] = head_dim // 2 + np.arange(n // 2)
    place[n:] = np.concatenate([np.arange(n // 2, head_dim // 2), np.arange(head_dim // 2 + n // 2, head_dim)])
    for name in [name for name in weights if name.endswith((".wq", ".wk", ".wq.bias", ".wk.bias"))]:
        heads = weights[name].reshape(-1, head_dim, *weights[name].shape[1:]).astype(np.float64)
        if ".wq" in name:
            heads[:, :n] *= (yarn_amplitude(hf) if has_yarn(hf) else long_rope_amplitude(hf)) ** 2
        moved = np.empty_like(heads)
        moved[:, place] = heads
        weights[name] = moved.reshape(weights[name].shape).astype(np.float32)


def _gemma(hf: Mapping[str, Any], weights: Weights) -> None:
    """Gains are 1 + w; embeddings times sqrt(hidden_size); scores times query_pre_attn_scalar ** -0.5."""
    for name in [name for name in weights if name.rpartition(".")[2].endswith("norm")]:
        gain = (np.float32(1) + weights[name]).astype(np.float64)
        if name.endswith("q_norm"):
            gain *= math.sqrt(head_dim_of(hf) / hf["query_pre_attn_scalar"])
        if name == "norm":
            gain /= math.sqrt(hf["hidden_size"])
        weights[name] = gain.astype(np.float32)
    _multiply(weights, "tok_embeddings", math.sqrt(hf["hidden_size"]))
    if hf["model_type"] == "gemma2":
        _multiply(weights, ".wq", math.sqrt(head_dim_of(hf) / hf["query_pre_attn_scalar"]))


# LayerNorm(x) = RMSNorm(x - mean(x)) * w + b. What is added to the stream loses its mean; b goes through the
# matrices that read it.
NORM_READERS = {"attention_norm": ("wq", "wk", "wv"), "ffn_norm": ("w_gate", "w_up")}


def _centered(w: NDArray[Any], axis: int) -> NDArray[np.float32]:
    wide = w.astype(np.float64)
    return (wide - wide.sum(axis=axis, keepdims=True) / wide.shape[axis]).astype(np.float32)


def _layer_norm(hf: Mapping[str, Any], weights: Weights) -> None:
    if hf.get("tie_word_embeddings"):
        weights["output"] = weights["tok_embeddings"]
    weights["tok_embeddings"] = _centered(weights["tok_embeddings"], 1)
    for name in [name for name in weights if name.endswith((".wo", ".wo.bias", ".w_down", ".w_down.bias"))]:
        weights[name] = _centered(weights[name], 0)
    for name in [name for name in weights if name.endswith("norm.bias")]:
        layer, _, norm = name.removesuffix(".bias").rpartition(".")
        b = weights.pop(name).astype(np.float64)
        readers = [f"{layer}.{matrix}" for matrix in NORM_READERS[norm]] if layer else ["output"]
        if layer and hf["model_type"] in PARALLEL and hf["model_type"] != "gpt_neox":
            readers += [f"{layer}.{matrix}" for matrix in NORM_READERS["ffn_norm"]]
        for reader in readers:
            if reader in weights:
                own = weights.get(f"{reader}.bias", np.zeros(1))
                weights[f"{reader}.bias"] = (own.astype(np.float64) + weights[reader].astype(np.float64) @ b).astype(np.float32)


LAYER_NORMS = ("starcoder2", "stablelm", "phi", "cohere", "cohere2", "olmo", "nemotron", "gpt_neox")
PARALLEL = ("phi", "cohere", "cohere2", "gpt_neox")
UNGATED = ("starcoder2", "phi", "arcee", "nanochat", "nemotron", "apertus", "gpt_neox")
INTERLEAVED = ("glm", "glm4", "ernie4_5", "cohere", "cohere2")  # RoPE turns elements 2i and 2i + 1


def _rotary_layer_norm(hf: Mapping[str, Any], weights: Weights) -> None:
    if hf["model_type"] == "olmo":
        norms = [f"layers.{i}.{norm}" for i in range(hf["num_hidden_layers"]) for norm in NORM_READERS]
        weights |= {name: np.ones(hf["hidden_size"], np.float32) for name in (*norms, "norm")}
    if hf["model_type"] == "nemotron":
        for name in [name for name in weights if name.endswith("norm")]:
            weights[name] = np.float32(1) + weights[name]
    _layer_norm(hf, weights)
    if hf["model_type"] == "gpt_neox":
        _one_norm(hf, weights)
    _turned_first(hf, weights)
    weights["norm"] = _scale(weights["norm"], hf.get("logit_scale", 1.0))


def _one_norm(hf: Mapping[str, Any], weights: Weights) -> None:
    """Two norms of one row, apart but for their gains, become one without: the gains are in the matrices that read them."""
    for i in range(hf["num_hidden_layers"]):
        for norm, readers in NORM_READERS.items():
            gain = weights.pop(f"layers.{i}.{norm}").astype(np.float64)
            for name in [f"layers.{i}.{reader}" for reader in readers if f"layers.{i}.{reader}" in weights]:
                weights[name] = (weights[name].astype(np.float64) * gain).astype(np.float32)
        weights[f"layers.{i}.attention_norm"] = np.ones(hf["hidden_size"], np.float32)


def _nanochat(hf: Mapping[str, Any], weights: Weights) -> None:
    """Norms without weights, one of them over embeddings; RoPE by the opposite angle: the halves of heads change places."""
    n, half = hf["hidden_size"], head_dim_of(hf) // 2
    rows = weights["tok_embeddings"].astype(np.float64)
    rms = np.sqrt((rows**2).sum(axis=1) / n + hf["rms_norm_eps"])
    weights["tok_embeddings"] = (rows / rms[:, None]).astype(np.float32)
    weights["norm"] = np.ones(n, np.float32)
    for i in range(hf["num_hidden_layers"]):
        sizes = {"attention_norm": n, "ffn_norm": n, "q_norm": 2 * half, "k_norm": 2 * half}
        weights |= {f"layers.{i}.{norm}": np.ones(size, np.float32) for norm, size in sizes.items()}
        for name in (f"layers.{i}.wq", f"layers.{i}.wk"):
            heads = weights[name].reshape(-1, 2, half, n)
            weights[name] = np.stack([heads[:, 1], heads[:, 0]], axis=1).reshape(-1, n)


def _apertus(hf: Mapping[str, Any], weights: Weights) -> None:
    """xIELU's numbers are softplus(alpha_p), beta + softplus(alpha_n) and beta."""
    for i in range(hf["num_hidden_layers"]):
        names = [f"layers.{i}.act_fn.{part}" for part in ("alpha_p", "alpha_n", "beta", "eps")]
        p, n, beta, _ = (weights.pop(name).astype(np.float64).reshape(()) for name in names)
        weights[f"layers.{i}.xielu"] = np.array([np.log1p(np.exp(p)), beta + np.log1p(np.exp(n)), beta]).astype(np.float32)


FOLDS = {
    **dict.fromkeys(("granite", "granitemoe", "granitemoeshared", "granitemoehybrid"), _granite),
    **dict.fromkeys(LAYER_NORMS, _rotary_layer_norm),
    **dict.fromkeys(("phi3", "glm", "glm4", "ernie4_5"), _turned_first), "gemma2": _gemma, "gemma3_text": _gemma,
    "minicpm": _minicpm, "nanochat": _nanochat, "apertus": _apertus,
}  # fmt: skip


def folded(hf: Mapping[str, Any], weights: Weights) -> Weights:
    """float32 weights under FORMAT.md's names -> those of the frozen file."""
    weights = dict(weights)
    if hf["model_type"] in FOLDS:
        FOLDS[hf["model_type"]](hf, weights)
    if has_yarn(hf) and FOLDS.get(hf["model_type"]) is not _turned_first:
        _yarn(hf, weights)
    return weights


def folded_multipliers(hf: Mapping[str, Any]) -> dict[str, float] | bool:
    """The same of the matrices that an adapter may change, by the file's names of their parts: what `extra.folded` says. False
    where they are changed otherwise."""
    if hf["model_type"] in (*LAYER_NORMS, *INTERLEAVED, "phi3", "nanochat"):
        return False
    if has_yarn(hf) and 0 in hf.get("no_rope_layers", ()):  # not the same in all layers
        return False
    if has_yarn(hf) and hf["model_type"] != "olmo3":
        return {"q": yarn_amplitude(hf) ** 2}
    if hf["model_type"] == "minicpm":
        return {"q": 1.0, "wo": minicpm_residual(hf), "down": minicpm_residual(hf)}
    if hf["model_type"] == "gemma2":
        return {"q": hf["query_pre_attn_scalar"] ** -0.5 * math.sqrt(head_dim_of(hf))}
    if not hf["model_type"].startswith("granite"):
        return {}
    residual = hf["residual_multiplier"]
    return {"q": hf["attention_multiplier"] * math.sqrt(head_dim_of(hf)), "wo": residual, "down": residual}
