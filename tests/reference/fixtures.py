"""The committed fixtures (make_fixtures.py says what they hold), in the names of FORMAT.md and as
Hugging Face directories."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .folds import LAYER_NORMS, PARALLEL, UNGATED, folded, folded_multipliers, head_dim_of, unfused

DATA = Path(__file__).parent / "data"
LARGE_KEY_BIAS = 4.0
TOKENIZER_SIZE = 263  # 3 special tokens, 256 bytes, 4 merges

MLP = ("gate", "up", "down")

# Hugging Face tensor name inside a layer -> ours (FORMAT.md section 2, unfused)
LAYER_NAMES = {
    "input_layernorm.weight": "attention_norm",
    "self_attn.q_proj.weight": "wq",
    "self_attn.k_proj.weight": "wk",
    "self_attn.v_proj.weight": "wv",
    "self_attn.q_proj.bias": "wq.bias",
    "self_attn.k_proj.bias": "wk.bias",
    "self_attn.v_proj.bias": "wv.bias",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "self_attn.o_proj.weight": "wo",
    "self_attn.o_proj.bias": "wo.bias",
    "post_attention_layernorm.weight": "ffn_norm",
    "mlp.gate.weight": "router",
    "block_sparse_moe.gate.weight": "router",
    "block_sparse_moe.router.layer.weight": "router",
    "mlp.router.weight": "router",
    "mlp.router.bias": "router.bias",
    "self_attn.sinks": "sinks",
    "self_attn.query_layernorm.weight": "q_norm",
    "self_attn.key_layernorm.weight": "k_norm",
    "mlp.gate_proj.weight": "w_gate",
    "mlp.up_proj.weight": "w_up",
    "mlp.down_proj.weight": "w_down",
    "mlp.shared_expert_gate.weight": "shared_router",
    **{f"{mlp}.{part}_proj.weight": f"shared.w_{part}" for mlp in ("mlp.shared_expert", "shared_mlp") for part in MLP},
    **{f"mlp.{part}_proj.bias": f"w_{part}.bias" for part in MLP},
    "self_attn.dense.weight": "wo",
    "self_attn.dense.bias": "wo.bias",
    "mlp.fc1.weight": "w_up",
    "mlp.fc1.bias": "w_up.bias",
    "mlp.fc2.weight": "w_down",
    "mlp.fc2.bias": "w_down.bias",
    "input_layernorm.bias": "attention_norm.bias",
    "post_attention_layernorm.bias": "ffn_norm.bias",
    "mlp.c_fc.weight": "w_up",
    "mlp.c_fc.bias": "w_up.bias",
    "mlp.c_proj.weight": "w_down",
    "mlp.c_proj.bias": "w_down.bias",
    **{f"attention.{part}.weight": part for part in ("wq", "wk", "wv", "wo")},
    "operator_norm.weight": "attention_norm",
    "self_attn.q_layernorm.weight": "q_norm",
    "self_attn.k_layernorm.weight": "k_norm",
    "self_attn.out_proj.weight": "wo",
    "conv.in_proj.weight": "conv_in",
    "conv.conv.weight": "taps",
    "conv.out_proj.weight": "conv_out",
    "attention_norm.weight": "attention_norm",
    "ffn_norm.weight": "ffn_norm",
    "attention_layernorm.weight": "attention_norm",
    "feedforward_layernorm.weight": "ffn_norm",
    **{f"mlp.act_fn.{part}": f"act_fn.{part}" for part in ("alpha_p", "alpha_n", "beta", "eps")},
    **{f"attention.{part}.weight": f"w{part[0]}" for part in ("query", "key", "value")},
    **{f"attention.{part}.bias": f"w{part[0]}.bias" for part in ("query", "key", "value")},
    "attention.dense.weight": "wo",
    "attention.dense.bias": "wo.bias",
    "mlp.dense_h_to_4h.weight": "w_up",
    "mlp.dense_h_to_4h.bias": "w_up.bias",
    "mlp.dense_4h_to_h.weight": "w_down",
    "mlp.dense_4h_to_h.bias": "w_down.bias",
    "feed_forward.w1.weight": "w_gate",
    "feed_forward.w3.weight": "w_up",
    "feed_forward.w2.weight": "w_down",
}
POST_NORM_NAMES = {
    "post_attention_layernorm.weight": "post_attention_norm",
    "pre_feedforward_layernorm.weight": "ffn_norm",
    "post_feedforward_layernorm.weight": "post_ffn_norm",
}
GLM4_NORM_NAMES = {
    "post_self_attn_layernorm.weight": "post_attention_norm",
    "post_mlp_layernorm.weight": "post_ffn_norm",
}
NORMS_AFTER = {
    "gemma2": "rmsnorm_around", "gemma3_text": "rmsnorm_around", "glm4": "rmsnorm_around",
    "olmo2": "rmsnorm_after", "olmo3": "rmsnorm_after", "exaone4": "rmsnorm_after",
}  # fmt: skip
NO_ROPE_WITHOUT_WINDOW = ("cohere2", "exaone4")
EXPERT_NAMES = {
    "w1": "w_gate", "w3": "w_up", "w2": "w_down", "gate_proj": "w_gate", "up_proj": "w_up", "down_proj": "w_down",
}  # fmt: skip
MODEL_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings",
    "model.norm.weight": "norm",
    "lm_head.weight": "output",
    "model.embedding_norm.weight": "norm",
    "model.norm.bias": "norm.bias",
    "model.final_layernorm.weight": "norm",
    "model.final_layernorm.bias": "norm.bias",
    "lm_head.bias": "output.bias",
    "model.tok_embeddings.weight": "tok_embeddings",
    "output.weight": "output",
    "gpt_neox.embed_in.weight": "tok_embeddings",
    "gpt_neox.final_layer_norm.weight": "norm",
    "gpt_neox.final_layer_norm.bias": "norm.bias",
    "embed_out.weight": "output",
}


@dataclass(frozen=True)
class Fixture:
    """A tiny model and what transformers says of it; shapes and dtypes are in make_fixtures.py."""

    name: str
    hf_config: dict[str, Any]
    hf_weights: dict[str, NDArray[np.floating[Any]]]
    token_ids: NDArray[np.int32]
    rows: NDArray[np.int32]
    hidden: NDArray[np.float32]
    logits: NDArray[np.float32]
    inv_freq: NDArray[np.float32]


def names() -> list[str]:
    """The names of all fixtures."""
    return sorted(path.stem for path in DATA.glob("*.npz"))


def load(name: str) -> Fixture:
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    prefix = "weights/"
    weights = {k[len(prefix) :]: w for k, w in arrays.items() if k.startswith(prefix)}
    rest = {k: a for k, a in arrays.items() if not k.startswith(prefix) and k != "config"}
    return Fixture(name, json.loads(str(arrays["config"])), weights, **rest)


@dataclass(frozen=True)
class LoraFixture:
    """An adapter for the model of the same name, and what PEFT says of both; see make_lora_fixtures.py."""

    config: str
    tensors: dict[str, NDArray[np.float32]]
    logits: NDArray[np.float32]


def lora_names() -> list[str]:
    return sorted(path.stem for path in (DATA / "lora").glob("*.npz"))


def load_lora(name: str) -> LoraFixture:
    with np.load(DATA / "lora" / f"{name}.npz", allow_pickle=False) as file:
        tensors = {key.removeprefix("tensors/"): file[key] for key in file.files if key.startswith("tensors/")}
        return LoraFixture(str(file["config"]), tensors, file["logits"])


def write_lora_dir(directory: Path, config: str, tensors: Mapping[str, NDArray[Any]]) -> Path:
    """Make `directory` with PEFT's two files, and return it."""
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(config)
    write_safetensors(directory / "adapter_model.safetensors", tensors)
    return directory


def canonical_name(hf_name: str, model_type: str = "llama") -> str:
    """``model.layers.3.self_attn.q_proj.weight`` -> ``layers.3.wq``."""
    if hf_name in MODEL_NAMES:
        return MODEL_NAMES[hf_name]
    _, _, layer, rest = hf_name.split(".", 3)
    if ".experts." in rest:
        _, _, expert, part, kind = rest.split(".")
        return f"layers.{layer}.experts.{expert}.{EXPERT_NAMES[part]}" + (".bias" if kind == "bias" else "")
    names = LAYER_NAMES if model_type not in NORMS_AFTER else LAYER_NAMES | POST_NORM_NAMES
    names = LAYER_NAMES | GLM4_NORM_NAMES if model_type == "glm4" else names
    if model_type == "granitemoehybrid":  # the shared expert is all there is
        rest = rest.replace("shared_mlp.", "mlp.")
    return f"layers.{layer}.{names[rest]}"


def canonical_weights(fixture: Fixture) -> dict[str, NDArray[np.float32]]:
    """Weights for oracle.Oracle and spec_f32.Spec: float32, (rows, columns) or (n)."""
    hf = fixture.hf_config
    weights = {canonical_name(k, hf["model_type"]): w.astype(np.float32) for k, w in unfused(hf, fixture.hf_weights).items()}
    weights = {key: w.reshape(-1) if key.endswith("router") else w for key, w in weights.items()}  # vectors of the file
    weights = {key: w.reshape(len(w), -1).T.reshape(-1) if key.endswith("taps") else w for key, w in weights.items()}
    for i, table in enumerate(rope_tables(fixture)):
        weights[f"rope.{i}.inv_freq"] = table
    return split_key_biases(canonical_config(fixture), folded(hf, weights))


def rope_tables(fixture: Fixture) -> list[NDArray[np.float32]]:
    """Every table of RoPE frequencies, (head_dim / 2); pairs that are not turned have frequency 0."""
    half = head_dim_of(fixture.hf_config) // 2
    tables = [np.pad(table, (0, half - len(table))) for table in np.atleast_2d(fixture.inv_freq)]
    if fixture.hf_config["model_type"] == "gemma3_text":
        tables.reverse()
    if fixture.hf_config["model_type"] in NO_ROPE_WITHOUT_WINDOW:
        tables.append(np.zeros(half, np.float32))
    if 0 in (fixture.hf_config.get("no_rope_layers") or ()):
        tables.append(np.zeros(half, np.float32))
    return tables


def split_key_biases(config: Mapping[str, Any], weights: dict[str, Any]) -> dict[str, Any]:
    """With the feature "key_bias", the pairs of every wk.bias that reach LARGE_KEY_BIAS moved into a key_bias."""
    if "key_bias" not in config["requires"]:
        return weights
    weights = dict(weights)
    for layer in range(config["n_layers"]):
        bias = weights[f"layers.{layer}.wk.bias"].copy()
        apart, half = np.zeros_like(bias), config["head_dim"] // 2
        for first in range(0, len(bias), config["head_dim"]):
            for i in range(first, first + half):
                if max(abs(bias[i]), abs(bias[i + half])) >= LARGE_KEY_BIAS:
                    apart[[i, i + half]], bias[[i, i + half]] = bias[[i, i + half]], 0
        weights |= {f"layers.{layer}.wk.bias": bias, f"layers.{layer}.key_bias": apart}
    return weights


def canonical_config(fixture: Fixture) -> dict[str, Any]:
    """The keys of FORMAT.md's config.json for a fixture."""
    config = config_from_hf(fixture.hf_config, fixture.hf_weights)
    if (multipliers := folded_multipliers(fixture.hf_config)) != {}:
        config["extra"] = {"folded": multipliers}
    if (fixture.hf_config.get("rope_scaling") or {}).get("type") == "longrope" and n_ctx(fixture) is None:
        config["max_seq_len"] = fixture.hf_config["original_max_position_embeddings"]
    if fixture.hf_config["model_type"] == "ministral3":  # from there on queries grow
        config["max_seq_len"] = fixture.hf_config["rope_parameters"]["original_max_position_embeddings"]
    return config


def expected_hidden(fixture: Fixture) -> NDArray[np.float32]:
    """The fixture's hidden states as those of the folded model: without their means where norms subtract them."""
    mean = fixture.hidden.mean(axis=-1, keepdims=True, dtype=np.float64)
    return (fixture.hidden - mean).astype(np.float32) if fixture.hf_config["model_type"] in LAYER_NORMS else fixture.hidden


def n_ctx(fixture: Fixture) -> int | None:
    """What a freezer has to ask for: the positions that the fixture's text needs, of a model with a second table for them."""
    trained = fixture.hf_config.get("original_max_position_embeddings", len(fixture.token_ids))
    return fixture.hf_config["max_position_embeddings"] if len(fixture.token_ids) > trained else None


def config_from_hf(hf: Mapping[str, Any], weight_names: Iterable[str]) -> dict[str, Any]:
    """The keys of FORMAT.md's config.json, from those of a Hugging Face config.json."""
    present = set(weight_names)
    eos = hf["eos_token_id"]
    window: Any = 0
    if hf["model_type"] in ("mistral", "phi3", "mixtral", "starcoder2"):
        window = hf.get("sliding_window") or 0
    elif hf["model_type"] in (*NO_ROPE_WITHOUT_WINDOW, "ministral", "olmo3", "gpt_oss"):
        window = [hf["sliding_window"] if kind == "sliding_attention" else 0 for kind in hf["layer_types"]]
    elif hf["model_type"].startswith("gemma"):
        pattern = hf.get("sliding_window_pattern", 2)
        window = [hf["sliding_window"] if (i + 1) % pattern else 0 for i in range(hf["num_hidden_layers"])]
    elif hf.get("use_sliding_window"):  # Qwen's files carry a window that this turns off
        window = [hf["sliding_window"] if kind == "sliding_attention" else 0 for kind in hf["layer_types"]]
    present = {name.replace("gpt_neox.", "model.") for name in present}
    qkv_bias = not present.isdisjoint({"model.layers.0.self_attn.q_proj.bias", "model.layers.0.input_layernorm.bias"})
    qk_norm = not present.isdisjoint({f"model.layers.0.self_attn.{name}.weight" for name in ("q_norm", "query_layernorm")})
    qk_norm = qk_norm or hf["model_type"] in ("nanochat", "lfm2")
    norm = "rmsnorm_parallel" if hf["model_type"] in PARALLEL else NORMS_AFTER.get(hf["model_type"], "rmsnorm")
    layers: dict[str, Any] = {}
    if hf["model_type"] == "lfm2":
        window = [hf["conv_L_cache"] if kind == "conv" else 0 for kind in hf["layer_types"]]
        layers["mixer"] = ["short_conv" if kind == "conv" else "attention" for kind in hf["layer_types"]]
    activation = "geglu_tanh" if hf.get("hidden_activation") == "gelu_pytorch_tanh" else "swiglu"
    if hf["model_type"] in UNGATED:
        activation = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}.get(hf["hidden_act"], hf["hidden_act"])
    if hf["model_type"] == "gpt_oss":
        activation = "swiglu_clamped"
    biases = {"gate_up_bias": _FC_BIASES, "down_bias": _DOWN_BIASES, "output_bias": _OUTPUT_BIASES}
    writers = ("self_attn.o_proj", "self_attn.dense", "attention.dense")
    o_bias = not present.isdisjoint(f"model.layers.0.{name}.bias" for name in writers)
    return _optional_keys(hf) | {key: True for key, names in biases.items() if present & set(names)} | {
        "architecture": hf["architectures"][0],
        "dim": hf["hidden_size"],
        "hidden_dim": hidden_dim_of(hf),
        "n_layers": hf["num_hidden_layers"],
        "n_heads": hf["num_attention_heads"],
        "n_kv_heads": hf.get("num_key_value_heads", hf["num_attention_heads"]),
        "head_dim": head_dim_of(hf),
        "vocab_size": hf["vocab_size"],
        "max_seq_len": hf["max_position_embeddings"],
        "norm_eps": next((hf[key] for key in ("norm_epsilon", "norm_eps", "layer_norm_eps", "rms_norm_eps") if key in hf), 1e-5),
        "tie_embeddings": hf["tie_word_embeddings"] and hf["model_type"] not in LAYER_NORMS,
        "qkv_bias": qkv_bias,
        "o_bias": o_bias,
        "qk_norm": qk_norm,
        "layers": {"window": window, "rope": _rope(hf), "norm": norm, "activation": activation, **layers},
        "bos_token_id": hf["bos_token_id"],
        "eos_token_ids": eos if isinstance(eos, list) else [eos],
        "kinds": {"default": "int8_g64"},
        "requires": ["key_bias"] if qkv_bias and not qk_norm else [],
    }


_FC_BIASES = tuple(f"model.layers.0.{name}.bias" for name in ("post_attention_layernorm", "mlp.c_fc", "mlp.fc1", "mlp.up_proj"))
_OUTPUT_BIASES = ("model.norm.bias", "model.final_layer_norm.bias", "lm_head.bias")
_DOWN_BIASES = tuple(f"model.layers.0.mlp.{name}.bias" for name in ("c_proj", "fc2", "down_proj", "dense_4h_to_h"))


def hidden_dim_of(hf: Mapping[str, Any]) -> int:
    if hf["model_type"] == "lfm2":  # two thirds, in whole multiples
        width, multiple = int(2 * hf["intermediate_size"] / 3), hf["block_multiple_of"]
        return multiple * ((width + multiple - 1) // multiple)
    key = "shared_intermediate_size" if hf["model_type"] == "granitemoehybrid" else "moe_intermediate_size"
    return int(hf.get(key, hf["intermediate_size"]))


def _optional_keys(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Those keys that a file leaves out where they say nothing."""
    keys: dict[str, Any] = {"qk_norm_all_heads": True} if hf["model_type"] in ("olmo2", "olmo3", "olmoe") else {}
    if hf["model_type"] == "hunyuan_v1_dense":
        keys["qk_norm_after_rope"] = True
    if hf["model_type"] == "gpt_oss":
        keys |= dict.fromkeys(("attention_sinks", "router_bias", "gate_up_bias", "down_bias"), True)
    if n_experts := hf.get("num_experts", hf.get("num_local_experts")):
        keys |= {"n_experts": n_experts, "n_experts_used": hf["num_experts_per_tok"]}
        if hf.get("norm_topk_prob", True):
            keys["experts_normalized"] = True
        if shared := hf.get("shared_expert_intermediate_size", hf.get("shared_intermediate_size")):
            keys |= {"shared_hidden_dim": shared} | ({"shared_gated": True} if "norm_topk_prob" in hf else {})
    for name, key in (("attention_softcap", "attn_logit_softcapping"), ("logits_softcap", "final_logit_softcapping")):
        if hf.get(key):
            keys[name] = hf[key]
    return keys


def _rope(hf: Mapping[str, Any]) -> Any:
    """Every layer's table: the second one for SmolLM3's layers without RoPE and for Gemma 3's and OLMo 3's without a window."""
    if hf["model_type"] in (*NO_ROPE_WITHOUT_WINDOW, "olmo3"):
        return [int(kind == "full_attention") for kind in hf["layer_types"]]
    if hf["model_type"] == "gemma3_text":  # the fixture has full_attention's table first, the file that of layer 0
        return [0 if (i + 1) % hf["sliding_window_pattern"] else 1 for i in range(hf["num_hidden_layers"])]
    has_rope = hf.get("no_rope_layers")
    return [1 - x for x in has_rope] if has_rope else 0


# ---------------------------------------------------------------------- as a Hugging Face directory


def write_hf_dir(fixture: Fixture, directory: Path, dtype: str = "F16") -> Path:
    """Make `directory` with config.json, model.safetensors, tokenizer.json and
    generation_config.json, and return it. dtype F32 widens the matrices: the same values."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fixture.hf_config))
    weights = fixture.hf_weights
    if dtype == "F32":
        weights = {name: w.astype(np.float32) for name, w in weights.items()}
    write_safetensors(directory / "model.safetensors", weights)
    (directory / "tokenizer.json").write_text(tokenizer_json())
    ids = {key: fixture.hf_config[key] for key in ("bos_token_id", "eos_token_id")}
    (directory / "generation_config.json").write_text(json.dumps(ids))
    return directory


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """float16, float32 and uint8 arrays -> a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        dtype = {"float16": "F16", "float32": "F32", "uint8": "U8"}[tensor.dtype.name]
        end = offset + tensor.nbytes
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(t).tobytes() for t in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tokenizer_json() -> str:
    """A byte-level BPE of TOKENIZER_SIZE ids: three special tokens, the bytes, and the merges
    that make "hello"."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
    pieces = ["<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [a + b for a, b in merges]
    assert len(pieces) == TOKENIZER_SIZE
    model = models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(p, special=True) for p in pieces[:3]])
    return str(tokenizer.to_str())
