"""Layers with a window keep their window only, and no byte changes: whatever is computed piece by piece, after a prefix, a wrong
guess or an eviction equals one forward of the whole text, in which every layer has all keys and sees them through its mask."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.freeze_models import freeze_fixture
from engine.scripted_drafts import drafts_of, script
from engine.speculation_tools import always_guess

from pyengine import Engine, _core
from pyengine.cli.info import describe, text_lines
from pyengine.format.kv import PAGE_POSITIONS, UNDO, KvLayout, kv_layout
from pyengine.format.reader import FrozenFile

N_CTX = 2048
# All layers with a window of 16; one layer of three that sees everything, the others 40 positions; the others convolutions of 3.
MODELS = ["mistral_window", "gemma3", "lfm2"]


def text_of(seed: int, n: int) -> list[int]:
    rng = random.Random(seed)
    return [3 + rng.randrange(250) for _ in range(n)]


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return freeze_fixture(request.param, tmp_path_factory.mktemp(request.param), N_CTX)


@pytest.fixture(scope="module")
def file(path: Path) -> Iterator[FrozenFile]:
    with FrozenFile.open(path) as file:
        yield file


@pytest.fixture(scope="module")
def model(file: FrozenFile) -> _core.Model:
    return _core.Model(file.config, file.buffer, file.weights)


def forward(context: _core.Context, sequence: _core.Sequence, tokens: list[int]) -> list[bytes]:
    context.forward(tokens, [sequence] * len(tokens), bytes([1]) * len(tokens))
    return [bytes(context.logits(row)) for row in range(len(tokens))]


def whole(model: _core.Model, tokens: list[int]) -> list[bytes]:
    """Logits of every position, computed in one forward: nothing slides before its end."""
    context = _core.Context(model)
    return forward(context, context.sequence_new(), tokens)


@pytest.mark.parametrize("kv_dtype", ["int8", "f32"])
def test_what_is_held_is_what_is_said(file: FrozenFile, model: _core.Model, kv_dtype: Any) -> None:
    """By the context, by kv_layout for `pyengine info`, and page by page; and every row is right."""
    layout = kv_layout(file.config, kv_dtype)
    context = _core.Context(model, kv_dtype=kv_dtype)
    assert KvLayout.of_stats(context.cache_stats()) == layout and layout.window in (16, 40, 3)
    tokens = text_of(1, 1500)
    expected = forward(context, context.sequence_new(), tokens)
    context = _core.Context(model, kv_dtype=kv_dtype)
    sequence, n, most = context.sequence_new(), 0, 0
    for n_new in [1, 255, 1, 1, 99, 400, 1, 30] * 2:
        n_new = min(n_new, 1500 - n)
        if n_new == 0:
            break
        assert forward(context, sequence, tokens[n : n + n_new]) == expected[n : n + n_new]
        n += n_new
        n_pages = -(-n // PAGE_POSITIONS)
        first = max(0, n + 1 - layout.window - UNDO) // PAGE_POSITIONS
        stats = context.cache_stats()
        assert stats["n_held_bytes"] == n_pages * layout.data_bytes + (n_pages - first) * layout.window_bytes
        most = max(most, stats["n_held_bytes"])
        assert most <= layout.n_bytes(n, 400) < n_pages * layout.page_bytes or n < 4 * PAGE_POSITIONS
    assert n > 1000
    gone = [i for i, layer in enumerate(file.config.layers) if not context.debug_kv_page(sequence, i, 0, 0)]
    assert gone == [i for i, layer in enumerate(file.config.layers) if layer.window]


def test_info_says_what_a_full_context_costs(file: FrozenFile) -> None:
    facts, layout = describe(file, False), kv_layout(file.config)
    assert facts["kv_bytes_full_context"] == layout.n_bytes(N_CTX) < N_CTX * facts["kv_bytes_per_position"]
    assert facts["memory_bytes_full_context"] == facts["weight_bytes"] + facts["kv_bytes_full_context"]
    line = dict(text_lines(facts))["KV cache"]
    assert f"({layout.window_bytes // PAGE_POSITIONS:,} of them kept for a window only)" in line


def test_prefixes_forks_and_truncations(model: _core.Model) -> None:
    """With memory for all of it and for little: what is found may be shorter, and goes on with the same bits."""
    tokens = text_of(2, 1400)
    expected = whole(model, tokens)
    rng = random.Random(3)
    for max_pages in (0, 5):
        context = _core.Context(model)
        context.set_max_pages(max_pages)
        shortened = 0
        for _ in range(30):
            n = rng.randrange(1, 1400)
            sequence = context.sequence_match(tokens[:n], keep=rng.random() < 0.8)
            assert sequence.length <= n
            for change in rng.choices(["fork", "truncate", "append"], k=3):
                asked = rng.randrange(sequence.length + 1)
                if change == "fork":
                    sequence = sequence.fork(asked)
                elif change == "truncate":
                    sequence.truncate(asked)
                else:
                    asked, n_new = sequence.length, min(rng.choice([1, 5, 300]), 1400 - sequence.length)
                    if n_new > 0:
                        assert forward(context, sequence, tokens[asked : asked + n_new]) == expected[asked : asked + n_new]
                    continue
                assert sequence.length <= asked
                shortened += sequence.length < asked
            context.check()
            if sequence.length < 1400:
                assert forward(context, sequence, [tokens[sequence.length]]) == [expected[sequence.length - 1]]
        assert (shortened > 0) == (max_pages > 0)


def test_a_whole_prefix_is_found_again_while_there_is_memory(model: _core.Model) -> None:
    """Also in the middle of a text that has gone on: what has slid out of a window is kept for others until room is wanted."""
    context = _core.Context(model)
    tokens = text_of(4, 1300)
    sequence = context.sequence_match(tokens)
    forward(context, sequence, tokens)
    other = tokens[:600] + text_of(5, 40)
    assert context.match_length(other) == 600
    context.drop_cached()
    assert context.match_length(other) == 0 and context.match_length(tokens) == 1300
    context.check()


def said(results: Any) -> list[tuple[Any, ...]]:
    return [(result.tokens, result.logprobs) for result in results]


def test_generation_in_little_room(path: Path, model: _core.Model) -> None:
    """Batches, samples that share a prompt, streams and guesses, in the least memory that an engine takes."""
    prompts = [text_of(6, 1200), text_of(7, 1500), text_of(6, 1200)[:700] + text_of(8, 60), text_of(9, 3)]
    options: dict[str, Any] = {"max_tokens": 90, "ignore_eos": True, "logprobs": 2}
    with Engine(path, speculative="off") as engine:
        expected = engine.generate(prompts, **options)
        samples = engine.generate([prompts[1]], n=3, temperature=1.0, seed=4, **options)
    for prompt, result in zip(prompts, expected, strict=True):
        rows = whole(model, prompt + result.tokens)[len(prompt) - 1 : -1]
        assert [int(np.frombuffer(row, np.float32).argmax()) for row in rows] == result.tokens
    texts = {(tuple(p), 0): result.tokens for p, result in zip(prompts, expected, strict=True)}
    for draft in (None, drafts_of("mixed", seed=1, vocab_size=263)):
        with Engine(path, max_kv_bytes=1, max_sequences=3) as engine:
            stats = engine.cache_stats()
            assert stats["max_pages"] <= N_CTX // PAGE_POSITIONS  # without windows, one context needs one more
            if draft is not None:
                script(engine, texts, draft)
            for _ in range(2):
                assert said(engine.generate(prompts, **options)) == said(expected)
            assert said(engine.generate([prompts[1]], n=3, temperature=1.0, seed=4, **options)) == said(samples)
            stream = engine.stream(prompts[0], **{**options, "logprobs": None})
            assert next(stream).token == expected[0].tokens[0]
            assert engine.generate(prompts[3], **options).tokens == expected[3].tokens
            del stream
            stats = engine.check_integrity()
            assert stats["n_bytes"] <= stats["max_pages"] * stats["page_bytes"] and stats["n_held_bytes"] == 0


def test_a_draft_model_with_windows(path: Path) -> None:
    """It is cut back by its wrong guesses, past the beginning of a page now and then."""
    prompt = text_of(10, 500)
    options: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True, "temperature": 1.5, "seed": 2}
    with Engine(path, speculative="off") as engine:
        expected = engine.generate(prompt, **options).tokens
    with Engine(path, draft_model=path, max_kv_bytes=1) as engine:
        always_guess(engine.scheduler.speculation, 4)
        result = engine.generate(prompt, speculative={"store": False}, **options)
        assert result.tokens == expected and result.timings.drafted_tokens > 0
        engine.check_integrity()
