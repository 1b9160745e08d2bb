/* many.c: the calls of many sequences at once, on the pool. */
#include "state.h"
#include "status.h"
#include "threadpool.h"

static void sample_unit(void *arg, size_t unit, int thread) {
    (void)thread;
    pe_sample_row *row = (pe_sample_row *)arg + unit;
    row->err[0] = '\0';
    row->status = pe_sampler_sample(row->sampler, row->logits, row->position, row->mask, &row->result, row->err);
}

/* Whether every sampler is in one row only. Marks are taken off again. */
static bool samplers_are_distinct(pe_sample_row *rows, size_t n_rows) {
    size_t n_marked = 0;
    while (n_marked < n_rows && !rows[n_marked].sampler->marked) rows[n_marked++].sampler->marked = true;
    for (size_t i = 0; i < n_marked; i++) rows[i].sampler->marked = false;
    return n_marked == n_rows;
}

pe_status pe_sample_many(pe_sample_row *rows, size_t n_rows, int n_threads, char *err) {
    if (n_threads < 1 || n_threads > PE_MAX_THREADS)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "n_threads is %d, expected 1 to %d", n_threads, PE_MAX_THREADS);
    if (!samplers_are_distinct(rows, n_rows))
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "a sampler is in two of %zu rows", n_rows);
    if ((size_t)n_threads > n_rows) n_threads = n_rows > 1 ? (int)n_rows : 1;
    pe_status status = pe_pool_acquire(n_threads, err);
    if (status != PE_OK) return status;
    pe_parallel_for(n_threads, n_rows, sample_unit, rows, NULL);
    pe_pool_release();
    return PE_OK;
}
