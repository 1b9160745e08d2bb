/* experts.c: see experts.h. Route every row, then walk the experts in ascending order: gather the rows that take it, multiply,
 * add; last the shared one, which all rows take. What a row gets does not depend on which rows are beside it: a product's bits
 * do not, and its experts are added in ascending order. */
#include "experts.h"

#include <string.h>

#include "kernels/pe_math.h"

typedef struct job {
    pe_slice *s;
    const pe_layer *layer;
    uint32_t expert;
} job;

/* ------------------------------------------------------------------ the router */

/* The n_used experts with the largest logits, ties by index, marked in `taken` (n). A NaN is never larger, and whatever the
 * logits are, n_used different experts are taken. */
static void choose(const float *logits, size_t n, size_t n_used, uint8_t *taken) {
    memset(taken, 0, n);
    for (size_t k = 0; k < n_used; k++) {
        size_t best = n;
        for (size_t e = 0; e < n; e++)
            if (!taken[e] && (best == n || logits[e] > logits[best])) best = e;
        taken[best] = 1;
    }
}

/* weights (n) of the chosen experts; the others' are not touched. logits are destroyed. */
static void weigh(float *logits, size_t n, const uint8_t *taken, bool normalized, float *weights) {
    float most = logits[0], total = 0.0f;
    for (size_t e = 1; e < n; e++) most = logits[e] > most ? logits[e] : most;
    for (size_t e = 0; e < n; e++) logits[e] = pe_expf(logits[e] - most);
    for (size_t e = 0; e < n; e++)
        if (!normalized || taken[e]) total += logits[e];
    for (size_t e = 0; e < n; e++)
        if (taken[e]) weights[e] = logits[e] / total;
}

/* The row takes the shared expert: with weight 1, or a sigmoid of its own input (dim). */
static void take_shared(const job *j, size_t row, const float *input) {
    pe_slice *s = j->s;
    const pe_config *config = &s->model->config;
    size_t at = row * pe_n_mlps(config) + config->n_experts;
    float logit;
    s->expert_taken[at] = 1;
    s->expert_weights[at] = 1.0f;
    if (!config->shared_gated) return;
    s->kernels->dots_f32(&logit, input, j->layer->shared_router, 1, config->dim);
    pe_slice_note_floats(s, row, &logit, 1);
    s->expert_weights[at] = 1.0f / (1.0f + pe_expf(-logit));
}

static void route_unit(void *arg, size_t row, int thread) {
    (void)thread;
    job *j = arg;
    pe_slice *s = j->s;
    const pe_config *config = &s->model->config;
    size_t dim = config->dim, stride = pe_x_stride(s->model), n = config->n_experts;
    size_t at = row * pe_n_mlps(config);
    float *input = s->normed + row * stride, logits[PE_MAX_EXPERTS];
    memcpy(input, s->x + row * stride, dim * sizeof *input);
    if (j->layer->ffn_norm != NULL) pe_slice_norm(s, row, input, input, j->layer->ffn_norm, dim);
    memset(s->branch + row * stride, 0, stride * sizeof *s->branch);
    s->kernels->dots_f32(logits, input, j->layer->router, n, dim);
    if (j->layer->router_bias != NULL) s->kernels->add(logits, j->layer->router_bias, n);
    pe_slice_note_floats(s, row, logits, n);
    choose(logits, n, config->n_experts_used, s->expert_taken + at);
    weigh(logits, n, s->expert_taken + at, config->experts_normalized, s->expert_weights + at);
    if (config->shared_hidden_dim > 0) take_shared(j, row, input);
}

/* ------------------------------------------------------------------ one expert */

/* branch += weight * what the expert gave; unit: one of the rows that took it. */
static void add_unit(void *arg, size_t unit, int thread) {
    (void)thread;
    job *j = arg;
    pe_slice *s = j->s;
    size_t row = s->selected[unit], stride = pe_x_stride(s->model);
    float weight = s->expert_weights[row * pe_n_mlps(&s->model->config) + j->expert];
    s->kernels->add_scaled(s->branch + row * stride, s->expert_out + unit * stride, weight, s->model->config.dim);
}

static void run_expert(job *j) {
    pe_slice *s = j->s;
    const pe_model *model = s->model;
    const pe_expert *expert = &j->layer->experts[j->expert];
    size_t n = 0, n_mlps = pe_n_mlps(&model->config), stride = pe_x_stride(model), h_stride = pe_h_stride(model);
    size_t hidden_dim = j->expert < model->config.n_experts ? model->config.hidden_dim : model->config.shared_hidden_dim;
    for (size_t row = 0; row < s->n_tokens; row++)
        if (s->expert_taken[row * n_mlps + j->expert]) s->selected[n++] = row;
    if (n == 0) return;
    pe_quantize_rows(s, s->normed, stride, s->selected, n, model->config.dim, NULL);
    pe_matmul_activated(s, j->layer, expert, s->h, h_stride);
    pe_quantize_gathered(s, s->h, h_stride, s->selected, n, hidden_dim);
    pe_matmul(s, &expert->w_down, expert->down_bias, s->expert_out, stride, PE_STORE);
    pe_parallel_for(s->n_threads, n, add_unit, j, s->control);
}

void pe_experts(pe_slice *s, const pe_layer *layer) {
    job j = {s, layer, 0};
    pe_parallel_for(s->n_threads, s->n_tokens, route_unit, &j, s->control);
    for (; j.expert < pe_n_mlps(&s->model->config) && !pe_slice_is_cancelled(s); j.expert++) run_expert(&j);
}
