/* forward.c: ONE forward over a ragged batch: prefill, decode, batches and mixtures are the same call.
 *
 *   tokens -> embeddings -> n_layers x [ norm, qkv, rope, attention, o, +   norm, gate/up, SwiGLU, down, + ] -> logits
 *                                        block.c: matmul.c, attention.c     mlp.c: matmul.c
 *
 * The batch is cut into slices (slice.h), and every stage is a loop over independent units of a slice
 * (pe_parallel_for); between stages all threads meet. The arithmetic is in kernels/ and FORMAT.md. Read from the end:
 * pe_forward, run_batch, run_slice, run_layer. */
#include <stdio.h>
#include <string.h>

#include "adapter.h"
#include "block.h"
#include "context.h"
#include "embedding.h"
#include "float_env.h"
#include "matmul.h"
#include "mlp.h"
#include "platform.h"
#include "status.h"

/* ------------------------------------------------------------------ one slice through the layers */

/* After a stage: the call goes on unless it was cancelled, or a row failed and every row has to succeed. */
static pe_status check_stage(const pe_slice *s, bool rows_may_fail, const char *where, char *err) {
    if (pe_slice_is_cancelled(s)) return pe_fail(PE_ERR_CANCELLED, err, "the call was cancelled or timed out");
    if (!rows_may_fail && pe_slice_n_failed(s) > 0)
        return pe_fail(PE_ERR_NOT_FINITE, err, "an infinity or NaN appeared %s", where);
    return PE_OK;
}

/* The slice's failed rows, and with each of them all rows of its sequence, are failed rows of the batch. */
static void spread_failures(const pe_slice *s, const pe_batch *batch, size_t begin) {
    for (size_t t = 0; t < s->n_tokens; t++) {
        if (!s->failed[t] || batch->failed[begin + s->origins[t]]) continue;
        for (size_t i = 0; i < batch->n_tokens; i++)
            if (batch->sequences[i] == s->sequences[t]) batch->failed[i] = 1;
    }
}

/* slice.selected = the rows whose wants (wants[0] is of the slice's first row) have one of the bits `want`; how many there are. */
static size_t select_rows(pe_slice *s, const uint8_t *wants, uint8_t want) {
    size_t n = 0;
    for (size_t t = 0; t < s->n_tokens; t++)
        if (wants[s->origins[t]] & want) s->selected[n++] = t;
    return n;
}

/* The rows that want nothing leave; if they have failed, the batch knows. */
static void keep_wanting_rows(pe_slice *s, const pe_batch *batch, size_t begin) {
    size_t n = select_rows(s, batch->wants + begin, PE_WANT_LOGITS | PE_WANT_HIDDEN);
    if (n == s->n_tokens) return;
    if (batch->failed != NULL) spread_failures(s, batch, begin);
    pe_slice_keep(s, n);
}

/* The slice begins with row `begin` of the batch; batch NULL: its rows want all of the layer. Of the last layer a row that wants nothing,
 * as all of a prompt but its last, needs keys and values only: what comes after them nobody would read. */
static pe_status run_layer(pe_context *c, uint32_t index, const pe_batch *batch, size_t begin, char *err) {
    pe_slice *s = &c->slice;
    bool rows_may_fail = batch != NULL && batch->failed != NULL;
    char where[32];
    snprintf(where, sizeof where, "in layer %u", index);
    pe_block_project(s, c->kv, index);
    if (batch != NULL && index + 1 == c->model->config.n_layers) {
        pe_status status = check_stage(s, rows_may_fail, where, err);
        if (status != PE_OK) return status;
        keep_wanting_rows(s, batch, begin);
        if (pe_slice_n_failed(s) == s->n_tokens) return PE_OK; /* none is left that could succeed */
    }
    pe_status status = pe_block_attend(s, c->kv, index, err);
    if (status != PE_OK) return status;
    pe_mlp(s, &c->model->layers[index]);
    return check_stage(s, rows_may_fail, where, err);
}

/* ------------------------------------------------------------------ what rows want */

static void hidden_unit(void *arg, size_t unit, int thread) {
    (void)thread;
    pe_context *c = arg;
    pe_slice *s = &c->slice;
    size_t row = s->selected[unit], dim = c->model->config.dim;
    float *out = pe_rows_at(&c->hidden, c->hidden.n + unit);
    pe_slice_norm(s, row, out, s->x + row * pe_x_stride(c->model), c->model->norm, dim);
    pe_slice_note_floats(s, row, out, dim);
}

static void softcap_unit(void *arg, size_t unit, int thread) {
    (void)thread;
    pe_context *c = arg;
    const pe_config *config = &c->model->config;
    c->slice.kernels->softcap(pe_rows_at(&c->logits, c->logits.n + unit), config->vocab_size, config->logits_softcap);
}

/* The wanted results of the slice, behind the rows of earlier slices. */
static void compute_results(pe_context *c, const uint8_t *wants) {
    pe_slice *s = &c->slice;
    size_t n = select_rows(s, wants, PE_WANT_HIDDEN);
    if (n > 0) pe_parallel_for(s->n_threads, n, hidden_unit, c, s->control);
    c->hidden.n += n;
    n = select_rows(s, wants, PE_WANT_LOGITS);
    if (n == 0) return;
    pe_quantize_rows(s, s->x, pe_x_stride(c->model), s->selected, n, c->model->config.dim, c->model->norm);
    pe_matmul(s, &c->model->output, c->model->output_bias, pe_rows_at(&c->logits, c->logits.n), c->logits.stride, PE_STORE);
    if (c->model->config.logits_softcap > 0.0f) pe_parallel_for(s->n_threads, n, softcap_unit, c, s->control);
    c->logits.n += n;
}

/* ------------------------------------------------------------------ the call */

/* Behind a drafted row nothing may be true: the next row of its sequence, if there is one, is drafted too. */
static bool drafts_are_last(const pe_batch *batch) {
    for (size_t i = 0; i < batch->n_tokens; i++) {
        size_t next = i + 1;
        if (!batch->drafted[i]) continue;
        while (next < batch->n_tokens && batch->sequences[next] != batch->sequences[i]) next++;
        if (next < batch->n_tokens && !batch->drafted[next]) return false;
    }
    return true;
}

static pe_status check_batch(const pe_context *c, const pe_batch *batch, char *err) {
    if (batch->n_tokens == 0) return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "the batch is empty");
    for (size_t i = 0; i < batch->n_tokens; i++) {
        if (batch->tokens[i] < 0 || (uint32_t)batch->tokens[i] >= c->model->config.vocab_size)
            return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "token id %d is outside the vocabulary of %u",
                           (int)batch->tokens[i], c->model->config.vocab_size);
        if (pe_kv_length(c->kv, batch->sequences[i]) == SIZE_MAX)
            return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "there is no sequence %d", (int)batch->sequences[i]);
        if (batch->wants[i] & ~(PE_WANT_LOGITS | PE_WANT_HIDDEN))
            return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "row %zu wants %u, which is not known", i, batch->wants[i]);
        if (batch->adapters != NULL && batch->adapters[i] != NULL && batch->adapters[i]->model != c->model)
            return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "row %zu has an adapter of another model", i);
    }
    if (batch->drafted != NULL && !drafts_are_last(batch))
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "a sequence's drafted rows come before others of its rows");
    return PE_OK;
}

/* Rows of a batch that have adapters need more buffers. */
static void expect_adapters(pe_slice *s, const pe_batch *batch) {
    size_t n_ranks = 0;
    for (size_t i = 0; i < batch->n_tokens && batch->adapters != NULL; i++)
        if (batch->adapters[i] != NULL && batch->adapters[i]->n_ranks > n_ranks) n_ranks = batch->adapters[i]->n_ranks;
    pe_slice_expect_adapters(s, n_ranks);
}

static pe_status reserve_results(pe_context *c, const pe_batch *batch, char *err) {
    size_t n_logits = 0, n_hidden = 0;
    for (size_t i = 0; i < batch->n_tokens; i++) {
        n_logits += (batch->wants[i] & PE_WANT_LOGITS) != 0;
        n_hidden += (batch->wants[i] & PE_WANT_HIDDEN) != 0;
    }
    pe_status status = pe_rows_reserve(&c->logits, n_logits, err);
    return status != PE_OK ? status : pe_rows_reserve(&c->hidden, n_hidden, err);
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

/* Rows of the slice and the tokens that they begin as. */
typedef struct embed_job {
    pe_slice *s;
    const int32_t *tokens; /* (n_tokens) */
} embed_job;

static void embed_unit(void *arg, size_t row, int thread) {
    (void)thread;
    const embed_job *j = arg;
    pe_embed(j->s->model, j->s->kernels, j->s->x + row * pe_x_stride(j->s->model), j->tokens[row]);
}

/* Rows [begin, begin + n_tokens) of the batch, which have their positions, through all layers. Rows of sequences that
 * failed in an earlier slice are carried along, but nothing is computed for them alone. */
static pe_status run_slice(pe_context *c, const pe_batch *batch, size_t begin, char *err) {
    pe_slice *s = &c->slice;
    bool rows_may_fail = batch->failed != NULL;
    embed_job embed = {s, batch->tokens + begin};
    pe_parallel_for(s->n_threads, s->n_tokens, embed_unit, &embed, s->control);
    pe_adapter_group_rows(s, batch->adapters == NULL ? NULL : batch->adapters + begin);
    pe_status status = pe_slice_prepare(s, err);
    if (status != PE_OK) return status;
    if (rows_may_fail) memcpy(s->failed, batch->failed + begin, s->n_tokens);
    for (uint32_t layer = 0; layer < c->model->config.n_layers && pe_slice_n_failed(s) < s->n_tokens; layer++) {
        status = run_layer(c, layer, batch, begin, err);
        if (status != PE_OK) return status;
    }
    compute_results(c, batch->wants + begin);
    return check_stage(s, rows_may_fail, "after the layers", err);
}

static pe_status run_batch(pe_context *c, const pe_batch *batch, char *err) {
    expect_adapters(&c->slice, batch);
    for (size_t begin = 0; begin < batch->n_tokens; begin += PE_SLICE) {
        size_t n = batch->n_tokens - begin < PE_SLICE ? batch->n_tokens - begin : PE_SLICE;
        pe_status status = pe_slice_reserve(&c->slice, n, err);
        if (status != PE_OK) return status;
        c->slice.n_tokens = n;
        status = place_slice(c, batch->sequences + begin, err);
        if (status == PE_OK) status = run_slice(c, batch, begin, err);
        if (status != PE_OK) return status;
        if (batch->failed != NULL) spread_failures(&c->slice, batch, begin);
    }
    return PE_OK;
}

/* All or nothing, for each sequence: its new positions get their tokens (drafted ones for the time being), or are given
 * back. */
static void settle(pe_context *c, const pe_batch *batch, pe_status status) {
    for (size_t i = 0; i < batch->n_tokens; i++) {
        if (status != PE_OK || (batch->failed != NULL && batch->failed[i])) {
            pe_kv_rollback(c->kv, batch->sequences[i]);
        } else if (batch->drafted != NULL && batch->drafted[i]) {
            pe_kv_draft(c->kv, batch->sequences[i], batch->tokens[i]);
        } else {
            pe_kv_commit(c->kv, batch->sequences[i], batch->tokens[i]);
        }
    }
    if (status == PE_OK) return;
    c->logits.n = c->hidden.n = 0;
    if (batch->failed != NULL) memset(batch->failed, 0, batch->n_tokens);
}

pe_status pe_forward(pe_context *c, const pe_batch *batch, char *err) {
    c->logits.n = c->hidden.n = 0; /* a batch that is refused has none either */
    if (batch->failed != NULL) memset(batch->failed, 0, batch->n_tokens);
    pe_kv_forget_drafts(c->kv);
    pe_status status = check_batch(c, batch, err);
    if (status == PE_OK) status = reserve_results(c, batch, err);
    if (status != PE_OK) return status;
    uint64_t float_env = pe_float_env_enter();
    pe_control control = {.poll = batch->poll,
                          .poll_user = batch->poll_user,
                          .deadline_ns = batch->deadline_ns,
                          .last_poll_ns = pe_now_ns(),
                          .cancel = batch->cancel};
    c->slice.control = &control;
    status = run_batch(c, batch, err);
    settle(c, batch, status);
    c->slice.control = NULL;
    pe_float_env_leave(float_env);
    return status;
}

/* ------------------------------------------------------------------ test hooks */

/* pe_debug_block on rows that have their positions. */
static pe_status run_debug_block(pe_context *c, uint32_t layer, float *x, int32_t sequence, char *err) {
    pe_slice *s = &c->slice;
    size_t dim = c->model->config.dim, stride = pe_x_stride(c->model);
    pe_adapter_group_rows(s, NULL);
    for (size_t t = 0; t < s->n_tokens; t++) {
        s->sequences[t] = sequence;
        s->positions[t] = t;
        memset(s->x + t * stride, 0, stride * sizeof(float));
        memcpy(s->x + t * stride, x + t * dim, dim * sizeof(float));
    }
    pe_status status = pe_slice_prepare(s, err);
    if (status == PE_OK) status = run_layer(c, layer, NULL, 0, err);
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
    bool conv = layer < c->model->config.n_layers && c->model->layers[layer].short_conv;
    size_t n_bytes = conv ? PE_CHUNK * pe_x_stride(c->model) * sizeof(float) : pe_kv_chunk_bytes(c->kv), length = pe_kv_length(c->kv, sequence);
    if (length == SIZE_MAX || page >= pe_pad(length, PE_CHUNK) / PE_CHUNK || layer >= c->model->config.n_layers ||
        kv_head >= (conv ? 1 : c->model->config.n_kv_heads))
        return 0;
    const void *data = pe_kv_inputs_at(c->kv, sequence, page, layer);
    if (!conv) {
        pe_kv_chunk kv = pe_kv_chunk_at(c->kv, sequence, page, layer, kv_head);
        data = kv.k_f32 != NULL ? (void *)kv.k_f32 : (void *)kv.k;
    }
    if (data == NULL) return 0;
    if (capacity > 0) memcpy(out, data, n_bytes < capacity ? n_bytes : capacity);
    return n_bytes;
}
