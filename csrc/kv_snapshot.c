/* kv_snapshot.c: see kv_snapshot.h. */
#include "kv_snapshot.h"

#include <math.h>
#include <string.h>

#include "kv_sequences.h"
#include "status.h"

typedef enum page_part { DATA, WINDOW } page_part; /* in the order of the snapshot */

static bool is_in(const pe_kv_cache *cache, uint32_t layer, page_part part) {
    return cache->places[layer].is_window == (part == WINDOW);
}

static size_t part_bytes_of(const pe_kv_cache *cache, page_part part) {
    return part == WINDOW ? cache->pages.window_bytes : cache->pages.data_bytes;
}

static char *part_of(const pe_page *page, page_part part) { return part == WINDOW ? page->window : page->data; }

/* Of n_tokens, with the window parts of page first_window and of all after it. */
static size_t bytes_of(const pe_kv_cache *cache, size_t n_tokens, size_t first_window) {
    size_t n_pages = pages_of(n_tokens);
    return n_pages * cache->pages.data_bytes + (n_pages - first_window) * cache->pages.window_bytes;
}

static pe_status wrong_size(const pe_kv_cache *cache, size_t n_tokens, size_t n_bytes, char *err) {
    size_t expected = bytes_of(cache, n_tokens, pe_kv_first_window(cache, n_tokens));
    return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "keys and values of %zu tokens have %zu bytes here, not %zu", n_tokens,
                   expected, n_bytes);
}

size_t pe_kv_snapshot_bytes(const pe_kv_cache *cache, int32_t sequence) {
    if (pe_kv_length(cache, sequence) == SIZE_MAX) return 0;
    return bytes_of(cache, pe_kv_tokens(cache, sequence, NULL, 0), cache->sequences[sequence].first_window);
}

/* The first page whose window part a snapshot of so many bytes has: one that a sequence of n_tokens can go on from. */
static pe_status find_first_window(const pe_kv_cache *cache, size_t n_tokens, size_t n_bytes, size_t *first_window, char *err) {
    size_t last = first_needed(cache, n_tokens);
    for (size_t page = pe_kv_first_window(cache, n_tokens); page <= last; page++) {
        *first_window = page;
        if (n_bytes == bytes_of(cache, n_tokens, page)) return PE_OK;
    }
    return wrong_size(cache, n_tokens, n_bytes, err);
}

/* The last part of a page that is in the snapshot of a sequence whose window parts begin with page first_window. */
static page_part last_part(size_t page, size_t first_window) { return page < first_window ? DATA : WINDOW; }

/* ------------------------------------------------------------------ save */

/* Position p of a chunk becomes zeros. */
static void clear_position(const pe_kv_chunk *kv, size_t head_dim_p, size_t p) {
    size_t panel = p / PE_PANEL, lane = p % PE_PANEL;
    if (kv->k_f32 != NULL) {
        for (size_t i = 0; i < head_dim_p; i++) kv->k_f32[(panel * head_dim_p + i) * PE_PANEL + lane] = 0.0f;
        memset(kv->v_f32 + p * head_dim_p, 0, head_dim_p * sizeof(float));
        return;
    }
    for (size_t i = 0; i < head_dim_p; i++) {
        kv->k[((panel * head_dim_p / 4 + i / 4) * PE_PANEL + lane) * 4 + i % 4] = 0;
        kv->v[(p / 4 * head_dim_p + i) * 4 + p % 4] = 0;
    }
    kv->k_scales[p] = kv->v_scales[p] = 0.0f;
}

/* Positions from n_tokens on of a layer's bytes become zeros. */
static void clear_layer(const pe_kv_cache *cache, uint32_t layer, char *data, size_t n_tokens) {
    size_t n_bytes = cache->places[layer].n_bytes;
    if (cache->model->layers[layer].short_conv) {
        memset(data + n_bytes / PE_CHUNK * n_tokens, 0, n_bytes / PE_CHUNK * (PE_CHUNK - n_tokens));
        return;
    }
    for (size_t at = 0; at < n_bytes; at += pe_kv_chunk_bytes(cache)) {
        pe_kv_chunk kv = pe_kv_chunk_in(cache, data + at);
        for (size_t p = n_tokens; p < PE_CHUNK; p++) clear_position(&kv, cache->model->head_dim_p, p);
    }
}

/* The same of all layers of a page's part, which begins at `data`. */
static void clear_tail(const pe_kv_cache *cache, page_part part, char *data, size_t n_tokens) {
    for (uint32_t layer = 0; layer < cache->model->config.n_layers; layer++)
        if (is_in(cache, layer, part)) clear_layer(cache, layer, data + cache->places[layer].offset, n_tokens);
}

pe_status pe_kv_snapshot_save(const pe_kv_cache *cache, int32_t sequence, char *out, size_t n_bytes, char *err) {
    if (pe_kv_length(cache, sequence) == SIZE_MAX)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "there is no sequence %d", (int)sequence);
    size_t n_tokens = pe_kv_tokens(cache, sequence, NULL, 0), first_window = cache->sequences[sequence].first_window;
    if (n_bytes != bytes_of(cache, n_tokens, first_window)) return wrong_size(cache, n_tokens, n_bytes, err);
    for (size_t page = 0; page < pages_of(n_tokens); page++) {
        for (int part = DATA; part <= (int)last_part(page, first_window); part++) {
            size_t part_bytes = part_bytes_of(cache, part), here = n_tokens - page * PE_CHUNK;
            if (part_bytes == 0) continue;
            memcpy(out, part_of(cache->sequences[sequence].pages[page], part), part_bytes);
            if (here < PE_CHUNK) clear_tail(cache, part, out, here);
            out += part_bytes;
        }
    }
    return PE_OK;
}

/* ------------------------------------------------------------------ restore */

static bool are_finite(const float *x, size_t n) {
    bool finite = true;
    for (size_t i = 0; i < n; i++) finite &= isfinite(x[i]) != 0;
    return finite;
}

static bool are_scales(const float *x, size_t n) {
    bool legal = are_finite(x, n);
    for (size_t i = 0; i < n; i++) legal &= x[i] >= 0.0f;
    return legal;
}

/* Whether a chunk holds nothing that no text has: the code -128, a scale that is negative, an infinity, a NaN. */
static bool is_legal(const pe_kv_chunk *kv, const struct pe_kernels *kernels, size_t n_codes) {
    if (kv->k_f32 != NULL) return are_finite(kv->k_f32, n_codes) && are_finite(kv->v_f32, n_codes);
    return kernels->codes_are_legal(kv->k, n_codes) && kernels->codes_are_legal(kv->v, n_codes) &&
           are_scales(kv->k_scales, PE_CHUNK) && are_scales(kv->v_scales, PE_CHUNK);
}

/* The same of a layer's bytes. */
static bool is_legal_layer(const pe_kv_cache *cache, const struct pe_kernels *kernels, uint32_t layer, const char *data) {
    size_t n_bytes = cache->places[layer].n_bytes, n_codes = PE_CHUNK * cache->model->head_dim_p;
    if (cache->model->layers[layer].short_conv) return are_finite((const float *)data, n_bytes / sizeof(float));
    for (size_t at = 0; at < n_bytes; at += pe_kv_chunk_bytes(cache)) {
        pe_kv_chunk kv = pe_kv_chunk_in(cache, (char *)data + at); /* only read */
        if (!is_legal(&kv, kernels, n_codes)) return false;
    }
    return true;
}

/* Of the snapshot `in` of n_tokens, whose window parts begin with page first_window. */
static pe_status check_contents(const pe_kv_cache *cache, const struct pe_kernels *kernels, const char *in, size_t n_tokens,
                                size_t first_window, char *err) {
    bool legal = true;
    for (size_t page = 0; page < pages_of(n_tokens); page++)
        for (int part = DATA; part <= (int)last_part(page, first_window); part++) {
            for (uint32_t layer = 0; layer < cache->model->config.n_layers && legal; layer++)
                if (is_in(cache, layer, part)) legal = is_legal_layer(cache, kernels, layer, in + cache->places[layer].offset);
            in += part_bytes_of(cache, part);
        }
    return legal ? PE_OK
                 : pe_fail(PE_ERR_INVALID_ARGUMENT, err,
                           "the keys and values hold what no text has (code -128, a negative scale, or not finite)");
}

/* Whether the pages from `begin` (whole pages) to n_tokens, with window parts from page first_window on, fit beside all that is held.
 * Asked first: to find it out page by page would take room from what is cached, in vain. (A page of the same tokens that another
 * sequence holds without its window part counts as missing.) */
static pe_status check_room(const pe_kv_cache *cache, size_t begin, size_t n_tokens, size_t first_window, char *err) {
    const pe_page_pool *pool = &cache->pages;
    size_t first = begin / PE_CHUNK, windows_from = first_window > first ? first_window : first;
    size_t missing = bytes_of(cache, n_tokens, windows_from) - first * pool->data_bytes, held = pe_page_pool_held_bytes(pool);
    if (pool->max_bytes == 0 || held + missing <= pool->max_bytes) return PE_OK;
    return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "%zu bytes of keys and values do not fit beside the %zu in use: %zu are allowed",
                   missing, held, pool->max_bytes);
}

/* The sequence holds whole pages; its next one, of the tokens (n) at most, comes from the parts at `in`. */
static pe_status restore_page(pe_kv_cache *cache, int32_t sequence, const int32_t *tokens, size_t n, page_part last,
                              const char *in, char *err) {
    size_t page = pe_kv_length(cache, sequence) / PE_CHUNK, here = n < PE_CHUNK ? n : PE_CHUNK;
    pe_status status = pe_kv_extend(cache, sequence, here, err);
    if (status != PE_OK) return status;
    if (last == DATA) pe_kv_drop_windows(cache, sequence);
    for (int part = DATA; part <= (int)last; part++) {
        size_t part_bytes = part_bytes_of(cache, part);
        if (part_bytes > 0) memcpy(part_of(cache->sequences[sequence].pages[page], part), in, part_bytes);
        in += part_bytes;
    }
    for (size_t i = 0; i < here; i++) pe_kv_commit(cache, sequence, tokens[i]);
    return PE_OK;
}

pe_status pe_kv_snapshot_restore(pe_kv_cache *cache, const struct pe_kernels *kernels, const int32_t *tokens, size_t n,
                                 const uint8_t salt[PE_SALT_BYTES], const char *in, size_t n_bytes, int32_t *out, char *err) {
    size_t begin = 0, first_window = 0;
    pe_status status = find_first_window(cache, n, n_bytes, &first_window, err);
    if (status == PE_OK) status = check_contents(cache, kernels, in, n, first_window, err);
    if (status == PE_OK) status = pe_kv_match(cache, tokens, n, salt, true, out, &begin, err);
    if (status != PE_OK || begin == n) return status;
    /* What is shared ends with a whole page: where layers with a window have let go of theirs, earlier than asked for. */
    while (begin % PE_CHUNK != 0) {
        (void)pe_kv_truncate(cache, *out, begin / PE_CHUNK * PE_CHUNK, err);
        begin = pe_kv_length(cache, *out);
    }
    status = check_room(cache, begin, n, first_window, err);
    for (size_t page = 0; status == PE_OK && page < pages_of(n); page++) {
        page_part last = last_part(page, first_window);
        size_t at = page * PE_CHUNK;
        if (at >= begin) status = restore_page(cache, *out, tokens + at, n - at, last, in, err);
        for (int part = DATA; part <= (int)last; part++) in += part_bytes_of(cache, part);
    }
    if (status != PE_OK) (void)pe_kv_drop(cache, *out, err); /* there is such a sequence: err stays */
    return status;
}
