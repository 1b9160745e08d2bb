"""What a network that knows a part of the vocabulary makes the sampler choose: the same as if the rest were impossible."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest

from pyengine import _sampler
from pyengine.errors import InvalidArgumentError, NotFiniteError
from pyengine.sampling import SamplingParams

N = 700
IMPOSSIBLE = np.float32(-1e30)  # beside any other logit its weight is 0
PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {},
    "filters": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95},
    "top-k beyond what it knows": {"top_k": 650},
    "top-p": {"top_p": 0.7},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    "spread": {"xtc_probability": 0.5, "xtc_threshold": 0.01, "top_p": 0.9},
    "n-grams": {"no_repeat_ngram_size": 1},
    "lists": {"bad_token_ids": [4, 5, 6, 7], "logit_bias": {7: 3.0, 9: 2.0, 10: -2.0, 300: 4.0}},
    "allowed": {"allowed_token_ids": list(range(0, N, 3))},
    "stops": {"min_tokens": 90, "stop_token_ids": list(range(0, N, 2))},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_guess_is_the_token_of_the_whole_vocabulary(name: str, masked: bool) -> None:
    rng = np.random.default_rng(3)
    params = SamplingParams(**{"temperature": 1.0, "seed": 5, **PARAMETERS[name]}).resolve()
    sampler, whole = _sampler.Sampler(params, N), _sampler.Sampler(params, N)
    for position in range(60):
        ids = np.sort(rng.permutation(N)[: rng.integers(N // 2, N)]).astype(np.int32)
        logits = rng.normal(0, 2, len(ids)).astype(np.float32)
        scattered = np.full(N, IMPOSSIBLE)
        scattered[ids] = logits
        mask = rng.integers(0, 2**32, (N + 31) // 32, dtype=np.uint32) if masked else None
        token, probability = sampler.guess(logits, position, mask, ids)
        assert token == whole.sample(scattered, position, mask)[0]
        assert token in ids and 0 < probability <= 1
        if name == "sampled" and not masked:
            exact = np.exp(logits.astype(float) - logits.max())
            np.testing.assert_allclose(probability, exact[ids == token][0] / exact.sum(), rtol=1e-3)
        sampler.accept(token)
        whole.accept(token)
    full = rng.normal(0, 2, N).astype(np.float32)
    assert sampler.guess(full, 99)[0] == whole.sample(full, 99)[0]


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_likeliest_is_the_greedy_choice_believed_less_beyond_its_probability(name: str) -> None:
    rng = np.random.default_rng(4)
    params = {"temperature": 1.0, "seed": 5, **PARAMETERS[name]}
    sampler = _sampler.Sampler(SamplingParams(**params).resolve(), N)
    greedy = _sampler.Sampler(SamplingParams(**{**params, "temperature": 0}).resolve(), N)
    # The position's random number, of its first 12 bits: which of 4,096 equally probable tokens it draws.
    dice = _sampler.Sampler(SamplingParams(temperature=1.0, seed=5).resolve(), 4096)
    ids, n_beyond = np.array([i for i in range(N) if i % 5], np.int32), 0
    for position in range(60):
        logits = rng.normal(0, 2, len(ids)).astype(np.float32)
        logits[rng.integers(len(ids))] += np.float32(6)
        token, probability = sampler.guess(logits, position, None, ids, likeliest=True)
        assert token == greedy.guess(logits, position, None, ids)[0]
        if name == "sampled":
            scaled = np.exp(logits.astype(float) - logits.max())
            top, random = 1 / scaled.sum(), (dice.sample(np.zeros(4096, np.float32), position)[0] + np.array([0, 1])) / 4096
            assert random[0] <= sampler.random(position) < random[1] and greedy.random(position) == 0
            n_beyond += random[0] > top
            bounds = np.minimum(top, top * top / np.maximum(random, 1e-9))
            assert bounds[1] * 0.998 <= probability <= bounds[0] * 1.002
        sampler.accept(token)
        greedy.accept(token)
    assert name != "sampled" or 5 < n_beyond < 55


def test_what_is_no_guess_is_refused() -> None:
    sampler = _sampler.Sampler(SamplingParams(temperature=0, bad_token_ids=[3]).resolve(), 10)
    with pytest.raises(InvalidArgumentError, match="every token is banned"):
        sampler.guess(array("f", [1.0]), 0, None, array("i", [3]))
    with pytest.raises(NotFiniteError, match="infinity"):
        sampler.guess(array("f", [1.0, float("inf")]), 0, None, array("i", [3, 4]))
    wrong = ([], [], "0 logits"), ([1, 2], [1], "2 logits"), ([1], [10], "ids of 1 tokens"), ([1], [-1], "ids of 1 tokens")
    for logits, ids, words in wrong:
        with pytest.raises(InvalidArgumentError, match=words):
            sampler.guess(array("f", logits), 0, None, array("i", ids))
    with pytest.raises(InvalidArgumentError, match="vocabulary of 10"):
        sampler.guess(array("f", [1.0] * 9), 0)
    mask = array("I", [2**10 - 1])
    for middle in (2**31 - 1, -(2**31), 10, -1, 1, 9):  # in the vocabulary, too: it is searched by halves
        with pytest.raises(InvalidArgumentError, match="must ascend in a vocabulary of 10"):
            sampler.guess(array("f", [0.0, 1.0, 2.0]), 0, mask, array("i", [1, middle, 9]))
    assert sampler.guess(array("f", [0.0, 0.0]), 0, None, array("i", [3, 4])) == (4, 1.0)
