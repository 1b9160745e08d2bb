"""Make data/*.npz: tiny random models of every architecture and what transformers computes with
them in float32.

    pip install '.[oracle]' && python tests/reference/make_fixtures.py [NAME ...]

A fixture holds (keys of the .npz)
    config            the model's config.json, as published checkpoints write it
    weights/<name>    under the names of the Hugging Face checkpoint: matrices float16, with values
                      that float32 shares exactly; norms and biases float32 (on a coarse grid,
                      normed embeddings would often lie exactly between two codes, and a
                      comparison of codes would only count those ties)
    token_ids         (n_tokens) int32
    rows              (n_rows) positions that hidden and logits keep
    hidden            (n_layers + 1, n_rows, dim) float32: the input of layer 0, then the output
                      of every layer
    logits            (n_rows, vocab_size) float32
    inv_freq          (n_tables, turned elements of a head / 2) float32, every RoPE scaling applied: Gemma 3
                      has two tables, of its full and of its sliding layers, OLMo 3 of its sliding and of its full
                      ones. Older fixtures have (head_dim / 2)

The dimensions are small and awkward on purpose: widths that 64 does not divide, vocabularies that
16 does not, every ratio of query to kv heads from 1 to 4, more positions than one attention chunk
has, windows that leave a whole chunk out of sight, layers with a window beside layers without.
Magnitudes are those of real models where these are known for them: large key biases (LARGE_KEY_BIAS),
channels of the residual stream that are far larger than the others (LOUD_CHANNELS), and what the multipliers
of an architecture presuppose (MAGNITUDES).
"""

from __future__ import annotations

import copy
import json
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

DATA = Path(__file__).parent / "data"
MATRIX_GRID = 2.0**-8  # exact in float16, and compresses

COMMON: dict[str, Any] = {
    "num_hidden_layers": 2,
    "vocab_size": 263,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_theta": 10000.0,
}


def shape(dim: int, hidden_dim: int, n_heads: int, n_kv_heads: int, head_dim: int | None = None) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "hidden_size": dim,
        "intermediate_size": hidden_dim,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
    }
    return sizes if head_dim is None else {**sizes, "head_dim": head_dim}


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

LONG_ROPE = {
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.0, 1.02, 1.05, 1.1, 1.2],
        "long_factor": [1.0, 1.12, 1.5, 3.0, 6.5, 8.0],
    },
}

# name -> (config.json, n_tokens). Keys are those of published checkpoints; one file is in the
# spelling of transformers 5.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "llama_tied": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **shape(64, 136, 4, 4),
         "tie_word_embeddings": True},
        48,
    ),
    "llama_untied": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **shape(64, 100, 4, 2),
         "tie_word_embeddings": False, "vocab_size": 277},
        48,
    ),
    "llama3_rope": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **shape(64, 120, 4, 1),
         "tie_word_embeddings": True, "rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING},
        300,
    ),
    "llama_linear_bias": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **shape(96, 88, 3, 1),
         "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
         "rope_scaling": {"type": "linear", "factor": 4.0}},
        48,
    ),
    "mistral_window": (
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"],
         **shape(64, 104, 2, 1, 32),
         "tie_word_embeddings": False, "sliding_window": 16},
        48,
    ),
    "mistral_long": (
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"],
         **shape(48, 72, 3, 1, 16),
         "tie_word_embeddings": False, "sliding_window": 40},
        300,
    ),
    "qwen2": (
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **shape(128, 80, 2, 1),
         "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "use_sliding_window": False,
         "sliding_window": 8, "max_window_layers": 0, "rope_theta": 1000000.0},
        48,
    ),
    "qwen3": (
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **shape(80, 112, 4, 2, 32),
         "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "attention_bias": False,
         "rope_theta": None,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
        300,
    ),
    "qwen3_mixed": (
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **shape(48, 40, 2, 1, 16),
         "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "attention_bias": False,
         "use_sliding_window": True, "sliding_window": 40,
         "layer_types": ["full_attention", "sliding_attention"]},
        300,
    ),
    "qwen2_key_bias": (
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **shape(64, 104, 4, 2, 32),
         "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
         "use_sliding_window": True, "sliding_window": 40,
         "layer_types": ["full_attention", "sliding_attention"]},
        300,
    ),
    "granite": (
        {"model_type": "granite", "architectures": ["GraniteForCausalLM"], **shape(64, 72, 4, 2),
         "tie_word_embeddings": True, "attention_bias": False, "attention_multiplier": 0.0625, "embedding_multiplier": 12.0,
         "residual_multiplier": 0.22, "logits_scaling": 8.0},
        48,
    ),
    "phi3_window": (
        {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 2, **shape(48, 72, 3, 3),
         "tie_word_embeddings": False, "sliding_window": 16, "rope_scaling": None, "original_max_position_embeddings": 512},
        48,
    ),
    "phi4_mini": (
        {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 2, **shape(48, 72, 3, 1),
         "tie_word_embeddings": True, "sliding_window": None, "partial_rotary_factor": 0.75, **LONG_ROPE},
        48,
    ),
    "phi4_mini_long": (
        {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 2, **shape(48, 72, 3, 1),
         "tie_word_embeddings": True, "sliding_window": None, "partial_rotary_factor": 0.75, **LONG_ROPE},
        80,
    ),
    "smollm3": (
        {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "pad_token_id": 2, **shape(48, 40, 3, 1),
         "num_hidden_layers": 4, "tie_word_embeddings": True, "attention_bias": False, "rms_norm_eps": 1e-6,
         "rope_theta": 5000000.0, "no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4,
         "use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 4},
        48,
    ),
    "gemma3": (
        {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], **shape(48, 72, 2, 1, 32),
         "num_hidden_layers": 3, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "hidden_act": None,
         "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24, "sliding_window": 40,
         "sliding_window_pattern": 3, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        300,
    ),
    "gemma2": (
        {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], **shape(64, 72, 4, 2, 16),
         "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
         "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16, "sliding_window": 40,
         "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
        80,
    ),
    "olmo2": (
        {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], **shape(48, 88, 3, 1),
         "tie_word_embeddings": False, "attention_bias": False, "rope_theta": 500000.0, "rms_norm_eps": 1e-6},
        48,
    ),
    "mixtral": (
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **shape(48, 40, 3, 1),
         "tie_word_embeddings": False, "sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2,
         "rope_theta": 1000000.0},
        48,
    ),
    "qwen3_moe": (
        {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **shape(48, 72, 2, 1, 16),
         "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "attention_bias": False, "rope_theta": 1000000.0,
         "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True,
         "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False},
        48,
    ),
    "qwen3_moe_plain": (
        {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **shape(48, 72, 2, 1, 16),
         "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "attention_bias": False, "rope_theta": 1000000.0,
         "num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": False,
         "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False},
        48,
    ),
    "olmoe": (
        {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], **shape(48, 24, 3, 1),
         "tie_word_embeddings": False, "attention_bias": False, "clip_qkv": None, "num_experts": 8, "num_experts_per_tok": 3,
         "norm_topk_prob": False},
        48,
    ),
    "granite_moe": (
        {"model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"], **shape(48, 24, 3, 1),
         "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "attention_bias": False, "num_local_experts": 5,
         "num_experts_per_tok": 2, "embedding_multiplier": 12.0, "attention_multiplier": 0.0625,
         "residual_multiplier": 0.22, "logits_scaling": 6.0},
        48,
    ),
    "qwen2_moe": (
        {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], **shape(48, 72, 3, 1),
         "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False,
         "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 56,
         "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        48,
    ),
    "granite_moe_shared": (
        {"model_type": "granitemoeshared", "architectures": ["GraniteMoeSharedForCausalLM"], **shape(48, 40, 3, 1),
         "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "attention_bias": False, "num_local_experts": 5,
         "num_experts_per_tok": 3, "shared_intermediate_size": 24, "embedding_multiplier": 12.0,
         "attention_multiplier": 0.0625, "residual_multiplier": 0.22, "logits_scaling": 6.0},
        48,
    ),
    "starcoder2": (
        {"model_type": "starcoder2", "architectures": ["Starcoder2ForCausalLM"], **shape(48, 72, 3, 1),
         "tie_word_embeddings": True, "rms_norm_eps": None, "norm_epsilon": 1e-5, "hidden_act": "gelu_pytorch_tanh",
         "use_bias": True, "sliding_window": 20, "rope_theta": 100000.0},
        48,
    ),
    "glm": (
        {"model_type": "glm", "architectures": ["GlmForCausalLM"], **shape(32, 40, 2, 1, 16), "tie_word_embeddings": False,
         "attention_bias": True, "partial_rotary_factor": 0.5, "pad_token_id": 2},
        48,
    ),
    "ministral": (
        {"model_type": "ministral", "architectures": ["MinistralForCausalLM"], **shape(32, 40, 3, 1, 16),
         "tie_word_embeddings": False, "sliding_window": 20, "layer_types": ["full_attention", "sliding_attention"]},
        48,
    ),
    "glm4": (
        {"model_type": "glm4", "architectures": ["Glm4ForCausalLM"], **shape(32, 40, 2, 1, 16), "tie_word_embeddings": False,
         "attention_bias": True, "partial_rotary_factor": 0.5, "pad_token_id": 2},
        48,
    ),
    "exaone4": (
        {"model_type": "exaone4", "architectures": ["Exaone4ForCausalLM"], **shape(32, 40, 2, 1), "tie_word_embeddings": True,
         "sliding_window": 20, "sliding_window_pattern": 2, "layer_types": ["sliding_attention", "full_attention"],
         "rope_theta": 1000000.0},
        48,
    ),
    "ernie4_5": (
        {"model_type": "ernie4_5", "architectures": ["Ernie4_5ForCausalLM"], **shape(32, 40, 2, 1, 16),
         "tie_word_embeddings": True, "use_bias": True, "rope_theta": 500000.0},
        48,
    ),
    "seed_oss": (
        {"model_type": "seed_oss", "architectures": ["SeedOssForCausalLM"], **shape(32, 40, 3, 1, 16),
         "tie_word_embeddings": False, "attention_bias": True, "attention_out_bias": False, "mlp_bias": False,
         "attention_dropout": 0.0, "residual_dropout": 0.0},
        48,
    ),
    "cohere": (
        {"model_type": "cohere", "architectures": ["CohereForCausalLM"], **shape(48, 40, 3, 1), "tie_word_embeddings": True,
         "rms_norm_eps": None, "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "attention_bias": False, "use_qk_norm": False},
        48,
    ),
    "cohere2": (
        {"model_type": "cohere2", "architectures": ["Cohere2ForCausalLM"], **shape(48, 40, 3, 1), "tie_word_embeddings": True,
         "rms_norm_eps": None, "layer_norm_eps": 1e-5, "logit_scale": 0.25, "attention_bias": False, "sliding_window": 20,
         "layer_types": ["sliding_attention", "full_attention"]},
        48,
    ),
    "phi2": (
        {"model_type": "phi", "architectures": ["PhiForCausalLM"], **shape(48, 72, 3, 3), "tie_word_embeddings": False,
         "rms_norm_eps": None, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5,
         "qk_layernorm": False},
        48,
    ),
    "stablelm": (
        {"model_type": "stablelm", "architectures": ["StableLmForCausalLM"], **shape(48, 72, 3, 3), "tie_word_embeddings": False,
         "rms_norm_eps": None, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "use_qkv_bias": True,
         "qk_layernorm": False, "use_parallel_residual": False},
        48,
    ),
    "olmo": (
        {"model_type": "olmo", "architectures": ["OlmoForCausalLM"], **shape(48, 40, 3, 3), "tie_word_embeddings": False,
         "rms_norm_eps": None, "attention_bias": False, "clip_qkv": None},
        48,
    ),
    "olmo3": (
        {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], **shape(48, 40, 3, 1), "num_hidden_layers": 3,
         "tie_word_embeddings": False, "attention_bias": False, "rms_norm_eps": 1e-6, "sliding_window": 20,
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
         "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64,
                          "attention_factor": 1.2079441541679836, "beta_fast": 4.0, "beta_slow": 0.25}},
        80,
    ),
    "minicpm": (
        {"model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"], **shape(48, 40, 3, 1), "tie_word_embeddings": True,
         "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16,
         "rope_scaling": {"rope_type": "longrope", "short_factor": LONG_ROPE["rope_scaling"]["short_factor"] + [1.3, 1.4],
                          "long_factor": LONG_ROPE["rope_scaling"]["long_factor"] + [8.5, 9.0],
                          "original_max_position_embeddings": 512}},
        48,
    ),
    "internlm2": (
        {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], **shape(64, 40, 4, 2),
         "tie_word_embeddings": False, "bias": False, "rope_theta": 1000000.0,
         "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        48,
    ),
    "internlm3": (
        {"model_type": "internlm3", "architectures": ["InternLM3ForCausalLM"], **shape(32, 40, 2, 1, 16),
         "tie_word_embeddings": False, "qkv_bias": True, "bias": True, "rope_theta": 50000000.0,
         "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
        48,
    ),
    "ministral3": (
        {"model_type": "ministral3", "architectures": ["Ministral3ForCausalLM"], **shape(32, 40, 3, 1, 16),
         "tie_word_embeddings": True, "sliding_window": None, "rope_theta": None,
         "rope_parameters": {"rope_type": "yarn", "type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 4.0,
                             "beta_slow": 0.25, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
                             "original_max_position_embeddings": 64}},
        48,
    ),
    "gpt_oss": (
        {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], **shape(64, 32, 4, 2, 16), "tie_word_embeddings": False,
         "attention_bias": True, "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"],
         "num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 150000, "swiglu_limit": 7.0,
         "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 4.0,
                          "beta_slow": 0.25, "truncate": False},
         "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}},
        300,
    ),
}  # fmt: skip


def judge(config_json: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model of transformers that computes the same, of a model that it has only as code beside the
    published files: MiniCPM is Granite's arithmetic, InternLM Llama's."""
    kind, config = config_json["model_type"], {**config_json}
    config.pop("quantization_config", None)  # its values are the parameters' of a model that is not quantized
    if kind in ("internlm2", "internlm3"):
        has_bias = config_json["bias"]
        return {**config, "model_type": "llama", "attention_bias": has_bias, "mlp_bias": has_bias}
    if kind != "minicpm":
        return config
    return {
        **config,
        "model_type": "granite",
        "embedding_multiplier": config["scale_emb"],
        "residual_multiplier": config["scale_depth"] / config["num_hidden_layers"] ** 0.5,
        "attention_multiplier": (config["hidden_size"] / config["num_attention_heads"]) ** -0.5,
        "logits_scaling": config["hidden_size"] / config["dim_model_base"],
    }


def turn_windows_plainly(model: Any) -> Any:
    """Let OLMo 3's layers with a window turn without YaRN, as its authors' code, the readers of its GGUF files and transformers 4
    have it; transformers 5 has one table for all layers. Returns the module of the plain table."""
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    plain = type(model.model.rotary_emb)(config)

    def replace(_module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "position_embeddings": plain(args[0], kwargs["position_ids"])}

    for layer, kind in zip(model.model.layers, model.config.layer_types, strict=True):
        if kind == "sliding_attention":
            layer.register_forward_pre_hook(replace, with_kwargs=True)
    return plain

LOUD_CHANNELS, LOUDNESS = (5, 33), 5.0  # of the embeddings of the fixtures that MAGNITUDES names

# name -> end of a weight's name -> (mean, standard deviation), the latter for matrices in units of
# 1 / sqrt(columns). Granite's multipliers make scores and logits small, and its weights make up for it.
# Gemma's gains are 1 + w, far above 1 before attention and below 1 after it; its embeddings are small and
# then scaled by sqrt(hidden_size).
_GEMMA_NORMS = {
    "input_layernorm.weight": (3.0, 1.0), "post_attention_layernorm.weight": (-0.5, 0.2),
    "pre_feedforward_layernorm.weight": (3.0, 1.0), "post_feedforward_layernorm.weight": (-0.5, 0.2),
    "embed_tokens.weight": (0.0, 0.5),
}  # fmt: skip
_OLMO2 = {
    "post_attention_layernorm.weight": (0.5, 0.1), "post_feedforward_layernorm.weight": (0.5, 0.1),
    "model.norm.weight": (1.5, 0.3),
}  # fmt: skip
MAGNITUDES: dict[str, dict[str, tuple[float, float]]] = {
    "granite": {
        "q_proj.weight": (0.0, 4.0), "k_proj.weight": (0.0, 4.0), "o_proj.weight": (0.0, 4.0), "down_proj.weight": (0.0, 4.0),
        "gate_proj.weight": (0.0, 2.4), "up_proj.weight": (0.0, 2.4),
        "embed_tokens.weight": (0.0, 0.5), "model.norm.weight": (30.0, 7.0),
    },
    "phi3_window": {"model.norm.weight": (0.8, 0.2)},
    "phi4_mini": {"model.norm.weight": (0.5, 0.1)},
    "phi4_mini_long": {"model.norm.weight": (0.5, 0.1)},
    "smollm3": {"q_proj.weight": (0.0, 1.8), "k_proj.weight": (0.0, 1.8), "model.norm.weight": (0.5, 0.1)},
    "gemma3": {**_GEMMA_NORMS, "q_norm.weight": (0.1, 0.3), "k_norm.weight": (0.1, 0.3), "model.norm.weight": (2.0, 0.5)},
    "gemma2": {**_GEMMA_NORMS, "q_proj.weight": (0.0, 1.0), "k_proj.weight": (0.0, 1.0), "model.norm.weight": (5.0, 1.0)},
    "mixtral": {"mlp.gate.weight": (0.0, 3.0), "model.norm.weight": (0.8, 0.1)},
    "qwen3_moe": {"mlp.gate.weight": (0.0, 3.0), "model.norm.weight": (0.6, 0.1)},
    "qwen3_moe_plain": {"mlp.gate.weight": (0.0, 3.0), "model.norm.weight": (0.5, 0.1)},
    "olmoe": {"mlp.gate.weight": (0.0, 3.0), "model.norm.weight": (0.6, 0.1)},
    "granite_moe": {
        "q_proj.weight": (0.0, 4.0), "k_proj.weight": (0.0, 4.0), "o_proj.weight": (0.0, 4.0), "experts.down_proj": (0.0, 2.0),
        "experts.gate_up_proj": (0.0, 2.4), "router.weight": (0.0, 3.0),
        "embed_tokens.weight": (0.0, 0.5), "model.norm.weight": (18.0, 4.0),
    },
    "qwen2_moe": {"mlp.gate.weight": (0.0, 3.0), "shared_expert_gate.weight": (0.0, 2.0), "model.norm.weight": (0.9, 0.1)},
    "granite_moe_shared": {
        "q_proj.weight": (0.0, 4.0), "k_proj.weight": (0.0, 4.0), "o_proj.weight": (0.0, 4.0), "output_linear.weight": (0.0, 2.0),
        "input_linear.weight": (0.0, 2.4), "router.layer.weight": (0.0, 8.0),
        "embed_tokens.weight": (0.0, 0.5), "model.norm.weight": (6.0, 1.0),
    },
    "starcoder2": {"embed_tokens.weight": (0.1, 2.0), "model.norm.weight": (0.6, 0.1)},
    "cohere": {"embed_tokens.weight": (0.1, 2.0), "model.norm.weight": (7.0, 1.0)},
    "cohere2": {"embed_tokens.weight": (0.1, 2.0), "model.norm.weight": (2.0, 0.3)},
    "phi2": {"embed_tokens.weight": (0.1, 2.0), "final_layernorm.weight": (0.7, 0.1)},
    "stablelm": {"embed_tokens.weight": (0.1, 2.0), "model.norm.weight": (0.7, 0.1)},
    "olmo": {"embed_tokens.weight": (0.1, 2.0), "lm_head.weight": (0.0, 0.8)},
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "minicpm": {"model.norm.weight": (3.0, 0.4)},
}  # fmt: skip

# Qwen2's key biases: all but a few are about 1, and those few, mostly of the slow pairs, reach 211
# (Qwen2.5-Coder-0.5B). (layer, kv head) -> element of the head -> bias; elements i and i + 16 are a
# pair. A pair or two turn within the fixture's positions, so that the place of a key matters to it.
LARGE_KEY_BIAS: dict[str, dict[tuple[int, int], dict[int, float]]] = {
    "qwen2_key_bias": {
        (0, 0): {15: -211.0, 31: -111.5, 14: -137.0, 29: -34.25, 3: 10.0, 19: -7.5},
        (0, 1): {30: 117.5, 13: 92.5, 29: -64.5, 5: 9.25},
        (1, 0): {31: 158.0, 15: -97.0, 14: 91.5, 30: 51.25, 11: 26.875},
        (1, 1): {28: -44.75, 12: 36.75, 4: -14.0, 20: 11.0},
    }
}


def random_weight(name: str, w: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Values that make every part matter: attention that looks somewhere, logits with winners."""
    noise = torch.randn(w.shape, generator=generator)
    if name.endswith("norm.weight"):
        value = 1.0 + 0.25 * noise
    elif name.endswith("bias"):
        value = 0.3 * noise
    elif name.endswith("sinks"):
        value = 1.0 + noise
    elif "embed_tokens" in name:
        value = 0.25 * noise
    else:
        value = (1.2 / w.shape[-1] ** 0.5) * noise
    return (value / MATRIX_GRID).round() * MATRIX_GRID if w.ndim > 1 else value


def realistic_weight(name: str, key: str, w: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """As random_weight, by the magnitudes of the fixture's architecture."""
    ends = [end for end in MAGNITUDES[name] if key.endswith(end)]
    value = random_weight(key, w, generator)
    if ends:
        mean, deviation = MAGNITUDES[name][ends[0]]
        value = mean + deviation / (w.shape[-1] ** 0.5 if w.ndim > 1 else 1.0) * torch.randn(w.shape, generator=generator)
    if "embed_tokens" in key:
        value[:, list(LOUD_CHANNELS)] *= LOUDNESS
        if name in ("olmo2", "olmo3"):  # no norm before layer 0: an equal maximum in every group, or codes of codes would be ties
            value[:, list(LOUD_CHANNELS)] = 1.25 * value[:, list(LOUD_CHANNELS)].sign()
    elif w.ndim > 1 and w.shape[-1] > max(LOUD_CHANNELS) and not key.endswith(WRITERS):
        value[..., list(LOUD_CHANNELS)] /= LOUDNESS  # who reads the stream is used to them
    elif key == "model.norm.weight":  # Gemma's gain is 1 + w
        gain = value[list(LOUD_CHANNELS)] + (1.0 if name in ("gemma2", "gemma3") else 0.0)
        value[list(LOUD_CHANNELS)] += gain / LOUDNESS**2 - gain
    return (value / MATRIX_GRID).round() * MATRIX_GRID if w.ndim > 1 else value


WRITERS = (  # to the residual stream
    "o_proj.weight", "down_proj", "down_proj.weight", "output_linear.weight", "c_proj.weight", "dense.weight", "fc2.weight",
)  # fmt: skip


def published(name: str, key: str, w: np.ndarray) -> dict[str, np.ndarray]:
    """transformers' parameter under the names of published files, which have a matrix for each expert."""
    mixtral = name == "mixtral"
    prefix = key.partition("mlp.")[0] + ("block_sparse_moe" if mixtral else "mlp")
    if key.endswith("mlp.gate.weight"):
        return {f"{prefix}.gate.weight": w}
    if name == "granite_moe":  # one tensor of all experts, gate above up
        ends = {"router.weight": "router.layer.weight", "experts.gate_up_proj": "input_linear.weight",
                "experts.down_proj": "output_linear.weight"}  # fmt: skip
        return {next((key.replace(old, new) for old, new in ends.items() if key.endswith(old)), key): w}
    if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {key: w}
    halves = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[key.rpartition(".")[2]]
    spelled = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if mixtral else {half: half for half in halves}
    return {
        f"{prefix}.experts.{e}.{spelled[half]}.weight": part
        for e in range(len(w))
        for half, part in zip(halves, np.split(w[e], len(halves)), strict=True)
    }


INTERNLM2_NAMES = {
    "embed_tokens": "tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}  # fmt: skip


def as_internlm2(weights: dict[str, np.ndarray], n_kv_heads: int) -> dict[str, np.ndarray]:
    """A Llama's weights as InternLM 2's files have them: of each kv head the rows of its queries, of its keys, of its values."""
    renamed: dict[str, np.ndarray] = {}
    for key, w in weights.items():
        if key.endswith("q_proj.weight"):
            parts = [weights[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            of_head = [part.reshape(n_kv_heads, -1, part.shape[1]) for part in parts]
            renamed[key.replace("self_attn.q_proj", "attention.wqkv")] = np.concatenate(of_head, axis=1).reshape(-1, w.shape[1])
        elif not key.endswith(("k_proj.weight", "v_proj.weight")):
            found = next((old for old in INTERNLM2_NAMES if old in key), "")
            renamed[key.replace(found, INTERNLM2_NAMES[found]) if found else key] = w
    return renamed


FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)


def as_mxfp4(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w (..., rows, columns) -> blocks (..., rows, groups, 16) and scales (..., rows, groups), uint8, of gpt-oss's files."""
    groups = w.reshape(*w.shape[:-1], -1, 32)
    exponent = np.floor(np.log2(np.abs(groups).max(axis=-1, keepdims=True))) - 2
    scaled = np.ldexp(groups, -exponent.astype(int))
    codes = np.abs(np.abs(scaled)[..., None] - FP4).argmin(axis=-1) + 8 * (scaled < 0)
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    return blocks.astype(np.uint8), (exponent[..., 0] + 127).astype(np.uint8)


def from_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    values = np.where(codes & 8, -FP4[codes & 7], FP4[codes & 7])
    return np.ldexp(values, scales[..., None].astype(int) - 127).reshape(*scales.shape[:-1], -1).astype(np.float32)


def put_mxfp4(key: str, parameter: torch.Tensor) -> dict[str, np.ndarray]:
    """gpt-oss's experts, (n_experts, inputs, outputs) with values that MXFP4 has, from now on -> what its files have of them."""
    blocks, scales = as_mxfp4(parameter.data.numpy().swapaxes(1, 2))
    parameter.data.copy_(torch.from_numpy(from_mxfp4(blocks, scales).swapaxes(1, 2).copy()))
    return {f"{key}_blocks": blocks, f"{key}_scales": scales}


def put_large_key_bias(name: str, key: str, bias: torch.Tensor, head_dim: int) -> None:
    """Into the bias (kv_dim) of `key` if it is one of the fixture's layers' keys."""
    for (layer, head), values in LARGE_KEY_BIAS.get(name, {}).items():
        if key == f"model.layers.{layer}.self_attn.k_proj.bias":
            for element, value in values.items():
                bias[head * head_dim + element] = value


def rope_tables(rotary: torch.nn.Module) -> np.ndarray:
    """(n_tables, turned / 2)."""
    names = ["full_attention_inv_freq", "sliding_attention_inv_freq"] if not hasattr(rotary, "inv_freq") else ["inv_freq"]
    return np.stack([getattr(rotary, name).numpy() for name in names])


def make(name: str, config_json: dict[str, Any], n_tokens: int) -> None:
    config_json = {k: v for k, v in {**COMMON, **config_json}.items() if v is not None}
    config = AutoConfig.for_model(**json.loads(json.dumps(judge(config_json))))  # it writes into what it is given
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    tied = config_json["tie_word_embeddings"]
    weights = {}
    for key, parameter in model.named_parameters():
        make_weight = partial(realistic_weight, name) if name in MAGNITUDES else random_weight
        parameter.data.copy_(make_weight(key, parameter, generator))
        put_large_key_bias(name, key, parameter.data, model.model.layers[0].self_attn.head_dim)
        if name == "gpt_oss" and key.endswith(("gate_up_proj", "down_proj")):
            weights |= put_mxfp4(key, parameter)
            continue
        stored = parameter.data.numpy().astype(np.float16 if parameter.ndim > 1 else np.float32)
        assert np.array_equal(stored.astype(np.float32), parameter.data.numpy()), key
        weights |= published(name, key, stored)
    assert ("lm_head.weight" in weights) == (not tied)
    if name == "internlm2":
        weights = as_internlm2(weights, config_json["num_key_value_heads"])
    tables = rope_tables(model.model.rotary_emb)
    if name == "olmo3":
        tables = np.concatenate([rope_tables(turn_windows_plainly(model)), tables])

    # 263: the ids that the fixtures' tokenizer knows; a larger vocab_size is padding, as published
    # models have it
    token_ids = torch.randint(0, 263, (n_tokens,), generator=generator)
    blocks: list[torch.Tensor] = []
    first: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _m, inputs: first.append(inputs[0][0]))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, _i, out: blocks.append(out[0]))
    with torch.no_grad():
        logits = model(token_ids[None]).logits[0]
    hidden = [first[0], *(b.reshape(n_tokens, -1) for b in blocks)]
    rows = np.unique(np.linspace(0, n_tokens - 1, 16).astype(np.int64))
    np.savez_compressed(
        DATA / f"{name}.npz",
        config=np.array(json.dumps(config_json)),
        token_ids=token_ids.numpy().astype(np.int32),
        rows=rows.astype(np.int32),
        hidden=np.stack([h.detach().numpy()[rows] for h in hidden]),
        logits=logits.numpy()[rows],
        inv_freq=tables,
        **{f"weights/{key}": w for key, w in weights.items()},
    )


def main() -> None:
    torch.set_num_threads(1)
    DATA.mkdir(exist_ok=True)
    for name in sys.argv[1:] or MODELS:
        make(name, *MODELS[name])
        print(f"{name}: {(DATA / f'{name}.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main()
