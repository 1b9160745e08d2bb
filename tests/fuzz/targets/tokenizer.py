"""tokenizer.json: a program of components. Every kind of component with sane and hostile parameters, and damaged documents."""

from __future__ import annotations

import collections
import copy
import json
import random
from pathlib import Path
from typing import Any

from fuzz import mutations
from fuzz.cases import Case
from fuzz.mutations import words
from fuzz.targets import seeds

from pyengine.text.tokenizer import Tokenizer

_REGEXES = [
    "a",
    " ",
    r"\s+",
    r"\p{L}+|\p{N}",
    "(a+)+$",
    "(a|a)*b",
    r"(?=a)",
    "",
    "(",
    r"[^\s\S]",
    r"(\w+)\1",
    "a{0,60000}",
    r"(?i)x|y",
    "^",
    ".",
]
_NORMALIZERS = words("""
BertNormalizer Lowercase NFC NFD NFKC NFKD Nmt Strip StripAccents Prepend Replace Replace ByteLevel Precompiled Sequence
Sequence
""")
_PRE_TOKENIZERS = words("""
ByteLevel Whitespace WhitespaceSplit Punctuation Metaspace Split Split Digits BertPreTokenizer UnicodeScripts CharDelimiterSplit
FixedLength Sequence
""")
_DECODERS = words("""
ByteLevel ByteFallback Fuse Metaspace Replace Strip WordPiece BPEDecoder CTC Sequence
""")
_MODEL_KEYS = words("""
dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk byte_fallback ignore_merges type unk_id vocab merges
max_input_chars_per_word
""")
_TEXTS = ["", "a", " ", "▁", "Ġ", "ab", "<|end|>", "\0", "x" * 1000, "é", "\U0001f600"]
_PATTERNS = [*({"Regex": regex} for regex in _REGEXES), *({"String": text} for text in _TEXTS)]
_BEHAVIORS = ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous", "Other"]


def _text(rng: random.Random) -> str:
    return rng.choice(_TEXTS)


def _flag(rng: random.Random) -> bool:
    return rng.random() < 0.5


def normalizer(rng: random.Random, depth: int = 0) -> dict[str, Any] | None:
    kind = rng.choice([*_NORMALIZERS, None])
    if kind is None:
        return None
    made: dict[str, Any] = {"type": kind}
    if kind == "Sequence":
        made["normalizers"] = [
            normalizer(rng, depth + 1) or {"type": "NFC"}
            for _ in range(rng.choice([0, 1, 2, 5, 30]) if depth < 2 else 1)
        ]
    elif kind == "Strip":
        made |= {"strip_left": _flag(rng), "strip_right": _flag(rng)}
    elif kind == "Prepend":
        made["prepend"] = _text(rng)
    elif kind == "Replace":
        made |= {"pattern": rng.choice(_PATTERNS), "content": _text(rng)}
    elif kind == "Precompiled":
        made["precompiled_charsmap"] = rng.choice(["", "AAAA", "!!", "AAQAAAA" * 100])
    elif kind == "BertNormalizer":
        made |= {
            "clean_text": _flag(rng),
            "handle_chinese_chars": _flag(rng),
            "strip_accents": None,
            "lowercase": _flag(rng),
        }
    return made


def pre_tokenizer(rng: random.Random, depth: int = 0) -> dict[str, Any] | None:
    kind = rng.choice([*_PRE_TOKENIZERS, None])
    if kind is None:
        return None
    made: dict[str, Any] = {"type": kind}
    if kind == "ByteLevel":
        made |= {"add_prefix_space": _flag(rng), "trim_offsets": True, "use_regex": _flag(rng)}
    elif kind == "Metaspace":
        made |= {
            "replacement": rng.choice(["▁", "a", " ", "ab"]),
            "prepend_scheme": rng.choice(["first", "always", "never", "x"]),
            "split": _flag(rng),
        }
    elif kind == "Split":
        made |= {"pattern": rng.choice(_PATTERNS), "behavior": rng.choice(_BEHAVIORS), "invert": _flag(rng)}
    elif kind == "Punctuation":
        made["behavior"] = rng.choice(_BEHAVIORS)
    elif kind == "Digits":
        made["individual_digits"] = _flag(rng)
    elif kind == "CharDelimiterSplit":
        made["delimiter"] = rng.choice(["a", " ", "ab"])
    elif kind == "FixedLength":
        made["length"] = rng.choice([0, 1, 5, 2**63])
    elif kind == "Sequence":
        made["pretokenizers"] = [
            pre_tokenizer(rng, depth + 1) or {"type": "Whitespace"}
            for _ in range(rng.choice([0, 1, 2, 30]) if depth < 2 else 1)
        ]
    return made


def decoder(rng: random.Random, depth: int = 0) -> dict[str, Any] | None:
    kind = rng.choice([*_DECODERS, None])
    if kind is None:
        return None
    made: dict[str, Any] = {"type": kind}
    if kind == "ByteLevel":
        made |= {"add_prefix_space": _flag(rng), "trim_offsets": True, "use_regex": True}
    elif kind == "Metaspace":
        made |= {
            "replacement": rng.choice(["▁", "a"]),
            "prepend_scheme": rng.choice(["first", "always", "never"]),
            "split": True,
        }
    elif kind == "Replace":
        made |= {"pattern": rng.choice(_PATTERNS), "content": rng.choice([" ", *_TEXTS])}
    elif kind == "Strip":
        made |= {
            "content": rng.choice([" ", "a", "ab"]),
            "start": rng.choice([0, 1, 2**40]),
            "stop": rng.choice([0, 1]),
        }
    elif kind in ("WordPiece", "BPEDecoder", "CTC"):
        made |= {"prefix": "##", "cleanup": True, "suffix": "</w>", "pad_token": "a", "word_delimiter_token": "|"}
    elif kind == "Sequence":
        made["decoders"] = [
            decoder(rng, depth + 1) or {"type": "Fuse"} for _ in range(rng.choice([0, 1, 2, 5]) if depth < 2 else 1)
        ]
    return made


def post_processor(rng: random.Random) -> dict[str, Any] | None:
    piece = rng.choice(
        [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "x", "type_id": 0}},
        ]
    )
    template = {
        "type": "TemplateProcessing", "single": [piece] * rng.choice([0, 1, 2, 1000]), "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": rng.choice([[], [1], [2**32 - 1], [1] * 1000]), "tokens": ["<s>"]}},
    }  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": _flag(rng), "trim_offsets": True, "use_regex": True}
    bert = {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 2**31]}
    return rng.choice([None, template, byte_level, bert, {"type": "Sequence", "processors": [byte_level, template]}])


def added_token(rng: random.Random, document: Any) -> dict[str, Any]:
    vocab = document.get("model", {}).get("vocab")
    known = [str(one) for one in vocab] if isinstance(vocab, (dict, list)) else []  # it may have been changed before
    contents = [*_TEXTS, "<|new|>", "<s>", *(known or ["a"])][:400]
    flags = {key: _flag(rng) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return {"id": rng.choice([0, 1, 256, 299, 300, 10**6, 2**31, 2**32 - 1]), "content": rng.choice(contents), **flags}


def _change_model(rng: random.Random, model: dict[str, Any]) -> None:
    key = rng.choice(_MODEL_KEYS)
    vocab = model.get("vocab")
    if key == "type":
        model["type"] = rng.choice(["BPE", "Unigram", "WordPiece", "WordLevel", "x"])
    elif key == "vocab" and isinstance(vocab, dict) and vocab:
        vocab[rng.choice([*list(vocab)[:50], *_TEXTS])] = rng.choice([0, 1, 299, 300, 10**6, 2**32 - 1, 2**32, -1, 0.5])
    elif key == "vocab" and isinstance(vocab, list) and vocab:
        vocab[rng.randrange(len(vocab))] = [_text(rng), rng.choice([0.0, -1e308, 1e308, "x"])]
    elif key == "merges" and isinstance(model.get("merges"), list):
        pair = [_text(rng), _text(rng)]
        model["merges"].insert(0, rng.choice([pair, " ".join(pair), ["a", "b"], ["b", "a"], "a b c", [["a"], "b"], 5]))
    elif key not in ("vocab", "merges"):
        model[key] = rng.choice([True, False, None, "a", "<unk>", "", 0, 1, 300, 0.5, 1.0, 2.0, -1, 2**40, "x" * 1000])


def changed_tokenizer(rng: random.Random, document: Any) -> Any:
    """A copy of a tokenizer.json with other components, other values in its model, or damage anywhere."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind = rng.randrange(10)
        if kind < 2 or not isinstance(document, dict):
            document = mutations.mutated(rng, document, 1)
        elif kind == 2:
            document["normalizer"] = normalizer(rng)
        elif kind == 3:
            document["pre_tokenizer"] = pre_tokenizer(rng)
        elif kind == 4:
            document["decoder"] = decoder(rng)
        elif kind == 5:
            document["post_processor"] = post_processor(rng)
        elif kind < 8 and isinstance(document.get("model"), dict):
            _change_model(rng, document["model"])
        elif kind == 8 and isinstance(document.get("added_tokens"), list):
            document["added_tokens"].append(
                added_token(rng, document if isinstance(document.get("model"), dict) else {})
            )
        else:
            document[rng.choice(["truncation", "padding", "version"])] = mutations.value(rng)
    return document


class TokenizerTarget:
    name = "tokenizer"

    def __init__(self, scratch: Path) -> None:
        self.stage = ""
        self._documents = seeds.tokenizer_documents()

    def make(self, rng: random.Random) -> Case:
        changed = changed_tokenizer(rng, rng.choice(self._documents))
        data = json.dumps(changed, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        if rng.random() < 0.05:
            data = mutations.mutated_bytes(rng, data)
        pieces = ["<|end|>", "<|bos|>", "<s>", "</s>", "<think>", "<0x41>", "the world"]
        texts = [mutations.text(rng, pieces) for _ in range(3)] + [
            rng.choice(["a", " ", "ab", "▁", "\u0301"]) * rng.choice([100, 3000])
        ]
        config = mutations.mutated(rng, seeds.SETTINGS, rng.randrange(2))
        return Case(
            {"tokenizer.json": data},
            {"texts": texts, "config": config, "ids": [rng.choice([0, 1, 255, 256, 299, 2**31]) for _ in range(5)]},
        )

    def run(self, case: Case) -> None:
        self.stage = "load"
        data = case.files["tokenizer.json"]
        tokenizer = Tokenizer(data, case.arguments["config"], bos_token_id=1, eos_token_ids=(2,))
        never = tokenizer.special_ids - ids_of_text(json.loads(data)["model"])
        for text in case.arguments["texts"]:
            self.stage = "encode"
            ids = tokenizer.encode(text)
            assert never.isdisjoint(tokenizer.encode(text, add_bos=False)), "a special token came from text"
            tokenizer.encode(text, parse_special=True)
            tokenizer.encode_marked(text, "\ue000")
            apart = frozenset(case.arguments["ids"])
            for goes_on in (False, True):
                inside = tokenizer.encode_inside(text, apart=apart, goes_on=goes_on)
                assert never.isdisjoint(inside), "a special token came from text around a hole"
            self.stage = "decode"
            tokenizer.decode(ids, skip_special_tokens=False)
        tokenizer.decode(case.arguments["ids"])


def ids_of_text(model: dict[str, Any]) -> set[Any]:
    """Special or not, these may come from text: what stands for characters that the vocabulary lacks, and ids that a damaged
    vocabulary gives to a piece too."""
    vocab = model.get("vocab")
    if not isinstance(vocab, dict):
        return {model.get("unk_id")}
    counted = collections.Counter(vocab.values())
    return {vocab.get(model.get("unk_token"))} | {id_ for id_, count in counted.items() if count > 1}
