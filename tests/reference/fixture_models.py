"""The models of data/*.npz: their configurations, how long a text they read, and the magnitudes of their weights
(make_fixtures.py)."""

from __future__ import annotations

from typing import Any

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
    "granite_hybrid": (
        {"model_type": "granitemoehybrid", "architectures": ["GraniteMoeHybridForCausalLM"], **shape(64, 24, 4, 2),
         "tie_word_embeddings": True, "attention_bias": False, "layer_types": ["attention"] * 2,
         "position_embedding_type": "rope", "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 72,
         "embedding_multiplier": 12.0, "attention_multiplier": 0.0625, "residual_multiplier": 0.22, "logits_scaling": 8.0,
         "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2},
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
    "qwen2_yarn": (
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **shape(48, 40, 3, 1), "tie_word_embeddings": True,
         "rms_norm_eps": 1e-6, "use_sliding_window": False,
         "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        80,
    ),
    "smollm3_yarn": (
        {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "pad_token_id": 2, **shape(48, 40, 3, 1),
         "num_hidden_layers": 4, "tie_word_embeddings": True, "attention_bias": False, "rms_norm_eps": 1e-6,
         "rope_theta": 5000000.0, "no_rope_layers": [1, 1, 1, 0], "use_sliding_window": False, "sliding_window": None,
         "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        80,
    ),
    "glm4_yarn": (
        {"model_type": "glm4", "architectures": ["Glm4ForCausalLM"], **shape(32, 40, 2, 1, 16), "tie_word_embeddings": False,
         "attention_bias": True, "partial_rotary_factor": 0.5, "pad_token_id": 2,
         "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 4.0,
                          "beta_slow": 0.25}},
        80,
    ),
    "hunyuan": (
        {"model_type": "hunyuan_v1_dense", "architectures": ["HunYuanDenseV1ForCausalLM"], **shape(32, 40, 3, 1, 16),
         "tie_word_embeddings": True, "attention_bias": False, "use_qk_norm": True, "use_cla": False,
         "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                          "mscale_all_dim": 0.0}},
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
    "arcee": (
        {"model_type": "arcee", "architectures": ["ArceeForCausalLM"], **shape(48, 72, 3, 1), "tie_word_embeddings": False,
         "hidden_act": "relu2", "attention_bias": False, "mlp_bias": False,
         "rope_scaling": {"rope_type": "yarn", "factor": 20.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
                          "beta_slow": 1.0, "mscale": 1.0}},
        48,
    ),
    "nanochat": (
        {"model_type": "nanochat", "architectures": ["NanoChatForCausalLM"], **shape(48, 72, 3, 3), "tie_word_embeddings": False,
         "rms_norm_eps": 1e-6, "hidden_act": "relu2", "attention_bias": False, "final_logit_softcapping": 15.0,
         "rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        48,
    ),
    "nemotron": (
        {"model_type": "nemotron", "architectures": ["NemotronForCausalLM"], **shape(48, 72, 3, 1, 16),
         "tie_word_embeddings": False, "rms_norm_eps": None, "norm_eps": 1e-5, "hidden_act": "relu2",
         "partial_rotary_factor": 0.5, "attention_bias": False, "mlp_bias": False},
        48,
    ),
    "apertus": (
        {"model_type": "apertus", "architectures": ["ApertusForCausalLM"], **shape(48, 72, 3, 1), "tie_word_embeddings": False,
         "hidden_act": "xielu", "attention_bias": False, "rope_theta": 12000000.0, "rope_scaling": LLAMA3_SCALING,
         "qk_norm": True, "post_norm": False},
        48,
    ),
    "gpt_neox": (
        {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], **shape(48, 72, 3, 3), "tie_word_embeddings": False,
         "num_key_value_heads": None, "rms_norm_eps": None, "rope_theta": None, "layer_norm_eps": 1e-5, "hidden_act": "gelu",
         "rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True},
        48,
    ),
    "lfm2": (
        {"model_type": "lfm2", "architectures": ["Lfm2ForCausalLM"], **shape(40, 34, 2, 1, 16), "num_hidden_layers": 3,
         "tie_word_embeddings": True, "rms_norm_eps": None, "norm_eps": 1e-5, "hidden_act": None, "rope_theta": 1000000.0,
         "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 8, "conv_L_cache": 3,
         "conv_bias": False, "layer_types": ["conv", "full_attention", "conv"]},
        300,
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
    "smollm3_yarn": {"model.norm.weight": (0.4, 0.1)},
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
    "granite_hybrid": {
        "q_proj.weight": (0.0, 4.0), "k_proj.weight": (0.0, 4.0), "o_proj.weight": (0.0, 4.0), "output_linear.weight": (0.0, 4.0),
        "input_linear.weight": (0.0, 2.4), "embed_tokens.weight": (0.0, 0.5), "model.norm.weight": (30.0, 7.0),
    },
    "starcoder2": {"embed_tokens.weight": (0.1, 2.0), "model.norm.weight": (0.6, 0.1)},
    "cohere": {"embed_tokens.weight": (0.1, 2.0), "model.norm.weight": (7.0, 1.0)},
    "cohere2": {"embed_tokens.weight": (0.1, 2.0), "model.norm.weight": (2.0, 0.3)},
    "phi2": {"embed_tokens.weight": (0.1, 2.0), "final_layernorm.weight": (0.7, 0.1)},
    "stablelm": {"embed_tokens.weight": (0.1, 2.0), "model.norm.weight": (0.7, 0.1)},
    "arcee": {"model.norm.weight": (0.7, 0.1)},
    "nanochat": {"lm_head.weight": (0.0, 5.0)},
    "nemotron": {
        "embed_tokens.weight": (0.1, 2.0), "input_layernorm.weight": (0.0, 0.25), "post_attention_layernorm.weight": (0.0, 0.25),
        "model.norm.weight": (-0.3, 0.1),
    },
    "apertus": {"alpha_p": (0.2, 0.8), "alpha_n": (-1.0, 0.8), "layernorm.weight": (1.0, 0.25), "model.norm.weight": (0.7, 0.1)},
    "gpt_neox": {"embed_in.weight": (0.1, 2.0), "layernorm.weight": (1.0, 0.25), "final_layer_norm.weight": (0.7, 0.1)},
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
