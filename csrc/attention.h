/* attention.h: attention of a slice's queries over the paged cache (FORMAT.md section 8). */
#ifndef PE_ATTENTION_H
#define PE_ATTENTION_H

#include "kv_cache.h"
#include "slice.h"

/* slice->att (n_tokens, q_dim) = attention of the slice's queries over layer `layer` of the cache; the slice's own keys
 * and values are in it. */
pe_status pe_attention(pe_slice *slice, const pe_kv_cache *kv, uint32_t layer, char *err);

/* Floats of thread scratch that it needs. */
size_t pe_attention_scratch_floats(const pe_model *model);

#endif
