"""Whether a network that guesses is asked, and how far it is believed: given probabilities, outcomes and costs, and no clock."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from pyengine import _draft
from pyengine.run.acceptance import (
    AGAINST_LIKELY,
    ALONE,
    FIRST_TRY,
    LONGEST_PAUSE,
    MAX_SALTS,
    N_PLACES,
    WITH,
    SharedAcceptance,
    TextAcceptance,
    guess_bucket,
    place,
    relation,
)
from pyengine.run.proposer import DraftBuilder, DraftState, Proposer

SALT = bytes(16)  # of texts without one


def test_a_guess_is_believed_as_often_as_its_like_came_true() -> None:
    rng = random.Random(1)
    shared = SharedAcceptance()
    truth = {guess_bucket(p, r): 0.1 + 0.8 * p * (r != AGAINST_LIKELY) for p in (0.1, 0.4, 0.9) for r in (ALONE, AGAINST_LIKELY)}
    for _ in range(20):
        text = TextAcceptance(shared)
        for _ in range(100):
            bucket = rng.choice(list(truth))
            text.learn(bucket, rng.random() < truth[bucket])
    for bucket, chance in truth.items():
        assert shared.chance(bucket) == pytest.approx(chance, abs=0.1)  # of some 300 guesses: three standard errors
    worse = TextAcceptance(shared)
    before = [worse.chance(bucket) for bucket in truth]
    for _ in range(40):
        worse.learn(guess_bucket(0.9, ALONE), False)
    assert shared.chance(guess_bucket(0.9, ALONE)) > 0.5  # the others taught more,
    assert [worse.chance(bucket) < 0.3 * chance for bucket, chance in zip(truth, before, strict=True)] == [True] * len(truth)
    assert TextAcceptance(shared).chance(guess_bucket(0.1, ALONE)) == before[0]  # and other kinds have learnt nothing


def test_how_a_guess_stands_to_that_of_n_grams() -> None:
    assert relation(5, None) == ALONE == relation(5, (6, 0.1))
    assert relation(5, (5, 0.1)) == WITH == relation(5, (5, 0.9))
    assert relation(5, (6, 0.9)) == AGAINST_LIKELY != relation(5, (6, 0.3))
    assert len({guess_bucket(p / 8, r) for p in range(9) for r in range(4)}) == 32


def test_a_position_has_its_place() -> None:
    ngrams = [[], [(1, 0.3)], [(1, 0.6)], [(1, 1.0)]]
    places = {place(one, (k + 0.5) / 10, random) for one in ngrams for k in range(10) for random in (0.0, 0.9)}
    assert places == set(range(N_PLACES))
    assert place([(1, 0.2)], 0.1, 0.0) == place([], 0.15, 0.74) != place([], 0.15, 0.76)
    assert place([(1, 1.0)], 1.0, 0.99) == N_PLACES - 1


def test_first_guesses_are_counted_by_the_token_before_them() -> None:
    rng = random.Random(3)
    shared = SharedAcceptance()
    truth = {5: 0.9, 6: 0.5, 7: 0.1}
    for _ in range(20):
        text = TextAcceptance(shared)
        for token in truth:
            for _ in range(20):
                text.learn_first(token, SALT, rng.random() < truth[token])
    for token, chance in truth.items():
        assert shared.first_chance(token, SALT) == pytest.approx(chance, abs=0.08)  # of 400: three standard errors
    assert 0.3 < shared.first_chance(8, SALT) < 0.7  # of a token that never was: the mean
    worse = TextAcceptance(shared)
    for _ in range(30):
        worse.learn_first(5, SALT, False)
    before = TextAcceptance(shared).first_chance(6, SALT)
    assert worse.first_chance(6, SALT) < 0.5 * before  # one text tells of itself at other tokens, too


def test_what_is_counted_by_token_stays_under_its_salt() -> None:
    """Or a caller could tell by the time of his own text which tokens others' texts have, and what follows them."""
    shared, others = SharedAcceptance(), b"others".ljust(16)
    text = TextAcceptance(shared)
    for _ in range(100):
        text.learn_first(5, SALT, False)
        text.learn_first(6, SALT, True)
    assert shared.first_chance(5, SALT) < 0.1 < 0.9 < shared.first_chance(6, SALT)
    assert shared.first_chance(5, others) == shared.first_chance(6, others) == shared.first_chance(7, SALT)
    many = [bytes((i,)) * 16 for i in range(5 * MAX_SALTS)]
    for salt in many:
        text.learn_first(5, salt, True)
    assert len(shared._firsts) == MAX_SALTS  # the newest ones'
    assert shared.first_chance(5, many[-1]) > shared.first_chance(5, others) == shared.first_chance(7, others)


def test_a_proposer_counts_tokens_under_the_salt_of_the_text() -> None:
    proposer = Script(stats_of(0.02), 0.01, [])
    for salt, token in ((SALT, 10), (b"others".ljust(16), 11)):
        text = [1]
        request = a_request(text, salt=salt)
        for _ in range(60):
            request.n_tokens, proposer.guesses = len(text), [(10, 0.9)]
            improved(proposer, request, [])
            text += [token, 1]
    found = [proposer._plain.first_chance(1, salt) for salt in (SALT, b"others".ljust(16))]
    assert found[0] > 0.8 and found[1] < 0.3


@pytest.mark.parametrize("gain", [-0.06, 0.02])
def test_what_does_not_pay_is_asked_ever_more_rarely(gain: float) -> None:
    shared = SharedAcceptance()
    asked = []
    for _ in range(4):
        text = TextAcceptance(shared)
        times = []
        for n in range(100, 1100):
            if text.asks(3, n):
                times.append(n)
                shared.note_gain(3, gain)
        asked.append(times)
    if gain > 0:
        assert [len(times) for times in asked] == [1000] * 4
        return
    assert len(asked[0]) < 16  # silent within a dozen questions,
    assert asked[3][-1] - asked[3][-2] == LONGEST_PAUSE + 1  # and then hardly ever heard,
    assert len(asked[3]) <= 4  # whoever's the text
    for n in range(6 * LONGEST_PAUSE):  # it comes back where it pays,
        if text.asks(3, n):
            shared.note_gain(3, 0.3)
    assert text.asks(3, 300) and text.asks(4, 300) and text.asks(3, 301)  # and other places have learnt nothing
    text.suspend(300)
    assert not any(text.asks(i, 299 + LONGEST_PAUSE) for i in range(N_PLACES)) and TextAcceptance(shared).asks(4, 300)
    assert text.asks(4, 300 + LONGEST_PAUSE)


def test_a_text_that_was_not_read_waits_where_asking_did_not_pay() -> None:
    shared = SharedAcceptance()
    assert shared.is_worth_reading(0, 0)
    shared.note_gain(0, -1.0)
    assert not shared.is_worth_reading(0, FIRST_TRY - 1) and shared.is_worth_reading(0, FIRST_TRY)


# ------------------------------------------------------------------ drafts and decisions


class Script(Proposer):
    """Guesses that a test gives, each with a probability, in steps that take no time but what the test says they take."""

    def __init__(self, stats: _draft.DraftStats, seconds: float, guesses: list[tuple[int, float]]) -> None:
        super().__init__(stats)
        self.guesses, self.n_steps, self.price = guesses, 0, seconds
        self._seconds = [seconds, seconds]

    def _prepare(self, request: Any) -> bool:
        request.draft_state = request.draft_state or DraftState(self.acceptance(request))
        return True

    def _guess(self, requests: Any, drafts: Any) -> list[tuple[int, float] | None]:
        self.n_steps += 1
        return [self.guesses[len(draft)] if len(draft) < len(self.guesses) else None for draft in drafts]

    def _note_seconds(self, is_later: bool, seconds: float) -> float:
        return self.price

    def memory(self) -> int:
        return 0


def stats_of(row: float) -> _draft.DraftStats:
    """Steps of 1 s, and so much more for a draft and again for each further row."""
    stats = _draft.DraftStats()
    rng = random.Random(2)
    for _ in range(3000):
        for rows in (1, rng.randrange(2, 20)):
            stats.note_step(rows, 1.0 + (0.2 + row * (rows - 1) if rows > 1 else 0.0))
    return stats


def a_request(text: list[int], **more: Any) -> Any:
    made = SimpleNamespace(
        draft_state=None, adapter=None, salt=SALT, max_draft=8, n_tokens=len(text), output=SimpleNamespace(ends=frozenset({99}))
    )
    made.sampler = SimpleNamespace(outputs=text, random=lambda position: 0.0)
    made.tokens = lambda begin, end: text[begin:end]
    vars(made).update(more)
    return made


def believed(proposer: Proposer, adapter: Any = None, n: int = 300) -> None:
    """Guesses are right as often as their probabilities say."""
    rng, shared = random.Random(5), proposer.acceptance(SimpleNamespace(adapter=adapter))  # type: ignore[arg-type]
    for _ in range(n):
        for probability in (0.05, 0.3, 0.6, 0.95):
            for stands in range(4):
                shared.learn(guess_bucket(probability, stands), rng.random() < probability)


def improved(proposer: Proposer, request: Any, ngrams: list[tuple[int, float]]) -> list[int]:
    drafter = _draft.Drafter(proposer.stats, [])
    ((found,), _) = proposer.improve([request], [drafter], [ngrams], 1)
    return [token for token, _ in found]


SURE = [(10, 0.95), (11, 0.95), (12, 0.95), (13, 0.05), (14, 0.05), (15, 0.05)]


def test_the_likelier_guess_is_taken() -> None:
    proposer = Script(stats_of(0.01), 0.01, SURE)
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
        proposer = Script(stats_of(row), seconds, [(10 + i, probability) for i in range(8)])
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
        proposer = Script(stats_of(0.02), 0.06, [])
        assert run(proposer, 0.02, 400, probability) < 40
        assert run(proposer, 0.02, 400, probability) * 0.06 < 0.01 * 400  # the next text: less than one percent
    proposer = Script(stats_of(0.02), 0.06, [])
    assert run(proposer, 0.9, 400, 0.95) == 399


def test_texts_with_an_adapter_teach_nothing_to_others() -> None:
    class Adapter:
        pass

    proposer, one, two = Script(stats_of(0.02), 0.01, []), Adapter(), Adapter()
    bucket = guess_bucket(0.9, ALONE)
    requests = [a_request([1], adapter=adapter) for adapter in (None, one, two, one)]
    for request in requests:
        proposer._prepare(request)
    first = requests[1].draft_state.acceptance
    for _ in range(50):
        first.learn(bucket, False)
        first.shared.note_gain(0, -1.0)
    same = DraftState(proposer.acceptance(requests[3])).acceptance
    assert same.chance(bucket) < 0.2 and not same.asks(0, 1)
    for other in (requests[0], requests[2]):
        assert DraftState(proposer.acceptance(other)).acceptance.chance(bucket) > 0.7
        assert DraftState(proposer.acceptance(other)).acceptance.asks(0, 1)
    del one, requests, request, first, same
    assert len(proposer._adapted) == 1  # an adapter that is gone takes what was learnt of it along


def test_a_guess_is_learnt_from_whether_it_was_drafted_or_not() -> None:
    proposer = Script(stats_of(0.02), 0.01, SURE)
    text = [1, 2]
    request = a_request(text)
    proposer._prepare(request)
    state = request.draft_state
    builder = DraftBuilder(request, _draft.Drafter(proposer.stats, []), [], 0)
    for guess in SURE[:3]:
        builder.add(guess)
    state.pending, state.pending_at, state.asked_after = builder.guesses, 2, 2
    learnt: list[bool] = []
    first: list[tuple[int, bool]] = []
    state.acceptance.learn = lambda bucket, accepted: learnt.append(accepted)
    state.acceptance.learn_first = lambda token, salt, accepted: first.append((token, accepted))
    for token, expected in ((10, [True]), (11, [True, True]), (7, [True, True, False]), (12, [True, True, False])):
        text.append(token)
        request.n_tokens = len(text)
        Proposer._learn(request, state)
        assert learnt == expected and first == [(2, True)]
    builder = DraftBuilder(request, _draft.Drafter(proposer.stats, []), [(40, 0.98), (41, 0.98)], 0)
    builder.add((10, 0.05))  # the n-grams' guess is on the draft; its own is learnt from all the same
    assert builder.tokens == [40] and builder.guesses[0].token == 10
