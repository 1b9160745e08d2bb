/* block.c: see block.h. */
#include "block.h"

#include <string.h>

#include "adapter.h"
#include "attention.h"
#include "matmul.h"

/* One layer's q, k and v of every row: normed, rotated, put where attention looks for them. */
typedef struct qkv_job {
    pe_slice *s;
    pe_kv_cache *kv;
    uint32_t layer;
} qkv_job;

static void put_query(pe_slice *s, const pe_layer *layer, size_t token, size_t head, const float *q) {
    const pe_model *model = s->model;
    size_t n_rep = model->config.n_heads / model->config.n_kv_heads, d = model->head_dim_p;
    size_t head_dim = model->config.head_dim, block = pe_hadamard_block(head_dim);
    size_t row = (head / n_rep * s->capacity + token) * n_rep + head % n_rep;
    if (s->kv_dtype == PE_KV_F32) {
        memset(s->q_f32 + row * d, 0, d * sizeof(float));
        memcpy(s->q_f32 + row * d, q, head_dim * sizeof(float));
        return;
    }
    memset(s->q + row * d + head_dim, 0, d - head_dim);
    uint32_t bits = s->kernels->quantize_head(s->q + row * d, &s->q_scales[row], &s->q_corrections[row], q, head_dim, block,
                                              pe_input_factor(block));
    pe_slice_note_bits(s, token, bits);
    if (layer->key_bias == NULL) return;
    pe_key_bias_times_query(layer->key_bias, s->kernels, head / n_rep, head_dim, q, s->q_key_bias + row * head_dim);
}

/* Quantize k and v (head_dim) and put them at the token's position of the cache: k as a lane of its panel, v as
 * one of the four positions that lie side by side. */
static void put_key_value(const qkv_job *j, size_t token, uint32_t kv_head, const float *k, const float *v) {
    pe_slice *s = j->s;
    const pe_model *model = s->model;
    size_t d = model->head_dim_p, head_dim = model->config.head_dim;
    size_t position = s->positions[token], in_chunk = position % PE_CHUNK, panel = in_chunk / PE_PANEL,
           lane = in_chunk % PE_PANEL;
    pe_kv_chunk kv = pe_kv_chunk_at(j->kv, s->sequences[token], position / PE_CHUNK, j->layer, kv_head);
    if (s->kv_dtype == PE_KV_F32) {
        for (size_t i = 0; i < d; i++) {
            kv.k_f32[(panel * d + i) * PE_PANEL + lane] = i < head_dim ? k[i] : 0.0f;
            kv.v_f32[in_chunk * d + i] = i < head_dim ? v[i] : 0.0f;
        }
        return;
    }
    int8_t codes[PE_MAX_HEAD_DIM] = {0};
    int32_t unused;
    size_t block = pe_hadamard_block(head_dim);
    uint32_t bits =
        s->kernels->quantize_head(codes, &kv.k_scales[in_chunk], &unused, k, head_dim, block, pe_weight_factor(block));
    pe_slice_note_bits(s, token, bits);
    for (size_t i = 0; i < d; i += 4) memcpy(kv.k + (panel * d + i) * PE_PANEL + lane * 4, codes + i, 4);
    bits = s->kernels->quantize_head(codes, &kv.v_scales[in_chunk], &unused, v, head_dim, 1, 1.0f);
    pe_slice_note_bits(s, token, bits);
    int8_t *v_codes = kv.v + in_chunk / 4 * 4 * d + in_chunk % 4;
    for (size_t i = 0; i < d; i++) v_codes[i * 4] = codes[i];
}

/* One token: q and k normed (qk_norm) and rotated, q quantized, k and v into the cache. */
static void qkv_unit(void *arg, size_t token, int thread) {
    (void)thread;
    qkv_job *j = arg;
    pe_slice *s = j->s;
    const pe_model *model = s->model;
    const pe_layer *layer = &model->layers[j->layer];
    size_t head_dim = model->config.head_dim, half = head_dim / 2;
    float *q = s->qkv + token * pe_qkv_stride(model), *k = q + model->q_dim, *v = k + model->kv_dim;
    size_t angle = (layer->rope * s->capacity + token) * half;
    const float *cos = s->cos + angle, *sin = s->sin + angle;
    bool norm_heads = model->config.qk_norm && !model->config.qk_norm_all_heads;
    if (model->config.qk_norm_all_heads) {
        s->kernels->rmsnorm(q, q, layer->q_norm, model->q_dim, model->config.norm_eps);
        s->kernels->rmsnorm(k, k, layer->k_norm, model->kv_dim, model->config.norm_eps);
    }
    for (size_t head = 0; head < model->config.n_heads; head++) {
        float *row = q + head * head_dim;
        if (norm_heads) s->kernels->rmsnorm(row, row, layer->q_norm, head_dim, model->config.norm_eps);
        s->kernels->rope(row, cos, sin, head_dim);
        put_query(s, layer, token, head, row);
    }
    if (layer->key_bias != NULL && s->kv_dtype == PE_KV_F32) s->kernels->add(k, layer->key_bias_vector, model->kv_dim);
    for (uint32_t head = 0; head < model->config.n_kv_heads; head++) {
        float *row = k + head * head_dim;
        if (norm_heads) s->kernels->rmsnorm(row, row, layer->k_norm, head_dim, model->config.norm_eps);
        s->kernels->rope(row, cos, sin, head_dim);
        put_key_value(j, token, head, row, v + head * head_dim);
    }
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

pe_status pe_block(pe_slice *s, pe_kv_cache *kv, uint32_t index, char *err) {
    const pe_model *model = s->model;
    const pe_layer *layer = &model->layers[index];
    size_t n = s->n_tokens, x_stride = pe_x_stride(model);
    pe_quantize_rows(s, s->x, x_stride, NULL, n, model->config.dim, layer->attention_norm);
    pe_matmul(s, &layer->wqkv, layer->wqkv_bias, s->qkv, pe_qkv_stride(model), PE_STORE);
    if (pe_adapter_changes(s, layer, PE_ADAPTER_Q, PE_ADAPTER_V)) adapt_qkv(s, layer);
    qkv_job qkv = {s, kv, index};
    pe_parallel_for(s->n_threads, n, qkv_unit, &qkv, s->control);
    pe_status status = pe_attention(s, kv, index, err);
    if (status != PE_OK) return status;
    pe_quantize_rows(s, s->att, model->q_dim, NULL, n, model->q_dim, NULL);
    if (pe_adapter_changes(s, layer, PE_ADAPTER_O, PE_ADAPTER_O))
        pe_adapter_matmul_add_to_x(s, layer, PE_ADAPTER_O, s->att, model->q_dim, layer->post_attention_norm);
    else if (layer->parallel)
        pe_matmul(s, &layer->wo, layer->wo_bias, s->branch, x_stride, PE_STORE);
    else
        pe_matmul_add_to_x(s, &layer->wo, layer->wo_bias, layer->post_attention_norm);
    return PE_OK;
}
