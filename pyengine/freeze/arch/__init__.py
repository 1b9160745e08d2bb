"""The architectures that can be frozen, one file for each family. What is not here is refused by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from ...errors import ModelFormatError, UnsupportedModelError
from .apertus import APERTUS
from .arcee import ARCEE
from .base import Architecture
from .cohere import COMMAND_R, COMMAND_R7B
from .ernie import ERNIE, HELIUM
from .exaone4 import EXAONE4
from .gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_IMAGES, TEXT_OF_IMAGES, VAULT_GEMMA
from .glm4 import GLM, GLM4, GLM4V
from .gpt_neox import GPT_NEOX
from .gpt_oss import GPT_OSS
from .granite import (
    GRANITE,
    GRANITE_HYBRID,
    GRANITE_MOE,
    GRANITE_MOE_SHARED,
    GRANITE_MOE_SWA,
    GRANITE_SWA,
    HYPERCLOVAX,
)
from .hunyuan import HUNYUAN, HUNYUAN_MOE
from .internlm import INTERNLM2, INTERNLM3
from .lfm2 import LFM2
from .llama import CWM, EXAONE, IQUEST_CODER, LLAMA, MINISTRAL, MISTRAL
from .minicpm import MINICPM
from .mistral3 import MINISTRAL3, MISTRAL3_IMAGES
from .mixture import FLEX_OLMO, MELLUM, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE, QWEN3_VL_MOE
from .nanochat import NANOCHAT
from .nemotron import NEMOTRON
from .not_implemented import what_it_needs
from .olmo import OLMO
from .olmo2 import OLMO2
from .olmo3 import OLMO3
from .phi import PHI2
from .phi3 import PHI3
from .qwen import QWEN2, QWEN2_5_VL, QWEN2_VL, QWEN3, QWEN3_VL
from .seed_oss import SEED_OSS
from .smollm3 import SMOLLM3
from .stablelm import STABLELM
from .starcoder2 import STARCODER2

# Mistral's GGUF files call themselves "llama": of equal names the first counts.
ARCHITECTURES = (
    LLAMA, MISTRAL, MINISTRAL, CWM, IQUEST_CODER, EXAONE, QWEN2, QWEN2_VL, QWEN2_5_VL, QWEN3, QWEN3_VL, GRANITE, GRANITE_SWA,
    HYPERCLOVAX, PHI3, SMOLLM3, GEMMA, VAULT_GEMMA, GEMMA2, GEMMA3, GEMMA3_IMAGES, OLMO2, STARCODER2,
    GLM, GLM4, GLM4V, EXAONE4, ERNIE, HELIUM, SEED_OSS, COMMAND_R, COMMAND_R7B, PHI2, STABLELM, OLMO,
    OLMO3, MINICPM, INTERNLM2, INTERNLM3, MINISTRAL3, MISTRAL3_IMAGES, HUNYUAN, LFM2,
    ARCEE, NANOCHAT, NEMOTRON, APERTUS, GPT_NEOX,
    MIXTRAL, QWEN2_MOE, QWEN3_MOE, QWEN3_VL_MOE, MELLUM, OLMOE, FLEX_OLMO, GRANITE_MOE, GRANITE_MOE_SHARED, GRANITE_MOE_SWA,
    GRANITE_HYBRID, HUNYUAN_MOE, GPT_OSS,
)  # fmt: skip

# Kinds that transformers 5 has no class for but Llama's, and writes as that.
_WRITTEN_AS_LLAMA = (EXAONE, IQUEST_CODER, INTERNLM3)
# Models that see or hear, around a text model: `text_config` says of which kind. They make logits themselves, without what
# some kinds do to theirs (scales, soft caps), which are not here.
_AROUND_TEXT = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "exaone4_5": "Exaone4_5_ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "voxtral": "VoxtralForConditionalGeneration",
}
# What a text_config leaves out is as in a model of 7B.
_SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6, "vocab_size": 32_000}
_LLAMA_SIZES = {**_SIZES, "intermediate_size": 11_008, "max_position_embeddings": 2048}
_MISTRAL_SIZES = {**_SIZES, "intermediate_size": 14_336, "max_position_embeddings": 131_072, "num_key_value_heads": 8}
_KINDS_OF_TEXT = {
    "llama": LLAMA._replace(hf_defaults=_LLAMA_SIZES),
    "mistral": MISTRAL._replace(hf_defaults=_MISTRAL_SIZES),
    **{a.model_type: a for a in (QWEN2, QWEN3, EXAONE4)},
    "exaone4_5_text": EXAONE4,
}


CLASSIFIER = "ForSequenceClassification"


def is_classifier(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a class with a head in the place of the output matrix; rank_head.py says what becomes of it."""
    named = config.get("architectures")
    return isinstance(named, list) and isinstance(named[0], str) and named[0].endswith(CLASSIFIER)


def _unknown(name: Any, known: Iterable[str]) -> UnsupportedModelError:
    needs = what_it_needs(name) if isinstance(name, str) else None
    if needs is not None:
        return UnsupportedModelError(f"architecture {name!r:.80} is not implemented: it needs {needs}")
    families = {one.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration").rstrip("_") for one in known}
    listed = ", ".join(sorted(families, key=str.lower))
    return UnsupportedModelError(f"architecture {name!r:.80} is not implemented; known are {listed}")


def architecture_of_hf(config: dict[str, Any]) -> Architecture:
    """Of a config.json: by ``architectures``, or where that is absent by ``model_type``."""
    named = config.get("architectures")
    if named is None:
        kind = config.get("model_type")
        if kind is None:
            raise ModelFormatError("config.json names no architecture: it has neither architectures nor model_type")
        found = next((a for a in ARCHITECTURES if a.model_type == kind), None)
        named = [_AROUND_TEXT.get(kind, kind) if isinstance(kind, str) else kind]
    else:
        if not isinstance(named, list) or len(named) != 1:
            raise ModelFormatError(f"config.json: architectures must name one, not {named!r:.200}")
        # Of a model that was saved without its output matrix the class is XModel, of one with a head in its place another one.
        classes = "ForCausalLM", "Model", CLASSIFIER
        found = next((a for a in ARCHITECTURES if named[0] in [a.hf.replace(classes[0], one) for one in classes]), None)
        if found is LLAMA:
            found = next((a for a in _WRITTEN_AS_LLAMA if a.model_type == config.get("model_type")), LLAMA)
    if named[0] in _AROUND_TEXT.values():
        return _text_of(config, named[0])
    if found is None:
        raise _unknown(named[0], [*(a.hf for a in ARCHITECTURES), *_AROUND_TEXT.values()])
    return found


def _text_of(config: dict[str, Any], name: str) -> Architecture:
    text = config.get("text_config")
    if not isinstance(text, dict) or not isinstance(kind := text.get("model_type"), str):
        raise ModelFormatError(f"config.json: text_config of {name} has no model_type")
    if kind not in _KINDS_OF_TEXT:
        known = ", ".join(_KINDS_OF_TEXT)
        raise UnsupportedModelError(f"{name} around a text model {kind!r:.80} is not implemented; known are {known}")
    return _KINDS_OF_TEXT[kind]._replace(hf=name, hf_text=TEXT_OF_IMAGES)


def architecture_of_gguf(
    name: str, *, has_experts: bool, has_shared_expert: bool = False, keys: Collection[str] = ()
) -> Architecture:
    """By ``general.architecture``, and by which experts there are: Mixtral's files call themselves "llama" too. ``keys`` are
    those below its prefix: one may be the sign of a later architecture of the same name."""
    wanted = has_experts, has_shared_expert
    of_name = [a for a in ARCHITECTURES if a.gguf == name]
    fitting = [a for a in of_name if (a.has_experts, a.has_shared_expert) == wanted]
    signed = [a for a in fitting if a.gguf_sign is not None and a.gguf_sign in keys]
    found = next(iter(signed + [a for a in fitting if a.gguf_sign is None]), None)
    if found is None and of_name:
        what = f"{'with' if has_experts else 'without'} experts {'and a shared one ' if has_shared_expert else ''}"
        raise UnsupportedModelError(f"architecture {name!r:.80} {what}is not implemented")
    if found is None:
        raise _unknown(name, [a.gguf for a in ARCHITECTURES if a.gguf is not None])
    return found
