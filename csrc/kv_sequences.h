/* kv_sequences.h: what a cache is made of, for kv_cache.c, which changes it, kv_check.c, which looks whether it adds up, and
 * kv_snapshot.c, which copies pages out and in. */
#ifndef PE_KV_SEQUENCES_H
#define PE_KV_SEQUENCES_H

#include "kv_pages.h"
#include "model.h"

typedef struct sequence {
    bool used;
    bool keep; /* its pages join the tree */
    uint8_t salt[PE_SALT_BYTES];
    size_t length;    /* positions present */
    size_t committed; /* of these, how many have their tokens in the pages */
    size_t n_drafted; /* behind the committed ones: their tokens stand in the pages too, but count for nobody */
    size_t n_pages, capacity;
    pe_page **pages;     /* (n_pages of capacity); pages[i]->parent is pages[i - 1] where both are in the tree */
    size_t first_window; /* it holds the window parts of pages[first_window] and of all after it */
} sequence;

/* Where in a page a layer is: in which part, and there at which bytes. */
typedef struct layer_place {
    bool is_window;
    size_t offset, n_bytes;
} layer_place;

typedef struct pe_kv_cache {
    const pe_model *model;
    pe_kv_dtype dtype;
    size_t chunk_bytes;
    layer_place *places; /* (n_layers) */
    size_t window;       /* the longest one of the layers in the window part, 0 = there are none */
    pe_page_pool pages;
    sequence *sequences;
    size_t n_sequences; /* entries, used or not */
} pe_kv_cache;

/* Pages that n_tokens fill, the last one perhaps in part. */
static inline size_t pages_of(size_t n_tokens) { return pe_pad(n_tokens, PE_CHUNK) / PE_CHUNK; }

/* The first page of a sequence of n tokens that its next query sees in a layer with a window. */
static inline size_t first_needed(const pe_kv_cache *cache, size_t n) {
    return cache->window != 0 && n + 1 > cache->window ? (n + 1 - cache->window) / PE_CHUNK : 0;
}

#endif
