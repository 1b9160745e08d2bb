"""How far to believe a network that guesses, and whether to ask it at all.

A guess comes with a probability, the network's own, and it stands beside what the n-grams guess at the same place. Both say much
about whether it comes true: of a draft head's guesses those with a probability above 0.8 came true seven times as often as those
below 0.2, and the number of guesses before it said nothing more (docs/speculation.md).
"""

from __future__ import annotations

# Ranges of probability that are told apart.
N_RANGES = 8
# What the n-grams say at the same place: nothing likely, something else, something else that is likely, the same.
ALONE, AGAINST, AGAINST_LIKELY, WITH = range(4)
# From which chance on n-grams count there.
WEAK, LIKELY = 0.25, 0.5
# What is believed at first counts like so many guesses of all texts, and what all texts teach like so many of one.
FIRST_WEIGHT, OWN_WEIGHT = 4.0, 3.0
# Weight of what was learnt when one more guess is.
MEMORY, SHARED_MEMORY = 0.97, 0.999
SUREST = 0.98

# Kinds of places, by the chance of the n-grams' next guess: below a quarter, below a half and so on.
N_PLACES = 4
# What asking is believed to bring before anything is known, in logarithms of the speed.
FIRST_WORTH = 0.05
# Weight of one more question in running means: of one text, and of all.
RATE, SHARED_RATE = 0.08, 0.02
# Tokens of a text between two tries where asking does not pay: twice as many each time.
FIRST_PAUSE, LONGEST_PAUSE = 8, 256
# Tokens of an output before the first try, where asking did not pay for other texts.
FIRST_TRY = 32


def relation(token: int, ngram: tuple[int, float] | None) -> int:
    """How a guess stands to the n-grams' (token, chance) at the same place."""
    if ngram is None or (ngram[1] < WEAK and ngram[0] != token):
        return ALONE
    if ngram[0] == token:
        return WITH
    return AGAINST_LIKELY if ngram[1] >= LIKELY else AGAINST


def _first_chance(cell: int) -> float:
    probability = (cell % N_RANGES + 0.5) / N_RANGES
    return {ALONE: 0.9 * probability, AGAINST: 0.8 * probability, AGAINST_LIKELY: 0.3 * probability}.get(
        cell // N_RANGES, 0.4 + 0.55 * probability
    )


class Lessons:
    """What texts teach about one network: of one text, over those of all texts like it, or (all=None) of all."""

    def __init__(self, all: Lessons | None = None) -> None:
        self.all = all
        # Of all texts: guesses, and those that came true, by cell. Of one text: all of them, and how many were expected to.
        n_cells = 4 * N_RANGES if all is None else 0
        self._n = [FIRST_WEIGHT] * n_cells
        self._n_right = [FIRST_WEIGHT * _first_chance(cell) for cell in range(n_cells)]
        self._came = self._expected = OWN_WEIGHT
        self._worth: list[float] = [FIRST_WORTH] * N_PLACES if all is None else list(all._worth)
        self._pause = [FIRST_PAUSE] * N_PLACES
        # Length of the text at which it is asked again; of all texts: of an output at which it is first asked.
        self._next_try = [0 if all is not None else FIRST_TRY] * N_PLACES

    @staticmethod
    def cell(probability: float, relation: int) -> int:
        """The kind of a guess, by the network's own probability and by what n-grams guess."""
        return relation * N_RANGES + max(0, min(int(probability * N_RANGES), N_RANGES - 1))

    def chance(self, cell: int) -> float:
        """That a guess of this kind comes true: as of all texts, times how much more often this one's do."""
        if self.all is None:
            return self._n_right[cell] / self._n[cell]
        return min(self.all.chance(cell) * self._came / self._expected, SUREST)

    def learn(self, cell: int, right: bool) -> None:
        """A guess of this kind came true, or did not."""
        if self.all is None:
            self._n[cell] = self._n[cell] * SHARED_MEMORY + 1.0
            self._n_right[cell] = self._n_right[cell] * SHARED_MEMORY + right
            return
        self._came += (1.0 - MEMORY) * (OWN_WEIGHT - self._came) + right
        self._expected += (1.0 - MEMORY) * (OWN_WEIGHT - self._expected) + self.all.chance(cell)
        self.all.learn(cell, right)

    @staticmethod
    def place(ngrams: list[tuple[int, float]]) -> int:
        """The kind of a place, by what n-grams guess there."""
        return min(int(ngrams[0][1] * N_PLACES), N_PLACES - 1) if ngrams else 0

    def is_worth_asking(self, place: int, n_tokens: int) -> bool:
        """Whether to ask about such a place of a text of n_tokens tokens."""
        return self._worth[place] > 0 or n_tokens >= self._next_try[place]

    def note_worth(self, place: int, n_tokens: int, worth: float) -> None:
        """What asking there brought: the logarithm of how much faster the text is expected to become, less what asking cost."""
        for lessons, rate in ((self, RATE), (self.all, SHARED_RATE)):
            if lessons is not None:
                lessons._worth[place] += rate * (worth - lessons._worth[place])
        if self._worth[place] > 0:
            self._pause[place] = FIRST_PAUSE
        else:
            self._next_try[place] = n_tokens + self._pause[place]
            self._pause[place] = min(2 * self._pause[place], LONGEST_PAUSE)

    def rest(self, n_tokens: int) -> None:
        """It failed: nothing is asked for a while."""
        self._worth = [0.0] * N_PLACES
        self._next_try = [n_tokens + LONGEST_PAUSE] * N_PLACES
