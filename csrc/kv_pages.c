/* kv_pages.c: see kv_pages.h. */
#include "kv_pages.h"

#include "platform.h"

#include <stdlib.h>
#include <string.h>

enum { KEEP_FREE = 8 }; /* pages kept for the next sequence; more go back to the system */

/* ------------------------------------------------------------------ the list of cached pages */

static void cached_append(pe_page_pool *pool, pe_page *page) {
    page->newer = NULL;
    page->older = pool->newest;
    if (pool->newest != NULL) pool->newest->newer = page;
    pool->newest = page;
    if (pool->oldest == NULL) pool->oldest = page;
    pool->n_cached++;
}

static void cached_remove(pe_page_pool *pool, pe_page *page) {
    if (page->older != NULL) page->older->newer = page->newer;
    if (page->newer != NULL) page->newer->older = page->older;
    if (pool->oldest == page) pool->oldest = page->newer;
    if (pool->newest == page) pool->newest = page->older;
    page->older = page->newer = NULL;
    pool->n_cached--;
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

/* ------------------------------------------------------------------ pages */

static void page_free(pe_page_pool *pool, pe_page *page) {
    pe_zeros_free(page->data, pool->page_bytes);
    free(page);
    pool->n_pages--;
}

/* The leaf that was let go first, out of the tree. A cached page's descendants are cached too (who holds a page holds
 * its ancestors), so there is a leaf if there is any cached page. */
static pe_page *evict(pe_page_pool *pool) {
    pe_page *page = pool->oldest;
    while (page != NULL && page->first_child != NULL) page = page->newer;
    if (page == NULL) return NULL;
    cached_remove(pool, page);
    unlink_page(page);
    return page;
}

static pe_page *page_allocate(pe_page_pool *pool) {
    if (pool->max_pages != 0 && pool->n_pages >= pool->max_pages) return NULL;
    pe_page *page = calloc(1, sizeof *page);
    if (page == NULL) return NULL;
    /* Zeros: kernels read whole tiles of positions, and multiply what lies behind the last one by 0. */
    page->data = pe_zeros_alloc(pool->page_bytes);
    if (page->data == NULL) {
        free(page);
        return NULL;
    }
    pool->n_pages++;
    return page;
}

pe_page *pe_page_new(pe_page_pool *pool) {
    pe_page *page = pool->free_pages;
    if (page != NULL) {
        pool->free_pages = page->older;
        pool->n_free--;
        page->older = NULL;
    } else {
        page = page_allocate(pool);
    }
    if (page == NULL) {
        page = evict(pool);
        if (page == NULL) return NULL;
        pool->n_evicted++;
    }
    page->n_references = 1;
    page->n_tokens = 0;
    return page;
}

void pe_page_hold(pe_page_pool *pool, pe_page *page) {
    if (page->n_references++ == 0) cached_remove(pool, page);
}

static void put_free(pe_page_pool *pool, pe_page *page) {
    if (pool->n_free == KEEP_FREE || (pool->max_pages != 0 && pool->n_pages > pool->max_pages)) {
        page_free(pool, page);
        return;
    }
    page->older = pool->free_pages;
    pool->free_pages = page;
    pool->n_free++;
}

void pe_page_release(pe_page_pool *pool, pe_page *page) {
    if (--page->n_references > 0) return;
    if (page->parent == NULL) {
        put_free(pool, page);
        return;
    }
    cached_append(pool, page);
    while (pool->max_pages != 0 && pool->n_pages > pool->max_pages && (page = evict(pool)) != NULL)
        page_free(pool, page); /* the limit was lowered while pages were held */
}

void pe_page_discard(pe_page_pool *pool, pe_page *page) {
    unlink_page(page);
    page->n_references = 0;
    put_free(pool, page);
}

size_t pe_page_pool_drop_cached(pe_page_pool *pool) {
    size_t n = 0;
    for (pe_page *page; (page = evict(pool)) != NULL; n++) page_free(pool, page);
    for (pe_page *page; (page = pool->free_pages) != NULL; pool->n_free--) {
        pool->free_pages = page->older;
        page_free(pool, page);
    }
    return n;
}

void pe_page_pool_destroy(pe_page_pool *pool) { pe_page_pool_drop_cached(pool); }

/* ------------------------------------------------------------------ check */

const char *pe_page_pool_check(const pe_page_pool *pool) {
    size_t n_cached = 0, n_free = 0, n_unheld = 0;
    for (const pe_page *page = pool->oldest; page != NULL; page = page->newer, n_cached++) {
        if (page->n_references != 0 || page->parent == NULL) return "a cached page is held, or not in the tree";
        if (page->newer == NULL ? pool->newest != page : page->newer->older != page) return "the cached list is broken";
    }
    for (const pe_page *page = pool->free_pages; page != NULL; page = page->older, n_free++)
        if (page->n_references != 0 || page->parent != NULL) return "a free page is held, or in the tree";
    if (n_cached != pool->n_cached || n_free != pool->n_free) return "the counts of cached and free pages are wrong";
    if (pool->max_pages != 0 && pool->n_pages > pool->max_pages && n_cached + n_free > 0)
        return "more pages than allowed, and not all of them held";

    /* Every page of the tree, depth first. */
    const pe_page *page = pool->root.first_child;
    while (page != NULL) {
        bool first = page->parent == &pool->root;
        if (page->n_tokens == 0 || page->n_tokens > PE_CHUNK) return "a page of the tree has no tokens";
        if (!first && page->parent->n_tokens != PE_CHUNK) return "a page's parent is not full";
        if (!first && page->n_references > 0 && page->parent->n_references == 0) return "a held page's parent is cached";
        n_unheld += page->n_references == 0;
        if (page->first_child != NULL) {
            page = page->first_child;
            continue;
        }
        while (page != &pool->root && page->next_sibling == NULL) page = page->parent;
        page = page == &pool->root ? NULL : page->next_sibling;
    }
    return n_unheld == n_cached ? NULL : "an unheld page of the tree is not in the cached list";
}
