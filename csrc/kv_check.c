/* kv_check.c: does the cache of keys and values add up? Everything is counted anew. */
#include "kv_cache.h"
#include "kv_sequences.h"
#include "status.h"

static pe_status broken(char *err, const char *what) {
    return pe_fail(PE_ERR_SYSTEM, err, "the KV cache is inconsistent: %s", what);
}

static pe_status check_sequence(const pe_kv_cache *cache, const sequence *s, char *err) {
    if (s->length != s->committed + s->n_drafted) return broken(err, "a sequence holds positions without tokens");
    if (s->n_pages != pages_of(s->length)) return broken(err, "a sequence has too many pages");
    if (s->first_window > first_needed(cache, s->committed)) return broken(err, "a sequence lacks window parts");
    for (size_t i = 0; i < s->n_pages; i++) {
        size_t begin = i * PE_CHUNK, left = s->committed > begin ? s->committed - begin : 0;
        size_t here = left < PE_CHUNK ? left : PE_CHUNK;
        if (s->pages[i]->n_tokens < here) return broken(err, "a page lacks tokens of its sequence");
        if (i > 0 && s->pages[i]->parent != NULL && s->pages[i]->parent != s->pages[i - 1])
            return broken(err, "a page hangs below another page than its sequence's");
        if (i >= s->first_window && !pe_page_has_window(&cache->pages, s->pages[i]))
            return broken(err, "a window part that a sequence holds is gone");
    }
    return PE_OK;
}

/* Every thing that is held is held n_references times: the inverses, over its holders, add up to the number of things. */
typedef struct share_count {
    size_t n_references;
    double n_held;
} share_count;

static void count_share(share_count *count, size_t n_references) {
    count->n_references++;
    count->n_held += 1.0 / (double)n_references;
}

static bool adds_up(const share_count *count, size_t n_held) {
    double difference = count->n_held - (double)n_held, rounding = 1e-6 * (double)(count->n_references + 1);
    return difference > -rounding && difference < rounding;
}

pe_status pe_kv_cache_check(const pe_kv_cache *cache, char *err) {
    const pe_page_pool *pool = &cache->pages;
    const char *wrong = pe_page_pool_check(pool);
    if (wrong != NULL) return broken(err, wrong);
    share_count pages = {0}, windows = {0};
    for (size_t i = 0; i < cache->n_sequences; i++) {
        const sequence *s = &cache->sequences[i];
        if (!s->used && s->n_pages > 0) return broken(err, "a dropped sequence holds pages");
        if (!s->used) continue;
        pe_status status = check_sequence(cache, s, err);
        if (status != PE_OK) return status;
        for (size_t k = 0; k < s->n_pages; k++) count_share(&pages, s->pages[k]->n_references);
        for (size_t k = s->first_window; k < s->n_pages; k++) count_share(&windows, s->pages[k]->n_window_references);
    }
    size_t n_held = pool->n_pages - pool->n_cached - pool->n_free;
    size_t n_windows = pool->window_bytes == 0 ? n_held : pool->n_windows - pool->n_cached_windows - pool->n_free_windows;
    if (!adds_up(&pages, n_held) || !adds_up(&windows, n_windows))
        return broken(err, "references to pages do not add up: some page is lost or shared unseen");
    return PE_OK;
}
