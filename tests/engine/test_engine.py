"""The public API on a tiny model: whatever way a text is asked for, the bytes are the same; whatever is wrong is named."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyengine
from pyengine import Engine, SamplingParams

PROMPT = "the quick brown fox jumps over"
SAMPLED = {"temperature": 1.0, "seed": 11, "max_tokens": 24, "ignore_eos": True}


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[Engine]:
    with Engine(tiny_model) as engine:
        yield engine


def outputs(results: list[pyengine.Generation]) -> list[tuple[str, list[int]]]:
    return [(result.text, result.tokens) for result in results]


# ------------------------------------------------------------------ one output, many ways


def test_stream_pieces_join_to_the_text(engine: Engine) -> None:
    result = engine.generate(PROMPT, **SAMPLED)
    pieces = list(engine.stream(PROMPT, **SAMPLED))
    assert "".join(piece.text for piece in pieces) == result.text
    assert [piece.token for piece in pieces] == result.tokens
    assert pieces[-1].result is not None and pieces[-1].result.text == result.text
    assert all(piece.result is None for piece in pieces[:-1])


def test_batch_equals_alone(engine: Engine) -> None:
    prompts = [PROMPT, "a", "one two three four five six seven eight nine ten " * 8, PROMPT + " it"]
    together = engine.generate(prompts, **SAMPLED)
    alone = [engine.generate(prompt, **SAMPLED) for prompt in prompts]
    assert outputs(together) == outputs(alone)


def test_more_prompts_than_fit_a_step(engine: Engine) -> None:
    prompts = [f"{i} {PROMPT}" for i in range(70)]
    options = {**SAMPLED, "max_tokens": 3}
    assert outputs(engine.generate(prompts, **options)) == outputs([engine.generate(p, **options) for p in prompts])


def test_samples_differ_and_do_not_depend_on_their_number(engine: Engine) -> None:
    two, five = engine.generate(PROMPT, n=2, **SAMPLED), engine.generate(PROMPT, n=5, **SAMPLED)
    assert outputs(two) == outputs(five[:2])
    assert len({tuple(result.tokens) for result in five}) > 1
    assert two[0].tokens == engine.generate(PROMPT, **SAMPLED).tokens


def test_token_ids_are_a_prompt(engine: Engine) -> None:
    ids = engine.tokenize(PROMPT)
    assert engine.generate(ids, **SAMPLED).tokens == engine.generate(PROMPT, **SAMPLED).tokens
    assert outputs(engine.generate([ids, ids], **SAMPLED)) == outputs([engine.generate(PROMPT, **SAMPLED)] * 2)


def test_a_cached_prefix_changes_no_byte(tiny_model: Path, engine: Engine) -> None:
    long_prompt = PROMPT * 12
    first = engine.generate(long_prompt, **SAMPLED)
    again = engine.generate(long_prompt, **SAMPLED)
    continued = engine.generate(engine.tokenize(long_prompt) + first.tokens + [5, 6, 7], **SAMPLED)
    assert again.timings.cached_tokens > 0 and continued.timings.cached_tokens > 0
    with Engine(tiny_model) as fresh:
        cold = fresh.generate(fresh.tokenize(long_prompt) + first.tokens + [5, 6, 7], **SAMPLED)
    assert cold.timings.cached_tokens == 0
    assert again.tokens == first.tokens and continued.tokens == cold.tokens


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_threads_change_no_byte(tiny_model: Path, engine: Engine, n_threads: int) -> None:
    with Engine(tiny_model, n_threads=n_threads) as other:
        assert other.n_threads == n_threads
        assert other.generate(PROMPT, **SAMPLED).tokens == engine.generate(PROMPT, **SAMPLED).tokens


def test_reading_the_file_changes_no_byte(tiny_model: Path, engine: Engine) -> None:
    with Engine(tiny_model, mmap=False) as other:
        assert other.generate(PROMPT, **SAMPLED).tokens == engine.generate(PROMPT, **SAMPLED).tokens


def test_seed_is_reported_and_reproduces(engine: Engine) -> None:
    options = {key: value for key, value in SAMPLED.items() if key != "seed"}
    result = engine.generate(PROMPT, **options)
    assert engine.generate(PROMPT, seed=result.seed, **options).tokens == result.tokens
    assert engine.generate(PROMPT, **options).seed != result.seed


def test_engine_seed_is_the_default(tiny_model: Path) -> None:
    with Engine(tiny_model, seed=5) as engine:
        assert engine.generate(PROMPT, temperature=1.0, max_tokens=2).seed == 5
        assert engine.generate(PROMPT, temperature=1.0, max_tokens=2, seed=-1).seed == 5  # as without one
    with Engine(tiny_model, seed=-1) as engine:
        assert engine.seed is None


# ------------------------------------------------------------------ what strings of parameters are in tokens


def test_bad_words_and_breakers_reach_the_sampler(engine: Engine) -> None:
    options: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True, "temperature": 0}
    plain = engine.generate(PROMPT, **options)
    word = "hello"
    assert word in plain.text
    without = engine.generate(PROMPT, bad_words=word, **options)
    first = next(i for i, pair in enumerate(zip(plain.tokens, without.tokens, strict=True)) if pair[0] != pair[1])
    assert word not in without.text and plain.tokens[first] == engine.tokenize(word, add_bos=False)[-1]
    dry: dict[str, Any] = {**options, "dry_multiplier": 50.0, "dry_allowed_length": 1}
    tokens = engine.generate(PROMPT, **dry).tokens
    assert tokens != plain.tokens
    assert engine.generate(PROMPT, dry_sequence_breakers=[], **dry).tokens == tokens
    assert engine.generate(PROMPT, dry_sequence_breakers=sorted(set(plain.text)), **dry).tokens == plain.tokens


# ------------------------------------------------------------------ how it ends


def test_max_tokens_and_min_tokens(engine: Engine) -> None:
    result = engine.generate(PROMPT, max_tokens=7, ignore_eos=True)
    assert len(result.tokens) == 7 and result.finish_reason == "length"
    stop = engine.generate(PROMPT, max_tokens=7, ignore_eos=True).tokens[0]
    stopped = engine.generate(PROMPT, max_tokens=7, stop_token_ids=[stop])
    assert stopped.tokens == [stop] and stopped.finish_reason == "stop" and stopped.stop_reason == stop
    later = engine.generate(PROMPT, max_tokens=7, min_tokens=3, stop_token_ids=[stop])
    assert len(later.tokens) >= 3 and stop not in later.tokens[:3]


def test_stop_string_never_reaches_the_stream(engine: Engine) -> None:
    text = engine.generate(PROMPT, **SAMPLED).text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    expected = text[: text.index(stop)]
    result = engine.generate(PROMPT, stop=stop, **SAMPLED)
    assert (result.text, result.finish_reason, result.stop_reason) == (expected, "stop", stop)
    assert "".join(piece.text for piece in engine.stream(PROMPT, stop=[stop], **SAMPLED)) == expected
    kept = engine.generate(PROMPT, stop=stop, include_stop_str_in_output=True, **SAMPLED)
    assert kept.text == expected + stop


def test_the_context_ends_a_text(tiny_model: Path) -> None:
    with Engine(tiny_model, n_ctx=16) as engine:
        ids = list(range(3, 13))
        result = engine.generate(ids, ignore_eos=True)
        assert result.finish_reason == "length" and len(ids) + len(result.tokens) == 16
        full = engine.generate(list(range(3, 19)), ignore_eos=True)
        assert full.finish_reason == "length"
        with pytest.raises(pyengine.ContextFullError, match=r"17 tokens.*16"):
            engine.generate(list(range(3, 20)))


def test_timeout_returns_what_there_is(engine: Engine) -> None:
    result = engine.generate(PROMPT, timeout=0.05, ignore_eos=True, max_tokens=10**6, temperature=1.0, seed=1)
    assert result.finish_reason in ("timeout", "length")
    untimed = engine.generate(PROMPT, ignore_eos=True, max_tokens=max(1, len(result.tokens)), temperature=1.0, seed=1)
    assert untimed.tokens[: len(result.tokens)] == result.tokens


def test_a_closed_stream_gives_its_sequence_back(engine: Engine) -> None:
    for i in range(6):
        stream = engine.stream(f"{i} {PROMPT}", **SAMPLED)
        next(stream)
        stats = engine.cache_stats()
        assert stats["n_sequences"] == 1 and stats["n_pages"] > stats["n_cached"] + stats["n_free"]
        if i % 3 == 1:
            stream.close()
        elif i % 3 == 2:
            with stream as same:
                assert same is stream
            assert list(stream) == []
        else:
            del stream
        stats = engine.check_integrity()
        assert stats["n_sequences"] == 0 and stats["n_pages"] == stats["n_cached"] + stats["n_free"]


def test_logprobs(engine: Engine) -> None:
    result = engine.generate(PROMPT, logprobs=3, **SAMPLED)
    assert result.logprobs is not None and len(result.logprobs) == len(result.tokens)
    logits = engine.logits(engine.tokenize(PROMPT), [-1 + len(engine.tokenize(PROMPT))])[0].astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    first = result.logprobs[0]
    assert first.token == result.tokens[0] and first.logprob == pytest.approx(expected[first.token], abs=1e-9)
    assert [token for token, _ in first.top] == list(np.argsort(-expected, kind="stable")[:3])


# ------------------------------------------------------------------ scores and logits


def test_logits_rows_and_positions(engine: Engine) -> None:
    ids = engine.tokenize(PROMPT * 4)
    everything = engine.logits(ids)
    assert everything.shape == (len(ids), engine.vocab_size) and everything.dtype == np.float32
    np.testing.assert_array_equal(engine.logits(ids, [3, 0, 3]), everything[[3, 0, 3]])
    for i in (0, 5):
        np.testing.assert_array_equal(engine.logits(ids[: i + 1])[-1], everything[i])


def test_score_is_the_log_softmax_of_the_logits(engine: Engine) -> None:
    score = engine.score(PROMPT)
    logits = engine.logits(score.tokens).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = [logprobs[i, token] for i, token in enumerate(score.tokens[1:])]
    assert score.logprobs[0] is None
    np.testing.assert_allclose(score.logprobs[1:], expected, atol=1e-9)
    assert score.perplexity == pytest.approx(np.exp(-np.mean(expected)))


@pytest.mark.parametrize("start", [0, 1, 2, 7, 10_000])
def test_score_from_somewhere_on_is_the_rest_of_the_score(engine: Engine, start: int) -> None:
    whole, rest = engine.score(PROMPT), engine.score(PROMPT, start=start)
    assert rest.tokens == whole.tokens
    assert rest.logprobs[start:] == whole.logprobs[start:]
    assert rest.logprobs[:start] == [None] * min(start, len(whole.tokens))


def test_f32_kv_is_close_and_not_the_same(tiny_model: Path, engine: Engine) -> None:
    ids = engine.tokenize(PROMPT)
    with Engine(tiny_model, kv_dtype="f32") as reference:
        exact, quantized = reference.logits(ids), engine.logits(ids)
    assert not np.array_equal(exact, quantized)
    # two int8 roundings (K and V) of about 1/254 of their group's maximum each, through two layers
    assert np.linalg.norm(exact - quantized) < 0.05 * np.linalg.norm(exact)


# ------------------------------------------------------------------ text


def test_special_tokens_in_a_prompt_are_text(engine: Engine) -> None:
    special = next(iter(engine.tokenizer.special_tokens))
    id_ = engine.tokenizer.special_tokens[special]
    assert id_ not in engine.tokenize(f"a {special} b", add_bos=False)
    assert id_ in engine.tokenize(f"a {special} b", add_bos=False, parse_special=True)
    assert engine.detokenize(engine.tokenize(f"a {special} b", add_bos=False)) == f"a {special} b"


# ------------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize(
    "options, name",
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 2}, "min_tokens"),
        ({"stop": ""}, "stop"),
        ({"max_tokens": 3, "max_new_tokens": 4}, "max_new_tokens"),
    ],
)
def test_bad_options_are_value_errors_that_name_them(engine: Engine, options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        engine.generate(PROMPT, **options)


def test_parameters_are_of_their_class(engine: Engine) -> None:
    for params in ({"max_tokens": 3}, 64):
        with pytest.raises(pyengine.InvalidArgumentError, match=r"params is a SamplingParams.*max_tokens=64"):
            engine.generate("a", params)


def test_unknown_option_is_named(engine: Engine) -> None:
    with pytest.raises(TypeError, match="temprature"):
        engine.generate(PROMPT, temprature=1)
    with pytest.raises(ValueError, match="not both"):
        engine.generate(PROMPT, SamplingParams(), max_tokens=3)
    for stream in (False, True):  # refused before the model is asked for its template
        with pytest.raises(TypeError, match="parse_special"):
            engine.chat([], stream=stream, parse_special=True)


@pytest.mark.parametrize("prompt", [[], [[]], [10**9], [-1], ""])
def test_bad_prompts(engine: Engine, prompt: object) -> None:
    if prompt == "" and engine.tokenize("") != []:
        pytest.skip("this tokenizer adds BOS: an empty text is a prompt")
    with pytest.raises(pyengine.InvalidArgumentError):
        engine.generate(prompt)  # type: ignore[call-overload]


@pytest.mark.parametrize("options", [{"n_ctx": -1}, {"n_ctx": 10**9}, {"n_threads": 0}, {"n_threads": True}])
def test_bad_engine_options(tiny_model: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Engine(tiny_model, **options)


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Engine(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"at org/name; one of the hub is named hf:org/name$"):
        Engine("org/name")
    for path in ("nowhere", "a/b/c", "/a", "./a", "models/a.gguf"):
        with pytest.raises(FileNotFoundError, match=rf"there is no model at {path}$"):
            Engine(path)


def test_thread_environment(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYENGINE_NUM_THREADS", "3")
    with Engine(tiny_model) as engine:
        assert engine.n_threads == 3
    monkeypatch.setenv("PYENGINE_NUM_THREADS", "many")
    with pytest.raises(ValueError, match="PYENGINE_NUM_THREADS"):
        Engine(tiny_model)


# ------------------------------------------------------------------ life


def test_closed_engine_says_so(tiny_model: Path) -> None:
    engine = Engine(tiny_model)
    stream = engine.stream(PROMPT, **SAMPLED)
    next(stream)
    engine.close()
    engine.close()
    with pytest.raises(pyengine.PyEngineError, match="closed"):
        next(stream)
    with pytest.raises(pyengine.PyEngineError, match="closed"):
        engine.generate(PROMPT)
    with pytest.raises(pyengine.PyEngineError, match="closed"):
        engine.generation_defaults()
    assert repr(engine) == "Engine(closed)"


def test_many_python_threads_share_an_engine(engine: Engine) -> None:
    expected = [engine.generate(f"{i} {PROMPT}", **SAMPLED).tokens for i in range(6)]
    got: dict[int, list[int]] = {}

    def work(i: int) -> None:
        got[i] = [piece.token for piece in engine.stream(f"{i} {PROMPT}", **SAMPLED)]  # type: ignore[misc]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(6)] == expected


def test_two_engines_in_one_process(tiny_model: Path, engine: Engine) -> None:
    expected = engine.generate(PROMPT, **SAMPLED).tokens
    with Engine(tiny_model, n_threads=2) as other:
        results: list[list[int]] = []
        threads = [
            threading.Thread(target=lambda e=e: results.append(e.generate(PROMPT, **SAMPLED).tokens))
            for e in (engine, other) * 3
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [expected] * 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking with threads is what is tested
def test_fork_with_an_engine_at_work(engine: Engine) -> None:
    expected = engine.generate(PROMPT, **SAMPLED).tokens
    busy = threading.Event()
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            engine.generate(PROMPT * 4, **{**SAMPLED, "max_tokens": 4})
            busy.set()

    thread = threading.Thread(target=keep_busy)
    thread.start()
    busy.wait()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(engine.generate(PROMPT, **SAMPLED).tokens))
    child.start()
    child.join(60)
    stop.set()
    thread.join()
    assert child.exitcode == 0
    assert queue.get() == expected


def test_deadline_ends_a_long_prefill_soon(tiny_model: Path) -> None:
    with Engine(tiny_model, n_threads=1) as engine:
        ids = [3 + i % 50 for i in range(engine.n_ctx)]
        start = time.process_time()
        result = engine.generate(ids, timeout=0.001)
        took = time.process_time() - start
        # either the machine is fast enough, or the prefill was cut short long before its end
        assert result.finish_reason in ("timeout", "length") and took < 5


def test_perplexity_of_what_is_impossible_is_infinite() -> None:
    assert pyengine.Score([1, 2], [None, -1e30]).perplexity == float("inf")
    assert pyengine.Score([1, 2], [None, -709.0]).perplexity == pytest.approx(np.exp(709.0))
