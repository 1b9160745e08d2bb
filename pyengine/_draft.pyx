# cython: language_level=3, boundscheck=False, wraparound=False
"""Python bindings of csrc/draft.h: drafters, each of one text, and what they share."""

from libc.stddef cimport size_t
from libc.stdint cimport int32_t
from libc.stdlib cimport free, malloc

from pyengine._pe cimport PE_ERR_LEN, check, pe_status

from pyengine.errors import OutOfMemoryError


cdef extern from "draft.h" nogil:
    enum: PE_DRAFT_MAX, PE_DRAFT_MAX_ROWS
    ctypedef struct pe_ngrams
    pe_status pe_ngrams_create(pe_ngrams **out, size_t n_tokens, char *err)
    void pe_ngrams_destroy(pe_ngrams *ngrams)
    ctypedef struct pe_draft_chances:
        float *all
    void pe_draft_chances_init(pe_draft_chances *chances)
    ctypedef struct pe_drafter:
        pe_ngrams *own
        pe_ngrams *others
        pe_draft_chances *shared
    void pe_drafter_read(pe_drafter *drafter, int32_t token, bint is_output)
    size_t pe_drafter_propose(const pe_drafter *drafter, const int32_t *behind, size_t n_behind, size_t most, float least,
                              int32_t *tokens, float *chances)
    ctypedef struct pe_step_costs:
        double scale
        double *cost
    void pe_step_costs_init(pe_step_costs *costs)
    void pe_step_costs_note(pe_step_costs *costs, size_t n_rows, double seconds)
    float pe_draft_least_chance(const pe_step_costs *costs, size_t n_rows)
    double pe_draft_choose(const pe_step_costs *costs, size_t n_rows, size_t n, const float *chances, const size_t *n_proposed,
                           size_t *n_chosen)

MAX_DRAFT = PE_DRAFT_MAX
# Chance of a token that a grammar leaves no choice about. (It may still be spelt with other tokens.)
FORCED_CHANCE = 0.98
cdef float forced_chance = FORCED_CHANCE
MAX_ROWS = PE_DRAFT_MAX_ROWS


cdef class Ngrams:
    """What follows which tokens, with room for the n-grams of about n_tokens tokens."""

    cdef pe_ngrams *ngrams

    def __cinit__(self, size_t n_tokens):
        cdef char[PE_ERR_LEN] err
        check(pe_ngrams_create(&self.ngrams, n_tokens, err), err)

    def __dealloc__(self):
        pe_ngrams_destroy(self.ngrams)


cdef class DraftStats:
    """What all texts of an engine teach: how often guesses are right, and what a step of so many rows costs."""

    cdef pe_draft_chances chances
    cdef pe_step_costs costs

    def __cinit__(self):
        pe_draft_chances_init(&self.chances)
        pe_step_costs_init(&self.costs)

    def note_step(self, size_t n_rows, double seconds) -> None:
        """A step of n_rows took so long; 0 = one of another kind, after which the next is not measured."""
        pe_step_costs_note(&self.costs, n_rows, seconds)

    def seconds(self, size_t n_rows) -> float:
        """What a step of so many rows takes now; the largest one known if n_rows is larger."""
        return self.costs.scale * self.costs.cost[max(1, min(n_rows, PE_DRAFT_MAX_ROWS))]

    def step_costs(self) -> list:
        """Cost of steps of 1, 2, ... MAX_ROWS rows; only their ratios mean something."""
        return [self.costs.cost[r] for r in range(1, PE_DRAFT_MAX_ROWS + 1)]


cdef class Drafter:
    """Guesses at the next tokens of one text. others: n-grams of other texts, read and added to, or None."""

    cdef pe_drafter drafter
    cdef DraftStats stats
    cdef Ngrams own
    cdef Ngrams others
    cdef size_t n_outputs

    def __cinit__(self, DraftStats stats not None, prompt, Ngrams others=None, *, size_t n_tokens=0):
        self.stats, self.others = stats, others
        self.own = Ngrams(max(n_tokens, len(prompt)))
        self.drafter.own, self.drafter.shared = self.own.ngrams, &stats.chances
        self.drafter.others = NULL if others is None else others.ngrams
        for token in prompt:
            pe_drafter_read(&self.drafter, token, False)

    def read(self, list outputs not None) -> None:
        """All that has been put out so far, of which it has read a beginning."""
        cdef int32_t token
        while self.n_outputs < <size_t>len(outputs):
            token = outputs[self.n_outputs]
            self.n_outputs += 1
            pe_drafter_read(&self.drafter, token, True)

    def propose(self, size_t most, list behind=[]) -> list:
        """[(token, chance that it is right if those before it are), ...], at most `most` (and MAX_DRAFT) of them, after the text
        and `behind`, the guesses of somebody else, at most MAX_DRAFT."""
        cdef int32_t given[PE_DRAFT_MAX]
        cdef int32_t tokens[PE_DRAFT_MAX]
        cdef float chances[PE_DRAFT_MAX]
        cdef size_t i, n, n_given = len(behind)
        if n_given > PE_DRAFT_MAX:
            raise ValueError(f"{n_given} guesses, at most {PE_DRAFT_MAX}")
        for i in range(n_given):
            given[i] = behind[i]
        n = pe_drafter_propose(&self.drafter, given, n_given, min(most, PE_DRAFT_MAX), 0.01, tokens, chances)
        return [(tokens[i], chances[i]) for i in range(n)]


cdef size_t propose_forced(tuple forced, size_t most, int32_t *tokens, float *chances) except? 0:
    cdef size_t i, n = min(most, <size_t>len(forced), PE_DRAFT_MAX)
    for i in range(n):
        tokens[i], chances[i] = forced[i], forced_chance
    return n


def plan(DraftStats stats not None, list drafters not None, list mosts not None, size_t n_rows, list forced=None) -> list:
    """A draft for each of drafters, a tuple of at most mosts[i] tokens, so long that the step, of n_rows rows without them,
    yields most tokens a second. forced[i]: tokens that are all but certain; if it is (), the drafter guesses."""
    cdef size_t i, j, n = len(drafters)
    cdef Drafter drafter
    cdef list out = [()] * n
    cdef Py_ssize_t most
    cdef int32_t *to_tokens
    cdef float *to_chances
    cdef float least = pe_draft_least_chance(&stats.costs, n_rows)
    if forced is not None and len(forced) != <Py_ssize_t>n:
        raise ValueError(f"forced tokens of {len(forced)} texts, for {n} drafters")
    if n == 0 or n > n_rows or n_rows >= PE_DRAFT_MAX_ROWS or len(mosts) != <Py_ssize_t>n:
        return out
    cdef int32_t *tokens = <int32_t *>malloc(n * PE_DRAFT_MAX * sizeof(int32_t))
    cdef float *chances = <float *>malloc(n * PE_DRAFT_MAX * sizeof(float))
    cdef size_t n_proposed[PE_DRAFT_MAX_ROWS]
    cdef size_t n_chosen[PE_DRAFT_MAX_ROWS]
    try:
        if tokens == NULL or chances == NULL:
            raise OutOfMemoryError(f"no memory for {n} drafts")
        for i in range(n):
            drafter = drafters[i]
            if drafter is None:
                raise TypeError("a drafter is None")
            most = max(0, min(mosts[i], PE_DRAFT_MAX))
            to_tokens, to_chances = tokens + i * PE_DRAFT_MAX, chances + i * PE_DRAFT_MAX
            if forced is not None and forced[i]:
                n_proposed[i] = propose_forced(forced[i], most, to_tokens, to_chances)
            else:
                n_proposed[i] = pe_drafter_propose(&drafter.drafter, NULL, 0, most, least, to_tokens, to_chances)
        pe_draft_choose(&stats.costs, n_rows, n, chances, n_proposed, n_chosen)
        for i in range(n):
            if n_chosen[i] > 0:
                out[i] = tuple([tokens[i * PE_DRAFT_MAX + j] for j in range(n_chosen[i])])
    finally:
        free(tokens)
        free(chances)
    return out


def choose(DraftStats stats not None, list chances not None, size_t n_rows):
    """How much of each proposal to compute in a step of n_rows rows without them, as `plan` chooses it. chances[i]: for each guess of
    the i-th, at most MAX_DRAFT, the chance that it is right if those before it are. (gain, number of guesses of each); gain is the mean
    over the texts of the logarithm of how much faster they become."""
    cdef size_t i, j, n = len(chances)
    cdef size_t n_proposed[PE_DRAFT_MAX_ROWS]
    cdef size_t n_chosen[PE_DRAFT_MAX_ROWS]
    cdef double gain
    if n == 0 or n > n_rows or n_rows >= PE_DRAFT_MAX_ROWS:
        return 0.0, [0] * n
    cdef float *c_chances = <float *>malloc(n * PE_DRAFT_MAX * sizeof(float))
    if c_chances == NULL:
        raise OutOfMemoryError(f"no memory for {n} drafts")
    try:
        for i in range(n):
            n_proposed[i] = min(<size_t>len(chances[i]), PE_DRAFT_MAX)
            for j in range(n_proposed[i]):
                c_chances[i * PE_DRAFT_MAX + j] = chances[i][j]
        gain = pe_draft_choose(&stats.costs, n_rows, n, c_chances, n_proposed, n_chosen)
    finally:
        free(c_chances)
    return gain, [n_chosen[i] for i in range(n)]
