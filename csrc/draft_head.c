/* draft_head.c: see draft_head.h. The head's MLP is computed as that of a layer (mlp.h), in a slice of its own. */
#include "draft_head.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "embedding.h"
#include "float_env.h"
#include "matmul.h"
#include "mlp.h"
#include "platform.h"
#include "slice.h"
#include "status.h"
#include "tensors.h"

enum { N_SLOTS = 13 };

struct pe_draft_head {
    const pe_model *model; /* whose embeddings it reads */
    pe_model net;          /* the shape of its own layer, for the slice; without tensors */
    pe_layer layer;        /* mlp_norm and the MLP */
    pe_expert mlp;
    const float *token_norm, *state_norm; /* (dim) */
    pe_matrix w_in;                       /* (dim, 2 dim) */
    const float *output_norm;             /* (dim) */
    pe_matrix output;                     /* (vocab_size, dim) */
    const int32_t *vocab;                 /* (vocab_size) ids, ascending */
    uint32_t vocab_size;
    bool has_threads; /* of the pool */

    pe_slice slice;
    size_t capacity, n; /* rows: of the buffers, of the last step */
    float *inputs;      /* (capacity, input_stride) normed embedding, then normed state */
    float *logits;      /* (capacity, pad16(vocab_size)) of the tokens `vocab` */
};

static size_t input_stride(const pe_draft_head *h) { return pe_pad(2 * (size_t)h->net.config.dim, PE_PANEL); }
static size_t logits_stride(const pe_draft_head *h) { return pe_pad(h->vocab_size, PE_PANEL); }

/* ------------------------------------------------------------------ life */

static pe_tensor_slot *vector_slot(pe_tensor_slot *slot, const char *name, const void **data, size_t n, bool is_ids) {
    *slot = (pe_tensor_slot){.kind = is_ids ? "i32" : "f32", .data = data, .n_bytes = pe_pad(n * 4, 64)};
    slot->contents = is_ids ? PE_IDS : PE_FLOATS;
    snprintf(slot->name, sizeof slot->name, "extra.draft.%s", name);
    return slot + 1;
}

static pe_tensor_slot *matrix_slots(pe_tensor_slot *slot, const char *name, pe_matrix *m, size_t rows_padded, size_t columns) {
    m->n_panels = rows_padded / PE_PANEL;
    m->n_groups = pe_pad(columns, PE_GROUP) / PE_GROUP;
    size_t n_scales = m->n_panels * m->n_groups * PE_PANEL;
    slot[0] = (pe_tensor_slot){.data = (const void **)&m->codes, .n_bytes = n_scales * PE_GROUP, .contents = PE_CODES};
    slot[1] = (pe_tensor_slot){.data = (const void **)&m->scales, .n_bytes = pe_pad(n_scales * 2, 64), .contents = PE_HALVES};
    for (size_t i = 0; i < 2; i++) {
        slot[i].kind = "int8_g64";
        snprintf(slot[i].name, sizeof slot[i].name, "extra.draft.%s.%s", name, i == 0 ? "codes" : "scales");
    }
    return slot + 2;
}

/* Every tensor of a head, in the order of the format. */
static void list_slots(pe_draft_head *h, pe_tensor_slot slots[N_SLOTS]) {
    size_t dim = h->net.config.dim, hidden_dim = h->net.config.hidden_dim, dim_padded = pe_pad(dim, PE_PANEL);
    pe_tensor_slot *next = slots;
    next = vector_slot(next, "token_norm", (const void **)&h->token_norm, dim, false);
    next = vector_slot(next, "state_norm", (const void **)&h->state_norm, dim, false);
    next = matrix_slots(next, "w_in", &h->w_in, dim_padded, 2 * dim);
    next = vector_slot(next, "mlp_norm", (const void **)&h->layer.ffn_norm, dim, false);
    next = matrix_slots(next, "w_gate_up", &h->mlp.w_gate_up, 2 * pe_pad(hidden_dim, PE_PANEL), dim);
    next = matrix_slots(next, "w_down", &h->mlp.w_down, dim_padded, hidden_dim);
    next = vector_slot(next, "output_norm", (const void **)&h->output_norm, dim, false);
    next = matrix_slots(next, "output", &h->output, logits_stride(h), dim);
    vector_slot(next, "vocab", (const void **)&h->vocab, h->vocab_size, true);
}

static pe_status check_vocab(const pe_draft_head *h, char *err) {
    for (size_t i = 0; i < h->vocab_size; i++)
        if (h->vocab[i] < 0 || (uint32_t)h->vocab[i] >= h->model->config.vocab_size || (i > 0 && h->vocab[i] <= h->vocab[i - 1]))
            return pe_fail(PE_ERR_FORMAT, err, "tensor extra.draft.vocab does not hold ascending ids of %u tokens",
                           h->model->config.vocab_size);
    return PE_OK;
}

static pe_status set_tensors(pe_draft_head *h, const pe_tensor *tensors, size_t n_tensors, int n_threads, char *err) {
    pe_tensor_slot slots[N_SLOTS];
    list_slots(h, slots);
    if (n_tensors != N_SLOTS)
        return pe_fail(PE_ERR_FORMAT, err, "a draft head has %d tensors, not %zu", N_SLOTS, n_tensors);
    for (size_t i = 0; i < N_SLOTS; i++) {
        pe_status status = pe_tensor_assign(&slots[i], &tensors[i], err);
        if (status != PE_OK) return status;
    }
    pe_status status = pe_tensors_check(slots, N_SLOTS, n_threads, err);
    return status == PE_OK ? check_vocab(h, err) : status;
}

/* Of a layer without attention: q_dim stands for the two inputs, so that quantized rows have room for both. */
static void set_shape(pe_draft_head *h, const pe_model *model, uint32_t hidden_dim, uint32_t vocab_size) {
    h->model = model;
    h->net.config = (pe_config){.dim = model->config.dim, .hidden_dim = hidden_dim, .norm_eps = model->config.norm_eps};
    h->net.q_dim = 2 * (size_t)model->config.dim;
    h->layer.activation = PE_ACTIVATION_SWIGLU;
    h->layer.experts = &h->mlp;
    h->vocab_size = vocab_size;
}

pe_status pe_draft_head_create(pe_draft_head **out, const pe_model *model, uint32_t hidden_dim, uint32_t vocab_size,
                               const pe_tensor *tensors, size_t n_tensors, int n_threads, char *err) {
    *out = NULL;
    if (!model->ready) return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "the model has no weights yet");
    if (n_threads < 1 || n_threads > PE_MAX_THREADS)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "n_threads is %d, expected 1 to %d", n_threads, PE_MAX_THREADS);
    if (hidden_dim < 1 || hidden_dim > 1 << 22 || vocab_size < 1 || vocab_size > model->config.vocab_size)
        return pe_fail(PE_ERR_FORMAT, err, "config: a draft head of hidden_dim %u and %u tokens, expected 1 to %u and 1 to %u",
                       hidden_dim, vocab_size, 1u << 22, model->config.vocab_size);
    pe_draft_head *h = calloc(1, sizeof *h);
    if (h == NULL) return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for a draft head");
    set_shape(h, model, hidden_dim, vocab_size);
    pe_status status = set_tensors(h, tensors, n_tensors, n_threads, err);
    if (status == PE_OK) status = pe_pool_acquire(n_threads, err);
    h->has_threads = status == PE_OK;
    if (status == PE_OK)
        status = pe_slice_create(&h->slice, &h->net, pe_kernels_selected(), PE_KV_INT8, n_threads, pe_matmul_scratch_floats(),
                                 err);
    if (status != PE_OK) {
        pe_draft_head_destroy(h);
        return status;
    }
    *out = h;
    return PE_OK;
}

static void free_rows(pe_draft_head *h) {
    pe_aligned_free(h->inputs);
    pe_aligned_free(h->logits);
    h->inputs = h->logits = NULL;
    h->capacity = h->n = 0;
}

void pe_draft_head_destroy(pe_draft_head *h) {
    if (h == NULL) return;
    if (h->has_threads) pe_pool_release();
    pe_slice_destroy(&h->slice);
    free_rows(h);
    free(h);
}

static size_t row_floats(const pe_draft_head *h) { return input_stride(h) + logits_stride(h); }

size_t pe_draft_head_memory(const pe_draft_head *h) {
    return sizeof *h + pe_slice_bytes(&h->slice) + h->capacity * row_floats(h) * sizeof(float);
}

static pe_status reserve(pe_draft_head *h, size_t n, char *err) {
    pe_status status = pe_slice_reserve(&h->slice, n, err);
    if (status != PE_OK || n <= h->capacity) return status;
    free_rows(h);
    h->inputs = pe_aligned_alloc(n * input_stride(h) * sizeof(float));
    h->logits = pe_aligned_alloc(n * logits_stride(h) * sizeof(float));
    if (h->inputs == NULL || h->logits == NULL) {
        free_rows(h);
        return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory for %zu rows of a draft head", n);
    }
    h->capacity = n;
    return PE_OK;
}

/* ------------------------------------------------------------------ a step */

typedef struct input_job {
    pe_draft_head *h;
    const float *states;
    const int32_t *tokens;
} input_job;

/* One row of the residual stream and of the inputs. */
static void input_unit(void *arg, size_t row, int thread) {
    (void)thread;
    input_job *j = arg;
    pe_draft_head *h = j->h;
    size_t dim = h->net.config.dim, stride = pe_x_stride(&h->net);
    float *x = h->slice.x + row * stride, *input = h->inputs + row * input_stride(h);
    memcpy(x, j->states + row * dim, dim * sizeof(float));
    memset(x + dim, 0, (stride - dim) * sizeof(float));
    pe_embed(h->model, h->slice.kernels, input, j->tokens[row]);
    pe_slice_norm(&h->slice, row, input, input, h->token_norm, dim);
    pe_slice_norm(&h->slice, row, input + dim, x, h->state_norm, dim);
}

static void compute(pe_draft_head *h, float *states, const int32_t *tokens) {
    pe_slice *s = &h->slice;
    size_t n = s->n_tokens, dim = h->net.config.dim, stride = pe_x_stride(&h->net);
    input_job input = {h, states, tokens};
    pe_parallel_for(s->n_threads, n, input_unit, &input, NULL);
    pe_quantize_rows(s, h->inputs, input_stride(h), NULL, n, 2 * dim, NULL);
    pe_matmul_add_to_x(s, &h->w_in, NULL, NULL);
    pe_mlp(s, &h->layer);
    for (size_t t = 0; t < n; t++) memcpy(states + t * dim, s->x + t * stride, dim * sizeof(float));
    pe_quantize_rows(s, s->x, stride, NULL, n, dim, h->output_norm);
    pe_matmul(s, &h->output, NULL, h->logits, logits_stride(h), PE_STORE);
}

pe_status pe_draft_head_step(pe_draft_head *h, float *states, const int32_t *tokens, size_t n, uint8_t *failed, char *err) {
    h->n = 0;
    if (n < 1 || n > PE_DRAFT_HEAD_MAX_ROWS)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "%zu rows, expected 1 to %d", n, PE_DRAFT_HEAD_MAX_ROWS);
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= h->model->config.vocab_size)
            return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "token id %d is outside the vocabulary of %u", (int)tokens[i],
                           h->model->config.vocab_size);
    pe_status status = reserve(h, n, err);
    if (status != PE_OK) return status;
    uint64_t float_env = pe_float_env_enter();
    h->slice.n_tokens = n;
    memset(h->slice.failed, 0, n);
    compute(h, states, tokens);
    memcpy(failed, h->slice.failed, n);
    pe_float_env_leave(float_env);
    h->n = n;
    return PE_OK;
}

const float *pe_draft_head_logits(const pe_draft_head *h, size_t row) {
    return row < h->n ? h->logits + row * logits_stride(h) : NULL;
}

size_t pe_draft_head_logits_stride(const pe_draft_head *h) { return logits_stride(h); }

const int32_t *pe_draft_head_vocab(const pe_draft_head *h) { return h->vocab; }
