"""Whatever a stranger's request holds: an answer, or one of our own errors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from engine import cli_tools
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyengine
from pyengine.errors import InvalidArgumentError, PyEngineError
from pyengine.sampling import SamplingParams

FIELDS = list(SamplingParams.__slots__)
HUGE = 10**5000

ODD: list[Any] = [
    HUGE, -HUGE, Fraction(HUGE), Fraction(1, HUGE), 2**31, 2**63, 2**64, -(2**63), math.inf, -math.inf, 1e39, "9" * 5000,
    np.int64(3), np.float32(0.5), np.bool_(True), np.array(1), np.array([1, 2]), np.array([0.5]), object(), int, 1j,
]  # fmt: skip
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(0, 70), st.floats(), st.text(max_size=5), st.binary(max_size=5),
    st.integers(0, len(ODD) - 1).map(lambda index: ODD[index]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(st.integers(), st.text(max_size=3), st.booleans(), st.none()), inner, max_size=3),
    ),
    max_leaves=5,
)
# What is likely to be accepted, so that something is computed too.
LIKELY: dict[str, Any] = {
    "n": st.integers(1, 3), "max_tokens": st.integers(1, 4), "min_tokens": st.integers(0, 4), "temperature": st.floats(0, 2),
    "top_k": st.integers(-1, 50), "top_p": st.floats(0.01, 1), "min_p": st.floats(0, 1), "typical_p": st.floats(0.01, 1),
    "top_n_sigma": st.floats(-1, 5), "dynatemp_range": st.floats(0, 2), "dynatemp_exponent": st.floats(0, 5),
    "xtc_probability": st.floats(0, 1), "xtc_threshold": st.floats(0, 1), "repeat_last_n": st.integers(-1, 9),
    "dry_multiplier": st.floats(0, 10), "dry_base": st.floats(1, 10), "dry_allowed_length": st.integers(1, 4),
    "dry_penalty_last_n": st.integers(-1, 9), "dry_sequence_breakers": st.lists(st.text(min_size=1, max_size=4), max_size=3),
    "no_repeat_ngram_size": st.integers(0, 4), "bad_words": st.lists(st.text(min_size=1, max_size=4), max_size=3),
    "repetition_penalty": st.floats(0.01, 10), "frequency_penalty": st.floats(-2, 2), "presence_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 400), st.floats(-100, 100), max_size=3),
    "allowed_token_ids": st.lists(st.integers(0, 400), min_size=1, max_size=4),
    "bad_token_ids": st.lists(st.integers(0, 400), max_size=4),
    "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3), "stop_token_ids": st.lists(st.integers(0, 400), max_size=3),
    "seed": st.integers(-(2**63), 2**64 - 1), "logprobs": st.integers(0, 64), "timeout": st.floats(1e-9, 10),
}  # fmt: skip


def request() -> st.SearchStrategy[dict[str, Any]]:
    def pair(name: str) -> st.SearchStrategy[tuple[str, Any]]:
        return st.tuples(st.just(name), st.one_of(LIKELY.get(name, st.booleans()), values))

    return st.lists(st.sampled_from(FIELDS).flatmap(pair), max_size=5).map(dict)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pyengine.Engine]:
    directory = tmp_path_factory.mktemp("untrusted")
    model = pyengine.freeze(cli_tools.write_talker(directory / "hf", n_ctx=64), directory / "model.safetensors")
    with pyengine.Engine(model, n_threads=1) as opened:
        yield opened


@settings(max_examples=2000, deadline=None)
@given(st.sampled_from(FIELDS), values)
def test_a_parameter_is_taken_or_refused_by_name(name, value):
    try:
        params = SamplingParams(**{name: value})
    except InvalidArgumentError as error:
        assert name in str(error) and len(str(error)) < 400
        return
    try:
        params.resolve()
    except InvalidArgumentError as error:
        assert name in str(error)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request())
def test_a_request_is_answered_or_refused(engine, options):
    options.setdefault("max_tokens", 2)
    try:
        result = engine.generate("ab", **options)
    except PyEngineError:
        return
    assert all(isinstance(r, pyengine.Generation) for r in (result if isinstance(result, list) else [result]))


@settings(max_examples=400, deadline=None)
@given(values)
def test_a_prompt_is_answered_or_refused(engine, prompt):
    for use in (engine.generate, lambda p, **o: list(engine.stream(p, **o))):
        with contextlib.suppress(PyEngineError):
            use(prompt, max_tokens=1)
    for use in (engine.score, engine.logits, engine.tokenize, engine.detokenize):
        with contextlib.suppress(PyEngineError):
            use(prompt)


messages = st.one_of(
    values,
    st.lists(
        st.one_of(values, st.fixed_dictionaries({"role": st.one_of(st.text(max_size=9), values), "content": values})),
        max_size=3,
    ),
)


@settings(max_examples=400, deadline=None)
@given(messages)
def test_messages_are_answered_or_refused(engine, said):
    with contextlib.suppress(PyEngineError):
        engine.chat(said, max_tokens=1)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(["n_ctx", "n_threads", "kv_dtype", "seed"]), value=values)
def test_an_engines_own_arguments(engine, name, value):
    try:
        pyengine.Engine(engine.path, **{name: value}).close()
    except InvalidArgumentError as error:
        assert name in str(error)


OTHERS: list[Callable[[pyengine.Engine], object]] = [
    lambda e: e.score([1, 2, 3], start="x"),
    lambda e: e.score([1, 2, 3], start=float("nan")),
    lambda e: e.score([1], start=HUGE),
    lambda e: e.logits([1, 2], positions=[1.5]),
    lambda e: e.logits([1, 2], positions=[2]),
    lambda e: e.logits([1], positions=[-1]),
    lambda e: e.logits([1], positions=1),
    lambda e: e.logits([]),
    lambda e: e.logits("abc"),
    lambda e: e.tokenize(None),
    lambda e: e.tokenize(b"a"),
    lambda e: e.generate("a", cache_salt=HUGE),
    lambda e: e.generate("a", structured_outputs={"regex": HUGE}),
    lambda e: e.generate("a", structured_outputs={HUGE: "a"}),
]


@pytest.mark.parametrize("use", OTHERS)
def test_other_arguments(engine, use):
    with pytest.raises(InvalidArgumentError):
        use(engine)
