/* context.h: everything mutable of one engine. Only forward.c and context.c look inside; what works on a slice of rows
 * gets the slice and the cache, and no context. */
#ifndef PE_CONTEXT_H
#define PE_CONTEXT_H

#include "kv_cache.h"
#include "slice.h"

struct pe_context {
    const pe_model *model;
    pe_kv_cache *kv;
    pe_slice slice; /* the rows that are being computed */

    float *logits;                    /* (n_logits, pad16(vocab_size)) */
    size_t n_logits, logits_capacity; /* rows */
};

/* Room for n_rows rows of logits; forgets those of the last forward. */
pe_status pe_context_reserve_logits(pe_context *context, size_t n_rows, char *err);

#endif
