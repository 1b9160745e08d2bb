/* forward.c: ONE forward over a ragged batch: prefill, decode, batches and mixtures are the same call.
 *
 *   tokens -> embeddings -> n_layers x [ norm, qkv, rope, attention, o, +   norm, gate/up, SwiGLU, down, + ] -> logits
 *                                        block.c: matmul.c, attention.c     mlp.c: matmul.c
 *
 * The batch is cut into slices (slice.h), and every stage is a loop over independent units of a slice (pe_parallel_for);
 * between stages all threads meet. The arithmetic is in kernels/ and FORMAT.md. Read from the end: pe_forward,
 * run_batch, run_slice, run_layer. */
#include <stdio.h>
#include <string.h>

#include "block.h"
#include "context.h"
#include "float_env.h"
#include "matmul.h"
#include "mlp.h"
#include "platform.h"
#include "status.h"

/* ------------------------------------------------------------------ one slice through the layers */

/* x[token] = dequantized row `id` of the embeddings: code * scale, exact. */
static void embed(pe_slice *s, size_t token, int32_t id) {
    const pe_matrix *w = &s->model->tok_embeddings;
    size_t stride = pe_x_stride(s->model), panel = (size_t)id / PE_PANEL, row = (size_t)id % PE_PANEL;
    float *x = s->x + token * stride;
    for (size_t i = 0; i < stride; i++) {
        size_t group = panel * w->n_groups + i / PE_GROUP, k4 = i % PE_GROUP / 4;
        int8_t code = w->codes[group * PE_GROUP * PE_PANEL + k4 * 64 + row * 4 + i % 4];
        x[i] = (float)code * pe_half_to_float(w->scales[group * PE_PANEL + row]);
    }
}

static pe_status run_layer(pe_context *c, uint32_t index, char *err) {
    pe_status status = pe_block(&c->slice, c->kv, index, err);
    if (status != PE_OK) return status;
    pe_mlp(&c->slice, &c->model->layers[index]);
    char where[32];
    snprintf(where, sizeof where, "in layer %u", index);
    return pe_slice_check(&c->slice, where, err);
}

/* Logits of the rows of the slice that want them, after the n_logits rows of earlier slices. */
static void compute_logits(pe_context *c, const uint8_t *want) {
    pe_slice *s = &c->slice;
    size_t x_stride = pe_x_stride(c->model), vocab_padded = pe_pad(c->model->config.vocab_size, PE_PANEL), n = 0;
    for (size_t t = 0; t < s->n_tokens; t++)
        if (want[t]) memmove(s->x + n++ * x_stride, s->x + t * x_stride, x_stride * sizeof(float));
    if (n == 0) return;
    pe_quantize_rows(s, s->x, x_stride, n, c->model->config.dim, c->model->norm);
    pe_matmul(s, &c->model->output, NULL, c->logits + c->n_logits * vocab_padded, vocab_padded, PE_STORE);
    c->n_logits += n;
}

static pe_status run_slice(pe_context *c, const int32_t *tokens, const uint8_t *want, char *err) {
    for (size_t t = 0; t < c->slice.n_tokens; t++) embed(&c->slice, t, tokens[t]);
    pe_slice_prepare(&c->slice);
    for (uint32_t layer = 0; layer < c->model->config.n_layers; layer++) {
        pe_status status = run_layer(c, layer, err);
        if (status != PE_OK) return status;
    }
    compute_logits(c, want);
    return pe_slice_check(&c->slice, "before the logits", err);
}

/* ------------------------------------------------------------------ the call */

static pe_status check_batch(const pe_context *c, const pe_batch *batch, char *err) {
    if (batch->n_tokens == 0) return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "the batch is empty");
    for (size_t i = 0; i < batch->n_tokens; i++) {
        if (batch->tokens[i] < 0 || (uint32_t)batch->tokens[i] >= c->model->config.vocab_size)
            return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "token id %d is outside the vocabulary of %u",
                           (int)batch->tokens[i], c->model->config.vocab_size);
        if (pe_kv_length(c->kv, batch->sequences[i]) == SIZE_MAX)
            return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "there is no sequence %d", (int)batch->sequences[i]);
    }
    return PE_OK;
}

/* Take the next position of each row's sequence, uncommitted. */
static pe_status place_slice(pe_context *c, const int32_t *sequences, char *err) {
    pe_slice *s = &c->slice;
    memcpy(s->sequences, sequences, s->n_tokens * sizeof *sequences);
    for (size_t t = 0; t < s->n_tokens; t++) {
        size_t length = pe_kv_length(c->kv, sequences[t]);
        if (length >= c->model->config.max_seq_len)
            return pe_fail(PE_ERR_CONTEXT_FULL, err, "sequence %d is full: the model's context holds %u tokens",
                           (int)sequences[t], c->model->config.max_seq_len);
        pe_status status = pe_kv_extend(c->kv, sequences[t], 1, err);
        if (status != PE_OK) return status;
        s->positions[t] = length;
    }
    return PE_OK;
}

static pe_status run_batch(pe_context *c, const pe_batch *batch, char *err) {
    for (size_t begin = 0; begin < batch->n_tokens; begin += PE_SLICE) {
        size_t n = batch->n_tokens - begin < PE_SLICE ? batch->n_tokens - begin : PE_SLICE;
        pe_status status = pe_slice_reserve(&c->slice, n, err);
        if (status != PE_OK) return status;
        c->slice.n_tokens = n;
        status = place_slice(c, batch->sequences + begin, err);
        if (status == PE_OK) status = run_slice(c, batch->tokens + begin, batch->want_logits + begin, err);
        if (status != PE_OK) return status;
    }
    return PE_OK;
}

pe_status pe_forward(pe_context *c, const pe_batch *batch, char *err) {
    pe_status status = check_batch(c, batch, err);
    if (status != PE_OK) return status;
    size_t n_wanted = 0;
    for (size_t i = 0; i < batch->n_tokens; i++) n_wanted += batch->want_logits[i] != 0;
    status = pe_context_reserve_logits(c, n_wanted, err);
    if (status != PE_OK) return status;
    uint64_t float_env = pe_float_env_enter();
    pe_control control = {.poll = batch->poll, .poll_user = batch->poll_user, .deadline_ns = batch->deadline_ns};
    control.last_poll_ns = pe_now_ns();
    c->slice.control = &control;
    atomic_store(&c->slice.not_finite, false);
    status = run_batch(c, batch, err);
    for (size_t i = 0; i < batch->n_tokens; i++) {
        if (status == PE_OK) {
            pe_kv_commit(c->kv, batch->sequences[i], batch->tokens[i]);
        } else {
            pe_kv_rollback(c->kv, batch->sequences[i]);
        }
    }
    if (status != PE_OK) c->n_logits = 0;
    c->slice.control = NULL;
    pe_float_env_leave(float_env);
    return status;
}

/* ------------------------------------------------------------------ test hooks */

/* pe_debug_block on rows that have their positions. */
static pe_status run_debug_block(pe_context *c, uint32_t layer, float *x, int32_t sequence, char *err) {
    pe_slice *s = &c->slice;
    size_t dim = c->model->config.dim, stride = pe_x_stride(c->model);
    for (size_t t = 0; t < s->n_tokens; t++) {
        s->sequences[t] = sequence;
        s->positions[t] = t;
        memset(s->x + t * stride, 0, stride * sizeof(float));
        memcpy(s->x + t * stride, x + t * dim, dim * sizeof(float));
    }
    pe_slice_prepare(s);
    pe_status status = run_layer(c, layer, err);
    for (size_t t = 0; t < s->n_tokens && status == PE_OK; t++)
        memcpy(x + t * dim, s->x + t * stride, dim * sizeof(float));
    return status;
}

pe_status pe_debug_block(pe_context *c, uint32_t layer, float *x, size_t n_tokens, char *err) {
    if (layer >= c->model->config.n_layers || n_tokens == 0 || n_tokens > PE_SLICE_MAX)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "layer %u or %zu tokens are out of range", layer, n_tokens);
    int32_t sequence;
    pe_status status = pe_slice_reserve(&c->slice, n_tokens, err);
    if (status == PE_OK) status = pe_kv_new(c->kv, &sequence, err);
    if (status != PE_OK) return status;
    uint64_t float_env = pe_float_env_enter();
    atomic_store(&c->slice.not_finite, false);
    c->slice.n_tokens = n_tokens;
    status = pe_kv_extend(c->kv, sequence, n_tokens, err);
    if (status == PE_OK) status = run_debug_block(c, layer, x, sequence, err);
    char ignored[PE_ERR_LEN];
    pe_kv_drop(c->kv, sequence, ignored);
    pe_float_env_leave(float_env);
    return status;
}

size_t pe_debug_kv_page(const pe_context *c, int32_t sequence, uint32_t layer, uint32_t kv_head, size_t page, void *out,
                        size_t capacity) {
    size_t n_bytes = pe_kv_chunk_bytes(c->kv), length = pe_kv_length(c->kv, sequence);
    if (length == SIZE_MAX || page * PE_CHUNK >= length || layer >= c->model->config.n_layers ||
        kv_head >= c->model->config.n_kv_heads)
        return 0;
    pe_kv_chunk kv = pe_kv_chunk_at(c->kv, sequence, page, layer, kv_head);
    if (capacity > 0)
        memcpy(out, kv.k_f32 != NULL ? (void *)kv.k_f32 : (void *)kv.k, n_bytes < capacity ? n_bytes : capacity);
    return n_bytes;
}
