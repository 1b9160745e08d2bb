/* kv_cache.c: see kv_cache.h. */
#include "kv_cache.h"

#include <stdlib.h>
#include <string.h>

#include "kv_sequences.h"
#include "status.h"

/* Sharing fewer tokens of a page than this is not worth its copy. */
enum { MIN_SHARED = 16 };

/* Bytes of k, k_scales, v, v_scales of one chunk, in that order; every one a multiple of 64. */
static void chunk_parts(const pe_kv_cache *cache, size_t parts[4]) {
    size_t d = cache->model->head_dim_p;
    bool f32 = cache->dtype == PE_KV_F32;
    parts[0] = PE_CHUNK * d * (f32 ? sizeof(float) : 1);
    parts[1] = f32 ? 0 : PE_CHUNK * sizeof(float);
    parts[2] = parts[0];
    parts[3] = f32 ? 0 : PE_CHUNK * sizeof(float);
}

/* Of a page. */
static size_t layer_bytes(const pe_kv_cache *cache, const pe_layer *layer) {
    const pe_config *config = &cache->model->config;
    if (layer->short_conv) return PE_CHUNK * pe_pad(config->dim, PE_PANEL) * sizeof(float);
    return config->n_kv_heads * cache->chunk_bytes;
}

/* Layers whose window is shorter than the context are in the window part of a page. */
static pe_status place_layers(pe_kv_cache *cache, char *err) {
    const pe_model *model = cache->model;
    size_t n_bytes[2] = {0, 0};
    cache->places = malloc(model->config.n_layers * sizeof *cache->places);
    if (cache->places == NULL) return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for the KV cache's tables");
    for (uint32_t i = 0; i < model->config.n_layers; i++) {
        size_t window = model->layers[i].window;
        bool is_window = window != 0 && window < model->config.max_seq_len;
        cache->places[i] = (layer_place){is_window, n_bytes[is_window], layer_bytes(cache, &model->layers[i])};
        n_bytes[is_window] += cache->places[i].n_bytes;
        if (is_window && window > cache->window) cache->window = window;
    }
    /* No overflow: the config's caps bound this by 2^12 * 2^12 * (256 * 512 * 8) < 2^45. */
    cache->pages.data_bytes = n_bytes[false];
    cache->pages.window_bytes = n_bytes[true];
    return PE_OK;
}

pe_status pe_kv_cache_create(pe_kv_cache **out, const pe_model *model, pe_kv_dtype dtype, char *err) {
    pe_kv_cache *cache = calloc(1, sizeof *cache);
    *out = cache;
    if (cache == NULL)
        return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for the KV cache's tables");
    cache->model = model;
    cache->dtype = dtype;
    size_t parts[4];
    chunk_parts(cache, parts);
    cache->chunk_bytes = parts[0] + parts[1] + parts[2] + parts[3];
    return place_layers(cache, err);
}

/* The first page whose window part it keeps: it may be truncated by PE_KV_UNDO tokens and still have what it needs. */
static size_t first_kept(const pe_kv_cache *cache, size_t n) {
    return n > PE_KV_UNDO ? first_needed(cache, n - PE_KV_UNDO) : 0;
}

/* As many of the n tokens in `pages` as a sequence can hold and go on from: the window parts that its next query needs are
 * there. */
static size_t continuable(const pe_kv_cache *cache, pe_page *const *pages, size_t n) {
    while (n > 0) {
        size_t first = first_needed(cache, n), i = pages_of(n);
        while (i > first && pe_page_has_window(&cache->pages, pages[i - 1])) i--;
        if (i <= first) return n;
        n = (i - 1) * PE_CHUNK;
    }
    return 0;
}

/* Hold the window parts before first_window that are there and that a sequence of its length keeps. */
static void hold_windows(pe_kv_cache *cache, sequence *s) {
    size_t first = first_kept(cache, s->committed);
    while (s->first_window > first && pe_page_has_window(&cache->pages, s->pages[s->first_window - 1]))
        pe_page_hold_window(&cache->pages, s->pages[--s->first_window]);
}

static size_t count_sequences(const pe_kv_cache *cache) {
    size_t n = 0;
    for (size_t i = 0; i < cache->n_sequences; i++) n += cache->sequences[i].used;
    return n;
}

/* Let go of the window parts that it need not keep any more. */
static void slide(pe_kv_cache *cache, sequence *s) {
    size_t first = first_kept(cache, s->committed);
    if (s->first_window >= first) return;
    while (s->first_window < first) pe_page_release_window(&cache->pages, s->pages[s->first_window++]);
    pe_page_pool_trim_windows(&cache->pages, PE_KV_KEEP_SLID * count_sequences(cache));
}

static void shrink(pe_kv_cache *cache, sequence *s, size_t n_tokens) {
    while (s->n_pages > pages_of(n_tokens)) {
        pe_page *last = s->pages[--s->n_pages];
        if (s->n_pages >= s->first_window) pe_page_release_window(&cache->pages, last);
        pe_page_release(&cache->pages, last);
    }
    if (s->first_window > s->n_pages) s->first_window = s->n_pages;
    s->length = n_tokens;
    s->n_drafted = 0;
    if (s->committed > n_tokens) s->committed = n_tokens;
}

void pe_kv_cache_destroy(pe_kv_cache *cache) {
    if (cache == NULL) return;
    for (size_t i = 0; i < cache->n_sequences; i++) {
        shrink(cache, &cache->sequences[i], 0);
        free(cache->sequences[i].pages);
    }
    pe_page_pool_destroy(&cache->pages);
    free(cache->places);
    free(cache->sequences);
    free(cache);
}

static size_t page_bytes(const pe_kv_cache *cache) { return cache->pages.data_bytes + cache->pages.window_bytes; }

void pe_kv_cache_stats(const pe_kv_cache *cache, pe_cache_stats *out) {
    const pe_page_pool *pages = &cache->pages;
    *out = (pe_cache_stats){.page_bytes = page_bytes(cache),
                            .window_bytes = pages->window_bytes,
                            .window = cache->window,
                            .max_pages = pages->max_bytes / page_bytes(cache),
                            .n_pages = pages->n_pages,
                            .n_cached = pages->n_cached,
                            .n_free = pages->n_free,
                            .n_bytes = pe_page_pool_bytes(pages),
                            .n_held_bytes = pe_page_pool_held_bytes(pages),
                            .n_evicted = pages->n_evicted};
    out->n_sequences = count_sequences(cache);
}

void pe_kv_cache_set_max_pages(pe_kv_cache *cache, size_t max_pages) {
    size_t most = SIZE_MAX / page_bytes(cache);
    cache->pages.max_bytes = (max_pages < most ? max_pages : most) * page_bytes(cache);
    pe_page_pool_trim(&cache->pages);
}

size_t pe_kv_cache_drop_cached(pe_kv_cache *cache) { return pe_page_pool_drop_cached(&cache->pages); }

/* ------------------------------------------------------------------ sequences */

static sequence *find(const pe_kv_cache *cache, int32_t id) {
    if (id < 0 || (size_t)id >= cache->n_sequences || !cache->sequences[id].used) return NULL;
    return &cache->sequences[id];
}

static pe_status no_such_sequence(int32_t id, char *err) {
    return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "there is no sequence %d", (int)id);
}

static pe_status out_of_memory(const pe_kv_cache *cache, char *err) {
    size_t n_bytes = pe_page_pool_bytes(&cache->pages), most = cache->pages.max_bytes;
    if (most != 0 && n_bytes + page_bytes(cache) > most) {
        return pe_fail(PE_ERR_OUT_OF_MEMORY, err,
                       "all memory that is allowed for keys and values (%zu bytes, %zu KV pages of 256 positions) is in use",
                       most, most / page_bytes(cache));
    }
    return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for a KV page of %zu bytes (%zu bytes of them in use)",
                   page_bytes(cache), pe_page_pool_held_bytes(&cache->pages));
}

static pe_status sequence_new(pe_kv_cache *cache, bool keep, const uint8_t *salt, int32_t *out, char *err) {
    size_t id = 0;
    while (id < cache->n_sequences && cache->sequences[id].used) id++;
    if (id == cache->n_sequences) {
        size_t capacity = cache->n_sequences * 2 + 4;
        sequence *grown = capacity > INT32_MAX ? NULL : realloc(cache->sequences, capacity * sizeof *grown);
        if (grown == NULL)
            return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for the table of %zu sequences", capacity);
        memset(grown + cache->n_sequences, 0, (capacity - cache->n_sequences) * sizeof *grown);
        cache->sequences = grown;
        cache->n_sequences = capacity;
    }
    sequence *s = &cache->sequences[id];
    s->used = true;
    s->keep = keep;
    memset(s->salt, 0, PE_SALT_BYTES);
    if (salt != NULL) memcpy(s->salt, salt, PE_SALT_BYTES);
    s->length = s->committed = s->n_drafted = s->first_window = 0;
    *out = (int32_t)id;
    return PE_OK;
}

pe_status pe_kv_new(pe_kv_cache *cache, int32_t *out, char *err) { return sequence_new(cache, false, NULL, out, err); }

size_t pe_kv_length(const pe_kv_cache *cache, int32_t id) {
    const sequence *s = find(cache, id);
    return s == NULL ? SIZE_MAX : s->length;
}

size_t pe_kv_tokens(const pe_kv_cache *cache, int32_t id, int32_t *out, size_t capacity) {
    const sequence *s = find(cache, id);
    if (s == NULL) return 0;
    for (size_t i = 0; i < s->committed && i < capacity; i++) out[i] = s->pages[i / PE_CHUNK]->tokens[i % PE_CHUNK];
    return s->committed;
}

pe_status pe_kv_truncate(pe_kv_cache *cache, int32_t id, size_t n_tokens, char *err) {
    sequence *s = find(cache, id);
    if (s == NULL) return no_such_sequence(id, err);
    if (n_tokens > s->committed)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "cannot truncate sequence %d of %zu tokens to %zu", (int)id,
                       s->committed, n_tokens);
    n_tokens = continuable(cache, s->pages, n_tokens);
    shrink(cache, s, n_tokens);
    hold_windows(cache, s);
    /* What this sequence took back nobody will ask for: the next token may be written over it without a copy. */
    pe_page *last = s->n_pages > 0 ? s->pages[s->n_pages - 1] : NULL;
    size_t in_page = n_tokens % PE_CHUNK;
    if (in_page != 0 && last->n_references == 1 && last->first_child == NULL && last->n_tokens > in_page)
        last->n_tokens = in_page;
    return PE_OK;
}

pe_status pe_kv_drop(pe_kv_cache *cache, int32_t id, char *err) {
    sequence *s = find(cache, id);
    if (s == NULL) return no_such_sequence(id, err);
    shrink(cache, s, 0); /* last page first: leaves are let go before their parents */
    s->used = false;
    return PE_OK;
}

static pe_status reserve_pages(sequence *s, size_t n_pages, char *err) {
    if (n_pages <= s->capacity) return PE_OK;
    size_t capacity = n_pages * 2;
    pe_page **grown = realloc(s->pages, capacity * sizeof *grown);
    if (grown == NULL)
        return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for the table of %zu pages", capacity);
    s->pages = grown;
    s->capacity = capacity;
    return PE_OK;
}

/* A new sequence that shares n_tokens, which can be continued, in pages (n_pages). */
static pe_status share(pe_kv_cache *cache, pe_page *const *pages, size_t n_tokens, bool keep, const uint8_t *salt,
                       int32_t *out, char *err) {
    size_t n_pages = pages_of(n_tokens);
    pe_status status = sequence_new(cache, keep, salt, out, err);
    if (status != PE_OK) return status;
    sequence *s = &cache->sequences[*out];
    status = reserve_pages(s, n_pages, err);
    if (status != PE_OK) {
        s->used = false;
        return status;
    }
    for (size_t i = 0; i < n_pages; i++) {
        s->pages[i] = pages[i];
        pe_page_hold(&cache->pages, pages[i]);
    }
    s->n_pages = s->first_window = n_pages;
    s->length = s->committed = n_tokens;
    hold_windows(cache, s);
    return PE_OK;
}

pe_status pe_kv_fork(pe_kv_cache *cache, int32_t source, size_t n_tokens, int32_t *out, char *err) {
    const sequence *from = find(cache, source);
    if (from == NULL) return no_such_sequence(source, err);
    if (n_tokens > from->committed)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "cannot fork %zu tokens of sequence %d, it has %zu", n_tokens,
                       (int)source, from->committed);
    uint8_t salt[PE_SALT_BYTES];
    memcpy(salt, from->salt, sizeof salt);
    n_tokens = continuable(cache, from->pages, n_tokens);
    return share(cache, from->pages, n_tokens, from->keep, salt, out, err); /* the table may move, its arrays do not */
}

/* ------------------------------------------------------------------ known beginnings */

/* path (pages that n tokens fill) = the pages that a walk along `tokens` passes; how many tokens are on the way, all of them
 * known and fit to be continued. */
static size_t walk(pe_kv_cache *cache, const int32_t *tokens, size_t n, const uint8_t *salt, pe_page **path) {
    size_t n_known = 0, n_common = PE_CHUNK;
    while (n_common == PE_CHUNK) {
        pe_page *page = n_known > 0 ? path[n_known / PE_CHUNK - 1] : NULL;
        pe_page *next = pe_page_find(&cache->pages, page, salt, tokens + n_known, n - n_known, &n_common);
        if (next == NULL) break;
        /* A part of a page, or a page somebody is writing, will be copied by the first token after it. */
        bool copy = n_common < next->n_tokens || (n_common < PE_CHUNK && next->n_references > 0);
        if (copy && n_common < MIN_SHARED) break;
        path[n_known / PE_CHUNK] = next;
        n_known += n_common;
    }
    return continuable(cache, path, n_known);
}

static pe_page **path_new(size_t n_tokens) { return malloc((pages_of(n_tokens) + 1) * sizeof(pe_page *)); }

size_t pe_kv_match_length(pe_kv_cache *cache, const int32_t *tokens, size_t n, const uint8_t salt[PE_SALT_BYTES]) {
    pe_page **path = path_new(n);
    size_t n_known = path == NULL ? 0 : walk(cache, tokens, n, salt, path);
    free(path);
    return n_known;
}

pe_status pe_kv_match(pe_kv_cache *cache, const int32_t *tokens, size_t n, const uint8_t salt[PE_SALT_BYTES], bool keep,
                      int32_t *out, size_t *n_matched, char *err) {
    pe_page **path = path_new(n);
    if (path == NULL) return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for the path of %zu tokens", n);
    *n_matched = walk(cache, tokens, n, salt, path);
    pe_status status = share(cache, path, *n_matched, keep, salt, out, err);
    free(path);
    return status;
}

/* ------------------------------------------------------------------ for a forward */

/* What the first n_tokens positions of a page hold. The rows of a convolution lie one after the other: of those that nobody has written
 * yet, most of a large part, there is nothing to copy. */
static void copy_positions(const pe_kv_cache *cache, pe_page *to, const pe_page *from, size_t n_tokens) {
    for (uint32_t layer = 0; layer < cache->model->config.n_layers; layer++) {
        const layer_place *place = &cache->places[layer];
        char *out = place->is_window ? to->window : to->data;
        const char *in = place->is_window ? from->window : from->data;
        size_t n_bytes = cache->model->layers[layer].short_conv ? place->n_bytes / PE_CHUNK * n_tokens : place->n_bytes;
        memcpy(out + place->offset, in + place->offset, n_bytes);
    }
    memcpy(to->tokens, from->tokens, n_tokens * sizeof *to->tokens);
    to->n_tokens = n_tokens;
}

/* Position `length` is about to be written. If its page exists it must be this sequence's alone, and nobody may remember
 * it with other tokens there. */
static pe_status own_last_page(pe_kv_cache *cache, sequence *s, char *err) {
    size_t in_page = s->length % PE_CHUNK;
    if (in_page == 0) return PE_OK;
    pe_page *last = s->pages[s->n_pages - 1];
    if (last->n_references == 1 && last->n_tokens <= in_page && last->first_child == NULL) return PE_OK;
    pe_page *copy = pe_page_new(&cache->pages);
    if (copy == NULL) return out_of_memory(cache, err);
    copy_positions(cache, copy, last, in_page);
    pe_page_release_window(&cache->pages, last);
    pe_page_release(&cache->pages, last);
    s->pages[s->n_pages - 1] = copy;
    return PE_OK;
}

pe_status pe_kv_extend(pe_kv_cache *cache, int32_t id, size_t n_more, char *err) {
    sequence *s = find(cache, id);
    if (s == NULL) return no_such_sequence(id, err);
    size_t length = s->length, n_pages = pages_of(length + n_more);
    if (n_more == 0) return PE_OK;
    pe_status status = reserve_pages(s, n_pages, err);
    if (status == PE_OK) status = own_last_page(cache, s, err);
    if (status != PE_OK) return status;
    while (s->n_pages < n_pages) {
        pe_page *page = pe_page_new(&cache->pages);
        if (page == NULL) {
            shrink(cache, s, length);
            return out_of_memory(cache, err);
        }
        s->pages[s->n_pages++] = page;
    }
    s->length = length + n_more;
    return PE_OK;
}

void pe_kv_commit(pe_kv_cache *cache, int32_t id, int32_t token) {
    sequence *s = find(cache, id);
    size_t index = s->committed / PE_CHUNK, in_page = s->committed % PE_CHUNK;
    pe_page *page = s->pages[index], *parent = index > 0 ? s->pages[index - 1] : NULL;
    page->tokens[in_page] = token;
    page->n_tokens = in_page + 1;
    s->committed++;
    slide(cache, s);
    /* A parent outside the tree belongs to a sequence that keeps nothing: then neither do those forked from it. */
    if (page->parent == NULL && s->keep && (parent == NULL || parent->parent != NULL))
        pe_page_link(&cache->pages, page, parent, s->salt);
    if (page->n_tokens < PE_CHUNK || page->parent == NULL || page->n_references > 1) return;
    /* Two sequences computed the same page side by side: one is enough. */
    pe_page *twin = pe_page_twin(page);
    if (twin == NULL) return;
    pe_page_merge(&cache->pages, page, twin);
    s->pages[index] = twin;
}

void pe_kv_rollback(pe_kv_cache *cache, int32_t id) {
    sequence *s = find(cache, id);
    if (s != NULL) shrink(cache, s, s->committed);
}

/* ------------------------------------------------------------------ drafts */

static int32_t *token_at(const sequence *s, size_t position) {
    return &s->pages[position / PE_CHUNK]->tokens[position % PE_CHUNK];
}

void pe_kv_draft(pe_kv_cache *cache, int32_t id, int32_t token) {
    sequence *s = find(cache, id);
    *token_at(s, s->committed + s->n_drafted++) = token;
}

pe_status pe_kv_accept(pe_kv_cache *cache, int32_t id, const int32_t *tokens, size_t n, size_t *n_accepted,
                       char *err) {
    sequence *s = find(cache, id);
    *n_accepted = 0;
    if (s == NULL) return no_such_sequence(id, err);
    for (; *n_accepted < n && s->n_drafted > 0 && *token_at(s, s->committed) == tokens[*n_accepted]; ++*n_accepted) {
        pe_kv_commit(cache, id, tokens[*n_accepted]);
        s->n_drafted--;
    }
    shrink(cache, s, s->committed);
    return PE_OK;
}

void pe_kv_forget_drafts(pe_kv_cache *cache) {
    for (size_t i = 0; i < cache->n_sequences; i++)
        if (cache->sequences[i].n_drafted > 0) shrink(cache, &cache->sequences[i], cache->sequences[i].committed);
}

/* ------------------------------------------------------------------ chunks */

size_t pe_kv_chunk_bytes(const pe_kv_cache *cache) { return cache->chunk_bytes; }

/* A layer's bytes in a page of a sequence; NULL if they are gone. */
static char *layer_at(const pe_kv_cache *cache, int32_t id, size_t page_index, uint32_t layer) {
    const layer_place *place = &cache->places[layer];
    const pe_page *page = cache->sequences[id].pages[page_index];
    char *part = place->is_window ? page->window : page->data;
    return part == NULL ? NULL : part + place->offset;
}

pe_kv_chunk pe_kv_chunk_at(const pe_kv_cache *cache, int32_t id, size_t page_index, uint32_t layer, uint32_t kv_head) {
    char *chunks = layer_at(cache, id, page_index, layer);
    return chunks == NULL ? (pe_kv_chunk){0} : pe_kv_chunk_in(cache, chunks + kv_head * cache->chunk_bytes);
}

float *pe_kv_inputs_at(const pe_kv_cache *cache, int32_t id, size_t page_index, uint32_t layer) {
    return (float *)layer_at(cache, id, page_index, layer);
}

pe_kv_chunk pe_kv_chunk_in(const pe_kv_cache *cache, char *k) {
    size_t parts[4];
    chunk_parts(cache, parts);
    char *v = k + parts[0] + parts[1];
    if (cache->dtype == PE_KV_F32) return (pe_kv_chunk){.k_f32 = (float *)k, .v_f32 = (float *)v};
    return (pe_kv_chunk){(int8_t *)k, (float *)(k + parts[0]), (int8_t *)v, (float *)(v + parts[2]), NULL, NULL};
}

/* ------------------------------------------------------------------ for kv_snapshot.c */

size_t pe_kv_first_window(const pe_kv_cache *cache, size_t n_tokens) { return first_kept(cache, n_tokens); }

void pe_kv_drop_windows(pe_kv_cache *cache, int32_t id) {
    sequence *s = &cache->sequences[id];
    while (s->first_window < s->n_pages) pe_page_release_window(&cache->pages, s->pages[s->first_window++]);
}
