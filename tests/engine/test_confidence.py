"""Whether a network that guesses is asked, and how far it is believed: given probabilities, outcomes and costs, and no clock."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from pyengine import _draft
from pyengine.run.confidence import AGAINST_LIKELY, ALONE, FIRST_PAUSE, LONGEST_PAUSE, N_PLACES, WITH, Lessons, relation
from pyengine.run.proposer import Chain, Proposer, Reading


def test_a_guess_is_believed_as_often_as_its_like_came_true() -> None:
    rng = random.Random(1)
    all = Lessons()
    truth = {Lessons.cell(p, r): 0.1 + 0.8 * p * (r != AGAINST_LIKELY) for p in (0.1, 0.4, 0.9) for r in (ALONE, AGAINST_LIKELY)}
    for _ in range(20):
        text = Lessons(all)
        for _ in range(100):
            cell = rng.choice(list(truth))
            text.learn(cell, rng.random() < truth[cell])
    for cell, chance in truth.items():
        assert all.chance(cell) == pytest.approx(chance, abs=0.1)  # of some 300 guesses: three standard errors
    worse = Lessons(all)
    before = [worse.chance(cell) for cell in truth]
    for _ in range(40):
        worse.learn(Lessons.cell(0.9, ALONE), False)
    assert all.chance(Lessons.cell(0.9, ALONE)) > 0.5  # the others taught more,
    assert [worse.chance(cell) < 0.3 * chance for cell, chance in zip(truth, before, strict=True)] == [True] * len(truth)
    assert Lessons(all).chance(Lessons.cell(0.1, ALONE)) == before[0]  # and other kinds have learnt nothing


def test_how_a_guess_stands_to_that_of_n_grams() -> None:
    assert relation(5, None) == ALONE == relation(5, (6, 0.1))
    assert relation(5, (5, 0.1)) == WITH == relation(5, (5, 0.9))
    assert relation(5, (6, 0.9)) == AGAINST_LIKELY != relation(5, (6, 0.3))
    assert [Lessons.place(one) for one in ([], [(1, 0.2)], [(1, 0.3)], [(1, 0.6)], [(1, 1.0)])] == [0, 0, 1, 2, 3]
    assert len({Lessons.cell(p / 8, r) for p in range(9) for r in range(4)}) == 32


@pytest.mark.parametrize("worth", [-0.06, 0.02])
def test_what_does_not_pay_is_asked_ever_more_rarely(worth: float) -> None:
    all = Lessons()
    asked = []
    for _ in range(4):
        text = Lessons(all)
        times = []
        for n in range(100, 1100):
            if text.is_worth_asking(0, n):
                times.append(n)
                text.note_worth(0, n, worth)
        asked.append(times)
    if worth > 0:
        assert [len(times) for times in asked] == [1000] * 4
        return
    first = asked[0]
    assert first[12] - first[0] > 2 * FIRST_PAUSE and len(first) < 24  # silent within a dozen questions,
    assert first[-1] - first[-2] == LONGEST_PAUSE  # and then hardly ever heard
    assert len(asked[3]) < len(first) and sum(worth for _ in asked[3]) > -1.0  # a thousand tokens for less than a step
    text = Lessons(all)  # it comes back where it pays
    for n in range(60):
        if text.is_worth_asking(0, n):
            text.note_worth(0, n, 0.3)
    assert text.is_worth_asking(0, 60) and [text.is_worth_asking(i, 60) for i in range(1, N_PLACES)] == [True] * 3
    text.rest(60)
    assert not any(text.is_worth_asking(i, 59 + LONGEST_PAUSE) for i in range(N_PLACES))


def test_a_text_that_was_not_read_waits_where_asking_did_not_pay() -> None:
    all = Lessons()
    assert all.is_worth_asking(0, 0)
    for _ in range(200):
        Lessons(all).note_worth(0, 0, -1.0)
    assert not all.is_worth_asking(0, 5) and all.is_worth_asking(0, 100)


# ------------------------------------------------------------------ chains and decisions


class Script(Proposer):
    """Guesses that a test gives, each with a probability, in steps that take no time but what the test says they take."""

    def __init__(self, experience: _draft.Experience, seconds: float, guesses: list[tuple[int, float]]) -> None:
        super().__init__(experience)
        self.guesses, self.n_steps, self.price = guesses, 0, seconds
        self._seconds = [seconds, seconds]

    def _prepare(self, request: Any) -> bool:
        request.reading = request.reading or Reading(self.lessons(request))
        return True

    def _guess(self, requests: Any, drafts: Any) -> list[tuple[int, float] | None]:
        self.n_steps += 1
        return [self.guesses[len(draft)] if len(draft) < len(self.guesses) else None for draft in drafts]

    def _note_seconds(self, is_later: bool, seconds: float) -> float:
        return self.price

    def memory(self) -> int:
        return 0


def experience_of(row: float) -> _draft.Experience:
    """Steps of 1 s, and so much more for a draft and again for each further row."""
    experience = _draft.Experience()
    rng = random.Random(2)
    for _ in range(3000):
        for rows in (1, rng.randrange(2, 20)):
            experience.note_step(rows, 1.0 + (0.2 + row * (rows - 1) if rows > 1 else 0.0))
    return experience


def a_request(text: list[int], **more: Any) -> Any:
    made = SimpleNamespace(
        reading=None, adapter=None, max_draft=8, n_tokens=len(text), number=0, output=SimpleNamespace(ends=frozenset({99}))
    )
    made.sampler = SimpleNamespace(outputs=text)
    made.tokens = lambda begin, end: text[begin:end]
    vars(made).update(more)
    return made


def believed(proposer: Proposer, adapter: Any = None, n: int = 300) -> None:
    """Guesses are right as often as their probabilities say."""
    rng, all = random.Random(5), proposer.lessons(SimpleNamespace(adapter=adapter))  # type: ignore[arg-type]
    for _ in range(n):
        for probability in (0.05, 0.3, 0.6, 0.95):
            for stands in range(4):
                all.learn(Lessons.cell(probability, stands), rng.random() < probability)


def improved(proposer: Proposer, request: Any, ngrams: list[tuple[int, float]]) -> list[int]:
    drafter = _draft.Drafter(proposer.experience, [])
    ((found,), _) = proposer.improve([request], [drafter], [ngrams], 1)
    return [token for token, _ in found]


SURE = [(10, 0.95), (11, 0.95), (12, 0.95), (13, 0.05), (14, 0.05), (15, 0.05)]


def test_the_likelier_guess_is_taken() -> None:
    proposer = Script(experience_of(0.01), 0.01, SURE)
    believed(proposer)
    assert improved(proposer, a_request([1, 2]), [(20, 0.6)] * 5)[:3] == [10, 11, 12]
    assert improved(proposer, a_request([1, 2]), [(20, 0.9)] * 5) == [20] * 5  # more of it is expected to come true
    proposer.guesses = [(10, 0.3), (11, 0.3), (12, 0.3)]
    for ngrams in ([(20, 0.9), (21, 0.9)], [(20, 0.9)]):
        assert improved(proposer, a_request([1, 2]), ngrams)[: len(ngrams)] == [token for token, _ in ngrams]
    proposer.guesses = [(99, 0.95), (11, 0.95)]
    assert improved(proposer, a_request([1, 2]), []) == [99]  # nothing behind an end


def test_it_runs_ahead_as_far_as_pays() -> None:
    steps = []
    cases = (0.001, 0.0, 0.95), (0.05, 0.02, 0.95), (0.05, 0.02, 0.6), (0.05, 0.02, 0.05), (0.5, 0.02, 0.6)
    for seconds, row, probability in cases:
        proposer = Script(experience_of(row), seconds, [(10 + i, probability) for i in range(8)])
        believed(proposer)
        improved(proposer, a_request([1, 2]), [])
        steps.append(proposer.n_steps)
    assert steps[0] == 8 >= steps[1] > steps[2] > steps[3] == 1 == steps[4]


def run(proposer: Script, accept: float, n_tokens: int, probability: float) -> int:
    """How often it is asked while a text of n_tokens comes, of which `accept` is the share that it guesses right."""
    rng, text = random.Random(7), [1]
    request = a_request(text)
    asked = 0
    while len(text) < n_tokens:
        before = proposer.n_steps
        request.n_tokens = len(text)
        right = rng.random() < accept
        proposer.guesses = [(10, probability)]
        improved(proposer, request, [])
        asked += proposer.n_steps > before
        text.append(10 if right else 11)
    return asked


def test_one_that_is_wrong_goes_silent_and_costs_next_to_nothing() -> None:
    """Whatever it thinks of itself."""
    for probability in (0.3, 0.95):
        proposer = Script(experience_of(0.02), 0.06, [])
        assert run(proposer, 0.02, 400, probability) < 40
        assert run(proposer, 0.02, 400, probability) * 0.06 < 0.01 * 400  # the next text: less than one percent
    proposer = Script(experience_of(0.02), 0.06, [])
    assert run(proposer, 0.9, 400, 0.95) == 399


def test_texts_with_an_adapter_teach_nothing_to_others() -> None:
    class Adapter:
        pass

    proposer, one, two = Script(experience_of(0.02), 0.01, []), Adapter(), Adapter()
    cell = Lessons.cell(0.9, ALONE)
    requests = [a_request([1], adapter=adapter) for adapter in (None, one, two, one)]
    for request in requests:
        proposer._prepare(request)
    first = requests[1].reading.lessons
    for _ in range(50):
        first.learn(cell, False)
        first.note_worth(0, 1, -1.0)
    same = Reading(proposer.lessons(requests[3])).lessons
    assert same.chance(cell) < 0.2 and not same._worth[0] > 0
    for other in (requests[0], requests[2]):
        assert Reading(proposer.lessons(other)).lessons.chance(cell) > 0.7
        assert Reading(proposer.lessons(other)).lessons._worth[0] > 0
    del one, requests, request, first, same
    assert len(proposer._adapted) == 1  # an adapter that is gone takes what was learnt of it along


def test_a_guess_is_learnt_from_whether_it_was_drafted_or_not() -> None:
    proposer = Script(experience_of(0.02), 0.01, SURE)
    text = [1, 2]
    request = a_request(text)
    proposer._prepare(request)
    reading = request.reading
    chain = Chain(request, _draft.Drafter(proposer.experience, []), [])
    for guess in SURE[:3]:
        chain.add(guess)
    reading.asked, reading.n_asked = chain.asked, 2
    learnt: list[bool] = []
    reading.lessons.learn = lambda cell, right: learnt.append(right)
    for token, expected in ((10, [True]), (11, [True, True]), (7, [True, True, False]), (12, [True, True, False])):
        text.append(token)
        request.n_tokens = len(text)
        Proposer._learn(request, reading)
        assert learnt == expected
    chain = Chain(request, _draft.Drafter(proposer.experience, []), [(40, 0.98), (41, 0.98)])
    chain.add((10, 0.05))  # the n-grams' guess is on the draft; its own is learnt from all the same
    assert chain.tokens == [40] and chain.asked[0].guess == 10
