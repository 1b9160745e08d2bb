"""A Hugging Face ``tokenizer.json`` from the tokenizer metadata of a GGUF file.

Two families: byte-level BPE ("gpt2"), told apart by how text is split before merging, and
SentencePiece BPE ("llama"), whose merges are not stored but follow from the scores. Control tokens
become *special* added tokens: the ``tokenizers`` library matches them in text unless
``Tokenizer.encode_special_tokens`` is set, so whoever encodes text decides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ModelFormatError, UnsupportedModelError
from ..text.tokenizer import Tokenizer

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# Control tokens that end a turn or a text, whatever the metadata call the end token.
_END_TEXTS = (
    "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>",
    "</s>", "<|EOT|>", "<｜end▁of▁sentence|>", "<｜end▁of▁sentence｜>",
)  # fmt: skip


# ---------------------------------------------------------------------------- pre-tokenizers


class PreTokenizer(NamedTuple):
    """How text is cut before byte-level merging: the patterns apply in turn, each to the pieces of
    the one before.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a whole token is that token
    add_bos: bool = False  # when the metadata do not say


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CJK = "[一-龥ࠀ-一가-\ud7ff]+"
# Cased letters without the Georgian lower case, which was not cased when that pattern was made.
_DEEPSEEK_LETTERS = r"[\p{Lu}\p{Ll}\p{Lt}&&[^\u10d0-\u10ff]]"
_DEEPSEEK_PUNCTUATION = "[!-/:-~！-／：-～‘-‟\u3000-。]"

_LLAMA3 = PreTokenizer((_WORDS % "{1,3}",), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer((_WORDS % "",))
_DIGITS_GPT2 = PreTokenizer((r"\p{N}", _GPT2))

PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((_GPT2,)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
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
    "smollm": _DIGITS_GPT2,
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
    types: list[int]
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


def _list(metadata: Mapping[str, Any], key: str, length: int | None = None) -> list[Any]:
    value = metadata.get(key)
    if value is None:
        raise ModelFormatError(f"GGUF: key {key!r} is missing")
    if not isinstance(value, list):
        if not hasattr(value, "tolist"):
            raise ModelFormatError(f"GGUF: key {key!r} is not an array")
        value = value.tolist()
    if length is not None and len(value) != length:
        raise ModelFormatError(f"GGUF: key {key!r} has {len(value)} elements, not {length}")
    return value


def _token_id(metadata: Mapping[str, Any], kind: str, n_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{kind}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < n_tokens:
        raise ModelFormatError(f"GGUF: {key} {value!r:.80} is not a token of {n_tokens}")
    return value


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if type(value) is not bool:
        raise ModelFormatError(f"GGUF: tokenizer.ggml.{key} must be a bool, not {value!r:.80}")
    return value


def _vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    tokens = _list(metadata, "tokenizer.ggml.tokens")
    if not tokens or not isinstance(tokens[0], str):
        raise ModelFormatError("GGUF: tokenizer.ggml.tokens must be a list of strings")
    types = [_NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        types = _list(metadata, "tokenizer.ggml.token_type", len(tokens))
    if unknown := set(types) - {0, _NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE}:
        raise ModelFormatError(f"GGUF: unknown token type {sorted(unknown)[0]!r}")
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise UnsupportedModelError(f"token {twice!r:.80} occurs twice in the vocabulary")
    return _Vocabulary(tokens, types, ids)


# ---------------------------------------------------------------------------- the two families


def _byte_level_bpe(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> dict[str, Any]:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            "the model does not name its pre-tokenizer (tokenizer.ggml.pre)"
            if pre is None
            else f"pre-tokenizer {pre!r:.80} is not implemented"
        )
    merges = []
    for merge in _list(metadata, "tokenizer.ggml.merges"):
        cut = merge.find(" ", 1) if isinstance(merge, str) else -1
        if cut < 0:
            raise ModelFormatError(f"GGUF: {merge!r:.80} is not a merge")
        merges.append([merge[:cut], merge[cut + 1 :]])
    splits = [_split(pattern) for pattern in PRE_TOKENIZERS[pre].patterns]
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
            "ignore_merges": PRE_TOKENIZERS[pre].ignore_merges,
            "vocab": vocabulary.ids,
            "merges": merges,
        },
    }


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[list[str]]:
    """SentencePiece BPE joins the adjacent pair whose result scores best: that order, as a list of
    merges.

    ``tokens`` are the pieces that may take part, ``scores`` theirs. Of two splits of one piece the
    left-longer one comes last; they never compete for the same characters.
    """
    rank = {token: i for i, token in enumerate(tokens)}
    merges = []
    for _, token in sorted(zip(scores, tokens, strict=True), key=lambda item: (-item[0], rank[item[1]])):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in rank and right in rank:
                merges.append([left, right])
    return merges


def _sentencepiece_bpe(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> dict[str, Any]:
    tokens, types = vocabulary.tokens, vocabulary.types
    scores = _list(metadata, "tokenizer.ggml.scores", len(tokens))
    if any(score != score for score in scores):
        raise ModelFormatError("GGUF: tokenizer.ggml.scores holds a NaN")
    # Pieces that text may become: never a control token or a byte written out as "<0x41>".
    normal = [i for i, kind in enumerate(types) if kind == _NORMAL]
    merges = merges_from_scores([tokens[i] for i in normal], [scores[i] for i in normal])
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    if unknown is None and (i := _token_id(metadata, "unknown", len(tokens))) is not None:
        unknown = tokens[i]
    prefix = _flag(metadata, "add_space_prefix", True)
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


# ---------------------------------------------------------------------------- riders


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


def end_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Ids that end a generation: the metadata's end tokens, then well-known control tokens."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise ModelFormatError("GGUF: key 'tokenizer.ggml.tokens' is missing")
    found = [_token_id(metadata, kind, len(tokens)) for kind in ("eos", "eot", "eom")]
    if "tokenizer.ggml.token_type" in metadata:
        types = _list(metadata, "tokenizer.ggml.token_type", len(tokens))
        wanted = set(_END_TEXTS)
        found += [
            i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _CONTROL and token in wanted
        ]
    return list(dict.fromkeys(i for i in found if i is not None))


def check_tokenizer_json(text: str, vocab_size: int) -> None:
    """Load the tokenizer as the engine will; ids must fit the embedding matrix."""
    Tokenizer(text.encode("utf-8", "surrogatepass"), vocab_size=vocab_size)


def gguf_tokenizer_riders(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and, if the file has one, chat_template.jinja."""
    model = metadata.get("tokenizer.ggml.model")
    vocabulary = _vocabulary(metadata)
    tokens = vocabulary.tokens
    if model == "gpt2":
        parts = _byte_level_bpe(metadata, vocabulary)
        add_bos_default = PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]].add_bos
    elif model == "llama":
        parts = _sentencepiece_bpe(metadata, vocabulary)
        add_bos_default = True
    else:
        raise UnsupportedModelError(f"tokenizer {model!r:.80} is not implemented")
    ids = {kind: _token_id(metadata, kind, len(tokens)) for kind in ("bos", "eos", "unknown", "padding")}
    add = {
        "bos": _flag(metadata, "add_bos_token", add_bos_default),
        "eos": _flag(metadata, "add_eos_token", False),
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
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    check_tokenizer_json(text, vocab_size)
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    settings: dict[str, Any] = {names[kind]: None if i is None else tokens[i] for kind, i in ids.items()}
    settings |= {"add_bos_token": "bos" in ends, "add_eos_token": "eos" in ends}
    riders = {
        "tokenizer.json": text.encode(),
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False).encode(),
    }
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str):
            raise ModelFormatError("GGUF: tokenizer.chat_template is not a string")
        riders["chat_template.jinja"] = template.encode()
    return riders


def compact_tokenizer_json(text: bytes) -> bytes:
    """The same tokenizer, quicker to load: no blanks between items, and merges as "left right" where no piece has a space
    (the older of the two spellings that the library reads, and faster to parse: loading is most of a short run's start), and
    a vocabulary sorted by spelling, which is how the library's parser keeps it for a while.
    """
    data = json.loads(text)
    vocab = data["model"].get("vocab")
    if isinstance(vocab, dict):  # a list is in the order of its ids
        data["model"]["vocab"] = dict(sorted(vocab.items()))
    merges = data["model"].get("merges") or []
    if merges and all(isinstance(merge, list) and len(merge) == 2 for merge in merges):
        joined = [" ".join(merge) for merge in merges]
        if all(merge.count(" ") == 1 for merge in joined):
            data["model"]["merges"] = joined
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
