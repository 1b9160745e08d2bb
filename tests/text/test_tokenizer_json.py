"""tokenizer.json from strangers: what is no tokenizer, and what would not come back, is refused when it is opened."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.small_tokenizers import byte_level, metaspace, sentencepiece_bpe, unigram
from tokenizers import Tokenizer as Library
from tokenizers.processors import TemplateProcessing

from pyengine.errors import InvalidArgumentError, ModelFormatError, PyEngineError, UnsupportedModelError
from pyengine.freeze.tokenizer import compact_tokenizer_json
from pyengine.text import tokenizer as tokenizer_module
from pyengine.text.tokenizer import LONG_TEXT, Tokenizer
from pyengine.text.tokenizer_json import MAX_ADDED_TOKENS, MAX_TOKEN, Effect, check

KINDS = {"byte_level": byte_level(), "bpe": sentencepiece_bpe(), "metaspace": metaspace(), "unigram": unigram()}
DOCUMENTS = {kind: json.loads(library.to_str()) for kind, library in KINDS.items()}
BYTE_LEVEL = DOCUMENTS["byte_level"]
SIZE = KINDS["byte_level"].get_vocab_size()
LOADED = Tokenizer(json.dumps(BYTE_LEVEL).encode())


def dumps(document: dict[str, Any], compact: bool = False) -> bytes:
    data = json.dumps(document).encode()
    return compact_tokenizer_json(data) if compact else data


def changed(**parts: Any) -> dict[str, Any]:
    return {**BYTE_LEVEL, **parts}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(pattern: dict[str, str], behavior: str = "Isolated") -> dict[str, Any]:
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}


def normalizers(*parts: Any) -> dict[str, Any]:
    return changed(normalizer={"type": "Sequence", "normalizers": list(parts)})


def pre_tokenizers(*parts: Any) -> dict[str, Any]:
    return changed(pre_tokenizer={"type": "Sequence", "pretokenizers": list(parts)})


def vocabulary(**ids: Any) -> dict[str, Any]:
    return changed(model={**BYTE_LEVEL["model"], "vocab": {**BYTE_LEVEL["model"]["vocab"], **ids}})


def added(**fields: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return changed(added_tokens=[*BYTE_LEVEL["added_tokens"], {"id": 0, "content": "x", **flags, **fields}])


def table(*words: int, text: bytes = b"") -> dict[str, Any]:
    trie = b"".join(word.to_bytes(4, "little") for word in words)
    data = len(trie).to_bytes(4, "little") + trie + text
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


BYTE_LEVEL_PART = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DOUBLING = replace({"String": "a"}, "aa")

HOSTILE = {
    "normalizers that double": normalizers(*[DOUBLING] * 30),
    "a normalizer that inserts": normalizers(replace({"Regex": ""}, "x" * 100_000)),
    "a normalizer that may insert": normalizers(replace({"Regex": "a?"}, "x")),
    "a normalizer that replaces nothing": normalizers(replace({"String": ""}, "x")),
    "a long replacement": normalizers(replace({"String": "a"}, "x" * 1000)),
    "a long prefix": normalizers({"type": "Prepend", "prepend": "x" * 1_000_000}),
    "many prefixes": normalizers(*[{"type": "Prepend", "prepend": "x"}] * 40),
    "a normalizer that backtracks": normalizers(replace({"Regex": "^(([a-z])+.)+[A-Z]([a-z])+$"}, "")),
    "a pattern that backtracks": pre_tokenizers(split({"Regex": "(a+)+b|(a|a)*c"}), BYTE_LEVEL_PART),
    "bytes of bytes of bytes": pre_tokenizers(*[BYTE_LEVEL_PART] * 40),
    "many metaspaces": pre_tokenizers(*[{"type": "Metaspace", "replacement": c, "prepend_scheme": "always"} for c in "_▁"]),
    "many components": normalizers(*[{"type": "NFC"}] * 100),
    "deep components": changed(normalizer=json.loads('{"type":"Sequence","normalizers":[' * 50 + ']}' * 50)),
    "a table of rubbish": normalizers({"type": "Precompiled", "precompiled_charsmap": "////////"}),
    "a table too short": normalizers({"type": "Precompiled", "precompiled_charsmap": "BAA="}),
    "a table that is no table": normalizers({"type": "Precompiled", "precompiled_charsmap": "\x00"}),
    "a table that lengthens": normalizers(table(0, text=b"x" * 10_000 + b"\0")),
    "pieces of no length": changed(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "an id beyond the model": vocabulary(new=SIZE),
    "an id far beyond": vocabulary(new=2**32 - 1),
    "an id that is no id": vocabulary(new=2**70),
    "a negative id": vocabulary(new=-1),
    "an id that is a number": vocabulary(new=1.5),
    "an added id beyond the model": added(id=4_000_000_000, content="zz"),
    "an added token without text": added(content=""),
    "an added token that is long": added(content="x" * (MAX_TOKEN + 1)),
    "added tokens that are none": changed(added_tokens={"a": 1}),
    "too many added tokens": changed(added_tokens=[None] * (MAX_ADDED_TOKENS + 1)),
    "words in pieces": changed(model={"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"a": 0}}),
    "affixes": changed(model={**BYTE_LEVEL["model"], "end_of_word_suffix": "</w>"}),
    "a decoder of two spaces": changed(decoder={"type": "Metaspace", "replacement": 5}),
    "a decoder without a pattern": changed(decoder={"type": "Replace", "pattern": 5, "content": " "}),
    "a decoder of decoders of nothing": changed(decoder={"type": "Sequence", "decoders": [5]}),
    "an unknown post-processor": changed(post_processor={"type": "Python"}),
    "an unknown component": normalizers({"type": "Python", "code": "1"}),
    "a component without a type": normalizers({}),
    "unigram without a vocabulary": changed(model={"type": "Unigram", "unk_id": 5, "vocab": []}),
    "unigram's unknown token beyond it": changed(model={"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]]}),
}  # fmt: skip


@pytest.mark.parametrize("compact", [False, True], ids=["plain", "as frozen"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_when_opened(name, compact):
    with pytest.raises((ModelFormatError, UnsupportedModelError), match=r"tokenizer|[Ii]d|added token"):
        Tokenizer(dumps(HOSTILE[name], compact), vocab_size=SIZE)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"5",
        b"null",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"model":5}',
        b'{"model":{"vocab":5}}',
        b'{"a":' * 5000,
    ],
)
def test_what_is_no_json_object_is_refused(data):
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        check(data)


def test_the_library_is_asked_what_it_read():
    """A second key of the same name, behind the vocabulary, is the one that counts; it is not parsed before loading."""
    frozen = compact_tokenizer_json(dumps(BYTE_LEVEL))
    for parts in (
        {"pre_tokenizer": split({"Regex": "(a+)+b"})},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
    ):
        twice = frozen[:-1] + b"," + json.dumps(parts).encode()[1:]
        assert isinstance(json.loads(twice), dict)
        with pytest.raises((ModelFormatError, UnsupportedModelError)):
            Tokenizer(twice)
    # Loading runs the normalizer over added tokens: it must have been seen before, however its name is spelled.
    bomb = json.dumps({"type": "Sequence", "normalizers": [DOUBLING] * 60}).encode()
    for name in (b'"normalizer"', b'"n\\u006frmalizer"', b'"\\u006Eormalizer"'):
        with pytest.raises(UnsupportedModelError, match="may become"):
            Tokenizer(frozen[:-1] + b"," + name + b":" + bomb + b"}")


def test_a_file_as_frozen_is_not_parsed_twice(monkeypatch):
    """Parsing the vocabulary again would be a tenth of the start."""
    parsed = []
    loads = json.loads

    def counting(text, *args, **kwargs):
        parsed.append(len(text))
        return loads(text, *args, **kwargs)

    frozen = compact_tokenizer_json(dumps(BYTE_LEVEL))
    monkeypatch.setattr("json.loads", counting)
    assert Tokenizer(frozen, vocab_size=SIZE).vocab_size == SIZE
    assert max(parsed) < len(frozen) - len(json.dumps(BYTE_LEVEL["model"]["vocab"])) // 2


def test_quotation_marks_in_tokens_are_no_ids():
    tokens = {'":99999,': SIZE, "\\": SIZE + 1, '\\":99999': SIZE + 2, '"}': SIZE + 3, "normalizer": SIZE + 4}
    for compact in (False, True):
        Tokenizer(dumps(vocabulary(**tokens), compact), vocab_size=SIZE + 5)
        with pytest.raises(ModelFormatError, match=f"token id {SIZE + 4}"):
            Tokenizer(dumps(vocabulary(**tokens), compact), vocab_size=SIZE + 4)


@settings(max_examples=300, deadline=None)
@given(n=st.integers(0, 10**6), ids=st.lists(st.integers(0, 10**6), max_size=20))
def test_every_id_beyond_the_model_is_found(n, ids):
    vocab = {f"t{index}": id_ for index, id_ in enumerate(ids)}
    data = json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": []}}, separators=(",", ":")).encode()
    if max(ids, default=-1) < n:
        check(data, n)
    else:
        with pytest.raises(ModelFormatError, match="token id"):
            check(data, n)


def test_an_id_that_only_the_library_saw_is_refused_when_it_comes():
    """Blanks that a frozen file does not have hide an id from the look at its opening."""
    data = dumps(vocabulary(), compact=True)
    z = BYTE_LEVEL["model"]["vocab"]["z"]
    tokenizer = Tokenizer(data.replace(b'"z":%d' % z, b'"z": 5000'), vocab_size=5000)
    assert tokenizer.encode("a")
    with pytest.raises(ModelFormatError, match="token id 5000"):
        tokenizer.encode("z")


@pytest.mark.parametrize(
    "single", [[{"Sequence": {"id": "B", "type_id": 0}}], [{"SpecialToken": {"id": "nope", "type_id": 0}}]]
)
def test_post_processors_are_read_and_never_run(single):
    post = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    tokenizer = Tokenizer(dumps(changed(post_processor=post)), {"bos_token": "<s>"})
    assert tokenizer.encode("hi") == tokenizer.encode("hi", add_bos=False) == LOADED.encode("hi", add_bos=False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_id_is_what_the_post_processor_adds(kind):
    library = KINDS[kind]
    assert check(dumps(DOCUMENTS[kind])).first_id == library.encode("").ids[0]
    nested = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, DOCUMENTS[kind]["post_processor"]]}
    assert check(dumps({**DOCUMENTS[kind], "post_processor": nested})).first_id == library.encode("").ids[0]
    roberta = {
        "type": "RobertaProcessing",
        "cls": ["<s>", 7],
        "sep": ["</s>", 8],
        "trim_offsets": True,
        "add_prefix_space": True,
    }
    account = check(dumps({**DOCUMENTS[kind], "post_processor": roberta}))
    assert (account.first_id, account.last_id) == (7, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("single", ["$A </s>", "<s> $A </s>", "<s> $A", "$A"])
def test_the_last_id_is_what_the_post_processor_puts_behind_a_text(kind, single):
    library = Library.from_str(KINDS[kind].to_str())
    ids = [(token, library.token_to_id(token)) for token in ("<s>", "</s>")]
    library.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    wanted = library.encode("a").ids[-1] if single.endswith("</s>") else None
    data = library.to_str().encode()
    assert check(data).last_id == wanted and Tokenizer(data).end_id == wanted


def test_dropout_is_switched_off():
    model = {**BYTE_LEVEL["model"], "dropout": 0.9}
    tokenizer, plain = Tokenizer(dumps(changed(model=model))), Tokenizer(dumps(BYTE_LEVEL))
    assert {tuple(tokenizer.encode("the quick brown fox")) for _ in range(20)} == {
        tuple(plain.encode("the quick brown fox"))
    }


def test_a_token_that_is_long_is_refused_when_it_is_written():
    tokenizer = Tokenizer(dumps(vocabulary(**{"x" * (MAX_TOKEN + 1): 5000})))
    with pytest.raises(ModelFormatError, match="token 5000"):
        tokenizer.decode([5000])


# -------------------------------------------------------------------- what the library cannot do


def test_panics_of_the_library_are_errors_of_the_model(monkeypatch):
    class PanicException(BaseException):
        """As the library's, which cannot be imported."""

    def panic(*_: Any, **__: Any) -> None:
        raise PanicException("index out of bounds")

    with pytest.raises(ModelFormatError, match="index out of bounds"):
        tokenizer_module._library(panic)
    for other in (KeyboardInterrupt, MemoryError):

        def fail(other: type[BaseException] = other) -> None:
            raise other

        with pytest.raises(other):
            tokenizer_module._library(fail)


def test_a_real_panic(capfd):
    """A table whose trie points outside of itself: the library looks there when it normalizes."""
    hostile = changed(normalizer=table(0xFFFFFFFF, text=b"x\0"))
    with pytest.raises(ModelFormatError, match="gave up"):
        Tokenizer(dumps(hostile)).encode("hello")
    assert "panicked" in capfd.readouterr().err  # the library says so on stderr; nothing can be done about that


def test_text_with_the_id_of_a_special_token():
    tokenizer = Tokenizer(dumps(vocabulary(q=1)))
    assert tokenizer.encode("a") and tokenizer.special_ids >= {1}
    with pytest.raises(ModelFormatError, match="special token"):
        tokenizer.encode("q")


def test_what_cannot_be_spelled_may_be_a_special_token():
    """As <unk> is in most vocabularies."""
    for kind in ("bpe", "unigram"):
        model = {**DOCUMENTS[kind]["model"], "byte_fallback": False}
        tokenizer = Tokenizer(dumps({**DOCUMENTS[kind], "model": model}))
        unknown = tokenizer.special_tokens["<unk>"]
        assert tokenizer.encode("☃", add_bos=False)[-1] == unknown


def test_a_character_that_the_model_cannot_write():
    model = {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]}
    data = dumps({**DOCUMENTS["unigram"], "model": model, "added_tokens": []})
    with pytest.raises(ModelFormatError, match="unk_id"):
        Tokenizer(data).encode("hi")


# -------------------------------------------------------------------- bounds


@pytest.mark.parametrize(
    "parts, effect",
    [
        ({}, Effect(1, False)),
        ({"normalizer": replace({"String": " "}, "▁")}, Effect(1, False)),
        ({"normalizer": replace({"String": "▁"}, " ")}, Effect(3, False)),
        ({"normalizer": replace({"String": "a"}, "")}, Effect(None, False)),
        ({"normalizer": replace({"Regex": " {2,}"}, " ")}, Effect(None, False)),
        ({"normalizer": {"type": "NFC"}}, Effect(12, False)),
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, Effect(None, False)),
        ({"pre_tokenizer": split({"String": "a"}, "Removed")}, Effect(None, False)),
        ({"pre_tokenizer": split({"Regex": r"\s+$"})}, Effect(1, True)),
    ],
)
def test_what_components_do_to_a_text(parts, effect):
    assert check(dumps(changed(**parts))).effect == effect
    Tokenizer(dumps(changed(**parts)))  # the library's account of itself says the same


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_stands_for_more_bytes_than_said(kind):
    tokenizer, rng = Tokenizer(dumps(DOCUMENTS[kind])), random.Random(3)
    assert tokenizer.least_tokens("a" * 1000) >= 20
    for _ in range(200):
        text = "".join(
            rng.choices(["the", " ", "world", "é", "😀", "<|im_start|>", "▁", "quick "], k=rng.randrange(40))
        )
        assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text, add_bos=False, parse_special=True))


def test_where_characters_can_disappear_nothing_is_said():
    vocab = dict(DOCUMENTS["bpe"]["model"]["vocab"])
    del vocab["<0x41>"]
    for document in (
        {**DOCUMENTS["bpe"], "model": {**DOCUMENTS["bpe"]["model"], "vocab": vocab}},
        changed(normalizer={"type": "StripAccents"}),
        added(content="<sep>", lstrip=True),
    ):
        assert Tokenizer(dumps(document)).least_tokens("a" * 1000) == 0


def test_bytes_that_no_token_spells_are_not_counted():
    """As in SmolLM2, whose training text had no control characters: they disappear."""
    vocab = dict(BYTE_LEVEL["model"]["vocab"])
    del vocab["Ą"]  # byte 4
    tokenizer = Tokenizer(dumps(changed(model={**BYTE_LEVEL["model"], "vocab": vocab})))
    assert tokenizer.encode("\4" * 1000) == [] and tokenizer.least_tokens("\4" * 1000) == 0
    assert tokenizer.least_tokens("\4" * 1000 + "a" * 1000) == tokenizer.least_tokens("a" * 1000) > 20
    text = "\4" * 1000 + "red " * 1000
    beginning = tokenizer.beginning_beyond(text, 3)
    assert text.startswith(beginning) and len(beginning) < len(text)
    assert tokenizer.encode(beginning)[:3] == tokenizer.encode(text)[:3]


def test_white_space_that_costs_by_its_square_is_bounded():
    tokenizer = Tokenizer(dumps(pre_tokenizers(split({"Regex": r"\s+$"}), BYTE_LEVEL_PART)))
    assert tokenizer.encode(" " * 1000 + "x")
    with pytest.raises(InvalidArgumentError, match="white space"):
        tokenizer.encode(" " * 100_000 + "x")


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_give_the_same_ids(kind):
    """They take another way through the library."""
    tokenizer, library = Tokenizer(dumps(DOCUMENTS[kind])), KINDS[kind]
    for n in (LONG_TEXT - 1, LONG_TEXT, LONG_TEXT + 1000):
        text = ("The quick brown fox é 😀, and <|im_end|> " * (n // 20))[:n]
        assert (
            tokenizer.encode(text, add_bos=False, parse_special=True)
            == library.encode(text, add_special_tokens=False).ids
        )
        assert tokenizer.special_ids.isdisjoint(tokenizer.encode(text, add_bos=False))


# -------------------------------------------------------------------- anything


def mutate(rng: random.Random, value: Any) -> Any:
    """`value` with one thing in it changed."""
    junk = [
        None,
        True,
        -1,
        2**33,
        1.5,
        "",
        "a" * 50,
        "▁",
        [],
        {},
        ["a"],
        {"type": "NFC"},
        {"String": ""},
        {"Regex": "(a*)*"},
    ]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutate(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        index = rng.randrange(len(value))
        return [*value[:index], mutate(rng, value[index]), *value[index + 1 :]]
    return rng.choice(junk)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_our_errors_comes_out_of_a_damaged_file(kind, capfd):
    rng, refused = random.Random(17), 0
    for _ in range(300):
        document = DOCUMENTS[kind]
        for _ in range(rng.randrange(1, 4)):
            document = mutate(rng, document)
        try:
            tokenizer = Tokenizer(json.dumps(document).encode(), {"bos_token": "<s>"}, vocab_size=1000)
            for special in (False, True):
                tokenizer.decode(tokenizer.encode("a <s> é 😀 b", parse_special=special))
            tokenizer.decode(range(300))
        except PyEngineError:
            refused += 1
    assert 50 < refused < 300
