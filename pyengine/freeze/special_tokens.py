"""Which tokens begin and end a text, as transformers resolves them for a Hugging Face directory.

Special tokens belong to the tokenizer: ``tokenizer_config.json`` names them by their spelling, and ``special_tokens_map.json``
too in older checkpoints. The ids in ``config.json`` are what the model was made with and often stale; they count where the
tokenizer says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ModelFormatError
from .fields import Fields

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# What the classes of transformers name by themselves; those of the other classes that we can read name nothing.
_ENDOFTEXT = "<|endoftext|>"
_CLASS_TOKENS = {
    "Qwen2Tokenizer": {"eos_token": _ENDOFTEXT, "unk_token": _ENDOFTEXT, "pad_token": _ENDOFTEXT},
    "GPT2Tokenizer": {"bos_token": _ENDOFTEXT, "eos_token": _ENDOFTEXT, "unk_token": _ENDOFTEXT},
}


def _spelling(values: Mapping[str, Any], name: str, where: str) -> str | None:
    """A token is a string, or an object with its string as "content"."""
    value = values[name]
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ModelFormatError(f"{where}: {name} must be a string, not {value!r:.80}")
    return value or None


def spellings(settings: Mapping[str, Any], special_tokens_map: Mapping[str, Any]) -> dict[str, str | None]:
    """{"bos_token": "<s>", ...}: the tokens that the tokenizer names; None for one that it says it has not.

    ``settings`` is tokenizer_config.json. The map comes from a time before it listed the added tokens, and counts only then.
    """
    kind = settings.get("tokenizer_class")
    found: dict[str, str | None] = {}
    if isinstance(kind, str):
        found |= _CLASS_TOKENS.get(kind.removesuffix("Fast"), {})
    found |= {name: _spelling(settings, name, "tokenizer_config.json") for name in NAMES if name in settings}
    if "added_tokens_decoder" not in settings:
        where = "special_tokens_map.json"
        found |= {name: _spelling(special_tokens_map, name, where) for name in NAMES if name in special_tokens_map}
    return found


def _ids(fields: Fields, key: str) -> list[int]:
    """One id, a list, or nothing; a negative one is how some say nothing."""
    value = fields.raw(key)
    ids = [] if value is None else list(value) if isinstance(value, list) else [value]
    if any(type(i) is not int for i in ids):
        raise fields.wrong(key, "a token id or a list of them")
    return [i for i in ids if i >= 0]


def begin_and_end(
    names: Mapping[str, str | None],
    ids: Mapping[str, int],
    config: Fields,
    generation: Fields,
    vocab_size: int,
) -> tuple[int | None, tuple[int, ...]]:
    """(id of BOS or None, ids that end a text, the tokenizer's EOS first).

    ``names`` as from ``spellings``, ``ids`` the vocabulary. All that ends a text is united: the tokenizer's EOS and the ids of
    generation_config.json, or of config.json where that has none. Ids outside the vocabulary can never come, and are left out
    while others remain.
    """
    token = names.get("bos_token", "")
    bos = ids.get(token) if token else None
    if bos is None and token is not None:
        bos = next(iter(_ids(config, "bos_token_id")), None)
    token = names.get("eos_token")
    eos = ids.get(token) if token else None
    ends = [] if eos is None else [eos]
    ends += _ids(generation if "eos_token_id" in generation else config, "eos_token_id")
    possible = [i for i in dict.fromkeys(ends) if i < vocab_size]
    return bos, tuple(possible or dict.fromkeys(ends))
