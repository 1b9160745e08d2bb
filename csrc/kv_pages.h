/* kv_pages.h: the pages of the KV cache: who holds them, which are kept for later, which one makes room.
 *
 * A page holds the keys and values of 256 consecutive positions, and the ids of the tokens at these positions. What a
 * page contains depends on its tokens, on all tokens before them, on the adapter that they were computed with (which a salt
 * stands for, see below), and on nothing else (FORMAT.md section 9), so pages form a tree: a page's parent is the page of the
 * 256 positions before it, and the path from the root spells the text.
 *
 *     root -- "Once upon a ... garden" -- "with her ... and"  (in use by two sequences)
 *          |                           \- "and a ... said"    (cached: nobody holds it)
 *          \- "You are a helpful ..."                         (cached)
 *
 * Looking up a prompt is walking down from the root; the last step may share a part of a page. Sequences hold references;
 * a page that nobody holds stays in the tree until its memory is wanted: then the leaf that was let go first makes room.
 * Tokens are compared, never hashes, so one text's keys cannot be taken for another's. Pages below the root also carry the
 * caller's salt: texts under different salts share nothing, and a caller has one for each adapter.
 *
 * Layers with a sliding window have their keys and values in a part of the page of their own, the window part. Sequences hold
 * the window parts of the last pages they have, and of no others: a page that is held may have no window part, and a window
 * part that no sequence holds makes room like a page that nobody holds, the one first that was let go first. A leaf that
 * nobody holds and that has no window part is of no use to anybody, and goes at once. Without such layers the window part is
 * empty, and every page has it.
 *
 * Siblings are a linked list. There are as many as texts in the cache that differ in the same 256 positions, so a lookup
 * reads about as many cache lines as there are cached texts. */
#ifndef PE_KV_PAGES_H
#define PE_KV_PAGES_H

#include "kernels/kernels.h"
#include "pyengine.h"

typedef struct pe_page {
    struct pe_page *parent; /* NULL: not in the tree */
    struct pe_page *first_child, *next_sibling, *previous_sibling;
    struct pe_page *older, *newer; /* in the list of cached pages, or `older` in the list of free ones */
    size_t n_references;           /* sequences that hold this page */
    size_t n_window_references;    /* of these, how many hold its window part */
    size_t n_tokens;               /* positions [0, n_tokens) of the page hold keys and values of tokens[0, n_tokens) */
    uint8_t salt[PE_SALT_BYTES];
    int32_t tokens[PE_CHUNK];
    char *data;   /* (data_bytes) aligned to 64: layers that see everything; NULL if there are none */
    char *window; /* (window_bytes) aligned to 64: layers with a window; NULL if there are none, or the part is gone */
} pe_page;

enum { PE_KEEP_FREE = 8 }; /* pages, and window parts, kept for the next sequence; more go back to the system */

typedef struct pe_page_pool {
    size_t data_bytes, window_bytes; /* of a page */
    size_t max_bytes;                /* 0 = as many as there is memory for */
    size_t n_pages;                  /* allocated: held + cached + free */
    size_t n_cached, n_free;         /* pages that nobody holds: in the tree, and not */
    size_t n_windows;                /* window parts allocated: held + cached + free; 0 if they are empty */
    size_t n_cached_windows, n_free_windows;
    uint64_t n_evicted;              /* cached pages and window parts that had to make room */
    pe_page root;                    /* no page: the parent of first pages */
    pe_page *oldest, *newest;        /* pages of the tree whose window part nobody holds, least recently let go first */
    pe_page *free_pages;             /* without window parts */
    char *free_windows[PE_KEEP_FREE];
} pe_page_pool;

/* Frees every page, of which none may be held. */
void pe_page_pool_destroy(pe_page_pool *pool);
/* Bytes allocated, and bytes of these that sequences hold. */
size_t pe_page_pool_bytes(const pe_page_pool *pool);
size_t pe_page_pool_held_bytes(const pe_page_pool *pool);
/* A page and its window part with one reference each, without tokens and outside the tree; its data is anything. NULL if
 * max_bytes are held or the allocator has none left; what is cached makes room before that. */
pe_page *pe_page_new(pe_page_pool *pool);
/* Whether the page's window part is there. */
static inline bool pe_page_has_window(const pe_page_pool *pool, const pe_page *page) {
    return page->window != NULL || pool->window_bytes == 0;
}
/* One more reference. */
void pe_page_hold(pe_page_pool *pool, pe_page *page);
/* One more reference to the window part, which is there, by somebody who holds the page. */
void pe_page_hold_window(pe_page_pool *pool, pe_page *page);
/* One reference less. The last one leaves the window part of a page of the tree cached, any other free. */
void pe_page_release_window(pe_page_pool *pool, pe_page *page);
/* One reference less, by somebody who does not hold the window part (any more). The last one leaves a page of the tree cached,
 * if it is of use, any other free. */
void pe_page_release(pe_page_pool *pool, pe_page *page);
/* Put a held page into the tree, below `parent` (NULL: the root, under `salt`), which is full. */
void pe_page_link(pe_page_pool *pool, pe_page *page, pe_page *parent, const uint8_t salt[PE_SALT_BYTES]);
/* The child of `parent` (NULL: the root, under `salt`) that shares most leading tokens with tokens (n), at least one;
 * *n_common of them. NULL if no child shares any. */
pe_page *pe_page_find(pe_page_pool *pool, pe_page *parent, const uint8_t salt[PE_SALT_BYTES], const int32_t *tokens,
                      size_t n, size_t *n_common);
/* Another page of the tree with the same parent, salt and 256 tokens as `page`, which is full; NULL if there is none. */
pe_page *pe_page_twin(const pe_page *page);
/* The only holder of `page` (of the tree, without children), and of its window part if it has not let go of that, holds those
 * of its twin from now on; `page` is free. A twin without a window part is given this one. */
void pe_page_merge(pe_page_pool *pool, pe_page *page, pe_page *twin);
/* Of the window parts of held pages that nobody holds, keep the `most` that were let go last. */
void pe_page_pool_trim_windows(pe_page_pool *pool, size_t most);
/* Make room until no more than max_bytes are allocated, as far as there is anything that nobody holds. */
void pe_page_pool_trim(pe_page_pool *pool);
/* Forget everything that is cached and give its memory back, and that of free pages; the number of cached pages. */
size_t pe_page_pool_drop_cached(pe_page_pool *pool);
/* NULL, or what is wrong with the tree and the lists. O(pages). */
const char *pe_page_pool_check(const pe_page_pool *pool);

#endif
