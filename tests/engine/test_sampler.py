"""The C sampler against the specification in plain NumPy: equal tokens, not similar ones."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from array import array
from typing import Any

import numpy as np
import pytest
from engine import cli_tools
from engine.sampler_tools import (
    params,
    random_logits,
    random_mask,
    random_params,
    random_sequences,
    random_text,
    words_of,
)
from reference.sampler import adjust, choose, log_softmax, philox

from pyengine import _sampler
from pyengine.errors import InvalidArgumentError, NotFiniteError
from pyengine.sampling import ResolvedParams


def sample(logits: np.ndarray, p: ResolvedParams, position: int = 0, **kwargs: Any) -> int:
    return int(_sampler.Sampler(p, len(logits), **kwargs).sample(logits, position)[0])


# ---------------------------------------------------------------- the parts: random bits, exp, log

# Known answers published with Random123 (its file kat_vectors), for philox4x32 with 10 rounds.
PHILOX_KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, expected", PHILOX_KNOWN)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert _sampler._philox4x32_10(counter, key) == expected
    assert philox(counter, key) == expected


def ulps(got: np.ndarray, exact: np.ndarray) -> float:
    """Largest error in units of the last place; `exact` in extended precision."""
    spacing = np.spacing(np.abs(exact.astype(np.float64)))
    return float(np.max(np.abs(got.astype(np.longdouble) - exact) / spacing))


extended = pytest.mark.skipif(
    np.finfo(np.longdouble).nmant < 60, reason="this platform's long double is no reference for double"
)


@extended
def test_exp_is_within_one_ulp():
    rng = np.random.default_rng(0)
    x = np.concatenate([-rng.random(20000) * 708, -rng.random(20000), -rng.random(5000) * 1e-9, [0.0, -708.0]])
    got = np.array([_sampler.exp(v) for v in x])
    assert ulps(got, np.exp(x.astype(np.longdouble))) < 1.0
    assert _sampler.exp(0.0) == 1.0
    assert _sampler.exp(-709.0) == 0.0 and _sampler.exp(-math.inf) == 0.0


@extended
def test_log_is_within_two_ulps():
    rng = np.random.default_rng(0)
    x = np.concatenate([np.exp(rng.uniform(-700, 700, 20000)), rng.uniform(0.5, 2, 20000), 1 + rng.random(5000) * 1e-6])
    got = np.array([_sampler._log(v) for v in x])
    exact = np.log(x.astype(np.longdouble))
    assert ulps(got[exact != 0], exact[exact != 0]) < 2.0
    assert _sampler._log(1.0) == 0.0


# ---------------------------------------------------------------- the whole specification


@pytest.mark.parametrize("block", range(20))
def test_tokens_equal_the_reference(block):
    rng = np.random.default_rng(block)
    compared = 0
    while compared < 200:
        n = int(rng.choice([1, 2, 15, 16, 17, 63, 64, 65, 200, 1000]))
        logits = random_logits(rng, n)
        try:
            p = random_params(rng, n)
        except InvalidArgumentError:  # bad_token_ids happened to ban all of allowed_token_ids
            continue
        prompt, output = random_text(rng, n, 8), random_text(rng, n, 16)
        bad_sequences, breakers = random_sequences(rng, n), random_sequences(rng, n)
        position, index = int(rng.integers(0, 2**40)), int(rng.integers(0, 3))
        sampler = _sampler.Sampler(p, n, sample_index=index, bad_sequences=bad_sequences, breakers=breakers)
        sampler.accept_prompt(array("i", prompt))
        for token in output:
            sampler.accept(token)
        compared += 1
        mask = random_mask(rng, n)
        words = None if mask is None else words_of(mask)
        given: dict[str, Any] = {"mask": mask, "bad_sequences": bad_sequences, "breakers": breakers}
        if np.isneginf(adjust(logits, p, prompt, output, **given)).all():
            with pytest.raises(InvalidArgumentError, match="every token is banned"):
                sampler.sample(logits, position, words)
        else:
            expected = choose(logits, p, position, index, prompt, output, **given)
            assert sampler.sample(logits, position, words)[0] == expected, p


def test_an_overflow_by_penalty_or_bias_is_an_error():
    logits = np.array([3e38, -3e38], np.float32)
    for token, changes in [(1, {"repetition_penalty": 2.0}), (0, {"presence_penalty": -3e38})]:
        sampler = _sampler.Sampler(params(**changes), 2)
        sampler.accept(token)
        with pytest.raises(NotFiniteError, match=f"token {token} overflows"):
            sampler.sample(logits, 0)
    with pytest.raises(NotFiniteError, match="token 0 overflows"):
        sample(logits, params(logit_bias={0: 3e38}))


@pytest.mark.parametrize("spread", [3, 0.02, 0])  # flat ones: the sum of the weights is beyond 2^53
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(
    "extra",
    [{}, {"top_p": 0.95}, {"top_p": 1 - 2**-53}, {"top_k": 50}, {"top_k": 50, "top_p": 0.9}, {"typical_p": 0.9}],
)
def test_a_large_vocabulary_equals_the_reference(spread, temperature, extra):
    rng = np.random.default_rng(5)
    logits = rng.normal(0, spread, 20011).astype(np.float32)
    for seed in range(2):
        p = params(temperature=temperature, seed=seed, **extra)
        sampler = _sampler.Sampler(p, len(logits))
        for position in range(3):
            assert sampler.sample(logits, position)[0] == choose(logits, p, position)


def test_top_p_at_the_last_place():
    """Where top_p * total is just above the sum of a prefix, by less than an integer, or less than a double can tell."""
    pair = np.zeros(2, np.float32)  # weights 2^42 and 2^42: a prefix of 2^42 does not reach 2^42 + 1/2
    many = (np.arange(8192) * np.float32(-1e-5)).astype(np.float32)
    sums = np.rint(np.exp(many.astype(np.float64)) * 2.0**42).astype(np.uint64).cumsum()
    total = float(int(sums[-1]))
    rounded_up = [
        i for i in range(4096, 8192) if int(sums[i]) < float(int(sums[i])) == float(int(sums[i])) / total * total
    ]
    assert len(rounded_up) > 100
    cases = [(pair, (2.0**42 + 0.5) / 2.0**43)]
    cases += [(many, float(int(sums[i])) / total) for i in rounded_up[:: len(rounded_up) // 5]]
    for logits, top_p in cases:
        sampler = _sampler.Sampler(params(top_p=top_p, seed=8), len(logits))
        for position in range(12):
            assert sampler.sample(logits, position)[0] == choose(logits, params(top_p=top_p, seed=8), position)


def test_greedy_takes_the_smallest_id_of_a_tie_and_zero_has_no_sign():
    p = params(temperature=0)
    for n in (3, 16, 40):
        logits = np.full(n, -1, np.float32)
        logits[1], logits[2] = -0.0, 0.0
        assert sample(logits, p) == 1


def test_draws_follow_the_probabilities():
    """Chi-square over 20,000 positions: its mean is the number of classes less one, its deviation sqrt(2 * that)."""
    logits = np.array([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, -3.0], np.float32)
    p = params(temperature=0.8, seed=77)
    sampler = _sampler.Sampler(p, len(logits))
    draws = 20000
    counts = np.bincount([sampler.sample(logits, i)[0] for i in range(draws)], minlength=len(logits))
    expected = np.exp(log_softmax(logits / np.float32(0.8))) * draws
    freedom = len(logits) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * math.sqrt(2 * freedom)


def test_seed_position_and_sample_index_all_matter_and_nothing_else():
    logits = np.zeros(1000, np.float32)
    p = params(seed=3)
    base = [sample(logits, p, i) for i in range(50)]
    assert base == [sample(logits, p, i) for i in range(50)]
    assert base != [sample(logits, params(seed=3 + 2**32), i) for i in range(50)]
    assert base != [sample(logits, p, i + 2**32) for i in range(50)]
    assert base != [sample(logits, p, i, sample_index=1) for i in range(50)]
    sampler = _sampler.Sampler(p, 1000)
    assert base[::-1] == [sampler.sample(logits, i)[0] for i in reversed(range(50))]


# ---------------------------------------------------------------- what has been said, and in which order


def test_dry_equals_its_definition():
    """In texts of few tokens, where passages overlap, reach over the window, and breakers stand everywhere."""
    rng, n_changed, n_broken = np.random.default_rng(6), 0, 0
    for _ in range(1500):
        n = int(rng.integers(2, 6))
        logits = rng.normal(0, 1, n).astype(np.float32)
        p = params(
            temperature=0, dry_multiplier=1.5, dry_base=float(rng.choice([1.0, 1.3, 1e9])),
            dry_allowed_length=int(rng.integers(1, 5)),
            dry_penalty_last_n=int(rng.integers(-1, 30)), no_repeat_ngram_size=int(rng.choice([0, 0, 2, 6])),
        )  # fmt: skip
        text = random_text(rng, n, 60)
        breakers = [tuple(int(i) for i in rng.integers(0, n, rng.integers(1, 5))) for _ in range(rng.integers(0, 3))]
        sampler = _sampler.Sampler(p, n, breakers=breakers)
        for token in text:
            sampler.accept(token)
        expected = choose(logits, p, 0, output=text, breakers=breakers)
        assert sampler.sample(logits, 0)[0] == expected, (p, text, breakers)
        n_changed += expected != int(np.argmax(logits))
        n_broken += expected != choose(logits, p, 0, output=text)
    assert n_changed > 200 and n_broken > 40


def test_dry_never_overflows():
    sampler = _sampler.Sampler(params(temperature=0, dry_multiplier=3e38, dry_base=3e38, logit_bias={1: -1.0}), 2)
    for _ in range(300):
        sampler.accept(0)
    assert sampler.sample(np.array([3e38, -3e38], np.float32), 0)[0] == 1
    assert sampler.sample(np.array([3e38, -3e38], np.float32), 0, np.array([1], np.uint32))[0] == 0


def test_no_ngram_comes_twice_unless_nothing_else_may():
    rng = np.random.default_rng(1)
    for size in (1, 2, 3):
        sampler = _sampler.Sampler(params(no_repeat_ngram_size=size, temperature=2.0), 6)
        sampler.accept_prompt(array("i", [1, 2, 3]))
        text = [1, 2, 3]
        while len(text) < 6**size:
            ngrams, begin = {tuple(text[k : k + size]) for k in range(len(text))}, text[len(text) - size + 1 :]
            allowed = {i for i in range(6) if (*begin, i) not in ngrams}
            token = sampler.sample(rng.normal(0, 3, 6).astype(np.float32), len(text))[0]
            sampler.accept(token)
            text.append(token)
            assert token in allowed or not allowed
    lifted = _sampler.Sampler(params(no_repeat_ngram_size=1, xtc_probability=1.0, xtc_threshold=0.0), 4)
    for token in (0, 1):
        lifted.accept(token)
    logits = np.array([3, 2, 1, 0], np.float32)
    assert lifted.sample(logits, 0)[0] == 3  # XTC leaves the last of those that may come
    assert lifted.sample(logits, 0, np.array([0b0001], np.uint32))[0] == 0  # a grammar's only token
    assert lifted.sample(logits, 0, np.array([0b0011], np.uint32))[0] == 1


def test_bad_sequences_count_in_the_output_alone():
    logits = np.array([0, 3, 2, 1], np.float32)
    sampler = _sampler.Sampler(params(temperature=0), 4, bad_sequences=[(2, 1), (1, 1, 1)])
    sampler.accept_prompt(array("i", [2]))
    said = []
    for position in range(6):
        said.append(sampler.sample(logits, position)[0])
        sampler.accept(said[-1])
    assert said == [1, 1, 2, 2, 2, 2]
    with pytest.raises(InvalidArgumentError, match=r"every token is banned: .*words"):
        sampler.sample(logits, 0, np.array([0b0010], np.uint32))  # a ban, as of bad_token_ids, not a wish
    for wrong, words in (([(4,)], "token 4"), ([()], "length of 0")):
        for name in ("bad_sequences", "breakers"):
            with pytest.raises(InvalidArgumentError, match=words):
                _sampler.Sampler(params(dry_multiplier=1.0), 4, **{name: wrong})


def test_xtc_moves_no_other_draw():
    """Its random number is its own: where it does not take place, tokens are those without it."""
    logits = np.array([2.0, 1.9, 1.8, 1.0, 0.0], np.float32)
    plain, half, always = (_sampler.Sampler(params(xtc_probability=x, xtc_threshold=0.2), 5) for x in (0.0, 0.5, 1.0))
    drawn = [tuple(one.sample(logits, i)[0] for one in (plain, half, always)) for i in range(400)]
    assert {always for *_, always in drawn} == {2, 3, 4}
    assert all(half in (plain, always) for plain, half, always in drawn)
    telling = [half == always for plain, half, always in drawn if plain != always]
    assert len(telling) > 200 and 0.4 < sum(telling) / len(telling) < 0.6


# ---------------------------------------------------------------- masks, history, log-probabilities


def test_end_ids_are_banned_until_min_tokens():
    logits = np.array([0, 5, 4, 3], np.float32)
    sampler = _sampler.Sampler(params(temperature=0, min_tokens=2, stop_token_ids=[2]), 4, end_ids=[1])
    chosen = []
    for position in range(3):
        token = sampler.sample(logits, position)[0]
        sampler.accept(token)
        chosen.append(token)
    assert chosen == [3, 3, 1]
    sampler.reset()
    assert sampler.sample(logits, 0)[0] == 3


def test_reset_forgets_the_penalties():
    logits = np.array([1.0, 0.9], np.float32)
    sampler = _sampler.Sampler(params(temperature=0, presence_penalty=1.0), 2)
    sampler.accept(0)
    assert sampler.sample(logits, 0)[0] == 1
    sampler.reset()
    assert sampler.sample(logits, 0)[0] == 0


def test_everything_banned_is_a_clear_error():
    p = params(allowed_token_ids=[1], logit_bias={1: -math.inf})
    with pytest.raises(InvalidArgumentError, match="every token is banned"):
        sample(np.zeros(3, np.float32), p)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [1, 16, 17, 100])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_non_finite_logits_are_refused(bad, n, temperature):
    for where in {0, n // 2, n - 1}:
        logits = np.zeros(n, np.float32)
        logits[where] = bad
        with pytest.raises(NotFiniteError):
            sample(logits, params(temperature=temperature))
        with pytest.raises(NotFiniteError):
            _sampler.logprobs(logits, 0)


@pytest.mark.parametrize("n", [1, 5, 64, 1000])
@pytest.mark.parametrize("n_top", [0, 1, 5, 64])
def test_logprobs_are_the_models_before_every_step(n, n_top):
    rng = np.random.default_rng(n)
    logits = (rng.integers(-20, 20, n) * 0.25).astype(np.float32)
    p = params(logprobs=n_top, temperature=0.5, repetition_penalty=1.5, top_k=3)
    sampler = _sampler.Sampler(p, n)
    sampler.accept(0)
    token, logprob, top = sampler.sample(logits, 9)
    exact = log_softmax(logits)
    ids = np.lexsort((np.arange(n), -logits))[:n_top]
    assert logprob == pytest.approx(exact[token], abs=1e-12)
    assert [i for i, _ in top] == ids.tolist()
    assert [v for _, v in top] == pytest.approx(exact[ids].tolist(), abs=1e-12)
    assert _sampler.logprobs(logits, token, n_top) == (logprob, top)


@pytest.mark.parametrize("n", [1, 5, 64, 1000])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_logprobs_of_tokens_that_may_come_are_those_among_all(n, share):
    rng = np.random.default_rng(n)
    logits = (rng.integers(-20, 20, n) * 0.25).astype(np.float32)
    may_come = rng.random(n) < share
    bits = np.zeros((n + 31) // 32 * 32, bool)
    bits[:n] = may_come
    mask = np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)
    logprob, top = _sampler.logprobs(logits, 0, 64)
    every = [(i, _sampler.logprobs(logits, i)[0]) for i in range(n) if may_come[i]]
    found = _sampler.logprobs(logits, 0, 64, mask)
    assert found == (logprob, sorted(every, key=lambda one: (-one[1], one[0]))[:64])
    assert share < 1 or found[1] == top


def test_without_logprobs_none_are_given():
    assert _sampler.Sampler(params(temperature=0), 2).sample(array("f", [0, 1]), 0) == (1, None, None)


# ---------------------------------------------------------------- the bindings


@pytest.mark.parametrize(
    "change, words",
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"typical_p": math.nan}, "typical_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"frequency_penalty": math.inf}, "frequency_penalty"),
        ({"top_k": -1}, "top_k"),
        ({"logprobs": 65}, "n_top_logprobs"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"logit_bias": {10: 0.0}}, "token 10"),
        ({"logit_bias": {1: math.nan}}, "logit_bias of token 1"),
        ({"bad_token_ids": (-1,)}, "token -1"),
        ({"stop_token_ids": (10,)}, "token 10"),
        ({"allowed_token_ids": (3, 11)}, "token 11"),
    ],
)
def test_the_c_side_checks_for_itself(change, words):
    with pytest.raises(InvalidArgumentError, match=words):
        _sampler.Sampler(dataclasses.replace(params(), **change), 10)


def test_wrong_buffers_and_tokens_are_refused():
    sampler = _sampler.Sampler(params(), 4)
    with pytest.raises(InvalidArgumentError, match="3 logits for a vocabulary of 4"):
        sampler.sample(np.zeros(3, np.float32), 0)
    for wrong in (np.zeros(4), np.zeros((2, 2), np.float32), np.zeros(8, np.float32)[::2]):
        with pytest.raises(ValueError):
            sampler.sample(wrong, 0)
    with pytest.raises(TypeError):
        sampler.sample(None, 0)
    for token in (-1, 4):
        with pytest.raises(InvalidArgumentError, match=f"token {token}"):
            sampler.accept(token)
        with pytest.raises(InvalidArgumentError, match=f"token {token}"):
            _sampler.logprobs(np.zeros(4, np.float32), token)
    with pytest.raises(InvalidArgumentError):
        _sampler.logprobs(np.zeros(0, np.float32), 0)
    with pytest.raises(InvalidArgumentError, match="65"):
        _sampler.logprobs(np.zeros(4, np.float32), 0, 65)
    with pytest.raises(InvalidArgumentError, match="2 words of a mask, expected 1"):
        _sampler.logprobs(np.zeros(4, np.float32), 0, 1, np.zeros(2, np.uint32))
    with pytest.raises(InvalidArgumentError, match="vocab_size"):
        _sampler.Sampler(params(), 0)
    with pytest.raises(InvalidArgumentError, match="vocab_size"):
        _sampler.Sampler(params(), 2**21 + 1)


def test_a_sampler_uses_the_instruction_set_that_was_selected(tmp_path):
    """Chosen in this process, it overrules PYENGINE_ISA for samplers as it does for contexts: extension modules have a copy of
    the core each, and only one of them is told."""
    script = (
        "from array import array\n"
        "from pyengine import _core, _sampler\n"
        "from pyengine.errors import UnsupportedISAError\n"
        "from pyengine.sampling import SamplingParams\n"
        "logits, params = array('f', [0.0, 1.0]), SamplingParams(temperature=0.0).resolve()\n"
        "uses = (lambda: _sampler.Sampler(params, 2).sample(logits, 0)[0], lambda: _sampler.logprobs(logits, 1)[0])\n"
        "for use in uses:\n"
        "    try:\n"
        "        print(use())\n"
        "    except UnsupportedISAError:\n"
        "        print('unsupported')\n"
        "_core.select_isa('scalar')\n"
        "print(*[use() for use in uses])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=cli_tools.environment(PYENGINE_ISA="quantum"),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.stdout.split()[:3] == ["unsupported", "unsupported", "1"], ran.stderr
    assert float(ran.stdout.split()[3]) == pytest.approx(-math.log1p(math.exp(-1.0)), rel=1e-14)
