"""Tasks from JSONL files, an example a line, and how a model does on them.

Two shapes, told apart by their first line, as lm-evaluation-harness scores them:

    {"context": "...", "choices": ["...", ...], "answer": 2}    multiple choice (HellaSwag): which choice is the most likely?
    {"context": "...", "target": "..."}                         last words (LAMBADA): is the target what the model would say?

`ctx`, `query` and `prefix` are other names of the context, `endings` of choices, `label` of answer (a number, also as a string,
or the choice itself). A delimiter, one space by default, stands between the context and what follows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyengine.errors import InvalidArgumentError
from pyengine.eval.likelihood import Likelihood, Pair, encode_pair, likelihoods

if TYPE_CHECKING:
    from pyengine.engine import Engine

CONTEXTS, TARGETS = ("context", "ctx", "query", "prefix"), ("target",)
CHOICES, ANSWERS = ("choices", "endings"), ("answer", "label")
MAX_CHOICES = 1024

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Example:
    """choices: what may follow the context, `answer` of them what should; a target is a single choice."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Task:
    """Examples of a kind: which of the choices, or whether the last words, a model finds likeliest."""

    kind: str  # "multiple_choice" or "last_words"
    examples: list[Example]


@dataclass(frozen=True)
class Metric:
    """A mean over examples, and its standard error (None for a single example)."""

    value: float
    stderr: float | None


# -------------------------------------------------------------------- reading


def read_task(lines: Iterable[str], name: str, limit: int | None = None) -> Task:
    """The first `limit` examples. Raises InvalidArgumentError with name and line for what is none."""
    kind = ""
    examples: list[Example] = []
    for number, line in enumerate(lines, 1):
        if limit is not None and len(examples) == limit:
            break
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            raise InvalidArgumentError(f"{where} is no JSON") from None
        if not isinstance(document, dict):
            raise InvalidArgumentError(f"{where} is no JSON object")
        found = "multiple_choice" if any(key in document for key in CHOICES) else "last_words"
        if kind and found != kind:
            raise InvalidArgumentError(f"{where} is of another shape than the first line")
        kind = found
        examples.append(
            _multiple_choice(document, where) if kind == "multiple_choice" else _last_words(document, where)
        )
    if not examples:
        raise InvalidArgumentError(f"{name} has no examples")
    return Task(kind, examples)


def _field(document: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    given = [name for name in names if name in document]
    if len(given) != 1:
        raise InvalidArgumentError(f"{where} needs one of: {', '.join(names)}")
    return document[given[0]]


def _text(value: object, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{where}: {what} must be text")
    return value


def _multiple_choice(document: Mapping[str, Any], where: str) -> Example:
    context = _text(_field(document, CONTEXTS, where), "the context", where)
    choices = _field(document, CHOICES, where)
    if not isinstance(choices, list) or not 2 <= len(choices) <= MAX_CHOICES or "" in choices:
        raise InvalidArgumentError(f"{where}: choices must be a list of 2 to {MAX_CHOICES} texts that are not empty")
    texts = tuple(_text(choice, "a choice", where) for choice in choices)
    answer = _field(document, ANSWERS, where)
    if isinstance(answer, str):
        digits = answer.isascii() and answer.isdigit() and len(answer) < 5
        answer = texts.index(answer) if answer in texts else int(answer) if digits else None
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(texts):
        raise InvalidArgumentError(f"{where}: the answer must be a choice, or its number from 0 to {len(texts) - 1}")
    return Example(context, texts, answer)


def _last_words(document: Mapping[str, Any], where: str) -> Example:
    context = _text(_field(document, CONTEXTS, where), "the context", where)
    target = _text(_field(document, TARGETS, where), "the target", where)
    if not target:
        raise InvalidArgumentError(f"{where}: the target is empty")
    return Example(context, (target,), 0)


# -------------------------------------------------------------------- scoring


def evaluate(
    engine: Engine, task: Task, *, delimiter: str = " ", progress: Progress | None = None
) -> dict[str, Metric]:
    """The task's metrics by name.

    multiple_choice  acc: the most likely choice is the answer; acc_norm, acc_bytes: the same by log-likelihood per character and
                     per byte
    last_words       acc: every token of the target is the most probable one; perplexity: of targets, exp of the mean negative
                     log-likelihood
    n_cut            not a metric: how many contexts did not fit and lost their beginning (value only)
    Raises what likelihoods raises, and InvalidArgumentError for a choice that adds no token to its context."""
    pairs = [_pair(engine, example, choice, delimiter) for example in task.examples for choice in example.choices]
    scored = iter(likelihoods(engine, pairs, progress))
    results = [[next(scored) for _ in example.choices] for example in task.examples]
    make = _choice_metrics if task.kind == "multiple_choice" else _word_metrics
    n_cut = sum(any(one.n_cut for one in result) for result in results)
    return {**make(task.examples, results), "n_cut": Metric(n_cut, None)}


def _pair(engine: Engine, example: Example, choice: str, delimiter: str) -> Pair:
    return encode_pair(engine, example.context, f"{delimiter}{choice}" if example.context else choice)


def _choice_metrics(examples: Sequence[Example], results: Sequence[Sequence[Likelihood]]) -> dict[str, Metric]:
    def accuracy(length: Callable[[str], int]) -> Metric:
        hits = []
        for example, result in zip(examples, results, strict=True):
            values = [one.logprob / length(choice) for one, choice in zip(result, example.choices, strict=True)]
            hits.append(float(values.index(max(values)) == example.answer))  # of equal ones the first
        return mean(hits)

    return {
        "acc": accuracy(lambda choice: 1),
        "acc_norm": accuracy(len),
        "acc_bytes": accuracy(lambda choice: len(choice.encode("utf-8", "surrogatepass"))),
    }


def _word_metrics(examples: Sequence[Example], results: Sequence[Sequence[Likelihood]]) -> dict[str, Metric]:
    loss = mean([-result[0].logprob for result in results])
    perplexity = math.exp(min(loss.value, 700))
    # the derivative of exp carries the error of the mean over
    error = None if loss.stderr is None else perplexity * loss.stderr
    return {"acc": mean([float(result[0].is_greedy) for result in results]), "perplexity": Metric(perplexity, error)}


def mean(values: Sequence[float]) -> Metric:
    """The mean of a sample and its standard error: the sample's standard deviation over the root of its size."""
    n = len(values)
    value = math.fsum(values) / n
    if n == 1:
        return Metric(value, None)
    return Metric(value, math.sqrt(math.fsum((one - value) ** 2 for one in values) / (n - 1) / n))
