"""A Hugging Face ``tokenizer.json`` from the tokenizer metadata of a GGUF file.

Two families: byte-level BPE ("gpt2"), told apart by how text is split before merging, and SentencePiece BPE ("llama"), whose
merges are not stored but follow from the scores. Control tokens become *special* added tokens: the ``tokenizers`` library matches
them in text unless ``Tokenizer.encode_special_tokens`` is set, so whoever encodes text decides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ModelFormatError, UnsupportedModelError
from ..format.strict_json import parse_json_object
from ..text.tokenizer import Tokenizer
from .fields import Fields

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# Control tokens that end a turn or a text, whatever the metadata call the end token.
_END_TEXTS = (
    "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>",
    "</s>", "<|EOT|>", "<｜end▁of▁sentence|>", "<｜end▁of▁sentence｜>",
)  # fmt: skip


# Vocabularies of 256k pieces stay below a tenth of both.
_MAX_SPLIT_CHARACTERS = 1 << 28
_MAX_MERGE_CHARACTERS = 1 << 26

# ---------------------------------------------------------------------------- pre-tokenizers


class PreTokenizer(NamedTuple):
    """How text is cut before byte-level merging: the patterns apply in turn, each to the pieces of the one before."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a whole token is that token
    add_bos: bool = False  # when the metadata do not say


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS_WITHOUT_LINE_ENDS = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased_words(end: str, digits: str) -> str:
    """Words are cut where case changes; ``end`` is what may end one, ``digits`` how many stay together."""
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{end}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{end}"
        rf"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_CJK = "[一-龥ࠀ-一가-\ud7ff]+"
# Cased letters without the Georgian lower case, which was not cased when that pattern was made.
_DEEPSEEK_LETTERS = r"[\p{Lu}\p{Ll}\p{Lt}&&[^\u10d0-\u10ff]]"
_DEEPSEEK_PUNCTUATION = "[!-/:-~！-／：-～‘-‟\u3000-。]"
_HUNYUAN_WORDS = (
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LLAMA3 = PreTokenizer((_WORDS % "{1,3}",), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer((_WORDS % "",))
_PLAIN_GPT2 = PreTokenizer((_GPT2,))
_DIGITS_GPT2 = PreTokenizer((r"\p{N}", _GPT2))

PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _PLAIN_GPT2,
    "phi-2": _PLAIN_GPT2,
    "olmo": _PLAIN_GPT2,
    "exaone4": _PLAIN_GPT2,
    "a.x-4.0": _PLAIN_GPT2,
    "mellum": _PLAIN_GPT2,
    "trillion": _PLAIN_GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "lfm2": _LLAMA3,
    "midm-2.0": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "stablelm2": _QWEN2,
    "hunyuan": _QWEN2,
    "megrez": _QWEN2,
    "kormo": _QWEN2,
    "seed-coder": PreTokenizer((_WORDS_WITHOUT_LINE_ENDS,)),  # Seed-OSS
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?{_DEEPSEEK_LETTERS}+",
            rf"\s?{_DEEPSEEK_PUNCTUATION}+",
            r"\s+$",
            _CJK,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,  # Granite
    "smollm": _DIGITS_GPT2,
    "command-r": _DIGITS_GPT2,
    "minerva-7b": _DIGITS_GPT2,
    "dbrx": PreTokenizer((_WORDS % "{1,3}",)),  # OLMo 2
    "smaug-bpe": PreTokenizer((_WORDS % "{1,3}",)),
    "glm4": PreTokenizer((_WORDS % "{1,3}",)),
    "chatglm-bpe": PreTokenizer((_WORDS % "{1,3}",)),
    "gpt-4o": PreTokenizer((_cased_words(f"{_CONTRACTIONS}?", "{1,3}"),)),  # Phi-4-mini
    "tekken": PreTokenizer((_cased_words("", ""),), ignore_merges=True, add_bos=True),  # Mistral Nemo, Ministral
    "hunyuan-dense": PreTokenizer((r"\p{N}{1,3}", "[一-龥\u3040-\u30ff]+", _HUNYUAN_WORDS)),
}


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}

# ---------------------------------------------------------------------------- typed metadata


def _is_marker(token: str) -> bool:
    return token in _END_TEXTS or (token.startswith("<|") and token.endswith("|>"))


class _Vocabulary(NamedTuple):
    tokens: list[str]
    types: list[float]
    ids: dict[str, int]

    def added_tokens(self) -> list[dict[str, Any]]:
        """Control tokens as special, user-defined ones as ordinary added tokens, by id.

        Some converters mark turn markers as user-defined. They are special too: an ordinary added
        token would be matched in a user's text.
        """
        return [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != _USER_DEFINED or _is_marker(token),
            }
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN) and token
        ]


_PREFIX = "tokenizer.ggml."
_NO_TOKEN = 0xFFFFFFFF  # -1 where only unsigned numbers are written


def _fields(metadata: Mapping[str, Any]) -> Fields:
    return Fields(metadata, "GGUF", _PREFIX)


def _array(metadata: Mapping[str, Any], key: str) -> list[Any] | npt.NDArray[Any]:
    """A list of strings or a NumPy array of numbers."""
    value = _fields(metadata).raw(key)
    if value is None:
        raise ModelFormatError(f"GGUF: key {_PREFIX + key!r} is missing")
    if not isinstance(value, (list, np.ndarray)):
        raise ModelFormatError(f"GGUF: key {_PREFIX + key!r} is not an array")
    return value


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    value = _array(metadata, "tokens")
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise _fields(metadata).wrong("tokens", "a list of strings")
    return value


def _numbers(metadata: Mapping[str, Any], key: str, length: int) -> list[float]:
    """As many numbers as there are tokens, none of them NaN."""
    value = _array(metadata, key)
    if len(value) != length:
        raise ModelFormatError(f"GGUF: key {_PREFIX + key!r} has {len(value)} elements, not {length}")
    numbers: list[Any] = value if isinstance(value, list) else value.tolist()
    if any(type(number) not in (int, float) or number != number for number in numbers):
        raise _fields(metadata).wrong(key, "an array of numbers without a NaN")
    return numbers


def _types(metadata: Mapping[str, Any], n_tokens: int) -> list[float]:
    if "token_type" not in _fields(metadata):
        return [_NORMAL] * n_tokens
    return _numbers(metadata, "token_type", n_tokens)


def _token_id(metadata: Mapping[str, Any], kind: str, n_tokens: int) -> int | None:
    """The id of a special token, or None. One that is outside the vocabulary names nothing, and matters if a text would begin or
    end with it.
    """
    key = f"{kind}_token_id"
    value = _fields(metadata).raw(key)
    if value is None:
        return None
    if type(value) is int and 0 <= value < n_tokens:
        return value
    if type(value) is not int or (kind in ("bos", "eos") and value != _NO_TOKEN):
        raise ModelFormatError(f"GGUF: {_PREFIX}{key} {value!r:.80} is not a token of {n_tokens}")
    return None


def _vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    tokens = _tokens(metadata)
    types = _types(metadata, len(tokens))
    if unknown := set(types) - {0, _NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE}:
        raise ModelFormatError(f"GGUF: unknown token type {sorted(unknown)[0]!r}")
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise UnsupportedModelError(f"token {twice!r:.80} occurs twice in the vocabulary")
    return _Vocabulary(tokens, types, ids)


# ---------------------------------------------------------------------------- the two families


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    pre = _fields(metadata).text("pre", None)
    if pre is None:
        raise UnsupportedModelError("the model does not name its pre-tokenizer (tokenizer.ggml.pre)")
    if pre not in PRE_TOKENIZERS:
        raise UnsupportedModelError(f"pre-tokenizer {pre!r:.80} is not implemented")
    return PRE_TOKENIZERS[pre]


def _byte_level_bpe(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> dict[str, Any]:
    pre = _pre_tokenizer(metadata)
    merges = []
    for merge in _array(metadata, "merges"):
        cut = merge.find(" ", 1) if isinstance(merge, str) else -1
        if cut < 0:
            raise ModelFormatError(f"GGUF: {merge!r:.80} is not a merge")
        merges.append([merge[:cut], merge[cut + 1 :]])
    splits = [_split(pattern) for pattern in pre.patterns]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, _BYTE_LEVEL]},
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": vocabulary.ids,
            "merges": merges,
        },
    }


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[list[str]]:
    """SentencePiece BPE joins the adjacent pair whose result scores best: that order, as a list of merges.

    ``tokens`` are the pieces that may take part, ``scores`` theirs. Of two splits of one piece the left-longer one comes last;
    they never compete for the same characters. Raises ModelFormatError where the pieces are so long that looking at every split
    would take seconds, or writing the merges down hundreds of megabytes.
    """
    if sum(len(token) ** 2 for token in tokens) > _MAX_SPLIT_CHARACTERS:
        raise ModelFormatError("the pieces of the vocabulary are too long for a SentencePiece model")
    rank = {token: i for i, token in enumerate(tokens)}
    merges = []
    n_characters = 0
    for _, token in sorted(zip(scores, tokens, strict=True), key=lambda item: (-item[0], rank[item[1]])):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in rank and right in rank:
                merges.append([left, right])
                n_characters += len(token)
        if n_characters > _MAX_MERGE_CHARACTERS:
            raise ModelFormatError("the vocabulary has too many merges for a SentencePiece model")
    return merges


def _sentencepiece_bpe(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> dict[str, Any]:
    tokens, types = vocabulary.tokens, vocabulary.types
    scores = _numbers(metadata, "scores", len(tokens))
    # Pieces that text may become: never a control token or a byte written out as "<0x41>".
    normal = [i for i, kind in enumerate(types) if kind == _NORMAL]
    merges = merges_from_scores([tokens[i] for i in normal], [scores[i] for i in normal])
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    if unknown is None and (i := _token_id(metadata, "unknown", len(tokens))) is not None:
        unknown = tokens[i]
    prefix = _fields(metadata).flag("add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    restore = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    normalizers = [{"type": "Prepend", "prepend": "▁"}, replace] if prefix else [replace]
    decoders = [restore, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": _BYTE in types,
            "ignore_merges": False,
            "vocab": vocabulary.ids,
            "merges": merges,
        },
    }


# ---------------------------------------------------------------------------- attachments


def _template(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> dict[str, Any] | None:
    """The post-processor that adds BOS and EOS when special tokens are asked for."""
    if bos is None and eos is None:
        return None

    def one(sequence: str, type_id: int) -> list[dict[str, Any]]:
        middle: list[dict[str, Any]] = [{"Sequence": {"id": sequence, "type_id": type_id}}]
        before = [{"SpecialToken": {"id": bos[0], "type_id": type_id}}] if bos else []
        after = [{"SpecialToken": {"id": eos[0], "type_id": type_id}}] if eos else []
        return before + middle + after

    return {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": one("A", 0) + one("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [i], "tokens": [token]} for token, i in (item for item in (bos, eos) if item)
        },
    }


def begin_token_id(metadata: Mapping[str, Any]) -> int | None:
    """The id that begins a text."""
    return _token_id(metadata, "bos", len(_tokens(metadata)))


def end_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Ids that end a generation: the metadata's end tokens, then well-known control tokens."""
    tokens = _tokens(metadata)
    found = [_token_id(metadata, kind, len(tokens)) for kind in ("eos", "eot", "eom")]
    types = _types(metadata, len(tokens))
    found += [i for i, token in enumerate(tokens) if types[i] == _CONTROL and token in _END_TEXTS]
    return list(dict.fromkeys(i for i in found if i is not None))


def check_tokenizer_json(text: bytes, vocab_size: int) -> dict[str, int]:
    """Load the tokenizer as the engine will; its vocabulary, added tokens too. Ids must fit the embedding matrix."""
    return Tokenizer(text, vocab_size=vocab_size).vocabulary()


def json_bytes(document: dict[str, Any], what: str, **style: Any) -> bytes:
    """A parsed document as JSON again, in a style of ``json.dumps``."""
    try:
        return json.dumps(document, **style).encode()
    except RecursionError:
        raise ModelFormatError(f"{what} is nested too deeply") from None
    except UnicodeEncodeError:
        raise ModelFormatError(f"{what} is not Unicode") from None


def gguf_tokenizer_attachments(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and, if the file has one, chat_template.jinja."""
    fields = _fields(metadata)
    model = fields.text("model", None)
    vocabulary = _vocabulary(metadata)
    tokens = vocabulary.tokens
    if model == "gpt2":
        parts = _byte_level_bpe(metadata, vocabulary)
        add_bos_default = _pre_tokenizer(metadata).add_bos
    elif model == "llama":
        parts = _sentencepiece_bpe(metadata, vocabulary)
        add_bos_default = True
    else:
        raise UnsupportedModelError(f"tokenizer {model!r:.80} is not implemented")
    ids = {kind: _token_id(metadata, kind, len(tokens)) for kind in ("bos", "eos", "unknown", "padding")}
    add = {
        "bos": fields.flag("add_bos_token", add_bos_default),
        "eos": fields.flag("add_eos_token", False),
    }
    ends = {kind: (tokens[i], i) for kind in add if add[kind] and (i := ids[kind]) is not None}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": parts["normalizer"],
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": _template(ends.get("bos"), ends.get("eos")),
        "decoder": parts["decoder"],
        "model": parts["model"],
    }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    check_tokenizer_json(text, vocab_size)
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    settings: dict[str, Any] = {names[kind]: None if i is None else tokens[i] for kind, i in ids.items()}
    settings |= {"add_bos_token": "bos" in ends, "add_eos_token": "eos" in ends}
    attachments = {
        "tokenizer.json": text,
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False).encode(),
    }
    template = Fields(metadata, "GGUF").text("tokenizer.chat_template", None)
    if template is not None:
        attachments["chat_template.jinja"] = template.encode()
    return attachments


def compact_tokenizer_json(text: bytes) -> bytes:
    """The same tokenizer, quicker to load: no blanks between items, and merges as "left right" where no piece has a space
    (the older of the two spellings that the library reads, and faster to parse: loading is most of a short run's start), and
    a vocabulary sorted by spelling, which is how the library's parser keeps it for a while.
    """
    data = parse_json_object(text, "tokenizer.json")
    model = data["model"]
    if isinstance(model.get("vocab"), dict):  # a list is in the order of its ids
        model["vocab"] = dict(sorted(model["vocab"].items()))
    merges = model.get("merges") or []
    if merges and all(isinstance(merge, list) and len(merge) == 2 for merge in merges):
        joined = [" ".join(merge) for merge in merges]
        if all(merge.count(" ") == 1 for merge in joined):
            model["merges"] = joined
    return json_bytes(data, "tokenizer.json", ensure_ascii=False, separators=(",", ":"))
