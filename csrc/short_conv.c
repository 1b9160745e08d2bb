/* short_conv.c: see short_conv.h. */
#include "short_conv.h"

#include <string.h>

typedef struct conv_job {
    pe_slice *s;
    const pe_kv_cache *kv;
    uint32_t layer;
} conv_job;

/* Where a position's u is, (dim). */
static float *input_at(const conv_job *j, size_t row, size_t position) {
    float *inputs = pe_kv_inputs_at(j->kv, j->s->sequences[row], position / PE_CHUNK, j->layer);
    return inputs + position % PE_CHUNK * pe_x_stride(j->s->model);
}

static const float *projected(const conv_job *j, size_t row) { return j->s->qkv + row * pe_qkv_stride(j->s->model); }

static void put_unit(void *arg, size_t row, int thread) {
    (void)thread;
    const conv_job *j = arg;
    size_t dim = j->s->model->config.dim, stride = pe_x_stride(j->s->model);
    const float *b = projected(j, row), *x = b + 2 * dim;
    float *restrict u = input_at(j, row, j->s->positions[row]);
    for (size_t i = 0; i < dim; i++) u[i] = b[i] * x[i];
    for (size_t i = dim; i < stride; i++) u[i] = 0.0f; /* snapshots have the padding, too */
    pe_slice_note_floats(j->s, row, u, dim);
}

/* y (n) += w (n) * u (n), a product and an addition. */
static void add_tap(float *restrict y, const float *restrict w, const float *restrict u, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = y[i] + w[i] * u[i];
}

static void conv_unit(void *arg, size_t row, int thread) {
    (void)thread;
    const conv_job *j = arg;
    const pe_layer *layer = &j->s->model->layers[j->layer];
    size_t dim = j->s->model->config.dim, position = j->s->positions[row];
    const float *restrict c = projected(j, row) + dim;
    float *restrict y = j->s->att + row * dim;
    memset(y, 0, dim * sizeof *y);
    for (size_t k = 0; k < layer->window; k++) {
        size_t back = layer->window - 1 - k;
        if (back <= position) add_tap(y, layer->taps + k * dim, input_at(j, row, position - back), dim);
    }
    for (size_t i = 0; i < dim; i++) y[i] = c[i] * y[i];
}

void pe_short_conv_put(pe_slice *s, pe_kv_cache *kv, uint32_t layer) {
    conv_job j = {s, kv, layer};
    pe_parallel_for(s->n_threads, s->n_tokens, put_unit, &j, s->control);
}

void pe_short_conv(pe_slice *s, const pe_kv_cache *kv, uint32_t layer) {
    conv_job j = {s, kv, layer};
    pe_parallel_for(s->n_threads, s->n_tokens, conv_unit, &j, s->control);
}
