/* context.c: life of a context: its memory and the sequences of its cache. */
#include "context.h"

#include <stdlib.h>

#include "attention.h"
#include "kv_snapshot.h"
#include "matmul.h"
#include "platform.h"
#include "status.h"

/* Floats between two rows of logits. A vocabulary is often a multiple of what a cache's ways hold: without a gap the lines that a
 * tile of the output matrix stores, one of each row, would want the same few places. */
enum { LOGITS_GAP = PE_PANEL };

/* ------------------------------------------------------------------ life */

static pe_status check_arguments(const pe_model *model, pe_kv_dtype kv_dtype, int n_threads, char *err) {
    if (n_threads < 0 || n_threads > PE_MAX_THREADS)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "n_threads is %d, expected 0 (automatic) to %d", n_threads,
                       PE_MAX_THREADS);
    if (!model->ready) return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "the model has no weights yet");
    if (kv_dtype != PE_KV_INT8 && kv_dtype != PE_KV_F32)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "kv_dtype is %d, expected 0 (int8) or 1 (f32)", (int)kv_dtype);
    return PE_OK;
}

static pe_status create_slice(pe_context *c, pe_kv_dtype kv_dtype, int n_threads, char *err) {
    size_t matmul = pe_matmul_scratch_floats(), attention = pe_attention_scratch_floats(c->model);
    return pe_slice_create(&c->slice, c->model, pe_kernels_selected(), kv_dtype, n_threads,
                           matmul > attention ? matmul : attention, err);
}

pe_status pe_context_create(pe_context **out, const pe_model *model, pe_kv_dtype kv_dtype, int n_threads, char *err) {
    *out = NULL;
    const char *isa;
    pe_status status = check_arguments(model, kv_dtype, n_threads, err);
    if (status == PE_OK) status = pe_isa_active(&isa, err);
    if (status != PE_OK) return status;
    if (n_threads == 0) {
        pe_thread_info info;
        pe_thread_info_get(&info);
        n_threads = info.n_default;
    }
    pe_context *c = calloc(1, sizeof *c);
    if (c == NULL) return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for a context");
    c->model = model;
    c->logits.stride = pe_pad(model->config.vocab_size, PE_PANEL) + LOGITS_GAP;
    c->hidden.stride = model->config.dim;
    status = pe_pool_acquire(n_threads, err);
    if (status != PE_OK) {
        free(c);
        return status;
    }
    status = create_slice(c, kv_dtype, n_threads, err);
    if (status == PE_OK) status = pe_kv_cache_create(&c->kv, model, kv_dtype, err);
    if (status != PE_OK) {
        pe_context_destroy(c);
        return status;
    }
    *out = c;
    return PE_OK;
}

void pe_context_destroy(pe_context *c) {
    if (c == NULL) return;
    pe_pool_release();
    pe_slice_destroy(&c->slice);
    pe_kv_cache_destroy(c->kv);
    pe_aligned_free(c->logits.data);
    pe_aligned_free(c->hidden.data);
    free(c);
}

const char *pe_context_isa(const pe_context *c) { return c->slice.kernels->name; }
int pe_context_n_threads(const pe_context *c) { return c->slice.n_threads; }

size_t pe_context_memory(const pe_context *c, size_t *scratch_bytes) {
    size_t n_results = c->logits.capacity * c->logits.stride + c->hidden.capacity * c->hidden.stride;
    *scratch_bytes = pe_slice_bytes(&c->slice) + n_results * sizeof(float);
    pe_cache_stats stats;
    pe_kv_cache_stats(c->kv, &stats);
    return stats.n_bytes;
}

/* ------------------------------------------------------------------ results */

pe_status pe_rows_reserve(pe_rows *rows, size_t n_rows, char *err) {
    rows->n = 0;
    if (n_rows <= rows->capacity) return PE_OK;
    size_t row_bytes = rows->stride * sizeof(float);
    pe_aligned_free(rows->data);
    rows->capacity = 0;
    rows->data = n_rows > SIZE_MAX / row_bytes ? NULL : pe_aligned_alloc(n_rows * row_bytes);
    if (rows->data == NULL)
        return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for %zu rows of %zu results", n_rows, rows->stride);
    rows->capacity = n_rows;
    return PE_OK;
}

static const float *row_of(const pe_rows *rows, size_t k) { return k < rows->n ? pe_rows_at(rows, k) : NULL; }

size_t pe_context_n_logits(const pe_context *c) { return c->logits.n; }
const float *pe_context_logits(const pe_context *c, size_t row) { return row_of(&c->logits, row); }
size_t pe_context_n_hidden(const pe_context *c) { return c->hidden.n; }
const float *pe_context_hidden(const pe_context *c, size_t row) { return row_of(&c->hidden, row); }

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

pe_status pe_sequence_accept(pe_context *c, int32_t sequence, const int32_t *tokens, size_t n, size_t *n_accepted,
                             char *err) {
    return pe_kv_accept(c->kv, sequence, tokens, n, n_accepted, err);
}

pe_status pe_sequence_drop(pe_context *c, int32_t sequence, char *err) { return pe_kv_drop(c->kv, sequence, err); }

pe_status pe_sequence_length(const pe_context *c, int32_t sequence, size_t *out, char *err) {
    *out = pe_kv_tokens(c->kv, sequence, NULL, 0);
    if (pe_kv_length(c->kv, sequence) != SIZE_MAX) return PE_OK;
    return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "there is no sequence %d", (int)sequence);
}

/* ------------------------------------------------------------------ snapshots */

size_t pe_sequence_snapshot_bytes(const pe_context *c, int32_t sequence) { return pe_kv_snapshot_bytes(c->kv, sequence); }

pe_status pe_sequence_save(const pe_context *c, int32_t sequence, void *out, size_t n_bytes, char *err) {
    return pe_kv_snapshot_save(c->kv, sequence, out, n_bytes, err);
}

pe_status pe_sequence_restore(pe_context *c, const int32_t *tokens, size_t n, const uint8_t *salt, const void *in,
                              size_t n_bytes, int32_t *out, char *err) {
    const pe_config *config = &c->model->config;
    if (n > config->max_seq_len)
        return pe_fail(PE_ERR_CONTEXT_FULL, err, "%zu tokens, the context has %u positions", n, config->max_seq_len);
    if ((uintptr_t)in % 64 != 0) return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "keys and values must be aligned to 64 bytes");
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= config->vocab_size)
            return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "token %d is outside of the vocabulary (0 to %u)", (int)tokens[i],
                           config->vocab_size - 1);
    return pe_kv_snapshot_restore(c->kv, c->slice.kernels, tokens, n, salt == NULL ? no_salt : salt, in, n_bytes, out, err);
}
