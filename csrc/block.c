/* block.c: see block.h. */
#include "block.h"

#include <string.h>

#include "adapter.h"
#include "attention.h"
#include "matmul.h"
#include "short_conv.h"

/* One layer's q, k and v of every row: normed, rotated, put where attention looks for them. */
typedef struct qkv_job {
    pe_slice *s;
    pe_kv_cache *kv;
    uint32_t layer;
} qkv_job;

enum { QKV_TOKENS = 4 }; /* tokens of a unit: where they follow each other, they lie side by side in a panel of K and in V */

/* Tokens [first, first + n_tokens) of the slice: a unit. */
typedef struct token_run {
    const qkv_job *job;
    size_t first, n_tokens;
} token_run;

static float *qkv_row(const pe_slice *s, size_t token) { return s->qkv + token * pe_qkv_stride(s->model); }

/* One token: q and k normed (qk_norm) and rotated, in place. */
static void rotate(pe_slice *s, const pe_layer *layer, size_t token) {
    const pe_model *model = s->model;
    size_t head_dim = model->config.head_dim, angle = (layer->rope * s->capacity + token) * (head_dim / 2);
    float *q = qkv_row(s, token), *k = q + model->q_dim;
    bool norm_after = model->config.qk_norm_after_rope;
    bool norm_before = model->config.qk_norm && !model->config.qk_norm_all_heads && !norm_after;
    if (model->config.qk_norm && model->config.qk_norm_all_heads) {
        pe_slice_norm(s, token, q, q, layer->q_norm, model->q_dim);
        pe_slice_norm(s, token, k, k, layer->k_norm, model->kv_dim);
    }
    if (layer->key_bias != NULL && s->kv_dtype == PE_KV_F32) s->kernels->add(k, layer->key_bias_vector, model->kv_dim);
    for (size_t head = 0; head < model->config.n_heads + model->config.n_kv_heads; head++) {
        float *row = q + head * head_dim; /* the heads of k lie behind those of q */
        const float *norm = row < k ? layer->q_norm : layer->k_norm;
        if (norm_before) pe_slice_norm(s, token, row, row, norm, head_dim);
        s->kernels->rope(row, s->cos + angle, s->sin + angle, head_dim);
        if (norm_after) pe_slice_norm(s, token, row, row, norm, head_dim);
    }
}

/* Row of slice.q (.., head_dim_p) and its like that a head of a token is. */
static size_t query_row(const pe_slice *s, size_t token, size_t head) {
    size_t n_rep = s->model->config.n_heads / s->model->config.n_kv_heads;
    return (head / n_rep * s->capacity + token) * n_rep + head % n_rep;
}

/* Heads on their way through quantize_heads, and where their results go. */
typedef struct head_batch {
    pe_heads heads;
    size_t tokens[PE_HEADS];
    float *scales[PE_HEADS];
    int32_t *corrections[PE_HEADS];
} head_batch;

static void add_head(head_batch *b, size_t token, const float *x, int8_t *codes, float *scale, int32_t *correction) {
    size_t h = b->heads.n_heads++;
    b->heads.x[h] = x, b->heads.codes[h] = codes, b->tokens[h] = token, b->scales[h] = scale, b->corrections[h] = correction;
}

/* Quantize the heads of the batch, if it is full or `last`; then it is empty. */
static void quantize_batch(pe_slice *s, head_batch *b, bool last, size_t block, float factor) {
    if (b->heads.n_heads < PE_HEADS && !last) return;
    s->kernels->quantize_heads(&b->heads, s->model->config.head_dim, block, factor);
    for (size_t h = 0; h < b->heads.n_heads; h++) {
        *b->scales[h] = b->heads.scales[h], *b->corrections[h] = b->heads.corrections[h];
        pe_slice_note_bits(s, b->tokens[h], b->heads.absmax_bits[h]);
    }
    b->heads.n_heads = 0;
}

static void put_queries(const token_run *run) {
    pe_slice *s = run->job->s;
    const pe_model *model = s->model;
    size_t n_heads = model->config.n_heads, head_dim = model->config.head_dim, block = pe_hadamard_block(head_dim);
    const pe_key_bias *bias = model->layers[run->job->layer].key_bias;
    head_batch batch = {.heads = {.four_step = 4, .step = 1}};
    for (size_t head = 0; head < n_heads; head++)
        for (size_t t = 0; t < run->n_tokens; t++) {
            size_t token = run->first + t, row = query_row(s, token, head);
            const float *q = qkv_row(s, token) + head * head_dim;
            if (bias != NULL)
                pe_key_bias_times_query(bias, s->kernels, head * model->config.n_kv_heads / n_heads, head_dim, q,
                                        s->q_key_bias + row * head_dim);
            add_head(&batch, token, q, s->q + row * model->head_dim_p, &s->q_scales[row], &s->q_corrections[row]);
            quantize_batch(s, &batch, head + 1 == n_heads && t + 1 == run->n_tokens, block, pe_input_factor(block));
        }
}

/* Where a token's key and value are in the cache. */
static pe_kv_chunk chunk_of(const qkv_job *j, size_t token, size_t kv_head) {
    return pe_kv_chunk_at(j->kv, j->s->sequences[token], j->s->positions[token] / PE_CHUNK, j->layer, (uint32_t)kv_head);
}

/* The lines that a token's key and value will be in are on their way from here on, into the second-level cache: of a sequence that
 * decodes nobody has touched them since its last token. Tokens that follow each other share them by fours. */
static void fetch_places(const qkv_job *j, size_t token) {
    const pe_slice *s = j->s;
    size_t d = s->model->head_dim_p, at = s->positions[token] % PE_CHUNK, lane = at % PE_PANEL;
    if (s->kv_dtype == PE_KV_F32 || (at % 4 != 0 && token > 0 && s->sequences[token - 1] == s->sequences[token])) return;
    for (size_t head = 0; head < s->model->config.n_kv_heads; head++) {
        pe_kv_chunk kv = chunk_of(j, token, head);
        int8_t *k = kv.k + (at - lane) * d, *v = kv.v + at / 4 * 4 * d;
        for (size_t i = 0; i < d * PE_PANEL; i += 64) __builtin_prefetch(k + i, 1, 2);
        for (size_t i = 0; i < 4 * d; i += 64) __builtin_prefetch(v + i, 1, 2);
        __builtin_prefetch(kv.k_scales + at, 1, 2);
        __builtin_prefetch(kv.v_scales + at, 1, 2);
    }
}

/* Keys, transformed and quantized, become lanes of their panels; values, quantized, each one of the four positions that lie side by
 * side. */
static void put_keys_and_values(const token_run *run) {
    pe_slice *s = run->job->s;
    const pe_model *model = s->model;
    size_t n_heads = model->config.n_kv_heads, head_dim = model->config.head_dim, d = model->head_dim_p;
    size_t block = pe_hadamard_block(head_dim);
    int32_t unused;
    head_batch keys = {.heads = {.four_step = 4 * PE_PANEL, .step = 1}}, values = {.heads = {.four_step = 16, .step = 4}};
    for (size_t head = 0; head < n_heads; head++)
        for (size_t t = 0; t < run->n_tokens; t++) {
            size_t token = run->first + t, at = s->positions[token] % PE_CHUNK, lane = at % PE_PANEL;
            const float *k = qkv_row(s, token) + model->q_dim + head * head_dim, *v = k + model->kv_dim;
            pe_kv_chunk kv = chunk_of(run->job, token, head);
            bool last = head + 1 == n_heads && t + 1 == run->n_tokens;
            add_head(&keys, token, k, kv.k + (at - lane) * d + lane * 4, &kv.k_scales[at], &unused);
            add_head(&values, token, v, kv.v + at / 4 * 4 * d + at % 4, &kv.v_scales[at], &unused);
            quantize_batch(s, &keys, last, block, pe_weight_factor(block));
            quantize_batch(s, &values, last, 1, 1.0f);
        }
}

/* The same for a float32 cache, for one token. */
static void put_f32(const qkv_job *j, size_t token) {
    pe_slice *s = j->s;
    const pe_model *model = s->model;
    size_t head_dim = model->config.head_dim, d = model->head_dim_p;
    size_t in_chunk = s->positions[token] % PE_CHUNK, panel = in_chunk / PE_PANEL, lane = in_chunk % PE_PANEL;
    const float *q = qkv_row(s, token), *k = q + model->q_dim, *v = k + model->kv_dim;
    pe_slice_note_floats(s, token, q, model->q_dim + 2 * model->kv_dim); /* no quantizer does */
    for (size_t head = 0; head < model->config.n_heads; head++) {
        float *row = s->q_f32 + query_row(s, token, head) * d;
        memset(row, 0, d * sizeof *row);
        memcpy(row, q + head * head_dim, head_dim * sizeof *row);
    }
    for (size_t head = 0; head < model->config.n_kv_heads; head++, k += head_dim, v += head_dim) {
        pe_kv_chunk kv = chunk_of(j, token, head);
        for (size_t i = 0; i < d; i++) {
            kv.k_f32[(panel * d + i) * PE_PANEL + lane] = i < head_dim ? k[i] : 0.0f;
            kv.v_f32[in_chunk * d + i] = i < head_dim ? v[i] : 0.0f;
        }
    }
}

/* q and k normed (qk_norm) and rotated, or the other way round; q quantized, k and v into the cache. */
static void qkv_unit(void *arg, size_t unit, int thread) {
    (void)thread;
    const qkv_job *j = arg;
    pe_slice *s = j->s;
    token_run run = {.job = j, .first = unit * QKV_TOKENS};
    run.n_tokens = s->n_tokens - run.first < QKV_TOKENS ? s->n_tokens - run.first : QKV_TOKENS;
    for (size_t t = run.first; t < run.first + run.n_tokens; t++) {
        fetch_places(j, t);
        rotate(s, &s->model->layers[j->layer], t);
    }
    if (s->kv_dtype == PE_KV_F32) {
        for (size_t t = run.first; t < run.first + run.n_tokens; t++) put_f32(j, t);
        return;
    }
    put_queries(&run);
    put_keys_and_values(&run);
}

/* What adapters add to q, k and v. */
static void adapt_qkv(pe_slice *s, const pe_layer *layer) {
    size_t stride = pe_qkv_stride(s->model), q_dim = s->model->q_dim, kv_dim = s->model->kv_dim;
    const pe_adapted_output outputs[] = {
        {PE_ADAPTER_Q, s->qkv, stride, PE_PANEL},
        {PE_ADAPTER_K, s->qkv + q_dim, stride, PE_PANEL},
        {PE_ADAPTER_V, s->qkv + q_dim + kv_dim, stride, PE_PANEL},
    };
    pe_adapter_add(s, layer, pe_adapter_inputs(s, layer->attention_norm), pe_x_stride(s->model), outputs, 3);
}

void pe_block_project(pe_slice *s, pe_kv_cache *kv, uint32_t index) {
    const pe_model *model = s->model;
    const pe_layer *layer = &model->layers[index];
    size_t n = s->n_tokens;
    pe_quantize_rows(s, s->x, pe_x_stride(model), NULL, n, model->config.dim, layer->attention_norm);
    pe_matmul(s, &layer->wqkv, layer->wqkv_bias, s->qkv, pe_qkv_stride(model), PE_STORE);
    if (layer->short_conv) {
        pe_short_conv_put(s, kv, index);
        return;
    }
    if (pe_adapter_changes(s, layer, PE_ADAPTER_Q, PE_ADAPTER_V)) adapt_qkv(s, layer);
    qkv_job qkv = {s, kv, index};
    pe_parallel_for(s->n_threads, (n + QKV_TOKENS - 1) / QKV_TOKENS, qkv_unit, &qkv, s->control);
}

pe_status pe_block_attend(pe_slice *s, const pe_kv_cache *kv, uint32_t index, char *err) {
    const pe_model *model = s->model;
    const pe_layer *layer = &model->layers[index];
    size_t width = layer->short_conv ? model->config.dim : model->q_dim;
    pe_status status = PE_OK;
    if (layer->short_conv)
        pe_short_conv(s, kv, index);
    else
        status = pe_attention(s, kv, index, err);
    if (status != PE_OK) return status;
    pe_quantize_rows(s, s->att, width, NULL, s->n_tokens, width, NULL);
    if (pe_adapter_changes(s, layer, PE_ADAPTER_O, PE_ADAPTER_O))
        pe_adapter_matmul_add_to_x(s, layer, PE_ADAPTER_O, s->att, model->q_dim, layer->post_attention_norm);
    else if (layer->parallel)
        pe_matmul(s, &layer->wo, layer->wo_bias, s->branch, pe_x_stride(model), PE_STORE);
    else
        pe_matmul_add_to_x(s, &layer->wo, layer->wo_bias, layer->post_attention_norm);
    return PE_OK;
}
