# cython: language_level=3, boundscheck=False, wraparound=False
"""Python bindings of csrc/sampler/sampler.h: validate, release the GIL, one call, one check.

Logits are a float32 buffer (numpy, array.array('f'), memoryview) whose rows are contiguous; tokens are int32 buffers; masks are
uint32 buffers of (vocab_size + 31) // 32 words, where bit i % 32 of word i // 32 is 1 if token i is allowed.
A `Sampler` serves one sequence and must not be used by two threads at once.
"""

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

from pyengine cimport _core
from pyengine._pe cimport PE_ERR_LEN, PE_OK, check, error_of, pe_status

from pyengine.errors import InvalidArgumentError, OutOfMemoryError


cdef extern from "sampler/sampler.h" nogil:
    enum: PE_SAMPLER_MAX_TOP_LOGPROBS
    ctypedef struct pe_id_sequences:
        const int32_t *ids
        const int32_t *lengths
        size_t n
    ctypedef struct pe_sampler_params:
        uint64_t seed, sample_index
        double temperature
        int32_t top_k
        double top_p, min_p, typical_p, repetition_penalty, frequency_penalty, presence_penalty
        double top_n_sigma, dynatemp_range, dynatemp_exponent, xtc_probability, xtc_threshold, dry_multiplier, dry_base
        int32_t repeat_last_n, dry_allowed_length, dry_last_n, no_repeat_ngram_size
        int32_t min_tokens, n_top_logprobs
        const int32_t *bias_ids
        const float *bias_values
        size_t n_bias
        const int32_t *allowed
        size_t n_allowed
        const int32_t *bad
        size_t n_bad
        const int32_t *stop
        size_t n_stop
        pe_id_sequences bad_sequences, breakers
    ctypedef struct pe_sample_result:
        int32_t token, n_top
        double logprob
        int32_t *top_ids
        double *top_logprobs
    ctypedef struct pe_sampler
    void pe_sampler_params_init(pe_sampler_params *params)
    void pe_sampler_destroy(pe_sampler *sampler)
    void pe_sampler_reset(pe_sampler *sampler)
    pe_status pe_sampler_accept(pe_sampler *sampler, int32_t token, bint is_prompt, char *err)
    pe_status pe_sampler_sample(pe_sampler *sampler, const float *logits, uint64_t position, const uint32_t *mask,
                                pe_sample_result *out, char *err)
    ctypedef enum pe_guess_kind:
        PE_GUESS_DRAWN, PE_GUESS_LIKELIEST
    ctypedef struct pe_guess:
        int32_t token
        float probability
    pe_status pe_sampler_guess(pe_sampler *sampler, const float *logits, const int32_t *ids, size_t n, uint64_t position,
                               const uint32_t *mask, pe_guess_kind kind, pe_guess *out, char *err)
    ctypedef struct pe_sample_row:
        pe_sampler *sampler
        const float *logits
        uint64_t position
        const uint32_t *mask
        pe_status status
        char *err
        pe_sample_result result


cdef extern from "sampler/philox.h" nogil:
    void pe_philox4x32_10(const uint32_t *counter, const uint32_t *key, uint32_t *out)
    uint64_t pe_philox_draw(uint64_t seed, uint64_t position, uint64_t sample_index)


cdef extern from "kernels/double_math.h" nogil:
    double pe_exp(double x)
    double pe_log(double x)


MAX_TOP_LOGPROBS = PE_SAMPLER_MAX_TOP_LOGPROBS


cdef list top_of(const pe_sample_result *result):
    return [(result.top_ids[i], result.top_logprobs[i]) for i in range(result.n_top)]


cdef class _Mask:
    """The words of a mask over vocab_size tokens, held until `release`, or this object's end."""

    cdef Py_buffer buffer
    cdef bint held
    cdef const uint32_t *words

    def __cinit__(self, source, size_t vocab_size):
        cdef Py_ssize_t n = (vocab_size + 31) // 32
        PyObject_GetBuffer(source, &self.buffer, PyBUF_FORMAT | PyBUF_ND)
        self.held = True
        given = (<bytes>self.buffer.format).decode() if self.buffer.format != NULL else "B"
        if self.buffer.ndim != 1 or self.buffer.itemsize != 4 or given not in "IiLl":
            raise ValueError(
                f"words of a mask: a one-dimensional buffer of type 'I' is expected, not {given!r} of {self.buffer.ndim} dimensions"
            )
        if self.buffer.shape[0] != n:
            raise InvalidArgumentError(f"{self.buffer.shape[0]} words of a mask, expected {n}")
        self.words = <const uint32_t *>self.buffer.buf

    cdef void release(self):
        if self.held:
            self.held = False
            PyBuffer_Release(&self.buffer)

    def __dealloc__(self):
        self.release()


cdef class _Ids:
    """A C array of token ids, freed with this object."""

    cdef int32_t *data
    cdef size_t size

    def __cinit__(self, ids):
        cdef size_t i = 0
        values = tuple(ids)
        self.size = len(values)
        self.data = <int32_t *> malloc((self.size + 1) * sizeof(int32_t))  # never NULL for an empty list
        if self.data == NULL:
            raise OutOfMemoryError(f"no memory for {len(values)} token ids")
        for value in values:
            self.data[i] = value
            i += 1

    def __dealloc__(self):
        free(self.data)


cdef class Sequences:
    """Sequences of token ids, none of them empty, as samplers take them: made once for all samples of a request."""

    cdef _Ids ids
    cdef _Ids lengths

    def __cinit__(self, sequences):
        self.lengths = _Ids([len(one) for one in sequences])
        self.ids = _Ids([token for one in sequences for token in one])

    cdef void give(self, pe_id_sequences *out):
        out.ids, out.lengths, out.n = self.ids.data, self.lengths.data, self.lengths.size


cdef class Sampler:
    """Chooses the tokens of one sequence; the specification is in csrc/sampler/sampler.h.

    `params` is a `pyengine.sampling.ResolvedParams` (any object with its attributes). `end_ids` are the ids, beside
    `params.stop_token_ids`, that may not come before `params.min_tokens` outputs: the end-of-text tokens. `bad_sequences` and
    `breakers` are sequences of ids, none of them empty: what `params.bad_words` and `params.dry_sequence_breakers` are in tokens.
    `sample_index` numbers the samples of one prompt.
    """

    cdef pe_sampler *sampler
    cdef size_t size
    cdef bint wants_logprobs
    cdef size_t n_top_logprobs
    cdef bint is_greedy
    cdef uint64_t seed
    cdef readonly uint64_t sample_index
    # Every accepted token of the output, oldest first.
    cdef readonly list outputs
    # None unless the parameters ask for them; else, for each of `outputs`, (token, logprob, ((token, logprob), ...)) as it was sampled,
    # or None if it was accepted without being sampled here.
    cdef readonly list logprobs

    def __cinit__(self, params, size_t vocab_size, *, end_ids=(), bad_sequences=(), breakers=(), uint64_t sample_index=0):
        cdef pe_sampler_params c
        cdef char err[PE_ERR_LEN]
        cdef _Ids bias_ids, allowed, bad, stop
        cdef Sequences bad_parts, breaker_parts
        cdef float[::1] bias_values
        from array import array

        pe_sampler_params_init(&c)
        c.seed, c.sample_index = params.seed, sample_index
        self.sample_index, self.seed, self.is_greedy = sample_index, params.seed, params.temperature == 0
        c.temperature, c.top_k = params.temperature, params.top_k
        c.top_p, c.min_p, c.typical_p = params.top_p, params.min_p, params.typical_p
        c.repetition_penalty = params.repetition_penalty
        c.frequency_penalty, c.presence_penalty = params.frequency_penalty, params.presence_penalty
        c.repeat_last_n, c.no_repeat_ngram_size = params.repeat_last_n, params.no_repeat_ngram_size
        c.dry_multiplier, c.dry_base = params.dry_multiplier, params.dry_base
        c.dry_allowed_length, c.dry_last_n = params.dry_allowed_length, params.dry_penalty_last_n
        c.top_n_sigma, c.dynatemp_range, c.dynatemp_exponent = params.top_n_sigma, params.dynatemp_range, params.dynatemp_exponent
        c.xtc_probability, c.xtc_threshold = params.xtc_probability, params.xtc_threshold
        c.min_tokens = params.min_tokens
        self.wants_logprobs = params.logprobs is not None
        self.n_top_logprobs = params.logprobs if self.wants_logprobs else 0
        c.n_top_logprobs = params.logprobs if self.wants_logprobs else -1
        bias = dict(params.logit_bias)  # as many values as ids
        bias_ids = _Ids(bias)
        bias_values = array("f", [*bias.values(), 0.0])
        c.bias_ids, c.bias_values, c.n_bias = bias_ids.data, &bias_values[0], bias_ids.size
        if params.allowed_token_ids is not None:
            allowed = _Ids(params.allowed_token_ids)
            c.allowed, c.n_allowed = allowed.data, allowed.size
        bad = _Ids(params.bad_token_ids)
        c.bad, c.n_bad = bad.data, bad.size
        stop = _Ids((*params.stop_token_ids, *end_ids))
        c.stop, c.n_stop = stop.data, stop.size
        bad_parts = bad_sequences if isinstance(bad_sequences, Sequences) else Sequences(bad_sequences)
        breaker_parts = breakers if isinstance(breakers, Sequences) else Sequences(breakers)
        bad_parts.give(&c.bad_sequences)
        breaker_parts.give(&c.breakers)
        self.size = vocab_size
        self.outputs = []
        self.logprobs = [] if self.wants_logprobs else None
        check(<pe_status>_core.create_sampler(&self.sampler, vocab_size, &c, err), err)

    def __dealloc__(self):
        pe_sampler_destroy(self.sampler)

    def accept_prompt(self, const int32_t[::1] tokens not None):
        """Tell the sampler of the prompt's tokens, which the repetition penalty, DRY and the ban of n-grams count."""
        cdef char err[PE_ERR_LEN]
        cdef Py_ssize_t i
        for i in range(tokens.shape[0]):
            check(pe_sampler_accept(self.sampler, tokens[i], True, err), err)

    def accept(self, int32_t token):
        """Tell the sampler of a token of the output. `sample` does not do so by itself, `sample_many` does."""
        self.record(token, None)

    cdef int record(self, int32_t token, object entry) except -1:
        """Accept `token`, in C and in `outputs` and `logprobs`, or change nothing: what can fail comes first."""
        cdef char err[PE_ERR_LEN]
        cdef object as_object = token
        if token < 0 or <size_t>token >= self.size:
            raise InvalidArgumentError(f"token {token} is not in a vocabulary of {self.size}")
        self.outputs.append(as_object)
        if self.wants_logprobs:
            try:
                self.logprobs.append(entry)
            except MemoryError:
                self.outputs.pop()
                raise
        cdef pe_status status = pe_sampler_accept(self.sampler, token, False, err)
        if status != PE_OK:  # no memory for a longer history
            self.outputs.pop()
            if self.wants_logprobs:
                self.logprobs.pop()
            raise error_of(status, err)
        return 0

    def reset(self):
        """Forget every accepted token. Lists that `outputs` and `logprobs` gave out stay as they are."""
        outputs, logprobs = [], [] if self.wants_logprobs else None
        self.outputs, self.logprobs = outputs, logprobs
        pe_sampler_reset(self.sampler)

    def sample(self, const float[::1] logits not None, uint64_t position, mask=None):
        """The token for absolute position `position`: (token, logprob or None, [(token, logprob), ...] or None).

        Raises NotFiniteError if a logit is an infinity or NaN, InvalidArgumentError if every token is banned.
        """
        cdef char err[PE_ERR_LEN]
        cdef const uint32_t *words = NULL
        cdef _Mask held = None
        cdef pe_sample_result result
        cdef pe_status status
        if <size_t> logits.shape[0] != self.size:
            raise InvalidArgumentError(f"{logits.shape[0]} logits for a vocabulary of {self.size}")
        if mask is not None:
            held = _Mask(mask, self.size)
            words = held.words
        with nogil:
            status = pe_sampler_sample(self.sampler, &logits[0], position, words, &result, err)
        check(status, err)
        if not self.wants_logprobs:
            return result.token, None, None
        return result.token, result.logprob, top_of(&result)

    def random(self, uint64_t position) -> float:
        """The random number in [0, 1) by which the token at this absolute position is drawn; 0 at temperature 0."""
        return 0.0 if self.is_greedy else (pe_philox_draw(self.seed, position, self.sample_index) >> 11) * 2.0 ** -53

    def guess(self, const float[::1] logits not None, uint64_t position, mask=None, const int32_t[::1] ids=None, *,
              bint likeliest=False):
        """What `sample` would choose if only the tokens `ids` (n) int32, ascending, could be chosen, whose logits (n) these are; None =
        all tokens. (token, its probability among them); raises like `sample`. likeliest: the first choice at temperature 0 instead,
        with a probability that is lower where the position's random number lies beyond it (sampler.h)."""
        cdef char err[PE_ERR_LEN]
        cdef const uint32_t *words = NULL
        cdef const int32_t *known = NULL
        cdef _Mask held = None
        cdef pe_guess result
        cdef pe_status status
        cdef size_t n = logits.shape[0]
        if n == 0 or (ids is not None and <size_t>ids.shape[0] != n):
            raise InvalidArgumentError(f"{n} logits for other tokens than those named")
        if ids is not None:
            known = &ids[0]
        if mask is not None:
            held = _Mask(mask, self.size)
            words = held.words
        with nogil:
            status = pe_sampler_guess(self.sampler, &logits[0], known, n, position, words,
                                      PE_GUESS_LIKELIEST if likeliest else PE_GUESS_DRAWN, &result, err)
        check(status, err)
        return result.token, result.probability


# A row of logits to sample from, and the draft that the row after it follows: -1 for the last row of a sampler.
cdef struct row_source:
    const float *logits
    const float *model_logits  # if these are not the model's: those, whose log-probabilities are told
    const uint32_t *mask
    int32_t draft


cdef class _Rows:
    """The rows of one call of `sample_many`: their masks and edited logits, held until `release`, and C arrays for them."""

    cdef list masks
    cdef list edited
    cdef row_source *sources
    cdef pe_sample_row *calls  # one for each sampler that goes on
    cdef Py_ssize_t *owners  # for each of `calls`: number of its sampler,
    cdef Py_ssize_t *cursors  # and of its row

    def __cinit__(self, Py_ssize_t n_rows, Py_ssize_t n_samplers):
        self.masks, self.edited = [], []
        self.sources = <row_source *>calloc(n_rows + 1, sizeof(row_source))
        self.calls = <pe_sample_row *>calloc(n_samplers + 1, sizeof(pe_sample_row))
        self.owners = <Py_ssize_t *>calloc(n_samplers + 1, sizeof(Py_ssize_t))
        self.cursors = <Py_ssize_t *>calloc(n_samplers + 1, sizeof(Py_ssize_t))
        if self.sources == NULL or self.calls == NULL or self.owners == NULL or self.cursors == NULL:
            raise OutOfMemoryError(f"no memory for {n_rows} rows")

    cdef int hold(self, Py_ssize_t row, mask, size_t vocab_size) except -1:
        cdef _Mask held
        if mask is not None:
            held = _Mask(mask, vocab_size)
            self.masks.append(held)
            self.sources[row].mask = held.words
        return 0

    cdef int replace(self, Py_ssize_t row, const float[::1] logits, size_t vocab_size) except -1:
        """Sample this row from other logits (vocab_size)."""
        if <size_t>logits.shape[0] != vocab_size:
            raise InvalidArgumentError(f"{logits.shape[0]} edited logits for a vocabulary of {vocab_size}")
        self.edited.append(logits)
        self.sources[row].model_logits, self.sources[row].logits = self.sources[row].logits, &logits[0]
        return 0

    cdef void release(self):
        cdef _Mask mask
        self.edited.clear()
        for mask in self.masks:
            mask.release()

    def __dealloc__(self):
        free(self.sources)
        free(self.calls)
        free(self.owners)
        free(self.cursors)


def sample_many(
    const float[:, :] logits not None, rows, samplers, positions, masks=None, int n_threads=1, drafts=None, edited=None
) -> list:
    """For every i: sample from row rows[i] of logits (n, vocab_size) float32, accept the token in samplers[i] and record it in its
    `outputs` and `logprobs`.

    positions[i] is the absolute position of the token, masks[i] a list of its mask or None. Tokens are those of `sample`, one call
    after the other, on up to n_threads threads. Returns a list: for each sampler None, or the exception that `sample` would have
    raised; then it has not changed. Raises when the arguments themselves are wrong: then nothing has changed. No signal handler
    runs between sampling a row and recording it.

    drafts[i]: guesses at the tokens from positions[i] on. Sampler i then has 1 + len(drafts[i]) rows, from rows[i] on, and as many
    masks: the row after a guess is sampled, as if it were alone, if the token sampled before it equals the guess. So what is recorded
    is what one call a token would record, only more of it. An exception is that of the first row that fails.

    edited[i]: None, or logits (vocab_size) float32 from which the token of sampler i, which then has no draft, is sampled in place of
    its row; the log-probabilities that it records are still those of the row.
    """
    cdef Sampler sampler
    cdef list owners = list(samplers)
    cdef Py_ssize_t i, j, first, n_own, row = 0, n = len(owners)
    cdef list guesses = [()] * n if drafts is None else [tuple(draft) for draft in drafts]
    cdef list replaced = [None] * n if edited is None else list(edited)
    if not (len(guesses) == n == len(rows) == len(positions) == len(replaced) and (masks is None or len(masks) == n)):
        raise ValueError("rows, samplers, positions, masks, drafts and edited logits differ in length")
    if logits.strides[1] != sizeof(float):
        raise ValueError("a row of logits is not contiguous")
    cdef _Rows all_rows = _Rows(n + sum([len(guess) for guess in guesses]), n)
    try:
        for i in range(n):
            sampler, first, n_own = owners[i], rows[i], 1 + len(guesses[i])
            own_masks = None if masks is None else masks[i]
            if sampler is None:
                raise TypeError("a sampler is None")
            if <size_t>logits.shape[1] != sampler.size:
                raise InvalidArgumentError(f"{logits.shape[1]} logits for a vocabulary of {sampler.size}")
            if first < 0 or first > logits.shape[0] - n_own or (own_masks is not None and len(own_masks) != n_own):
                raise ValueError(f"rows {first} to {first + n_own - 1} of {logits.shape[0]}, or their masks, are missing")
            all_rows.owners[i], all_rows.cursors[i], all_rows.calls[i].position = i, row, positions[i]
            for j in range(n_own):
                all_rows.sources[row].logits = &logits[first + j, 0]
                all_rows.sources[row].draft = guesses[i][j] if j < n_own - 1 else -1
                all_rows.hold(row, None if own_masks is None else own_masks[j], sampler.size)
                if replaced[i] is not None:
                    if n_own > 1:
                        raise ValueError("a sampler has edited logits and a draft")
                    all_rows.replace(row, replaced[i], sampler.size)
                row += 1
        return sample_rows(all_rows, owners, n_threads)
    finally:
        all_rows.release()


cdef list sample_rows(_Rows rows, list samplers, int n_threads):
    """The first row of each sampler; then the next of those whose guess was right; and so on."""
    cdef char err[PE_ERR_LEN]
    cdef pe_status status
    cdef pe_sample_row *call
    cdef row_source *source
    cdef Py_ssize_t i, owner, n_right, n = len(samplers)
    cdef bint is_first = True
    cdef list errors = [None] * n
    while n > 0 or is_first:
        for i in range(n):
            call, source = &rows.calls[i], &rows.sources[rows.cursors[i]]
            call.sampler = (<Sampler>samplers[rows.owners[i]]).sampler
            call.logits, call.mask = source.logits, source.mask
        with nogil:
            status = <pe_status>_core.sample_many(rows.calls, n, n_threads, err)
        if status != PE_OK and not is_first:
            break  # what is recorded is right; the rest is for another call
        check(status, err)
        is_first, n_right = False, 0
        for i in range(n):
            owner = rows.owners[i]
            errors[owner] = record_row(samplers[owner], &rows.calls[i], rows.sources[rows.cursors[i]].model_logits)
            if errors[owner] is None and rows.calls[i].result.token == rows.sources[rows.cursors[i]].draft:
                rows.owners[n_right], rows.cursors[n_right] = owner, rows.cursors[i] + 1
                rows.calls[n_right].position = rows.calls[i].position + 1
                n_right += 1
        n = n_right
    return errors


cdef object record_row(Sampler sampler, pe_sample_row *row, const float *model_logits):
    """None, or the exception of a row that was not recorded. model_logits: those of its log-probabilities; NULL = its own."""
    if row.status == PE_OK and sampler.wants_logprobs and model_logits != NULL:
        row.status = <pe_status>_core.logprobs(
            model_logits, sampler.size, row.result.token, NULL, sampler.n_top_logprobs, &row.result, row.err
        )
    if row.status != PE_OK:
        return error_of(row.status, row.err)
    try:
        entry = (row.result.token, row.result.logprob, tuple(top_of(&row.result))) if sampler.wants_logprobs else None
        sampler.record(row.result.token, entry)
    except MemoryError as error:
        return error
    return None


def logprobs(const float[::1] logits not None, int32_t token, size_t n_top=0, mask=None):
    """Log-softmax of `logits` at `token`, and of the `n_top` most probable tokens: (logprob, [(token, logprob), ...]). mask: the
    latter are of tokens that may come by it, as in `Sampler.sample`."""
    cdef char err[PE_ERR_LEN]
    cdef pe_sample_result result
    cdef pe_status status
    cdef size_t n = logits.shape[0]
    cdef const float *data = &logits[0] if n else NULL
    cdef _Mask held = None if mask is None else _Mask(mask, n)
    cdef const uint32_t *words = NULL if held is None else held.words
    with nogil:
        status = <pe_status>_core.logprobs(data, n, token, words, n_top, &result, err)
    check(status, err)
    return result.logprob, top_of(&result)


def _philox4x32_10(counter, key):
    """Test hook: the four output words of four counter words and two key words."""
    cdef uint32_t c[4]
    cdef uint32_t k[2]
    cdef uint32_t out[4]
    cdef int i
    for i in range(4):
        c[i] = counter[i]
    for i in range(2):
        k[i] = key[i]
    pe_philox4x32_10(c, k, out)
    return out[0], out[1], out[2], out[3]


def exp(double x):
    """exp as the sampler computes it, the same on every machine; x <= 0."""
    return pe_exp(x)


def _log(double x):
    """Test hook: natural logarithm as the sampler computes it, x > 0 and normal."""
    return pe_log(x)
