/* kv_cache.c: see kv_cache.h. */
#include "kv_cache.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct page {
    size_t n_references;
    struct page *next_free;
    char *data;   /* aligned to 64 */
    void *memory; /* what calloc returned */
} page;

typedef struct sequence {
    bool used;
    size_t length; /* positions present */
    size_t n_pages, capacity;
    page **pages;
} sequence;

struct pe_kv_cache {
    const pe_model *model;
    pe_kv_dtype dtype;
    size_t chunk_bytes, page_bytes;
    sequence *sequences;
    size_t n_sequences;
    page *free_pages;
    size_t n_free;
    size_t n_pages; /* allocated, free ones included */
};

enum { KEEP_FREE = 8 }; /* pages kept for the next sequence; more go back to the system */

/* Bytes of k, k_scales, v, v_scales of one chunk, in that order; every one a multiple of 64. */
static void chunk_parts(const pe_kv_cache *cache, size_t parts[4]) {
    size_t d = cache->model->head_dim_p;
    bool f32 = cache->dtype == PE_KV_F32;
    parts[0] = PE_CHUNK * d * (f32 ? sizeof(float) : 1);
    parts[1] = f32 ? 0 : PE_CHUNK * (d / PE_X_GROUP) * sizeof(float);
    parts[2] = parts[0];
    parts[3] = f32 ? 0 : PE_CHUNK * sizeof(float);
}

pe_status pe_kv_cache_create(pe_kv_cache **out, const pe_model *model, pe_kv_dtype dtype, char *err) {
    pe_kv_cache *cache = calloc(1, sizeof *cache);
    *out = cache;
    if (cache == NULL) {
        snprintf(err, PE_ERR_LEN, "out of memory for the KV cache's tables");
        return PE_ERR_OUT_OF_MEMORY;
    }
    cache->model = model;
    cache->dtype = dtype;
    size_t parts[4];
    chunk_parts(cache, parts);
    cache->chunk_bytes = parts[0] + parts[1] + parts[2] + parts[3];
    /* No overflow: the config's caps bound this by 2^12 * 2^12 * (256 * 512 * 8) < 2^45. */
    cache->page_bytes = cache->chunk_bytes * model->config.n_layers * model->config.n_kv_heads;
    return PE_OK;
}

static page *page_new(pe_kv_cache *cache) {
    page *p = cache->free_pages;
    if (p != NULL) {
        cache->free_pages = p->next_free;
        cache->n_free--;
        p->n_references = 1;
        return p;
    }
    p = calloc(1, sizeof *p);
    if (p == NULL) return NULL;
    /* calloc of this size is fresh zero pages from the system, touched only as positions are written. */
    p->memory = calloc(1, cache->page_bytes + 64);
    if (p->memory == NULL) {
        free(p);
        return NULL;
    }
    p->data = (char *)pe_pad((uintptr_t)p->memory, 64);
    p->n_references = 1;
    cache->n_pages++;
    return p;
}

static void page_free(pe_kv_cache *cache, page *p) {
    free(p->memory);
    free(p);
    cache->n_pages--;
}

static void page_release(pe_kv_cache *cache, page *p) {
    if (--p->n_references > 0) return;
    if (cache->n_free == KEEP_FREE) {
        page_free(cache, p);
        return;
    }
    p->next_free = cache->free_pages;
    cache->free_pages = p;
    cache->n_free++;
}

void pe_kv_cache_destroy(pe_kv_cache *cache) {
    if (cache == NULL) return;
    for (size_t i = 0; i < cache->n_sequences; i++) {
        sequence *s = &cache->sequences[i];
        for (size_t k = 0; k < s->n_pages; k++) page_release(cache, s->pages[k]);
        free(s->pages);
    }
    while (cache->free_pages != NULL) {
        page *p = cache->free_pages;
        cache->free_pages = p->next_free;
        page_free(cache, p);
    }
    free(cache->sequences);
    free(cache);
}

size_t pe_kv_cache_bytes(const pe_kv_cache *cache) { return cache->n_pages * cache->page_bytes; }

/* ------------------------------------------------------------------ sequences */

static sequence *find(const pe_kv_cache *cache, int32_t id) {
    if (id < 0 || (size_t)id >= cache->n_sequences || !cache->sequences[id].used) return NULL;
    return &cache->sequences[id];
}

static pe_status no_such_sequence(int32_t id, char *err) {
    snprintf(err, PE_ERR_LEN, "there is no sequence %d", (int)id);
    return PE_ERR_INVALID_ARGUMENT;
}

static pe_status out_of_memory(const pe_kv_cache *cache, char *err) {
    snprintf(err, PE_ERR_LEN, "out of memory for a KV page of %zu bytes (%zu pages of 256 positions in use)",
             cache->page_bytes, cache->n_pages);
    return PE_ERR_OUT_OF_MEMORY;
}

pe_status pe_kv_new(pe_kv_cache *cache, int32_t *out, char *err) {
    size_t id = 0;
    while (id < cache->n_sequences && cache->sequences[id].used) id++;
    if (id == cache->n_sequences) {
        size_t capacity = cache->n_sequences * 2 + 4;
        sequence *grown = capacity > INT32_MAX ? NULL : realloc(cache->sequences, capacity * sizeof *grown);
        if (grown == NULL) return out_of_memory(cache, err);
        memset(grown + cache->n_sequences, 0, (capacity - cache->n_sequences) * sizeof *grown);
        cache->sequences = grown;
        cache->n_sequences = capacity;
    }
    cache->sequences[id].used = true;
    cache->sequences[id].length = 0;
    *out = (int32_t)id;
    return PE_OK;
}

size_t pe_kv_length(const pe_kv_cache *cache, int32_t id) {
    const sequence *s = find(cache, id);
    return s == NULL ? SIZE_MAX : s->length;
}

static void shrink(pe_kv_cache *cache, sequence *s, size_t n_tokens) {
    size_t n_pages = pe_pad(n_tokens, PE_CHUNK) / PE_CHUNK;
    while (s->n_pages > n_pages) page_release(cache, s->pages[--s->n_pages]);
    s->length = n_tokens;
}

pe_status pe_kv_truncate(pe_kv_cache *cache, int32_t id, size_t n_tokens, char *err) {
    sequence *s = find(cache, id);
    if (s == NULL) return no_such_sequence(id, err);
    if (n_tokens > s->length) {
        snprintf(err, PE_ERR_LEN, "cannot truncate sequence %d of %zu tokens to %zu", (int)id, s->length, n_tokens);
        return PE_ERR_INVALID_ARGUMENT;
    }
    shrink(cache, s, n_tokens);
    return PE_OK;
}

pe_status pe_kv_drop(pe_kv_cache *cache, int32_t id, char *err) {
    sequence *s = find(cache, id);
    if (s == NULL) return no_such_sequence(id, err);
    shrink(cache, s, 0);
    s->used = false;
    return PE_OK;
}

static pe_status reserve_pages(pe_kv_cache *cache, sequence *s, size_t n_pages, char *err) {
    if (n_pages <= s->capacity) return PE_OK;
    size_t capacity = n_pages * 2;
    page **grown = realloc(s->pages, capacity * sizeof *grown);
    if (grown == NULL) return out_of_memory(cache, err);
    s->pages = grown;
    s->capacity = capacity;
    return PE_OK;
}

pe_status pe_kv_fork(pe_kv_cache *cache, int32_t source, size_t n_tokens, int32_t *out, char *err) {
    const sequence *from = find(cache, source);
    if (from == NULL) return no_such_sequence(source, err);
    if (n_tokens > from->length) {
        snprintf(err, PE_ERR_LEN, "cannot fork %zu tokens of sequence %d, it has %zu", n_tokens, (int)source,
                 from->length);
        return PE_ERR_INVALID_ARGUMENT;
    }
    pe_status status = pe_kv_new(cache, out, err);
    if (status != PE_OK) return status;
    from = &cache->sequences[source]; /* pe_kv_new may have moved the table */
    sequence *s = &cache->sequences[*out];
    size_t n_pages = pe_pad(n_tokens, PE_CHUNK) / PE_CHUNK;
    status = reserve_pages(cache, s, n_pages, err);
    if (status != PE_OK) {
        s->used = false;
        return status;
    }
    for (size_t i = 0; i < n_pages; i++) {
        s->pages[i] = from->pages[i];
        s->pages[i]->n_references++;
    }
    s->n_pages = n_pages;
    s->length = n_tokens;
    return PE_OK;
}

/* The last page is about to be written: give this sequence its own copy if it is shared. */
static pe_status own_last_page(pe_kv_cache *cache, sequence *s, char *err) {
    if (s->length % PE_CHUNK == 0 || s->pages[s->n_pages - 1]->n_references == 1) return PE_OK;
    page *copy = page_new(cache);
    if (copy == NULL) return out_of_memory(cache, err);
    memcpy(copy->data, s->pages[s->n_pages - 1]->data, cache->page_bytes);
    page_release(cache, s->pages[s->n_pages - 1]);
    s->pages[s->n_pages - 1] = copy;
    return PE_OK;
}

pe_status pe_kv_extend(pe_kv_cache *cache, int32_t id, size_t n_more, char *err) {
    sequence *s = find(cache, id);
    if (s == NULL) return no_such_sequence(id, err);
    size_t length = s->length, n_pages = pe_pad(length + n_more, PE_CHUNK) / PE_CHUNK;
    if (n_more == 0) return PE_OK;
    pe_status status = reserve_pages(cache, s, n_pages, err);
    if (status == PE_OK) status = own_last_page(cache, s, err);
    if (status != PE_OK) return status;
    while (s->n_pages < n_pages) {
        page *p = page_new(cache);
        if (p == NULL) {
            shrink(cache, s, length);
            return out_of_memory(cache, err);
        }
        s->pages[s->n_pages++] = p;
    }
    s->length = length + n_more;
    return PE_OK;
}

/* ------------------------------------------------------------------ chunks */

size_t pe_kv_chunk_bytes(const pe_kv_cache *cache) { return cache->chunk_bytes; }

pe_kv_chunk pe_kv_chunk_at(const pe_kv_cache *cache, int32_t id, size_t page_index, uint32_t layer, uint32_t kv_head) {
    char *k = cache->sequences[id].pages[page_index]->data +
              ((size_t)layer * cache->model->config.n_kv_heads + kv_head) * cache->chunk_bytes;
    size_t parts[4];
    chunk_parts(cache, parts);
    char *v = k + parts[0] + parts[1];
    if (cache->dtype == PE_KV_F32) return (pe_kv_chunk){.k_f32 = (float *)k, .v_f32 = (float *)v};
    return (pe_kv_chunk){(int8_t *)k, (float *)(k + parts[0]), (int8_t *)v, (float *)(v + parts[2]), NULL, NULL};
}
