# What the other extension modules call in this one: every module has a copy of the core for itself, and in this one's the thread
# pool runs, kept by contexts, and the kernels are chosen. (In theirs each call would start and end threads, and nobody chooses.)
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint32_t

cdef int create_sampler(void *out, size_t vocab_size, const void *params, char *err) noexcept nogil
cdef int sample_many(void *rows, size_t n_rows, int n_threads, char *err) noexcept nogil
cdef int logprobs(
    const float *logits, size_t vocab_size, int32_t token, const uint32_t *mask, size_t n_top, void *out, char *err
) noexcept nogil
