/* context.h: everything mutable of one engine. Only forward.c and context.c look inside; what works on a slice of rows
 * gets the slice and the cache, and no context. */
#ifndef PE_CONTEXT_H
#define PE_CONTEXT_H

#include "kv_cache.h"
#include "slice.h"

/* Results of a forward: one row for each row of the batch that wanted it, in order. */
typedef struct pe_rows {
    float *data; /* (capacity, stride) */
    size_t stride, n, capacity;
} pe_rows;

struct pe_context {
    const pe_model *model;
    pe_kv_cache *kv;
    pe_slice slice; /* the rows that are being computed */

    pe_rows logits; /* (n, pad16(vocab_size)), a cache line between two rows */
    pe_rows hidden; /* (n, dim) */
};

/* Room for n_rows rows; none of them is there yet. */
pe_status pe_rows_reserve(pe_rows *rows, size_t n_rows, char *err);
/* Row k, which need not be there yet. */
static inline float *pe_rows_at(const pe_rows *rows, size_t k) { return rows->data + k * rows->stride; }

#endif
