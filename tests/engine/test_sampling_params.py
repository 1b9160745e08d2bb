"""SamplingParams: every wrong value is named, nothing is ignored, defaults come from the model."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from pyengine.errors import InvalidArgumentError, ModelFormatError
from pyengine.sampling import ALIASES, Drafting, ResolvedParams, SamplingParams
from pyengine.sampling_options import SamplingOptions

NAN, INF = math.nan, math.inf
HUGE = 10**5000  # no float holds it, and CPython refuses to write it down


def test_every_default_is_neutral_and_greedy():
    p = SamplingParams().resolve()
    expected = ResolvedParams(
        n=1, max_tokens=None, min_tokens=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0,
        top_n_sigma=0.0, dynatemp_range=0.0, dynatemp_exponent=1.0, xtc_probability=0.0, xtc_threshold=0.1,
        repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0, repeat_last_n=-1,
        dry_multiplier=0.0, dry_base=1.75, dry_allowed_length=2, dry_penalty_last_n=-1,
        dry_sequence_breakers=("\n", ":", '"', "*"), no_repeat_ngram_size=0, logit_bias={}, allowed_token_ids=None,
        bad_token_ids=(), bad_words=(),
        stop=(), stop_token_ids=(), include_stop_str_in_output=False, ignore_eos=False, seed=p.seed,
        logprobs=None, skip_special_tokens=True, timeout=None, speculative=Drafting(24, True),
    )  # fmt: skip
    assert p == expected


@pytest.mark.parametrize(
    "name, values",
    {
        "n": [0, -1, 1.5, "2", True, 10**6],
        "max_tokens": [0, -1, 2.0, True, 2**31],
        "min_tokens": [-1, 0.5, False],
        "temperature": [-0.1, NAN, INF, "1", True, 1e39, [1], HUGE, Fraction(HUGE), np.array(1.0)],
        "top_k": [-2, 1.0, True, 2**31, HUGE, np.bool_(True)],
        "top_p": [0, -0.5, 1.01, NAN, "0.9", True],
        "min_p": [-0.1, 1.1, NAN, True],
        "typical_p": [0, 1.5, NAN],
        "top_n_sigma": [-2, NAN, INF, "1"],
        "dynatemp_range": [-0.1, NAN, INF],
        "dynatemp_exponent": [-0.1, NAN, INF],
        "xtc_probability": [-0.1, 1.1, NAN, True],
        "xtc_threshold": [-0.1, 1.1, NAN],
        "repeat_last_n": [-2, 1.0, 2**31],
        "dry_multiplier": [-1, NAN, INF],
        "dry_base": [0.9, NAN, INF],
        "dry_allowed_length": [0, -1, 2.0, 2**31],
        "dry_penalty_last_n": [-2, 1.0, HUGE],
        "dry_sequence_breakers": ["", ["a", ""], [1], b"x", 5, "a" * 257, [str(i) for i in range(65)], {"a": 1}],
        "no_repeat_ngram_size": [-1, 1.5, True],
        "bad_words": ["", " ", ["a", "\n"], [1], 5, [str(i) for i in range(1025)], ["a" * 200_000], iter("ab")],
        "repetition_penalty": [0, -1, NAN, INF],
        "frequency_penalty": [NAN, INF, -INF, "1"],
        "presence_penalty": [NAN, INF, None.__class__],
        "logit_bias": [
            [1],
            {"x": 1},
            {-1: 1},
            {1: NAN},
            {1: INF},
            {1: "a"},
            {True: 1},
            {1.5: 1},
            {1: 1e39},
            {1: 0, "1": 0},
            {1: HUGE},
            {"9" * 5000: 1},
            {HUGE: 1},
        ],
        "allowed_token_ids": [[], [-1], ["a"], 5, "12", [True], [2**31], [HUGE], b"12", iter([1]), np.array(1), {1: 2}],
        "bad_token_ids": [[-1], 3, [1.0]],
        "stop_token_ids": [[-1], 3, [None]],
        "speculative": ["on", "", True, 5, {"k": 1}, {"max_draft": 25}, {"max_draft": -1}, {"max_draft": HUGE}, {"store": 1}, []],
        "stop": ["", [""], [1], b"x", 5, ["a"] * 1025, ["a" * 200_000], {"a": 1}, iter("ab")],
        "include_stop_str_in_output": [1, "yes"],
        "ignore_eos": [0],
        "seed": [-(2**63) - 1, 2**64, HUGE, 1.0, "1", True],
        "logprobs": [-1, 65, 1.0, True],
        "skip_special_tokens": [1],
        "timeout": [0, -1, NAN, INF, "5", True, HUGE],
    }.items(),
)
def test_wrong_values_are_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=name) as caught:
            SamplingParams(**{name: value})
        assert caught.type is InvalidArgumentError, value


def test_good_values_take_their_normal_form():
    p = SamplingParams(
        stop="x",
        stop_token_ids=np.array([1, 2]),
        temperature=1,
        top_k=np.int64(5),
        logit_bias={"3": -INF, np.int32(4): 1},
    )
    assert p.stop == ("x",) and p.stop_token_ids == (1, 2) and p.logit_bias == {3: -INF, 4: 1.0}
    assert type(p.temperature) is float and type(p.top_k) is int
    assert SamplingParams(top_k=-1).resolve().top_k == 0
    assert SamplingParams(seed=2**64 - 1, logprobs=64, temperature=0).resolve().seed == 2**64 - 1


@pytest.mark.parametrize(
    "values, words",
    [
        ({"min_tokens": 5, "max_tokens": 4}, ["min_tokens", "max_tokens"]),
        ({"allowed_token_ids": [1, 2], "bad_token_ids": [2, 1, 3]}, ["allowed_token_ids", "bad_token_ids"]),
    ],
)
def test_contradictions_name_both(values, words):
    with pytest.raises(InvalidArgumentError) as caught:
        SamplingParams(**values)
    assert all(word in str(caught.value) for word in words)


def test_several_greedy_samples_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"n = 3 .*temperature"):
        SamplingParams(n=3).resolve()
    assert SamplingParams(n=3, temperature=0.5).resolve().n == 3
    assert SamplingParams(n=3).resolve({"do_sample": True}).temperature == 1.0


@pytest.mark.parametrize("alias, name", ALIASES.items())
def test_aliases_work_and_exclude_the_name(alias, name):
    value: Any = "x" if name == "stop" else 1
    assert SamplingParams.from_kwargs(**{alias: value}) == SamplingParams(**{name: value})
    with pytest.raises(InvalidArgumentError, match=f"{name}|{alias}") as caught:
        SamplingParams.from_kwargs(**{alias: value, name: value})
    assert alias in str(caught.value) and name in str(caught.value)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(TypeError, match=r"'temprature'.*'temperature'"):
        SamplingParams.from_kwargs(temprature=1)
    with pytest.raises(TypeError, match=r"'max_new_token'.*'max_new_tokens'"):
        SamplingParams.from_kwargs(max_new_token=1)
    with pytest.raises(TypeError, match=r"'zzz'$") as caught:
        SamplingParams.from_kwargs(zzz=1)
    assert isinstance(caught.value, InvalidArgumentError)


def test_the_models_defaults_come_below_the_callers():
    config = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "max_new_tokens": 7,
        "eos_token_id": [1],
    }
    p = SamplingParams().resolve(config)
    assert (p.temperature, p.top_p, p.top_k, p.max_tokens) == (0.6, 0.9, 20, None)
    p = SamplingParams(temperature=0.1, top_k=0).resolve(config)
    assert (p.temperature, p.top_p, p.top_k) == (0.1, 0.9, 0)
    assert SamplingParams(temperature=0).resolve(config).temperature == 0.0
    assert SamplingParams().resolve({**config, "do_sample": False}).temperature == 0.0
    assert (
        SamplingParams().resolve({"temperature": 0.6}).temperature == 0.0
    )  # transformers' do_sample is False by default
    assert SamplingParams().resolve({"repetition_penalty": 1.1, "top_p": None}).repetition_penalty == 1.1


def test_asking_for_a_filter_asks_for_sampling():
    for name, value in {
        "top_p": 0.9, "top_k": 5, "min_p": 0.1, "typical_p": 0.5, "top_n_sigma": 1, "xtc_probability": 0.5, "dynatemp_range": 0.5,
    }.items():  # fmt: skip
        assert SamplingParams(**{name: value}).resolve().temperature == 1.0
        assert SamplingParams(**{name: value}, temperature=0).resolve().temperature == 0.0
        assert SamplingParams(**{name: value}).resolve({"temperature": 0.7}).temperature == 0.7
    for name, off in {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "typical_p": 1.0, "top_n_sigma": -1, "xtc_probability": 0}.items():
        assert SamplingParams(**{name: off}).resolve().temperature == 0.0
    for below in ({"top_k": -1}, {"top_n_sigma": -1}, {"top_n_sigma": -0.5}):  # off, too
        assert SamplingParams(**below).resolve().temperature == 0.0


@pytest.mark.parametrize(
    "config", [{"temperature": "hot"}, {"top_p": 7}, {"top_k": 1.5}, {"do_sample": 1}, {"min_p": NAN}]
)
def test_a_damaged_generation_config_is_the_models_fault(config):
    with pytest.raises(ModelFormatError, match=r"generation_config\.json.*" + next(iter(config))):
        SamplingParams().resolve(config)


def test_seeds_are_drawn_once_and_reported():
    drawn = {SamplingParams().resolve().seed for _ in range(20)}
    assert len(drawn) == 20 and all(0 <= seed < 2**64 for seed in drawn)
    assert SamplingParams().resolve(seed=5).seed == 5
    assert SamplingParams(seed=0).resolve(seed=5).seed == 0
    with pytest.raises(InvalidArgumentError, match="seed"):
        SamplingParams().resolve(seed=2**64)


def test_a_negative_seed_is_its_twos_complement_and_minus_one_is_none():
    for seed in (-2, -(2**31), -(2**63)):
        assert SamplingParams(seed=seed).resolve().seed == int(np.int64(seed).view(np.uint64))
        assert SamplingParams().resolve(seed=seed).seed == seed + 2**64
    assert SamplingParams(seed=-1) == SamplingParams()
    assert SamplingParams(seed=-1).resolve(seed=5).seed == 5
    assert len({SamplingParams(seed=-1).resolve(seed=-1).seed for _ in range(20)}) == 20


def test_params_are_frozen_and_copy():
    p = SamplingParams(temperature=0.5, logit_bias={1: 2.0}, stop=["a"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.temperature = 1.0  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(p)) == p == copy.deepcopy(p)
    assert dataclasses.replace(p, temperature=0).temperature == 0.0
    bias = {1: 2.0}
    p = SamplingParams(logit_bias=bias)
    bias[1] = 3.0
    assert p.logit_bias == {1: 2.0}


def test_a_subclass_has_the_same_fields() -> None:
    """With slots of its own or without them."""

    class Plain(SamplingParams):
        pass

    class Slotted(SamplingParams):
        __slots__ = ()

    given = {"temperature": 0.5, "max_tokens": 3, "seed": 1}
    for kind in (Plain, Slotted):
        assert kind(**given).resolve() == SamplingParams(**given).resolve()
        assert kind.from_kwargs(max_new_tokens=3).max_tokens == 3
        with pytest.raises(InvalidArgumentError, match="temperature"):
            kind(temperature=-1.0)


def test_the_options_of_calls_are_the_fields_and_their_aliases() -> None:
    """What editors and type checkers are told of is what there is, with the same types."""
    types = {field.name: field.type for field in dataclasses.fields(SamplingParams)}
    assert {name: hint.__forward_arg__ for name, hint in SamplingOptions.__annotations__.items()} == {
        **types,
        **{alias: types[name] for alias, name in ALIASES.items()},
    }
