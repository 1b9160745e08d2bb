# What the other extension modules call in this one: every module has a copy of the core for itself, and in this one's the thread
# pool runs, kept by contexts. (In theirs each call would start and end threads.)

cdef int sample_many(void *rows, size_t n_rows, int n_threads, char *err) noexcept nogil
