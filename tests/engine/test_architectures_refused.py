"""What is wrong in a configuration, or not known, is refused with what it is: each architecture's own keys, with any value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine.freeze_models import hf_dir
from reference import fixtures

from pyengine.errors import ModelFormatError, PyEngineError, UnsupportedModelError
from pyengine.freeze import open_source


@pytest.mark.parametrize(
    ("name", "changes", "error", "match"),
    [
        ("granite", {"architectures": ["FalconForCausalLM"]}, UnsupportedModelError, "'Falcon.*known are .* Llama, Llava"),
        ("granite", {"architectures": ..., "model_type": "falcon"}, UnsupportedModelError, "'falcon'.*known are Apertus, Arcee"),
        ("granite", {"hidden_act": "relu2"}, UnsupportedModelError, "activation 'relu2'.*known are .*silu"),
        ("granite", {"rope_scaling": {"rope_type": "spiral"}}, UnsupportedModelError, "'spiral'.*known are default, linear"),
        ("granite", {"partial_rotary_factor": 0.5}, UnsupportedModelError, "partial_rotary_factor"),
        ("granite", {"logits_scaling": 0}, ModelFormatError, "logits_scaling must be a number in"),
        ("granite", {"embedding_multiplier": "12"}, ModelFormatError, "embedding_multiplier must be a number"),
        ("phi4_mini", {"partial_rotary_factor": 0.0}, ModelFormatError, "partial_rotary_factor"),
        ("phi4_mini", {"partial_rotary_factor": 0.7}, ModelFormatError, "RoPE over 11 elements"),
        ("phi4_mini", {"partial_rotary_factor": 0.5}, ModelFormatError, "short_factor must be a list of 4 numbers"),
        ("phi4_mini", {"rope_scaling": {"rope_type": "yarn", "factor": 4}}, UnsupportedModelError, "'yarn'.*known are default"),
        ("phi4_mini", {"original_max_position_embeddings": 1}, ModelFormatError, "at least 2"),
        ("phi4_mini", {"rope_scaling": {"type": "llama3"}}, UnsupportedModelError, "'llama3'"),
        ("gemma3", {"hidden_activation": "gelu"}, UnsupportedModelError, "activation 'gelu'.*known are gelu_pytorch_tanh"),
        ("gemma3", {"use_bidirectional_attention": True}, UnsupportedModelError, "not causal"),
        ("gemma3", {"layer_types": ["full_attention", "linear_attention", "full_attention"]}, UnsupportedModelError, "'linear_"),
        ("gemma3", {"rope_scaling": {"rope_type": "spiral"}}, UnsupportedModelError, "'spiral'.*known are default"),
        ("gemma3", {"rope_scaling": {"rope_type": "yarn", "factor": 0}}, ModelFormatError, "factor 0 is out of range"),
        ("gemma3", {"sliding_window_pattern": 0}, ModelFormatError, "sliding_window_pattern must be a positive"),
        ("gemma3", {"query_pre_attn_scalar": 0}, ModelFormatError, "query_pre_attn_scalar"),
        ("gemma2", {"attn_logit_softcapping": 1e-6}, ModelFormatError, "attn_logit_softcapping must be a number in"),
        ("olmo2", {"hidden_act": "gelu_new"}, UnsupportedModelError, "activation 'gelu_new'"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, UnsupportedModelError, "layers without experts"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, UnsupportedModelError, "layers without experts"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, ModelFormatError, r"n_experts_used must be an integer in 1\.\.8"),
        ("olmoe", {"clip_qkv": 8.0}, UnsupportedModelError, "clip_qkv"),
        ("olmoe", {"num_experts": 7}, ModelFormatError, r"mlp\.gate.*shape"),
        ("granite_moe", {"num_local_experts": 4}, ModelFormatError, r"(router|linear).*shape"),
        ("granite_hybrid", {"layer_types": ["mamba", "attention"]}, UnsupportedModelError, "layer of type 'mamba'"),
        ("granite_hybrid", {"layer_types": ...}, UnsupportedModelError, "layer of type 'mamba'"),
        ("granite_hybrid", {"num_local_experts": 4}, UnsupportedModelError, "num_local_experts"),
        ("granite_hybrid", {"num_local_experts": ...}, UnsupportedModelError, "num_local_experts"),
        ("granite_hybrid", {"position_embedding_type": "alibi"}, UnsupportedModelError, "position_embedding_type 'alibi'"),
        ("granite_hybrid", {"shared_intermediate_size": 24}, ModelFormatError, r"shared_mlp.*shape"),
        ("granite_moe", {"position_embedding_type": "alibi"}, UnsupportedModelError, "position_embedding_type 'alibi'"),
        ("granite_moe_shared", {"shared_intermediate_size": 20}, ModelFormatError, r"shared_mlp.*shape"),
        ("granite_moe_shared", {"shared_intermediate_size": 0}, UnsupportedModelError, r"shared_mlp.*no place"),
        ("granite_moe_shared", {"shared_intermediate_size": -1}, ModelFormatError, "shared_hidden_dim must be"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, UnsupportedModelError, "layers without experts"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 2**40}, ModelFormatError, "shared_hidden_dim must be"),
        ("starcoder2", {"hidden_act": "silu"}, UnsupportedModelError, "activation 'silu'.*known are gelu, gelu_fast, .*xielu"),
        ("starcoder2", {"use_bias": False}, UnsupportedModelError, "bias.*no place"),
        ("starcoder2", {"norm_epsilon": "x"}, ModelFormatError, "norm_epsilon must be a number"),
        ("glm4", {"partial_rotary_factor": 1.5}, ModelFormatError, "partial_rotary_factor"),
        ("glm4", {"partial_rotary_factor": 0.2}, ModelFormatError, "RoPE over 3 elements"),
        ("glm4", {"rope_scaling": {"rope_type": "spiral"}}, UnsupportedModelError, "'spiral'"),
        ("exaone4", {"layer_types": None, "sliding_window_pattern": "LG"}, ModelFormatError, "sliding_window_pattern"),
        ("exaone4", {"layer_types": None, "sliding_window_pattern": 0}, ModelFormatError, "sliding_window_pattern"),
        ("ernie4_5", {"use_bias": False}, UnsupportedModelError, "bias.*no place"),
        ("seed_oss", {"mlp_bias": True}, ModelFormatError, "mlp.*bias.*is missing"),
        ("seed_oss", {"attention_bias": False}, UnsupportedModelError, "bias.*no place"),
        ("cohere", {"use_qk_norm": True}, UnsupportedModelError, "use_qk_norm"),
        ("cohere", {"logit_scale": 0}, ModelFormatError, "logit_scale must be a number in"),
        ("cohere2", {"layer_types": ["full_attention"]}, ModelFormatError, "layer_types must name every layer"),
        ("phi2", {"qk_layernorm": True}, UnsupportedModelError, "qk_layernorm"),
        ("phi2", {"hidden_act": "silu"}, UnsupportedModelError, "activation 'silu'"),
        ("nanochat", {"final_logit_softcapping": 0}, ModelFormatError, "final_logit_softcapping must be"),
        ("nanochat", {"attention_bias": True}, ModelFormatError, "bias.*is missing"),
        ("nemotron", {"partial_rotary_factor": 0.2}, ModelFormatError, "RoPE over 3 elements"),
        ("apertus", {"rope_scaling": ...}, UnsupportedModelError, "neither rope_scaling nor rope_parameters"),
        ("apertus", {"hidden_act": "relu2"}, UnsupportedModelError, "act_fn.*no place"),
        ("gpt_neox", {"rotary_pct": "x"}, ModelFormatError, r"config\.json: rotary_pct must be a number"),
        ("gpt_neox", {"attention_bias": False}, UnsupportedModelError, "bias.*no place"),
        ("stablelm", {"qk_layernorm": True}, UnsupportedModelError, "qk_layernorm"),
        ("stablelm", {"use_parallel_residual": True}, UnsupportedModelError, "post_attention_layernorm.*no place"),
        ("olmo", {"clip_qkv": 8.0}, UnsupportedModelError, "clip_qkv"),
        ("olmo3", {"rope_scaling": {"rope_type": "spiral"}}, UnsupportedModelError, "'spiral'"),
        ("olmo3", {"rope_scaling": {"rope_type": "yarn"}}, ModelFormatError, "factor must be a number"),
        ("olmo3", {"rope_theta": 1.0}, ModelFormatError, "YaRN needs one above 1"),
        ("olmo3", {"layer_types": ["full_attention"]}, ModelFormatError, "layer_types must name every layer"),
        ("minicpm", {"sparse_config": {"kernel_size": 32}}, UnsupportedModelError, "sparse_config"),
        ("minicpm", {"scale_depth": ...}, ModelFormatError, "scale_depth is missing"),
        ("minicpm", {"dim_model_base": 0}, ModelFormatError, "dim_model_base must be a number in"),
        ("internlm2", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, UnsupportedModelError, "'yarn'"),
        ("internlm2", {"num_key_value_heads": 4}, ModelFormatError, r"wqkv.*shape"),
        ("internlm3", {"qkv_bias": False}, UnsupportedModelError, "bias.*no place"),
        ("hunyuan", {"use_cla": True}, UnsupportedModelError, "use_cla"),
        ("hunyuan", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, UnsupportedModelError, "'yarn'"),
        ("hunyuan", {"rope_scaling": {"type": "dynamic", "alpha": 0}}, ModelFormatError, "alpha must be a number in"),
        ("ministral3", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, ModelFormatError, "original_max.* is missing"),
        ("ministral3", {"rope_parameters": {"rope_type": "spiral"}}, UnsupportedModelError, "'spiral'"),
        ("lfm2", {"conv_bias": True}, UnsupportedModelError, "conv_bias"),
        ("lfm2", {"conv_L_cache": 17}, ModelFormatError, "conv_L_cache must be an integer in 1..16"),
        ("lfm2", {"conv_L_cache": 4}, ModelFormatError, r"conv\.conv.*\[40, 1, 3\].*\[40, 1, 4\]"),
        ("lfm2", {"layer_types": ["conv", "full_attention", "mamba"]}, UnsupportedModelError, "layer of type 'mamba'"),
        ("lfm2", {"block_auto_adjust_ff_dim": False}, ModelFormatError, r"feed_forward.*shape"),
        ("gpt_oss", {"quantization_config": None}, ModelFormatError, r"experts\.gate_up_proj' is missing"),
        ("gpt_oss", {"quantization_config": {"quant_method": "fp4"}}, UnsupportedModelError, "quantized by 'fp4'"),
        ("gpt_oss", {"swiglu_limit": 6.0}, UnsupportedModelError, r"swiglu_limit 6\.0"),
        ("gpt_oss", {"intermediate_size": 64}, ModelFormatError, r"gate_up_proj.*shape"),
        ("gpt_oss", {"num_local_experts": 5}, ModelFormatError, r"(router|experts).*shape"),
        ("gpt_oss", {"attention_bias": False, "hidden_act": "gelu"}, UnsupportedModelError, "activation 'gelu'"),
        ("mixtral", {"num_local_experts": 5}, ModelFormatError, r"block_sparse_moe.*(shape|missing)"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, UnsupportedModelError, "attn_logit_softcapping"),
        ("smollm3", {"layer_types": ["full_attention", "sliding_attention"] * 2}, UnsupportedModelError, "use_sliding_window"),
        ("smollm3", {"no_rope_layers": [1]}, ModelFormatError, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 2]}, ModelFormatError, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, ModelFormatError, "no_rope_layer_interval"),
    ],
)  # fmt: skip
def test_what_is_wrong_or_not_known_is_named(
    tmp_path: Path, name: str, changes: dict[str, Any], error: type[PyEngineError], match: str
) -> None:
    with pytest.raises(error, match=match):
        open_source(hf_dir(tmp_path / "hf", name, **changes))


HUGE = 10**400
VALUES = [None, True, 0, -1, 2**63, HUGE, 0.5, 1e308, "", "x", [], [{}], [HUGE], [0, 1], ["full_attention"] * 2, {}, {"a": {}}]
OWN_KEYS = {
    "granite": [
        "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling", "head_dim", "hidden_size",
    ],
    "phi4_mini": ["partial_rotary_factor", "original_max_position_embeddings", "rope_scaling", "sliding_window"],
    "gemma3": [
        "sliding_window_pattern", "rope_local_base_freq", "rope_theta", "rope_scaling", "rope_parameters", "layer_types",
        "hidden_activation", "query_pre_attn_scalar", "sliding_window", "attn_logit_softcapping", "use_bidirectional_attention",
        "head_dim", "num_key_value_heads", "hidden_size",
    ],
    "olmoe": ["num_experts", "num_experts_per_tok", "norm_topk_prob", "clip_qkv", "intermediate_size"],
    "granite_moe": ["num_local_experts", "num_experts_per_tok", "residual_multiplier", "intermediate_size"],
    "mixtral": ["num_local_experts", "num_experts_per_tok", "sliding_window"],
    "qwen3_moe": ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "mlp_only_layers"],
    "gemma2": ["attn_logit_softcapping", "final_logit_softcapping", "layer_types", "hidden_activation"],
    "smollm3": ["no_rope_layers", "no_rope_layer_interval", "use_sliding_window", "sliding_window", "layer_types"],
    "qwen2_moe": ["shared_expert_intermediate_size", "num_experts", "norm_topk_prob", "qkv_bias"],
    "granite_moe_shared": ["shared_intermediate_size", "position_embedding_type"],
    "granite_hybrid": ["layer_types", "num_local_experts", "position_embedding_type", "shared_intermediate_size"],
    "starcoder2": ["norm_epsilon", "use_bias", "sliding_window", "hidden_act", "tie_word_embeddings"],
    "glm4": ["partial_rotary_factor", "attention_bias", "rope_parameters"],
    "exaone4": ["sliding_window", "sliding_window_pattern", "layer_types"],
    "cohere2": ["sliding_window", "sliding_window_pattern", "layer_types", "logit_scale", "layer_norm_eps"],
    "phi2": ["partial_rotary_factor", "layer_norm_eps", "qk_layernorm"],
    "gpt_oss": [
        "num_local_experts", "num_experts_per_tok", "intermediate_size", "swiglu_limit", "quantization_config", "rope_scaling",
        "layer_types", "sliding_window",
    ],
    "lfm2": [
        "layer_types", "full_attn_idxs", "conv_L_cache", "conv_bias", "block_ff_dim", "block_multiple_of", "norm_eps",
        "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim",
    ],
    "hunyuan": ["rope_scaling", "rope_theta", "head_dim", "attention_bias"],
    "ministral3": ["rope_parameters", "sliding_window", "max_position_embeddings"],
    "olmo3": ["sliding_window", "layer_types", "rope_scaling", "rope_theta", "rope_parameters"],
    "minicpm": ["scale_emb", "scale_depth", "dim_model_base", "rope_scaling", "attention_bias", "sparse_config"],
    "internlm2": ["rope_scaling", "bias", "num_key_value_heads"],
    "stablelm": ["partial_rotary_factor", "use_parallel_residual", "use_qkv_bias"],
    "nanochat": ["final_logit_softcapping", "rms_norm_eps", "hidden_act"],
    "apertus": ["rope_scaling", "hidden_act"],
    "gpt_neox": ["rotary_pct", "rotary_emb_base", "use_parallel_residual"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in OWN_KEYS.items() for key in keys])
def test_any_value_of_an_architectures_own_keys(tmp_path: Path, name: str, key: str) -> None:
    """Refused with one of our errors, or a source that opens; every other exception fails the test."""
    source = hf_dir(tmp_path / "hf", name)
    for value in VALUES:
        config = fixtures.load(name).hf_config | {key: value}
        (source / "config.json").write_text(json.dumps(config))
        try:
            open_source(source).close()
        except PyEngineError as error:
            assert str(error)
    inside = (
        "short_factor", "long_factor", "factor", "attention_factor", "type", "original_max_position_embeddings", "beta_fast",
        "beta_slow", "mscale", "mscale_all_dim", "truncate", "alpha",
    )  # fmt: skip
    for inner in inside if key == "rope_scaling" else ():
        for value in VALUES:
            config = fixtures.load(name).hf_config
            config.pop(inner, None)  # which would count before that of the object
            (source / "config.json").write_text(json.dumps(config | {key: config[key] | {"factor": 4.0, inner: value}}))
            try:
                open_source(source).close()
            except PyEngineError as error:
                assert str(error)
