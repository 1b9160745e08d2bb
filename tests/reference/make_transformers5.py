"""Make data/transformers5.npz: what transformers 5 writes of a model, and what it computes of it in float32.

    pip install 'transformers==5.24.*' torch && python tests/reference/make_transformers5.py

These models are for how a directory is read, and not for the engine's arithmetic, which those of make_fixtures.py are for: their
weights are not kept but made again by name (``case_weights``, of transformers5.py), and few of their logits are kept.

The file holds `cases`, a JSON list of {"name", "config": config.json as it was saved, "shapes": {saved tensor: its shape}}, and
`logits/NAME` (2, n) float32: every LOGIT_STEP-th of the last two positions of the text that ``TOKENS`` is.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from reference.fixtures import write_safetensors
from reference.transformers5 import DATA, LOGIT_STEP, TOKENS, case_weights

COMMON: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3,
    "vocab_size": 263, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOWS = {"sliding_window": 9, "layer_types": MIXED}
YARN = {"rope_type": "yarn", "rope_theta": 2e4, "factor": 4.0, "original_max_position_embeddings": 64}
PLAIN = {"rope_type": "default", "rope_theta": 777.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 3e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MULTIPLIERS = {
    "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
}  # fmt: skip
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
}  # fmt: skip
PIXTRAL = {**SIGLIP, "model_type": "pixtral", "head_dim": 8}
QWEN_EYES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
THREE = {"mrope_section": [2, 1, 1]}  # M-RoPE: pairs of each of the three positions


def seeing(kind: str, vision: dict[str, Any], *, tied: bool = False, **text: Any) -> dict[str, Any]:
    """A model that sees, around a text model, with the flag for tied embeddings at the place that version 5 goes by."""
    inside = {**COMMON, **text, "tie_word_embeddings": not tied}
    return {"model_type": kind, "vision_config": vision, "text_config": inside, "tie_word_embeddings": tied}


CASES: dict[str, dict[str, Any]] = {
    # architectures that version 4 has too, where version 5 writes something else
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    "olmo3": {"model_type": "olmo3", **WINDOWS, "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN}},
    "gemma3": {
        "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 24, **WINDOWS,
        "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN},
    },
    "glm4": {"model_type": "glm4", "head_dim": 16, "rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
    "exaone4": {"model_type": "exaone4", "sliding_window": 9, "layer_types": ["full_attention"] * 3},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 16, **EXPERTS, "rope_parameters": YARN},
    "gpt_oss": {
        "model_type": "gpt_oss", "head_dim": 16, **WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": YARN,
    },
    "granite_hybrid": {
        "model_type": "granitemoehybrid", **MULTIPLIERS, "layer_types": ["attention"] * 3, "position_embedding_type": "rope",
        "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 40, "mamba_n_heads": 4, "mamba_d_head": 16,
    },
    # architectures by folds alone
    "gemma": {"model_type": "gemma", "head_dim": 16, "tie_word_embeddings": True},
    "gemma_untied": {"model_type": "gemma", "head_dim": 16, "attention_bias": True},
    "vaultgemma": {"model_type": "vaultgemma", "head_dim": 16, "query_pre_attn_scalar": 24, **WINDOWS},
    "helium": {"model_type": "helium", "head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "cwm": {"model_type": "cwm", "head_dim": 16, **WINDOWS, "rope_parameters": LLAMA3},
    "cwm_by_defaults": {"model_type": "cwm", "head_dim": 16, "num_hidden_layers": 5},
    "iquestcoder": {"model_type": "iquestcoder", "head_dim": 16},
    "exaone": {"model_type": "exaone", "rope_parameters": LLAMA3},
    "granite_swa": {"model_type": "granite_swa", **MULTIPLIERS, **WINDOWS, "layer_rope_theta": [0, 3e4, 777.0]},
    "granite_swa_by_defaults": {"model_type": "granite_swa", "num_hidden_layers": 5, "rope_parameters": PLAIN},
    "granite_moe_swa": {
        "model_type": "granitemoe_swa", **MULTIPLIERS, **WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 24, "layer_rope_theta": [777.0, 0, 777.0],
    },
    "hyperclovax": {"model_type": "hyperclovax", **MULTIPLIERS, "use_post_norm": True},
    "hyperclovax_without_norms": {"model_type": "hyperclovax", **MULTIPLIERS, "use_post_norm": False},
    "hunyuan_moe": {
        "model_type": "hunyuan_v1_moe", "head_dim": 16, "num_experts": 4, "moe_topk": 2,
        "rope_parameters": {"rope_type": "dynamic", "type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 1e4},
    },
    "mellum": {
        "model_type": "mellum", "head_dim": 16, **EXPERTS, **WINDOWS,
        "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN},
    },
    "mellum_by_defaults": {"model_type": "mellum", "head_dim": 16, **EXPERTS, **WINDOWS},
    "flex_olmo": {"model_type": "flex_olmo", "num_experts": 4, "num_experts_per_tok": 2},
    # text models of those that see
    "qwen2_vl": seeing(
        "qwen2_vl", {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        model_type="qwen2_vl_text", rope_parameters={"rope_type": "default", "rope_theta": 1e5, **THREE},
    ),
    "qwen2_5_vl": seeing(
        "qwen2_5_vl", QWEN_EYES, tied=True, model_type="qwen2_5_vl_text", rope_parameters={**YARN, **THREE},
    ),
    "qwen3_vl": seeing(
        "qwen3_vl", {**QWEN_EYES, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}, tied=True,
        model_type="qwen3_vl_text", head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e5, **THREE},
    ),
    "qwen3_vl_moe": seeing(
        "qwen3_vl_moe", {**QWEN_EYES, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        model_type="qwen3_vl_moe_text", head_dim=8, **EXPERTS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5, **THREE},
    ),
    "glm4v": seeing(
        "glm4v", {**QWEN_EYES, "image_size": 16}, model_type="glm4v_text",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]},
    ),
    "gemma3_that_sees": seeing("gemma3", SIGLIP, model_type="gemma3_text", head_dim=16, **WINDOWS),
    "mistral3": seeing("mistral3", PIXTRAL, tied=True, model_type="ministral3", head_dim=16, sliding_window=None),
    "smolvlm": seeing("smolvlm", {**SIGLIP, "model_type": "smolvlm_vision"}, model_type="llama"),
    "llava": seeing("llava", {**SIGLIP, "model_type": "clip_vision_model"}, model_type="mistral", sliding_window=9),
    "exaone4_5": seeing(
        "exaone4_5", {**QWEN_EYES, "num_key_value_heads": 1, "fullatt_block_indexes": [0]}, model_type="exaone4", **WINDOWS,
    ),
}  # fmt: skip


def model_class(config: Any) -> Any:
    """transformers' class of a configuration that makes logits of text."""
    for names in (
        transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ):
        if config.model_type in names:
            return getattr(transformers, names[config.model_type])
    raise KeyError(config.model_type)


def make(given: dict[str, Any], directory: Path) -> tuple[dict[str, Any], np.ndarray]:
    """(a case of the file without its name, its logits)."""
    settings = json.loads(json.dumps(given if "text_config" in given else {**COMMON, **given}))
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    cls = model_class(config)
    cls._from_config(config, dtype=torch.float32).save_pretrained(directory)
    with safe_open(directory / "model.safetensors", "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    write_safetensors(directory / "model.safetensors", case_weights(shapes))
    model = cls.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0]
    return {"config": json.loads((directory / "config.json").read_text()), "shapes": shapes}, logits.numpy()[-2:, ::LOGIT_STEP]


def main() -> None:
    torch.set_num_threads(1)
    cases, logits = [], {}
    for name, given in CASES.items():
        with tempfile.TemporaryDirectory() as directory:
            case, logits[f"logits/{name}"] = make(given, Path(directory))
        cases.append({"name": name, **case})
    np.savez_compressed(DATA, cases=np.array(json.dumps(cases)), **logits)
    print(f"{len(cases)} cases, {DATA.stat().st_size} bytes")


if __name__ == "__main__":
    main()
