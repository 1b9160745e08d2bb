"""sample_many, the rows of many sequences on the pool: what each of them would get alone, and a record that is whole."""

from __future__ import annotations

import dataclasses
from array import array
from typing import Any

import numpy as np
import pytest
from engine.sampler_tools import params, random_logits, random_mask, random_params, words_of
from reference.sampler import log_softmax

from pyengine import _sampler
from pyengine.errors import InvalidArgumentError, PyEngineError


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8])
def test_many_rows_equal_one_after_the_other(n_threads):
    """Random parameters, histories, masks and failures, eight steps long: same tokens, same errors, same log-probabilities."""
    rng = np.random.default_rng(n_threads)
    n, n_rows = 1000, 23
    single, many = [], []
    while len(single) < n_rows:
        try:
            p = dataclasses.replace(random_params(rng, n), logprobs=[None, 0, 3][len(single) % 3])
        except InvalidArgumentError:
            continue
        for samplers in (single, many):
            samplers.append(_sampler.Sampler(p, n, sample_index=len(samplers)))
            samplers[-1].accept_prompt(array("i", range(20)))
    for step in range(8):
        rows = np.stack([random_logits(rng, n) for _ in range(n_rows)])
        rows[int(rng.integers(n_rows))][7] = np.nan
        masks = [None if (mask := random_mask(rng, n)) is None else words_of(mask) for _ in range(n_rows)]
        masks[int(rng.integers(n_rows))] = np.zeros(32, np.uint32)
        expected: list[Any] = []
        for sampler, row, mask in zip(single, rows, masks, strict=True):
            try:
                token, logprob, top = sampler.sample(row, step, mask)
            except PyEngineError as error:
                expected.append((type(error), str(error)))
                continue
            sampler.accept(token)
            expected.append((token, logprob, None if top is None else tuple(top)))
        before = [len(sampler.outputs) for sampler in many]
        errors = _sampler.sample_many(
            rows, range(n_rows), many, [step] * n_rows, [mask if mask is None else [mask] for mask in masks], n_threads
        )
        for i, (error, sampler) in enumerate(zip(errors, many, strict=True)):
            assert len(sampler.outputs) == before[i] + (error is None)
            if error is not None:
                assert expected[i] == (type(error), str(error))
            elif sampler.logprobs is not None:
                assert expected[i] == sampler.logprobs[-1] and len(sampler.logprobs) == len(sampler.outputs)
            else:
                assert expected[i] == (sampler.outputs[-1], None, None)
        assert sum(error is not None for error in errors) >= 1
    assert [s.outputs for s in single] == [s.outputs for s in many]


def test_what_is_accepted_is_recorded():
    sampler = _sampler.Sampler(params(temperature=0, logprobs=1), 3)
    sampler.accept_prompt(array("i", [0, 1]))
    assert sampler.outputs == [] and sampler.logprobs == []
    sampler.accept(2)
    row = np.array([0, 1, 0], np.float32)
    assert _sampler.sample_many(row[None], [0], [sampler], [5]) == [None]
    exact = pytest.approx(float(log_softmax(row)[1]), abs=1e-12)
    assert sampler.outputs == [2, 1] and sampler.logprobs == [None, (1, exact, ((1, exact),))]
    held = sampler.outputs
    sampler.reset()
    assert held == [2, 1] and sampler.outputs == [] and sampler.logprobs == []
    assert _sampler.Sampler(params(), 3).logprobs is None
    assert _sampler.sample_many(np.zeros((0, 3), np.float32), [], [], []) == []


def test_wrong_arguments_of_many_change_nothing():
    good, other = _sampler.Sampler(params(), 40), _sampler.Sampler(params(), 40)
    logits, words = np.zeros((2, 40), np.float32), np.full(2, 2**32 - 1, np.uint32)
    wrong: list[tuple[Any, ...]] = [
        (logits, [0], [good, other], [0, 0]),
        (logits, [0, 1], [good, other], [0]),
        (logits, [0, 1], [good, other], [0, 0], [[words]]),
        (logits, [0, 1], [good, good], [0, 0]),
        (logits[:, :39], [0, 1], [good, other], [0, 0]),
        (logits, [0, 1], [good, other], [0, 0], None, 1, None, [None]),
        (logits, [0], [good], [0], None, 1, None, [logits[0, :39]]),
        (logits, [0], [good], [0], None, 1, None, [np.zeros(40)]),
        (logits, [0], [good], [0], None, 1, [(3,)], [logits[0]]),
        (logits.astype(np.float64), [0, 1], [good, other], [0, 0]),
        (logits.view(np.int32), [0, 1], [good, other], [0, 0]),
        (logits[0], [0, 1], [good, other], [0, 0]),
        (np.zeros((2, 80), np.float32)[:, ::2], [0, 1], [good, other], [0, 0]),
        (None, [0, 1], [good, other], [0, 0]),
        (logits, [0, 2], [good, other], [0, 0]),
        (logits, [0, -1], [good, other], [0, 0]),
        (logits, [0, None], [good, other], [0, 0]),
        (logits, [0, 1], [good, other], [0, -1]),
        (logits, [0, 1], [good, None], [0, 0]),
        (logits, [0, 1], [good, other], [0, 0], [None, [words[:1]]]),
        (logits, [0, 1], [good, other], [0, 0], [None, [words.view(np.float32)]]),
        (logits, [0, 1], [good, other], [0, 0], [None, [words, words]]),
        (logits, [0, 1], [good, other], [0, 0], None, 0),
        (logits, [0, 1], [good, other], [0, 0], None, 257),
        (logits, [0, 1], [good, other], [0, 0], None, 1, [(), (3,)]),
    ]
    for arguments in wrong:
        with pytest.raises((ValueError, TypeError, BufferError, OverflowError)):
            _sampler.sample_many(*arguments)
        assert good.outputs == other.outputs == []
    plain, mask = array("f", bytes(160)), array("I", bytes(8))
    with pytest.raises(ValueError):
        _sampler.sample_many(memoryview(plain).cast("B").cast("f", (1, 40)), [0, 1], [good, other], [0, 0], [[mask], None])
    assert _sampler.sample_many(memoryview(plain).cast("B").cast("f", (1, 40)), [0], [good], [0]) == [None]
    edited = array("f", [0.0] * 39 + [1000.0])
    assert _sampler.sample_many(logits, [0], [other], [0], None, 1, None, [edited]) == [None] and other.outputs == [39]
    edited.append(0.0)
    plain.append(0.0)  # no view of them is held any more
    mask.append(0)
    with pytest.raises(ValueError, match="words of a mask"):
        good.sample(np.zeros(40, np.float32), 0, np.zeros(2, np.float32))
    with pytest.raises(InvalidArgumentError, match="1 words of a mask, expected 2"):
        good.sample(np.zeros(40, np.float32), 0, words[:1])


def test_no_failed_allocation_parts_the_record_from_the_history():
    """Each allocation of a call fails once: whatever comes of it, a sampler has accepted just what it recorded."""
    _testcapi = pytest.importorskip("_testcapi", reason="this Python has no hook to make allocations fail")
    p = params(temperature=0, presence_penalty=2.0, logprobs=2)
    rows = np.stack([np.linspace(0, 5, 500, dtype=np.float32)] * 3)  # each accepted token makes the next one, by its penalty
    n_failed = 0
    for which in range(200):
        samplers = [_sampler.Sampler(p, 500) for _ in range(3)]
        for sampler in samplers:
            for token in range(490, 490 + which % 9):  # lists of many lengths: some appends grow them
                sampler.accept(token)
        positions, recorded = [0] * 3, [len(s.outputs) for s in samplers]
        errors: list[Any] = []
        try:
            try:
                _testcapi.set_nomemory(which, which + 1)
                errors = _sampler.sample_many(rows, range(3), samplers, positions)
            finally:
                _testcapi.remove_mem_hooks()
        except MemoryError:
            n_failed += 1
            _testcapi.remove_mem_hooks()
        n_failed += sum(isinstance(error, MemoryError) for error in errors)
        for i, sampler in enumerate(samplers):
            assert sampler.logprobs is not None and len(sampler.outputs) == len(sampler.logprobs)
            if errors:
                assert len(sampler.outputs) == recorded[i] + (errors[i] is None)
            twin = _sampler.Sampler(p, 500)
            for token in sampler.outputs:
                twin.accept(token)
            assert sampler.sample(rows[0], 1) == twin.sample(rows[0], 1)
    assert n_failed > 5
