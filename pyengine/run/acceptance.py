"""How often the guesses of a draft model or head are accepted, and whether asking it pays.

A guess comes with a probability, the network's own, and it stands beside what the n-grams guess at the same position. Both say
much about whether it is accepted: of a draft head's guesses those with a probability above 0.8 came true seven times as often as
those below 0.2, and the number of guesses before it said nothing more (docs/speculation.md).
"""

from __future__ import annotations

from array import array

# A guess falls into a bucket, by the range of its probability and by its relation to the n-grams' guess at the same position:
# they have none that is likely, another one, another one that is likely, the same.
N_RANGES = 8
ALONE, AGAINST, AGAINST_LIKELY, WITH = range(4)
N_BUCKETS = 4 * N_RANGES
# From which chance on the n-grams' guess counts there.
WEAK, LIKELY = 0.25, 0.5
# Prior: what is assumed at first counts like so many guesses of all texts, and what all texts taught like so many of one.
FIRST_WEIGHT, OWN_WEIGHT = 4.0, 3.0
# Decay of what was counted, at one more guess: of one text, and of all.
DECAY, SHARED_DECAY = 0.97, 0.999
SUREST = 0.98

# A position where the network may be asked falls into a place: by the chance of the n-grams' guess there, by the chance of the
# network's first one as far as it is known without asking, and by whether the random number of a sampled token is a late one,
# which draws a token that is not likely, if any.
N_NGRAM_BUCKETS, N_FIRST_BUCKETS = 4, 10
N_PLACES = N_NGRAM_BUCKETS * N_FIRST_BUCKETS * 2
LATE = 0.75
# How often the first guess after a token came true is counted by token, in so many slots (two tokens may share one); the mean of
# all tokens counts like so many guesses there, and what all texts taught like so many of one. Weight of one more in that mean.
N_TOKEN_SLOTS, TOKEN_WEIGHT, OWN_FIRST_WEIGHT = 4096, 4.0, 6.0
MEAN_RATE = 0.01
# Counts by token tell of what texts say. So they are kept apart by salt, of so many salts.
MAX_SALTS = 16
# What asking is assumed to gain before anything is known, in logarithms of the speed, where n-grams know nothing (the likelier
# their guess, the less is left), and like how many questions.
FIRST_GAIN, FIRST_GAIN_WEIGHT = 0.05, 2
# Weight of one more question in the running mean of the gain, when many were asked.
RATE = 0.04
# Positions at a place where asking does not pay between two tries: twice as many each time.
FIRST_PAUSE, LONGEST_PAUSE = 4, 256
# Tokens of an output that has not been read before the first try, where asking does not pay.
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


def place(ngrams: list[tuple[int, float]], first_chance: float, random: float) -> int:
    """The place of a position: what n-grams guess there, the chance of the network's first guess, the position's random number in
    [0, 1), 0 if nothing is drawn."""
    ngram = min(int(ngrams[0][1] * N_NGRAM_BUCKETS), N_NGRAM_BUCKETS - 1) if ngrams else 0
    first = min(int(first_chance * N_FIRST_BUCKETS), N_FIRST_BUCKETS - 1)
    return (ngram * N_FIRST_BUCKETS + first) * 2 + (random > LATE)


def _first_chance(bucket: int) -> float:
    probability = (bucket % N_RANGES + 0.5) / N_RANGES
    return {ALONE: 0.9 * probability, AGAINST: 0.8 * probability, AGAINST_LIKELY: 0.3 * probability}.get(
        bucket // N_RANGES, 0.4 + 0.55 * probability
    )


def _first_gain(place: int) -> float:
    return FIRST_GAIN * (1.0 - (place // (2 * N_FIRST_BUCKETS) + 0.5) / N_NGRAM_BUCKETS)


class FirstGuesses:
    """How often the first guess behind each token came true, in the texts under one salt."""

    def __init__(self) -> None:
        self._n, self._n_accepted = array("f", bytes(4 * N_TOKEN_SLOTS)), array("f", bytes(4 * N_TOKEN_SLOTS))

    def chance(self, token: int, mean: float) -> float:
        slot = token % N_TOKEN_SLOTS
        return (self._n_accepted[slot] + TOKEN_WEIGHT * mean) / (self._n[slot] + TOKEN_WEIGHT)

    def learn(self, token: int, accepted: bool) -> None:
        slot = token % N_TOKEN_SLOTS
        self._n[slot] = self._n[slot] * SHARED_DECAY + 1.0
        self._n_accepted[slot] = self._n_accepted[slot] * SHARED_DECAY + accepted


class SharedAcceptance:
    """What all texts taught about one network's guesses."""

    def __init__(self) -> None:
        # Guesses, and those of them that were accepted, by bucket.
        self._n = [FIRST_WEIGHT] * N_BUCKETS
        self._n_accepted = [FIRST_WEIGHT * _first_chance(bucket) for bucket in range(N_BUCKETS)]
        # First guesses: by salt and the token before, and the share of all that was accepted.
        self._firsts: dict[bytes, FirstGuesses] = {}
        self._mean_first = _first_chance(guess_bucket(0.5, ALONE))
        # By place: the mean gain, of how many questions; positions until the next try, and how many after that.
        self._gain, self._n_asked = [_first_gain(i) for i in range(N_PLACES)], [FIRST_GAIN_WEIGHT] * N_PLACES
        self._n_skip, self._pause = [0] * N_PLACES, [FIRST_PAUSE] * N_PLACES

    def chance(self, bucket: int) -> float:
        """That a guess of this bucket is accepted."""
        return self._n_accepted[bucket] / self._n[bucket]

    def learn(self, bucket: int, accepted: bool) -> None:
        """A guess of this bucket came true, or did not."""
        self._n[bucket] = self._n[bucket] * SHARED_DECAY + 1.0
        self._n_accepted[bucket] = self._n_accepted[bucket] * SHARED_DECAY + accepted

    def first_chance(self, token: int, salt: bytes) -> float:
        """That the network's first guess behind this token of a text under this salt is accepted, as far as that is known before
        it is asked."""
        known = self._firsts.get(salt)
        return self._mean_first if known is None else known.chance(token, self._mean_first)

    def learn_first(self, token: int, salt: bytes, accepted: bool) -> None:
        """The first guess behind this token of a text under this salt came true, or did not."""
        if salt not in self._firsts:
            while len(self._firsts) >= MAX_SALTS:
                self._firsts.pop(next(iter(self._firsts)))
            self._firsts[salt] = FirstGuesses()
        self._firsts[salt].learn(token, accepted)
        self._mean_first += MEAN_RATE * (accepted - self._mean_first)

    def is_worth_reading(self, place: int, n_outputs: int) -> bool:
        """Whether to ask at this place of a text that the network must read first, after so many tokens of its output."""
        return self._gain[place] > 0 or n_outputs >= FIRST_TRY

    def asks(self, place: int) -> bool:
        """Whether to ask at this place. Where that does not pay it is tried now and then, so every position must come here
        once."""
        if self._gain[place] > 0 or self._n_skip[place] == 0:
            return True
        self._n_skip[place] -= 1
        return False

    def note_gain(self, place: int, gain: float) -> None:
        """What asking there brought: the logarithm of how much faster the text is expected to become, less what asking cost."""
        self._n_asked[place] += 1
        self._gain[place] += max(RATE, 1.0 / self._n_asked[place]) * (gain - self._gain[place])
        if self._gain[place] > 0:
            self._pause[place] = FIRST_PAUSE
        else:
            self._n_skip[place] = self._pause[place]
            self._pause[place] = min(2 * self._pause[place], LONGEST_PAUSE)


class _Ratio:
    """How much more often guesses of one text are accepted than those of all texts: both counted, older ones less."""

    def __init__(self, weight: float) -> None:
        self._weight = weight  # of "as often", in guesses
        self._accepted = self._expected = weight

    def times(self, chance: float) -> float:
        """The chance of this text's guess, from that of all texts."""
        return min(chance * self._accepted / self._expected, SUREST)

    def learn(self, accepted: bool, expected: float) -> None:
        """A guess came true or did not, and the chance that all texts gave it."""
        self._accepted += (1.0 - DECAY) * (self._weight - self._accepted) + accepted
        self._expected += (1.0 - DECAY) * (self._weight - self._expected) + expected


class TextAcceptance:
    """What one text taught about one network's guesses, over what all texts did (`shared`), which it teaches, too."""

    def __init__(self, shared: SharedAcceptance) -> None:
        self.shared = shared
        self._ratio = _Ratio(OWN_WEIGHT)
        self._first_ratio = _Ratio(OWN_FIRST_WEIGHT)
        self._silent_until = 0  # the text's length, in tokens, when the network may be asked again

    def chance(self, bucket: int) -> float:
        """That a guess of this bucket is accepted."""
        return self._ratio.times(self.shared.chance(bucket))

    def learn(self, bucket: int, accepted: bool) -> None:
        """A guess of this bucket came true, or did not."""
        self._ratio.learn(accepted, self.shared.chance(bucket))
        self.shared.learn(bucket, accepted)

    def first_chance(self, token: int, salt: bytes) -> float:
        """As of SharedAcceptance, of this text."""
        return self._first_ratio.times(self.shared.first_chance(token, salt))

    def learn_first(self, token: int, salt: bytes, accepted: bool) -> None:
        """The first guess behind this token of the text came true, or did not."""
        self._first_ratio.learn(accepted, self.shared.first_chance(token, salt))
        self.shared.learn_first(token, salt, accepted)

    def asks(self, place: int, n_tokens: int) -> bool:
        """Whether to ask at this place of the text when it has n_tokens tokens. Every position must come here once."""
        return n_tokens >= self._silent_until and self.shared.asks(place)

    def suspend(self, n_tokens: int) -> None:
        """The network failed: it is not asked for a while."""
        self._silent_until = n_tokens + LONGEST_PAUSE
