/* matmul.c: see matmul.h. Units are blocks of tokens for the quantizer, and strips of tokens times runs of weight panels for the
 * product; the bits do not depend on how they are cut. */
#include "matmul.h"

enum {
    TILE_TOKENS = 64, /* one tile of a product that goes through a gate: 64 tokens x 4 panels of float32 = 16 KiB */
    TILE_PANELS = 4,
    MAX_PANELS_PER_UNIT = 64,
    FETCHED_PANELS = 4,           /* of outputs that are fetched together */
    CACHED_OUTPUT_BYTES = 1 << 20 /* a product of more than this is not in a core's cache when it is written: logits of a batch */
};

size_t pe_matmul_scratch_floats(void) { return (size_t)TILE_TOKENS * TILE_PANELS * PE_PANEL; }

/* ------------------------------------------------------------------ quantized inputs */

typedef struct quantize_job {
    pe_slice *s;
    const float *rows;
    const size_t *selected;
    const size_t *owners; /* rows of the slice that answer for these; NULL = they themselves */
    size_t stride, n;  /* n columns of each row */
    const float *norm; /* RMSNorm weight or NULL */
} quantize_job;

/* One block of tokens; no other unit sees its rows. */
static void quantize_unit(void *arg, size_t block, int thread) {
    (void)thread;
    quantize_job *j = arg;
    pe_slice *s = j->s;
    size_t first = block * PE_TOKEN_BLOCK, left = s->act.n_tokens - first, owners[PE_TOKEN_BLOCK];
    size_t n_tokens = left < PE_TOKEN_BLOCK ? left : PE_TOKEN_BLOCK;
    const float *rows[PE_TOKEN_BLOCK] = {NULL};
    for (size_t t = 0; t < n_tokens; t++) {
        size_t index = j->selected == NULL ? first + t : j->selected[first + t];
        owners[t] = j->owners == NULL ? index : j->owners[index];
        rows[t] = j->rows + index * j->stride;
    }
    uint32_t not_finite = s->kernels->quantize(&s->act, first, rows, j->n, j->norm, s->model->config.norm_eps);
    for (size_t t = 0; t < n_tokens; t++)
        if (not_finite >> t & 1) s->failed[owners[t]] = 1;
}

/* The input of the next product is n_rows rows of n columns. */
static void begin_input(pe_slice *s, size_t n_rows, size_t n) {
    s->act.n = pe_pad(n, PE_GROUP);
    s->act.n_tokens = n_rows;
    s->act.fetch_for_one = pe_cpu_fetches_late();
}

void pe_quantize_rows(pe_slice *s, const float *rows, size_t stride, const size_t *selected, size_t n_rows, size_t n,
                      const float *norm) {
    begin_input(s, n_rows, n);
    quantize_job j = {s, rows, selected, NULL, stride, n, norm};
    pe_parallel_for(s->n_threads, pe_pad(n_rows, PE_TOKEN_BLOCK) / PE_TOKEN_BLOCK, quantize_unit, &j, s->control);
}

void pe_quantize_gathered(pe_slice *s, const float *rows, size_t stride, const size_t *owners, size_t n_rows, size_t n) {
    begin_input(s, n_rows, n);
    quantize_job j = {s, rows, NULL, owners, stride, n, NULL};
    pe_parallel_for(s->n_threads, pe_pad(n_rows, PE_TOKEN_BLOCK) / PE_TOKEN_BLOCK, quantize_unit, &j, s->control);
}

/* ------------------------------------------------------------------ product */

typedef void (*pointwise)(float *x, size_t n, const float *curve);

typedef struct matmul_job {
    pe_slice *s;
    const pe_matrix *w;
    const float *bias; /* padded to 16 rows, or NULL */
    float *out;
    size_t out_stride;
    bool add;           /* to what is there */
    pe_gate gate;       /* what the product goes through, or NULL: a pair of panels becomes one */
    pointwise apply;    /* likewise, each value for itself */
    const float *curve; /* what `apply` wants beside them */
    size_t panels_per_unit, units_per_strip, tokens_per_strip; /* how it is cut */
} matmul_job;

pe_gate pe_gate_of(const struct pe_kernels *kernels, pe_activation activation) {
    return activation == PE_ACTIVATION_SWIGLU           ? kernels->swiglu
           : activation == PE_ACTIVATION_SWIGLU_CLAMPED ? kernels->swiglu_clamped
                                                        : kernels->geglu_tanh;
}

/* The same of one that has none. */
static pointwise pointwise_of(const struct pe_kernels *kernels, pe_activation activation) {
    return activation == PE_ACTIVATION_GELU_TANH ? kernels->gelu_tanh
           : activation == PE_ACTIVATION_GELU    ? kernels->gelu
           : activation == PE_ACTIVATION_RELU2   ? kernels->relu2
                                                 : kernels->xielu;
}

/* Panels [begin, end), at most TILE_PANELS, times tokens [first, last), at most TILE_TOKENS, through the gate. */
static void gated_tile(const matmul_job *j, size_t begin, size_t end, size_t first, size_t last, float *tile) {
    const pe_slice *s = j->s;
    size_t width = (end - begin) * PE_PANEL;
    s->kernels->matmul(tile, width, j->w, begin, end, &s->act, first, last, j->bias, false);
    for (size_t t = first; t < last; t++)
        j->gate(j->out + t * j->out_stride + begin / 2 * PE_PANEL, tile + (t - first) * width, (end - begin) / 2);
}

/* The outputs of FETCHED_PANELS panels from `panel` on, as far as there are any, are on their way from here on, into the
 * second-level cache: a store to a line that is not there waits for it. */
static void fetch_outputs(const matmul_job *j, size_t panel, size_t first, size_t last) {
    size_t end = j->w->n_panels - panel < FETCHED_PANELS ? j->w->n_panels : panel + FETCHED_PANELS;
    for (size_t t = first; t < last; t++)
        for (size_t p = panel; p < end; p++) __builtin_prefetch(j->out + t * j->out_stride + p * PE_PANEL, 1, 2);
}

/* A product without a gate. Where a few tokens have many outputs, a few panels fetch the outputs of those that come next. */
static void plain_unit(const matmul_job *j, size_t begin, size_t end, size_t first, size_t last) {
    const pe_slice *s = j->s;
    size_t output_bytes = s->act.n_tokens * j->w->n_panels * PE_PANEL * sizeof(float);
    bool fetches = last - first <= TILE_TOKENS && output_bytes > CACHED_OUTPUT_BYTES;
    for (size_t p = begin, next; p < end; p = next) {
        next = fetches && end - p > FETCHED_PANELS ? p + FETCHED_PANELS : end;
        if (fetches) fetch_outputs(j, next, first, last);
        s->kernels->matmul(j->out + first * j->out_stride + p * PE_PANEL, j->out_stride, j->w, p, next, &s->act, first, last, j->bias,
                           j->add);
    }
}

static void matmul_unit(void *arg, size_t unit, int thread) {
    matmul_job *j = arg;
    const pe_slice *s = j->s;
    size_t begin = unit % j->units_per_strip * j->panels_per_unit, end = begin + j->panels_per_unit;
    size_t first = unit / j->units_per_strip * j->tokens_per_strip, last = first + j->tokens_per_strip;
    if (end > j->w->n_panels) end = j->w->n_panels;
    if (last > s->act.n_tokens) last = s->act.n_tokens;
    if (j->gate == NULL) {
        plain_unit(j, begin, end, first, last);
        for (size_t t = first; t < last && j->apply != NULL; t++)
            j->apply(j->out + t * j->out_stride + begin * PE_PANEL, (end - begin) * PE_PANEL, j->curve);
        return;
    }
    for (size_t p = begin; p < end; p += TILE_PANELS)
        for (size_t t = first; t < last; t += TILE_TOKENS)
            gated_tile(j, p, end - p < TILE_PANELS ? end : p + TILE_PANELS, t, last - t < TILE_TOKENS ? last : t + TILE_TOKENS,
                       pe_thread_scratch(s, thread));
}

/* Many tokens are cut into strips, one a thread, as far as there are enough: then a thread reads what it wrote itself in the loop
 * before, and not what another core has. Every strip reads the whole matrix, which pays as long as that is not much more than the
 * rows themselves: at most one and a half times as many bytes. */
static size_t tokens_per_strip(const pe_slice *s, const pe_matrix *w, bool gated) {
    size_t n_tokens = s->act.n_tokens, n_strips = n_tokens / TILE_TOKENS;
    size_t n_outputs = gated ? w->n_panels * PE_PANEL / 2 : w->n_panels * PE_PANEL;
    size_t row_bytes = n_tokens * (s->act.n + n_outputs * sizeof(float)), weight_bytes = w->n_panels * w->n_groups * PE_GROUP * PE_PANEL;
    if (n_strips > (size_t)s->n_threads) n_strips = (size_t)s->n_threads;
    if (n_strips < 2 || 2 * weight_bytes > 3 * row_bytes) return n_tokens;
    return pe_pad((n_tokens + n_strips - 1) / n_strips, TILE_TOKENS);
}

/* Sixteen units a thread, so that none waits long for the last one, and an even number of panels: kernels like pairs, SwiGLU
 * needs them. */
static size_t panels_per_unit(const pe_slice *s, size_t n_panels, size_t n_strips) {
    size_t panels = n_panels * n_strips / ((size_t)s->n_threads * 16) / 2 * 2;
    return panels < 2 ? 2 : panels > MAX_PANELS_PER_UNIT ? MAX_PANELS_PER_UNIT : panels;
}

/* All units of a job that says what, and not yet how it is cut. */
static void run(matmul_job *j) {
    const pe_slice *s = j->s;
    size_t n_tokens = s->act.n_tokens, n_panels = j->w->n_panels;
    j->tokens_per_strip = tokens_per_strip(s, j->w, j->gate != NULL);
    size_t n_strips = (n_tokens + j->tokens_per_strip - 1) / j->tokens_per_strip;
    j->panels_per_unit = panels_per_unit(s, n_panels, n_strips);
    j->units_per_strip = (n_panels + j->panels_per_unit - 1) / j->panels_per_unit;
    pe_parallel_for(s->n_threads, j->units_per_strip * n_strips, matmul_unit, j, s->control);
}

void pe_matmul(pe_slice *s, const pe_matrix *w, const float *bias, float *out, size_t out_stride,
               pe_epilogue epilogue) {
    matmul_job j = {.s = s, .w = w, .bias = bias, .out = out, .out_stride = out_stride, .add = epilogue == PE_ADD};
    run(&j);
}

void pe_matmul_activated(pe_slice *s, const pe_layer *layer, const pe_expert *mlp, float *out, size_t out_stride) {
    matmul_job j = {.s = s, .w = &mlp->w_gate_up, .bias = mlp->gate_up_bias, .out = out, .out_stride = out_stride};
    if (pe_has_gate(layer->activation)) {
        j.gate = pe_gate_of(s->kernels, layer->activation);
    } else {
        j.apply = pointwise_of(s->kernels, layer->activation);
        j.curve = layer->xielu;
    }
    run(&j);
}

/* ------------------------------------------------------------------ what is added to the residual stream */

typedef struct add_job {
    pe_slice *s;
    const float *norm;
} add_job;

static void add_branch_unit(void *arg, size_t row, int thread) {
    (void)thread;
    add_job *j = arg;
    pe_slice *s = j->s;
    size_t dim = s->model->config.dim, stride = pe_x_stride(s->model);
    float *branch = s->branch + row * stride;
    if (j->norm != NULL) pe_slice_norm(s, row, branch, branch, j->norm, dim);
    s->kernels->add(s->x + row * stride, branch, dim);
}

void pe_add_branch_to_x(pe_slice *s, const float *norm) {
    add_job j = {s, norm};
    pe_parallel_for(s->n_threads, s->n_tokens, add_branch_unit, &j, s->control);
}

void pe_matmul_add_to_x(pe_slice *s, const pe_matrix *w, const float *bias, const float *norm) {
    size_t stride = pe_x_stride(s->model);
    if (norm == NULL) {
        pe_matmul(s, w, bias, s->x, stride, PE_ADD);
        return;
    }
    pe_matmul(s, w, bias, s->branch, stride, PE_STORE);
    pe_add_branch_to_x(s, norm);
}
