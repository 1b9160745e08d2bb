/* slice.h: the rows of a batch that go through the layers together, with every buffer that they need on their way.
 *
 * A row is one token at one position of one sequence. Rows of many sequences lie side by side in a slice, in the order
 * of the batch; consecutive positions of one sequence form query blocks. What works on a slice (matmul.h, attention.h,
 * block.h, mlp.h) finds in it the weights, the kernels and the threads to work with, and knows nothing of contexts. */
#ifndef PE_SLICE_H
#define PE_SLICE_H

#include "kernels/pe_math.h"
#include "model.h"
#include "threadpool.h"

enum {
    /* Tokens that go through the layers together; a longer batch is cut. Their activations should fit a share of the
     * last-level cache: beyond that a longer slice only saves reading the weights again. */
    PE_SLICE = 256,
    PE_SLICE_RECENT = 256, /* batches after which room that none of them needed is given back */
    PE_SLICE_MAX = 512,    /* what the buffers may grow to: pe_debug_block looks at longer slices */
    PE_ATTENTION_ROWS = 32 /* query rows (tokens x heads of one kv head) that share a pass over K and V */
};

/* Consecutive rows of a slice that are consecutive positions of one sequence. */
typedef struct pe_query_block {
    size_t first_token, n_tokens; /* rows of the slice */
    size_t first_position;
    int32_t sequence;
} pe_query_block;

/* Rows of a slice that have one adapter. */
typedef struct pe_adapter_group {
    const pe_adapter *adapter;
    size_t first, n; /* slice.adapted[first, first + n): the rows, ascending */
} pe_adapter_group;

typedef struct pe_slice {
    /* What to compute with; set by pe_slice_create. */
    const pe_model *model;
    const struct pe_kernels *kernels;
    pe_kv_dtype kv_dtype;
    int n_threads;

    pe_control *control; /* of the running call, or NULL */

    /* The rows, and buffers for `capacity` of them. */
    size_t capacity, n_tokens;
    uint8_t *failed;        /* (capacity) 1 = a kernel met an infinity or NaN in this row */
    size_t *origins;        /* (capacity) which row of the slice, as it was prepared, each row is: its own index until rows leave */
    size_t *selected;       /* (capacity) rows that a step is for, ascending */
    int32_t *sequences;     /* (capacity) */
    size_t *positions;      /* (capacity) */
    float *x;               /* (capacity, pad16(dim)) residual stream */
    float *branch;          /* (capacity, pad16(dim)) what is added to x when it is whole; with norms after, parallel halves, experts */
    float *normed;          /* (capacity, pad16(dim)) what a norm gave, where it is read again: by experts, by adapters */
    float *expert_out;      /* (capacity, pad16(dim)) what one expert gave to the rows that take it; with experts, as the next two */
    float *expert_weights;  /* (capacity, pe_n_mlps) */
    uint8_t *expert_taken;  /* (capacity, pe_n_mlps) 1 = the row takes it; the shared one, the last, is taken by all */
    float *qkv;             /* (capacity, pad16(qkv_width)) q, k and v, or the three of a convolution */
    float *att;             /* (capacity, mixed_width) output of attention, rows of q_dim, or of a convolution, of dim */
    float *h;               /* (capacity, pad16(pe_widest_mlp)) what the activation gave */
    pe_activations act;     /* the quantized input of the next matmul */
    int8_t *q;              /* (n_kv_heads, capacity, n_rep, head_dim_p) */
    float *q_scales;        /* (n_kv_heads, capacity, n_rep) */
    int32_t *q_corrections; /* likewise */
    float *q_f32;           /* (n_kv_heads, capacity, n_rep, head_dim_p), only with a float32 cache */
    float *cos, *sin;       /* (n_rope_tables, capacity, head_dim / 2) */
    float *q_key_bias;      /* (n_kv_heads, capacity, n_rep, head_dim): of each row (2, n_pairs) are used, see key_bias.h */
    pe_query_block *blocks; /* (capacity) */
    size_t n_blocks;

    /* Rows with adapters (adapter.h). The buffers are there once a batch has had some, until PE_SLICE_RECENT batches had none. */
    size_t n_ranks;           /* so many low-rank values of a row there is room for; 0 = no adapter is expected */
    size_t n_recent, recent_ranks; /* batches that were counted since the room was last measured, and the most that they needed */
    size_t *adapted;          /* (capacity) rows with an adapter, group by group */
    pe_adapter_group *groups; /* (capacity) */
    size_t n_groups;
    float *projected;         /* (capacity, n_ranks) row i belongs to adapted[i] */
    float *gate_up;           /* (capacity, 2 pad16(hidden_dim)) both before they are gated; not with experts */

    size_t n_bytes; /* of all these buffers */

    /* With key_bias: the RoPE angles of the chunks' first positions, as many as there have been; sin is negated, because
     * they turn back. */
    float *chunk_cos, *chunk_sin; /* (n_rope_tables, n_chunks, head_dim / 2) */
    size_t n_chunks;

    float *partials;          /* attention split by chunks: states of (block, kv head, chunk) */
    size_t partials_capacity; /* floats */

    float *thread_scratch; /* (n_threads, thread_scratch_floats) */
    size_t thread_scratch_floats;
} pe_slice;

/* A slice without rows: thread_scratch_floats floats of scratch for each thread, and no other buffer yet. On failure it
 * must be destroyed like any other. */
pe_status pe_slice_create(pe_slice *slice, const pe_model *model, const struct pe_kernels *kernels,
                          pe_kv_dtype kv_dtype, int n_threads, size_t thread_scratch_floats, char *err);
/* Free the buffers; a slice of zero bytes has none. */
void pe_slice_destroy(pe_slice *slice);
size_t pe_slice_bytes(const pe_slice *slice);

/* Grow the buffers to n_tokens rows (at most PE_SLICE_MAX). What was in them is lost. */
pe_status pe_slice_reserve(pe_slice *slice, size_t n_tokens, char *err);
/* Called before every batch: let buffers that are reserved from now on have room for adapters whose products of one input have
 * n_ranks ranks. Room that PE_SLICE_RECENT batches did not need is given back. What was in the buffers is lost. */
void pe_slice_expect_adapters(pe_slice *slice, size_t n_ranks);
/* Grow `partials` to n_floats. What was in it is lost. */
pe_status pe_slice_reserve_partials(pe_slice *slice, size_t n_floats, char *err);

/* After n_tokens, sequences and positions are set: no row has failed or left; RoPE angles and query blocks, the same for all
 * layers. */
pe_status pe_slice_prepare(pe_slice *slice, char *err);
/* Between a layer's q, k, v and its attention: only the rows selected[0, n_kept) go on, in their order and at the front; the others leave.
 * What rows are from here on (x, the quantized q, what a convolution reads of qkv, positions, sequences, failures, adapters, query
 * blocks) moves with them; RoPE's angles, which are behind them, do not. */
void pe_slice_keep(pe_slice *slice, size_t n_kept);
/* Whether the model's key biases are kept out of this cache: not out of a float32 one. */
static inline bool pe_slice_has_key_bias(const pe_slice *slice) {
    return slice->model->config.key_bias && slice->kv_dtype != PE_KV_F32;
}

/* After a stage: was the call cancelled? Then units were skipped and buffers hold anything. */
static inline bool pe_slice_is_cancelled(const pe_slice *slice) {
    return slice->control != NULL && atomic_load(&slice->control->cancelled);
}
/* Rows that have failed so far. */
size_t pe_slice_n_failed(const pe_slice *slice);

/* What a kernel returned as the bits of a row's largest magnitude. No two threads work on one row at the same time. */
static inline void pe_slice_note_bits(pe_slice *slice, size_t row, uint32_t absmax_bits) {
    if (absmax_bits >= PE_NOT_FINITE_BITS) slice->failed[row] = 1;
}

/* The row fails if one of x (n) is an infinity or NaN. */
static inline void pe_slice_note_floats(pe_slice *slice, size_t row, const float *x, size_t n) {
    uint32_t largest = 0; /* of the bits of |x| */
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = pe_float_bits(x[i]) & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    pe_slice_note_bits(slice, row, largest);
}

/* y (n) = RMSNorm of x (n) with weight w (n), all of them of `row`; x == y is allowed. The row fails if the sum of squares is not
 * finite: of finite values that are too large y would be zeros. */
static inline void pe_slice_norm(pe_slice *slice, size_t row, float *y, const float *x, const float *w, size_t n) {
    float sum_of_squares = slice->kernels->rmsnorm(y, x, w, n, slice->model->config.norm_eps);
    pe_slice_note_floats(slice, row, &sum_of_squares, 1);
}

static inline float *pe_thread_scratch(const pe_slice *slice, int thread) {
    return slice->thread_scratch + (size_t)thread * slice->thread_scratch_floats;
}

/* Floats from one row of x, qkv, h to the next. */
static inline size_t pe_x_stride(const pe_model *model) { return pe_pad(model->config.dim, PE_PANEL); }
static inline size_t pe_qkv_stride(const pe_model *model) { return pe_pad(model->qkv_width, PE_PANEL); }
static inline size_t pe_h_stride(const pe_model *model) { return pe_pad(pe_widest_mlp(&model->config), PE_PANEL); }

#endif
