"""Tokenizers rebuilt from GGUF metadata, against id vectors and against splits worked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from engine.freeze_models import VOCAB, vocabulary

from pyengine.errors import ModelFormatError, UnsupportedModelError
from pyengine.freeze.gguf import GGUFFile
from pyengine.freeze.tokenizer import (
    PRE_TOKENIZERS,
    compact_tokenizer_json,
    end_token_ids,
    gguf_tokenizer_attachments,
    merges_from_scores,
)


def metadata(pre: str | None = "gpt-2", **changes: Any) -> dict[str, Any]:
    tokens, merges = vocabulary()
    document = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3] + [1] * (VOCAB - 258),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
    }
    document |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in document.items() if value is not None}


def rebuilt(source: dict[str, Any], vocab_size: int = 1 << 24) -> tokenizers.Tokenizer:
    text = gguf_tokenizer_attachments(source, vocab_size)["tokenizer.json"].decode()
    return tokenizers.Tokenizer.from_str(text)


# ---------------------------------------------------------------------------- id vectors

SEPARATOR = "\n__ggml_vocab_test__\n"


def check_vectors(tokenizer: tokenizers.Tokenizer, stem: Path) -> None:
    """46 texts and their ids. None holds a special token: the ids are those of plain text."""
    texts = Path(f"{stem}.inp").read_text(encoding="utf-8").split(SEPARATOR)[:-1]
    expected = Path(f"{stem}.out").read_text().split("\n")[: len(texts)]
    assert len(texts) == len(expected) == 46
    for encode_special_tokens in (False, True):
        tokenizer.encode_special_tokens = encode_special_tokens
        for text, ids in zip(texts, expected, strict=True):
            encoding = tokenizer.encode(text, add_special_tokens=False)
            assert encoding.ids == [int(i) for i in ids.split()], text


@pytest.mark.parametrize(
    "name",
    ["deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-spm", "phi-3", "starcoder"],
)
def test_vectors(shared_data: Path, name: str) -> None:
    stem = shared_data / "tokenizer_vectors" / f"ggml-vocab-{name}.gguf"
    file = GGUFFile(stem)
    check_vectors(rebuilt(file.metadata), stem)
    file.close()


def test_smollm2_vectors(shared_data: Path, smollm2_gguf: Path) -> None:
    file = GGUFFile(smollm2_gguf)
    tokenizer = rebuilt(file.metadata, 49152)
    check_vectors(tokenizer, shared_data / "tokenizer_vectors" / "smollm2")
    assert end_token_ids(file.metadata) == [2, 0]
    tokenizer.encode_special_tokens = False
    assert tokenizer.encode("<|im_end|>").ids == [2]
    file.close()


# ---------------------------------------------------------------------------- splitting

TEXT = "It'S 12345 naïve\n\n  wörld!?  x=1\r\n\t42 "

SPLITS = {
    "llama-bpe": [
        "It", "'S", " ", "123", "45", " naïve", "\n\n", " ", " wörld", "!?", " ", " x", "=", "1",
        "\r\n", "\t", "42", " ",
    ],
    "qwen2": [
        "It", "'S", " ", *"12345", " naïve", "\n\n", " ", " wörld", "!?", " ", " x", "=", "1",
        "\r\n", "\t", *"42", " ",
    ],
    "gpt-2": [
        "It", "'", "S", " 12345", " naïve", "\n\n ", " wörld", "!?", " ", " x", "=", "1", "\r\n",
        "\t", "42", " ",
    ],
    "smollm": [
        "It", "'", "S", " ", *"12345", " naïve", "\n\n ", " wörld", "!?", " ", " x", "=", "1",
        "\r\n\t", *"42", " ",
    ],
    "gpt-4o": [
        "It'S", " ", "123", "45", " naïve", "\n\n", " ", " wörld", "!?", " ", " x", "=", "1",
        "\r\n", "\t", "42", " ",
    ],
}  # fmt: skip
SPLITS["llama3"] = SPLITS["llama-v3"] = SPLITS["dbrx"] = SPLITS["smaug-bpe"] = SPLITS["llama-bpe"]
SPLITS["glm4"] = SPLITS["chatglm-bpe"] = SPLITS["llama-bpe"]
SPLITS["deepseek-r1-qwen"] = SPLITS["stablelm2"] = SPLITS["seed-coder"] = SPLITS["qwen2"]
SPLITS["falcon3"] = SPLITS["pixtral"] = SPLITS["midm-2.0"] = SPLITS["llama-bpe"]
SPLITS["hunyuan"] = SPLITS["megrez"] = SPLITS["kormo"] = SPLITS["qwen2"]
SPLITS["starcoder"] = SPLITS["refact"] = SPLITS["command-r"] = SPLITS["minerva-7b"] = SPLITS["smollm"]
SPLITS["phi-2"] = SPLITS["olmo"] = SPLITS["exaone4"] = SPLITS["gpt-2"]
SPLITS["a.x-4.0"] = SPLITS["mellum"] = SPLITS["trillion"] = SPLITS["gpt-2"]


@pytest.mark.parametrize("pre", SPLITS)
def test_splits(pre: str) -> None:
    cut = rebuilt(metadata(pre)).pre_tokenizer.pre_tokenize_str(TEXT)
    assert [TEXT[a:b] for _, (a, b) in cut] == SPLITS[pre]


def test_gpt_4o_cuts_where_case_changes() -> None:
    text = "HTMLParser camelCase I'LL a/b\n"
    cut = rebuilt(metadata("gpt-4o")).pre_tokenizer.pre_tokenize_str(text)
    assert [text[a:b] for _, (a, b) in cut] == ["HTMLParser", " camel", "Case", " I'LL", " a", "/b", "\n"]


def test_tekken_cuts_where_case_changes_and_every_digit() -> None:
    text = "HTMLParser I'LL 12 नमस्ते a/b\n"
    cut = rebuilt(metadata("tekken")).pre_tokenizer.pre_tokenize_str(text)
    assert [text[a:b] for _, (a, b) in cut] == ["HTMLParser", " I", "'LL", " ", "1", "2", " नमस्ते", " a", "/b", "\n"]


def test_hunyuan_cuts_numbers_then_ideographs_and_kana_then_words() -> None:
    """Punctuation of ASCII takes the Latin letters after it."""
    text = "x.map 1234 こんにちは世界 नमस्ते don't «да»\n!\n"
    cut = rebuilt(metadata("hunyuan-dense")).pre_tokenizer.pre_tokenize_str(text)
    assert [text[a:b] for _, (a, b) in cut] == [
        "x", ".map", " ", "123", "4", " ", "こんにちは世界", " नमस्ते", " don", "'t", " «", "да", "»\n", "!\n",
    ]  # fmt: skip


def test_seed_coder_cuts_before_line_ends() -> None:
    """Punctuation keeps them in others."""
    cuts = {}
    for pre in ("seed-coder", "qwen2"):
        cut = rebuilt(metadata(pre)).pre_tokenizer.pre_tokenize_str("a!\nb")
        cuts[pre] = ["a!\nb"[a:b] for _, (a, b) in cut]
    assert cuts == {"seed-coder": ["a", "!", "\n", "b"], "qwen2": ["a", "!\n", "b"]}


def test_llama_bpe_takes_whole_tokens_before_merging() -> None:
    tokens, _ = vocabulary()
    tokens[259] = "xyz"  # no merge leads to it
    assert rebuilt(metadata("llama-bpe", tokens=tokens)).encode("xyz").ids == [256, 259]
    assert len(rebuilt(metadata("gpt-2", tokens=tokens)).encode("xyz").ids) == 3


@pytest.mark.parametrize("pre", ["viking", "qwen35", "gpt-5", ""])
def test_an_unknown_pre_tokenizer_is_refused_by_name(pre: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"pre-tokenizer '{pre}'"):
        rebuilt(metadata(pre))


def test_a_missing_pre_tokenizer_is_not_guessed() -> None:
    with pytest.raises(UnsupportedModelError, match="does not name"):
        rebuilt(metadata(None))


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_any_text_survives_a_round_trip(pre: str) -> None:
    tokenizer = rebuilt(metadata(pre))
    text = TEXT + "".join(map(chr, [*range(1, 0x800, 7), 0x3042, 0xAC00, 0x1F999, 0xA0, 0x3000]))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


# ---------------------------------------------------------------------------- special tokens


def test_user_text_makes_special_tokens_only_when_asked() -> None:
    tokenizer = rebuilt(metadata())
    assert tokenizer.encode("a<|end|>", add_special_tokens=False).ids == [97, 257]
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode("a<|end|>", add_special_tokens=False).ids
    assert ids == [97, *b"<|end|>"]


def test_markers_that_a_converter_calls_user_defined_are_special() -> None:
    types = [1] * 256 + [4, 4, 4] + [1] * (VOCAB - 259)
    tokenizer = rebuilt(metadata(token_type=types))
    tokenizer.encode_special_tokens = True
    assert 257 not in tokenizer.encode("<|end|>", add_special_tokens=False).ids
    assert tokenizer.encode("ab", add_special_tokens=False).ids == [258]  # ordinary ones still match


@pytest.mark.parametrize(
    ("flags", "ids"),
    [
        ({}, [97]),
        ({"add_bos_token": True}, [256, 97]),
        ({"add_eos_token": True}, [97, 257]),
        ({"add_bos_token": True, "add_eos_token": True}, [256, 97, 257]),
    ],
)
def test_bos_and_eos_follow_the_metadata(flags: dict[str, bool], ids: list[int]) -> None:
    source = metadata(**flags)
    assert rebuilt(source).encode("a").ids == ids
    assert rebuilt(source).encode("a", add_special_tokens=False).ids == [97]
    settings = json.loads(gguf_tokenizer_attachments(source, VOCAB)["tokenizer_config.json"])
    assert settings["add_bos_token"] is flags.get("add_bos_token", False)
    assert (settings["bos_token"], settings["eos_token"]) == ("<|bos|>", "<|end|>")


# ---------------------------------------------------------------------------- SentencePiece


def sentencepiece(**changes: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)]]
    pieces = ["▁", "a", "b", "c", "<", "/", "s", ">", "ab", "bc", "▁a", "</", "s>"]
    document = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + pieces,
        "tokenizer.ggml.scores": [0.0] * len(tokens) + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return document | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes() -> None:
    tokenizer = rebuilt(sentencepiece())
    assert tokenizer.encode("abc").tokens == ["<s>", "▁", "ab", "c"]  # ab scores above bc and ▁a
    assert tokenizer.encode("é", add_special_tokens=False).tokens == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.encode("", add_special_tokens=False).ids == []
    assert tokenizer.decode(tokenizer.encode(" aé\n b").ids) == " aé\n b"
    plain = rebuilt(sentencepiece(add_space_prefix=False))
    assert plain.encode("ab", add_special_tokens=False).tokens == ["ab"]


def test_sentencepiece_text_never_merges_into_a_control_or_byte_token() -> None:
    tokenizer = rebuilt(sentencepiece())
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("</s>", add_special_tokens=False).tokens == ["▁", "</", "s>"]
    tokens = tokenizer.encode("<0x41>", add_special_tokens=False).tokens
    assert (
        "<0x41>" not in tokens
        and tokenizer.decode(tokenizer.encode("<0x41>", add_special_tokens=False).ids) == "<0x41>"
    )


def test_merges_from_scores() -> None:
    merges = merges_from_scores(["a", "b", "c", "ab", "bc", "abc"], [0, 0, 0, -2, -1, -3])
    assert merges == [["b", "c"], ["a", "b"], ["a", "bc"], ["ab", "c"]]


# ---------------------------------------------------------------------------- hostile metadata


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tokens": None}, "tokens' is missing"),
        ({"tokens": []}, "list of strings"),
        ({"tokens": "abc"}, "not an array"),
        ({"token_type": [1]}, "has 1 elements, not 300"),
        ({"token_type": [9] * VOCAB}, "unknown token type 9"),
        ({"merges": None}, "merges' is missing"),
        ({"merges": ["ab"]}, "'ab' is not a merge"),
        ({"merges": [5]}, "not a merge"),
        ({"merges": ["a zzz"]}, "out of vocabulary"),
        ({"bos_token_id": VOCAB}, "bos_token_id 300 is not a token"),
        ({"eos_token_id": -1}, "eos_token_id -1"),
        ({"eos_token_id": "x"}, "eos_token_id 'x'"),
        ({"add_bos_token": 1}, "add_bos_token must be a bool"),
    ],
)
def test_damaged_metadata(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelFormatError, match=match):
        rebuilt(metadata(**changes))


def test_cve_2025_49847_piece_lengths_do_not_wrap() -> None:
    """A vocabulary piece of a length beyond 32 bits of a peer's cast is just a long string here."""
    tokens, _ = vocabulary()
    tokens[299] = "x" * (1 << 20)
    assert rebuilt(metadata(tokens=tokens)).id_to_token(299) == tokens[299]


def test_cve_2025_52566_long_prompts() -> None:
    """A peer compared a signed with an unsigned length in its tokenizer."""
    assert len(rebuilt(metadata()).encode("ab" * 100_000, add_special_tokens=False).ids) == 100_000


def test_more_tokens_than_embeddings() -> None:
    with pytest.raises(ModelFormatError, match="token id 299, the model only 299"):
        rebuilt(metadata(), VOCAB - 1)


def test_duplicate_tokens_are_named() -> None:
    tokens, _ = vocabulary()
    tokens[299] = tokens[298]
    with pytest.raises(UnsupportedModelError, match="occurs twice"):
        rebuilt(metadata(tokens=tokens))


def test_other_tokenizer_models_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match="tokenizer 'bert'"):
        rebuilt(metadata(model="bert"))


def test_chat_template_must_be_text() -> None:
    source = metadata() | {"tokenizer.chat_template": 5}
    with pytest.raises(ModelFormatError, match="chat_template"):
        rebuilt(source)


@pytest.mark.parametrize("piece", ["a b", "ab"])
def test_compacting_keeps_the_tokenizer(piece: str) -> None:
    """Merges become strings only where a space cannot be mistaken for the border between two pieces."""
    vocab = {token: i for i, token in enumerate([*"abcd ", "ab", "a b", "cd", f"{piece}cd"])}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["c", "d"], ["a ", "b"], [piece, "cd"]]}
    vocab["a "] = len(vocab)
    if piece == "ab":
        del model["merges"][2]
    text = json.dumps({"version": "1.0", "added_tokens": [], "model": model}, indent=2).encode()
    compact = compact_tokenizer_json(text)
    assert len(compact) < len(text)
    assert isinstance(json.loads(compact)["model"]["merges"][0], str) is (piece == "ab")
    before, after = tokenizers.Tokenizer.from_buffer(text), tokenizers.Tokenizer.from_buffer(compact)
    for sample in ("abcd", "a bcd", "abab cd", "dcba"):
        assert before.encode(sample).ids == after.encode(sample).ids
