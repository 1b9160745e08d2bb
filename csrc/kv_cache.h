/* kv_cache.h: keys and values of many sequences, in pages of 256 positions (kv_pages.h).
 *
 * A page holds all layers and kv heads of one attention chunk, so a kernel always sees a whole chunk in one piece:
 *     page: layer x kv head (n_kv_heads) x chunk      chunk: k, k_scales, v, v_scales as pe_kv_chunk (kernels.h)
 * A layer that is a convolution has, instead of keys and values, a row of inputs for each position (256, pad16(dim)), float32, and is one
 * with a window otherwise: whatever shares, copies, takes back or saves positions knows no more of it.
 * A page has two parts: the layers that see everything before them, and those with a window. As a sequence grows, it lets go of the
 * window parts that none of its later queries will see, but for PE_KV_UNDO tokens that it may lose again (a wrong guess of a
 * draft model, logits that an exception took). What needs window parts that are gone, a prefix of another text or a longer way
 * back, goes on from the longest beginning that has those it needs, be it an empty one: what is computed then is the same.
 *
 * The cache alone knows which tokens a sequence holds. A forward extends a sequence, writes keys and values, and then
 * commits the tokens, or rolls back: in between nobody else sees the new positions. Drafted tokens, guesses at what comes
 * next, stay uncommitted behind those: accepted one by one as they come true, forgotten with the next forward. A page that
 * others share, or that the tree remembers with more tokens than the sequence holds, is copied before it is written. */
#ifndef PE_KV_CACHE_H
#define PE_KV_CACHE_H

#include "model.h"

typedef struct pe_kv_cache pe_kv_cache;

/* PE_KV_UNDO tokens can always be taken back. Of the window parts that sequences at work have slid away from, so many for each of
 * them stay cached: others may share the text up to there, or it goes on differently from there. */
enum { PE_KV_UNDO = 64, PE_KV_KEEP_SLID = 16 };

/* A cache without sequences or pages, for a model that outlives it. On failure *out is what there is of it: destroy that, too. */
pe_status pe_kv_cache_create(pe_kv_cache **out, const pe_model *model, pe_kv_dtype dtype, char *err);
/* Ends all sequences. NULL is allowed. */
void pe_kv_cache_destroy(pe_kv_cache *cache);
/* Counts, of all that is allocated now. */
void pe_kv_cache_stats(const pe_kv_cache *cache, pe_cache_stats *out);
/* Memory of how many pages may be allocated, 0 = no limit. Takes back cached pages at once, others as they are released. */
void pe_kv_cache_set_max_pages(pe_kv_cache *cache, size_t max_pages);
/* Gives the pages back that no sequence holds; how many of them were kept for later texts. */
size_t pe_kv_cache_drop_cached(pe_kv_cache *cache);
/* Walks everything: references are counted anew, lists and tree are followed. PE_ERR_SYSTEM and what is wrong. */
pe_status pe_kv_cache_check(const pe_kv_cache *cache, char *err);

/* ------------------------------------------------------------------ sequences */

/* An empty sequence, whose pages nobody else will find. */
pe_status pe_kv_new(pe_kv_cache *cache, int32_t *out, char *err);
/* A sequence that already holds the first *n_matched of `tokens` (n), as many as any page in the tree has. With `keep` its
 * pages join the tree as they are filled, and stay there, cached, when it is dropped. */
pe_status pe_kv_match(pe_kv_cache *cache, const int32_t *tokens, size_t n, const uint8_t salt[PE_SALT_BYTES], bool keep,
                      int32_t *out, size_t *n_matched, char *err);
/* What pe_kv_match would find. Changes nothing. */
size_t pe_kv_match_length(pe_kv_cache *cache, const int32_t *tokens, size_t n, const uint8_t salt[PE_SALT_BYTES]);
/* The first n_tokens of `source`, shared: fewer if it has let go of window parts that they need. */
pe_status pe_kv_fork(pe_kv_cache *cache, int32_t source, size_t n_tokens, int32_t *out, char *err);
/* Keeps the first n_tokens, or fewer if it has let go of window parts that they need. */
pe_status pe_kv_truncate(pe_kv_cache *cache, int32_t sequence, size_t n_tokens, char *err);
/* Ends a sequence, whose id may be given to another one. */
pe_status pe_kv_drop(pe_kv_cache *cache, int32_t sequence, char *err);
/* The first drafted positions that hold `tokens` (n), one after the other, are the sequence's now: *n_accepted. The others
 * are given back. */
pe_status pe_kv_accept(pe_kv_cache *cache, int32_t sequence, const int32_t *tokens, size_t n, size_t *n_accepted,
                       char *err);
/* Positions present, uncommitted ones included; SIZE_MAX if there is no such sequence. */
size_t pe_kv_length(const pe_kv_cache *cache, int32_t sequence);
/* Copies at most `capacity` of the committed tokens; their number. */
size_t pe_kv_tokens(const pe_kv_cache *cache, int32_t sequence, int32_t *out, size_t capacity);

/* ------------------------------------------------------------------ for a forward */

/* Make room for n_more positions after the sequence's length and count them as present, uncommitted. The pages they fall
 * into belong to this sequence alone. On failure nothing has changed. */
pe_status pe_kv_extend(pe_kv_cache *cache, int32_t sequence, size_t n_more, char *err);
/* The first uncommitted position holds `token` now: its keys and values are written. */
void pe_kv_commit(pe_kv_cache *cache, int32_t sequence, int32_t token);
/* The first uncommitted position that is not drafted yet holds `token` now, as a guess. All before it are committed, or
 * drafted. */
void pe_kv_draft(pe_kv_cache *cache, int32_t sequence, int32_t token);
/* Give uncommitted positions back. */
void pe_kv_rollback(pe_kv_cache *cache, int32_t sequence);
/* Give the drafted positions of every sequence back. */
void pe_kv_forget_drafts(pe_kv_cache *cache);

/* One chunk (page) of a live sequence, of a layer with attention; page < pages that cover its length. All NULL if the page's window
 * part is gone, which no query will see. */
pe_kv_chunk pe_kv_chunk_at(const pe_kv_cache *cache, int32_t sequence, size_t page, uint32_t layer, uint32_t kv_head);
/* The inputs of a convolution likewise: (256, pad16(dim)), NULL if they are gone. */
float *pe_kv_inputs_at(const pe_kv_cache *cache, int32_t sequence, size_t page, uint32_t layer);
/* Of each chunk, k, k_scales, v and v_scales together. */
size_t pe_kv_chunk_bytes(const pe_kv_cache *cache);
/* The chunk whose bytes begin at `data`, aligned to 64. */
pe_kv_chunk pe_kv_chunk_in(const pe_kv_cache *cache, char *data);

/* ------------------------------------------------------------------ for kv_snapshot.c */

/* The first page whose window part a sequence of n_tokens keeps: it holds that of this page and of all after it. */
size_t pe_kv_first_window(const pe_kv_cache *cache, size_t n_tokens);
/* A sequence lets go of the window parts of all its pages: its next query is so far away that it sees none of them. That of a page
 * without committed tokens is gone for everybody. */
void pe_kv_drop_windows(pe_kv_cache *cache, int32_t sequence);

#endif
