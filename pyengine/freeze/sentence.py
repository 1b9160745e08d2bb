"""What sentence-transformers' files say beside a model: how its embeddings are pooled, behind which prompts, and which tokens
a reranker answers with. -> ``extra`` of the frozen configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import ModelFormatError, UnsupportedModelError
from .fields import Fields

POOLING, SCORE, PROMPTS, DENSE = (
    "1_Pooling/config.json", "1_LogitScore/config.json", "config_sentence_transformers.json", "2_Dense/config.json",
)  # fmt: skip
DOCUMENTS = (POOLING, SCORE, PROMPTS, DENSE)
_WAYS = {"mean": "mean", "lasttoken": "last"}  # of theirs those that there are here
_MAX_PROMPTS = 256
_MAX_PROMPT = 1 << 14  # characters

Read = Callable[[str], "dict[str, Any] | None"]


def extra_of(read: Read, vocab_size: int) -> dict[str, Any]:
    """``read`` gives a document of DOCUMENTS as parsed, None if it is not there. Raises ModelFormatError for what these files
    cannot mean, UnsupportedModelError for a layer behind the pooling."""
    if read(DENSE) is not None:
        raise UnsupportedModelError(f"{DENSE}: embeddings that go through another layer are not implemented")
    return {**_pooling(read(POOLING) or {}), **_prompts(read(PROMPTS) or {}), **_score(read(SCORE), vocab_size)}


def _pooling(settings: dict[str, Any]) -> dict[str, Any]:
    """Of one of the ways that there are here, else nothing. Older files have a flag for each way, newer ones a name."""
    named, flag = settings.get("pooling_mode"), "pooling_mode_"
    flags = [name.removeprefix(flag) for name, value in settings.items() if name.startswith(flag) and value is True]
    ways = [named] if isinstance(named, str) else [name.removesuffix("_tokens") for name in flags]
    if len(ways) != 1 or ways[0] not in _WAYS:
        return {}
    way = _WAYS[ways[0]]
    return {"pooling": way} | ({"include_prompt": False} if settings.get("include_prompt") is False and way == "mean" else {})


def _prompts(settings: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(settings, PROMPTS)
    prompts: dict[str, Any] = fields.table("prompts", {})
    default = fields.text("default_prompt_name", None)
    for name, text in prompts.items():
        if not isinstance(text, str) or not all(map(_is_text, (name, text))):
            raise ModelFormatError(f"{PROMPTS}: the prompt {name!r:.80} is no text of at most {_MAX_PROMPT} characters")
    if len(prompts) > _MAX_PROMPTS:
        raise ModelFormatError(f"{PROMPTS} has {len(prompts)} prompts, at most {_MAX_PROMPTS}")
    if default is not None and default not in prompts:
        raise ModelFormatError(f"{PROMPTS}: default_prompt_name is {default!r:.80}, which is none of the prompts")
    return ({"prompts": prompts} if prompts else {}) | ({} if default is None else {"default_prompt": default})


def _score(settings: dict[str, Any] | None, vocab_size: int) -> dict[str, Any]:
    if settings is None:
        return {}
    fields = Fields(settings, SCORE)
    ids = {"true_token_id": fields.integer("true_token_id"), "false_token_id": fields.integer("false_token_id", None)}
    for name, id_ in ids.items():
        if id_ is not None and not 0 <= id_ < vocab_size:
            raise fields.wrong(name, f"a token of {vocab_size}")
    return {"rerank": ids}


def _is_text(text: str) -> bool:
    """Whether it is Unicode, and no longer than prompts are."""
    return len(text) <= _MAX_PROMPT and not any("\ud800" <= letter <= "\udfff" for letter in text)
