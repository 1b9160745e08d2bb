# cython: language_level=3, boundscheck=False, wraparound=False
"""The border of csrc/sampler/sampler.h: validate, release the GIL, one call, one check.

Logits are any C-contiguous one-dimensional float32 buffer (numpy, array.array('f'), memoryview); tokens are int32 buffers.
A `Sampler` serves one sequence and must not be used by two threads at once.
"""

from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from pyengine.errors import InvalidArgumentError, OutOfMemoryError, STATUS_ERRORS


cdef extern from "pyengine.h" nogil:
    enum: PE_ERR_LEN
    ctypedef enum pe_status:
        PE_OK


cdef extern from "sampler/sampler.h" nogil:
    enum: PE_SAMPLER_MAX_TOP_LOGPROBS
    ctypedef struct pe_sampler_params:
        uint64_t seed, sample_index
        double temperature
        int32_t top_k
        double top_p, min_p, typical_p, repetition_penalty, frequency_penalty, presence_penalty
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
    ctypedef struct pe_sample_result:
        int32_t token, n_top
        double logprob
        int32_t *top_ids
        double *top_logprobs
    ctypedef struct pe_sampler
    void pe_sampler_params_init(pe_sampler_params *params)
    pe_status pe_sampler_create(pe_sampler **out, size_t vocab_size, const pe_sampler_params *params, char *err)
    void pe_sampler_destroy(pe_sampler *sampler)
    void pe_sampler_reset(pe_sampler *sampler)
    pe_status pe_sampler_accept(pe_sampler *sampler, int32_t token, bint is_prompt, char *err)
    pe_status pe_sampler_sample(pe_sampler *sampler, const float *logits, uint64_t position, pe_sample_result *out,
                                char *err)
    pe_status pe_logprobs(const float *logits, size_t vocab_size, int32_t token, size_t n_top, pe_sample_result *out,
                          char *err)


cdef extern from "sampler/philox.h" nogil:
    void pe_philox4x32_10(const uint32_t *counter, const uint32_t *key, uint32_t *out)


cdef extern from "sampler/double_math.h" nogil:
    double pe_exp(double x)
    double pe_log(double x)


MAX_TOP_LOGPROBS = PE_SAMPLER_MAX_TOP_LOGPROBS


cdef int check(pe_status status, const char *err) except -1:
    if status != PE_OK:
        raise STATUS_ERRORS[<int>status]((<bytes>err).decode("utf-8", "replace"))
    return 0


cdef list top_of(const pe_sample_result *result):
    return [(result.top_ids[i], result.top_logprobs[i]) for i in range(result.n_top)]


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


cdef class Sampler:
    """Chooses the tokens of one sequence; the law is in csrc/sampler/sampler.h.

    `params` is a `pyengine.sampling.ResolvedParams` (any object with its attributes). `end_ids` are the ids, beside
    `params.stop_token_ids`, that may not come before `params.min_tokens` outputs: the end-of-text tokens.
    `sample_index` numbers the samples of one prompt.
    """

    cdef pe_sampler *sampler
    cdef size_t size
    cdef bint wants_logprobs
    cdef readonly list outputs  # ids that sample_many has chosen, in order
    cdef readonly list logprobs  # (logprob, [(token, logprob), ...]) of each, if they were asked for

    def __cinit__(self, params, size_t vocab_size, *, end_ids=(), uint64_t sample_index=0):
        cdef pe_sampler_params c
        cdef char err[PE_ERR_LEN]
        cdef _Ids bias_ids, allowed, bad, stop
        cdef float[::1] bias_values
        from array import array

        pe_sampler_params_init(&c)
        c.seed, c.sample_index = params.seed, sample_index
        c.temperature, c.top_k = params.temperature, params.top_k
        c.top_p, c.min_p, c.typical_p = params.top_p, params.min_p, params.typical_p
        c.repetition_penalty = params.repetition_penalty
        c.frequency_penalty, c.presence_penalty = params.frequency_penalty, params.presence_penalty
        c.min_tokens = params.min_tokens
        self.wants_logprobs = params.logprobs is not None
        c.n_top_logprobs = params.logprobs if self.wants_logprobs else -1
        bias_ids = _Ids(params.logit_bias)
        bias_values = array("f", [*params.logit_bias.values(), 0.0])
        c.bias_ids, c.bias_values, c.n_bias = bias_ids.data, &bias_values[0], bias_ids.size
        if params.allowed_token_ids is not None:
            allowed = _Ids(params.allowed_token_ids)
            c.allowed, c.n_allowed = allowed.data, allowed.size
        bad = _Ids(params.bad_token_ids)
        c.bad, c.n_bad = bad.data, bad.size
        stop = _Ids((*params.stop_token_ids, *end_ids))
        c.stop, c.n_stop = stop.data, stop.size
        self.size = vocab_size
        self.outputs, self.logprobs = [], []
        check(pe_sampler_create(&self.sampler, vocab_size, &c, err), err)

    def __dealloc__(self):
        pe_sampler_destroy(self.sampler)

    def accept_prompt(self, const int32_t[::1] tokens not None):
        """Tell the sampler of the prompt's tokens, which the repetition penalty counts."""
        cdef char err[PE_ERR_LEN]
        cdef Py_ssize_t i
        for i in range(tokens.shape[0]):
            check(pe_sampler_accept(self.sampler, tokens[i], True, err), err)

    def accept(self, int32_t token):
        """Tell the sampler of a token of the output. `sample` does not do so by itself."""
        cdef char err[PE_ERR_LEN]
        check(pe_sampler_accept(self.sampler, token, False, err), err)

    def reset(self):
        """Forget every accepted token."""
        pe_sampler_reset(self.sampler)

    def sample(self, const float[::1] logits not None, uint64_t position):
        """The token for absolute position `position`: (token, logprob or None, [(token, logprob), ...] or None)."""
        cdef char err[PE_ERR_LEN]
        cdef pe_sample_result result
        cdef pe_status status
        if <size_t> logits.shape[0] != self.size:
            raise InvalidArgumentError(f"{logits.shape[0]} logits for a vocabulary of {self.size}")
        with nogil:
            status = pe_sampler_sample(self.sampler, &logits[0], position, &result, err)
        check(status, err)
        if not self.wants_logprobs:
            return result.token, None, None
        return result.token, result.logprob, top_of(&result)


def sample_many(list rows, list samplers, list positions):
    """Choose samplers[i]'s next token, for absolute position positions[i], from the float32 logits rows[i], and put it into its
    `outputs` and its history.

    Returns a list with None or, for a sampler whose outputs have not changed, the error that belongs to it.
    """
    cdef char err[PE_ERR_LEN]
    cdef pe_sample_result result
    cdef pe_status status
    cdef Sampler sampler
    cdef const float[::1] logits
    cdef uint64_t position
    cdef list errors = []
    for row, sampler, number in zip(rows, samplers, positions):
        logits, position = row, number
        err[0] = 0
        with nogil:
            status = pe_sampler_sample(sampler.sampler, &logits[0], position, &result, err)
        if status == PE_OK:
            status = pe_sampler_accept(sampler.sampler, result.token, False, err)
        if status == PE_OK:
            sampler.outputs.append(result.token)
            if sampler.wants_logprobs:
                sampler.logprobs.append((result.logprob, top_of(&result)))
            errors.append(None)
        else:
            errors.append(STATUS_ERRORS[<int>status]((<bytes>err).decode("utf-8", "replace")))
        logits = None
    return errors


def logprobs(const float[::1] logits not None, int32_t token, size_t n_top=0):
    """Log-softmax of `logits` at `token`, and of the `n_top` most probable tokens: (logprob, [(token, logprob), ...])."""
    cdef char err[PE_ERR_LEN]
    cdef pe_sample_result result
    cdef pe_status status
    cdef size_t n = logits.shape[0]
    cdef const float *data = &logits[0] if n else NULL
    with nogil:
        status = pe_logprobs(data, n, token, n_top, &result, err)
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


def _exp(double x):
    """Test hook: exp as the sampler computes it, x <= 0."""
    return pe_exp(x)


def _log(double x):
    """Test hook: natural logarithm as the sampler computes it, x > 0 and normal."""
    return pe_log(x)
