/* kv_cache.h: keys and values of many sequences, in pages of 256 positions.
 *
 * A page holds all layers and kv heads of one attention chunk, so a kernel always sees a whole chunk in one piece:
 *     page: layer (n_layers) x kv head (n_kv_heads) x chunk      chunk: k, k_scales, v, v_scales as pe_kv_chunk (kernels.h)
 * Pages are counted references: a fork shares its source's pages, and a page that is shared is copied before it is
 * written. Memory grows a page at a time; within a page the operating system hands it out as positions are first
 * touched. */
#ifndef PE_KV_CACHE_H
#define PE_KV_CACHE_H

#include "model.h"

typedef struct pe_kv_cache pe_kv_cache;

pe_status pe_kv_cache_create(pe_kv_cache **out, const pe_model *model, pe_kv_dtype dtype, char *err);
void pe_kv_cache_destroy(pe_kv_cache *cache);
size_t pe_kv_cache_bytes(const pe_kv_cache *cache);

pe_status pe_kv_new(pe_kv_cache *cache, int32_t *out, char *err);
pe_status pe_kv_fork(pe_kv_cache *cache, int32_t source, size_t n_tokens, int32_t *out, char *err);
pe_status pe_kv_truncate(pe_kv_cache *cache, int32_t sequence, size_t n_tokens, char *err);
pe_status pe_kv_drop(pe_kv_cache *cache, int32_t sequence, char *err);
/* SIZE_MAX if there is no such sequence. */
size_t pe_kv_length(const pe_kv_cache *cache, int32_t sequence);

/* Make room for n_more positions after the sequence's length and count them as present. The pages they fall into belong
 * to this sequence alone afterwards. On failure nothing has changed. */
pe_status pe_kv_extend(pe_kv_cache *cache, int32_t sequence, size_t n_more, char *err);

/* One chunk (page) of a live sequence; page < pages that cover its length. */
pe_kv_chunk pe_kv_chunk_at(const pe_kv_cache *cache, int32_t sequence, size_t page, uint32_t layer, uint32_t kv_head);
size_t pe_kv_chunk_bytes(const pe_kv_cache *cache);

#endif
