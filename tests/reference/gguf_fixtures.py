"""The fixtures as GGUF files: tensors under the names of the format's own map, changed as its converters change them, and the
keys that these write. Written with the format's own package."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from . import fixtures
from .fixtures import Fixture
from .folds import has_yarn, head_dim_of, turned, unfused

ARCHITECTURES = {
    "granite": "granite", "granitemoehybrid": "granite", "phi3": "phi3", "smollm3": "smollm3", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "olmo2": "olmo2", "mixtral": "llama", "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe", "granitemoe": "granitemoe", "granitemoeshared": "granitemoe", "qwen2_moe": "qwen2moe",
    "starcoder2": "starcoder2", "glm": "chatglm", "glm4": "glm4", "exaone4": "exaone4", "ernie4_5": "ernie4_5",
    "seed_oss": "seed_oss", "cohere": "command-r", "cohere2": "cohere2", "phi": "phi2", "stablelm": "stablelm", "olmo": "olmo",
    "gpt_oss": "gpt-oss", "ministral3": "mistral3", "hunyuan_v1_dense": "hunyuan-dense",
    "arcee": "arcee", "nemotron": "nemotron", "apertus": "apertus", "gpt_neox": "gptneox",
    "olmo3": "olmo2", "minicpm": "minicpm", "internlm2": "internlm2", "lfm2": "lfm2", "gemma": "gemma", "exaone": "exaone",
    "hunyuan_v1_moe": "hunyuan-moe", "qwen2_vl_text": "qwen2vl", "qwen2_5_vl_text": "qwen2vl", "qwen3_vl_text": "qwen3vl",
    "qwen3_vl_moe_text": "qwen3vlmoe",
}  # fmt: skip
# q and k: pairs (i, i + head_dim / 2) of RoPE become neighbours
PERMUTED = ("llama", "granite", "granitemoe", "smollm3", "olmo", "minicpm", "internlm2", "mistral3", "arcee")


def architecture_of(fixture: Fixture) -> str:
    """The format's name of a fixture's architecture; "" if `write` does not know it. Other Qwen2 models of the fixtures have
    windows that differ between layers, which the format does not have for them."""
    return "qwen2" if fixture.name == "qwen2_yarn" else ARCHITECTURES.get(fixture.hf_config["model_type"], "")


def expressible(fixture: Fixture) -> Fixture:
    """The fixture without what the format has no key for: Gemma's query_pre_attn_scalar is head_dim there, whether the
    weights of experts sum to 1 is the architecture's, and converters leave StarCoder2's window out. Llama's RoPE scaling is a
    tensor there, whose quotients round otherwise."""
    if fixture.hf_config["model_type"] == "apertus":
        return replace(fixture, hf_config=fixture.hf_config | {"rope_scaling": None})
    if "norm_topk_prob" in fixture.hf_config:
        return replace(fixture, hf_config=fixture.hf_config | {"norm_topk_prob": fixture.hf_config["model_type"] == "qwen3_moe"})
    if fixture.hf_config["model_type"] == "starcoder2":
        return replace(fixture, hf_config=fixture.hf_config | {"sliding_window": None})
    if "query_pre_attn_scalar" not in fixture.hf_config:
        return fixture
    return replace(fixture, hf_config=fixture.hf_config | {"query_pre_attn_scalar": head_dim_of(fixture.hf_config)})


def write(fixture: Fixture, path: Path) -> Path:
    """Make the file and return its path."""
    hf = fixture.hf_config
    arch = architecture_of(fixture)
    writer = gguf.GGUFWriter(path, arch)
    _add_sizes(writer, hf)
    EXTRA_KEYS[arch](writer, hf)
    if arch == "apertus":
        _add_xielu(writer, fixture)
    _add_tokenizer(writer, hf)
    for name, array in _tensors(fixture, arch).items():
        if arch == "gpt-oss" and name.endswith("_exps.weight"):
            mxfp4 = gguf.GGMLQuantizationType.MXFP4
            writer.add_tensor(name, gguf.quants.quantize(array, mxfp4), raw_dtype=mxfp4)
            continue
        writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(fixture: Fixture, arch: str) -> dict[str, NDArray[Any]]:
    hf = fixture.hf_config
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, hf["num_hidden_layers"])
    tensors: dict[str, NDArray[Any]] = {}
    weights = unfused(hf, fixture.hf_weights) if arch in ("internlm2", "gpt-oss") else fixture.hf_weights
    for name, w in _stacked(weights).items():
        if ".act_fn." in name:  # keys
            continue
        if arch != "hunyuan-moe":
            name = name.replace("shared_mlp.", "mlp." if arch == "granite" else "mlp.shared_expert.")
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        target += ".weight" if name.endswith(".sinks") else ""
        tensors[target] = _converted(hf, arch, name, w)
    scaling = hf.get("rope_scaling") or {}
    for key in ("short", "long"):
        if f"{key}_factor" in scaling:
            tensors[f"rope_factors_{key}.weight"] = np.array(scaling[f"{key}_factor"], np.float32)
    return tensors


def _stacked(weights: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The experts' matrices in one tensor (n_experts, rows, columns)."""
    stacked: dict[str, Any] = {}
    for name, w in weights.items():
        before, found, after = name.partition(".experts.")
        if name.endswith("input_linear.weight") and w.ndim == 2:
            for half, part in zip(np.split(w, 2), ("gate_proj", "up_proj"), strict=True):
                stacked[name.replace("input_linear", part)] = half
        elif name.endswith("shared_mlp.output_linear.weight"):
            stacked[name.replace("output_linear", "down_proj")] = w
        elif name.endswith("experts.gate_up_proj"):
            for half, part in zip(np.split(w, 2, axis=1), ("gate_proj", "up_proj"), strict=True):
                stacked[name.replace("gate_up_proj", f"{part}.weight")] = half
        elif name.endswith("experts.down_proj"):
            stacked[f"{name}.weight"] = w
        elif name.endswith("input_linear.weight"):
            for half, part in zip(np.split(w, 2, axis=1), ("w1", "w3"), strict=True):
                stacked[name.replace("input_linear", f"experts.{part}")] = half
        elif found:
            stacked.setdefault(before + found + after.partition(".")[2], []).append(w)
        else:
            stacked[name] = w
    return {name: np.stack(w) if isinstance(w, list) else w for name, w in stacked.items()}


def _converted(hf: dict[str, Any], arch: str, name: str, w: NDArray[Any]) -> NDArray[Any]:
    w = w.astype(np.float32)
    if arch in PERMUTED and name.endswith(("q_proj.weight", "k_proj.weight", "wq.weight", "wk.weight")):
        return w.reshape(-1, 2, head_dim_of(hf) // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
    if name.endswith("conv.conv.weight"):
        return w[:, 0]
    if ".query_key_value." in name:  # of each head its query, its key, its value
        return w.reshape(hf["num_attention_heads"], 3, head_dim_of(hf), -1).swapaxes(0, 1).reshape(w.shape)
    if (arch.startswith("gemma") or arch == "nemotron") and name.endswith("norm.weight"):
        return w + np.float32(1)
    return w


# ---------------------------------------------------------------------- metadata


def _add_sizes(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_feed_forward_length(fixtures.hidden_dim_of(hf) if hf["model_type"] == "lfm2" else hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf.get("num_key_value_heads", hf["num_attention_heads"]))
    if "rms_norm_eps" in hf or hf["model_type"] == "lfm2":
        writer.add_layer_norm_rms_eps(hf["norm_eps" if hf["model_type"] == "lfm2" else "rms_norm_eps"])
    else:
        writer.add_layer_norm_eps(hf.get("norm_epsilon", hf.get("norm_eps", hf.get("layer_norm_eps", 1e-5))))
    scaling, d = hf.get("rope_scaling") or hf.get("rope_parameters") or {}, head_dim_of(hf)
    base = hf.get("rope_theta", hf.get("rotary_emb_base")) or scaling["rope_theta"]
    writer.add_rope_freq_base(base * scaling.get("alpha", 1.0) ** (d / (d - 2)))


def _granite(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    writer.add_attention_scale(hf["attention_multiplier"])
    writer.add_embedding_scale(hf["embedding_multiplier"])
    writer.add_residual_scale(hf["residual_multiplier"])
    writer.add_logit_scale(hf["logits_scaling"])
    writer.add_rope_dimension_count(head_dim_of(hf))
    if hf["model_type"] == "granitemoehybrid":
        writer.add_expert_count(hf["num_local_experts"])
        writer.add_expert_used_count(hf["num_experts_per_tok"])
        writer.add_expert_shared_feed_forward_length(hf["shared_intermediate_size"])
        writer.add_head_count_kv([hf["num_key_value_heads"]] * hf["num_hidden_layers"])
        writer.add_ssm_conv_kernel(hf["mamba_d_conv"])
        writer.add_ssm_state_size(hf["mamba_d_state"])
        writer.add_ssm_group_count(hf["mamba_n_groups"])
        writer.add_ssm_inner_size(hf["mamba_expand"] * hf["hidden_size"])
        writer.add_ssm_time_step_rank(hf["mamba_n_heads"])
        writer.add_rope_scaling_finetuned(hf["position_embedding_type"] == "rope")


def _phi3(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    trained, context = hf["original_max_position_embeddings"], hf["max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(trained)
    writer.add_rope_dimension_count(turned(hf))
    writer.add_sliding_window(hf.get("sliding_window") or 0)
    if hf.get("rope_scaling"):
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(context / trained) / math.log(trained)))


def _smollm3(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    writer.add_rope_dimension_count(head_dim_of(hf))
    if has_yarn(hf):
        _yarn(writer, hf)


def _gemma(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    writer.add_key_length(hf["head_dim"])
    writer.add_value_length(hf["head_dim"])
    writer.add_sliding_window(hf["sliding_window"])
    if hf["model_type"] == "gemma2":
        writer.add_attn_logit_softcapping(hf["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(hf["final_logit_softcapping"])
        return
    writer.add_sliding_window_pattern([(i + 1) % hf["sliding_window_pattern"] != 0 for i in range(hf["num_hidden_layers"])])
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(hf["rope_scaling"]["factor"])


def _olmo2(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    writer.add_rope_dimension_count(head_dim_of(hf))
    if hf["model_type"] == "olmo3":
        _windows(writer, hf)
        _yarn(writer, hf)


def _yarn(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    scaling = hf.get("rope_scaling") or hf["rope_parameters"]
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling["factor"])
    writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if "beta_fast" in scaling:
        writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
    if "attention_factor" in scaling:
        writer.add_rope_scaling_yarn_attn_factor(scaling["attention_factor"])


def _mistral3(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    _rotary(writer, hf)
    _yarn(writer, hf)
    writer.add_rope_scaling_yarn_log_mul(hf["rope_parameters"]["mscale_all_dim"])
    writer.add_attn_temperature_scale(hf["rope_parameters"]["llama_4_scaling_beta"])


def _gpt_oss(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    _experts(writer, hf)
    _yarn(writer, hf)
    writer.add_sliding_window(hf["sliding_window"])
    writer.add_expert_feed_forward_length(hf["intermediate_size"])


def _lfm2(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    heads = hf["num_key_value_heads"]
    writer.add_head_count_kv([0 if kind == "conv" else heads for kind in hf["layer_types"]])
    writer.add_shortconv_l_cache(hf["conv_L_cache"])
    writer.add_key_length(hf["head_dim"])
    writer.add_value_length(hf["head_dim"])
    writer.add_vocab_size(hf["vocab_size"])


def _minicpm(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    writer.add_rope_dimension_count(head_dim_of(hf))
    writer.add_embedding_scale(hf["scale_emb"])
    writer.add_residual_scale(hf["scale_depth"] / hf["num_hidden_layers"] ** 0.5)
    writer.add_logit_scale(hf["hidden_size"] / hf["dim_model_base"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)


def _internlm2(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    writer.add_rope_dimension_count(head_dim_of(hf))


def _experts(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    writer.add_expert_count(hf.get("num_experts", hf.get("num_local_experts")))
    writer.add_expert_used_count(hf["num_experts_per_tok"])
    if "moe_intermediate_size" in hf:
        writer.add_expert_feed_forward_length(hf["moe_intermediate_size"])
    if shared := hf.get("shared_expert_intermediate_size", hf.get("shared_intermediate_size")):
        writer.add_expert_shared_feed_forward_length(shared)
    if "head_dim" in hf:
        writer.add_key_length(hf["head_dim"])
        writer.add_value_length(hf["head_dim"])


def _hunyuan_moe(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    _rotary(writer, hf)
    writer.add_expert_count(hf["num_experts"])
    writer.add_expert_used_count(hf["moe_topk"])
    writer.add_expert_shared_count(1)
    writer.add_expert_shared_feed_forward_length(hf["intermediate_size"])
    writer.add_expert_feed_forward_length(hf["intermediate_size"])


def _qwen_vl(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    writer.add_rope_dimension_sections([*hf["rope_parameters"]["mrope_section"], 0])
    if hf["rope_parameters"]["rope_type"] == "yarn":
        _yarn(writer, hf)
    if not hf["model_type"].startswith("qwen2"):
        writer.add_key_length(hf["head_dim"])
        writer.add_value_length(hf["head_dim"])
        writer.add_num_deepstack_layers(1)
    if "num_local_experts" in hf:
        writer.add_expert_count(hf["num_local_experts"])
        writer.add_expert_used_count(hf["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(hf["moe_intermediate_size"])


def _rotary(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    writer.add_rope_dimension_count(turned(hf))
    if has_yarn(hf):
        _yarn(writer, hf)
    if "use_parallel_residual" in hf:
        writer.add_parallel_residual(hf["use_parallel_residual"])
    if "head_dim" in hf:
        writer.add_key_length(hf["head_dim"])
        writer.add_value_length(hf["head_dim"])


def _windows(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    writer.add_sliding_window(hf["sliding_window"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in hf["layer_types"]])


def _command_r(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    writer.add_logit_scale(hf["logit_scale"])
    if "layer_types" in hf:
        _windows(writer, hf)


def _apertus(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    writer.add_rope_dimension_count(head_dim_of(hf))


def _add_xielu(writer: gguf.GGUFWriter, fixture: Fixture) -> None:
    for part in ("alpha_p", "alpha_n", "beta", "eps"):
        names = [f"model.layers.{i}.mlp.act_fn.{part}" for i in range(fixture.hf_config["num_hidden_layers"])]
        getattr(writer, f"add_xielu_{part}")([float(fixture.hf_weights[name].reshape(())) for name in names])


def _granite_moe(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    _granite(writer, hf)
    _experts(writer, hf)


EXTRA_KEYS: dict[str, Callable[[gguf.GGUFWriter, dict[str, Any]], None]] = {
    "granite": _granite, "phi3": _phi3, "smollm3": _smollm3, "gemma2": _gemma, "gemma3": _gemma,
    "olmo2": _olmo2, "llama": _experts, "qwen3moe": _experts,
    "olmoe": _experts, "granitemoe": _granite_moe, "qwen2moe": _experts, "starcoder2": lambda _writer, _hf: None,
    "chatglm": _rotary, "glm4": _rotary, "ernie4_5": _rotary, "seed_oss": _rotary,
    "phi2": _rotary, "stablelm": _rotary, "olmo": _rotary,
    "exaone4": _windows, "command-r": _command_r, "cohere2": _command_r,
    "minicpm": _minicpm, "internlm2": _internlm2, "gpt-oss": _gpt_oss,
    "mistral3": _mistral3, "qwen2": _yarn, "hunyuan-dense": _rotary, "lfm2": _lfm2,
    "arcee": _rotary, "nemotron": _rotary, "apertus": _apertus, "gptneox": _rotary,
    "gemma": _rotary, "exaone": _rotary, "hunyuan-moe": _hunyuan_moe,
    **dict.fromkeys(("qwen2vl", "qwen3vl", "qwen3vlmoe"), _qwen_vl),
}  # fmt: skip


def _add_tokenizer(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    model = json.loads(fixtures.tokenizer_json())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(hf["bos_token_id"])
    writer.add_eos_token_id(hf["eos_token_id"])
