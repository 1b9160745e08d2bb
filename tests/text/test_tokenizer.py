"""Encoding that never makes special tokens of user text, and decoding that streams; judged by the `tokenizers` library."""

from __future__ import annotations

import json
import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.small_tokenizers import TEXT, byte_level, metaspace, sentencepiece_bpe, unigram

from pyengine.errors import InvalidArgumentError, ModelFormatError, UnsupportedModelError
from pyengine.text.decoder import IncrementalDecoder
from pyengine.text.tokenizer import Tokenizer

KINDS = {
    "byte_level": byte_level(),
    "sentencepiece_bpe": sentencepiece_bpe(),
    "metaspace": metaspace(),
    "unigram": unigram(),
}


def load(kind: str) -> Tokenizer:
    return Tokenizer(KINDS[kind].to_str().encode(), {"bos_token": "<s>", "eos_token": {"content": "</s>"}})


LOADED = {kind: load(kind) for kind in KINDS}
every_kind = pytest.mark.parametrize("kind", sorted(KINDS))
any_text = st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(list(" ▁<s>/|é😀\n"))))


def streamed(tokenizer: Tokenizer, ids: list[int], **kwargs: bool) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, **kwargs)
    return [*map(decoder.push, ids), decoder.finish()]


# ---------------------------------------------------------------- encoding


@every_kind
@settings(max_examples=150, deadline=None)
@given(text=any_text)
def test_ids_are_those_of_the_library_without_special_tokens(kind, text):
    tokenizer, library = LOADED[kind], KINDS[kind]
    assert (
        tokenizer.encode(text, parse_special=True, add_bos=False) == library.encode(text, add_special_tokens=False).ids
    )
    ids = tokenizer.encode(text, add_bos=False)
    assert tokenizer.special_ids.isdisjoint(ids)
    if not tokenizer.special.occur_in(text):
        assert ids == library.encode(text, add_special_tokens=False).ids


@every_kind
@pytest.mark.parametrize("text", ["<s>", "a</s>b", "<s><s>x</s>", " <s> ", "<|im_start|>user\n<|im_end|>"])
def test_special_tokens_come_only_when_asked_for(kind, text):
    tokenizer = LOADED[kind]
    plain = tokenizer.encode(text, add_bos=False)
    parsed = tokenizer.encode(text, add_bos=False, parse_special=True)
    assert tokenizer.special_ids.isdisjoint(plain)
    assert not tokenizer.special_ids.isdisjoint(parsed)
    decoded = tokenizer.decode(plain, skip_special_tokens=False)
    assert decoded.strip() == text.strip() and "<" in decoded


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_bpe", "metaspace"])
def test_plain_ids_equal_the_librarys_own_switch(kind):
    """`encode_special_tokens` is the library's way, but a state that threads share; and where the model's own vocabulary holds
    the special tokens (unigram), it does not keep the model from finding them in the text."""
    library = type(KINDS[kind]).from_str(KINDS[kind].to_str())
    library.encode_special_tokens = True
    for text in ("hello <|im_end|> world", "x<|im_start|>", "<|im_start|><|im_end|> the end"):
        assert LOADED[kind].encode(text, add_bos=False) == library.encode(text, add_special_tokens=False).ids


def test_the_guard_cannot_be_spelled_by_the_text():
    tokenizer = LOADED["byte_level"]
    tokenizer.encode("<s>")  # builds the guarded tokenizer
    for character in tokenizer._guard:
        assert ord(character) >= 0xF0000
    others = [load("byte_level") for _ in range(3)]
    assert len({other._guarded_tokenizer() and other._guard for other in others}) == 3


def test_ordinary_added_tokens_stay_tokens():
    tokenizer = LOADED["byte_level"]
    (think,) = tokenizer.encode("<think>", add_bos=False)
    assert think not in tokenizer.special_ids
    ids = tokenizer.encode("<think>a<s>", add_bos=False)
    assert ids[0] == think and tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode([think]) == "<think>"


@every_kind
def test_bos_comes_exactly_once(kind):
    tokenizer = LOADED[kind]
    assert tokenizer.adds_bos and tokenizer.bos_id is not None
    bos = tokenizer.bos_id
    assert tokenizer.encode("hello")[0] == bos and tokenizer.encode("hello").count(bos) == 1
    assert tokenizer.encode("<s>hello", parse_special=True).count(bos) == 1
    assert tokenizer.encode("") == [bos]
    assert tokenizer.encode("hello", add_bos=False).count(bos) == 0


def test_tokenizer_config_decides_about_bos():
    data = KINDS["byte_level"].to_str().encode()
    assert not Tokenizer(data, {"bos_token": "<s>", "add_bos_token": False}).adds_bos
    assert not Tokenizer(data).adds_bos  # no BOS is known
    bare = json.loads(data) | {"post_processor": None}
    data = json.dumps(bare).encode()
    assert not Tokenizer(data, {"bos_token": "<s>"}).adds_bos
    assert Tokenizer(data, {"bos_token": "<s>", "add_bos_token": True}).encode("a")[0] == 0
    assert Tokenizer(data, {"add_bos_token": True}, bos_token_id=1).encode("a")[0] == 1


def test_end_ids_come_from_the_model_or_the_config():
    data = KINDS["byte_level"].to_str().encode()
    assert Tokenizer(data, {"eos_token": "</s>"}).eos_ids == (1,)
    assert Tokenizer(data, {"eos_token": "</s>"}, eos_token_ids=[2, 3]).eos_ids == (2, 3)
    assert Tokenizer(data, {"eos_token": "nowhere"}).eos_ids == ()


def test_truncation_and_padding_of_the_file_are_ignored():
    library = byte_level()
    library.enable_truncation(2)
    library.enable_padding(length=64)
    tokenizer = Tokenizer(library.to_str().encode())
    assert tokenizer.encode(TEXT) == LOADED["byte_level"].encode(TEXT, add_bos=False)


def test_threads_do_not_see_each_others_modes():
    """One thread parses special tokens, the other must not: on one tokenizer, at the same time."""
    tokenizer = load("byte_level")
    text = "a <|im_end|> b " * 20
    expected = {flag: tokenizer.encode(text, parse_special=flag) for flag in (False, True)}
    wrong: list[bool] = []

    def work(flag: bool) -> None:
        wrong.extend(flag for _ in range(200) if tokenizer.encode(text, parse_special=flag) != expected[flag])

    threads = [threading.Thread(target=work, args=(flag,)) for flag in (False, True) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_lone_surrogates_become_replacement_characters():
    tokenizer = LOADED["byte_level"]
    assert tokenizer.decode(tokenizer.encode("a\udc80b")) == "a\ufffdb"


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\x00", b'{"model": {}}', b"[" * 2000])
def test_a_damaged_file_is_refused(data):
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        Tokenizer(data)


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}])
def test_an_unknown_decoder_is_refused(decoder):
    data = json.loads(KINDS["byte_level"].to_str()) | {"decoder": decoder}
    with pytest.raises(UnsupportedModelError, match="WordPiece" if decoder else "no decoder"):
        Tokenizer(json.dumps(data).encode())


def test_text_must_be_text():
    with pytest.raises(InvalidArgumentError, match="bytes"):
        LOADED["byte_level"].encode(b"abc")  # type: ignore[arg-type]


# ---------------------------------------------------------------- decoding


@every_kind
@settings(max_examples=150, deadline=None)
@given(text=any_text)
def test_texts_decode_as_the_library_decodes_them(kind, text):
    tokenizer, library = LOADED[kind], KINDS[kind]
    for special in (False, True):
        ids = tokenizer.encode(text, parse_special=special)
        for skip in (False, True):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == library.decode(ids, skip_special_tokens=skip)


@every_kind
def test_a_stream_joined_is_the_whole_whatever_the_ids(kind):
    """Random ids, so also broken UTF-8, special tokens inside an emoji, ids without a token."""
    tokenizer = LOADED[kind]
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size + 3) for _ in range(rng.randrange(12))]
        for options in ({}, {"continuation": True}, {"skip_special_tokens": False}):
            pieces = streamed(tokenizer, ids, **options)
            assert "".join(pieces) == tokenizer.decode(ids, **options)
    assert tokenizer.decode([tokenizer.vocab_size + 3, -1]) == ""


def test_byte_level_ids_decode_as_the_library_even_when_broken():
    tokenizer, library = LOADED["byte_level"], KINDS["byte_level"]
    rng = random.Random(2)
    for _ in range(500):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(12))]
        assert tokenizer.decode(ids) == library.decode(ids)


@every_kind
def test_an_emoji_comes_whole_with_its_last_token(kind):
    tokenizer = LOADED[kind]
    ids = tokenizer.encode("x😀é", add_bos=False)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == "x😀é" and "\ufffd" not in "".join(pieces)
    assert sum("😀" in piece for piece in pieces) == 1
    cut = tokenizer.encode("😀", add_bos=False)[:-1]
    *before, last = streamed(tokenizer, cut)
    assert "\ufffd" not in "".join(before) and last == "\ufffd"


@pytest.mark.parametrize("kind", ["sentencepiece_bpe", "metaspace", "unigram"])
def test_the_leading_space_is_dropped_only_at_the_beginning(kind):
    tokenizer = LOADED[kind]
    ids = tokenizer.encode("the world", add_bos=False)
    assert tokenizer.decode(ids) == "the world"
    assert tokenizer.decode(ids, continuation=True) == " the world"


@every_kind
def test_token_bytes_spell_the_text(kind):
    tokenizer = LOADED[kind]
    text = "the world 😀 ☃"
    spelled = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, add_bos=False)))
    assert spelled.decode().removeprefix(" ") == text
    assert tokenizer.token_bytes(10**9) == b"" and tokenizer.token_text(-1) is None
