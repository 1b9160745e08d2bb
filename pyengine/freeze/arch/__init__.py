"""The architectures that can be frozen, one file for each family. What is not here is refused by name."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ...errors import ModelFormatError, UnsupportedModelError
from .base import Architecture
from .cohere import COMMAND_R, COMMAND_R7B
from .ernie import ERNIE
from .exaone4 import EXAONE4
from .gemma import GEMMA2, GEMMA3, GEMMA3_IMAGES
from .glm4 import GLM, GLM4
from .gpt_oss import GPT_OSS
from .granite import GRANITE, GRANITE_HYBRID, GRANITE_MOE, GRANITE_MOE_SHARED
from .hunyuan import HUNYUAN
from .internlm import INTERNLM2, INTERNLM3
from .lfm2 import LFM2
from .llama import LLAMA, MINISTRAL, MISTRAL
from .minicpm import MINICPM
from .mistral3 import MINISTRAL3, MISTRAL3_IMAGES
from .mixture import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from .olmo import OLMO
from .olmo2 import OLMO2
from .olmo3 import OLMO3
from .phi import PHI2
from .phi3 import PHI3
from .qwen import QWEN2, QWEN3
from .seed_oss import SEED_OSS
from .smollm3 import SMOLLM3
from .stablelm import STABLELM
from .starcoder2 import STARCODER2

# Mistral's GGUF files call themselves "llama": of equal names the first counts.
ARCHITECTURES = (
    LLAMA, MISTRAL, MINISTRAL, QWEN2, QWEN3, GRANITE, PHI3, SMOLLM3, GEMMA2, GEMMA3, GEMMA3_IMAGES, OLMO2, STARCODER2,
    GLM, GLM4, EXAONE4, ERNIE, SEED_OSS, COMMAND_R, COMMAND_R7B, PHI2, STABLELM, OLMO,
    OLMO3, MINICPM, INTERNLM2, INTERNLM3, MINISTRAL3, MISTRAL3_IMAGES, HUNYUAN, LFM2,
    MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GRANITE_MOE, GRANITE_MOE_SHARED, GRANITE_HYBRID, GPT_OSS,
)  # fmt: skip


def _unknown(name: Any, known: list[str]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"architecture {name!r:.80} is not implemented; known are {', '.join(dict.fromkeys(known))}"
    )


def architecture_of_hf(config: dict[str, Any]) -> Architecture:
    """Of a config.json: by ``architectures``, or where that is absent by ``model_type``."""
    named = config.get("architectures")
    if named is None:
        kind = config.get("model_type")
        if kind is None:
            raise ModelFormatError("config.json names no architecture: it has neither architectures nor model_type")
        found = next((a for a in ARCHITECTURES if a.model_type == kind), None)
        named = [kind]
    else:
        if not isinstance(named, list) or len(named) != 1:
            raise ModelFormatError(f"config.json: architectures must name one, not {named!r:.200}")
        # Of a model that was saved without its output matrix the class is XModel.
        found = next((a for a in ARCHITECTURES if named[0] in (a.hf, a.hf.replace("ForCausalLM", "Model"))), None)
    if found is None:
        raise _unknown(named[0], [a.hf for a in ARCHITECTURES])
    return found


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
        raise _unknown(name, [a.gguf for a in ARCHITECTURES])
    return found
