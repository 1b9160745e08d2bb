"""What is a prompt and what is not, before any work is done on it."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.small_tokenizers import byte_level

import pyengine
from pyengine.errors import ContextFullError, InvalidArgumentError, TemplateError
from pyengine.text.messages import MAX_SIZE, plain_data, plain_messages
from pyengine.text.prompts import check_length, is_batch, prompt_ids, token_ids
from pyengine.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(byte_level().to_str().encode(), {"bos_token": "<s>"})
IDS = [5, 6, 7]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[pyengine.Engine]:
    with pyengine.Engine(tiny_model, n_threads=1) as opened:
        yield opened


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize(
    "prompt",
    [IDS, tuple(IDS), range(5, 8), np.array(IDS), np.array(IDS, np.uint8), list(np.array(IDS)), array("i", IDS)],
)
def test_integers_of_any_kind_are_ids(prompt, engine):
    assert token_ids(prompt, 100) == IDS and not is_batch(prompt)
    want = engine.generate(IDS, max_tokens=3).tokens
    assert engine.generate(prompt, max_tokens=3).tokens == want
    assert [piece.token for piece in engine.stream(prompt, max_tokens=3)] == want
    assert engine.score(prompt).tokens == IDS
    assert (engine.logits(prompt) == engine.logits(IDS)).all()


NO_PROMPTS: list[Any] = [
    b"abc", bytearray(b"abc"), memoryview(b"abc"), ["1", "2"], [1.9, 2.7], [1, 2.0], [True, False], [1, None], [None],
    [[1], None],
    {1: 2}, {1, 2}, None, 5, 1.5, True, object(), iter([1]), [-1], [10**30], [1, float("nan")], np.array([1.5]),
    np.array(5),
    np.array([True]), np.array(["1"]), [[1, 2], [3]], [], (), np.array([], int), [[]], Exception,
]  # fmt: skip


BATCHES = {repr(prompt) for prompt in (["1", "2"], np.array(["1"]), [[1, 2], [3]])}


@pytest.mark.parametrize("prompt", NO_PROMPTS, ids=repr)
def test_other_values_are_refused(prompt, engine):
    """By every way in; a list of prompts is one for `generate` alone."""
    for use in (lambda p: list(engine.stream(p, max_tokens=1)), engine.score, engine.logits):
        with pytest.raises(InvalidArgumentError):
            use(prompt)
    with pytest.raises(InvalidArgumentError):
        prompt_ids(lambda: TOKENIZER, prompt, vocab_size=100, n_ctx=100)
    if repr(prompt) not in BATCHES:
        with pytest.raises(InvalidArgumentError):
            engine.generate(prompt, max_tokens=1)


def test_batches(engine):
    assert [r.tokens for r in engine.generate([IDS, np.array([8, 9])], max_tokens=2)] == [
        engine.generate(IDS, max_tokens=2).tokens, engine.generate([8, 9], max_tokens=2).tokens,
    ]  # fmt: skip
    assert len(engine.generate(np.array([[1, 2], [3, 4], [5, 6]]), max_tokens=1)) == 3
    assert len(engine.generate(["1", "2"], max_tokens=1)) == 2
    for mixed in (["a", [1]], [[1], "a"]):
        assert len(engine.generate(mixed, max_tokens=1)) == 2


def test_detokenize_takes_ids_only(engine):
    assert (
        engine.detokenize(engine.tokenize("hello")) == "hello" == engine.detokenize(np.array(engine.tokenize("hello")))
    )
    for bad in ([-1], [engine.vocab_size], [10**30], [1.5], ["1"], b"a", "a"):
        with pytest.raises(InvalidArgumentError):
            engine.detokenize(bad)


def test_an_empty_text_needs_a_first_token():
    bare = Tokenizer(json.dumps(json.loads(byte_level().to_str()) | {"post_processor": None}).encode())
    with pytest.raises(InvalidArgumentError, match="empty"):
        prompt_ids(lambda: bare, "", vocab_size=500, n_ctx=10)
    assert prompt_ids(lambda: TOKENIZER, "", vocab_size=500, n_ctx=10) == [0]


# ---------------------------------------------------------------- length


def test_a_text_that_cannot_fit_is_not_tokenized(monkeypatch):
    n_ctx, n = 10, 1000
    with pytest.raises(ContextFullError, match=r"the prompt has \d+ tokens, the context holds 10"):
        prompt_ids(lambda: TOKENIZER, "ab" * 20, vocab_size=500, n_ctx=n_ctx)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("tokenized")

    monkeypatch.setattr(Tokenizer, "encode", refuse)
    with pytest.raises(ContextFullError, match=r"1000 characters, which are at least \d+ tokens; the context holds 10"):
        prompt_ids(lambda: TOKENIZER, "a" * n, vocab_size=500, n_ctx=n_ctx)
    assert 2 * TOKENIZER.least_tokens("a" * n) == TOKENIZER.least_tokens("é" * n) > n_ctx
    check_length(TOKENIZER, "a" * n, TOKENIZER.least_tokens("a" * n))
    with pytest.raises(ContextFullError, match="at least"):
        check_length(TOKENIZER, "a" * n, TOKENIZER.least_tokens("a" * n) - 1)


def test_long_texts_are_refused_by_every_way_in(engine, monkeypatch):
    text = "hello " * engine.n_ctx * 100
    monkeypatch.setattr("pyengine.text.tokenizer.Tokenizer._ids", None)
    for use in (
        lambda: engine.generate(text), lambda: engine.generate(["a" * len(text), "b"]), lambda: list(engine.stream(text)),
        lambda: engine.score(text),
    ):  # fmt: skip
        with pytest.raises(ContextFullError, match="at least"):
            use()


# ---------------------------------------------------------------- messages


def test_content_in_parts_is_its_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert plain_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "a\nb"}]
    assert plain_messages(({"role": "user", "content": tuple(parts[:1])},)) == [{"role": "user", "content": "a"}]
    assert plain_messages([{"role": "assistant", "content": None, "tool_calls": []}])[0]["content"] is None
    assert plain_messages([{"role": "assistant"}]) == [{"role": "assistant"}]
    assert plain_messages([{"role": "tool", "content": {"a": np.int64(1), "b": (1, np.float32(0.5))}}])[0]["content"] == {
        "a": 1, "b": [1, 0.5],
    }  # fmt: skip


@pytest.mark.parametrize(
    "content, match",
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "'image_url'"),
        ([{"type": "text", "text": "a"}, {"type": "input_audio"}], "'input_audio'"),
        ([{"type": "text"}], "'text'"),
        ([{"type": "text", "text": b"a"}], "'text'"),
        ([{}], "None"),
        (["a"], "part"),
        (5, "content"),
        (b"a", "content"),
        ([[]], "part"),
    ],
)
def test_other_parts_are_refused_by_name(content, match):
    with pytest.raises(InvalidArgumentError, match=match):
        plain_messages([{"role": "user", "content": content}])


def test_data_is_copied():
    given = {"a": [1, {"b": "c"}]}
    copy = plain_data(given, "x")
    assert copy == given and copy is not given and copy["a"] is not given["a"]
    with pytest.raises(InvalidArgumentError, match="more than"):
        plain_data(["a" * (MAX_SIZE // 2)] * 3, "x")
    for number in (float("nan"), float("inf")):
        assert repr(plain_data(number, "x")) == repr(number)


def test_chat_takes_parts_and_refuses_the_rest(tmp_path: Path) -> None:
    from engine import cli_tools

    model = pyengine.freeze(cli_tools.write_talker(tmp_path / "hf", n_ctx=256), tmp_path / "talker.safetensors")
    with pyengine.Engine(model, n_threads=1) as engine:
        text = engine.chat_ids([{"role": "user", "content": "a\nb"}])
        assert engine.chat_ids([{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]) == text
        with pytest.raises(InvalidArgumentError, match="image_url"):
            engine.chat([{"role": "user", "content": [{"type": "image_url"}]}], max_tokens=1)
        with pytest.raises(ContextFullError, match="at least"):
            engine.chat([{"role": "user", "content": "a" * 100_000}], max_tokens=1)
        with pytest.raises(InvalidArgumentError, match="neither text"):
            engine.chat_ids([{"role": "user", "content": "a"}], add_generation_prompt=object())
    with pytest.raises(TemplateError, match="UTF-8"):
        pyengine.text.chat.ChatTemplate(b"\xff")
