/* context.c: life of a context: scratch memory and the sequences of its cache. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "forward.h"

/* A buffer of the slice, to be allocated together with the others. */
typedef struct buffer {
    void **pointer;
    size_t n_bytes;
} buffer;

enum { N_BUFFERS = 16 };

/* Every per-slice buffer and its size for n tokens. Sizes cannot overflow: dims are capped at 2^22, n at PE_SLICE_MAX. */
static size_t list_buffers(pe_context *c, size_t n, buffer buffers[N_BUFFERS]) {
    const pe_model *model = c->model;
    const pe_config *config = &model->config;
    size_t widest = config->dim > config->hidden_dim ? config->dim : config->hidden_dim;
    if (model->q_dim > widest) widest = model->q_dim;
    widest = pe_pad(widest, PE_GROUP);
    size_t q_elements = n * config->n_heads * model->head_dim_p, q_groups = q_elements / PE_X_GROUP;
    bool f32 = c->kv_dtype == PE_KV_F32;
    const buffer list[] = {
        {(void **)&c->sequences, n * sizeof *c->sequences},
        {(void **)&c->positions, n * sizeof *c->positions},
        {(void **)&c->x, n * pe_pad(config->dim, PE_PANEL) * sizeof(float)},
        {(void **)&c->qkv, n * pe_pad(model->q_dim + 2 * model->kv_dim, PE_PANEL) * sizeof(float)},
        {(void **)&c->att, n * model->q_dim * sizeof(float)},
        {(void **)&c->h, n * pe_pad(config->hidden_dim, PE_PANEL) * sizeof(float)},
        {(void **)&c->act.codes, n * widest},
        {(void **)&c->act.scales, n * widest / PE_X_GROUP * sizeof(float)},
        {(void **)&c->act.corrections, n * widest / PE_X_GROUP * sizeof(int32_t)},
        {(void **)&c->q, f32 ? 0 : q_elements},
        {(void **)&c->q_scales, f32 ? 0 : q_groups * sizeof(float)},
        {(void **)&c->q_corrections, f32 ? 0 : q_groups * sizeof(int32_t)},
        {(void **)&c->q_f32, f32 ? q_elements * sizeof(float) : 0},
        {(void **)&c->cos, n * (config->head_dim / 2) * sizeof(float)},
        {(void **)&c->sin, n * (config->head_dim / 2) * sizeof(float)},
        {(void **)&c->blocks, n * sizeof *c->blocks},
    };
    _Static_assert(sizeof list / sizeof list[0] == N_BUFFERS, "N_BUFFERS");
    memcpy(buffers, list, sizeof list);
    return N_BUFFERS;
}

static void free_buffers(pe_context *c) {
    buffer buffers[N_BUFFERS];
    size_t n = list_buffers(c, c->capacity, buffers);
    for (size_t i = 0; i < n; i++) {
        free(*buffers[i].pointer);
        *buffers[i].pointer = NULL;
    }
    c->capacity = 0;
    c->scratch_bytes = 0;
}

pe_status pe_context_reserve(pe_context *c, size_t n_tokens, char *err) {
    if (n_tokens <= c->capacity) return PE_OK;
    /* One token for a decode, else whole blocks, doubling: few sizes, so few reallocations. */
    size_t capacity = c->capacity == 0 ? 1 : c->capacity;
    while (capacity < n_tokens) capacity *= 2;
    free_buffers(c);
    buffer buffers[N_BUFFERS];
    size_t n = list_buffers(c, capacity, buffers);
    for (size_t i = 0; i < n; i++) {
        if (buffers[i].n_bytes == 0) continue;
        *buffers[i].pointer = aligned_alloc(64, pe_pad(buffers[i].n_bytes, 64));
        if (*buffers[i].pointer == NULL) {
            snprintf(err, PE_ERR_LEN, "out of memory for the buffers of %zu tokens", capacity);
            free_buffers(c);
            return PE_ERR_OUT_OF_MEMORY;
        }
        c->scratch_bytes += buffers[i].n_bytes;
    }
    c->capacity = capacity;
    return PE_OK;
}

static pe_status reserve_thread_scratch(pe_context *c, char *err) {
    size_t tile = (size_t)PE_TILE_TOKENS * PE_TILE_PANELS * PE_PANEL;
    size_t row = pe_pad(c->model->config.dim, PE_GROUP) + pe_pad(c->model->config.head_dim, PE_GROUP) * 4;
    size_t attention = pe_attention_scratch_floats(c->model);
    size_t most = tile > row ? tile : row;
    if (attention > most) most = attention;
    c->thread_scratch_floats = pe_pad(most, 64);
    c->thread_scratch = aligned_alloc(64, c->thread_scratch_floats * (size_t)c->n_threads * sizeof(float));
    if (c->thread_scratch != NULL) return PE_OK;
    snprintf(err, PE_ERR_LEN, "out of memory for the scratch of %d threads", c->n_threads);
    return PE_ERR_OUT_OF_MEMORY;
}

pe_status pe_context_create(pe_context **out, const pe_model *model, pe_kv_dtype kv_dtype, int n_threads, char *err) {
    *out = NULL;
    if (n_threads < 0 || n_threads > PE_MAX_THREADS) {
        snprintf(err, PE_ERR_LEN, "n_threads is %d, expected 0 (automatic) to %d", n_threads, PE_MAX_THREADS);
        return PE_ERR_INVALID_ARGUMENT;
    }
    if (!model->ready) {
        snprintf(err, PE_ERR_LEN, "the model has no weights yet");
        return PE_ERR_INVALID_ARGUMENT;
    }
    if (kv_dtype != PE_KV_INT8 && kv_dtype != PE_KV_F32) {
        snprintf(err, PE_ERR_LEN, "kv_dtype is %d, expected 0 (int8) or 1 (f32)", (int)kv_dtype);
        return PE_ERR_INVALID_ARGUMENT;
    }
    const char *isa;
    pe_status status = pe_isa_active(&isa, err);
    if (status != PE_OK) return status;
    if (n_threads == 0) {
        pe_thread_info info;
        pe_thread_info_get(&info);
        n_threads = info.n_default;
    }
    pe_context *c = calloc(1, sizeof *c);
    if (c == NULL) {
        snprintf(err, PE_ERR_LEN, "out of memory for a context");
        return PE_ERR_OUT_OF_MEMORY;
    }
    c->model = model;
    c->kernels = pe_kernels_selected();
    c->kv_dtype = kv_dtype;
    status = pe_pool_acquire(n_threads, err);
    if (status == PE_OK) c->n_threads = n_threads; /* also: the pool is ours to release */
    if (status == PE_OK) status = pe_kv_cache_create(&c->kv, model, kv_dtype, err);
    if (status == PE_OK) status = reserve_thread_scratch(c, err);
    if (status != PE_OK) {
        pe_context_destroy(c);
        return status;
    }
    *out = c;
    return PE_OK;
}

void pe_context_destroy(pe_context *c) {
    if (c == NULL) return;
    if (c->n_threads > 0) pe_pool_release();
    free_buffers(c);
    pe_kv_cache_destroy(c->kv);
    free(c->partials);
    free(c->logits);
    free(c->thread_scratch);
    free(c);
}

const char *pe_context_isa(const pe_context *c) { return c->kernels->name; }
int pe_context_n_threads(const pe_context *c) { return c->n_threads; }

size_t pe_context_memory(const pe_context *c, size_t *scratch_bytes) {
    size_t vocab_padded = pe_pad(c->model->config.vocab_size, PE_PANEL);
    *scratch_bytes = c->scratch_bytes + c->thread_scratch_floats * (size_t)c->n_threads * sizeof(float) +
                     (c->partials_capacity + c->logits_capacity * vocab_padded) * sizeof(float);
    pe_cache_stats stats;
    pe_kv_cache_stats(c->kv, &stats);
    return stats.n_pages * stats.page_bytes;
}

size_t pe_context_n_logits(const pe_context *c) { return c->n_logits; }

const float *pe_context_logits(const pe_context *c, size_t row) {
    return row < c->n_logits ? c->logits + row * pe_pad(c->model->config.vocab_size, PE_PANEL) : NULL;
}

/* ------------------------------------------------------------------ sequences */

static const uint8_t no_salt[PE_SALT_BYTES];

void pe_context_cache_stats(const pe_context *c, pe_cache_stats *out) { pe_kv_cache_stats(c->kv, out); }
void pe_context_set_max_pages(pe_context *c, size_t max_pages) { pe_kv_cache_set_max_pages(c->kv, max_pages); }
size_t pe_context_drop_cached(pe_context *c) { return pe_kv_cache_drop_cached(c->kv); }
pe_status pe_context_check(const pe_context *c, char *err) { return pe_kv_cache_check(c->kv, err); }

pe_status pe_sequence_match(pe_context *c, const int32_t *tokens, size_t n, const uint8_t *salt, bool keep,
                            int32_t *out, size_t *n_matched, char *err) {
    return pe_kv_match(c->kv, tokens, n, salt == NULL ? no_salt : salt, keep, out, n_matched, err);
}

size_t pe_sequence_match_length(pe_context *c, const int32_t *tokens, size_t n, const uint8_t *salt) {
    return pe_kv_match_length(c->kv, tokens, n, salt == NULL ? no_salt : salt);
}

size_t pe_sequence_tokens(const pe_context *c, int32_t sequence, int32_t *out, size_t capacity) {
    return pe_kv_tokens(c->kv, sequence, out, capacity);
}

pe_status pe_sequence_new(pe_context *c, int32_t *out, char *err) { return pe_kv_new(c->kv, out, err); }

pe_status pe_sequence_fork(pe_context *c, int32_t source, size_t n_tokens, int32_t *out, char *err) {
    return pe_kv_fork(c->kv, source, n_tokens, out, err);
}

pe_status pe_sequence_truncate(pe_context *c, int32_t sequence, size_t n_tokens, char *err) {
    return pe_kv_truncate(c->kv, sequence, n_tokens, err);
}

pe_status pe_sequence_drop(pe_context *c, int32_t sequence, char *err) { return pe_kv_drop(c->kv, sequence, err); }

pe_status pe_sequence_length(const pe_context *c, int32_t sequence, size_t *out, char *err) {
    *out = pe_kv_length(c->kv, sequence);
    if (*out != SIZE_MAX) return PE_OK;
    snprintf(err, PE_ERR_LEN, "there is no sequence %d", (int)sequence);
    return PE_ERR_INVALID_ARGUMENT;
}
