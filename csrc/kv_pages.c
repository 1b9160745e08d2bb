/* kv_pages.c: see kv_pages.h. */
#include "kv_pages.h"

#include "platform.h"

#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------ the list of cached pages */

static void cached_append(pe_page_pool *pool, pe_page *page) {
    page->newer = NULL;
    page->older = pool->newest;
    if (pool->newest != NULL) pool->newest->newer = page;
    pool->newest = page;
    if (pool->oldest == NULL) pool->oldest = page;
    pool->n_cached_windows++;
}

static void cached_remove(pe_page_pool *pool, pe_page *page) {
    if (page->older != NULL) page->older->newer = page->newer;
    if (page->newer != NULL) page->newer->older = page->older;
    if (pool->oldest == page) pool->oldest = page->newer;
    if (pool->newest == page) pool->newest = page->older;
    page->older = page->newer = NULL;
    pool->n_cached_windows--;
}

/* ------------------------------------------------------------------ the tree */

void pe_page_link(pe_page_pool *pool, pe_page *page, pe_page *parent, const uint8_t salt[PE_SALT_BYTES]) {
    if (parent == NULL) parent = &pool->root;
    memcpy(page->salt, salt, PE_SALT_BYTES);
    page->parent = parent;
    page->previous_sibling = NULL;
    page->next_sibling = parent->first_child;
    if (parent->first_child != NULL) parent->first_child->previous_sibling = page;
    parent->first_child = page;
}

static void unlink_page(pe_page *page) {
    if (page->previous_sibling != NULL) page->previous_sibling->next_sibling = page->next_sibling;
    if (page->next_sibling != NULL) page->next_sibling->previous_sibling = page->previous_sibling;
    if (page->parent->first_child == page) page->parent->first_child = page->next_sibling;
    page->parent = page->next_sibling = page->previous_sibling = NULL;
}

pe_page *pe_page_find(pe_page_pool *pool, pe_page *parent, const uint8_t salt[PE_SALT_BYTES], const int32_t *tokens,
                      size_t n, size_t *n_common) {
    if (parent == NULL) parent = &pool->root;
    pe_page *best = NULL;
    *n_common = 0;
    for (pe_page *page = parent->first_child; page != NULL && *n_common < PE_CHUNK; page = page->next_sibling) {
        size_t common = 0, most = page->n_tokens < n ? page->n_tokens : n;
        while (common < most && page->tokens[common] == tokens[common]) common++;
        if (common <= *n_common || memcmp(page->salt, salt, PE_SALT_BYTES) != 0) continue;
        best = page;
        *n_common = common;
    }
    return best;
}

pe_page *pe_page_twin(const pe_page *page) {
    for (pe_page *other = page->parent->first_child; other != NULL; other = other->next_sibling)
        if (other != page && other->n_tokens == PE_CHUNK && memcmp(other->salt, page->salt, PE_SALT_BYTES) == 0 &&
            memcmp(other->tokens, page->tokens, sizeof page->tokens) == 0)
            return other;
    return NULL;
}

/* ------------------------------------------------------------------ memory */

size_t pe_page_pool_bytes(const pe_page_pool *pool) {
    return pool->n_pages * pool->data_bytes + pool->n_windows * pool->window_bytes;
}

size_t pe_page_pool_held_bytes(const pe_page_pool *pool) {
    size_t n_pages = pool->n_pages - pool->n_cached - pool->n_free;
    if (pool->window_bytes == 0) return n_pages * pool->data_bytes;
    return n_pages * pool->data_bytes + (pool->n_windows - pool->n_cached_windows - pool->n_free_windows) * pool->window_bytes;
}

static bool fits(const pe_page_pool *pool, size_t n_bytes) {
    return pool->max_bytes == 0 || pe_page_pool_bytes(pool) + n_bytes <= pool->max_bytes;
}

static void page_free(pe_page_pool *pool, pe_page *page) {
    pe_zeros_free(page->data, pool->data_bytes);
    free(page);
    pool->n_pages--;
}

static void window_free(pe_page_pool *pool, char *window) {
    pe_zeros_free(window, pool->window_bytes);
    pool->n_windows--;
}

/* The page loses its window part, which nobody holds and which is in no list. */
static void window_put_free(pe_page_pool *pool, pe_page *page) {
    char *window = page->window;
    page->window = NULL;
    if (window == NULL) return;
    if (pool->n_free_windows == PE_KEEP_FREE || !fits(pool, 0))
        window_free(pool, window);
    else
        pool->free_windows[pool->n_free_windows++] = window;
}

/* A page that nobody holds, outside the tree and in no list. */
static void put_free(pe_page_pool *pool, pe_page *page) {
    window_put_free(pool, page);
    if (pool->n_free == PE_KEEP_FREE || !fits(pool, 0)) {
        page_free(pool, page);
        return;
    }
    page->older = pool->free_pages;
    pool->free_pages = page;
    pool->n_free++;
}

/* Back to the system with a free page or window part; false if there is none. */
static bool shed_free(pe_page_pool *pool) {
    pe_page *page = pool->free_pages;
    if (pool->n_free_windows > 0) {
        window_free(pool, pool->free_windows[--pool->n_free_windows]);
        return true;
    }
    if (page == NULL) return false;
    pool->free_pages = page->older;
    pool->n_free--;
    page_free(pool, page);
    return true;
}

/* Free a cached leaf, and what is of no use without it. */
static void remove_leaf(pe_page_pool *pool, pe_page *page) {
    do {
        pe_page *parent = page->parent;
        if (pe_page_has_window(pool, page)) cached_remove(pool, page);
        unlink_page(page);
        pool->n_cached--;
        put_free(pool, page);
        page = parent;
    } while (page != &pool->root && page->n_references == 0 && page->first_child == NULL &&
             !pe_page_has_window(pool, page));
}

/* A page of the tree loses its window part, which nobody holds. */
static void drop_window(pe_page_pool *pool, pe_page *page) {
    cached_remove(pool, page);
    window_put_free(pool, page);
}

/* Free the leaf, or window part, that was let go first; false if nothing is cached. A cached page's descendants are cached
 * too (who holds a page holds its ancestors), so there is a leaf in the list if there is any cached page. */
static bool evict(pe_page_pool *pool) {
    for (pe_page *page = pool->oldest; page != NULL; page = page->newer) {
        if (page->first_child == NULL && page->n_references == 0) {
            remove_leaf(pool, page);
            return true;
        }
        if (page->window == NULL) continue;
        drop_window(pool, page);
        return true;
    }
    return false;
}

/* Something of the pool's memory becomes available for another use, be it of another size; false if all of it is held. */
static bool make_room(pe_page_pool *pool) {
    if (shed_free(pool)) return true;
    if (!evict(pool)) return false;
    pool->n_evicted++;
    return true;
}

/* Zeros: kernels read whole tiles of positions, and multiply what lies behind the last one by 0. */
static char *part_allocate(pe_page_pool *pool, size_t n_bytes) {
    return fits(pool, n_bytes) ? pe_zeros_alloc(n_bytes) : NULL;
}

/* A free page, or a new one; NULL if there is no room. */
static pe_page *take_page(pe_page_pool *pool) {
    pe_page *page = pool->free_pages;
    if (page != NULL) {
        pool->free_pages = page->older;
        pool->n_free--;
        page->older = NULL;
        return page;
    }
    page = calloc(1, sizeof *page);
    if (page == NULL) return NULL;
    if (pool->data_bytes > 0 && (page->data = part_allocate(pool, pool->data_bytes)) == NULL) {
        free(page);
        return NULL;
    }
    pool->n_pages++;
    return page;
}

/* The same, of window parts. */
static char *take_window(pe_page_pool *pool) {
    if (pool->n_free_windows > 0) return pool->free_windows[--pool->n_free_windows];
    char *window = part_allocate(pool, pool->window_bytes);
    pool->n_windows += window != NULL;
    return window;
}

/* ------------------------------------------------------------------ pages */

pe_page *pe_page_new(pe_page_pool *pool) {
    pe_page *page;
    while ((page = take_page(pool)) == NULL)
        if (!make_room(pool)) return NULL;
    while (pool->window_bytes > 0 && (page->window = take_window(pool)) == NULL) {
        if (make_room(pool)) continue;
        put_free(pool, page);
        return NULL;
    }
    page->n_references = page->n_window_references = 1;
    page->n_tokens = 0;
    return page;
}

void pe_page_hold(pe_page_pool *pool, pe_page *page) {
    if (page->n_references++ == 0) pool->n_cached--;
}

void pe_page_hold_window(pe_page_pool *pool, pe_page *page) {
    if (page->n_window_references++ == 0) cached_remove(pool, page);
}

void pe_page_release_window(pe_page_pool *pool, pe_page *page) {
    if (--page->n_window_references > 0) return;
    if (page->parent == NULL)
        window_put_free(pool, page);
    else
        cached_append(pool, page);
    pe_page_pool_trim(pool);
}

void pe_page_release(pe_page_pool *pool, pe_page *page) {
    if (--page->n_references > 0) return;
    if (page->parent == NULL) {
        put_free(pool, page);
        return;
    }
    pool->n_cached++;
    if (page->first_child == NULL && !pe_page_has_window(pool, page)) remove_leaf(pool, page);
    pe_page_pool_trim(pool);
}

void pe_page_merge(pe_page_pool *pool, pe_page *page, pe_page *twin) {
    pe_page_hold(pool, twin);
    if (page->n_window_references == 0) {
        /* the holder has let go of the window part already */
    } else if (pe_page_has_window(pool, twin)) {
        pe_page_hold_window(pool, twin);
    } else {
        twin->window = page->window;
        twin->n_window_references = 1;
        page->window = NULL;
    }
    unlink_page(page);
    page->n_references = page->n_window_references = 0;
    put_free(pool, page);
}

void pe_page_pool_trim_windows(pe_page_pool *pool, size_t most) {
    size_t n = 0;
    for (pe_page *page = pool->newest, *older; page != NULL; page = older) {
        older = page->older;
        if (page->n_references > 0 && ++n > most) drop_window(pool, page);
    }
}

void pe_page_pool_trim(pe_page_pool *pool) {
    while (!fits(pool, 0) && (shed_free(pool) || evict(pool))) continue;
}

size_t pe_page_pool_drop_cached(pe_page_pool *pool) {
    size_t n_cached = pool->n_cached;
    while (evict(pool)) continue;
    while (shed_free(pool)) continue;
    return n_cached - pool->n_cached;
}

void pe_page_pool_destroy(pe_page_pool *pool) { pe_page_pool_drop_cached(pool); }

/* ------------------------------------------------------------------ check */

/* The lists of what nobody holds. */
static const char *check_lists(const pe_page_pool *pool) {
    size_t n_cached = 0, n_free = 0;
    for (const pe_page *page = pool->oldest; page != NULL; page = page->newer, n_cached++) {
        if (page->n_window_references != 0 || page->parent == NULL) return "a cached page is held, or not in the tree";
        if (!pe_page_has_window(pool, page)) return "a cached window part is gone";
        if (page->newer == NULL ? pool->newest != page : page->newer->older != page) return "the cached list is broken";
    }
    for (const pe_page *page = pool->free_pages; page != NULL; page = page->older, n_free++)
        if (page->n_references != 0 || page->parent != NULL || page->window != NULL)
            return "a free page is held, or in the tree";
    if (n_cached != pool->n_cached_windows || n_free != pool->n_free) return "the counts of cached and free pages are wrong";
    return NULL;
}

/* A page of the tree. */
static const char *check_page(const pe_page_pool *pool, const pe_page *page) {
    bool first = page->parent == &pool->root;
    if (page->n_tokens == 0 || page->n_tokens > PE_CHUNK) return "a page of the tree has no tokens";
    if (!first && page->parent->n_tokens != PE_CHUNK) return "a page's parent is not full";
    if (!first && page->n_references > 0 && page->parent->n_references == 0) return "a held page's parent is cached";
    if (page->n_window_references > page->n_references) return "a window part is held by more sequences than its page";
    if (page->n_window_references > 0 && !pe_page_has_window(pool, page)) return "a window part that is held is gone";
    if (page->n_references == 0 && page->first_child == NULL && !pe_page_has_window(pool, page))
        return "a cached leaf is of no use";
    return NULL;
}

const char *pe_page_pool_check(const pe_page_pool *pool) {
    const char *wrong = check_lists(pool);
    if (wrong != NULL) return wrong;
    if (!fits(pool, 0) && pool->n_cached + pool->n_free + pool->n_free_windows > 0)
        return "more memory than allowed, and not all of it held";

    /* Every page of the tree, depth first. */
    size_t n_unheld = 0, n_loose = 0; /* without a holder; with a window part without one */
    const pe_page *page = pool->root.first_child;
    while (page != NULL) {
        if ((wrong = check_page(pool, page)) != NULL) return wrong;
        n_unheld += page->n_references == 0;
        n_loose += page->n_window_references == 0 && pe_page_has_window(pool, page);
        if (page->first_child != NULL) {
            page = page->first_child;
            continue;
        }
        while (page != &pool->root && page->next_sibling == NULL) page = page->parent;
        page = page == &pool->root ? NULL : page->next_sibling;
    }
    if (n_unheld != pool->n_cached) return "the count of cached pages is wrong";
    return n_loose == pool->n_cached_windows ? NULL : "an unheld window part of the tree is not in the cached list";
}
