"""Tasks: log-likelihoods are score()'s, beginnings are computed once, metrics are what their definitions say, and the model class
of lm-evaluation-harness gives the same."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyengine import ContextFullError, Engine, InvalidArgumentError
from pyengine.cli import main
from pyengine.eval.likelihood import Pair, encode_pair, likelihoods
from pyengine.eval.tasks import Example, Metric, Task, evaluate, mean, read_task

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her"
CHOICES = (" friends.", " refrigerator.", "mom and dad, every single day.", " hat é.")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine() as engine:
        yield engine


# ------------------------------------------------------------------ log-likelihoods


def test_likelihoods_are_scores(engine: Engine) -> None:
    pairs = [encode_pair(engine, STORY, choice) for choice in CHOICES]
    for pair, got in zip(pairs, likelihoods(engine, pairs), strict=True):
        score = engine.score([*pair.context, *pair.continuation], start=len(pair.context))
        assert got.logprob == math.fsum(value for value in score.logprobs if value is not None)
        assert got.n_cut == 0
    greedy = engine.generate(pairs[0].context, temperature=0, max_tokens=6).tokens
    told, other = likelihoods(engine, [Pair(pairs[0].context, greedy), Pair(pairs[0].context, [*greedy[:-1], 7])])
    assert told.is_greedy and not other.is_greedy


def test_choices_share_the_beginning(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that forwards are given: the context once, and of each choice what it adds."""
    context = engine.tokenize(STORY * 8)
    pairs = [Pair(context, [7 + i, 8, 9]) for i in range(5)]
    engine.clear_cache()
    computed = 0
    grant = engine.scheduler._grant

    def counting(requests: Any) -> Any:
        nonlocal computed
        grants = grant(requests)
        computed += sum(one.end - one.begin for one in grants)
        return grants

    monkeypatch.setattr(engine.scheduler, "_grant", counting)
    together = likelihoods(engine, pairs)
    assert (
        computed == len(context) + 2 + 4 * 3
    )  # of a choice its tokens but the last, and the one before it for its logits
    engine.clear_cache()
    assert together == [likelihoods(engine, [pair])[0] for pair in pairs]


def test_pairs_are_cut_where_the_contexts_tokens_end(engine: Engine) -> None:
    pair = encode_pair(engine, "The cat ", "sat.")
    assert pair.context == engine.tokenize("The cat") and [*pair.context, *pair.continuation] == engine.tokenize(
        "The cat sat."
    )
    empty = encode_pair(engine, "", "The cat")
    assert empty == Pair([engine.tokenizer.bos_id or 0], engine.tokenize("The cat", add_bos=False))
    with pytest.raises(InvalidArgumentError, match="adds no token"):
        encode_pair(engine, "The cat", "")


def test_a_row_that_comes_again_is_not_counted_twice(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an exception in another thread's step, between taking a row and noting that it was taken."""
    pairs = [Pair(engine.tokenize(STORY), [20, 21, 22])]
    expected = likelihoods(engine, pairs)
    rows_requests = engine.rows_requests

    def twice(caller: Any, ids: Any, positions: Any, take: Any) -> Any:
        def again(position: int, logits: memoryview) -> None:
            take(position, logits)
            take(position, logits)

        return rows_requests(caller, ids, positions, again)

    monkeypatch.setattr(engine, "rows_requests", twice)
    assert likelihoods(engine, pairs) == expected


def test_a_context_that_does_not_fit_loses_its_beginning() -> None:
    with Engine(n_ctx=16) as engine:
        context, choice = engine.tokenize(STORY), [20, 21, 22]
        (long,), (short,) = (
            likelihoods(engine, [Pair(context, choice)]),
            likelihoods(engine, [Pair(context[-14:], choice)]),
        )
        assert long._replace(n_cut=0) == short and long.n_cut == len(context) - 14
        with pytest.raises(ContextFullError, match="17 tokens, the context holds 16"):
            likelihoods(engine, [Pair(context, [5] * 17)])


# ------------------------------------------------------------------ metrics


def test_mean_and_standard_error() -> None:
    assert mean([1.0, 0.0, 1.0, 1.0]) == Metric(0.75, pytest.approx(math.sqrt(0.75 / 3 / 4)))
    assert mean([2.5]) == Metric(2.5, None)


def test_multiple_choice(engine: Engine) -> None:
    def best(by: Any) -> int:
        values = [
            likelihoods(engine, [encode_pair(engine, STORY, " " + choice)])[0].logprob / by(choice)
            for choice in CHOICES
        ]
        return values.index(max(values))

    winners = {"acc": best(lambda _: 1), "acc_norm": best(len), "acc_bytes": best(lambda text: len(text.encode()))}
    assert len(set(winners.values())) > 1  # else this shows nothing
    for answer in range(len(CHOICES)):
        metrics = evaluate(engine, Task("multiple_choice", [Example(STORY, CHOICES, answer)]))
        assert {name: metrics[name].value for name in winners} == {
            name: float(won == answer) for name, won in winners.items()
        }
    both = evaluate(
        engine, Task("multiple_choice", [Example(STORY, CHOICES, winners["acc"]), Example(STORY, CHOICES, 1)])
    )
    assert both["acc"] == Metric(0.5, pytest.approx(0.5))


def test_last_words(engine: Engine) -> None:
    texts = [("One day, a boy went to the", "park"), ("She was very", "happy"), ("The dog said", "xylophone")]
    metrics = evaluate(engine, Task("last_words", [Example(context, (target,), 0) for context, target in texts]))
    scored = likelihoods(engine, [encode_pair(engine, context, " " + target) for context, target in texts])
    losses = [-one.logprob for one in scored]
    assert metrics["perplexity"].value == pytest.approx(math.exp(sum(losses) / 3), rel=1e-12)
    assert metrics["acc"].value == sum(one.is_greedy for one in scored) / 3
    error = math.sqrt(sum((loss - sum(losses) / 3) ** 2 for loss in losses) / 2 / 3)
    assert metrics["perplexity"].stderr == pytest.approx(metrics["perplexity"].value * error)


# ------------------------------------------------------------------ files and the command


def test_shapes() -> None:
    lines = ['{"context": "a", "choices": ["b", "c"], "answer": 1}', "", '{"ctx": "a", "endings": ["b", "c"], "label": "0"}',
             '{"query": "a", "choices": ["b", "c"], "answer": "c"}']  # fmt: skip
    task = read_task(lines, "x")
    assert task.kind == "multiple_choice" and [one.answer for one in task.examples] == [1, 0, 1]
    assert len(read_task(lines, "x", limit=2).examples) == 2
    assert read_task(['{"prefix": "a", "target": "b"}'], "x") == Task("last_words", [Example("a", ("b",), 0)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "x, line 1 is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("3", "no JSON object"),
        ('{"choices": ["a", "b"], "answer": 0}', "needs one of: context"),
        ('{"context": "a", "ctx": "a", "choices": ["a", "b"], "answer": 0}', "needs one of: context"),
        ('{"context": 1, "target": "a"}', "the context must be text"),
        ('{"context": "a", "target": ""}', "the target is empty"),
        ('{"context": "a", "choices": ["a"], "answer": 0}', "2 to 1024 texts"),
        ('{"context": "a", "choices": ["a", 1], "answer": 0}', "a choice must be text"),
        ('{"context": "a", "choices": ["a", "b"], "answer": 2}', "its number from 0 to 1"),
        ('{"context": "a", "choices": ["a", "b"], "answer": true}', "its number from 0 to 1"),
        ("", "x has no examples"),
    ],
)
def test_what_is_no_task(line: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read_task([line], "x")


def test_a_task_has_one_shape() -> None:
    with pytest.raises(InvalidArgumentError, match="x, line 2 is of another shape"):
        read_task(['{"context": "a", "target": "b"}', '{"context": "a", "choices": ["b", "c"], "answer": 0}'], "x")


def test_the_command(tmp_path: Path, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "task.jsonl"
    examples = [{"context": STORY, "choices": CHOICES, "answer": answer} for answer in (0, 1, 2)]
    file.write_text("\n".join(map(json.dumps, examples)))
    assert main(["eval", "--task", str(file), "--json", "-m", str(engine.path)]) == 0
    facts = json.loads(capsys.readouterr().out)
    task = Task("multiple_choice", [Example(STORY, CHOICES, answer) for answer in (0, 1, 2)])
    for name, metric in evaluate(engine, task).items():
        assert facts[name] == metric.value and (name == "n_cut" or facts[f"{name}_stderr"] == metric.stderr)
    assert main(["eval", "--task", str(file), "--limit", "1", "-m", str(engine.path)]) == 0
    assert "examples:    1\n" in capsys.readouterr().out
    assert main(["eval", "--task", str(file), str(file)]) == 2 and main(["eval"]) == 2
    file.write_bytes(b'{"context": "\xff"}')
    assert main(["eval", "--task", str(file)]) == 1 and "no UTF-8" in capsys.readouterr().err


def test_only_a_newline_ends_an_example(tmp_path: Path, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON lets other line separators of Unicode stand in a string as they are."""
    file = tmp_path / "task.jsonl"
    document = {"context": "A cat\u2028and\x85a", "target": "dog"}
    file.write_bytes((json.dumps(document, ensure_ascii=False) + "\r\n").encode() * 2)
    assert main(["eval", "--task", str(file), "--json", "-m", str(engine.path)]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 2


# ------------------------------------------------------------------ lm-evaluation-harness


def test_lm_eval_gives_the_same(engine: Engine) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    from pyengine.eval.lm_eval import PyEngineLM

    def instances(*args: Any) -> list[Any]:
        return [SimpleNamespace(args=one) for one in args]

    lm = PyEngineLM(engine, batch_size=8)
    expected = likelihoods(engine, [encode_pair(engine, STORY, choice) for choice in CHOICES])
    got = lm.loglikelihood(instances(*((STORY, choice) for choice in CHOICES)), disable_tqdm=True)
    assert got == [(one.logprob, one.is_greedy) for one in expected]
    (rolling,) = lm.loglikelihood_rolling(instances((STORY,)), disable_tqdm=True)
    ids = engine.tokenize(STORY, add_bos=False)
    assert rolling == pytest.approx(engine.score([engine.tokenizer.bos_id or 0, *ids]).total, rel=1e-12)
    asked = instances((STORY, {"until": ["."], "max_gen_toks": 12}), ("A", {"do_sample": False}))
    texts = lm.generate_until(asked, disable_tqdm=True)
    assert texts[0] == engine.generate(STORY, stop=".", max_tokens=12, temperature=0).text
    assert texts[1] == engine.generate("A", max_tokens=256, temperature=0).text
    with pytest.raises(InvalidArgumentError, match="length_penalty"):
        lm.generate_until(instances((STORY, {"length_penalty": 2.0})), disable_tqdm=True)
