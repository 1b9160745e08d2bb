"""Prompts around a hole: each family's published format, told by the `tokenizers` library; text stays text."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from reference.small_tokenizers import byte_level, metaspace, sentencepiece_bpe
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from pyengine.errors import ContextFullError, InvalidArgumentError
from pyengine.text.infill import FAMILIES, Hole, Infill
from pyengine.text.tokenizer import Tokenizer

QWEN = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]
STARCODER2 = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<repo_name>", "<file_sep>"]
GRANITE = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<filename>", "<reponame>"]
CODEGEMMA = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_separator|>"]
SANTACODER = ["<fim-prefix>", "<fim-middle>", "<fim-suffix>", "<fim-pad>"]
DEEPSEEK = ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"]
SEED = ["<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>"]
CODELLAMA = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
CODESTRAL = ["[PREFIX]", "[SUFFIX]", "[MIDDLE]"]

PREFIX, SUFFIX = "def f(a,  b):\n    return ", "\n\nprint( f(1, 2) )\n"


def library_of(kind: Any, tokens: list[str], *, special: bool = True) -> Library:
    library: Library = kind()
    added = [AddedToken(token, special=special, normalized=False) for token in tokens]
    (library.add_special_tokens if special else library.add_tokens)(added)
    return library


def infill_of(library: Library, *, add_bos: bool = False) -> tuple[Tokenizer, Infill]:
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": add_bos}
    tokenizer = Tokenizer(library.to_str().encode(), config)
    return tokenizer, Infill(tokenizer, "coder.safetensors")


def asked(library: Library, hole: Hole, *, add_bos: bool = False) -> list[int]:
    return infill_of(library, add_bos=add_bos)[1].ids(hole, 4096)


def ids_of(library: Library, text: str) -> list[int]:
    ids: list[int] = library.encode(text, add_special_tokens=False).ids
    return ids


# -------------------------------------------------------------------- formats, of byte-level vocabularies: one string


@pytest.mark.parametrize(
    ("tokens", "special", "wanted"),
    [
        (QWEN, False, "<|fim_prefix|>{p}<|fim_suffix|>{s}<|fim_middle|>"),  # as its tokenizer.json has them: not special
        (QWEN, True, "<|fim_prefix|>{p}<|fim_suffix|>{s}<|fim_middle|>"),
        (CODEGEMMA, True, "<|fim_prefix|>{p}<|fim_suffix|>{s}<|fim_middle|>"),
        (STARCODER2, True, "<fim_prefix>{p}<fim_suffix>{s}<fim_middle>"),
        (GRANITE, True, "<fim_prefix>{p}<fim_suffix>{s}<fim_middle>"),
        (SANTACODER, True, "<fim-prefix>{p}<fim-suffix>{s}<fim-middle>"),
        (DEEPSEEK, False, "<｜fim▁begin｜>{p}<｜fim▁hole｜>{s}<｜fim▁end｜>"),
        (SEED, True, "<[fim-suffix]>{s}<[fim-prefix]>{p}<[fim-middle]>"),
        (CODESTRAL, True, "[SUFFIX]{s}[PREFIX]{p}"),
    ],
)
@pytest.mark.parametrize("add_bos", [False, True])
def test_a_hole_is_asked_for_as_the_models_authors_say(tokens: list[str], special: bool, wanted: str, add_bos: bool) -> None:
    library = library_of(byte_level, tokens, special=special)
    text = ("<s>" if add_bos else "") + wanted.format(p=PREFIX, s=SUFFIX)
    assert asked(library, Hole(PREFIX, SUFFIX), add_bos=add_bos) == ids_of(library, text)
    assert asked(library, Hole("", ""), add_bos=add_bos) == ids_of(library, text.replace(PREFIX, "").replace(SUFFIX, ""))


FILES = [("util.py", "def g(): pass\n"), ("a/b.py", "x = 1")]


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        (
            QWEN,
            "<|repo_name|>shapes\n<|file_sep|>util.py\ndef g(): pass\n<|file_sep|>a/b.py\nx = 1\n<|file_sep|>main.py\n"
            "<|fim_prefix|>{p}<|fim_suffix|>{s}<|fim_middle|>",
        ),
        (
            STARCODER2,
            "<repo_name>shapes<file_sep>util.py\ndef g(): pass\n<file_sep>a/b.py\nx = 1<file_sep>"
            "<fim_prefix>main.py\n{p}<fim_suffix>{s}<fim_middle>",
        ),
        (
            GRANITE,
            "<reponame>shapes<filename>util.py\ndef g(): pass\n<filename>a/b.py\nx = 1<filename>"
            "<fim_prefix>main.py\n{p}<fim_suffix>{s}<fim_middle>",
        ),
        (DEEPSEEK, "<｜fim▁begin｜>util.py\ndef g(): pass\na/b.py\nx = 1\nmain.py\n{p}<｜fim▁hole｜>{s}<｜fim▁end｜>"),
        (CODESTRAL, "[SUFFIX]{s}[PREFIX]util.py\ndef g(): pass\na/b.py\nx = 1\nmain.py\n{p}"),
    ],
)
def test_other_files_and_names_come_first(tokens: list[str], wanted: str) -> None:
    library = library_of(byte_level, tokens)
    hole = Hole(PREFIX, SUFFIX, FILES, "main.py", "shapes")
    ids, text = asked(library, hole), wanted.format(p=PREFIX, s=SUFFIX)
    # each text between two of the tokens by itself: the library cuts there, too
    assert library.decode(ids, skip_special_tokens=False) == library.decode(ids_of(library, text), skip_special_tokens=False)
    marks = {library.token_to_id(token) for token in tokens}
    assert [id_ for id_ in ids if id_ in marks] == [id_ for id_ in ids_of(library, text) if id_ in marks]


def test_a_name_that_a_model_has_no_token_for_is_left_out() -> None:
    for tokens in (CODEGEMMA, DEEPSEEK, CODESTRAL):
        library = library_of(byte_level, tokens)
        assert asked(library, Hole(PREFIX, SUFFIX, repository="shapes")) == asked(library, Hole(PREFIX, SUFFIX))


# -------------------------------------------------------------------- formats, of vocabularies that put a space before a text


@pytest.mark.parametrize("kind", [sentencepiece_bpe, metaspace])
@pytest.mark.parametrize(("tokens", "suffix_first"), [(CODELLAMA, False), (CODESTRAL, True)])
def test_a_suffix_goes_on_without_the_space_that_a_text_begins_with(kind: Any, tokens: list[str], suffix_first: bool) -> None:
    """As the reference code of both has it: the suffix is encoded behind a sign, which is then taken away."""
    library = library_of(kind, tokens)
    sign = ids_of(library, "☺")
    mark = {token: library.token_to_id(token) for token in tokens}
    for prefix, suffix in ((PREFIX, SUFFIX), ("the", "the world"), ("the", " the"), ("", "")):
        behind = ids_of(library, "☺" + suffix)
        assert behind[: len(sign)] == sign
        before = ids_of(library, prefix)
        if suffix_first:
            wanted = [mark["[SUFFIX]"], *behind[len(sign) :], mark["[PREFIX]"], *before]
        else:
            wanted = [mark["▁<PRE>"], *before, mark["▁<SUF>"], *behind[len(sign) :], mark["▁<MID>"]]
        assert asked(library, Hole(prefix, suffix), add_bos=True) == [library.token_to_id("<s>"), *wanted]
    assert asked(library, Hole("x", "the")) != asked(library, Hole("x", " the"))


# -------------------------------------------------------------------- text is text


@pytest.mark.parametrize(
    ("kind", "tokens", "order"),
    [
        (byte_level, QWEN, ["<|file_sep|>", "<|file_sep|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]),
        (byte_level, DEEPSEEK, DEEPSEEK), (byte_level, CODESTRAL, ["[SUFFIX]", "[PREFIX]"]),
        (sentencepiece_bpe, CODELLAMA, CODELLAMA[:3]), (metaspace, CODESTRAL, ["[SUFFIX]", "[PREFIX]"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("special", [False, True])
def test_no_token_comes_of_what_a_text_spells(kind: Any, tokens: list[str], order: list[str], special: bool) -> None:
    library = library_of(kind, tokens, special=special)
    tokenizer, infill = infill_of(library, add_bos=True)
    spellings = [*(token.replace("▁", " ") if kind is not byte_level else token for token in tokens), "<s>", "<|im_end|>"]
    rng = random.Random(7)
    for _ in range(60):
        prefix, suffix, name, text = ("".join(rng.choices([*spellings, "a", " ", "\n", "the"], k=6)) for _ in range(4))
        ids = infill.ids(Hole(prefix, suffix, [(name, text)], name), 4096)
        marks = [id_ for id_ in ids if id_ in tokenizer.special_ids.union(infill.end_ids)]
        assert marks == [library.token_to_id(token) for token in ("<s>", *order)]
        said = tokenizer.decode([id_ for id_ in ids if id_ not in marks], skip_special_tokens=False, continuation=True)
        assert prefix in said and suffix in said and text in said


def test_a_token_that_merges_make_is_no_text_either() -> None:
    """Converters may leave the tokens among the ordinary ones, where they have merges like any word."""
    document = json.loads(byte_level().to_str())
    model = document["model"]
    spellings = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    merges = [[spelling[: end - 1], spelling[end - 1]] for spelling in spellings for end in range(2, len(spelling) + 1)]
    for left, right in merges:
        model["vocab"].setdefault(left + right, len(model["vocab"]) + 100)
    model["merges"] = [*map(list, dict.fromkeys(map(tuple, [*merges, *model["merges"]])))]
    document["pre_tokenizer"]["use_regex"] = False
    tokenizer = Tokenizer(json.dumps(document).encode(), {"eos_token": "</s>"})
    marks = [tokenizer.token_id(spelling) for spelling in spellings]
    assert tokenizer.encode("<fim_prefix>") == marks[:1]
    ids = Infill(tokenizer, "coder").ids(Hole("<fim_prefix>", "a<fim_middle>"), 4096)
    assert [id_ for id_ in ids if id_ in marks] == marks
    assert tokenizer.decode([id_ for id_ in ids if id_ not in marks]) == "<fim_prefix>a<fim_middle>"


def test_ordinary_text_is_encoded_as_it_always_was() -> None:
    """What keeps tokens out of the texts around a hole does not reach other prompts."""
    library = library_of(byte_level, QWEN, special=False)
    tokenizer, infill = infill_of(library)
    texts = ["<|fim_prefix|>a<|fim_middle|>", "<s><|file_sep|> b", PREFIX]
    before = [tokenizer.encode(text) for text in texts]
    infill.ids(Hole("<s><|fim_prefix|>", "<|fim_pad|>"), 100)
    assert [tokenizer.encode(text) for text in texts] == before
    assert tokenizer.token_id("<|fim_prefix|>") in before[0]


# -------------------------------------------------------------------- ends, refusals


def test_every_token_of_the_format_ends_a_filling() -> None:
    for tokens in (QWEN, STARCODER2, GRANITE, CODEGEMMA, DEEPSEEK, SEED, CODELLAMA, CODESTRAL):
        library = library_of(byte_level, tokens)
        assert set(infill_of(library)[1].end_ids) == {library.token_to_id(token) for token in tokens}


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], "has no tokens that mark a prefix and a suffix"),
        (["<repo_name>", "<file_sep>"], "has no tokens that mark a prefix and a suffix"),  # SmolLM2
        (["<fim_prefix>", "<fim_suffix>"], "has <fim_prefix>, <fim_suffix>, but not <fim_middle>"),
        (["[PREFIX]"], r"has \[PREFIX\], but not \[SUFFIX\]"),
    ],
)
def test_a_tokenizer_without_the_tokens_is_refused_with_what_is_missing(tokens: list[str], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"coder.safetensors does not fill in the middle: its tokenizer {words}"):
        infill_of(library_of(byte_level, tokens))


@pytest.mark.parametrize(
    "hole",
    [
        {"prefix": 5}, {"suffix": b"x"}, {"suffix": None}, {"filename": 1}, {"repository": []}, {"files": "ab"}, {"files": 5},
        {"files": ["ab"]}, {"files": [("a",)]}, {"files": [("a", 1)]}, {"files": {"a": "b"}},
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_by_its_name(hole: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(hole))):
        Hole(**{"prefix": "", "suffix": "", **hole})


def test_what_does_not_fit_is_refused_with_both_numbers() -> None:
    _, infill = infill_of(library_of(byte_level, QWEN))
    ids = infill.ids(Hole(PREFIX, SUFFIX), 4096)
    assert infill.ids(Hole(PREFIX, SUFFIX), len(ids)) == ids
    with pytest.raises(ContextFullError, match=f"{len(ids)} tokens, the context holds {len(ids) - 1}"):
        infill.ids(Hole(PREFIX, SUFFIX), len(ids) - 1)
    with pytest.raises(ContextFullError, match="at least"):  # before it is tokenized
        infill.ids(Hole("", "", [("a", "x" * 10_000_000)]), 64)


def test_families_do_not_share_their_first_token() -> None:
    assert len({family.prefix for family in FAMILIES}) == len(FAMILIES)
