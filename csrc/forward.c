/* forward.c: ONE forward over a ragged batch: prefill, decode, batches and mixtures are the same call.
 *
 *   tokens -> embeddings -> n_layers x [ norm, qkv, rope, attention, o, +   norm, gate/up, SwiGLU, down, + ] -> norm -> logits
 *
 * Every stage is a loop over independent units (pe_parallel_for); between stages all threads meet. Buffers and their
 * shapes are in forward.h, the arithmetic in kernels/ and FORMAT.md. */
#include "forward.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "float_env.h"
#include "kernels/pe_math.h"

static void note_bits(pe_context *c, uint32_t absmax_bits) {
    if (absmax_bits >= PE_NOT_FINITE_BITS) atomic_store_explicit(&c->not_finite, true, memory_order_relaxed);
}

/* ------------------------------------------------------------------ embeddings */

/* x[token] = dequantized row `id` of the embeddings: code * scale, exact. */
static void embed(pe_context *c, size_t token, int32_t id) {
    const pe_matrix *w = &c->model->tok_embeddings;
    size_t dim = c->model->config.dim, stride = pe_pad(dim, PE_PANEL), panel = (size_t)id / PE_PANEL,
           row = (size_t)id % PE_PANEL;
    float *x = c->x + token * stride;
    for (size_t i = 0; i < stride; i++) {
        size_t group = panel * w->n_groups + i / PE_GROUP, k4 = i % PE_GROUP / 4;
        int8_t code = w->codes[group * PE_GROUP * PE_PANEL + k4 * 64 + row * 4 + i % 4];
        x[i] = (float)code * pe_half_to_float(w->scales[group * PE_PANEL + row]);
    }
}

/* ------------------------------------------------------------------ quantized inputs */

/* Rows of a float matrix, normed or not, into context->act. */
typedef struct quantize_job {
    pe_context *c;
    const float *rows;
    size_t stride, n;  /* n columns of each row */
    const float *norm; /* RMSNorm weight or NULL */
} quantize_job;

static void quantize_unit(void *arg, size_t block, int thread) {
    quantize_job *j = arg;
    pe_context *c = j->c;
    pe_activations *act = &c->act;
    size_t first = block * PE_TOKEN_BLOCK, n_groups = act->n / PE_X_GROUP;
    size_t left = act->n_tokens - first, n_tokens = left < PE_TOKEN_BLOCK ? left : PE_TOKEN_BLOCK;
    size_t width = pe_block_width(left);
    if (n_tokens < width) {
        memset(act->codes + first * act->n, 0, width * act->n);
        memset(act->scales + first * n_groups, 0, width * n_groups * sizeof *act->scales);
        memset(act->corrections + first * n_groups, 0, width * n_groups * sizeof *act->corrections);
    }
    for (size_t t = 0; t < n_tokens; t++) {
        const float *row = j->rows + (first + t) * j->stride;
        if (j->norm != NULL) {
            float *normed = pe_thread_scratch(c, thread);
            note_bits(c, pe_float_bits(c->kernels->rmsnorm(normed, row, j->norm, j->n, c->model->config.norm_eps)) &
                             0x7fffffffu);
            row = normed;
        }
        note_bits(c, c->kernels->quantize(act->codes + first * act->n + t * 4, act->scales + first * n_groups + t,
                                          act->corrections + first * n_groups + t, width, row, j->n, act->n));
    }
}

static void quantize_rows(pe_context *c, const float *rows, size_t stride, size_t n_rows, size_t n, const float *norm) {
    c->act.n = pe_pad(n, PE_GROUP);
    c->act.n_tokens = n_rows;
    quantize_job j = {c, rows, stride, n, norm};
    pe_parallel_for(c->n_threads, pe_pad(n_rows, PE_TOKEN_BLOCK) / PE_TOKEN_BLOCK, quantize_unit, &j, c->control);
}

/* ------------------------------------------------------------------ matrix products */

typedef enum epilogue { STORE, ADD, SWIGLU } epilogue;

/* out = act * w^T (+ bias), stored, added to out, or folded by SwiGLU. */
typedef struct matmul_job {
    pe_context *c;
    const pe_matrix *w;
    const float *bias; /* padded to 16 rows, or NULL */
    float *out;
    size_t out_stride, panels_per_unit;
    epilogue epilogue;
} matmul_job;

static void add_bias(pe_context *c, float *out, size_t stride, size_t n_tokens, const float *bias, size_t n) {
    for (size_t t = 0; t < n_tokens; t++) c->kernels->add(out + t * stride, bias, n);
}

/* Panels [begin, end), at most PE_TILE_PANELS, times tokens [first, last), at most PE_TILE_TOKENS. */
static void matmul_tile(const matmul_job *j, size_t begin, size_t end, size_t first, size_t last, float *tile) {
    pe_context *c = j->c;
    size_t width = (end - begin) * PE_PANEL;
    c->kernels->matmul(tile, width, j->w, begin, end, &c->act, first, last);
    if (j->bias != NULL) add_bias(c, tile, width, last - first, j->bias + begin * PE_PANEL, width);
    for (size_t t = first; t < last; t++) {
        const float *row = tile + (t - first) * width;
        float *out = j->out + t * j->out_stride;
        if (j->epilogue == ADD) {
            c->kernels->add(out + begin * PE_PANEL, row, width);
        } else {
            c->kernels->swiglu(out + begin / 2 * PE_PANEL, row, (end - begin) / 2);
        }
    }
}

static void matmul_unit(void *arg, size_t unit, int thread) {
    matmul_job *j = arg;
    pe_context *c = j->c;
    size_t begin = unit * j->panels_per_unit, end = begin + j->panels_per_unit, n_tokens = c->act.n_tokens;
    if (end > j->w->n_panels) end = j->w->n_panels;
    if (j->epilogue == STORE) {
        float *out = j->out + begin * PE_PANEL;
        c->kernels->matmul(out, j->out_stride, j->w, begin, end, &c->act, 0, n_tokens);
        if (j->bias != NULL)
            add_bias(c, out, j->out_stride, n_tokens, j->bias + begin * PE_PANEL, (end - begin) * PE_PANEL);
        return;
    }
    for (size_t p = begin; p < end; p += PE_TILE_PANELS)
        for (size_t t = 0; t < n_tokens; t += PE_TILE_TOKENS)
            matmul_tile(j, p, end - p < PE_TILE_PANELS ? end : p + PE_TILE_PANELS, t,
                        n_tokens - t < PE_TILE_TOKENS ? n_tokens : t + PE_TILE_TOKENS, pe_thread_scratch(c, thread));
}

/* Small enough that no thread waits long for the last unit, and an even number of panels: kernels like pairs, SwiGLU
 * needs them. */
static size_t panels_per_unit(const pe_context *c, size_t n_panels) {
    size_t panels = n_panels / ((size_t)c->n_threads * 16) / 2 * 2;
    return panels < 2 ? 2 : panels > 64 ? 64 : panels;
}

static void matmul(pe_context *c, const pe_matrix *w, const float *bias, float *out, size_t out_stride,
                   epilogue epilogue) {
    matmul_job j = {c, w, bias, out, out_stride, panels_per_unit(c, w->n_panels), epilogue};
    pe_parallel_for(c->n_threads, (w->n_panels + j.panels_per_unit - 1) / j.panels_per_unit, matmul_unit, &j,
                    c->control);
}

/* ------------------------------------------------------------------ q, k, v */

static void put_query(pe_context *c, size_t token, size_t head, const float *q) {
    const pe_model *model = c->model;
    size_t n_rep = model->config.n_heads / model->config.n_kv_heads, d = model->head_dim_p, g = d / PE_X_GROUP;
    size_t row = (head / n_rep * c->capacity + token) * n_rep + head % n_rep;
    if (c->kv_dtype == PE_KV_F32) {
        memset(c->q_f32 + row * d, 0, d * sizeof(float));
        memcpy(c->q_f32 + row * d, q, model->config.head_dim * sizeof(float));
        return;
    }
    note_bits(c, c->kernels->quantize(c->q + row * d, c->q_scales + row * g, c->q_corrections + row * g, 1, q,
                                      model->config.head_dim, d));
}

/* Quantize k and v (head_dim) and put them at `position` of the cache: k as a lane of its panel, v as a row. */
static void put_key_value(pe_context *c, size_t token, uint32_t layer, uint32_t kv_head, const float *k,
                          const float *v) {
    const pe_model *model = c->model;
    size_t d = model->head_dim_p, head_dim = model->config.head_dim;
    size_t position = c->positions[token], in_chunk = position % PE_CHUNK, panel = in_chunk / PE_PANEL,
           lane = in_chunk % PE_PANEL;
    pe_kv_chunk kv = pe_kv_chunk_at(c->kv, c->sequences[token], position / PE_CHUNK, layer, kv_head);
    if (c->kv_dtype == PE_KV_F32) {
        for (size_t i = 0; i < d; i++) {
            kv.k_f32[(panel * d + i) * PE_PANEL + lane] = i < head_dim ? k[i] : 0.0f;
            kv.v_f32[in_chunk * d + i] = i < head_dim ? v[i] : 0.0f;
        }
        return;
    }
    int8_t codes[PE_MAX_HEAD_DIM];
    float scales[PE_MAX_HEAD_DIM / PE_X_GROUP];
    int32_t corrections[PE_MAX_HEAD_DIM / PE_X_GROUP];
    note_bits(c, c->kernels->quantize(codes, scales, corrections, 1, k, head_dim, d));
    for (size_t i = 0; i < d; i += 4) memcpy(kv.k + (panel * d + i) * PE_PANEL + lane * 4, codes + i, 4);
    for (size_t g = 0; g < d / PE_X_GROUP; g++)
        kv.k_scales[(panel * (d / PE_X_GROUP) + g) * PE_PANEL + lane] = scales[g];
    memset(kv.v + in_chunk * d, 0, d);
    note_bits(c, c->kernels->quantize_group(kv.v + in_chunk * d, &kv.v_scales[in_chunk], v, head_dim));
}

typedef struct qkv_job {
    pe_context *c;
    uint32_t layer;
} qkv_job;

/* One token: q and k normed (qk_norm) and rotated, q quantized, k and v into the cache. */
static void qkv_unit(void *arg, size_t token, int thread) {
    (void)thread;
    qkv_job *j = arg;
    pe_context *c = j->c;
    const pe_model *model = c->model;
    const pe_layer *layer = &model->layers[j->layer];
    size_t head_dim = model->config.head_dim, half = head_dim / 2;
    float *q = c->qkv + token * pe_pad(model->q_dim + 2 * model->kv_dim, PE_PANEL), *k = q + model->q_dim,
          *v = k + model->kv_dim;
    const float *cos = c->cos + token * half, *sin = c->sin + token * half;
    for (size_t head = 0; head < model->config.n_heads; head++) {
        float *row = q + head * head_dim;
        if (layer->q_norm != NULL) c->kernels->rmsnorm(row, row, layer->q_norm, head_dim, model->config.norm_eps);
        c->kernels->rope(row, cos, sin, head_dim);
        put_query(c, token, head, row);
    }
    for (uint32_t head = 0; head < model->config.n_kv_heads; head++) {
        float *row = k + head * head_dim;
        if (layer->k_norm != NULL) c->kernels->rmsnorm(row, row, layer->k_norm, head_dim, model->config.norm_eps);
        c->kernels->rope(row, cos, sin, head_dim);
        put_key_value(c, token, j->layer, head, row, v + head * head_dim);
    }
}

/* ------------------------------------------------------------------ layers */

/* attention.c walks the cache by blocks of queries; find them: runs of one sequence, cut so that rows fit the kernels'
 * scratch. */
static void find_query_blocks(pe_context *c) {
    size_t n_rep = c->model->config.n_heads / c->model->config.n_kv_heads;
    size_t most = n_rep >= PE_ATTENTION_ROWS ? 1 : PE_ATTENTION_ROWS / n_rep;
    c->n_blocks = 0;
    for (size_t i = 0; i < c->n_tokens; i++) {
        pe_query_block *last = c->n_blocks > 0 ? &c->blocks[c->n_blocks - 1] : NULL;
        if (last != NULL && last->sequence == c->sequences[i] && last->n_tokens < most) {
            last->n_tokens++;
        } else {
            c->blocks[c->n_blocks++] = (pe_query_block){i, 1, c->positions[i], c->sequences[i]};
        }
    }
}

/* Positions, RoPE angles and query blocks of a slice: the same for all layers. */
static void prepare_slice(pe_context *c) {
    size_t half = c->model->config.head_dim / 2;
    for (size_t t = 0; t < c->n_tokens; t++)
        for (size_t i = 0; i < half; i++)
            pe_cos_sin((float)c->positions[t] * c->model->inv_freq[i], &c->cos[t * half + i], &c->sin[t * half + i]);
    find_query_blocks(c);
}

/* After a stage: was the call cancelled (then units were skipped and buffers hold anything), or did an infinity or NaN
 * appear? */
static pe_status check_stage(pe_context *c, const char *where, char *err) {
    if (c->control != NULL && atomic_load(&c->control->cancelled)) {
        snprintf(err, PE_ERR_LEN, "the call was cancelled or timed out");
        return PE_ERR_CANCELLED;
    }
    if (!atomic_load(&c->not_finite)) return PE_OK;
    snprintf(err, PE_ERR_LEN, "an infinity or NaN appeared %s", where);
    return PE_ERR_NOT_FINITE;
}

static pe_status run_layer(pe_context *c, uint32_t index, char *err) {
    const pe_model *model = c->model;
    const pe_config *config = &model->config;
    const pe_layer *layer = &model->layers[index];
    size_t n = c->n_tokens, dim = config->dim, x_stride = pe_pad(dim, PE_PANEL),
           h_stride = pe_pad(config->hidden_dim, PE_PANEL);

    quantize_rows(c, c->x, x_stride, n, dim, layer->attention_norm);
    matmul(c, &layer->wqkv, layer->wqkv_bias, c->qkv, pe_pad(model->q_dim + 2 * model->kv_dim, PE_PANEL), STORE);
    qkv_job qkv = {c, index};
    pe_parallel_for(c->n_threads, n, qkv_unit, &qkv, c->control);
    pe_status status = pe_attention(c, index, err);
    if (status != PE_OK) return status;
    quantize_rows(c, c->att, model->q_dim, n, model->q_dim, NULL);
    matmul(c, &layer->wo, layer->wo_bias, c->x, x_stride, ADD);

    quantize_rows(c, c->x, x_stride, n, dim, layer->ffn_norm);
    matmul(c, &layer->w_gate_up, NULL, c->h, h_stride, SWIGLU);
    quantize_rows(c, c->h, h_stride, n, config->hidden_dim, NULL);
    matmul(c, &layer->w_down, NULL, c->x, x_stride, ADD);

    char where[32];
    snprintf(where, sizeof where, "in layer %u", index);
    return check_stage(c, where, err);
}

/* Logits of the rows of the slice that want them, after the n_logits rows of earlier slices. */
static void compute_logits(pe_context *c, const uint8_t *want) {
    size_t x_stride = pe_pad(c->model->config.dim, PE_PANEL),
           vocab_padded = pe_pad(c->model->config.vocab_size, PE_PANEL), n = 0;
    for (size_t t = 0; t < c->n_tokens; t++)
        if (want[t]) memmove(c->x + n++ * x_stride, c->x + t * x_stride, x_stride * sizeof(float));
    if (n == 0) return;
    quantize_rows(c, c->x, x_stride, n, c->model->config.dim, c->model->norm);
    matmul(c, &c->model->output, NULL, c->logits + c->n_logits * vocab_padded, vocab_padded, STORE);
    c->n_logits += n;
}

static pe_status run_slice(pe_context *c, const int32_t *tokens, const uint8_t *want, char *err) {
    for (size_t t = 0; t < c->n_tokens; t++) embed(c, t, tokens[t]);
    prepare_slice(c);
    for (uint32_t layer = 0; layer < c->model->config.n_layers; layer++) {
        pe_status status = run_layer(c, layer, err);
        if (status != PE_OK) return status;
    }
    compute_logits(c, want);
    return check_stage(c, "before the logits", err);
}

/* ------------------------------------------------------------------ the call */

static pe_status check_batch(const pe_context *c, const pe_batch *batch, char *err) {
    if (batch->n_tokens == 0) {
        snprintf(err, PE_ERR_LEN, "the batch is empty");
        return PE_ERR_INVALID_ARGUMENT;
    }
    for (size_t i = 0; i < batch->n_tokens; i++) {
        if (batch->tokens[i] < 0 || (uint32_t)batch->tokens[i] >= c->model->config.vocab_size) {
            snprintf(err, PE_ERR_LEN, "token id %d is outside the vocabulary of %u", (int)batch->tokens[i],
                     c->model->config.vocab_size);
            return PE_ERR_INVALID_ARGUMENT;
        }
        if (pe_kv_length(c->kv, batch->sequences[i]) == SIZE_MAX) {
            snprintf(err, PE_ERR_LEN, "there is no sequence %d", (int)batch->sequences[i]);
            return PE_ERR_INVALID_ARGUMENT;
        }
    }
    return PE_OK;
}

/* Take the next position of each row's sequence, uncommitted. */
static pe_status place_slice(pe_context *c, const int32_t *sequences, char *err) {
    memcpy(c->sequences, sequences, c->n_tokens * sizeof *sequences);
    for (size_t t = 0; t < c->n_tokens; t++) {
        size_t length = pe_kv_length(c->kv, sequences[t]);
        if (length >= c->model->config.max_seq_len) {
            snprintf(err, PE_ERR_LEN, "sequence %d is full: the model's context holds %u tokens", (int)sequences[t],
                     c->model->config.max_seq_len);
            return PE_ERR_CONTEXT_FULL;
        }
        pe_status status = pe_kv_extend(c->kv, sequences[t], 1, err);
        if (status != PE_OK) return status;
        c->positions[t] = length;
    }
    return PE_OK;
}

static pe_status reserve_logits(pe_context *c, const pe_batch *batch, char *err) {
    size_t n_rows = 0;
    for (size_t i = 0; i < batch->n_tokens; i++) n_rows += batch->want_logits[i] != 0;
    c->n_logits = 0;
    if (n_rows <= c->logits_capacity) return PE_OK;
    size_t row_bytes = pe_pad(c->model->config.vocab_size, PE_PANEL) * sizeof(float);
    free(c->logits);
    c->logits_capacity = 0;
    c->logits = n_rows > SIZE_MAX / row_bytes ? NULL : aligned_alloc(64, n_rows * row_bytes);
    if (c->logits == NULL) {
        snprintf(err, PE_ERR_LEN, "out of memory for %zu rows of %u logits", n_rows, c->model->config.vocab_size);
        return PE_ERR_OUT_OF_MEMORY;
    }
    c->logits_capacity = n_rows;
    return PE_OK;
}

static pe_status run_batch(pe_context *c, const pe_batch *batch, char *err) {
    for (size_t begin = 0; begin < batch->n_tokens; begin += PE_SLICE) {
        size_t n = batch->n_tokens - begin < PE_SLICE ? batch->n_tokens - begin : PE_SLICE;
        pe_status status = pe_context_reserve(c, n, err);
        if (status != PE_OK) return status;
        c->n_tokens = n;
        status = place_slice(c, batch->sequences + begin, err);
        if (status == PE_OK) status = run_slice(c, batch->tokens + begin, batch->want_logits + begin, err);
        if (status != PE_OK) return status;
    }
    return PE_OK;
}

pe_status pe_forward(pe_context *c, const pe_batch *batch, char *err) {
    pe_status status = check_batch(c, batch, err);
    if (status == PE_OK) status = reserve_logits(c, batch, err);
    if (status != PE_OK) return status;
    uint64_t float_env = pe_float_env_enter();
    pe_control control = {.poll = batch->poll, .poll_user = batch->poll_user, .deadline_ns = batch->deadline_ns};
    control.last_poll_ns = pe_now_ns();
    c->control = &control;
    atomic_store(&c->not_finite, false);
    status = run_batch(c, batch, err);
    for (size_t i = 0; i < batch->n_tokens; i++) {
        if (status == PE_OK) {
            pe_kv_commit(c->kv, batch->sequences[i], batch->tokens[i]);
        } else {
            pe_kv_rollback(c->kv, batch->sequences[i]);
        }
    }
    if (status != PE_OK) c->n_logits = 0;
    c->control = NULL;
    pe_float_env_leave(float_env);
    return status;
}

/* ------------------------------------------------------------------ test hooks */

pe_status pe_debug_block(pe_context *c, uint32_t layer, float *x, size_t n_tokens, char *err) {
    if (layer >= c->model->config.n_layers || n_tokens == 0 || n_tokens > PE_SLICE_MAX) {
        snprintf(err, PE_ERR_LEN, "layer %u or %zu tokens are out of range", layer, n_tokens);
        return PE_ERR_INVALID_ARGUMENT;
    }
    int32_t sequence;
    size_t dim = c->model->config.dim, stride = pe_pad(dim, PE_PANEL);
    pe_status status = pe_context_reserve(c, n_tokens, err);
    if (status == PE_OK) status = pe_kv_new(c->kv, &sequence, err);
    if (status != PE_OK) return status;
    uint64_t float_env = pe_float_env_enter();
    atomic_store(&c->not_finite, false);
    status = pe_kv_extend(c->kv, sequence, n_tokens, err);
    c->n_tokens = n_tokens;
    for (size_t t = 0; t < n_tokens && status == PE_OK; t++) {
        c->sequences[t] = sequence;
        c->positions[t] = t;
        memset(c->x + t * stride, 0, stride * sizeof(float));
        memcpy(c->x + t * stride, x + t * dim, dim * sizeof(float));
    }
    if (status == PE_OK) {
        prepare_slice(c);
        status = run_layer(c, layer, err);
    }
    for (size_t t = 0; t < n_tokens && status == PE_OK; t++)
        memcpy(x + t * dim, c->x + t * stride, dim * sizeof(float));
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
        memcpy(out, c->kv_dtype == PE_KV_F32 ? (void *)kv.k_f32 : (void *)kv.k,
               n_bytes < capacity ? n_bytes : capacity);
    return n_bytes;
}
