"""How often the guesses of a draft model or head are accepted, and whether asking it pays.

A guess comes with a probability, the network's own, and it stands beside what the n-grams guess at the same position. Both say
much about whether it is accepted: of a draft head's guesses those with a probability above 0.8 came true seven times as often as
those below 0.2, and the number of guesses before it said nothing more (docs/speculation.md).
"""

from __future__ import annotations

# A guess falls into a bucket, by the range of its probability and by its relation to the n-grams' guess at the same position:
# they have none that is likely, another one, another one that is likely, the same.
N_RANGES = 8
ALONE, AGAINST, AGAINST_LIKELY, WITH = range(4)
# From which chance on the n-grams' guess counts there.
WEAK, LIKELY = 0.25, 0.5
# Prior: what is assumed at first counts like so many guesses of all texts, and what all texts taught like so many of one.
FIRST_WEIGHT, OWN_WEIGHT = 4.0, 3.0
# Decay of what was counted, at one more guess: of one text, and of all.
DECAY, SHARED_DECAY = 0.97, 0.999
SUREST = 0.98

# Positions fall into buckets by the chance of the n-grams' guess there: below a quarter, below a half and so on.
N_NGRAM_BUCKETS = 4
# What asking is assumed to gain before anything is known, in logarithms of the speed.
FIRST_GAIN = 0.05
# Weight of one more question in the running means of the gain: of one text, and of all.
RATE, SHARED_RATE = 0.08, 0.02
# Tokens of a text between two tries where asking does not pay: twice as many each time.
FIRST_PAUSE, LONGEST_PAUSE = 8, 256
# Tokens of an output before the first try, where asking did not pay for other texts.
FIRST_TRY = 32


def relation(token: int, ngram: tuple[int, float] | None) -> int:
    """How a guess stands to the n-grams' (token, chance) at the same position."""
    if ngram is None or (ngram[1] < WEAK and ngram[0] != token):
        return ALONE
    if ngram[0] == token:
        return WITH
    return AGAINST_LIKELY if ngram[1] >= LIKELY else AGAINST


def guess_bucket(probability: float, relation: int) -> int:
    """The bucket of a guess, by the network's own probability and by what n-grams guess."""
    return relation * N_RANGES + max(0, min(int(probability * N_RANGES), N_RANGES - 1))


def ngram_bucket(ngrams: list[tuple[int, float]]) -> int:
    """The bucket of a position, by what n-grams guess there."""
    return min(int(ngrams[0][1] * N_NGRAM_BUCKETS), N_NGRAM_BUCKETS - 1) if ngrams else 0


def _first_chance(bucket: int) -> float:
    probability = (bucket % N_RANGES + 0.5) / N_RANGES
    return {ALONE: 0.9 * probability, AGAINST: 0.8 * probability, AGAINST_LIKELY: 0.3 * probability}.get(
        bucket // N_RANGES, 0.4 + 0.55 * probability
    )


class AcceptanceStats:
    """What texts teach about one network: of one text, over those of all texts like it (`shared`), or (shared=None) of all."""

    def __init__(self, shared: AcceptanceStats | None = None) -> None:
        self.shared = shared
        # Of all texts: guesses, and those accepted, by bucket. Of one text: those accepted, and how many `shared` expected.
        n_buckets = 4 * N_RANGES if shared is None else 0
        self._n = [FIRST_WEIGHT] * n_buckets
        self._n_accepted = [FIRST_WEIGHT * _first_chance(bucket) for bucket in range(n_buckets)]
        self._accepted = self._expected = OWN_WEIGHT
        # By the bucket of the position: the mean gain, and the pause after the next question in vain.
        self._gain: list[float] = [FIRST_GAIN] * N_NGRAM_BUCKETS if shared is None else list(shared._gain)
        self._pause = [FIRST_PAUSE] * N_NGRAM_BUCKETS
        # Length of the text at which it is asked again; of all texts: of an output at which it is first asked.
        self._next_try = [0 if shared is not None else FIRST_TRY] * N_NGRAM_BUCKETS

    def chance(self, bucket: int) -> float:
        """That a guess of this bucket is accepted: as of all texts, times how much more often this one's are."""
        if self.shared is None:
            return self._n_accepted[bucket] / self._n[bucket]
        return min(self.shared.chance(bucket) * self._accepted / self._expected, SUREST)

    def learn(self, bucket: int, accepted: bool) -> None:
        """A guess of this bucket came true, or did not."""
        if self.shared is None:
            self._n[bucket] = self._n[bucket] * SHARED_DECAY + 1.0
            self._n_accepted[bucket] = self._n_accepted[bucket] * SHARED_DECAY + accepted
            return
        self._accepted += (1.0 - DECAY) * (OWN_WEIGHT - self._accepted) + accepted
        self._expected += (1.0 - DECAY) * (OWN_WEIGHT - self._expected) + self.shared.chance(bucket)
        self.shared.learn(bucket, accepted)

    def is_worth_asking(self, ngram_bucket: int, n_tokens: int) -> bool:
        """Whether to ask at such a position of a text of n_tokens tokens."""
        return self._gain[ngram_bucket] > 0 or n_tokens >= self._next_try[ngram_bucket]

    def note_gain(self, ngram_bucket: int, n_tokens: int, gain: float) -> None:
        """What asking there brought: the logarithm of how much faster the text is expected to become, less what asking cost."""
        for stats, rate in ((self, RATE), (self.shared, SHARED_RATE)):
            if stats is not None:
                stats._gain[ngram_bucket] += rate * (gain - stats._gain[ngram_bucket])
        if self._gain[ngram_bucket] > 0:
            self._pause[ngram_bucket] = FIRST_PAUSE
        else:
            self._next_try[ngram_bucket] = n_tokens + self._pause[ngram_bucket]
            self._pause[ngram_bucket] = min(2 * self._pause[ngram_bucket], LONGEST_PAUSE)

    def suspend(self, n_tokens: int) -> None:
        """It failed: nothing is asked for a while."""
        self._gain = [0.0] * N_NGRAM_BUCKETS
        self._next_try = [n_tokens + LONGEST_PAUSE] * N_NGRAM_BUCKETS
