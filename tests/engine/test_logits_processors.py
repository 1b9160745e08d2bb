"""A caller's own functions on every row of logits: what they are given, what becomes of what they do, and that it concerns nobody
else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyengine import AsyncEngine, Engine, InvalidArgumentError, NotFiniteError, PyEngineError
from pyengine.run.request import Caller
from pyengine.run.stream import run_all
from pyengine.sampling import SamplingParams

PROMPT = [3 + i * 7 % 50 for i in range(40)]
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 11, "max_tokens": 70, "ignore_eos": True, "logprobs": 2}
needs_guide = pytest.mark.skipif(find_spec("llguidance") is None, reason="the extra guide is not installed")


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    with Engine(tiny_model, n_threads=2) as engine:
        yield engine
        assert engine.check_integrity()["n_sequences"] == 0


def ban(tokens: Any, logits: Any) -> None:
    """The most probable token may not come."""
    logits[int(np.argmax(logits))] = -np.inf


def test_functions_see_the_text_and_the_models_logits(engine: Engine) -> None:
    seen: list[tuple[list[int], np.ndarray]] = []

    def see(tokens: Any, logits: Any) -> bool:
        assert tokens.dtype == np.int32 and logits.dtype == np.float32
        assert not tokens.flags.writeable
        seen.append((tokens.tolist(), logits.copy()))
        return False

    expected = engine.generate(PROMPT, **SAMPLED)
    for name in ("logits_processor", "stopping_criteria"):
        seen.clear()
        if name == "stopping_criteria":
            assert engine.generate(PROMPT, stopping_criteria=[see, see], **SAMPLED).tokens == expected.tokens
            seen = seen[::2]
        else:  # it may return the logits as they are, or as other numbers
            result = engine.generate(
                PROMPT, logits_processor=[lambda t, x: (see(t, x), x)[1], lambda t, x: x.tolist()], **SAMPLED
            )
            assert (result.tokens, result.logprobs, result.text) == (expected.tokens, expected.logprobs, expected.text)
        assert [tokens for tokens, _ in seen] == [[*PROMPT, *expected.tokens[:i]] for i in range(70)]
        model = engine.logits([*PROMPT, *expected.tokens])
        assert np.array_equal([logits for _, logits in seen], model[len(PROMPT) - 1 : -1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_edits_come_before_our_own_steps_and_leave_log_probabilities(engine: Engine, temperature: float) -> None:
    """What a bias and banned tokens do, once by parameters and once by a function, with penalties and filters after both."""
    options = {**SAMPLED, "temperature": temperature, "top_k": 20, "bad_token_ids": [9]}
    bias, bad = {5: 3.0, 17: -2.0, 40: 1.5}, [21, 22, 5]
    expected = engine.generate(PROMPT, logit_bias=bias, **{**options, "bad_token_ids": [*bad, 9]})

    def edit(_: Any, logits: Any) -> None:
        logits[list(bias)] += list(bias.values())
        logits[bad] = -np.inf

    result = engine.generate(PROMPT, logits_processor=edit, **options)
    assert (result.tokens, result.logprobs) == (expected.tokens, expected.logprobs)

    def double(_: Any, logits: Any) -> Any:
        return logits * 2.0  # twice the logit less twice the penalty, at twice the temperature

    penalised = {**SAMPLED, "temperature": temperature, "max_tokens": 30, "frequency_penalty": 0.5}
    twice = {**penalised, "temperature": 2 * temperature, "frequency_penalty": 1.0}
    assert engine.generate(PROMPT, logits_processor=double, **twice).tokens == engine.generate(PROMPT, **penalised).tokens


def test_a_batch_gives_what_each_gives_alone(engine: Engine) -> None:
    prompts = [PROMPT[: 5 + 9 * i] for i in range(4)]
    alone = [engine.generate(prompt, logits_processor=ban, **SAMPLED).tokens for prompt in prompts]
    plain = engine.generate(PROMPT[1:], **SAMPLED).tokens
    caller = Caller()
    requests = engine.requests(caller, prompts, engine.resolve(SamplingParams(logits_processor=ban, **SAMPLED)))
    requests += engine.requests(caller, [PROMPT[1:]], engine.resolve(SamplingParams(**SAMPLED)))
    run_all(engine.scheduler, requests)
    assert [request.result.tokens for request in requests] == [*alone, plain]
    assert requests[0].result.timings.drafted_tokens == 0
    assert [piece.token for piece in engine.stream(PROMPT[:5], logits_processor=ban, **SAMPLED)] == alone[0]

    async def asked() -> list[int]:
        async with AsyncEngine(engine) as served:
            return (await served.generate(PROMPT[:5], logits_processor=ban, **SAMPLED)).tokens

    assert asyncio.run(asked()) == alone[0]


class OwnError(Exception):
    pass


def fail(tokens: Any, logits: Any) -> Any:
    if len(tokens) == len(PROMPT) + 2:
        raise OwnError("of its own")


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits_processor": fail}, OwnError, "of its own"),
    ({"stopping_criteria": fail}, OwnError, "of its own"),
    ({"logits_processor": lambda _, x: x.fill(-np.inf)}, InvalidArgumentError, "every logit -inf"),
    ({"logits_processor": lambda _, x: x.__setitem__(3, np.nan)}, NotFiniteError, "token 3 nan"),
    ({"logits_processor": lambda _, x: x * np.float64(1e300)}, NotFiniteError, "inf"),
    ({"logits_processor": lambda _, x: x[:-1]}, InvalidArgumentError, "logits, one a token"),
    ({"logits_processor": lambda _, x: x[None]}, InvalidArgumentError, r"not float32 \(1, \d+\)"),
    ({"logits_processor": lambda _, x: x > 0}, InvalidArgumentError, "not bool"),
    ({"logits_processor": lambda _, x: "?"}, InvalidArgumentError, "logits, one a token"),
    ({"stopping_criteria": lambda _, x: x.__setitem__(0, 0.0)}, ValueError, "read-only"),
    ({"logits_processor": lambda *_: next(iter(()))}, RuntimeError, "raised StopIteration"),
    ({"stopping_criteria": lambda *_: next(iter(()))}, RuntimeError, "raised StopIteration"),
]


@pytest.mark.parametrize(("options", "error", "match"), WRONG)
def test_what_a_function_raises_ends_its_own_output(
    engine: Engine, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    expected = engine.generate(PROMPT[1:], **SAMPLED).tokens
    caller = Caller()
    requests = engine.requests(caller, [PROMPT], engine.resolve(SamplingParams(**SAMPLED, **options)))
    requests += engine.requests(caller, [PROMPT[1:]], engine.resolve(SamplingParams(**SAMPLED)))
    with pytest.raises(error, match=match):
        run_all(engine.scheduler, requests)
    assert requests[1].result.tokens == expected


def test_a_function_s_stop_iteration_is_no_end_of_a_stream(engine: Engine) -> None:
    def run_out(tokens: Any, _: Any) -> None:
        if len(tokens) == len(PROMPT) + 2:
            raise StopAsyncIteration

    async def streamed() -> None:
        async with AsyncEngine(engine) as served:
            async for _ in served.stream(PROMPT, logits_processor=run_out, **SAMPLED):
                pass

    with pytest.raises(RuntimeError, match="raised StopAsyncIteration"):
        asyncio.run(streamed())
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        list(engine.stream(PROMPT, logits_processor=lambda *_: next(iter(())), **SAMPLED))


class NoError(BaseException):
    pass


def test_what_is_no_error_ends_its_own_output_too(engine: Engine) -> None:
    """Where it cannot be a signal's: outside of the main thread."""
    expected = engine.generate(PROMPT[1:], **SAMPLED).tokens

    def leave(tokens: Any, _: Any) -> None:
        if len(tokens) == len(PROMPT) + 2:
            raise NoError

    async def both() -> list[Any]:
        async with AsyncEngine(engine) as served:
            failing = served.generate(PROMPT, logits_processor=leave, **SAMPLED)
            return await asyncio.gather(served.generate(PROMPT[1:], **SAMPLED), failing, return_exceptions=True)

    other, failed = asyncio.run(both())
    assert other.tokens == expected and isinstance(failed, NoError)


def test_what_a_function_is_given_is_its_own(engine: Engine) -> None:
    """It may keep it, and give it another shape."""
    kept: list[np.ndarray] = []
    expected = engine.generate(PROMPT, logits_processor=ban, **SAMPLED).tokens

    def keep(tokens: Any, logits: Any) -> None:
        kept.append(logits)
        ban(tokens, logits)
        logits.shape = (1, -1)

    assert engine.generate(PROMPT, logits_processor=keep, **SAMPLED).tokens == expected
    model = engine.logits([*PROMPT, *expected])[len(PROMPT) - 1 : -1]
    model[np.arange(70), np.argmax(model, axis=1)] = -np.inf
    assert np.array_equal(np.concatenate(kept), model)


def test_no_engine_may_be_used_by_what_a_function_returns(engine: Engine, tiny_model: Path) -> None:
    class Lazy:
        def __array__(self, *_: Any, **__: Any) -> Any:
            return other.logits(PROMPT)[-1]

    with Engine(tiny_model, n_threads=1) as other, pytest.raises(PyEngineError, match="cannot use an engine"):
        engine.generate(PROMPT, logits_processor=lambda *_: Lazy(), max_tokens=2)


def test_no_engine_may_be_used_in_a_step(engine: Engine, tiny_model: Path) -> None:
    """An error, not a deadlock; and everything goes on afterwards."""
    with Engine(tiny_model, n_threads=1) as other:
        calls = [lambda: engine.score(PROMPT), engine.memory, engine.close, other.memory, lambda: other.score(PROMPT)]

        def use(tokens: Any, _: Any) -> None:
            assert engine.detokenize(tokens.tolist())
            for call in calls:
                with pytest.raises(PyEngineError, match="cannot use an engine"):
                    call()
            used.append(len(tokens))

        used: list[int] = []
        engine.generate(PROMPT, logits_processor=use, max_tokens=2, ignore_eos=True)
        assert used == [len(PROMPT), len(PROMPT) + 1]
        assert other.generate(PROMPT, **SAMPLED).tokens == engine.generate(PROMPT, **SAMPLED).tokens


def test_an_interrupt_in_a_function_is_its_thread_s(engine: Engine) -> None:
    """Ctrl-C falls into the function of a request for which somebody else computes: it ends that call, and the function is asked
    again."""
    options = {**SAMPLED, "max_tokens": 6}
    expected = engine.generate(PROMPT, logits_processor=ban, **options).tokens
    interrupts = [4, 3]

    def interrupted(tokens: Any, logits: Any) -> None:
        ban(tokens, logits)
        if interrupts and len(tokens) == len(PROMPT) + interrupts[-1]:
            interrupts.pop()
            raise KeyboardInterrupt

    stream = engine.stream(PROMPT, logits_processor=interrupted, **options)
    tokens = [next(stream).token]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPT[1:], **SAMPLED)
    assert [*tokens, *(piece.token for piece in stream)] == expected


@needs_guide
def test_a_grammar_comes_after_a_processor(engine: Engine) -> None:
    def like_b(_: Any, logits: Any) -> None:
        logits[engine.tokenize("b", add_bos=False)] += 1000.0
        logits[engine.tokenize("c", add_bos=False)] += 2000.0
        ban(_, logits)

    allowed = {"structured_outputs": {"regex": "[abc]{3}"}, "temperature": 0.0}
    assert engine.generate(PROMPT, logits_processor=like_b, **allowed).text == "bbb"
    with pytest.raises(InvalidArgumentError, match="every token is banned"):
        engine.generate(PROMPT, structured_outputs={"regex": "c"}, logits_processor=like_b)


def test_a_criterion_ends_the_text_before_the_next_token(engine: Engine) -> None:
    whole = engine.generate(PROMPT, **SAMPLED)
    for n in (0, 3):
        stopped = engine.generate(PROMPT, stopping_criteria=lambda tokens, _, n=n: len(tokens) == len(PROMPT) + n, **SAMPLED)
        assert (stopped.tokens, stopped.finish_reason, stopped.stop_reason) == (whole.tokens[:n], "stop", None)
        assert stopped.text == engine.tokenizer.decode(whole.tokens[:n], continuation=True)


@pytest.mark.parametrize("name", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("value", ["f", 1, [ban, 1], {"f": ban}, [ban] * 65], ids=repr)
def test_what_is_no_function_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=name):
        SamplingParams(**{name: value})
