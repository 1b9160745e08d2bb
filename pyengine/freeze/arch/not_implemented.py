"""What popular architectures need that there is not here, for the error that refuses them."""

from __future__ import annotations

from collections.abc import Mapping

_DELTA_NET = "gated delta nets (linear attention) beside attention"
_STATE_SPACE = "state-space layers (Mamba)"
_LATENT = "keys and values from a latent vector (MLA)"
_CORRECTED = "a router that corrects its choice of experts by a bias (e_score_correction_bias)"

# By the beginning of the class in config.json, or the name in GGUF, in small letters and without signs.
_NEEDS: Mapping[str, str] = {
    **dict.fromkeys(("qwen3next", "qwen35", "qwen35moe", "olmohybrid", "kimilinear"), _DELTA_NET),
    **dict.fromkeys(
        ("mamba", "mamba2", "falconmamba", "falconh1", "bamba", "jamba", "zamba", "zamba2", "nemotronh", "nemotronhmoe",
         "granitehybrid", "plamo2"),
        _STATE_SPACE,
    ),
    **dict.fromkeys(
        ("deepseek2", "deepseekv2", "deepseekv3", "deepseekv32", "minicpm3", "youtu", "longcatflash", "glm4moelite", "mistral4",
         "kimik25", "glmmoedsa", "glmdsa"),
        _LATENT,
    ),
    **dict.fromkeys(
        ("glm4moe", "glm4vmoe", "dots1", "ernie45moe", "solaropen", "afmoe", "minimaxm2", "bailingmoe2", "bailingmoev2",
         "exaonemoe"),
        _CORRECTED,
    ),
    "gemma3n": "embeddings for each layer and predictions of the residual stream (AltUp)",
    "gemma4": "embeddings for each layer, and heads of two sizes",
    "llama4": "attention in chunks, and experts whose input is scaled",
    "mllama": "attention to an image (cross attention)",
    **dict.fromkeys(("gpt2", "gptbigcode", "starcoder", "gptneo", "opt"), "learned positions"),
    **dict.fromkeys(("rwkv", "rwkv6", "rwkv7", "recurrentgemma"), "a recurrence in the place of attention"),
    **dict.fromkeys(
        ("bert", "roberta", "xlmroberta", "distilbert", "modernbert", "nomicbert", "deberta", "debertav2"),
        "attention to what follows a token too, as encoders have it",
    ),
    **dict.fromkeys(("t5", "mt5", "t5gemma", "bart", "mbart", "whisper"), "an encoder beside the decoder"),
    "lfm2moe": "a router that corrects its choice of experts by a bias (expert_bias)",
    "phimoe": "a router that takes one expert after the other (SparseMixer)",
    "bloom": "biases of scores by distance (ALiBi)",
    "mpt": "biases of scores by distance (ALiBi)",
}  # fmt: skip


def what_it_needs(name: str) -> str | None:
    """Of a class in config.json or a name in GGUF; None if there is nothing to say of it."""
    for end in ("ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "ForSequenceClassification", "LMHeadModel", "Model"):
        name = name.removesuffix(end)
    return _NEEDS.get("".join(letter for letter in name.lower() if letter.isalnum()))
