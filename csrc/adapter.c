/* adapter.c: see adapter.h. A product takes two stages: t = scale * (a x) for every row and rank, then y += b t for every row
 * and output. A unit is a block of one of the two for a few rows of one adapter; no sum is cut, so blocks change no bit. */
#include "adapter.h"

#include <stdlib.h>
#include <string.h>

#include "platform.h"
#include "status.h"

enum {
    MAX_RANK = 1 << 16,
    ROWS_PER_UNIT = 32, /* they share a block of a or b, which stays in the first-level cache */
    RANKS_PER_UNIT = 8,
    PANELS_PER_UNIT = 8
};

/* ------------------------------------------------------------------ life */

static size_t inputs_of(const pe_model *model, pe_adapter_matrix matrix) {
    return matrix == PE_ADAPTER_O ? model->q_dim : matrix == PE_ADAPTER_DOWN ? model->config.hidden_dim : model->config.dim;
}

static size_t outputs_of(const pe_model *model, pe_adapter_matrix matrix) {
    switch (matrix) {
    case PE_ADAPTER_Q: return model->q_dim;
    case PE_ADAPTER_K:
    case PE_ADAPTER_V: return model->kv_dim;
    case PE_ADAPTER_GATE:
    case PE_ADAPTER_UP: return model->config.hidden_dim;
    default: return model->config.dim;
    }
}

pe_status pe_adapter_create(pe_adapter **out, const pe_model *model, char *err) {
    *out = NULL;
    pe_adapter *adapter = calloc(1, sizeof *adapter);
    if (adapter != NULL) adapter->layers = calloc(model->config.n_layers, sizeof *adapter->layers);
    if (adapter == NULL || adapter->layers == NULL) {
        free(adapter);
        return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for an adapter");
    }
    adapter->model = model;
    *out = adapter;
    return PE_OK;
}

void pe_adapter_destroy(pe_adapter *adapter) {
    if (adapter == NULL) return;
    for (uint32_t i = 0; i < adapter->model->config.n_layers; i++)
        for (size_t m = 0; m < PE_ADAPTER_N_MATRICES; m++) {
            pe_aligned_free(adapter->layers[i][m].a);
            pe_aligned_free(adapter->layers[i][m].b);
        }
    free(adapter->layers);
    free(adapter);
}

size_t pe_adapter_bytes(const pe_adapter *adapter) { return adapter->n_bytes; }

static pe_status check_product(const pe_adapter *adapter, uint32_t layer, pe_adapter_matrix matrix,
                               const pe_adapter_product *p, char *err) {
    const pe_model *model = adapter->model;
    if (layer >= model->config.n_layers || (unsigned)matrix >= PE_ADAPTER_N_MATRICES)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "there is no matrix %d in layer %u", (int)matrix, layer);
    if (matrix <= PE_ADAPTER_O && model->layers[layer].short_conv)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "layer %u is a convolution, which an adapter cannot change", layer);
    if (matrix >= PE_ADAPTER_GATE && model->config.n_experts > 0)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "an adapter cannot change the experts of a mixture");
    if (model->layers[layer].parallel || (matrix >= PE_ADAPTER_GATE && !pe_has_gate(model->layers[layer].activation)))
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "an adapter cannot change an MLP without a gate, or parallel halves of a layer");
    if (adapter->layers[layer][matrix].rank > 0)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "the adapter has changed matrix %d of layer %u already", (int)matrix, layer);
    if (p->rank == 0 || p->rank > MAX_RANK || p->n_in != inputs_of(model, matrix) || p->n_out != outputs_of(model, matrix))
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "a product of rank %zu, %zu to %zu, for a matrix of %zu inputs and %zu outputs",
                       p->rank, p->n_in, p->n_out, inputs_of(model, matrix), outputs_of(model, matrix));
    bool finite = pe_float_bits(p->scale) << 1 < PE_NOT_FINITE_BITS << 1;
    for (size_t i = 0; i < p->rank * p->n_in; i++) finite &= (pe_float_bits(p->a[i]) & 0x7fffffffu) < PE_NOT_FINITE_BITS;
    for (size_t i = 0; i < p->rank * p->n_out; i++) finite &= (pe_float_bits(p->b[i]) & 0x7fffffffu) < PE_NOT_FINITE_BITS;
    return finite ? PE_OK : pe_fail(PE_ERR_INVALID_ARGUMENT, err, "an adapter holds a value that is not finite");
}

static size_t shared_ranks(const pe_low_rank *layer) {
    size_t qkv = layer[PE_ADAPTER_Q].rank + layer[PE_ADAPTER_K].rank + layer[PE_ADAPTER_V].rank;
    size_t most = layer[PE_ADAPTER_GATE].rank + layer[PE_ADAPTER_UP].rank;
    if (qkv > most) most = qkv;
    if (layer[PE_ADAPTER_O].rank > most) most = layer[PE_ADAPTER_O].rank;
    return layer[PE_ADAPTER_DOWN].rank > most ? layer[PE_ADAPTER_DOWN].rank : most;
}

pe_status pe_adapter_set(pe_adapter *adapter, uint32_t layer, pe_adapter_matrix matrix, const pe_adapter_product *p, char *err) {
    pe_status status = check_product(adapter, layer, matrix, p, err);
    if (status != PE_OK) return status;
    size_t a_bytes = p->rank * p->n_in * sizeof(float), b_floats = pe_pad(p->n_out, PE_PANEL) * p->rank;
    pe_low_rank made = {p->rank, p->scale, pe_aligned_alloc(a_bytes), pe_aligned_alloc(b_floats * sizeof(float))};
    if (made.a == NULL || made.b == NULL) {
        pe_aligned_free(made.a), pe_aligned_free(made.b);
        return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for %zu bytes of an adapter", a_bytes + b_floats * sizeof(float));
    }
    memcpy(made.a, p->a, a_bytes);
    memset(made.b, 0, b_floats * sizeof(float));
    for (size_t i = 0; i < p->n_out; i++)
        for (size_t k = 0; k < p->rank; k++)
            made.b[(i / PE_PANEL * p->rank + k) * PE_PANEL + i % PE_PANEL] = p->b[i * p->rank + k];
    adapter->layers[layer][matrix] = made;
    adapter->n_bytes += a_bytes + b_floats * sizeof(float);
    size_t n_ranks = shared_ranks(adapter->layers[layer]);
    if (n_ranks > adapter->n_ranks) adapter->n_ranks = n_ranks;
    return PE_OK;
}

/* ------------------------------------------------------------------ which rows */

static bool is_grouped(const pe_slice *s, const pe_adapter *adapter) {
    for (size_t g = 0; g < s->n_groups; g++)
        if (s->groups[g].adapter == adapter) return true;
    return false;
}

void pe_adapter_group_rows(pe_slice *s, const pe_adapter *const *adapters) {
    size_t n = 0;
    s->n_groups = 0;
    for (size_t t = 0; t < s->n_tokens && adapters != NULL; t++) {
        if (adapters[t] == NULL || adapters[t]->n_ranks == 0 || is_grouped(s, adapters[t])) continue;
        pe_adapter_group *group = &s->groups[s->n_groups++];
        *group = (pe_adapter_group){adapters[t], n, 0};
        for (size_t i = t; i < s->n_tokens; i++)
            if (adapters[i] == adapters[t]) s->adapted[n++] = i;
        group->n = n - group->first;
    }
}

static const pe_low_rank *low_rank_of(const pe_slice *s, size_t group, const pe_layer *layer, pe_adapter_matrix matrix) {
    return &s->groups[group].adapter->layers[layer - s->model->layers][matrix];
}

bool pe_adapter_changes(const pe_slice *s, const pe_layer *layer, pe_adapter_matrix first, pe_adapter_matrix last) {
    for (size_t g = 0; g < s->n_groups; g++)
        for (pe_adapter_matrix m = first; m <= last; m++)
            if (low_rank_of(s, g, layer, m)->rank > 0) return true;
    return false;
}

/* ------------------------------------------------------------------ inputs */

typedef struct norm_job {
    pe_slice *s;
    const float *norm;
} norm_job;

static void norm_unit(void *arg, size_t unit, int thread) {
    (void)thread;
    const norm_job *j = arg;
    const pe_slice *s = j->s;
    size_t at = s->adapted[unit] * pe_x_stride(s->model); /* what is not finite, the quantizer has noted */
    s->kernels->rmsnorm(s->normed + at, s->x + at, j->norm, s->model->config.dim, s->model->config.norm_eps);
}

const float *pe_adapter_inputs(pe_slice *s, const float *norm) {
    if (norm == NULL) return s->x;
    norm_job j = {s, norm};
    const pe_adapter_group *last = &s->groups[s->n_groups - 1];
    pe_parallel_for(s->n_threads, last->first + last->n, norm_unit, &j, s->control);
    return s->normed;
}

/* ------------------------------------------------------------------ products */

typedef struct adapter_job {
    pe_slice *s;
    const pe_layer *layer;
    const float *in;
    size_t in_stride;
    const pe_adapted_output *outputs;
    size_t n_outputs;
    size_t n_blocks, n_row_blocks; /* units of each group and output, as many as the largest needs */
} adapter_job;

/* One unit: rows [begin, end) of slice.adapted, block `block` of an output's ranks or panels. */
typedef struct adapter_unit {
    const pe_adapted_output *output;
    const pe_low_rank *product;
    size_t begin, end, block;
    size_t t_offset; /* where the product's t lies in a row of slice.projected */
} adapter_unit;

/* An empty range of rows if the group or the output is smaller than the largest. */
static adapter_unit find_unit(const adapter_job *j, size_t unit) {
    size_t block = unit % j->n_blocks, rest = unit / j->n_blocks;
    size_t row_block = rest % j->n_row_blocks, pair = rest / j->n_row_blocks, g = pair / j->n_outputs;
    const pe_adapter_group *group = &j->s->groups[g];
    adapter_unit u = {.output = &j->outputs[pair % j->n_outputs], .block = block};
    u.product = low_rank_of(j->s, g, j->layer, u.output->matrix);
    for (const pe_adapted_output *o = j->outputs; o < u.output; o++)
        u.t_offset += low_rank_of(j->s, g, j->layer, o->matrix)->rank;
    size_t begin = row_block * ROWS_PER_UNIT, end = begin + ROWS_PER_UNIT < group->n ? begin + ROWS_PER_UNIT : group->n;
    u.begin = group->first + begin, u.end = group->first + (end > begin ? end : begin);
    return u;
}

/* t[k] = scale * (a[k] x) of a block of ranks. */
static void project_unit(void *arg, size_t unit, int thread) {
    (void)thread;
    const adapter_job *j = arg;
    const pe_slice *s = j->s;
    adapter_unit u = find_unit(j, unit);
    size_t first = u.block * RANKS_PER_UNIT, rank = u.product->rank, n_in = inputs_of(s->model, u.output->matrix);
    if (first >= rank) return;
    size_t n = rank - first < RANKS_PER_UNIT ? rank - first : RANKS_PER_UNIT;
    for (size_t i = u.begin; i < u.end; i++) {
        float *t = s->projected + i * s->n_ranks + u.t_offset + first;
        s->kernels->dots_f32(t, j->in + s->adapted[i] * j->in_stride, u.product->a + first * n_in, n, n_in);
        s->kernels->scale(t, t, u.product->scale, n);
    }
}

/* y += b t of a block of panels. */
static void add_unit(void *arg, size_t unit, int thread) {
    (void)thread;
    const adapter_job *j = arg;
    const pe_slice *s = j->s;
    adapter_unit u = find_unit(j, unit);
    size_t first = u.block * PANELS_PER_UNIT, rank = u.product->rank, n_out = outputs_of(s->model, u.output->matrix);
    if (rank == 0 || first * PE_PANEL >= n_out) return;
    size_t left = n_out - first * PE_PANEL, n = left < PANELS_PER_UNIT * PE_PANEL ? left : PANELS_PER_UNIT * PE_PANEL;
    for (size_t i = u.begin; i < u.end; i++)
        s->kernels->add_low_rank(u.output->out + s->adapted[i] * u.output->stride + first * u.output->step, u.output->step,
                                 s->projected + i * s->n_ranks + u.t_offset, u.product->b + first * rank * PE_PANEL, rank, n);
}

static size_t blocks_of(size_t n, size_t block) { return (n + block - 1) / block; }

void pe_adapter_add(pe_slice *s, const pe_layer *layer, const float *in, size_t in_stride, const pe_adapted_output *outputs,
                    size_t n_outputs) {
    size_t most_rows = 0, most_ranks = 0, most_outputs = 0;
    for (size_t g = 0; g < s->n_groups; g++) {
        if (s->groups[g].n > most_rows) most_rows = s->groups[g].n;
        for (size_t o = 0; o < n_outputs; o++) {
            size_t rank = low_rank_of(s, g, layer, outputs[o].matrix)->rank, n_out = outputs_of(s->model, outputs[o].matrix);
            if (rank > most_ranks) most_ranks = rank;
            if (n_out > most_outputs) most_outputs = n_out;
        }
    }
    if (most_ranks == 0) return;
    adapter_job j = {s, layer, in, in_stride, outputs, n_outputs, 0, blocks_of(most_rows, ROWS_PER_UNIT)};
    size_t n_pairs = s->n_groups * n_outputs * j.n_row_blocks;
    j.n_blocks = blocks_of(most_ranks, RANKS_PER_UNIT);
    pe_parallel_for(s->n_threads, n_pairs * j.n_blocks, project_unit, &j, s->control);
    j.n_blocks = blocks_of(most_outputs, PANELS_PER_UNIT * PE_PANEL);
    pe_parallel_for(s->n_threads, n_pairs * j.n_blocks, add_unit, &j, s->control);
}

void pe_adapter_matmul_add_to_x(pe_slice *s, const pe_layer *layer, pe_adapter_matrix matrix, const float *in, size_t in_stride,
                                const float *norm) {
    bool is_o = matrix == PE_ADAPTER_O;
    float *out = norm == NULL ? s->x : s->branch;
    pe_adapted_output output = {matrix, out, pe_x_stride(s->model), PE_PANEL};
    pe_matmul(s, is_o ? &layer->wo : &layer->experts->w_down, is_o ? layer->wo_bias : layer->experts->down_bias, out, output.stride,
              norm == NULL ? PE_ADD : PE_STORE);
    pe_adapter_add(s, layer, in, in_stride, &output, 1);
    if (norm != NULL) pe_add_branch_to_x(s, norm);
}
